"""Stateless random numbers: what a sketch is made of is a function of (seed, round, index), on every host and device.

Everything is uint32 arithmetic, which JAX does alike everywhere. `mix` is the finaliser of MurmurHash3 (two rounds of
xor, shift and multiply), a bijection of 32-bit words; `permuted` is a Feistel network on it, walked until it lands
inside [0, n): a permutation of which any entry costs O(1), so that s rows of 2^k are drawn without a table of 2^k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int, UInt32

_GOLDEN = 0x9E3779B9
_ROUNDS = 6


def mix(words: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """A bijection of 32-bit words that spreads every bit (MurmurHash3's finaliser)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def stream(seed: int, round: Array | int, purpose: int) -> UInt32[Array, " 2"]:
    """Two key words for one purpose of one round: different rounds and purposes share nothing."""
    first = mix(jnp.uint32(seed & 0xFFFFFFFF) + jnp.uint32(_GOLDEN))
    first = mix(first ^ jnp.uint32((seed >> 32) & 0xFFFFFFFF))
    first = mix(first + jnp.asarray(round).astype(jnp.uint32) * jnp.uint32(_GOLDEN))
    first = mix(first ^ jnp.uint32(purpose * 0x85EBCA6B & 0xFFFFFFFF))
    # mixed twice: mixed once, it would be what `words` makes of the first word and the index 1, and cancel there
    return jnp.stack([first, mix(mix(first + jnp.uint32(_GOLDEN)) ^ jnp.uint32(0x6A09E667))])


def words(key: UInt32[Array, " 2"], index: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """A random word for each index."""
    return mix(mix(index * jnp.uint32(_GOLDEN) + key[0]) ^ key[1])


def signs(key: UInt32[Array, " 2"], index: UInt32[Array, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """+1 or -1 for each index."""
    return 1 - 2 * (words(key, index) >> 31).astype(dtype)


def below(key: UInt32[Array, " 2"], index: UInt32[Array, ...], n: int) -> Int[Array, ...]:
    """A number from 0 to n - 1 for each index, n at most 2^31; uniform up to n / 2^32."""
    drawn = words(key, index)
    if n & (n - 1) == 0:
        return (
            (drawn >> jnp.uint32(33 - n.bit_length())).astype(jnp.int32) if n > 1 else jnp.zeros_like(drawn, jnp.int32)
        )
    # the high half of drawn * n by 16-bit parts: no 64-bit integers are needed
    high, low = drawn >> 16, drawn & jnp.uint32(0xFFFF)
    n_high, n_low = jnp.uint32(n >> 16), jnp.uint32(n & 0xFFFF)
    middle = high * n_low + ((low * n_low) >> 16)
    other = low * n_high + (middle & jnp.uint32(0xFFFF))
    return (high * n_high + (middle >> 16) + (other >> 16)).astype(jnp.int32)


def normals(key: UInt32[Array, " 2"], index: UInt32[Array, ...]) -> Array:
    """A standard normal number for each index, by Box and Muller's transform of two words."""
    first = (words(key, index) >> 8).astype(jnp.float32) * (1 / 2**24) + 0.5 / 2**24
    second = (words(key ^ jnp.uint32(_GOLDEN), index) >> 8).astype(jnp.float32) * (1 / 2**24)
    return jnp.sqrt(-2 * jnp.log(first)) * jnp.cos(2 * jnp.pi * second)


def permuted(key: UInt32[Array, " 2"], index: UInt32[Array, ...], n: int) -> Int[Array, ...]:
    """The images of `index` under a random permutation of [0, n).

    A Feistel network on pairs (left, right) that need not be alike: right has 2^low values, left as many as make n, or
    the next power of two. There values beyond n walk on until they are inside, less than twice on average; where n has
    a third of its bits as factors of two, none are.
    """
    bits, twos = (n - 1).bit_length(), (n & -n).bit_length() - 1
    exact = 3 * twos >= bits
    low = min(bits - bits // 2, twos) if exact else bits - bits // 2
    lefts, last = n >> low if exact else 1 << (bits - low), jnp.uint32((1 << low) - 1)

    def twice(number: Array, value: Array) -> Array:
        left, right = value >> low, value & last
        left = left + below(key + 2 * number, right, lefts).astype(jnp.uint32)
        left = jnp.where(left < jnp.uint32(lefts), left, left - jnp.uint32(lefts))
        right = right ^ (words(key + 2 * number + 1, left) & last)
        return (left << low) | right

    def network(value: Array) -> Array:
        # a loop, so that whoever indexes with the images does not compute them on the way, several times over
        return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(_ROUNDS // 2), twice, value)

    def inside(value: Array) -> Array:
        return value < jnp.uint32(n)

    def walk(value: Array) -> Array:
        return jnp.where(inside(value), value, network(value))

    value = network(index.astype(jnp.uint32))
    if exact:
        return value.astype(jnp.int32)
    value = jax.lax.while_loop(lambda v: ~jnp.all(inside(v)), walk, value)
    return value.astype(jnp.int32)
