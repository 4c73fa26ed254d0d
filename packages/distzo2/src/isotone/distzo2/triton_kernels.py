"""The fused pass of kernels.py in Triton: Philox and Box-Muller in registers, one program for 1,024 elements.

Contraction to fused multiply-adds is off, division and square root are the correctly rounded ones: the bits are those
of the other forms. TRITON_INTERPRET=1 runs it without a GPU.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from isotone.distzo2.layout import GROUP, Segment

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # pragma: no cover - there is a Triton on Linux
    HAVE_TRITON = False

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GROUPS = 256


def takes(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernel can work on these: a GPU's (or anything, in the interpreter), of at most 32 bits."""
    given = [tensor for tensor in tensors if tensor is not None]
    there = all(t.is_cuda for t in given) or os.environ.get("TRITON_INTERPRET") == "1"
    return HAVE_TRITON and there and all(t.dtype in _DTYPES and t.is_contiguous() for t in given)


if HAVE_TRITON:

    @triton.jit
    def _philox(low, high, seed, parameter):
        c0, c1 = low, high
        c2 = tl.zeros_like(low)
        c3 = tl.zeros_like(low)
        k0, k1 = seed, parameter
        for _ in tl.static_range(10):
            p0 = c0.to(tl.uint64) * 0xD2511F53
            p1 = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c1 = p1.to(tl.uint32)
            c3 = p0.to(tl.uint32)
            k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
            k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
        return c0, c1, c2, c3

    @triton.jit
    def _box_muller(radius_word, angle_word):
        u = ((radius_word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 126
        m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
        small = m < 0.70710677
        exponent = tl.where(small, exponent - 1, exponent)
        m = tl.where(small, m + m, m)
        s = tl.div_rn(m - 1.0, m + 1.0)
        q = s * s
        series = q * (1.0 / 9.0) + (1.0 / 7.0)
        series = series * q + (1.0 / 5.0)
        series = series * q + (1.0 / 3.0)
        log_m = s + s * (series * q)
        log_u = (log_m + log_m) + exponent.to(tl.float32) * 0.693147182
        r = tl.sqrt_rn(log_u * -2.0)
        quadrant = angle_word >> 30
        t = (((angle_word & 0x3FFFFFFF) >> 7) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 - 0.5
        x = t * 1.57079637
        y = x * x
        sine = y * (1.0 / 362880.0) + (-1.0 / 5040.0)
        sine = sine * y + (1.0 / 120.0)
        sine = sine * y + (-1.0 / 6.0)
        sine = x + x * (sine * y)
        cosine = y * (-1.0 / 3628800.0) + (1.0 / 40320.0)
        cosine = cosine * y + (-1.0 / 720.0)
        cosine = cosine * y + (1.0 / 24.0)
        cosine = cosine * y - 0.5
        cosine = cosine * y + 1.0
        turned = (quadrant & 1) == 1
        a = tl.where(turned, sine, cosine)
        b = tl.where(turned, cosine, sine)
        a = tl.where((quadrant == 1) | (quadrant == 2), -a, a)
        b = tl.where((quadrant & 2) == 2, -b, b)
        return r * a, r * b

    @triton.jit
    def _normals(low, high, seed, parameter):
        w0, w1, w2, w3 = _philox(low, high, seed, parameter)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return z0, z1, z2, z3

    @triton.jit
    def _put(out, place, mask, w, moved):
        tl.store(out + place, (w + moved).to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["count", "first", "parameter", "seed"])
    def _advance(
        weights,
        plus,
        minus,
        seeds,
        coefficients,
        scalars,
        count,
        first,
        parameter,
        seed,
        UPDATES: tl.constexpr,
        PLUS: tl.constexpr,
        MINUS: tl.constexpr,
        GROUPS: tl.constexpr,
    ):
        local = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        group = (local + first).to(tl.uint64)
        low = (group & 0xFFFFFFFF).to(tl.uint32)
        high = (group >> 32).to(tl.uint32)
        number = tl.zeros_like(low) + parameter.to(tl.uint32)
        decay = tl.load(scalars)
        eps = tl.load(scalars + 1)
        p0 = local * 4
        p1, p2, p3 = p0 + 1, p0 + 2, p0 + 3
        m0, m1, m2, m3 = p0 < count, p1 < count, p2 < count, p3 < count
        w0 = tl.load(weights + p0, mask=m0, other=0.0).to(tl.float32)
        w1 = tl.load(weights + p1, mask=m1, other=0.0).to(tl.float32)
        w2 = tl.load(weights + p2, mask=m2, other=0.0).to(tl.float32)
        w3 = tl.load(weights + p3, mask=m3, other=0.0).to(tl.float32)
        if UPDATES > 0:
            s0 = tl.zeros_like(w0)
            s1 = tl.zeros_like(w0)
            s2 = tl.zeros_like(w0)
            s3 = tl.zeros_like(w0)
            for k in tl.static_range(UPDATES):
                last = tl.zeros_like(low) + tl.load(seeds + k).to(tl.uint32)
                c = tl.load(coefficients + k)
                z0, z1, z2, z3 = _normals(low, high, last, number)
                s0 += z0 * c
                s1 += z1 * c
                s2 += z2 * c
                s3 += z3 * c
            kind = weights.dtype.element_ty
            w0 = (w0 - (s0 + w0 * decay)).to(kind)
            w1 = (w1 - (s1 + w1 * decay)).to(kind)
            w2 = (w2 - (s2 + w2 * decay)).to(kind)
            w3 = (w3 - (s3 + w3 * decay)).to(kind)
            tl.store(weights + p0, w0, mask=m0)
            tl.store(weights + p1, w1, mask=m1)
            tl.store(weights + p2, w2, mask=m2)
            tl.store(weights + p3, w3, mask=m3)
            w0, w1, w2, w3 = w0.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), w3.to(tl.float32)
        if PLUS or MINUS:
            now = tl.zeros_like(low) + seed.to(tl.uint32)
            z0, z1, z2, z3 = _normals(low, high, now, number)
            if PLUS:
                _put(plus, p0, m0, w0, z0 * eps)
                _put(plus, p1, m1, w1, z1 * eps)
                _put(plus, p2, m2, w2, z2 * eps)
                _put(plus, p3, m3, w3, z3 * eps)
            if MINUS:
                _put(minus, p0, m0, w0, -(z0 * eps))
                _put(minus, p1, m1, w1, -(z1 * eps))
                _put(minus, p2, m2, w2, -(z2 * eps))
                _put(minus, p3, m3, w3, -(z3 * eps))


@functools.lru_cache(64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same numbers serve every block of a step: a copy that the host waits for is made once."""
    return torch.tensor(values, dtype=dtype, device=device)


def advance(
    weights: Tensor,
    segments: list[Segment],
    update: Any,
    seed: int,
    eps: float,
    plus: Tensor | None,
    minus: Tensor | None,
) -> None:
    """`kernels.advance`, one launch a segment."""
    device = weights.device
    count = len(update.seeds) if update else 0
    seeds = _on_device(update.seeds if update else (0,), torch.int64, device)
    coefficients = _on_device(update.coefficients if update else (0.0,), torch.float32, device)
    scalars = {
        decays: _on_device((update.decay if update and decays else 0.0, eps), torch.float32, device)
        for decays in (False, True)
    }
    # Triton launches on the current device, whatever its arguments
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for segment in segments:
            there = slice(segment.start, segment.start + segment.length)
            w = weights[there]
            grid = (-(-segment.length // (GROUP * _GROUPS)),)
            _advance[grid](
                w,
                w if plus is None else plus[there],
                w if minus is None else minus[there],
                seeds,
                coefficients,
                scalars[segment.decays],
                segment.length,
                segment.first // GROUP,
                segment.parameter,
                seed,
                UPDATES=count,
                PLUS=plus is not None,
                MINUS=minus is not None,
                GROUPS=_GROUPS,
                enable_fp_fusion=False,
            )
