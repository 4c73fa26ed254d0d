"""FILL: one idea of the paper, its cost, and the equation or section it comes from."""

from __future__ import annotations

__IMPORT__
from isotone.shared.errors import InputError
from jaxtyping import Float
__ARRAY_IMPORT__


def method(values: Float[__ARRAY__, " n"]) -> Float[__ARRAY__, " n"]:
    """FILL: what it does (section, equation).

    `values`: n finite numbers. Returns n numbers in ascending order. Raises `InputError` on none, or on NaN.
    """
    if values.shape[0] == 0 or not __FINITE__:
        raise InputError(f"expected finite numbers, at least one, got {values.tolist()}")
    return __SORT__  # FILL: the method
