"""CountSketch in blocks: no scatter, no gather, one pass over memory.

Coordinate i = b w + o, with o < w, goes to row (o + r_b) mod s, times a sign of its own: each of the B = ceil(d / s)
blocks of w = ceil(d / B) <= s numbers is signed, turned by a random r_b and added. Two coordinates of different blocks
meet in a row with probability 1 / s, those of one block never, and with signs of which any four are independent

E|R^T R h|^2 = |h|^2 + (1/s) sum_j h_j^2 (d - |block of j|), that is (d / s)|h|^2 where s divides d,
Var(g^T R^T R h) = (1/s)(|g|^2|h|^2 + (g^T h)^2 - sum_b (|g_b|^2|h_b|^2 + (g_b^T h_b)^2)):

only pairs of coordinates enter, and so both are exact, and at most CountSketch's. Where s divides d, R R^T = (d / s) I,
and no unbiased R of s rows has a smaller 1 + alpha. What is not CountSketch's: two blocks meet as a whole, at one
offset, so that collisions are independent between pairs of blocks at most and not between coordinates; of vectors that
are alike at a fixed distance, moments above the second are larger.

A word of the hash gives the signs of 32 blocks, and is made once for them: what is read is x, what is added to stays
in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from isotone.sketching import hashing

_TURNS, _BITS = 5, 6
_WORD = 32


def shape(d: int, s: int) -> tuple[int, int]:
    """(B, w): how many blocks, and numbers in each but the last, which may be shorter."""
    count = -(-d // s)
    return count, -(-d // count)


def rows(seed: int, t: Array | int, d: int, s: int) -> tuple[Int[Array, " d"], Int[Array, " d"]]:
    """Row and sign of every coordinate: what `sk` is by definition."""
    count, width = shape(d, s)
    index = jnp.arange(d, dtype=jnp.int32)
    block, offset = index // width, index % width
    bits = _bits(seed, t, offset.astype(jnp.uint32), block // _WORD, width)
    negative = _negative(bits, block % _WORD)
    return (offset + _turns(seed, t, count, s)[block]) % s, jnp.where(negative, -1, 1)


def sk(seed: int, t: Array | int, x: Float[Array, " d"], s: int) -> Float[Array, " s"]:
    """R_t x: 4 d bytes read."""
    d = x.shape[0]
    count, width = shape(d, s)
    turns = _turns(seed, t, count, s)
    whole = jnp.pad(x, (0, count * width - d)).reshape(count, width)

    def add(total: Array, number: Array, bits: Array) -> Array:
        block = jax.lax.dynamic_index_in_dim(whole, number, keepdims=False)
        there = jax.lax.dynamic_slice(total, (turns[number],), (width,))
        signed = jnp.where(_negative(bits, number % _WORD), -block, block)
        return jax.lax.dynamic_update_slice(total, there + signed, (turns[number],))

    def group(total: Array, number: Array, length: int) -> Array:
        bits = _bits(seed, t, jnp.arange(width, dtype=jnp.uint32), number, width)
        return jax.lax.fori_loop(0, length, lambda i, y: add(y, number * _WORD + i, bits), total)

    # a turned block may reach beyond s: that part is added to the first rows at the end
    total = _grouped(count, group, jnp.zeros(s + width, x.dtype))
    return total[:s].at[:width].add(total[s:])


def desk(seed: int, t: Array | int, y: Float[Array, " s"], d: int) -> Float[Array, " d"]:
    """R_t^T y."""
    s = y.shape[0]
    count, width = shape(d, s)
    turns = _turns(seed, t, count, s)
    twice = jnp.concatenate([y, y[:width]])

    def put(whole: Array, number: Array, bits: Array) -> Array:
        part = jax.lax.dynamic_slice(twice, (turns[number],), (width,))
        signed = jnp.where(_negative(bits, number % _WORD), -part, part)
        return jax.lax.dynamic_update_index_in_dim(whole, signed, number, 0)

    def group(whole: Array, number: Array, length: int) -> Array:
        bits = _bits(seed, t, jnp.arange(width, dtype=jnp.uint32), number, width)
        return jax.lax.fori_loop(0, length, lambda i, x: put(x, number * _WORD + i, bits), whole)

    return _grouped(count, group, jnp.zeros((count, width), y.dtype)).reshape(-1)[:d]


def _grouped(count: int, group: Callable[[Any, Array, int], Any], start: Any) -> Any:
    """`group(state, number, blocks in it)` over all full groups of 32, then over what is left."""
    full, rest = divmod(count, _WORD)
    if full:
        start = jax.lax.fori_loop(0, full, lambda number, state: group(state, number, _WORD), start)
    return group(start, jnp.int32(full), rest) if rest else start


def _turns(seed: int, t: Array | int, count: int, s: int) -> Int[Array, " blocks"]:
    """r_b of every block."""
    return hashing.below(hashing.stream(seed, t, _TURNS), jnp.arange(count, dtype=jnp.uint32), s)


def _bits(seed: int, t: Array | int, offset: UInt32[Array, " n"], group: Array, width: int) -> UInt32[Array, " n"]:
    """A word for each offset, whose bits are the signs of the group's blocks."""
    words = hashing.words(hashing.stream(seed, t, _BITS), offset + group.astype(jnp.uint32) * jnp.uint32(width))
    # otherwise the compiler makes them anew for every block
    return jax.lax.optimization_barrier(words)


def _negative(bits: UInt32[Array, " n"], number: Array) -> Array:
    """Whether bit `number` is set."""
    return (bits << number.astype(jnp.uint32)) >> jnp.uint32(_WORD - 1) != 0
