"""Keys and values in fewer bits: what the cache stores instead of the model's own numbers.

A codec turns (..., e) numbers into planes of storage and back. Scales are per token and head (int8), per token, head
and group of numbers (int4), or fixed per slot (fp8, as serving engines do). Keys are stored after RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.shared.errors import InputError

FP8_MAX = 448.0  # the largest e4m3 number
FP16_MAX = 65504.0
KV_DTYPES = ("model", "fp32", "fp16", "bf16", "fp8", "int8", "int4")
INT4_GROUP = 32
_PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plane:
    """One tensor of storage: its type, and its last dimension for a vector of `width` numbers."""

    name: str
    dtype: torch.dtype
    width: int


@dataclass(frozen=True)
class Codec:
    """How a vector of `width` numbers is kept. Raises `InputError` on an unknown name, or a width int4 cannot halve."""

    name: str
    width: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.name not in KV_DTYPES:
            raise InputError(f"expected kv_dtype to be one of {', '.join(KV_DTYPES)}, got {self.name!r}")
        if self.name == "int4" and self.width % 2:
            raise InputError(f"expected an even head size for kv_dtype int4, got {self.width}")

    @property
    def group(self) -> int:
        """Numbers that share an int4 scale: 32, or where it does not divide the width, the whole width."""
        return INT4_GROUP if self.width % INT4_GROUP == 0 else self.width

    @property
    def planes(self) -> list[Plane]:
        """The tensors that one vector takes; a vector of no numbers (MLA's value) has no scales either."""
        if self.name == "int8" and self.width:
            return [Plane("codes", torch.int8, self.width), Plane("scale", torch.float32, 1)]
        if self.name == "int4" and self.width:
            groups = self.width // self.group
            return [
                Plane("codes", torch.uint8, self.width // 2),
                Plane("scale", torch.float16, groups),
                Plane("low", torch.float16, groups),
            ]
        kept = {**_PLAIN, "fp8": torch.float8_e4m3fn}.get(self.name, self.dtype)
        return [Plane("codes", kept, self.width)]

    @property
    def bytes(self) -> int:
        """Bytes of one vector, scales included."""
        return sum(plane.width * plane.dtype.itemsize for plane in self.planes)

    def encode(self, states: Float[Tensor, ...], scale: Tensor | float = 1.0) -> list[Tensor]:
        """The planes of `states` (..., width). `scale`: fp8's, broadcast against `states`; the others find their own.

        fp8 saturates at 448 times its scale, fp16 and the bottom of int4 at 65504. int8 is off by at
        most half its scale.
        """
        if self.name == "fp8":
            return [(states.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)]
        if not self.width:
            return [states.to(self.planes[0].dtype)]
        if self.name == "int8":
            numbers = states.float()
            step = (numbers.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
            return [torch.round(numbers / step).to(torch.int8), step]
        if self.name == "int4":
            numbers = states.float().unflatten(-1, (-1, self.group))
            # numbers beyond fp16 saturate: an infinite scale would make all of their group NaN
            low = numbers.amin(-1, keepdim=True).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
            # the stored, rounded scale is the one to divide by; it must reach the top from the rounded bottom
            top = numbers.amax(-1, keepdim=True)
            step = ((top - low.float()) / 15).clamp(1e-7, FP16_MAX).to(torch.float16)
            codes = torch.round((numbers - low.float()) / step.float()).clamp(0, 15).to(torch.uint8).flatten(-2)
            packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
            return [packed, step.squeeze(-1), low.squeeze(-1)]
        if self.name == "fp16":
            states = states.clamp(-FP16_MAX, FP16_MAX)
        return [states.to(self.planes[0].dtype)]

    def decode(self, planes: list[Tensor], dtype: torch.dtype, scale: Tensor | float = 1.0) -> Tensor:
        """The numbers (..., width) of `planes`, in `dtype`."""
        codes = planes[0]
        if not self.width:
            return codes.to(dtype)
        if self.name == "fp8":
            return (codes.to(torch.float32) * scale).to(dtype)
        if self.name == "int8":
            return (codes.to(torch.float32) * planes[1]).to(dtype)
        if self.name == "int4":
            both = (
                torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.float32).unflatten(-1, (-1, self.group))
            )
            return (both * planes[1].float().unsqueeze(-1) + planes[2].float().unsqueeze(-1)).flatten(-2).to(dtype)
        return codes if codes.dtype == dtype else codes.to(dtype)
