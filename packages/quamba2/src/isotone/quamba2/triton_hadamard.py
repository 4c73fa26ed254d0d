"""The fast Hadamard transform and the quantiser after it, one program a row (section 9, kernel 5).

A row of n = F m channels, m = 2^k, is a matrix (F, m), and H = Paley's factor (x) Sylvester's. Sylvester's is k rounds
of sums and differences in registers, Paley's one product with a matrix of ones and minus ones in tensor cores.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.triton_kernels import HAVE_TRITON, power_of_two, scalar

WIDEST = 16384  # a row is held in registers

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import to_int8

    @triton.jit
    @no_type_check
    def _transform_quantize(
        x,
        paley,
        out,
        scale,
        norm,
        F: tl.constexpr,
        M: tl.constexpr,
        ROUNDS: tl.constexpr,
        BLOCK: tl.constexpr,
        TRANSPOSE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * (F * M)
        first = tl.arange(0, BLOCK)
        second = tl.arange(0, M)
        places = first[:, None] * M + second[None, :]
        inside = (first[:, None] < F) & (second[None, :] < M)
        values = tl.load(x + row + places, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(ROUNDS):
            pairs = tl.permute(tl.reshape(values, (BLOCK, M // (2 << i), 2, 1 << i)), (0, 1, 3, 2))
            low, high = tl.split(pairs)
            pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
            values = tl.reshape(pairs, (BLOCK, M))
        if F > 1:
            square = (first[:, None] < F) & (first[None, :] < F)
            if TRANSPOSE:
                signs = tl.load(paley + first[:, None] * F + first[None, :], mask=square, other=0.0)
            else:
                signs = tl.load(paley + first[None, :] * F + first[:, None], mask=square, other=0.0)
            # three products in TF32 keep the bits of a float32
            values = tl.dot(signs, values, input_precision="tf32x3")
        values = values * norm
        step = tl.load(scale) + tl.zeros_like(values)
        tl.store(out + row + places, to_int8(tl.div_rn(values, step)), mask=inside)


def transform_quantize(x: Tensor, paley: Tensor, scale: Tensor | float, transpose: bool) -> Tensor:
    """`hadamard.hadamard_quantize` of `x` (..., F 2^k), with Paley's factor `paley` (F, F) of 1 and -1, or (1, 1)."""
    x = x.contiguous()
    factor, width = len(paley), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.int8)
    rows = x.numel() // width
    if rows:
        m = width // factor
        block = 1 if factor == 1 else power_of_two(factor, 16)
        _transform_quantize[(rows,)](
            x,
            paley,
            out,
            scalar(scale, x.device),
            1.0 / math.sqrt(width),
            F=factor,
            M=m,
            ROUNDS=m.bit_length() - 1,
            BLOCK=block,
            TRANSPOSE=transpose,
            num_warps=8 if block * m > 4096 else 4,
        )
    return out
