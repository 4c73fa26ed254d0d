"""Weights per mode: the variance-preserving scale and the others of the paper (section 2.6).

A truncation keeps m of N modes; with x of variance s^2 a point and C channels mixed per mode, the field that comes back
has variance s^2 a point when a weight has variance (1 / C) N / m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared.errors import InputError

INITS = ("vp", "naive", "kaiming", "zero")
ZERO_SCALE = 1e-8


def vp_scale(fan_in: int, n_total: int, m_total: int) -> float:
    """sqrt(N / (C m)): the deviation of a per-mode weight that keeps the variance a point."""
    if min(fan_in, n_total, m_total) < 1 or m_total > n_total:
        raise InputError(f"expected 1 <= modes <= points and a fan-in of 1, got {m_total}, {n_total} and {fan_in}")
    return math.sqrt(n_total / m_total / fan_in)


def dense_scale(n: int, m: int) -> float:
    """sqrt(N) / m: of a dense m x m mixing of the kept modes."""
    return math.sqrt(n) / m


def mixing_scale(init: str, fan_in: int, fan_out: int, n_total: int, m_total: int, complex_weights: bool) -> float:
    """The deviation of a per-mode channel-mixing weight.

    "vp"; "naive": 1 / (C_in C_out), normal (not uniform); "kaiming": 1 / sqrt(C_in); "zero": 1e-8. A complex weight's
    real and imaginary parts share the variance. Raises `InputError` on another name.
    """
    scales: dict[str, Callable[[], float]] = {
        "vp": lambda: vp_scale(fan_in, n_total, m_total),
        "naive": lambda: 1 / (fan_in * fan_out),
        "kaiming": lambda: 1 / math.sqrt(fan_in),
        "zero": lambda: ZERO_SCALE,
    }
    if init not in scales:
        raise InputError(f"expected an initialisation of {', '.join(INITS)}, got {init!r}")
    return scales[init]() / (math.sqrt(2) if complex_weights else 1.0)


def normal(key: Array, shape: Sequence[int], deviation: float) -> Array:
    """Normal numbers of that deviation, float32.

    Drawn on the host from the key's bits: JAX would compile a generator for every shape, which takes longer than the
    training of a small model. While a program is being traced they are `jax.random`'s, other numbers."""
    rng = _generator(key)
    if rng is None:
        return deviation * jax.random.normal(key, tuple(shape))
    return jnp.asarray(rng.standard_normal(tuple(shape), np.float32) * np.float32(deviation))


def uniform(key: Array, shape: Sequence[int], limit: float) -> Array:
    """Uniform numbers of [-limit, limit), float32, drawn as `normal`'s."""
    rng = _generator(key)
    if rng is None:
        return jax.random.uniform(key, tuple(shape), minval=-limit, maxval=limit)
    return jnp.asarray((2 * rng.random(tuple(shape), np.float32) - 1) * np.float32(limit))


def _generator(key: Array) -> np.random.Generator | None:
    if isinstance(key, jax.core.Tracer):
        return None
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
