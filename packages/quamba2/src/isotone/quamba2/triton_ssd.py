"""The SSD scan and its step in Triton, on floats or int8 codes, states in floats or int8 (section 9, kernels 4 and 6).

The scan: one program a sequence, head and block of channels; it goes through the chunks with the state in registers.
The step reads and writes the state once. Scales of x and the state are looked up by each channel's label.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
from torch import Tensor

from isotone.quamba2.packing import ScanScales
from isotone.quamba2.triton_kernels import HAVE_TRITON, on_device, power_of_two

CHUNK = 64
_LARGEST = 3.0e38  # stands for an infinite limit

if HAVE_TRITON:
    import triton
    import triton.language as tl

    from isotone.quamba2.triton_kernels import dot_exact, to_int8

    @triton.jit
    @no_type_check
    def _softplus(v):
        """max(v, 0) + log1p(exp(-|v|)), the logarithm as 2 artanh(u / (2 + u)): small ones keep their digits."""
        u = tl.exp(-tl.abs(v))
        s = u / (2.0 + u)
        z = s * s
        series = z * (1.0 / 15.0) + (1.0 / 13.0)
        series = series * z + (1.0 / 11.0)
        series = series * z + (1.0 / 9.0)
        series = series * z + (1.0 / 7.0)
        series = series * z + (1.0 / 5.0)
        series = series * z + (1.0 / 3.0)
        series = series * z + 1.0
        return tl.maximum(v, 0.0) + 2.0 * s * series

    @triton.jit
    @no_type_check
    def _chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        initial,
        y,
        last,
        labels,
        x_steps,
        B_steps,
        C_steps,
        dt_steps,
        dt_bias,
        state_steps,
        low,
        high,
        length,
        heads,
        per_group,
        channels,
        states,
        x_b,
        x_l,
        x_h,
        dt_b,
        dt_l,
        B_b,
        B_l,
        B_g,
        C_b,
        C_l,
        C_g,
        D_h,
        D_p,
        B_step,
        C_step,
        dt_step,
        state_k,
        state_n,
        INT8: tl.constexpr,
        BIAS: tl.constexpr,
        SKIP: tl.constexpr,
        INITIAL: tl.constexpr,
        STATE8: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        Q: tl.constexpr,
    ):
        batch = (tl.program_id(0) // heads).to(tl.int64)
        head = tl.program_id(0) % heads
        group = head // per_group
        q = tl.arange(0, Q)
        p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)
        inside_p, inside_n = p < channels, n < states
        rate = tl.load(A + head).to(tl.float32)
        place = ((batch * heads + head) * channels + p)[:, None] * states + n[None, :]
        inside = inside_p[:, None] & inside_n[None, :]
        label = tl.zeros((BLOCK_P,), tl.int32)
        if INT8:
            label = tl.load(labels + head * channels + p, mask=inside_p, other=0).to(tl.int32)
            x_size = tl.load(x_steps + label)
            B_size = tl.load(B_steps + group * B_step)
            C_size = tl.load(C_steps + group * C_step)
            dt_size = tl.load(dt_steps + head * dt_step)
        if BIAS:
            shift = tl.load(dt_bias + head).to(tl.float32)
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        if INITIAL:
            state = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
        if STATE8:
            sizes = tl.load(state_steps + label[:, None] * state_k + n[None, :] * state_n, mask=inside, other=1.0)
            state = state * sizes
        if SKIP:
            through = tl.load(D + head * D_h + p * D_p, mask=inside_p, other=0.0).to(tl.float32)
        for start in range(0, length, Q):
            t = (start + q).to(tl.int64)
            there = start + q < length
            delta = tl.load(dt + batch * dt_b + t * dt_l + head, mask=there, other=0).to(tl.float32)
            if INT8:
                delta = delta * dt_size
                if BIAS:
                    delta += shift
                delta = tl.minimum(tl.maximum(_softplus(delta), low), high)
                delta = tl.where(there, delta, 0.0)
            # the sums in float64, as differences of long ones would lose the digits of a float32: the part that its
            # rounding cuts off, `rest`, is put back as factors of rows and columns
            exponents = delta.to(tl.float64) * rate.to(tl.float64)
            exact = tl.cumsum(exponents, 0)
            total = tl.sum(exponents, 0)
            log_decay = exact.to(tl.float32)
            rest = (exact - log_decay.to(tl.float64)).to(tl.float32)
            x_place = x + batch * x_b + t[:, None] * x_l + head * x_h + p[None, :]
            x_codes = tl.load(x_place, mask=there[:, None] & inside_p[None, :], other=0)
            mask = there[:, None] & inside_n[None, :]
            B_codes = tl.load(B + batch * B_b + t[:, None] * B_l + group * B_g + n[None, :], mask=mask, other=0)
            C_codes = tl.load(C + batch * C_b + t[:, None] * C_l + group * C_g + n[None, :], mask=mask, other=0)
            fading = tl.exp(tl.minimum(log_decay[:, None] - log_decay[None, :], 0.0))
            at_start = (delta * tl.exp(-rest))[None, :]
            at_end = (delta * tl.exp((total - exact).to(tl.float32)))[:, None]
            if INT8:
                # codes stay codes in every product, exact; their steps are factors of rows and columns
                scores = tl.dot(C_codes, tl.trans(B_codes), out_dtype=tl.int32).to(tl.float32) * (B_size * C_size)
                scores = tl.where(q[:, None] >= q[None, :], scores * fading * at_start, 0.0)
                out = dot_exact(scores, x_codes) * (tl.exp(rest)[:, None] * x_size[None, :])
                carried = tl.trans(dot_exact(state, tl.trans(C_codes))) * C_size
                values = x_codes.to(tl.float32)
                entered = dot_exact(tl.trans(values * at_end), B_codes) * (x_size[:, None] * B_size)
                values = values * x_size[None, :]
            else:
                values, B_values, C_values = x_codes.to(tl.float32), B_codes.to(tl.float32), C_codes.to(tl.float32)
                scores = tl.dot(C_values, tl.trans(B_values), input_precision="tf32x3")
                scores = tl.where(q[:, None] >= q[None, :], scores * fading * at_start, 0.0)
                out = tl.dot(scores, values, input_precision="tf32x3") * tl.exp(rest)[:, None]
                carried = tl.dot(C_values, tl.trans(state), input_precision="tf32x3")
                entered = tl.dot(tl.trans(values * at_end), B_values, input_precision="tf32x3")
            out += carried * tl.exp(log_decay)[:, None]
            if SKIP:
                out += values * through[None, :]
            y_place = y + ((batch * length + t)[:, None] * heads + head) * channels + p[None, :]
            tl.store(y_place, out.to(y.dtype.element_ty), mask=there[:, None] & inside_p[None, :])
            state = state * tl.exp(total.to(tl.float32)) + entered
        if STATE8:
            tl.store(last + place, to_int8(tl.div_rn(state, sizes)), mask=inside)
        else:
            tl.store(last + place, state.to(last.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _step(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        y,
        following,
        labels,
        x_steps,
        B_steps,
        C_steps,
        dt_steps,
        dt_bias,
        state_steps,
        low,
        high,
        heads,
        per_group,
        channels,
        states,
        D_h,
        D_p,
        B_step,
        C_step,
        dt_step,
        state_k,
        state_n,
        INT8: tl.constexpr,
        BIAS: tl.constexpr,
        SKIP: tl.constexpr,
        STATE8: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        both = tl.program_id(0).to(tl.int64)  # sequence and head
        head = tl.program_id(0) % heads
        group = head // per_group
        p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)
        inside_p, inside_n = p < channels, n < states
        inside = inside_p[:, None] & inside_n[None, :]
        place = (both * channels + p)[:, None] * states + n[None, :]
        kept = tl.load(state + place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + both * channels + p, mask=inside_p, other=0).to(tl.float32)
        delta = tl.load(dt + both).to(tl.float32)
        shared = (both // per_group) * states + n  # sequence and group
        B_values = tl.load(B + shared, mask=inside_n, other=0).to(tl.float32)
        C_values = tl.load(C + shared, mask=inside_n, other=0).to(tl.float32)
        label = tl.zeros((BLOCK_P,), tl.int32)
        if INT8:
            label = tl.load(labels + head * channels + p, mask=inside_p, other=0).to(tl.int32)
            values = values * tl.load(x_steps + label)
            B_values = B_values * tl.load(B_steps + group * B_step)
            C_values = C_values * tl.load(C_steps + group * C_step)
            delta = delta * tl.load(dt_steps + head * dt_step)
            if BIAS:
                delta += tl.load(dt_bias + head).to(tl.float32)
            delta = tl.minimum(tl.maximum(_softplus(delta), low), high)
        if STATE8:
            sizes = tl.load(state_steps + label[:, None] * state_k + n[None, :] * state_n, mask=inside, other=1.0)
            kept = kept * sizes
        entering = (values * delta)[:, None] * B_values[None, :]
        kept = kept * tl.exp(delta * tl.load(A + head).to(tl.float32)) + entering
        out = tl.sum(kept * C_values[None, :], 1)
        if SKIP:
            out += values * tl.load(D + head * D_h + p * D_p, mask=inside_p, other=0.0).to(tl.float32)
        tl.store(y + both * channels + p, out.to(y.dtype.element_ty), mask=inside_p)
        if STATE8:
            tl.store(following + place, to_int8(tl.div_rn(kept, sizes)), mask=inside)
        else:
            tl.store(following + place, kept.to(following.dtype.element_ty), mask=inside)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    scales: ScanScales | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd_chunk_scan`, or `ssd.ssd_chunk_scan_int8` with `scales`."""
    x, dt, B, C = (values if values.stride(-1) == 1 else values.contiguous() for values in (x, dt, B, C))
    (batch, length, heads, channels), (groups, states) = x.shape, B.shape[2:]
    y = torch.empty(x.shape, dtype=torch.float32 if scales else x.dtype, device=x.device)
    state8 = scales is not None and scales.state is not None
    kind = torch.int8 if state8 else torch.float32
    last = torch.empty(batch, heads, channels, states, dtype=kind, device=x.device)
    block_p = min(64, power_of_two(channels, 16))
    A = A.contiguous()
    given, strides = _scales(scales, A, dt_bias)
    if batch:
        with on_device(x):
            _chunk_scan[(batch * heads, -(-channels // block_p))](
                x,
                dt,
                A,
                B,
                C,
                A if D is None else D,
                A if initial is None else initial.contiguous(),
                y,
                last,
                *given,
                *_limits(dt_limit),
                length,
                heads,
                heads // groups,
                channels,
                states,
                *x.stride()[:3],
                *dt.stride()[:2],
                *B.stride()[:3],
                *C.stride()[:3],
                *_skip(D),
                *strides,
                INT8=scales is not None,
                BIAS=dt_bias is not None,
                SKIP=D is not None,
                INITIAL=initial is not None,
                STATE8=state8,
                BLOCK_P=block_p,
                # int8 tensor cores take 32 numbers at once
                BLOCK_N=power_of_two(states, 32),
                Q=CHUNK,
                num_warps=8 if block_p * states >= 4096 else 4,
                num_stages=2,
            )
    return y, last


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    inplace: bool,
    scales: ScanScales | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd_step`, or `ssd.ssd_step_int8` with `scales`."""
    (batch, heads, channels), (groups, states) = x.shape, B.shape[1:]
    y = torch.empty(x.shape, dtype=torch.float32 if scales else x.dtype, device=x.device)
    A = A.contiguous()
    given, strides = _scales(scales, A, dt_bias)
    kept = state.contiguous()
    following = kept if inplace else torch.empty_like(kept)
    block_p = min(16, power_of_two(channels))
    if batch:
        with on_device(x):
            _step[(batch * heads, -(-channels // block_p))](
                kept,
                x.contiguous(),
                dt.contiguous(),
                A,
                B.contiguous(),
                C.contiguous(),
                A if D is None else D,
                y,
                following,
                *given,
                *_limits(dt_limit),
                heads,
                heads // groups,
                channels,
                states,
                *_skip(D),
                *strides,
                INT8=scales is not None,
                BIAS=dt_bias is not None,
                SKIP=D is not None,
                STATE8=scales is not None and scales.state is not None,
                BLOCK_P=block_p,
                BLOCK_N=power_of_two(states),
                num_warps=4,
            )
    if inplace and kept is not state:
        following = state.copy_(following)
    return y, following


def _scales(scales: ScanScales | None, filler: Tensor, dt_bias: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Tensors of the scales and dt_bias for a kernel, and their strides, 0 where one scale serves all."""
    bias = filler if dt_bias is None else dt_bias
    if scales is None:
        return [filler] * 5 + [bias, filler], [0] * 5
    table = filler if scales.state is None else scales.state
    steps = [int(len(values) > 1) for values in (scales.B, scales.C, scales.dt)]
    over = [0, 0] if scales.state is None else [table.shape[1], int(table.shape[1] > 1)]
    tensors = [scales.labels, scales.x, scales.B, scales.C, scales.dt, bias, table]
    return [tensors[0].contiguous(), *(values.float().contiguous() for values in tensors[1:])], steps + over


def _skip(D: Tensor | None) -> tuple[int, int]:
    """Strides of D, (h,) or (h, p)."""
    if D is None:
        return 0, 0
    return (D.stride(0), 0) if D.ndim == 1 else (D.stride(0), D.stride(1))


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    return float(dt_limit[0]), min(float(dt_limit[1]), _LARGEST)
