"""The quantised model simulated in float32: rounded weights, and a round trip through the codes at every site.

It runs on any device and has every switch of the ablations; the integer model of `modeling` gives the same numbers, but
for the order of its sums.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.quamba2.calibrate import Site, groupings, groups_of
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import HEAD, Cache, Probe, forward
from isotone.quamba2.loading import load
from isotone.quamba2.packing import embedding_rows, quantize_embedding
from isotone.quamba2.prepare import Prepared, prepare
from isotone.quamba2.weights import RowWeight, int8_scale


class FakeQuamba(nn.Module):
    """Simulates what `prepared` gives. `block_bits`: the activations' bits of each block, by default the config's."""

    def __init__(self, prepared: Prepared, block_bits: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.arch, self.config, self.online = prepared.arch, prepared.config, prepared.online
        self.block_bits = block_bits or prepared.config.block_bits(prepared.arch.layers)
        self.model = _with_rounded_weights(prepared, self.block_bits)
        self.probe = _RoundTrip(prepared, self.block_bits)

    def new_cache(self) -> Cache:
        """An empty cache for `forward`."""
        return Cache(self.arch.layers)

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "b n vocab"]:
        """The logits, as `forward.forward` gives them."""
        return forward(self.model, input_ids, self.probe, cache, attention_mask, self.online, last_only)


def fake_quantize(
    model: Any, config: QuambaConfig | None = None, calibration: Iterable[Any] | None = None
) -> FakeQuamba:
    """Simulate the quantisation of `model` (a Hugging Face Mamba or Mamba2, or its folder), which stays as it is.

    `calibration`: samples of token ids. Raises `InputError` as `quantize` does.
    """
    return FakeQuamba(prepare(load(model), calibration, config or QuambaConfig()))


def head_bits(block_bits: tuple[int, ...], lm_head_bits: int) -> int:
    """The bits of lm_head's input: 8, but 16 where the head is not quantised or every block keeps 16."""
    return 16 if lm_head_bits == 16 or set(block_bits) == {16} else 8


def round_trip(values: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """values -> codes -> values (section 2, "Quantiser")."""
    top = 2 ** (bits - 1)
    return torch.round(values / scale).clamp(-top, top - 1) * scale


class _RoundTrip(Probe):
    def __init__(self, prepared: Prepared, block_bits: tuple[int, ...]) -> None:
        arch, config = prepared.arch, prepared.config
        self.scales: dict[Site, Tensor] = {}
        for layer, bits in enumerate(block_bits):
            kept = groupings(arch, config, groups_of(prepared.plans[layer] if prepared.plans else None))
            names = set(kept) if bits == 8 else {"state"}
            if not config.keeps_int8_state(bits):
                names -= {"state"}
            for name in names:
                # (width, states): the state's rows are the channels, all others have one column
                self.scales[layer, name] = prepared.scales[layer, name][kept[name].labels]
        if head_bits(block_bits, config.lm_head_bits or 16) == 8:
            self.scales[HEAD, "lm_head"] = prepared.scales[HEAD, "lm_head"].expand(arch.hidden, 1)

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        scale = self.scales.get((layer, name))
        if scale is None:
            return values
        scale = scale.to(values.device)
        return round_trip(values, scale.unflatten(0, values.shape[1:3]) if name == "state" else scale[:, 0])


@torch.no_grad()
def _with_rounded_weights(prepared: Prepared, block_bits: tuple[int, ...]) -> Any:
    model, config, arch = copy.deepcopy(prepared.model), prepared.config, prepared.arch
    head = head_bits(block_bits, config.lm_head_bits or 16)
    for layer, bits in enumerate(block_bits):
        mixer = model.backbone.layers[layer].mixer
        names = ["in_proj", "out_proj"]
        if bits == 8:
            names += ["x_proj", "dt_proj"] if arch.kind == "mamba" else []
            for name, values in int8_parts(mixer, arch).items():
                _parameter(mixer, name).copy_(values)
        for name in names:
            getattr(mixer, name).weight.copy_(_weight(prepared.weights, (layer, name), bits))
    if config.lm_head_bits == 16:
        model.lm_head.weight.copy_(model.lm_head.weight.half())
    if (HEAD, "lm_head") in prepared.weights:
        model.lm_head.weight.copy_(_weight(prepared.weights, (HEAD, "lm_head"), head))
    weight, rows = model.backbone.embeddings.weight, int(config.embedding_bits or 16)
    if rows == 16:
        weight.copy_(weight.half())
    else:
        weight.copy_(embedding_rows(torch.arange(arch.vocab, device=weight.device), *quantize_embedding(weight, rows)))
    return model


def _weight(weights: Mapping[Site, Any], site: Site, bits: int) -> Tensor:
    """What the product sees: W4A8 multiplies with the second level."""
    found = weights[site]
    return (found if bits == 16 or isinstance(found, RowWeight) else found.int8()).dequantize()


def _parameter(mixer: Any, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(getattr(mixer, owner) if owner else mixer, last)


def int8_parts(mixer: Any, arch: Any) -> dict[str, Tensor]:
    """The small weights of an A8 block after their round trip: the convolution's parts, A_log and D."""
    sizes = list(arch.conv_segments.values())
    found = {"conv1d.weight": _by_parts(mixer.conv1d.weight, sizes)}
    if mixer.conv1d.bias is not None:
        found["conv1d.bias"] = _by_parts(mixer.conv1d.bias, sizes)
    return {**found, "A_log": _by_parts(mixer.A_log, [len(mixer.A_log)]), "D": _by_parts(mixer.D, [len(mixer.D)])}


def _by_parts(values: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([round_trip(part, int8_scale(part)) for part in values.split(sizes)])
