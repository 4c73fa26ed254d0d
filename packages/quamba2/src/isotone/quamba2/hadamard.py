"""Orthonormal Hadamard matrices and the fast transform, which spread an outlier over all channels (section 2).

H = F (x) S: F is 1, or Paley's matrix of order 12 or 40, S is Sylvester's of order 2^k, divided by sqrt(n). F is not
symmetric, so H differs from its transpose: what is fused into a weight must be the transpose of what runs online.
A product with H is a product with small factors of it, one after the other: n log n, and few passes over memory.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.quamba2 import triton_hadamard
from isotone.quamba2.triton_kernels import takes
from isotone.shared.errors import InputError

WIDEST = 64  # a factor of at most this order is one GEMM: wide enough to be fast, narrow enough to do little work
ORDERS = (1, 12, 40)


def supports(n: int) -> bool:
    """Whether there is a Hadamard matrix of order `n` here: 2^k, 12 * 2^k or 40 * 2^k."""
    return _base(n) is not None


@functools.cache
def largest_block(n: int) -> int:
    """The largest order supported that divides `n`, the block of the block-diagonal fallback."""
    return max(order for order in range(1, n + 1) if n % order == 0 and supports(order))


def hadamard_matrix(
    n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", block_diagonal: bool = False
) -> Float[Tensor, "n n"]:
    """H of order `n`, with H H^T = I; `hadamard_transform(x)` is x @ H.

    `block_diagonal`: equal blocks of order `largest_block(n)` on the diagonal. Raises `InputError` where `n` is not
    2^k, 12 * 2^k or 40 * 2^k, and, block-diagonal, where it is odd.
    """
    size = _block(n, block_diagonal)
    base = _base(size)
    assert base is not None
    block = torch.kron(_paley(base), _sylvester(size // base)).to(dtype=torch.float64) / math.sqrt(size)
    return torch.block_diag(*[block] * (n // size)).to(device, dtype)


def hadamard_transform(
    x: Float[Tensor, "*rows n"], transpose: bool = False, block_diagonal: bool = False
) -> Float[Tensor, "*rows n"]:
    """x @ H along the last dimension, or x @ H^T with `transpose`, which undoes it; dtype and shape of `x`.

    Half precision is computed in float32. `block_diagonal`: for widths without a Hadamard matrix, the transform of
    every `largest_block(n)` channels; the same as without where there is one. Raises `InputError` as `hadamard_matrix`.
    """
    size = _block(x.shape[-1], block_diagonal)
    if not x.is_floating_point():
        raise InputError(f"expected floating point numbers to transform, got {x.dtype}")
    base = _base(size)
    assert base is not None
    parts = triton_hadamard.splits(size, base)
    if takes(x) and parts is not None and size == x.shape[-1]:
        return triton_hadamard.transform(x, _signs(parts[0], base, x.device), None, transpose)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype).reshape(-1, size)
    inner = size
    for factor in reversed(_factors(size)):
        # H = H_1 (x) H_2 (x) ...: the last factor mixes neighbours, each one before it mixes what `inner` apart
        matrix = _factor(factor, dtype, x.device)
        matrix = matrix if transpose else matrix.T
        outer = size // inner  # of the factors that are done
        if outer == 1:
            y = y.reshape(-1, factor) @ matrix.T
        else:
            apart = y.reshape(-1, factor, outer)
            y = torch.bmm(matrix.expand(len(apart), factor, factor), apart)
        inner //= factor
    return y.reshape(x.shape).to(x.dtype)


def hadamard_quantize(x: Float[Tensor, "*rows n"], scale: Float[Tensor, ""] | float, transpose: bool = False) -> Tensor:
    """int8 codes round(x H / scale) in one pass over `x` on a GPU: the online transform before out_proj.

    Returns int8 of `x`'s shape. Raises `InputError` as `hadamard_matrix`.
    """
    size = _block(x.shape[-1], False)
    base = _base(size)
    assert base is not None
    parts = triton_hadamard.splits(size, base)
    if takes(x) and parts is not None:
        return triton_hadamard.transform(x, _signs(parts[0], base, x.device), scale, transpose)
    y = hadamard_transform(x.to(torch.float32), transpose) / scale
    return torch.round(y).clamp(-128, 127).to(torch.int8)


def _base(n: int) -> int | None:
    """The order of Paley's factor in a matrix of order `n`; None where there is no such matrix."""
    return next((b for b in ORDERS if n > 0 and n % b == 0 and (n // b).bit_count() == 1), None)


def _block(n: int, block_diagonal: bool) -> int:
    if supports(n):
        return n
    if not block_diagonal:
        raise InputError(f"expected a width of 2^k, 12 * 2^k or 40 * 2^k for a Hadamard matrix, got {n}")
    if n < 1 or n % 2:
        raise InputError(f"expected an even width for a block-diagonal Hadamard matrix, got {n}")
    return largest_block(n)


def _factors(n: int) -> list[int]:
    """Orders of the factors of H, the first with Paley's; their product is `n`."""
    base = _base(n)
    assert base is not None
    factors = [] if base == 1 else [base]
    bits = (n // base).bit_length() - 1
    count = -(-bits // (WIDEST.bit_length() - 1))
    # as even as they can be: the work is proportional to their sum
    return factors + [1 << (bits * (i + 1) // count - bits * i // count) for i in range(count)] or [1]


@functools.lru_cache(64)
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(order, dtype, device)


@functools.lru_cache(16)
def _signs(order: int, base: int, device: torch.device) -> Tensor:
    """The matrix of that order with Paley's factor of order `base`, as float32 numbers 1 and -1."""
    with torch.inference_mode(False):
        return torch.kron(_paley(base), _sylvester(order // base)).to(device, torch.float32)


def _sylvester(n: int) -> Tensor:
    """The symmetric matrix of order n = 2^k: entry (i, j) is -1 where i and j share an odd number of bits."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(n.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@functools.cache
def _paley(order: int) -> Tensor:
    """Paley's first matrix, of order q + 1 for a prime q = 3 mod 4; for 40, that of order 20 (x) Sylvester's of 2.

    I + [[0, 1], [-1, Q]] with Q_ij = 1 where i - j is a square modulo q, -1 where it is not, 0 for i = j.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order == 40:
        return torch.kron(_paley(20), _sylvester(2))
    q = order - 1
    character = torch.full((q,), -1, dtype=torch.int8)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    places = torch.arange(q)
    matrix = torch.ones(order, order, dtype=torch.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(places[:, None] - places[None]) % q] + torch.eye(q, dtype=torch.int8)
    return matrix
