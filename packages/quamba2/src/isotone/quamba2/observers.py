"""What calibration records of a value: the largest magnitude, or a quantile of it, of each group of channels.

Per-tensor, per-head, per-SSM-group and sort-and-cluster scales differ in their labels alone: `labels[c]` is the number
of the scale that channel c has (section 2, "Scales for x", "PerSG").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError

MOMENTUM = 0.01  # of the running quantile
SMALLEST_MAXIMUM, SMALLEST_SCALE = 1e-5, 1e-6


@dataclass(frozen=True)
class Grouping:
    """Which channels share a scale: `labels` (width,) below `count`. `quantile`: of |value|, 1 for the maximum.

    `states`: scales a state index, 1 but for the SSM's state, whose scales are (count, states).
    """

    labels: Int[Tensor, " width"]
    count: int
    quantile: float = 1.0
    states: int = 1

    @classmethod
    def tensor(cls, width: int, quantile: float = 1.0) -> Grouping:
        """One scale for all of `width` channels."""
        return cls(torch.zeros(width, dtype=torch.int64), 1, quantile)

    @classmethod
    def even(cls, width: int, count: int) -> Grouping:
        """`count` runs of channels of one length."""
        return cls(torch.arange(count).repeat_interleave(width // count), count)


class Observer:
    """The magnitudes seen at one site, by group: `value` (count, states), None before the first sample.

    With a quantile below 1 each sample's own quantile moves `value` by a hundredth of the difference (section 2,
    "Quamba v1").
    """

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.value: Tensor | None = None

    def update(self, values: Float[Tensor, "b t width states"]) -> None:
        """Take in `values`, a sample a row. Where the grouping has one scale for all states, they count as tokens.

        Raises `InputError` where one is NaN or infinite.
        """
        sizes = values.detach().abs().float()
        if not bool(sizes.isfinite().all()):
            raise InputError("expected finite activations in calibration, got NaN or infinity")
        if self.grouping.states == 1:
            sizes = sizes.movedim(-1, 1).flatten(1, 2).unsqueeze(-1)
        if self.grouping.quantile < 1:
            for row in sizes:
                seen = self._quantiles(row)
                self.value = seen if self.value is None else self.value + MOMENTUM * (seen - self.value)
            return
        largest = sizes.amax((0, 1))
        seen = largest.new_zeros(self.grouping.count, largest.shape[-1])
        labels = self.grouping.labels.to(seen.device)[:, None].expand_as(largest)
        seen.scatter_reduce_(0, labels, largest, "amax")
        self.value = seen if self.value is None else torch.maximum(self.value, seen)

    def _quantiles(self, row: Tensor) -> Tensor:
        labels, part = self.grouping.labels.to(row.device), self.grouping.quantile
        groups = [row[:, labels == label] for label in range(self.grouping.count)]
        return torch.stack([torch.stack([quantile(one, part) for one in group.unbind(-1)]) for group in groups])

    def scales(self, bits: int = 8) -> Float[Tensor, "count states"]:
        """s = max / (2^(bits - 1) - 1), floored (section 2, "Quantiser"). Raises `InputError` before any sample."""
        if self.value is None:
            raise InputError("expected at least one calibration sample, got none")
        return (self.value.clamp_min(SMALLEST_MAXIMUM) / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST_SCALE)


def quantile(values: Tensor, part: float) -> Tensor:
    """The quantile `part` of `values`, linear between the two nearest, of any number of them.

    torch.quantile takes no more than 16M, and sorts them all.
    """
    flat = values.flatten()
    place = part * (len(flat) - 1)
    above = math.floor(place)
    top = flat.topk(len(flat) - above).values
    upper = top[-2] if len(top) > 1 else top[-1]
    return torch.lerp(top[-1], upper, place - above)
