"""Shapes of the released models, their bytes counted without a weight of them, and random models (section 9).

Sizes and speeds need no trained weights: float models are built on the meta device, quantised ones are counted by
`layout.expected`, tensor by tensor as they are saved.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.layout import expected
from isotone.quamba2.modeling import QuambaForCausalLM
from isotone.quamba2.plain import PlainConfig, PlainMamba2
from isotone.quamba2.report import state_bytes
from isotone.shared.errors import InputError

MODES: dict[str, dict[str, Any]] = {
    "W8A8": {"w_bits": 8},
    "W4A8": {},
    "W4A16": {"a_bits": 16},
}
_SIZES = {
    "tiny": PlainConfig(128, 2, 8, 32, 16, 2, 256, tie_word_embeddings=True),
    "2.7b": PlainConfig(2560, 64, 80, 64, 128, 1, 50288, tie_word_embeddings=True),
    "8b": PlainConfig(4096, 56, 128, 64, 128, 8, 256000),
}


def shape(name: str) -> PlainConfig:
    """The sizes of Mamba2 "2.7b" or "8b", or of a "tiny" one. Raises `InputError` on another name."""
    if name not in _SIZES:
        raise InputError(f"expected a shape of {', '.join(_SIZES)}, got {name!r}")
    return replace(_SIZES[name])


def options(mode: str) -> QuambaConfig:
    """The config of "W8A8", "W4A8" or "W4A16", head to toe."""
    return QuambaConfig(**MODES[mode])


def float16_weight_bytes(config: PlainConfig, tied: bool | None = None) -> int:
    """Of the float model at two bytes a number, a head that is `tied` to the embedding counted once, as it is stored.

    `tied`: by default what the config says. The model is built on the meta device: no weight is made.
    """
    with torch.device("meta"):
        model = PlainMamba2(replace(config, tie_word_embeddings=False))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if config.tie_word_embeddings if tied is None else tied:
        numbers -= config.vocab_size * config.hidden_size
    return 2 * numbers


def specs(config: Any, chosen: QuambaConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and type of every tensor of the quantised model."""
    arch = Architecture.of(config)
    return expected(arch, chosen, bool(config.use_bias), bool(config.use_conv_bias), arch.heads)


def quantized_weight_bytes(config: Any, chosen: QuambaConfig) -> int:
    """Of every tensor of the quantised model, scales and static steps with them, as it is saved."""
    return sum(math.prod(size) * dtype.itemsize for size, dtype in specs(config, chosen).values())


def float16_state_bytes(config: Any) -> int:
    """Of one sequence's cache at two bytes a number: the last k - 1 inputs of the convolutions, and the states."""
    arch = Architecture.of(config)
    return 2 * arch.layers * (arch.conv_width * (arch.conv_kernel - 1) + arch.inner * arch.state)


def quantized_state_bytes(config: Any, chosen: QuambaConfig) -> int:
    """Of one sequence's cache in the quantised model."""
    arch = Architecture.of(config)
    blocks = chosen.block_bits(arch.layers)
    return sum(state_bytes(arch, bits, chosen.keeps_int8_state(bits)) for bits in blocks)


def memory(name: str, mode: str = "W4A8") -> dict[str, float]:
    """Ratios of float16 bytes to quantised ones of shape `name`: "weights", "untied" (against a float16 model whose
    head is a tensor of its own, as the quantised one's is), "states", and "sum 1" and "sum 128", weights and states of
    so many sequences."""
    config, chosen = shape(name), options(mode)
    full, few = float16_weight_bytes(config), quantized_weight_bytes(config, chosen)
    state, small = float16_state_bytes(config), quantized_state_bytes(config, chosen)
    return {
        "weights": full / few,
        "untied": float16_weight_bytes(config, False) / few,
        "states": state / small,
        **{f"sum {batch}": (full + batch * state) / (few + batch * small) for batch in (1, 128)},
    }


def random_model(config: Any, chosen: QuambaConfig, device: str = "cpu", seed: int = 0) -> QuambaForCausalLM:
    """A quantised model of random weights on `device`, for speed alone: it says nothing sensible.

    Scales are such that no number overflows; the groups of x are even. On the meta device nothing is made.
    """
    arch = Architecture.of(config)
    generator = torch.Generator(device).manual_seed(seed) if device != "meta" else None
    found = {
        name: _tensor(name, size, dtype, arch, device, generator)
        for name, (size, dtype) in specs(config, chosen).items()
    }
    return QuambaForCausalLM(config, chosen, found)


def _tensor(
    name: str, size: tuple[int, ...], dtype: torch.dtype, arch: Architecture, device: str, generator: Any
) -> Tensor:
    last = name.rpartition(".")[2]
    if last in ("head_ends", "dim_ends"):
        whole = arch.heads // arch.groups if last == "head_ends" else arch.head_dim
        ends = torch.arange(1, size[-1] + 1) * whole // size[-1]
        return ends.to(torch.int32).expand(size).contiguous().to(device)
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, size, dtype=dtype, device=device, generator=generator)
    if dtype == torch.int8:
        return torch.randint(-127, 128, size, dtype=dtype, device=device, generator=generator)
    if "scale" in name:
        # codes of unit spread: 127 steps reach 3, and a product of n of them stays near 1
        step = 0.1 if name.endswith(("A_log_code_scales", "D_code_scales")) else 3.0
        width = arch.inner if "out_proj" in name else arch.hidden
        if last == "scales" and (".in_proj" in name or ".out_proj" in name or name.startswith("lm_head")):
            step = 30.0 * width**-0.5 if dtype == torch.float16 else 3.0 * width**-0.5
        return torch.full(size, step / 127, dtype=dtype, device=device)
    values = torch.rand(size, device=device, generator=generator).to(dtype)
    return values - 4 if name.endswith("dt_bias") else values * 0.02 if name.endswith("weight") else values
