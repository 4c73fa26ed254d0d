"""The two kernels of the step: the symmetric product, and the row-scaled update with weight decay.

On a GPU both are Triton kernels (half the FLOPs of the product; one read of O and W for the update). The plain
forms beside them run everywhere, and are what the kernels are tested against, in Triton's interpreter too.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - macOS has no Triton
    triton = None  # type: ignore[assignment]

# below this many rows the saved half is smaller than the cost of two more calls
_CPU_SPLIT_ROWS = 512


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels run on `tensor`: on CUDA, or anywhere under TRITON_INTERPRET=1."""
    if triton is None:  # pragma: no cover - macOS has no Triton
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def symmetric_product(
    x: Float[Tensor, "batch k l"],
    alpha: float = 1.0,
    add: Float[Tensor, "batch k k"] | None = None,
    beta: float = 0.0,
) -> Float[Tensor, "batch k k"]:
    """alpha X Xᵀ + beta `add` for symmetric `add`: one triangle is computed and mirrored (section 9)."""
    if not torch.compiler.is_compiling() and use_triton(x) and x.dtype != torch.float64:
        return _triton_product(x, alpha, add, beta)
    if x.device.type == "cpu" and x.shape[-2] >= _CPU_SPLIT_ROWS and not torch.compiler.is_compiling():
        out = torch.empty(*x.shape[:-1], x.shape[-2], dtype=x.dtype)
        _blocked_product(x, alpha, add, beta, out)
        return out
    if add is None:
        product = x @ x.mT
        return product if alpha == 1.0 else alpha * product
    return torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)


def _blocked_product(x: Tensor, alpha: float, add: Tensor | None, beta: float, out: Tensor) -> None:
    """Three of four blocks: the lower left one is the transpose of the upper right one."""
    half = x.shape[-2] // 2
    upper, lower = x[:, :half], x[:, half:]
    for rows, left, columns, right in (
        (slice(None, half), upper, slice(None, half), upper),
        (slice(None, half), upper, slice(half, None), lower),
        (slice(half, None), lower, slice(half, None), lower),
    ):
        block = out[:, rows, columns]
        for i in range(x.shape[0]):
            if add is None:
                torch.addmm(block[i], left[i], right[i].T, beta=0, alpha=alpha, out=block[i])
            else:
                torch.addmm(add[i, rows, columns], left[i], right[i].T, beta=beta, alpha=alpha, out=block[i])
    out[:, half:, :half] = out[:, :half, half:].mT


def apply_update(
    weight: Float[Tensor, "rows columns"],
    orthogonal: Float[Tensor, "rows columns"],
    scale: Float[Tensor, "rows 1"] | Float[Tensor, "1 columns"],
    decay: float,
    cautious: bool,
) -> None:
    """W <- (1 - decay) W - scale O in place; `cautious` decays only where W and the update agree in sign.

    `scale` holds the learning rate, the row's 1/(sqrt(v) + eps) and the matrix's factor (section 2.9, step 7),
    so that the normalised matrix is never formed.
    """
    if weight.numel() == 0:
        return
    rowwise = scale.shape == (weight.shape[0], 1)
    if use_triton(weight) and weight.is_contiguous() and orthogonal.is_contiguous() and rowwise:
        _triton_update(weight, orthogonal, scale, decay, cautious)
        return
    scale = scale.to(weight.dtype)
    if cautious:
        if decay:
            agrees = orthogonal * weight > 0  # the scale is positive
            weight.sub_(weight * agrees, alpha=decay)
    elif decay:
        weight.mul_(1 - decay)
    weight.addcmul_(orthogonal.to(weight.dtype), scale, value=-1)


if triton is not None:

    @triton.jit
    def _product_kernel(  # pragma: no cover - traced by Triton, not by Python
        x_ptr,
        add_ptr,
        out_ptr,
        k,
        depth_total,
        stride_xb,
        stride_xk,
        stride_xl,
        stride_ab,
        stride_ak,
        stride_al,
        stride_ob,
        alpha,
        beta,
        HAS_ADD: tl.constexpr,
        FULL: tl.constexpr,
        BLOCK: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        row, column, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        if column < row:
            return
        rows = row * BLOCK + tl.arange(0, BLOCK)
        columns = column * BLOCK + tl.arange(0, BLOCK)
        depth = tl.arange(0, DEPTH)
        x_ptr += batch * stride_xb
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, depth_total, DEPTH):
            inside = start + depth < depth_total
            left = tl.load(
                x_ptr + rows[:, None] * stride_xk + (start + depth)[None, :] * stride_xl,
                mask=(rows < k)[:, None] & inside[None, :],
                other=0.0,
            )
            right = tl.load(
                x_ptr + columns[:, None] * stride_xk + (start + depth)[None, :] * stride_xl,
                mask=(columns < k)[:, None] & inside[None, :],
                other=0.0,
            )
            if FULL:
                total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
            else:
                total = tl.dot(left, tl.trans(right), total)
        total = alpha * total
        inside_block = (rows < k)[:, None] & (columns < k)[None, :]
        if HAS_ADD:
            added = tl.load(
                add_ptr + batch * stride_ab + rows[:, None] * stride_ak + columns[None, :] * stride_al,
                mask=inside_block,
                other=0.0,
            )
            total += beta * added.to(tl.float32)
        value = total.to(out_ptr.dtype.element_ty)
        out_ptr += batch * stride_ob
        tl.store(out_ptr + rows[:, None] * k + columns[None, :], value, mask=inside_block)
        if column > row:
            tl.store(
                out_ptr + columns[:, None] * k + rows[None, :],
                tl.trans(value),
                mask=(columns < k)[:, None] & (rows < k)[None, :],
            )

    @triton.jit
    def _update_kernel(  # pragma: no cover - traced by Triton, not by Python
        weight_ptr,
        orthogonal_ptr,
        scale_ptr,
        columns,
        decay,
        CAUTIOUS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < columns
        weight_ptr += row.to(tl.int64) * columns
        orthogonal_ptr += row.to(tl.int64) * columns
        stored = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
        weight = stored.to(tl.float32)
        orthogonal = tl.load(orthogonal_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row).to(tl.float32)
        kept = weight * (1 - decay)
        if CAUTIOUS:
            kept = tl.where(orthogonal * weight > 0, kept, weight)
        tl.store(weight_ptr + offsets, (kept - scale * orthogonal).to(stored.dtype), mask=inside)


def _triton_product(x: Tensor, alpha: float, add: Tensor | None, beta: float) -> Tensor:
    batch, k, columns = x.shape
    out = torch.empty(batch, k, k, dtype=x.dtype, device=x.device)
    block, depth = (32, 32) if not x.is_cuda else (128, 64)
    tiles = triton.cdiv(k, block)
    added: Any = x if add is None else add
    _product_kernel[(tiles, tiles, batch)](
        *(x, added, out, k, columns),
        *(*x.stride(), *added.stride(), out.stride(0)),
        *(alpha, beta),
        HAS_ADD=add is not None,
        FULL=x.dtype == torch.float32,
        BLOCK=block,
        DEPTH=depth,
    )
    return out


def _triton_update(weight: Tensor, orthogonal: Tensor, scale: Tensor, decay: float, cautious: bool) -> None:
    rows, columns = weight.shape
    block = 1024
    grid = (rows, triton.cdiv(columns, block))
    _update_kernel[grid](weight, orthogonal, scale.contiguous(), columns, decay, CAUTIOUS=cautious, BLOCK=block)
