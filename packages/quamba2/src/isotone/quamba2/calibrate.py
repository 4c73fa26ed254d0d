"""Static scales from calibration samples: channel statistics first, then the scales of every site (section 2, 3 and 4).

A run with a `folder` keeps what it has seen in checkpoints there, and goes on from the newest when it is started again
with the same samples, model and options.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.clustering import Plan
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import HEAD, Cache, Probe, forward
from isotone.quamba2.observers import Grouping, Observer
from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError

BATCH = 8  # samples of one length that are run together
MAMBA_PERCENTILE = 0.9995
Site = tuple[int, str]
Progress = Callable[[int], None]


def samples_of(data: Iterable[Any], count: int, length: int, vocab: int) -> list[Tensor]:
    """The first `count` samples of `data`, cut to `length` tokens, each (1, l).

    An item of `data`: ids (l,), a list of them, or several samples (b, l). Raises `InputError` where there is none, or
    an id is outside the vocabulary.
    """
    found: list[Tensor] = []
    for item in data:
        ids = torch.as_tensor(item)
        if not ids.numel():
            continue
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
            raise InputError(f"expected samples of token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
        found += [row[None, :length].long().cpu() for row in ids.reshape(-1, ids.shape[-1])]
        if len(found) >= count:
            break
    if not found:
        raise InputError("expected at least one calibration sample of token ids, got none")
    low, high = min(int(row.min()) for row in found), max(int(row.max()) for row in found)
    if low < 0 or high >= vocab:
        raise InputError(f"expected token ids from 0 to {vocab - 1} in calibration, got {low if low < 0 else high}")
    return found[:count]


def batches(samples: Sequence[Tensor], size: int = BATCH) -> list[Tensor]:
    """Neighbouring samples of one length put together, up to `size` of them."""
    found: list[Tensor] = []
    for sample in samples:
        if found and found[-1].shape[1] == sample.shape[1] and len(found[-1]) < size:
            found[-1] = torch.cat([found[-1], sample])
        else:
            found.append(sample)
    return found


class _Statistics(Probe):
    """For each layer the largest over samples of each channel's max or mean of |x| after the convolution."""

    def __init__(self, stat: str) -> None:
        self.stat = stat
        self.found: dict[int, Tensor] = {}

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        if name == "conv_x":
            sizes = values.abs().float()
            seen = (sizes.mean(1) if self.stat == "meanabs" else sizes.amax(1)).amax(0)
            self.found[layer] = torch.maximum(self.found[layer], seen) if layer in self.found else seen
        return values


def channel_statistics(
    model: Any, samples: Sequence[Tensor], stat: str = "absmax", online: bool = False, advance: Progress | None = None
) -> list[Tensor]:
    """The channels' magnitudes (d,) of each layer, the input of `sort_and_cluster` (section 2, "Channel statistics").

    `stat`: the largest over samples of the channel's maximum ("absmax", the text's) or of its mean |x| over tokens
    ("meanabs", the code's). Raises `InputError` where one is NaN or infinite.
    """
    probe, device = _Statistics(stat), model.lm_head.weight.device
    for ids in batches(samples):
        forward(model, ids.to(device), probe, online=online, last_only=True)
        if advance:
            advance(len(ids))
    found = [probe.found[layer].cpu() for layer in range(len(model.backbone.layers))]
    if not all(bool(values.isfinite().all()) for values in found):
        raise InputError("expected finite channel statistics, got NaN or infinity")
    return found


def groupings(arch: Architecture, config: QuambaConfig, x_groups: Grouping | None) -> dict[str, Grouping]:
    """Which channels share a scale at each site of a block (section 2, "Precision map").

    One scale a tensor but for: x after the convolution and the state, by `x_groups`, a plan's, if given; B and C after
    the convolution, one an SSM group with per_state_group; dt, one a head with dt_scales "head".
    """
    part = config.x_percentile
    if part is None:
        part = MAMBA_PERCENTILE if arch.kind == "mamba" and x_groups is None else 1.0
    tensor = Grouping.tensor
    x = x_groups or tensor(arch.inner)
    found = {"in_proj": tensor(arch.hidden), "out_proj": tensor(arch.inner)}
    found |= {name: tensor(size) for name, size in arch.segments.items()}
    found["conv_x"] = Grouping(x.labels, x.count, part)
    if arch.kind == "mamba":
        found |= {"dt_low": tensor(arch.dt_rank), "B": tensor(arch.state), "C": tensor(arch.state)}
        found["state"] = Grouping(x.labels, x.count, part, 1 if x_groups is None else arch.state)
        return found
    wide = arch.groups * arch.state
    for name in ("conv_B", "conv_C"):
        found[name] = Grouping.even(wide, arch.groups if config.per_state_group else 1)
    if config.dt_scales == "head":
        found["dt"] = Grouping.even(arch.heads, arch.heads)
    found["state"] = Grouping(x.labels, x.count, 1.0, arch.state)
    return found


