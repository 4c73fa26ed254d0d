"""Linear layers on quantised weights: W4A16, W8A8 and W4A8 (section 2, "4-bit weights" and "Precision map").

With int8 activations the products and sums are exact integers; scales come once, at the end, for each output channel.
On a GPU the layers are Triton kernels; elsewhere weights are expanded a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int8, Int32
from torch import Tensor

from isotone.quamba2 import triton_linear
from isotone.quamba2.packing import dequantize_groups, expand_levels, unpack_int4
from isotone.quamba2.triton_kernels import takes
from isotone.shared.errors import InputError

_BLOCK = 1 << 19  # weights expanded at once: they stay in the cache
_EXACT = 1024  # products of int8 numbers, at most 2^14 each, whose sum a float32 holds exactly


def matmul_w4a16(
    x: Float[Tensor, "*rows columns"],
    packed: Int32[Tensor, "out words"],
    scales: Float[Tensor, "out groups"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """x W^T + bias with 4-bit weights (q - 8) s, `packed` as `packing.pack_int4` does, in `x`'s dtype.

    columns = 8 words; summed in float32. Raises `InputError` where columns, words and groups do not fit.
    """
    group = _check_packed(x, packed, scales)
    rows = x.reshape(-1, x.shape[-1])
    if takes(x, packed, scales, bias) and triton_linear.takes_group(group):
        out = triton_linear.matmul_w4a16(rows, packed, scales, _maybe(bias))
        return out.view(*x.shape[:-1], len(packed))
    wide = x.dtype if x.dtype == torch.float64 or x.is_cuda else torch.float32
    given = rows.to(wide)
    out = x.new_empty(len(rows), len(packed))
    for part in _row_blocks(packed.shape[0], x.shape[-1]):
        weights = dequantize_groups(unpack_int4(packed[part]), scales[part]).to(wide)
        out[:, part] = F.linear(given, weights, None if bias is None else bias[part].to(wide))
    return out.view(*x.shape[:-1], len(packed))


def matmul_w8a8(
    x: Int8[Tensor, "*rows columns"],
    weights: Int8[Tensor, "out columns"],
    scale: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows out"] | Int8[Tensor, "*rows out"]:
    """scale * (x W^T) + bias with int8 `x` and `weights`; `scale` of a channel is its weights' times `x`'s.

    `out_dtype` torch.int8: the result is rounded and clamped, and `scale` and `bias` are those that
    `fold_output_scales` gives. Raises `InputError` on an `out_dtype` that is neither int8 nor floating point.
    """
    _check_dtype(out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    if takes(x, weights, scale, bias) and not _int_mm_takes(rows, weights):
        out = triton_linear.matmul_int8(rows, weights, None, _float(scale), _maybe(bias), out_dtype)
    else:
        out = _finish(int_matmul(rows, weights), scale, bias, out_dtype)
    return out.view(*x.shape[:-1], len(weights))


def matmul_w4a8(
    x: Int8[Tensor, "*rows columns"],
    packed: Int32[Tensor, "out words"],
    relative: Float16[Tensor, "out groups"],
    scale: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows out"] | Int8[Tensor, "*rows out"]:
    """`matmul_w8a8` with the int8 weights round((q - 8) relative), expanded from `packed` 4-bit ones on the way.

    `relative` as `packing.relative_scales` gives it; `scale` is its row scale times `x`'s scale. columns = 8 words.
    Raises `InputError` as `matmul_w8a8`, and where columns, words and groups do not fit.
    """
    _check_dtype(out_dtype)
    group = _check_packed(x, packed, relative)
    rows = x.reshape(-1, x.shape[-1])
    if takes(x, packed, relative, scale, bias) and triton_linear.takes_group(group):
        out = triton_linear.matmul_int8(rows, packed, relative, _float(scale), _maybe(bias), out_dtype)
        return out.view(*x.shape[:-1], len(packed))
    out = torch.empty(len(rows), len(packed), dtype=out_dtype, device=x.device)
    for part in _row_blocks(packed.shape[0], x.shape[-1]):
        sums = int_matmul(rows, expand_levels(unpack_int4(packed[part]), relative[part]))
        out[:, part] = _finish(sums, scale[part], None if bias is None else bias[part], out_dtype)
    return out.view(*x.shape[:-1], len(packed))


def int_matmul(x: Int8[Tensor, "rows columns"], weights: Int8[Tensor, "out columns"]) -> Int32[Tensor, "rows out"]:
    """x W^T in exact integers.

    `torch._int_mm` where it takes the shape on this device; else in float32, 1,024 columns at a time, whose sums are
    integers below 2^24 and so exact in any order.
    """
    if _int_mm_takes(x, weights):
        return torch._int_mm(x.contiguous(), weights.contiguous().T)
    total = torch.zeros(len(x), len(weights), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _EXACT):
        columns = slice(start, start + _EXACT)
        given = x[:, columns].to(torch.float32)
        for part in _row_blocks(len(weights), given.shape[1]):
            total[:, part] += F.linear(given, weights[part, columns].to(torch.float32)).to(torch.int32)
    return total


def fold_output_scales(
    scale: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    steps: Sequence[float] | Float[Tensor, " segments"],
    sizes: Sequence[int],
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"] | None]:
    """`scale` and `bias` divided by the step of each output: segment i is `sizes[i]` channels with step `steps[i]`.

    So in_proj gives z, x, B, C and dt in int8, each with a static scale of its own. Raises `InputError` where the
    sizes do not add up to the outputs or do not match the steps.
    """
    given = torch.as_tensor(steps, dtype=torch.float32, device=scale.device)
    if len(given) != len(sizes) or sum(sizes) != len(scale):
        raise InputError(
            f"expected a step for each segment of {len(scale)} outputs, got {len(given)} steps and sizes {list(sizes)}"
        )
    wide = given.repeat_interleave(torch.as_tensor(sizes, device=scale.device))
    return scale / wide, None if bias is None else bias / wide


def _int_mm_takes(x: Tensor, weights: Tensor) -> bool:
    """Whether `torch._int_mm` can do it, and is the way to: a GPU wants more than 16 rows and multiples of 8."""
    if not x.is_cuda:
        return False
    return len(x) > 16 and x.shape[1] % 8 == 0 and len(weights) % 8 == 0  # pragma: no cover - needs a GPU


def _finish(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    result = sums.to(torch.float32).mul_(scale)
    if bias is not None:
        result.add_(bias)
    return result.round_().clamp_(-128, 127).to(dtype) if dtype == torch.int8 else result.to(dtype)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows`, of about `_BLOCK` numbers each."""
    size = max(16, _BLOCK // max(1, columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _float(values: Tensor) -> Tensor:
    """As a kernel reads it: float32, one number after the other."""
    return values.float().contiguous()


def _maybe(values: Tensor | None) -> Tensor | None:
    return None if values is None else _float(values)


def _check_packed(x: Tensor, packed: Tensor, scales: Tensor) -> int:
    """The size of a group."""
    columns, groups = 8 * packed.shape[1], scales.shape[1]
    if x.shape[-1] != columns or scales.shape[0] != packed.shape[0] or not groups or columns % groups:
        raise InputError(
            f"expected inputs of {columns} columns and scales (out, groups) that divide them, "
            f"got {tuple(x.shape)} and {tuple(scales.shape)} for packed weights {tuple(packed.shape)}"
        )
    return columns // groups


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype != torch.int8 and not dtype.is_floating_point:
        raise InputError(f"expected an output in int8 or floating point, got {dtype}")
