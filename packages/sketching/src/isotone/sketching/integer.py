"""Sketches as whole numbers modulo 2^32, which is what secure aggregation adds (section 8).

A server that is to learn the sum of the clients' sketches and nothing else is sent words that are each uniform: the
sketch in steps of a size that all agree on, plus masks that every pair of clients shares with opposite signs. Sums wrap
around, masks cancel, and where no sum leaves [-2^31, 2^31) what is left is the sum of the quantised sketches, exactly.
Only what is added can be hidden so, and R_t delta can; how pairs come to their seeds is a key agreement's affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt32

from isotone.shared.errors import InputError, check_count
from isotone.sketching.compressors import FLOAT, Result, ThroughSketch
from isotone.sketching.rounding import stochastic_floor

FINEST = 1 << 22
"""Steps to either side: more of them a float32 does not tell apart."""


class Encoded(NamedTuple):
    """`words`; `clipped`: how many numbers were out of range or not finite, and went as the nearest in range, or 0."""

    words: UInt32[Array, " s"]
    clipped: Int[Array, ""]


@dataclass(frozen=True)
class IntegerCode:
    """Numbers of at most `bound` in absolute value, from at most `clients` clients, in steps of `step`.

    Raises `InputError` on a bound that is not a finite number above 0, and on no client or 2^31 of them.
    """

    bound: float
    clients: int

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise InputError(f"expected a finite bound above 0 for what is sent, got {self.bound}")
        check_count("clients", self.clients, 1)
        if self.clients >= 2**31:
            raise InputError(f"expected fewer than 2^31 clients, got {self.clients}")

    @property
    def limit(self) -> int:
        """Steps of one client at most: so few that no sum of all wraps into another."""
        return min(FINEST, (2**31 - 1) // self.clients)

    @property
    def step(self) -> float:
        """What one step is worth; the rounding's error is below it, its variance at most a quarter of its square."""
        return self.bound / self.limit

    def encode(self, key: Array, y: Float[Array, " s"]) -> Encoded:
        """y in steps, rounded at random so that the mean is y wherever it is in range."""
        inside = jnp.abs(y) <= self.bound
        steps = jnp.nan_to_num(y / self.bound, nan=0.0) * self.limit
        rounded = stochastic_floor(key, jnp.clip(steps, -self.limit, self.limit))
        return Encoded(jax.lax.bitcast_convert_type(rounded.astype(jnp.int32), jnp.uint32), jnp.sum(~inside))

    def decode(self, total: UInt32[Array, " s"]) -> Float[Array, " s"]:
        """What a sum of words stands for: that of the quantised numbers."""
        return jax.lax.bitcast_convert_type(total, jnp.int32).astype(jnp.float32) * self.step

    def encode_strictly(self, key: Array, y: Float[Array, " s"]) -> UInt32[Array, " s"]:
        """The same outside of jit. Raises `InputError` where a number is out of range."""
        words, clipped = self.encode(key, y)
        if clipped:
            raise InputError(f"expected {len(y)} numbers of at most {self.bound:g} to send, got {int(clipped)} beyond")
        return words


def mask(seeds: Mapping[int, bytes], client: int, t: int, s: int) -> UInt32[np.ndarray, " s"]:
    """What `client` adds to its words in round `t`: a stream for each of the others, + for those of higher numbers.

    `seeds[other]`: at least 16 bytes that the two share and nobody else has. Streams are SHAKE-256 of seed and round.
    All masks of a round add up to 0 modulo 2^32; where a client does not send, the others' lack its own, and
    `mask(seeds with those, client, t, s)`, for which they give those seeds away, is to be added to their sum.
    Raises `InputError` on a client that shares a seed with itself, and on shorter seeds.
    """
    check_count("t", t, 0)
    total = np.zeros(s, np.uint32)
    for other, seed in seeds.items():
        if other == client or len(seed) < 16:
            raise InputError(f"expected seeds of 16 bytes with others, got {len(seed)} bytes of {client} with {other}")
        stream = np.frombuffer(hashlib.shake_256(seed + t.to_bytes(8, "little")).digest(FLOAT * s), "<u4")
        total = total + stream if other > client else total - stream
    return total.astype(np.uint32)


@dataclass(frozen=True)
class IntegerSketch(ThroughSketch):
    """`compressors.Sketched` with words in place of floats up: as a server sees rounds that it may only add.

    Whoever is heard counts alike. The server's state is how many numbers were clipped in all rounds; down goes the mean
    as float32.
    """

    code: IntegerCode

    def init(self, clients: int) -> tuple[Any, Any]:
        """Nothing was clipped yet. Raises `InputError` on more clients than the code has room for."""
        if clients > self.code.clients:
            raise InputError(f"expected at most {self.code.clients} clients of this code, got {clients}")
        return (), jnp.zeros((), jnp.int32)

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        """The words of those with a weight, added and decoded, over their number."""
        keys, heard = jax.random.split(key, len(deltas)), weights > 0
        words, clipped = jax.vmap(lambda k, delta: self.code.encode(k, self.sketch.sk(t, delta)))(keys, deltas)
        total = jnp.sum(jnp.where(heard[:, None], words, 0), 0, dtype=jnp.uint32)
        y = self.code.decode(total) / jnp.maximum(jnp.sum(heard), 1)
        return Result(self.sketch.desk(t, y), clients, server + jnp.sum(jnp.where(heard, clipped, 0), dtype=jnp.int32))
