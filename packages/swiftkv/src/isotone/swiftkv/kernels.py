"""One pass over the new keys and values: RoPE, quantisation and the write into every group's cache, fused.

The projection of all groups comes as one matrix (T, G * K * e keys | G * K * e values). Done plainly it is read and
written four times (split, rotate, convert, scatter); the Triton kernel reads it once and writes the cache once. One
program is one token, one group, one head. On a CPU, and where the kernel does not apply, `SwiftKVCache.write` does it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.quantize import FP8_MAX

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # pragma: no cover - there is a Triton on Linux
    HAVE_TRITON = False

FUSED_DTYPES = ("model", "fp32", "fp16", "bf16", "fp8", "int8")


def can_write(projected: Tensor, rope: Any, cache: SwiftKVCache, key_norm: Any) -> bool:
    """Whether `rope_write` takes this: a GPU, plain RoPE over whole heads, no norm on the keys, a type it can store."""
    size = cache.spec.key_dim
    plain = isinstance(rope, tuple) and key_norm is None and cache.spec.value_dim == size and size & (size - 1) == 0
    return HAVE_TRITON and projected.is_cuda and plain and cache.kv_dtype in FUSED_DTYPES


if HAVE_TRITON:

    @triton.jit
    def _store(codes, scales, offset, scale_offset, values, lanes, fixed, KIND: tl.constexpr, LIMIT: tl.constexpr):
        if KIND == 1:  # fp8, a fixed scale
            scaled = values / fixed
            scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
            tl.store(codes + offset + lanes, scaled.to(codes.dtype.element_ty))
        elif KIND == 2:  # int8, a scale of this token and head
            step = tl.maximum(tl.max(tl.abs(values), 0) / 127.0, 1e-12)
            ratio = values / step
            whole = tl.floor(ratio)
            rest = ratio - whole
            # to the nearest, halves to the even one, as torch.round
            odd = (whole - 2.0 * tl.floor(whole * 0.5)) > 0.5
            up = (rest > 0.5) | ((rest == 0.5) & odd)
            tl.store(codes + offset + lanes, tl.where(up, whole + 1.0, whole).to(tl.int8))
            tl.store(scales + scale_offset, step)
        else:
            tl.store(codes + offset + lanes, values.to(codes.dtype.element_ty))

    @triton.jit
    def _rope_write(
        projected,
        cos,
        sin,
        rows,
        positions,
        key_codes,
        value_codes,
        key_scales,
        value_scales,
        fixed_key,
        fixed_value,
        stride_token,
        stride_rope,
        stride_slot,
        stride_row,
        stride_head,
        stride_place,
        scale_slot,
        scale_row,
        scale_head,
        scale_place,
        GROUPS: tl.constexpr,
        HEADS: tl.constexpr,
        SIZE: tl.constexpr,
        KIND: tl.constexpr,
        LIMIT: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1)
        head = tl.program_id(2)
        lanes = tl.arange(0, SIZE)
        half: tl.constexpr = SIZE // 2
        other = tl.where(lanes < half, lanes + half, lanes - half)
        sign = tl.where(lanes < half, -1.0, 1.0)
        source = projected + token * stride_token + (group * HEADS + head) * SIZE
        key = tl.load(source + lanes).to(tl.float32)
        partner = tl.load(source + other).to(tl.float32) * sign
        value = tl.load(source + GROUPS * HEADS * SIZE + lanes).to(tl.float32)
        turned = tl.load(cos + token * stride_rope + lanes).to(tl.float32) * key
        turned += tl.load(sin + token * stride_rope + lanes).to(tl.float32) * partner
        row = tl.load(rows + token)
        place = tl.load(positions + token)
        wide = group.to(tl.int64)
        offset = wide * stride_slot + row * stride_row + head * stride_head + place * stride_place
        scale_offset = wide * scale_slot + row * scale_row + head * scale_head + place * scale_place
        key_step = tl.load(fixed_key + group)
        value_step = tl.load(fixed_value + group)
        _store(key_codes, key_scales, offset, scale_offset, turned, lanes, key_step, KIND, LIMIT)
        _store(value_codes, value_scales, offset, scale_offset, value, lanes, value_step, KIND, LIMIT)


def rope_write(
    projected: Tensor, rope: tuple[Tensor, Tensor], cache: SwiftKVCache, slots: slice, rows: Tensor, positions: Tensor
) -> None:
    """RoPE on the keys of `projected` (T, 2 * G * K * e), and keys and values into the slots of the cache.

    `rope`: cos and sin (T, e). `rows`, `positions` (T,). Keys are rotated in fp32 and rounded once, where the plain
    path rounds the products of a half-precision model as transformers does.
    """
    tokens = projected.shape[0]
    groups = slots.stop - slots.start
    kind = {"fp8": 1, "int8": 2}.get(cache.kv_dtype, 0)
    keys, values = cache.keys[0][slots], cache.values[0][slots]
    key_scales = cache.keys[1][slots] if kind == 2 else keys
    value_scales = cache.values[1][slots] if kind == 2 else values
    _rope_write[(tokens, groups, cache.spec.heads)](
        projected.contiguous(),
        rope[0].contiguous(),
        rope[1].contiguous(),
        rows,
        positions,
        keys,
        values,
        key_scales,
        value_scales,
        cache.key_scale[slots],
        cache.value_scale[slots],
        projected.shape[1],
        rope[0].shape[1],
        *keys.stride()[:4],
        *key_scales.stride()[:4],
        GROUPS=groups,
        HEADS=cache.spec.heads,
        SIZE=cache.spec.key_dim,
        KIND=kind,
        LIMIT=FP8_MAX,
    )
