"""The causal convolution with SiLU and requantisation in one pass, and the window it leaves (section 9, kernel 3)."""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.triton_kernels import HAVE_TRITON, on_device, power_of_two

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import to_int8

    # a length of 1 stays a number of the device's: no kernel of its own
    @triton.jit(do_not_specialize=["length"])
    @no_type_check
    def _conv_silu(
        x,
        weight,
        scale,
        bias,
        out_scale,
        state,
        out,
        last,
        length,
        width,
        x_b,
        x_l,
        state_b,
        state_l,
        K: tl.constexpr,
        SCALE: tl.constexpr,
        BIAS: tl.constexpr,
        QUANTIZE: tl.constexpr,
        STATE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        batch = tl.program_id(2).to(tl.int64)
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside_w = w < width
        inside = (t < length)[:, None] & inside_w[None, :]
        source = x + batch * x_b + w[None, :]
        before = state + batch * state_b + w[None, :]
        total = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
        for tap in tl.static_range(K):
            at = t + (tap - (K - 1))
            here = inside & (at >= 0)[:, None]
            values = tl.load(source + at.to(tl.int64)[:, None] * x_l, mask=here, other=0).to(tl.float32)
            if STATE:
                earlier = inside & (at < 0)[:, None]
                past = tl.load(before + (at + (K - 1))[:, None] * state_l, mask=earlier, other=0)
                values += past.to(tl.float32)
            total += values * tl.load(weight + w * K + tap, mask=inside_w, other=0).to(tl.float32)[None, :]
        if SCALE:
            total = total * tl.load(scale + w, mask=inside_w, other=0.0)[None, :]
        if BIAS:
            total = total + tl.load(bias + w, mask=inside_w, other=0.0).to(tl.float32)[None, :]
        total = total / (1.0 + tl.exp(-total))
        place = (batch * length + t)[:, None] * width + w[None, :]
        if QUANTIZE:
            step = tl.load(out_scale + w, mask=inside_w, other=1.0)[None, :] + tl.zeros_like(total)
            tl.store(out + place, to_int8(tl.div_rn(total, step)), mask=inside)
        else:
            tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
        if tl.program_id(0) == 0:
            # the last K - 1 tokens of the state and x together
            for j in tl.static_range(K - 1):
                then = tl.zeros_like(w) + (length + (j - (K - 1)))
                newer = inside_w & (then >= 0)
                kept = tl.load(x + batch * x_b + then.to(tl.int64) * x_l + w, mask=newer, other=0)
                if STATE:
                    older = inside_w & (then < 0)
                    old = tl.load(state + batch * state_b + (then + (K - 1)) * state_l + w, mask=older, other=0)
                    kept = tl.where(then >= 0, kept, old.to(kept.dtype))
                tl.store(last + (batch * (K - 1) + j) * width + w, kept, mask=inside_w)


def conv_silu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    state: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`gated_norm.conv1d_silu`, and, with neither `scale` nor `out_scale`, `gated_norm.conv1d_silu_float`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    state = state if state is None or state.stride(-1) == 1 else state.contiguous()
    (batch, length, width), taps = x.shape, weight.shape[1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    last = x.new_empty(batch, taps - 1, width)
    block_t = min(16, power_of_two(length))
    block_w = 128 if block_t > 1 else 256
    if x.numel():
        with on_device(x):
            _conv_silu[(-(-length // block_t), -(-width // block_w), batch)](
                x,
                weight.contiguous(),
                weight if scale is None else scale.float().contiguous(),
                weight if bias is None else bias.contiguous(),
                weight if out_scale is None else out_scale.float().contiguous(),
                x if state is None else state,
                out,
                last,
                length,
                width,
                *x.stride()[:2],
                *((0, 0) if state is None else state.stride()[:2]),
                K=taps,
                SCALE=scale is not None,
                BIAS=bias is not None,
                QUANTIZE=out_scale is not None,
                STATE=state is not None,
                BLOCK_T=block_t,
                BLOCK_W=block_w,
                num_warps=4,
            )
    return out, last
