"""The kernel that adds, norms and quantises in one pass, and what all Triton kernels of this package share.

TRITON_INTERPRET=1 runs them without a GPU. The array checker leaves them alone: its wrappers can not be compiled. The
other kernels: `triton_hadamard`, `triton_linear`, `triton_ssd`.
"""

from __future__ import annotations

import contextlib
import os
from typing import no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # pragma: no cover - there is a Triton on Linux
    HAVE_TRITON = False

WIDEST_NORM = 32768  # a row is held in registers
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton too reads it once
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32)


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can work on these: one GPU's (or anything, in the interpreter), no float64, no gradient."""
    given = [tensor for tensor in tensors if tensor is not None]
    there = INTERPRETED or (given[0].is_cuda and all(t.device == given[0].device for t in given))
    plain = all(t.dtype in KERNEL_DTYPES for t in given)
    return HAVE_TRITON and there and plain and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors' is: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


if HAVE_TRITON:
    # the interpreter, which keeps bfloat16 as integers, has no product of them
    DOT: tl.constexpr = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)

    @triton.jit
    @no_type_check
    def to_int8(values):
        """Nearest, halves to even, clamped: adding 1.5 * 2^23 leaves a float32 no bits for a fraction."""
        clamped = tl.minimum(tl.maximum(values, -128.0), 127.0)
        return ((clamped + 12582912.0) - 12582912.0).to(tl.int8)

    @triton.jit
    @no_type_check
    def dot_exact(values, small):
        """values @ small for float32 `values` and a bfloat16 `small` that holds its numbers exactly (signs, codes).

        A float32 is the sum of three bfloat16, whose products with another are exact in float32: three products of
        the fastest kind in place of three in TF32, and nothing is rounded but the sums.
        """
        first = values.to(tl.bfloat16)
        rest = values - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        kept = small.to(DOT)
        return tl.dot(first.to(DOT), kept, tl.dot(second.to(DOT), kept, tl.dot(third.to(DOT), kept)))

    @triton.jit
    @no_type_check
    def _add_rms_norm(
        hidden,
        residual,
        weight,
        out,
        total_out,
        scale,
        eps,
        width,
        ADD: tl.constexpr,
        WEIGHT: tl.constexpr,
        QUANTIZE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * width
        lanes = tl.arange(0, BLOCK)
        inside = lanes < width
        total = tl.load(hidden + row + lanes, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            total += tl.load(residual + row + lanes, mask=inside, other=0.0).to(tl.float32)
            rounded = total.to(total_out.dtype.element_ty)
            tl.store(total_out + row + lanes, rounded, mask=inside)
            total = rounded.to(tl.float32)
        normed = total * (1.0 / tl.sqrt_rn(tl.sum(total * total, 0) / width + eps))
        if WEIGHT:
            normed = normed * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        if QUANTIZE:
            step = tl.load(scale) + tl.zeros_like(normed)
            tl.store(out + row + lanes, to_int8(tl.div_rn(normed, step)), mask=inside)
        else:
            tl.store(out + row + lanes, normed.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    @no_type_check
    def _gated_rms_norm(
        y,
        z,
        weight,
        out,
        z_scale,
        eps,
        width,
        groups,
        y_row,
        z_row,
        CODES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = (tl.program_id(0) // groups).to(tl.int64)
        first = (tl.program_id(0) % groups) * width
        lanes = tl.arange(0, BLOCK)
        inside = lanes < width
        values = tl.load(y + row * y_row + first + lanes, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_row + first + lanes, mask=inside, other=0).to(tl.float32)
        if CODES:
            gate = gate * tl.load(z_scale)
        gated = values * (gate / (1.0 + tl.exp(-gate)))
        normed = gated * (1.0 / tl.sqrt_rn(tl.sum(gated * gated, 0) / width + eps))
        normed = normed * tl.load(weight + first + lanes, mask=inside, other=0.0).to(tl.float32)
        place = out + row * (width * groups) + first + lanes
        tl.store(place, normed.to(out.dtype.element_ty), mask=inside)


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """`value` as one float32 on `device`."""
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(1)


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, scale: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """`gated_norm.add_rms_norm`: one program a row."""
    hidden = hidden.contiguous()
    width = hidden.shape[-1]
    out = torch.empty_like(hidden, dtype=hidden.dtype if scale is None else torch.int8)
    total = hidden if residual is None else torch.empty_like(hidden, dtype=residual.dtype)
    rows = hidden.numel() // max(1, width)
    if rows:
        block = power_of_two(width)
        with on_device(hidden):
            _add_rms_norm[(rows,)](
                hidden,
                hidden if residual is None else residual.contiguous(),
                hidden if weight is None else weight,
                out,
                total,
                hidden if scale is None else scalar(scale, hidden.device),
                eps,
                width,
                ADD=residual is not None,
                WEIGHT=weight is not None,
                QUANTIZE=scale is not None,
                BLOCK=block,
                num_warps=min(16, max(1, block // 256)),
            )
    return out, total


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, z_scale: Tensor | float | None
) -> Tensor:
    """`gated_norm.gated_rms_norm`: one program a row and group."""
    d = y.shape[-1]
    rows, gates = (values.reshape(-1, d) for values in (y, z))
    rows, gates = (values if values.stride(-1) == 1 else values.contiguous() for values in (rows, gates))
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if out.numel():
        block = power_of_two(d // groups)
        with on_device(y):
            _gated_rms_norm[(len(rows) * groups,)](
                rows,
                gates,
                weight.contiguous(),
                out,
                weight if z_scale is None else scalar(z_scale, y.device),
                eps,
                d // groups,
                groups,
                rows.stride(0),
                gates.stride(0),
                CODES=z_scale is not None,
                BLOCK=block,
                num_warps=min(16, max(1, block // 256)),
            )
    return out
