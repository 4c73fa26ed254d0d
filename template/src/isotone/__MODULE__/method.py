"""FILL: one idea of the paper, its cost, and the equation or section it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isotone.shared.errors import InputError


def method(values: Sequence[float]) -> list[float]:
    """FILL: what it does (section, equation).

    `values`: n finite numbers. Returns n numbers in ascending order. Raises `InputError` on none, or on NaN.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise InputError(f"expected finite numbers, at least one, got {list(values)}")
    return sorted(values)  # FILL: the method
