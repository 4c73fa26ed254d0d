"""Fewer bits for each number that is sent: bfloat16 or int8, rounded at random and unbiased (section 2.7).

E[round_to(y)] = y, and so means of what many clients send, and R_t^T of them, stay unbiased; the nearest value would
pull all of them the same way. What comes out is a float32 that its dtype holds, and the wire carries it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError
from isotone.sketching.compressors import Result, ThroughSketch, mean
from isotone.sketching.wire import value_bytes

DTYPES = ("float32", "bfloat16", "int8")
_STEPS = 127


def round_to(dtype: str, key: Array, y: Float[Array, " s"]) -> Float[Array, " s"]:
    """An unbiased y of numbers that `dtype` holds; of int8 those are 255 steps of max|y| / 127.

    |error| is below 2^-7 |y_i| for bfloat16 and below max|y| / 127 for int8, the variance at most a quarter of its
    square. Numbers that are not finite stay so, and with int8 make all others NaN. Raises `InputError` on another
    dtype.
    """
    if dtype == "float32":
        return y
    if dtype == "bfloat16":
        # the sixteen bits that are cut off, plus sixteen at random, carry into what is kept with the right chance
        words = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.uint32)
        noise = jax.random.bits(key, y.shape, jnp.uint16).astype(jnp.uint32)
        rounded = jax.lax.bitcast_convert_type((words + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(y), rounded, y)
    if dtype == "int8":
        largest = jnp.max(jnp.abs(y))
        # divided before it is multiplied: the largest is 127 steps exactly, and the wire finds the same step
        steps = stochastic_floor(key, y / jnp.where(largest > 0, largest, 1.0) * _STEPS)
        return steps * (largest / _STEPS)
    raise InputError(f"expected numbers of {', '.join(DTYPES)} to send, got {dtype!r}")


def stochastic_floor(key: Array, values: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """One of the two whole numbers around each value, of mean the value."""
    low = jnp.floor(values)
    return low + (jax.random.uniform(key, values.shape) < values - low)


def payload(dtype: str, s: int) -> int:
    """Bytes of s numbers on the wire; int8 sends its step too."""
    if dtype not in DTYPES:
        raise InputError(f"expected numbers of {', '.join(DTYPES)} to send, got {dtype!r}")
    return value_bytes(dtype, s)


@dataclass(frozen=True)
class RoundedSketch(ThroughSketch):
    """`compressors.Sketched` in fewer bits: every client's R_t delta is rounded to `dtype`, and so is their mean on its
    way down.

    `scale` is the sketch's own. What the rounding adds to E|y|^2 is at most s max(y^2) / 64,516 each way for int8,
    little where the numbers are spread, as a transform spreads them, and at most |y|^2 / 65,536 for bfloat16.
    """

    dtype: str = "int8"

    def __post_init__(self) -> None:
        payload(self.dtype, 1)

    @property
    def bytes_up(self) -> int:
        return payload(self.dtype, self.sketch.s)

    @property
    def bytes_down(self) -> int:
        return super().bytes_down if self.one_way else self.bytes_up

    def up(self, t: Array, key: Array, client: Array, delta: Float[Array, " d"]) -> Float[Array, " s"]:
        """What `client` sends in round t, `key` that of the round's wire."""
        return round_to(self.dtype, jax.random.fold_in(key, 1 + client), self.sketch.sk(t, delta))

    def down(self, key: Array, y: Float[Array, " s"]) -> Float[Array, " s"]:
        """The mean as it is sent back, or as what is sent back is made of it."""
        return y if self.one_way else round_to(self.dtype, jax.random.fold_in(key, 0), y)

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        """The mean of the rounded sketches, rounded, and back."""
        sent = jax.vmap(lambda client, delta: self.up(t, key, client, delta))(jnp.arange(len(deltas)), deltas)
        return Result(self.sketch.desk(t, self.down(key, mean(sent, weights))), clients, server)
