"""What to quantise, and to how many bits: every option, and the one place where it is checked.

The modes of the paper are W8A8, W4A8, W4A16 and their mixture W4AX, which keeps 4-bit weights and gives each block
8-bit or 16-bit activations. The other fields are the rows of the paper's ablations (sections 1 and 2).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from isotone.shared.errors import InputError, check_count

BITS = (4, 8, 16)
HADAMARD = ("none", "out", "all")
STATS = ("absmax", "meanabs")
CLUSTERINGS = ("kmeans", "dp")
DT_SCALES = ("tensor", "head")
MODES = "W8A8, W4A8, W4A16 or W4 mixed"


@dataclass(frozen=True)
class QuambaConfig:
    """How a model is quantised (section 8). Raises `InputError` on a value that is not one of those named here.

    - `w_bits` 4 or 8; `a_bits` 8, 16 or "mixed", where `a16_blocks` are the blocks that keep 16 bits.
    - `group_size`: inputs that share a 4-bit scale, None for one scale a row.
    - `sort_and_cluster`, `head_groups` (m), `dim_groups` (n): the scales of x; `clustering` is "kmeans" (the paper's)
      or "dp" (exact), `stat` what orders the channels. `group_channels`: for Mamba's channels too, an extension.
    - `per_state_group`: a scale of B and C for each SSM group. `dt_scales`: "tensor", or "head" for a scale a head.
    - `hadamard`: "all", "out" (the input of out_proj alone) or "none"; True and False stand for "all" and "none".
    - `embedding_bits`, `lm_head_bits`: 4, 8 or 16, by default w_bits.
    - `state_bits`: of the cached SSM states, 8 or 16, by default that of the activations.
    - `x_percentile`: the part of |x| that its scale covers, 1 for the maximum; by default 0.9995 for Mamba, else 1.
    - `calib_samples` of `calib_len` tokens for the scales, `gptq_samples` of `gptq_len` for GPTQ.
    """

    w_bits: int = 4
    a_bits: int | str = 8
    group_size: int | None = 128
    sort_and_cluster: bool = True
    head_groups: int = 4
    dim_groups: int = 4
    clustering: str = "kmeans"
    stat: str = "absmax"
    group_channels: bool = False
    per_state_group: bool = True
    hadamard: bool | str = "all"
    gptq: bool = True
    gptq_dampening: float = 0.01
    gptq_samples: int = 128
    gptq_len: int = 1024
    embedding_bits: int | None = None
    lm_head_bits: int | None = None
    state_bits: int | None = None
    x_percentile: float | None = None
    dt_scales: str = "tensor"
    a16_blocks: tuple[int, ...] = ()
    calib_samples: int = 512
    calib_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.hadamard, bool):
            object.__setattr__(self, "hadamard", "all" if self.hadamard else "none")
        self._check_modes()
        for name, allowed in (
            ("hadamard", HADAMARD),
            ("stat", STATS),
            ("clustering", CLUSTERINGS),
            ("dt_scales", DT_SCALES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("sort_and_cluster", "group_channels", "per_state_group", "gptq"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"expected {name} to be true or false, got {getattr(self, name)!r}")
        for name in ("head_groups", "dim_groups", "calib_samples", "calib_len", "gptq_samples", "gptq_len"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        if self.group_size is not None:
            check_count("group_size", self.group_size)
        damp, part = self.gptq_dampening, self.x_percentile
        if not (isinstance(damp, float | int) and 0 < damp < math.inf):
            raise InputError(f"expected gptq_dampening to be a finite number above 0, got {damp!r}")
        if part is not None and not (isinstance(part, float | int) and 0.5 <= part <= 1):
            raise InputError(f"expected x_percentile from 0.5 to 1, got {part!r}")

    def _check_modes(self) -> None:
        """Bits, and what follows from them where it was not given."""
        if (self.w_bits, self.a_bits) not in ((8, 8), (4, 8), (4, 16), (4, "mixed")):
            raise InputError(f"expected {MODES}, got w_bits {self.w_bits!r} and a_bits {self.a_bits!r}")
        for name, value in (("embedding_bits", self.w_bits), ("lm_head_bits", self.w_bits)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            if getattr(self, name) not in BITS:
                raise InputError(f"expected {name} to be 4, 8 or 16, got {getattr(self, name)!r}")
        if self.state_bits is None:
            object.__setattr__(self, "state_bits", 16 if self.a_bits == 16 else 8)
        if self.state_bits not in (8, 16):
            raise InputError(f"expected state_bits to be 8 or 16, got {self.state_bits!r}")
        object.__setattr__(self, "a16_blocks", tuple(sorted(self.a16_blocks)))
        for block in self.a16_blocks:
            check_count("each of a16_blocks", block, 0)
        if len(set(self.a16_blocks)) < len(self.a16_blocks):
            raise InputError(f"expected a16_blocks without repetition, got {list(self.a16_blocks)}")
        if self.a16_blocks and self.a_bits != "mixed":
            raise InputError(f"expected a_bits 'mixed' where a16_blocks are given, got {self.a_bits!r}")

    def block_bits(self, layers: int) -> tuple[int, ...]:
        """The activations' bits of each of `layers` blocks. Raises `InputError` where a16_blocks names a later one."""
        if self.a_bits != "mixed":
            return (int(self.a_bits),) * layers
        if self.a16_blocks and self.a16_blocks[-1] >= layers:
            raise InputError(f"expected a16_blocks below {layers}, the model's blocks, got {self.a16_blocks[-1]}")
        return tuple(16 if block in self.a16_blocks else 8 for block in range(layers))

    def keeps_int8_state(self, bits: int) -> bool:
        """Whether a block with activations of `bits` caches int8 states: a block of 16 bits only in W4A16, if asked."""
        return self.state_bits == 8 and (bits == 8 or self.a_bits == 16)

    @property
    def reorders(self) -> bool:
        """Whether channels are sorted and clustered: not where all activations keep 16 bits (section 2)."""
        return self.sort_and_cluster and self.a_bits != 16

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        return {**asdict(self), "a16_blocks": list(self.a16_blocks)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> QuambaConfig:
        """The options out of `to_dict`'s. Raises `InputError` on a name that is no option."""
        if strange := sorted(set(document) - set(cls.__dataclass_fields__)):
            raise InputError(f"expected options of QuambaConfig, got {strange[0]!r}")
        return cls(**{**document, "a16_blocks": tuple(document.get("a16_blocks", ()))})
