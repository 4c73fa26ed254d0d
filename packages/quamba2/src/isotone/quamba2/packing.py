"""Quantisers and how codes are stored (section 2, "Quantiser" and "4-bit weights").

Activations and states: symmetric, q = clamp(round(v / s), -2^(bits-1), 2^(bits-1) - 1), s = max|v| / (2^(bits-1) - 1).
Weights: groups of inputs share s = 2 max|w| / 15, q = clamp(round(w / s) + 8, 0, 15), w ~ (q - 8) s. Rounding is to the
nearest, halves to even. Eight 4-bit codes are packed in an int32, the first in the lowest bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int, Int8, Int32, UInt8
from torch import Tensor

from isotone.shared.errors import InputError

BITS = (4, 8)
SCALE_FLOOR = 1e-6
PEAK_FLOOR = 1e-5  # of max|v|, before it is divided
ZERO = 8  # the code of weight 0
PER_WORD = 8  # codes in an int32


def pack_int4(codes: UInt8[Tensor, "*rows n"]) -> Int32[Tensor, "*rows words"]:
    """Codes 0 to 15, eight in an int32: code i of eight is in bits 4i to 4i + 3. words = n / 8.

    Raises `InputError` where n is not a multiple of 8 or a code is above 15.
    """
    if codes.shape[-1] % PER_WORD:
        raise InputError(f"expected a multiple of 8 codes to pack, got {codes.shape[-1]}")
    if codes.numel() and int(codes.max()) > 15:
        raise InputError(f"expected codes from 0 to 15 to pack, got {int(codes.max())}")
    if not codes.numel():
        return codes.new_empty(*codes.shape[:-1], codes.shape[-1] // PER_WORD, dtype=torch.int32)
    pairs = codes.unflatten(-1, (-1, 2))
    # four bytes are a word, the lowest first, on every platform that torch runs on
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def unpack_int4(packed: Int32[Tensor, "*rows words"]) -> UInt8[Tensor, "*rows n"]:
    """The codes that `pack_int4` packed: n = 8 words."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def symmetric_scale(peak: Float[Tensor, "*any"], bits: int) -> Float[Tensor, "*any"]:
    """s = max|v| / (2^(bits-1) - 1) of values whose largest size is `peak`, in float32, with floors.

    Raises `InputError` on bits other than 4 and 8, and on a peak that is NaN, infinite or negative.
    """
    top = _top(bits)
    if not bool((peak.isfinite() & (peak >= 0)).all()):
        raise InputError("expected largest sizes that are finite and not negative, got others")
    return (peak.to(torch.float32).clamp_min(PEAK_FLOOR) / top).clamp_min(SCALE_FLOOR)


def quantize_symmetric(
    v: Float[Tensor, "*any"], scale: Float[Tensor, "*steps"] | float, bits: int = 8
) -> Int8[Tensor, "*any"]:
    """int8 codes of `v` with steps `scale`, which is broadcast over `v`; a scale below 1e-6 counts as 1e-6.

    Raises `InputError` on bits other than 4 and 8, and a scale that does not broadcast.
    """
    top = _top(bits)
    if isinstance(scale, Tensor):
        _check_broadcast(scale, v)
        step: Tensor | float = scale.clamp_min(SCALE_FLOOR)
    else:
        step = max(scale, SCALE_FLOOR)
    return torch.round(v / step).clamp_(-top - 1, top).to(torch.int8)


def dequantize(codes: Int8[Tensor, "*any"], scale: Float[Tensor, "*steps"] | float) -> Float[Tensor, "*any"]:
    """codes * scale in float32, the scale floored as in `quantize_symmetric`."""
    if isinstance(scale, Tensor):
        _check_broadcast(scale, codes)
        return codes * scale.to(torch.float32).clamp_min(SCALE_FLOOR)
    return codes.to(torch.float32) * max(scale, SCALE_FLOOR)


def group_scales(
    w: Float[Tensor, "out columns"], group: int = 128, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "out groups"]:
    """s = 2 max|w| / 15 of every `group` inputs of a row, at least 1e-6; columns = groups * group.

    `dtype`: of the scales; quantise with the rounded ones. Raises `InputError` where `group` does not divide the
    inputs, or a weight is NaN or infinite.
    """
    if group < 1 or w.shape[1] % group:
        raise InputError(f"expected a group that divides {w.shape[1]} inputs, got {group}")
    peak = w.to(torch.float32).unflatten(1, (-1, group)).abs().amax(-1)
    if not bool(peak.isfinite().all()):
        raise InputError("expected weights that are finite, got NaN or infinity")
    return (2 * peak / 15).clamp_min(SCALE_FLOOR).to(dtype)


def quantize_groups(
    w: Float[Tensor, "out columns"], scales: Float[Tensor, "out groups"]
) -> UInt8[Tensor, "out columns"]:
    """q = clamp(round(w / s) + 8, 0, 15), each scale for columns / groups neighbours.

    Raises `InputError` where the groups do not divide the columns.
    """
    parts = w.to(torch.float32).unflatten(1, (scales.shape[1], _width(w, scales)))
    codes = torch.round(parts / scales.to(torch.float32)[..., None]).add_(ZERO)
    return codes.clamp_(0, 15).to(torch.uint8).flatten(1)


