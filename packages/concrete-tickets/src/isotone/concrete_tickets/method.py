"""FILL: one idea of the paper, its cost, and the equation or section it comes from."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError


def method(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """FILL: what it does (section, equation).

    `values`: n finite numbers. Returns n numbers in ascending order. Raises `InputError` on none, or on NaN.
    """
    if values.shape[0] == 0 or not jnp.isfinite(values).all():
        raise InputError(f"expected finite numbers, at least one, got {values.tolist()}")
    return jnp.sort(values)  # FILL: the method
