"""What stands between the products and the scan, fused: norms that quantise, and the convolution in int8 (section 2).

Plain PyTorch, float32 inside; on a GPU each is one Triton kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from isotone.quamba2 import triton_conv, triton_kernels
from isotone.quamba2.triton_kernels import takes
from isotone.shared.errors import InputError


def gated_rms_norm(
    y: Float[Tensor, "*rows d"],
    z: Float[Tensor, "*rows d"] | Int8[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    groups: int = 1,
    eps: float = 1e-5,
    z_scale: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, "*rows d"]:
    """weight * RMS(y SiLU(z)) with the mean square over each of `groups` runs of d / groups channels (section 2).

    The gate comes before the norm (norm_before_gate=False). `z`: floats, or int8 codes with `z_scale`. Returns `y`'s
    dtype. Raises `InputError` where the groups do not divide d, and int8 codes come without a scale.
    """
    if groups < 1 or y.shape[-1] % groups:
        raise InputError(f"expected groups that divide {y.shape[-1]} channels, got {groups}")
    if z.dtype == torch.int8 and z_scale is None:
        raise InputError("expected a z_scale for int8 codes, got none")
    if takes(y, z, weight) and y.shape[-1] // groups <= triton_kernels.WIDEST_NORM:
        step = z_scale if z.dtype == torch.int8 else None
        return triton_kernels.gated_rms_norm(y, z, weight, groups, eps, step)
    if z.dtype == torch.int8:
        assert z_scale is not None
        gate = z.to(torch.float32) * z_scale
    else:
        gate = z.to(_wide(y))
    gated = (y.to(_wide(y)) * F.silu(gate)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight).to(y.dtype)


def add_rms_norm(
    hidden: Float[Tensor, "*rows d"],
    residual: Float[Tensor, "*rows d"] | None = None,
    weight: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
    scale: Float[Tensor, ""] | float | None = None,
) -> tuple[Float[Tensor, "*rows d"] | Int8[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """The norm of `hidden` + `residual`, and that sum, which is the next residual in the residual's dtype.

    With `scale` the norm is int8 codes, round(norm / scale); without, it has `hidden`'s dtype. No `weight`: ones, as
    where it is fused into the layer after. The sum is rounded to the residual's dtype before it is normed.
    """
    given = hidden if residual is None else residual
    if takes(hidden, residual, weight) and hidden.shape[-1] <= triton_kernels.WIDEST_NORM:
        return triton_kernels.add_rms_norm(hidden, residual, weight, eps, scale)
    total = hidden if residual is None else (hidden.to(_wide(hidden)) + residual.to(_wide(hidden))).to(given.dtype)
    wide = total.to(_wide(total))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    if scale is None:
        return normed.to(hidden.dtype), total
    return torch.round(normed / scale).clamp_(-128, 127).to(torch.int8), total


def conv1d_silu(
    x: Int8[Tensor, "b l width"],
    weight: Int8[Tensor, "width k"],
    scale: Float[Tensor, " width"],
    bias: Float[Tensor, " width"] | None = None,
    out_scale: Float[Tensor, " width"] | None = None,
    state: Int8[Tensor, "b k1 width"] | None = None,
) -> tuple[Int8[Tensor, "b l width"] | Float[Tensor, "b l width"], Int8[Tensor, "b k1 width"]]:
    """Causal depthwise convolution and SiLU of int8 codes, over a prompt or one token (l = 1).

    `scale`: of the products, the scale of each channel's input times that of its weights. `out_scale`: steps of the
    int8 output of each channel, grouped for x (section 2); None gives float32. `state`: the k1 = k - 1 codes before
    `x`, zeros if None. Returns the output and the next state. The products are exact. Raises `InputError` on a state
    of another size.
    """
    kept, length = _kept(weight, state), x.shape[1]
    if takes(x, weight, scale, bias, out_scale, state):
        dtype = torch.float32 if out_scale is None else torch.int8
        return triton_conv.conv_silu(x, weight, scale, bias, out_scale, state, dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], kept, x.shape[2])
    whole = torch.cat([state, x], 1)
    # small integers: a float32 holds their sums exactly; the channels stay innermost, so nothing is transposed
    taps = weight.to(torch.float32)
    total = whole[:, :length] * taps[:, 0]
    for tap in range(1, kept + 1):
        total.addcmul_(whole[:, tap : tap + length].to(torch.float32), taps[:, tap])
    total.mul_(scale)
    if bias is not None:
        total.add_(bias)
    out = F.silu(total, inplace=True)
    last = whole[:, whole.shape[1] - kept :]
    if out_scale is None:
        return out, last
    return out.div_(out_scale).round_().clamp_(-128, 127).to(torch.int8), last


def conv1d_silu_float(
    x: Float[Tensor, "b l width"],
    weight: Float[Tensor, "width k"],
    bias: Float[Tensor, " width"] | None = None,
    state: Float[Tensor, "b k1 width"] | None = None,
) -> tuple[Float[Tensor, "b l width"], Float[Tensor, "b k1 width"]]:
    """`conv1d_silu` of floats, for blocks of 16 bits: the output and the next state in `x`'s dtype.

    Raises `InputError` on a state of another size.
    """
    kept = _kept(weight, state)
    if takes(x, weight, bias, state):
        return triton_conv.conv_silu(x, weight, None, bias, None, state, x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], kept, x.shape[2])
    whole, wide = torch.cat([state, x], 1), _wide(x)
    given = whole.to(wide).transpose(1, 2)
    shift = None if bias is None else bias.to(wide)
    out = F.conv1d(given, weight.to(wide)[:, None], shift, groups=len(weight)).transpose(1, 2)
    return F.silu(out).to(x.dtype), whole[:, whole.shape[1] - kept :]


def _kept(weight: Tensor, state: Tensor | None) -> int:
    """Tokens in a convolution's state."""
    kept = weight.shape[1] - 1
    if state is not None and state.shape[1] != kept:
        raise InputError(f"expected a convolution state of {kept} tokens, got {state.shape[1]}")
    return kept


def _wide(values: Tensor) -> torch.dtype:
    """float64 stays, all others are computed in float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
