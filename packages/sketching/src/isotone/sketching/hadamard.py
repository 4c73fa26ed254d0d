"""The fast Walsh-Hadamard transform, without a matrix: d log d additions in few passes over memory.

H of d = m 2^k is a Kronecker product, H_{2^(k-2)} x H_{4m}, with m = 1 (Sylvester's matrix, section 9) or 3, 5, 7, 9
(Paley's of 12, 20, 28 and 36): entries are +-1 and H H^T = d I for all of them, and padding to the next d adds a fifth
at most to 32 and more numbers, where the next power of two is up to twice as many. The lowest bits, where neighbours
are combined, are one product with a small +-1 block: a row of 16 is too short to add up in vectors. Above them two bits
at a time are four sums of four stretches, which the compiler does in one pass. Where float32 is used the error grows
like log d.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

BLOCK_BITS = 4
_PALEY = {3: 11, 5: 19, 7: 13, 9: 17}
"""The prime q whose squares make H of 4m = q + 1, or 2 (q + 1) where q is 1 modulo 4."""


def next_size(n: int) -> int:
    """The smallest d >= n that is 2^k, or 3, 5, 7 or 9 times 2^k with k of at least 2."""
    return min(m << max(0 if m == 1 else 2, (-(-n // m) - 1).bit_length()) for m in (1, *_PALEY))


@functools.cache
def _block(d: int, block_bits: int) -> np.ndarray:
    """H_{4m}, or H_d's lowest bits. Raises `ValueError` where there is no H_d."""
    bits = max(0, (d & -d).bit_length() - 1)
    odd = d >> bits
    if odd == 1:
        matrix = np.ones((1, 1), np.float32)
        for _ in range(min(block_bits, bits)):
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    if odd not in _PALEY or bits < 2:
        raise ValueError(f"expected 2^k, or 3, 5, 7 or 9 times 4 2^k, to transform, got {d}")
    q = _PALEY[odd]
    index = np.arange(q)
    squares = np.isin(index, index[1:] ** 2 % q)
    character = np.where(index == 0, 0, np.where(squares, 1, -1))[(index[:, None] - index) % q]
    edge, one = np.ones((1, q)), np.eye(q + 1)
    if q % 4 == 3:
        return (one + np.block([[np.zeros((1, 1)), edge], [-edge.T, character]])).astype(np.float32)
    whole = np.block([[np.zeros((1, 1)), edge], [edge.T, character]])
    return (np.kron(whole, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])).astype(np.float32)


def fwht(
    values: Float[Array, "*batch d"], transpose: bool = False, block_bits: int = BLOCK_BITS
) -> Float[Array, "*batch d"]:
    """H v along the last axis, or H^T v, with H an unnormalised +-1 Hadamard matrix: H^T H v is d v.

    d must be one of `next_size` (`ValueError` otherwise); of a power of two H is Sylvester's, in natural order, and
    symmetric. O(d log d); `block_bits`: of the product with a block.
    """
    d, shape = values.shape[-1], values.shape
    matrix = _block(d, block_bits)
    done = len(matrix)
    values = jnp.matmul(
        values.reshape(-1, done),
        jnp.asarray(matrix if transpose else matrix.T, values.dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    while done < d:
        # the odd bit first: its stretches are the shortest
        step = 4 if (d // done).bit_length() % 2 else 2
        values = _butterflies(values.reshape(-1, step, done))
        done *= step
    return values.reshape(shape)


def _butterflies(values: Float[Array, "n m width"]) -> Float[Array, "n m width"]:
    """H of m = 2 or 4 along the middle axis."""
    parts, half = jnp.split(values, values.shape[1], axis=1), 1
    while half < len(parts):
        parts = [parts[i ^ half] - p if i & half else p + parts[i ^ half] for i, p in enumerate(parts)]
        half *= 2
    # kept apart from the next pass: fused, both would be done again for every number
    return jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1))
