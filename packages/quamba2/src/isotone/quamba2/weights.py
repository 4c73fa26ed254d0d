"""Quantised weights: 4-bit codes with a scale for each group of inputs, or int8 codes with a scale a row (section 2).

Group scales are float16 from the start, so that what is saved is what was computed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from isotone.quamba2.packing import dequantize_groups, group_scales, quantize_groups, two_level
from isotone.shared.errors import InputError

FLOOR = 1e-6  # no scale is smaller: a group of zeros has one too


@dataclass(frozen=True)
class GroupedWeight:
    """4-bit codes 0 to 15 of a weight (out, in) and scales (out, groups): w = (q - 8) s."""

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """float32."""
        return dequantize_groups(self.codes, self.scales)

    def int8(self) -> RowWeight:
        """The second level, which W4A8 multiplies with: int8 codes and a scale a row."""
        return RowWeight(*two_level(self.codes, self.scales))


@dataclass(frozen=True)
class RowWeight:
    """int8 codes of a weight (out, in) and a float32 scale a row; rows of one segment share it in W8A8."""

    codes: Int8[Tensor, "out in"]
    scales: Float[Tensor, " out"]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """float32."""
        return self.codes.float() * self.scales[:, None]


def check_group(columns: int, group: int | None, name: str) -> int:
    """The group of a weight with `columns` inputs, all for None. Raises `InputError` where it does not divide."""
    size = columns if group is None else group
    if columns % size or columns % 8:
        raise InputError(f"expected group_size to divide the {columns} inputs of {name} (in eights), got {group}")
    return size


def round_to_nearest(weight: Float[Tensor, "out in"], group: int) -> GroupedWeight:
    """`weight` in 4 bits, every number by itself."""
    scales = group_scales(weight, group, torch.float16)
    return GroupedWeight(quantize_groups(weight, scales), scales)


def int8_by_rows(weight: Float[Tensor, "out in"], segments: list[int]) -> RowWeight:
    """`weight` in int8 with one scale for each of the `segments` of its rows (section 2, "W8A8 weights")."""
    scales = torch.cat(
        [int8_scale(part).expand(len(part)) for part in weight.float().split(segments)],
    )
    codes = torch.round(weight.float() / scales[:, None]).clamp(-128, 127).to(torch.int8)
    return RowWeight(codes, scales)


def int8_scale(values: Tensor) -> Tensor:
    """s = max|v| / 127, floored."""
    return (values.float().abs().amax() / 127).clamp_min(FLOOR)
