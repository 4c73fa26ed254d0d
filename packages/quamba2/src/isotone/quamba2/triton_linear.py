"""Products with packed 4-bit and int8 weights in Triton (section 9, kernel 2).

One row of activations: a dot product for each output, every word of weights read once, bound by memory. More rows:
tensor cores, with weights expanded in registers. int8 activations: exact integer sums, scales in the epilogue, whose
bits are those of the plain form (no fused multiply-add, the same rounding).
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.triton_kernels import HAVE_TRITON, on_device, power_of_two

ROW_WORDS = 128  # of a row of weights that a program of the one-row kernels reads at once

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import to_int8

    @triton.jit
    @no_type_check
    def _code(word, PLACE: tl.constexpr):
        """(q - 8) 16^PLACE of the code at PLACE 0 to 3, exactly: its bits as the last ones of a float near 2^23.

        Neither shifted nor converted: a conversion takes four times as long as a sum.
        """
        raised = ((word & (15 << (4 * PLACE))) | 0x4B000000).to(tl.float32, bitcast=True)
        return raised - (8388608.0 + (8 << (4 * PLACE)))

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
        GROUP_WORDS: tl.constexpr,
        BIAS: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < outputs
        lanes = tl.arange(0, WORDS)
        groups = words // GROUP_WORDS
        total = tl.zeros((BLOCK_N, WORDS), tl.float32)
        for start in range(0, words, WORDS):
            at = start + lanes
            there = at < words
            both = inside[:, None] & there[None, :]
            word = tl.load(packed + n[:, None] * words + at[None, :], mask=both, other=0)
            step = tl.load(scales + n[:, None] * groups + (at // GROUP_WORDS)[None, :], mask=both, other=0.0)
            part = tl.zeros((BLOCK_N, WORDS), tl.float32)
            for half in tl.static_range(2):
                bits = word >> (16 * half)
                for i in tl.static_range(4):
                    value = tl.load(x + at * 8 + (4 * half + i), mask=there, other=0.0).to(tl.float32)
                    part += _code(bits, i) * (value * (1.0 / (1 << (4 * i))))[None, :]
            total += part * step.to(tl.float32)
        result = tl.sum(total, 1)
        if BIAS:
            result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _w4a8_row(
        x,
        packed,
        relative,
        scale,
        bias,
        out,
        outputs,
        words,
        GROUP_WORDS: tl.constexpr,
        BIAS: tl.constexpr,
        QUANTIZE: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < outputs
        lanes = tl.arange(0, WORDS)
        groups = words // GROUP_WORDS
        total = tl.zeros((BLOCK_N, WORDS), tl.int32)
        for start in range(0, words, WORDS):
            at = start + lanes
            there = at < words
            both = inside[:, None] & there[None, :]
            word = tl.load(packed + n[:, None] * words + at[None, :], mask=both, other=0)
            ratio = tl.load(relative + n[:, None] * groups + (at // GROUP_WORDS)[None, :], mask=both, other=0.0)
            ratio = ratio.to(tl.float32)
            # eight products of int8 numbers: a float32 holds their sum exactly
            part = tl.zeros((BLOCK_N, WORDS), tl.float32)
            for half in tl.static_range(2):
                bits = word >> (16 * half)
                for i in tl.static_range(4):
                    value = tl.load(x + at * 8 + (4 * half + i), mask=there, other=0).to(tl.float32)
                    # 4 bits times the 11 of a float16 are exact; the rounding is that of `to_int8`
                    level = _code(bits, i) * (ratio * (1.0 / (1 << (4 * i))))
                    level = tl.minimum(tl.maximum(level, -128.0), 127.0)
                    part += ((level + 12582912.0) - 12582912.0) * value[None, :]
            total += part.to(tl.int32)
        result = tl.sum(total, 1).to(tl.float32) * tl.load(scale + n, mask=inside, other=0.0)
        if BIAS:
            result = result + tl.load(bias + n, mask=inside, other=0.0)
        if QUANTIZE:
            tl.store(out + n, to_int8(result), mask=inside)
        else:
            tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _expanded(packed, n, start, words, inside, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
        """q - 8 of `WORDS` words of rows `n`, (BLOCK_N, 8 WORDS): each word is read once."""
        lanes = tl.arange(0, WORDS)
        word = tl.load(packed + n[:, None] * words + (start + lanes)[None, :], mask=inside[:, None], other=0)
        places = tl.arange(0, 8) * 4
        codes = (word[:, :, None] >> places[None, None, :]) & 15
        return tl.reshape(codes, (BLOCK_N, 8 * WORDS)) - 8

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
        GROUP_WORDS: tl.constexpr,
        BIAS: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_n, inside_m = n < outputs, m < rows
        source = x + m[:, None] * words * 8 + tl.arange(0, 8 * WORDS)[None, :]
        groups = words // GROUP_WORDS
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, words, WORDS):
            values = tl.load(source + start * 8, mask=inside_m[:, None], other=0.0)
            codes = _expanded(packed, n, start, words, inside_n, WORDS, BLOCK_N)
            step = tl.load(scales + n * groups + start // GROUP_WORDS, mask=inside_n, other=0.0).to(tl.float32)
            plain = (codes.to(tl.float32) * step[:, None]).to(values.dtype)
            total = tl.dot(values, tl.trans(plain), total, input_precision="tf32x3")
        if BIAS:
            total += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        place = out + m[:, None] * outputs + n[None, :]
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
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_n, inside_m = n < outputs, m < rows
        k = tl.arange(0, BLOCK_K)
        source = x + m[:, None] * columns + k[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for start in range(0, columns, BLOCK_K):
            inside_k = start + k < columns
            values = tl.load(source + start, mask=inside_m[:, None] & inside_k[None, :], other=0)
            if PACKED:
                codes = _expanded(weights, n, start // 8, columns // 8, inside_n, BLOCK_K // 8, BLOCK_N)
                ratio = tl.load(relative + n * (columns // group) + start // group, mask=inside_n, other=0.0)
                operand = to_int8(codes.to(tl.float32) * ratio.to(tl.float32)[:, None])
            else:
                inside = inside_n[:, None] & inside_k[None, :]
                operand = tl.load(weights + n[:, None] * columns + (start + k)[None, :], mask=inside, other=0)
            total = tl.dot(values, tl.trans(operand), total, out_dtype=tl.int32)
        result = total.to(tl.float32) * tl.load(scale + n, mask=inside_n, other=0.0)[None, :]
        if BIAS:
            result = result + tl.load(bias + n, mask=inside_n, other=0.0)[None, :]
        place = out + m[:, None] * outputs + n[None, :]
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


def _tiles(rows: int) -> tuple[int, int]:
    """Rows and outputs of a program; with few rows, narrow ones, so that there are enough programs."""
    block_m = min(64, power_of_two(rows, 16))
    return block_m, 32 if block_m == 16 else 64


def matmul_w4a16(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`linear.matmul_w4a16` of x (rows, columns)."""
    x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
    rows, (outputs, words) = x.shape[0], packed.shape
    group_words = words // scales.shape[1]
    out = x.new_empty(rows, outputs)
    given = (x, packed, scales, x if bias is None else bias, out)
    if not out.numel():
        return out
    with on_device(x):
        if rows == 1:
            _w4a16_row[(-(-outputs // 16),)](
                *given,
                outputs,
                words,
                GROUP_WORDS=group_words,
                BIAS=bias is not None,
                WORDS=min(ROW_WORDS, power_of_two(words)),
                BLOCK_N=16,
                num_warps=4,
            )
        else:
            block_m, block_n = _tiles(rows)
            if x.dtype == torch.float32:
                block_m = min(32, block_m)  # twice the shared memory
            _w4a16[(-(-outputs // block_n), -(-rows // block_m))](
                *given,
                rows,
                outputs,
                words,
                GROUP_WORDS=group_words,
                BIAS=bias is not None,
                WORDS=_words(8 * group_words),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=4,
                num_stages=2,
            )
    return out


def matmul_int8(
    x: Tensor, weights: Tensor, relative: Tensor | None, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear.matmul_w8a8` of int8 `weights` (out, columns); with `relative` (out, groups) of packed ones, W4A8."""
    x, weights = x.contiguous(), weights.contiguous()
    (rows, columns), outputs = x.shape, weights.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    relative = None if relative is None else relative.contiguous()
    group = columns if relative is None else columns // relative.shape[1]
    ends = {"BIAS": bias is not None, "QUANTIZE": dtype == torch.int8, "num_warps": 4, "enable_fp_fusion": False}
    shift = scale if bias is None else bias
    with on_device(x):
        if rows == 1 and relative is not None:
            words = weights.shape[1]
            _w4a8_row[(-(-outputs // 16),)](
                x,
                weights,
                relative,
                scale,
                shift,
                out,
                outputs,
                words,
                GROUP_WORDS=group // 8,
                WORDS=min(ROW_WORDS, power_of_two(words)),
                BLOCK_N=16,
                **ends,
            )
        else:
            block_m, block_n = _tiles(rows)
            _int8[(-(-outputs // block_n), -(-rows // block_m))](
                x,
                weights,
                x if relative is None else relative,
                scale,
                shift,
                out,
                rows,
                outputs,
                columns,
                group,
                PACKED=relative is not None,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=128 if relative is None else 8 * _words(group),
                **ends,
            )
    return out
