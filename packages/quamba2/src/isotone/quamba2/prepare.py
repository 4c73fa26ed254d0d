"""The float half of quantisation: fuse, rotate, reorder, calibrate, round the weights (section 2, "Pipeline order").

What comes out, `Prepared`, is what the integer model and its simulation are both made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.calibrate import Site, batches, calibrate, channel_statistics, samples_of
from isotone.quamba2.clustering import Plan, sort_and_cluster
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import HEAD, Probe, block, rms_norm
from isotone.quamba2.gptq import GPTQ, quantize_weight
from isotone.quamba2.loading import check_finite
from isotone.quamba2.reorder import reorder
from isotone.quamba2.rotate import check_width, fuse_norms, rotate_outputs, rotate_residual
from isotone.quamba2.weights import GroupedWeight, RowWeight, check_group, int8_by_rows
from isotone.shared.errors import InputError

Weight = GroupedWeight | RowWeight
Progress = Callable[[str, int, int], None]


@dataclass
class Prepared:
    """A model whose weights are rounded and whose activation scales are known.

    `model`: the Hugging Face model, fused, rotated and reordered, in float32; 4-bit weights stand dequantised in it.
    `weights`: in_proj and out_proj of each layer (x_proj and dt_proj of Mamba too, in int8) and (HEAD, "lm_head"),
    where it is quantised. `scales`: (count, states) of every site, empty where all activations and states keep 16 bits.
    """

    model: Any
    arch: Architecture
    config: QuambaConfig
    plans: list[Plan] | None
    scales: dict[Site, Tensor]
    weights: dict[Site, Weight]

    @property
    def online(self) -> bool:
        """Whether out_proj's input is rotated at run time."""
        return self.config.hadamard != "none"

    def labels(self, layer: int) -> Tensor:
        """The number of x's scale for each channel (d,)."""
        return torch.zeros(self.arch.inner, dtype=torch.int64) if self.plans is None else self.plans[layer].labels


