"""What quantisation cost and saved: decibels of each block, bytes, scales (section 8, `report`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.forward import Probe, block
from isotone.quamba2.hadamard import hadamard_transform


@dataclass(frozen=True)
class BlockReport:
    """One block: its activations' `bits`, `weight_bytes` with their scales, `state_bytes` of one sequence's cache, the
    number of static `scales`, and `sqnr` in decibels against the float model, where one was given."""

    bits: int
    weight_bytes: int
    state_bytes: int
    scales: int
    sqnr: float | None


@dataclass(frozen=True)
class Report:
    """A model: its `blocks`, the bytes of `embedding` and `lm_head`, `total_bytes` of all tensors as saved, and
    `float16_bytes` that the same model takes unquantised."""

    blocks: list[BlockReport]
    embedding: int
    lm_head: int
    total_bytes: int
    float16_bytes: int

    @property
    def state_bytes(self) -> int:
        """Of one sequence's cache."""
        return sum(one.state_bytes for one in self.blocks)


def report(model: Any, reference: Any = None, input_ids: Tensor | None = None) -> Report:
    """Bytes and scales of `model`, a `QuambaForCausalLM`; with the float `reference` and `input_ids` (b, l) also each
    block's signal-to-quantisation-noise ratio."""
    decibels: list[float] | list[None] = [None] * model.arch.layers
    if reference is not None and input_ids is not None:
        decibels = block_sqnr(model, reference, input_ids)
    tensors = model.tensors()
    sizes = {name: values.nbytes for name, values in tensors.items()}
    blocks = []
    for number, kept in enumerate(model.blocks):
        prefix = f"blocks.{number}."
        scales = [name for name in tensors if name.startswith(f"{prefix}scales.")]
        blocks.append(
            BlockReport(
                kept.bits,
                sum(size for name, size in sizes.items() if name.startswith(prefix)),
                state_bytes(model.arch, kept.bits, kept.int8_state),
                sum(tensors[name].numel() for name in scales),
                decibels[number],
            )
        )
    parts = [sum(s for name, s in sizes.items() if name.startswith(part)) for part in ("embedding.", "lm_head.")]
    return Report(blocks, parts[0], parts[1], sum(sizes.values()), float16_bytes(model.arch))


def state_bytes(arch: Architecture, bits: int, int8_state: bool) -> int:
    """Of one block's cache for one sequence: k - 1 inputs of the convolution, and the SSM state.

    What is not int8 is float32, as it is computed.
    """
    window = arch.conv_width * (arch.conv_kernel - 1) * (1 if bits == 8 else 4)
    return window + arch.inner * arch.state * (1 if int8_state else 4)


def float16_bytes(arch: Architecture) -> int:
    """Of the float model with an untied head, two bytes a number: without biases of the projections."""
    width = sum(arch.segments.values())
    numbers = width * arch.hidden + arch.hidden * arch.inner + arch.conv_width * (arch.conv_kernel + 1) + arch.hidden
    if arch.kind == "mamba2":
        numbers += 3 * arch.heads + arch.inner
    else:
        numbers += (2 * arch.dt_rank + 3 * arch.state + 2) * arch.inner
    return 2 * (arch.layers * numbers + 2 * arch.vocab * arch.hidden + arch.hidden)


def sqnr(wanted: Float[Tensor, "*shape"], got: Float[Tensor, "*shape"]) -> float:
    """10 log10 of the energy of `wanted` over that of the difference, in decibels."""
    noise = (wanted - got).double().square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise.clamp_min(1e-300)))


@torch.no_grad()
def block_sqnr(model: Any, reference: Any, input_ids: Int[Tensor, "b l"]) -> list[float]:
    """The decibels of each block's own output (without its residual), both fed the float model's hidden states.

    `model`: a `QuambaForCausalLM`; `reference`: the float model it was made of.
    """
    device = reference.lm_head.weight.device
    hidden = reference.backbone.embeddings(input_ids.to(device)).float()
    rotated = model.config.hadamard == "all"
    found = []
    for number, layer in enumerate(reference.backbone.layers):
        after = block(layer, model.arch, hidden, number, Probe(), None, None, False)
        given, wanted = hidden.to(model.device), (after - hidden).to(model.device)
        if rotated:
            given, wanted = hadamard_transform(given), hadamard_transform(wanted)
        found.append(sqnr(wanted, model.blocks[number](given, None, number, None) - given))
        hidden = after
    return found
