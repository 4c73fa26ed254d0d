"""FILL: one idea of the paper, its cost, and the equation or section it comes from."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.shared.errors import InputError


def method(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """FILL: what it does (section, equation).

    `values`: n finite numbers. Returns n numbers in ascending order. Raises `InputError` on none, or on NaN.
    """
    if values.shape[0] == 0 or not torch.isfinite(values).all():
        raise InputError(f"expected finite numbers, at least one, got {values.tolist()}")
    return torch.sort(values).values  # FILL: the method