def prepare(
    model: Any,
    calibration: Iterable[Any] | None,
    config: QuambaConfig,
    folder: str | Path | None = None,
    in_place: bool = False,
    on_progress: Progress | None = None,
) -> Prepared:
    """Steps 1 to 6 of section 2 on `model`, a Hugging Face Mamba or Mamba2 on any device.

    `calibration`: samples of token ids, as `samples_of` takes them; None where no step needs any. `folder`: of the
    checkpoints that calibration resumes from. `in_place`: change `model` itself, not a copy. `on_progress`: called with
    the step's name, samples or layers done, and their number. Raises `InputError` on a model, an option or samples
    that do not fit, before the first step.
    """
    arch = Architecture.of(model.config)
    _check(model, arch, config)
    bits = config.block_bits(arch.layers)
    calibrated = config.state_bits == 8 or 8 in bits
    reorders = config.reorders and (arch.kind == "mamba2" or config.group_channels)
    gptq = config.gptq and config.w_bits == 4
    needed = calibrated or gptq
    if needed and calibration is None:
        raise InputError("expected calibration samples of token ids for static scales and GPTQ, got none")
    count, length = max(config.calib_samples, config.gptq_samples), max(config.calib_len, config.gptq_len)
    samples = [] if calibration is None or not needed else samples_of(calibration, count, length, arch.vocab)
    short = [sample[:, : config.calib_len] for sample in samples[: config.calib_samples]]
    model = (model if in_place else copy.deepcopy(model)).float().eval()

    def say(step: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            if on_progress:
                on_progress(step, done, total)

        return advance

    fuse_norms(model)
    if config.hadamard == "all":
        rotate_residual(model)
    plans = None
    if reorders:
        stats = channel_statistics(model, short, config.stat, advance=say("statistics", len(short)))
        m = config.head_groups if arch.kind == "mamba2" else 1
        plans = [
            sort_and_cluster(values, arch.head_dim, arch.groups, m, config.dim_groups, config.clustering)
            for values in stats
        ]
        reorder(model, plans)
    online = config.hadamard != "none"
    if online:
        rotate_outputs(model)
    scales = {}
    if calibrated:
        scales = calibrate(model, short, config, plans, online, folder, advance=say("calibration", len(short)))
    prepared = Prepared(model, arch, config, plans, scales, {})
    rows = [sample[:, : config.gptq_len] for sample in samples[: config.gptq_samples]]
    _round_weights(prepared, rows if gptq else [], say("weights", arch.layers + 1))
    return prepared


def _check(model: Any, arch: Architecture, config: QuambaConfig) -> None:
    config.block_bits(arch.layers)
    if config.w_bits == 4:
        check_group(arch.hidden, config.group_size, "in_proj")
        check_group(arch.inner, config.group_size, "out_proj")
    if config.lm_head_bits == 4:
        check_group(arch.hidden, config.group_size, "lm_head")
    if config.embedding_bits == 4:
        check_group(arch.hidden, None, "the embedding")
    for width in {"none": (), "out": (arch.inner,), "all": (arch.inner, arch.hidden)}[str(config.hadamard)]:
        check_width(width)
    check_finite(model)


class _Hessians(Probe):
    """Takes in the inputs of the two projections of one layer."""

    def __init__(self, arch: Architecture, device: torch.device) -> None:
        self.found = {"in_proj": GPTQ(arch.hidden, device), "out_proj": GPTQ(arch.inner, device)}

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        if name in self.found:
            self.found[name].add(values)
        return values


@torch.no_grad()
def _round_weights(prepared: Prepared, samples: list[Tensor], advance: Callable[[int], None]) -> None:
    """Round layer by layer; with `samples` by GPTQ, on the outputs of the layers that are rounded already."""
    model, arch, config = prepared.model, prepared.arch, prepared.config
    device = model.lm_head.weight.device
    hidden = [model.backbone.embeddings(ids.to(device)) for ids in batches(samples)]
    for number, layer in enumerate(model.backbone.layers):
        hessians = _Hessians(arch, device) if samples else None
        for values in hidden if hessians is not None else ():
            assert hessians is not None
            block(layer, arch, values, number, hessians, None, None, prepared.online)
        for name in ("in_proj", "out_proj"):
            linear = getattr(layer.mixer, name)
            if config.w_bits == 8:
                segments = list(arch.segments.values()) if name == "in_proj" else [arch.hidden]
                prepared.weights[number, name] = int8_by_rows(linear.weight, segments)
                continue
            group = check_group(linear.weight.shape[1], config.group_size, name)
            found = hessians.found[name] if hessians else None
            rounded = quantize_weight(linear.weight, group, found, config.gptq_dampening)
            prepared.weights[number, name] = rounded
            linear.weight.copy_(rounded.dequantize())
        if arch.kind == "mamba":
            for name, linear in (("x_proj", layer.mixer.x_proj), ("dt_proj", layer.mixer.dt_proj)):
                prepared.weights[number, name] = int8_by_rows(linear.weight, [len(linear.weight)])
        hidden = [block(layer, arch, values, number, Probe(), None, None, prepared.online) for values in hidden]
        advance(1)
    if config.lm_head_bits == 8:
        prepared.weights[HEAD, "lm_head"] = int8_by_rows(model.lm_head.weight, [arch.vocab])
    elif config.lm_head_bits == 4:
        hessian = GPTQ(arch.hidden, device) if samples else None
        for values in hidden if hessian is not None else ():
            assert hessian is not None
            hessian.add(rms_norm(values, arch.eps))
        group = check_group(arch.hidden, config.group_size, "lm_head")
        rounded = quantize_weight(model.lm_head.weight, group, hessian, config.gptq_dampening)
        prepared.weights[HEAD, "lm_head"] = rounded
        model.lm_head.weight.copy_(rounded.dequantize())
    advance(1)