def groups_of(plan: Plan | None) -> Grouping | None:
    """The groups of x's channels that `plan` makes."""
    return None if plan is None else Grouping(plan.labels, plan.count)


class _Recording(Probe):
    def __init__(self, observers: Mapping[Site, Observer]) -> None:
        self.observers = observers

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        observer = self.observers.get((layer, name))
        if observer is not None:
            # the state (b, h, p, N) has no tokens, the others no states
            shaped = values.flatten(1, 2).unsqueeze(1) if name == "state" else values.unsqueeze(-1)
            observer.update(shaped)
        return values


def calibrate(
    model: Any,
    samples: Sequence[Tensor],
    config: QuambaConfig,
    plans: Sequence[Plan] | None = None,
    online: bool = False,
    folder: str | Path | None = None,
    every: int = 8,
    advance: Progress | None = None,
) -> dict[Site, Tensor]:
    """The scales (count, states) of every site of `model`, a Hugging Face Mamba or Mamba2 that is already reordered.

    `samples`: of `samples_of`; each runs with a cache, so that the state after it is seen. `online`: as in `forward`.
    `folder`: where a checkpoint is kept every `every` batches; a run that was killed goes on from it. `advance`: called
    with the number of samples done. Raises `InputError` on no samples, values that are not finite, and a folder of
    another run.
    """
    if not samples:
        raise InputError("expected at least one calibration sample, got none")
    arch = Architecture.of(model.config)
    observers = {
        (layer, name): Observer(kept)
        for layer in range(arch.layers)
        for name, kept in groupings(arch, config, groups_of(plans[layer] if plans else None)).items()
    }
    observers[HEAD, "lm_head"] = Observer(Grouping.tensor(arch.hidden))
    probe, device = _Recording(observers), model.lm_head.weight.device

    def run(ids: Tensor) -> None:
        forward(model, ids.to(device), probe, Cache(arch.layers), online=online)
        if advance:
            advance(len(ids))

    if folder is None:
        for ids in batches(samples):
            run(ids)
    else:
        identity = _fingerprint(model, samples, config, plans)
        _resumable(batches(samples), run, observers, Path(folder), every, identity, device)
    return {site: observer.scales().cpu() for site, observer in observers.items()}


def _resumable(
    rows: Sequence[Tensor],
    run: Callable[[Tensor], None],
    observers: Mapping[Site, Observer],
    folder: Path,
    every: int,
    identity: str,
    device: torch.device,
) -> None:
    with CheckpointStore(folder, keep=2) as store:
        done, saved = 0, load_latest(folder, "torch")
        if saved is not None:
            if saved.state.get("identity") != identity:
                raise InputError(f"expected checkpoints of this calibration in {str(folder)!r}, got another's")
            done = saved.step
            for (layer, name), observer in observers.items():
                observer.value = saved.arrays[f"{layer}.{name}"].to(device)
        for number in range(done, len(rows)):
            run(rows[number])
            if (number + 1) % every == 0 or number + 1 == len(rows):
                seen = {f"{layer}.{name}": observer.value for (layer, name), observer in observers.items()}
                store.save(number + 1, seen, {"identity": identity})


def _fingerprint(model: Any, samples: Sequence[Tensor], config: QuambaConfig, plans: Sequence[Plan] | None) -> str:
    found = hashlib.sha256(repr(config).encode())
    for sample in samples:
        found.update(sample.numpy().tobytes())
    for plan in plans or ():
        found.update(plan.channel_index.numpy().tobytes() + plan.labels.numpy().tobytes())
    for parameter in model.parameters():
        found.update(repr(float(parameter.detach().double().sum())).encode())
    return found.hexdigest()
