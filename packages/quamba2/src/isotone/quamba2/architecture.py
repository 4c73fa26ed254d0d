"""The sizes of a Mamba or Mamba2, read from a Hugging Face config, and which models are refused.

Dimensions here and in all modules: b batch, l length, h heads, p head_dim, G groups, N state, d = h p channels.
Mamba has no heads: it is taken as one head of d channels in one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isotone.shared.errors import InputError

KINDS = ("mamba", "mamba2")


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model. `segments`: the parts of in_proj's output by name, in their order."""

    kind: str
    layers: int
    vocab: int
    hidden: int
    inner: int
    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int
    dt_rank: int
    eps: float
    dt_limit: tuple[float, float]
    chunk: int

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """The sizes in a Hugging Face config. Raises `InputError` on a model that is no Mamba or Mamba2."""
        check_kind(config)
        mamba2 = config.model_type == "mamba2"
        inner = int(config.expand * config.hidden_size)
        if mamba2 and config.num_heads % config.n_groups:
            raise InputError(
                f"expected n_groups to divide num_heads, got {config.n_groups} groups and {config.num_heads} heads"
            )
        return cls(
            kind=config.model_type,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            inner=inner,
            heads=config.num_heads if mamba2 else 1,
            head_dim=config.head_dim if mamba2 else inner,
            groups=config.n_groups if mamba2 else 1,
            state=config.state_size,
            conv_kernel=config.conv_kernel,
            dt_rank=0 if mamba2 else int(config.time_step_rank),
            eps=config.layer_norm_epsilon,
            dt_limit=_pair(config.time_step_limit) if mamba2 else (0.0, math.inf),
            chunk=config.chunk_size if mamba2 else 256,
        )

    @property
    def segments(self) -> dict[str, int]:
        if self.kind == "mamba":
            return {"x": self.inner, "z": self.inner}
        wide = self.groups * self.state
        return {"z": self.inner, "x": self.inner, "B": wide, "C": wide, "dt": self.heads}

    @property
    def conv_segments(self) -> dict[str, int]:
        """The parts that go through the convolution."""
        return {name: size for name, size in self.segments.items() if name in "xBC"}

    @property
    def conv_width(self) -> int:
        return sum(self.conv_segments.values())

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one sequence's SSM state: (h, p, N)."""
        return (self.heads, self.head_dim, self.state)


def _pair(limit: Any) -> tuple[float, float]:
    low, high = (float(value) for value in limit)
    return low, high


def check_kind(config: Any) -> None:
    """Raise `InputError` where `config` is of another model, a hybrid, a quantised one or has another activation."""
    name = getattr(config, "model_type", None)
    if getattr(config, "quantization_config", None):
        raise InputError("expected a model that is not quantised yet, got one with a quantization_config")
    if name not in KINDS:
        raise InputError(f"expected a model of type mamba or mamba2, got {name!r}")
    if set(getattr(config, "layer_types", None) or ()) - {"linear_attention", "mamba", "mamba2"}:
        raise InputError("expected a model of Mamba blocks alone, got a hybrid with attention")
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"expected hidden_act silu, got {config.hidden_act!r}")
