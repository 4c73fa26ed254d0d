"""Products with packed 4-bit and int8 weights in Triton (section 9, kernel 2).

One row of float activations: a dot product for each output, every word of weights read once. More rows: tensor cores,
with weights dequantised in registers. int8 activations: int8 tensor cores and int32 sums, scales in the epilogue, whose
bits are those of the plain form (no fused multiply-add, the same rounding).
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.triton_kernels import HAVE_TRITON, power_of_two

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import to_int8

    @triton.jit
    @no_type_check
    def _w4a16_row(
        x,
        packed,
        scales,
        bias,
        out,
        outputs,
        words,
        group_words,
        BIAS: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.program_id(1).to(tl.int64)
        inside = n < outputs
        lanes = tl.arange(0, WORDS)
        place = n.to(tl.int64)[:, None] * words + lanes[None, :]
        source = x + row * words * 8 + lanes * 8
        groups = words // group_words
        total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, words, WORDS):
            word = tl.load(packed + place + start, mask=inside[:, None], other=0)
            part = tl.zeros((BLOCK_N, WORDS), tl.float32)
            for i in tl.static_range(8):
                value = tl.load(source + start * 8 + i).to(tl.float32)
                part += (((word >> (4 * i)) & 15) - 8).to(tl.float32) * value[None, :]
            step = tl.load(scales + n * groups + start // group_words, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(part, 1) * step
        if BIAS:
            total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * outputs + n, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _w4a16(
        x,
        packed,
        scales,
        bias,
        out,
        rows,
        outputs,
        words,
        group_words,
        BIAS: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_n, inside_m = n < outputs, m < rows
        k = tl.arange(0, 8 * WORDS)
        shift = (k % 8) * 4
        source = x + m.to(tl.int64)[:, None] * words * 8 + k[None, :]
        weights = packed + n.to(tl.int64)[None, :] * words + (k // 8)[:, None]
        groups = words // group_words
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, words, WORDS):
            values = tl.load(source + start * 8, mask=inside_m[:, None], other=0.0)
            word = tl.load(weights + start, mask=inside_n[None, :], other=0)
            step = tl.load(scales + n * groups + start // group_words, mask=inside_n, other=0.0).to(tl.float32)
            plain = (((word >> shift[:, None]) & 15) - 8).to(tl.float32) * step[None, :]
            total = tl.dot(values, plain.to(values.dtype), total, input_precision="tf32x3")
        if BIAS:
            total += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        place = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])

    @triton.jit
    @no_type_check
    def _int8(
        x,
        weights,
        relative,
        scale,
        bias,
        out,
        rows,
        outputs,
        columns,
        group,
        BIAS: tl.constexpr,
        PACKED: tl.constexpr,
        QUANTIZE: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_n, inside_m = n < outputs, m < rows
        k = tl.arange(0, BLOCK_K)
        wide = n.to(tl.int64)
        source = x + m.to(tl.int64)[:, None] * columns + k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for start in range(0, columns, BLOCK_K):
            inside_k = start + k < columns
            values = tl.load(source + start, mask=inside_m[:, None] & inside_k[None, :], other=0)
            inside = inside_k[:, None] & inside_n[None, :]
            if PACKED:
                place = wide[None, :] * (columns // 8) + (start + k)[:, None] // 8
                word = tl.load(weights + place, mask=inside, other=0)
                ratio = tl.load(relative + n * (columns // group) + start // group, mask=inside_n, other=0.0)
                code = ((word >> ((k % 8) * 4)[:, None]) & 15) - 8
                operand = to_int8(code.to(tl.float32) * ratio.to(tl.float32)[None, :])
            else:
                operand = tl.load(weights + wide[None, :] * columns + (start + k)[:, None], mask=inside, other=0)
            total = tl.dot(values, operand, total, out_dtype=tl.int32)
        result = total.to(tl.float32) * tl.load(scale + n, mask=inside_n, other=0.0)[None, :]
        if BIAS:
            result = result + tl.load(bias + n, mask=inside_n, other=0.0)[None, :]
        place = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
        mask = inside_m[:, None] & inside_n[None, :]
        if QUANTIZE:
            tl.store(place, to_int8(result), mask=mask)
        else:
            tl.store(place, result.to(out.dtype.element_ty), mask=mask)


def takes_group(group: int) -> bool:
    """Whether the kernels can work with groups of this size: tensor cores take 32 int8 numbers at once."""
    return group % 32 == 0


def _words(group: int) -> int:
    """Words that are read at once: 16, or what divides a group's."""
    words = group // 8
    return min(16, words & -words)


def matmul_w4a16(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`linear.matmul_w4a16` of x (rows, columns)."""
    x = x.contiguous()
    rows, (outputs, words) = x.shape[0], packed.shape
    group_words = words // scales.shape[1]
    out = x.new_empty(rows, outputs)
    given = (x, packed, scales, x if bias is None else bias, out)
    block = _words(8 * group_words)
    if rows == 1:
        _w4a16_row[(-(-outputs // 32), rows)](
            *given, outputs, words, group_words, BIAS=bias is not None, WORDS=block, BLOCK_N=32, num_warps=4
        )
    elif rows:
        block_m = min(64, power_of_two(rows, 16))
        _w4a16[(-(-outputs // 64), -(-rows // block_m))](
            *given,
            rows,
            outputs,
            words,
            group_words,
            BIAS=bias is not None,
            WORDS=block,
            BLOCK_M=block_m,
            BLOCK_N=64,
            num_warps=4,
        )
    return out


def matmul_int8(
    x: Tensor, weights: Tensor, relative: Tensor | None, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear.matmul_w8a8` of int8 `weights` (out, columns); with `relative` (out, groups) of packed ones, W4A8."""
    x = x.contiguous()
    (rows, columns), outputs = x.shape, weights.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    group = columns if relative is None else columns // relative.shape[1]
    if rows:
        block_m = min(64, power_of_two(rows, 16))
        _int8[(-(-outputs // 64), -(-rows // block_m))](
            x,
            weights.contiguous(),
            x if relative is None else relative,
            scale,
            scale if bias is None else bias,
            out,
            rows,
            outputs,
            columns,
            group,
            BIAS=bias is not None,
            PACKED=relative is not None,
            QUANTIZE=dtype == torch.int8,
            BLOCK_M=block_m,
            BLOCK_N=64,
            BLOCK_K=128 if relative is None else 8 * _words(group),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
