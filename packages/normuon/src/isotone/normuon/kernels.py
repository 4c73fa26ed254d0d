"""The two kernels of the step: the symmetric product, and the row-scaled update with weight decay.

On a GPU both are Triton kernels (half the FLOPs of the product; one read of O and W for the update). The plain
forms beside them run everywhere, and are what the kernels are tested against, in Triton's interpreter too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
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
_CPU_SPLIT_ROWS = 384
_CPU_STRIP_ROWS = 192


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
    """Strips of rows from the diagonal to the right; what lies below is the transpose of what lies above.

    With s strips (s + 1) / 2s of the full product is computed.
    """
    k = x.shape[-2]
    strips = max(2, min(8, k // _CPU_STRIP_ROWS))
    edges = [i * k // strips for i in range(strips + 1)]
    for i in range(x.shape[0]):
        for first, last in itertools.pairwise(edges):
            block = out[i, first:last, first:]
            start = block if add is None else add[i, first:last, first:]
            left, right = x[i, first:last], x[i, first:].T
            torch.addmm(start, left, right, beta=0 if add is None else beta, alpha=alpha, out=block)
    for first, last in itertools.pairwise(edges[:-1]):
        out[:, last:, first:last] = out[:, first:last, last:].mT


def apply_update(
    weights: Sequence[Float[Tensor, "rows columns"]],
    orthogonal: Float[Tensor, "k rows columns"],
    scale: Float[Tensor, "k rows 1"],
    decay: float,
    cautious: bool,
) -> None:
    """W <- (1 - decay) W - scale O in place for each; `cautious` decays only where W and the update agree in sign.

    `scale` holds the learning rate, the row's 1/(sqrt(v) + eps) and the matrix's factor (section 2.9, step 7),
    so that the normalised matrix is never formed.
    """
    if orthogonal.numel() == 0:
        return
    exact = weights[0].dtype == torch.float64  # the kernel works in float32
    if (
        use_triton(weights[0])
        and not exact
        and orthogonal.is_contiguous()
        and all(weight.is_contiguous() for weight in weights)
    ):
        for weight, update, rows in zip(weights, orthogonal, scale, strict=True):
            _triton_update(weight, update, rows, decay, cautious)
    elif cautious or weights[0].element_size() < 4:
        for weight, update, rows in zip(weights, orthogonal, scale, strict=True):
            _plain_update(weight, update, rows, decay, cautious)
    else:
        parts = [*weights]
        if decay:
            torch._foreach_mul_(parts, 1 - decay)
        rows_of = list(scale.to(weights[0].dtype).unbind())
        torch._foreach_addcmul_(parts, list(orthogonal.to(weights[0].dtype).unbind()), rows_of, value=-1)


def _plain_update(weight: Tensor, orthogonal: Tensor, scale: Tensor, decay: float, cautious: bool) -> None:
    """In float32 or better: a step is far smaller than the spacing of a low-precision weight's products."""
    working = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kept = working * (1 - decay)
    if cautious:
        kept = torch.where(orthogonal * working > 0, kept, working)  # the scale is positive
    weight.copy_(kept.addcmul_(orthogonal.to(kept.dtype), scale.to(kept.dtype), value=-1))


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
        row, column, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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
