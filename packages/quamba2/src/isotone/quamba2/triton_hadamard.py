"""The fast Hadamard transform and the quantiser after it, one program a row (section 9, kernel 5).

A row of n channels is a matrix (P, S), and H = L (x) R: R is Sylvester's matrix of order S, a power of two that is at
most 128, and L, of order P <= 64, is the rest of H, Paley's factor included. Then x H is L^T X R, two products with
signs in tensor cores, in place of log2 n rounds that each go through shared memory.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.triton_kernels import HAVE_TRITON, on_device, power_of_two, scalar

RIGHT = 128  # the largest order of R
LEFT = 64  # and of L: what is wider wants more shared memory than a small GPU's 99 KiB
LEAST = 16  # tensor cores take no fewer

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import dot_exact, to_int8

    @triton.jit
    @no_type_check
    def _transform(
        x,
        signs,
        out,
        scale,
        norm,
        P: tl.constexpr,
        S: tl.constexpr,
        BLOCK: tl.constexpr,
        TRANSPOSE: tl.constexpr,
        QUANTIZE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * (P * S)
        first = tl.arange(0, BLOCK)
        second = tl.arange(0, S)
        places = first[:, None] * S + second[None, :]
        inside = (first[:, None] < P) & (second[None, :] < S)
        values = tl.load(x + row + places, mask=inside, other=0.0).to(tl.float32)
        # Sylvester's entry (i, j) is the parity of the bits that i and j share
        shared = second[:, None] & second[None, :]
        shared = shared ^ (shared >> 4)
        shared = shared ^ (shared >> 2)
        shared = shared ^ (shared >> 1)
        right = (1 - 2 * (shared & 1)).to(tl.float32).to(tl.bfloat16)
        values = dot_exact(values, right)
        if P > 1:
            # transposed, so that the factor of signs is on the right again
            square = (first[:, None] < P) & (first[None, :] < P)
            if TRANSPOSE:
                left = tl.load(signs + first[None, :] * P + first[:, None], mask=square, other=0.0)
            else:
                left = tl.load(signs + first[:, None] * P + first[None, :], mask=square, other=0.0)
            values = tl.trans(dot_exact(tl.trans(values), left.to(tl.bfloat16)))
        values = values * norm
        if QUANTIZE:
            step = tl.load(scale) + tl.zeros_like(values)
            tl.store(out + row + places, to_int8(tl.div_rn(values, step)), mask=inside)
        else:
            tl.store(out + row + places, values.to(out.dtype.element_ty), mask=inside)


def splits(n: int, base: int) -> tuple[int, int] | None:
    """P and S of a matrix of order `n` with Paley's factor of order `base`; None where the kernel can not do it."""
    right = min(RIGHT, n // base)
    return (n // right, right) if right >= LEAST and n // right <= LEFT else None


def transform(x: Tensor, signs: Tensor, scale: Tensor | float | None, transpose: bool) -> Tensor:
    """`hadamard.hadamard_quantize` of `x` (..., P S), with the 1 and -1 of H's left factor (P, P), by `splits`.

    Without `scale`, `hadamard.hadamard_transform`.
    """
    x = x.contiguous()
    left, width = len(signs), x.shape[-1]
    out = torch.empty_like(x, dtype=x.dtype if scale is None else torch.int8)
    rows = x.numel() // width
    if rows:
        block = power_of_two(left, LEAST)
        with on_device(x):
            _transform[(rows,)](
                x,
                signs,
                out,
                signs if scale is None else scalar(scale, x.device),
                1.0 / math.sqrt(width),
                P=left,
                S=width // left,
                BLOCK=block,
                TRANSPOSE=transpose,
                QUANTIZE=scale is not None,
                num_warps=8 if block * (width // left) > 4096 else 4,
            )
    return out
