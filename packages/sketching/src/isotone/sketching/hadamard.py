"""The fast Walsh-Hadamard transform, without a matrix: d log d additions in few passes over memory.

H of 2^k is a Kronecker product, H_a x H_b x ... (section 9). Its lowest bits, where neighbours are combined, are one
product with a small +-1 block: a row of 16 is too short to add up in vectors. Above them two bits at a time are four
sums of four stretches, which the compiler does in one pass; three bits are no faster, and larger blocks as products
cost more multiplications than they save passes. Where float32 is used the error grows like log d.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

BLOCK_BITS = 4


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

    d must be a power of two (`ValueError` otherwise). O(d log d); `block_bits`: of the product with a block.
    """
    d = values.shape[-1]
    if d & (d - 1) or d == 0:
        raise ValueError(f"expected a power of two to transform, got {d}")
    bits, shape = d.bit_length() - 1, values.shape
    done = min(block_bits, bits)
    block = jnp.asarray(_block(done), values.dtype)
    values = jnp.matmul(values.reshape(-1, 1 << done), block, precision=jax.lax.Precision.HIGHEST)
    while done < bits:
        # the odd bit first: its stretches are the shortest
        step = 2 if (bits - done) % 2 == 0 else 1
        values = _butterflies(values.reshape(-1, 1 << step, 1 << done))
        done += step
    return values.reshape(shape)


def _butterflies(values: Float[Array, "n m width"]) -> Float[Array, "n m width"]:
    """H of m = 2 or 4 along the middle axis."""
    parts, half = jnp.split(values, values.shape[1], axis=1), 1
    while half < len(parts):
        parts = [parts[i ^ half] - p if i & half else p + parts[i ^ half] for i, p in enumerate(parts)]
        half *= 2
    # kept apart from the next pass: fused, both would be done again for every number
    return jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1))