def dequantize_groups(
    codes: UInt8[Tensor, "out columns"], scales: Float[Tensor, "out groups"]
) -> Float[Tensor, "out columns"]:
    """(q - 8) s in float32. Raises `InputError` as `quantize_groups`."""
    parts = codes.unflatten(1, (scales.shape[1], _width(codes, scales)))
    return ((parts.to(torch.float32) - ZERO) * scales.to(torch.float32)[..., None]).flatten(1)


def relative_scales(
    codes: UInt8[Tensor, "out columns"], scales: Float[Tensor, "out groups"]
) -> tuple[Float16[Tensor, "out groups"], Float[Tensor, " out"]]:
    """The second level of W4A8 (section 2): s_g / s_row in float16, and s_row = max|(q - 8) s_g| / 127 in float32.

    A ratio is at most 127, which only a group whose codes are all 8 can pass. Raises `InputError` as `quantize_groups`.
    """
    parts = codes.unflatten(1, (scales.shape[1], _width(codes, scales)))
    most = (parts.to(torch.int16) - ZERO).abs().amax(-1).to(torch.float32)
    wide = scales.to(torch.float32)
    rows = ((most * wide).amax(1) / 127).clamp_min(SCALE_FLOOR)
    return (wide / rows[:, None]).clamp_max(127).to(torch.float16), rows


def expand_levels(
    codes: UInt8[Tensor, "out columns"], relative: Float16[Tensor, "out groups"]
) -> Int8[Tensor, "out columns"]:
    """The int8 weights of W4A8, round((q - 8) * relative) clamped to -128 to 127. Raises `InputError` as above."""
    return torch.round(dequantize_groups(codes, relative)).clamp_(-128, 127).to(torch.int8)


def two_level(
    codes: UInt8[Tensor, "out columns"], scales: Float[Tensor, "out groups"]
) -> tuple[Int8[Tensor, "out columns"], Float[Tensor, " out"]]:
    """int8 weights of W4A8 and their scale a row, from 4-bit codes and group scales: w ~ int8 * row.

    Raises `InputError` as `quantize_groups`.
    """
    relative, rows = relative_scales(codes, scales)
    return expand_levels(codes, relative), rows


def quantize_embedding(
    weight: Float[Tensor, "vocab hidden"], bits: int
) -> tuple[Int[Tensor, "vocab columns"], Float[Tensor, " vocab"]]:
    """An embedding with a symmetric scale for each token: int8 codes, or 4-bit codes (q + 8) eight in an int32.

    The scale is of max|.|, negative peaks too. Raises `InputError` on bits other than 4 and 8, weights that are NaN or
    infinite, and, for 4 bits, a hidden size that is not a multiple of 8.
    """
    scales = symmetric_scale(weight.abs().amax(-1), bits)
    codes = quantize_symmetric(weight.to(torch.float32), scales[:, None], bits)
    return (codes if bits == 8 else pack_int4((codes + ZERO).to(torch.uint8))), scales


def embedding_rows(
    ids: Int[Tensor, "*tokens"], codes: Int[Tensor, "vocab columns"], scales: Float[Tensor, " vocab"]
) -> Float[Tensor, "*tokens hidden"]:
    """The rows of `quantize_embedding`'s weight for token `ids`, float32. int32 codes are packed ones."""
    rows = codes[ids]
    values = unpack_int4(rows).to(torch.float32) - ZERO if codes.dtype == torch.int32 else rows.to(torch.float32)
    return values * scales[ids][..., None]


@dataclass(frozen=True)
class ScanScales:
    """Static scales of the int8 scan (section 2, "Precision map").

    `labels`: which of the K = G m n scales a channel has; zeros for one scale. `x` (K,): steps of x. `B`, `C` (G,): a
    step for each SSM group (PerSG), or (1,) for all. `dt`: (1,) or a step for each head (h,). `state` (K, N): steps of
    the state, or (K, 1); None where the state stays in float32.
    """

    labels: Int[Tensor, "h p"]
    x: Float[Tensor, " K"]
    B: Float[Tensor, " groups_B"]
    C: Float[Tensor, " groups_C"]
    dt: Float[Tensor, " heads"]
    state: Float[Tensor, "K states"] | None = None

    def __post_init__(self) -> None:
        if self.labels.numel() and int(self.labels.max()) >= len(self.x):
            raise InputError(f"expected labels below the {len(self.x)} scales, got {int(self.labels.max())}")


def _top(bits: int) -> int:
    if bits not in BITS:
        raise InputError(f"expected bits to be 4 or 8, got {bits}")
    return int(2 ** (bits - 1)) - 1


def _check_broadcast(scale: Tensor, v: Tensor) -> None:
    pairs = zip(reversed(scale.shape), reversed(v.shape), strict=False)
    if scale.ndim > v.ndim or any(s not in (1, n) for s, n in pairs):
        raise InputError(f"expected a scale that broadcasts over {tuple(v.shape)}, got one of {tuple(scale.shape)}")


def _width(w: Tensor, scales: Tensor) -> int:
    """Inputs of a group."""
    if w.shape[0] != scales.shape[0] or not scales.shape[1] or w.shape[1] % scales.shape[1]:
        raise InputError(f"expected group scales that divide weights {tuple(w.shape)}, got {tuple(scales.shape)}")
    return math.prod(w.shape[1:]) // scales.shape[1]
