"""The fast Walsh-Hadamard transform, without a matrix: d log d additions, done as products with small +-1 blocks.

H of 2^k is a Kronecker product, H_a x H_b x ..., and a block of 2^5 or so is a matrix product, which is faster than
five passes of additions over memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

BLOCK_BITS = 5


def next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, (n - 1).bit_length())


@functools.cache
def _block(bits: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def fwht(values: Float[Array, "*batch d"], block_bits: int = BLOCK_BITS) -> Float[Array, "*batch d"]:
    """H v along the last axis, with H the unnormalised +-1 Hadamard matrix in natural order: twice is d v.

    d must be a power of two (`ValueError` otherwise). O(d log d).
    """
    d = values.shape[-1]
    if d & (d - 1) or d == 0:
        raise ValueError(f"expected a power of two to transform, got {d}")
    left, shape = d.bit_length() - 1, values.shape
    while left > 0:
        bits = min(block_bits, left)
        block = jnp.asarray(_block(bits), values.dtype)
        # the lowest bits first; then they are turned to the front, so that every product is over the last axis
        values = values.reshape(*shape[:-1], -1, 1 << bits)
        values = jnp.matmul(values, block, precision=jax.lax.Precision.HIGHEST)
        values = jnp.swapaxes(values, -1, -2)
        left -= bits
    # the turns have rotated the index by all of its bits: it is in order again
    return values.reshape(shape)
