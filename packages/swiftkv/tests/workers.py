"""The Triton kernel beside the plain path, and how far they are apart; compiled.py runs it in a process of its own."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from isotone.swiftkv import kernels
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import rotate
from isotone.swiftkv.quantize import FP8_MAX

GROUPS, HEADS, SIZE, BATCH, LENGTH = 3, 2, 8, 2, 10


def cache(kv_dtype, device="cpu"):
    config = SimpleNamespace(num_key_value_heads=HEADS, head_dim=SIZE, num_hidden_layers=1 + GROUPS)
    scales = torch.tensor([1.0, 0.5, 0.25, 2.0])
    return SwiftKVCache(
        config,
        BATCH,
        LENGTH,
        kv_dtype=kv_dtype,
        device=device,
        split=SwiftKVConfig(1 + GROUPS, 1, 1),
        key_scale=scales,
        value_scale=scales.flip(0),
    )


def tokens(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(7, 2 * GROUPS * HEADS * SIZE, generator=generator)
    projected[0, :SIZE] *= 1000  # beyond fp8's range
    angle = torch.rand(7, SIZE // 2, generator=generator).repeat(1, 2)
    rows, positions = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([4, 5, 6, 0, 1, 2, 9])
    return tuple(x.to(device) for x in (projected, angle.cos(), angle.sin(), rows, positions))


def contents(kept):
    found = []
    for codec, planes, scales in (
        (kept.key_codec, kept.keys, kept.key_scale),
        (kept.value_codec, kept.values, kept.value_scale),
    ):
        found.append(codec.decode(planes, torch.float32, scales[:, None, None, None, None]))
    return found


def plain(kept, projected, cos, sin, rows, positions):
    keys, values = (part.unflatten(-1, (GROUPS, HEADS, SIZE)) for part in projected.chunk(2, -1))
    turned = rotate(keys.flatten(1, 2), (cos, sin)).view_as(keys)
    kept.write(slice(1, 1 + GROUPS), rows, positions, turned, values)
    return contents(kept)


def fused(kv_dtype, device="cpu"):
    kept = cache(kv_dtype, device)
    projected, cos, sin, rows, positions = tokens(device)
    kernels.rope_write(projected, (cos, sin), kept, slice(1, 1 + GROUPS), rows, positions)
    return contents(kept)


def difference(kv_dtype, device="cpu"):
    """The largest difference of what is stored, of the size of the number where that is above 1."""
    pairs = zip(fused(kv_dtype, device), plain(cache(kv_dtype, device), *tokens(device)), strict=True)
    return max(float(((f - w).abs() / w.abs().clamp_min(1.0)).max()) for f, w in pairs)


def fp8_in_the_interpreter():
    """Of the numbers that the kernel stores in fp8 in Triton's interpreter: how many differ from torch's cast, which
    rounds to the nearest and halves to even as a GPU does, and how many of those the interpreter's own cast explains.

    It adds the first bit it cuts off (halves go up), joins the sum to the exponent by OR (a carry out of the mantissa
    is lost where the exponent is odd), and shifts bits out below the normal range (there it truncates).
    """
    different = unexplained = 0
    kept = cache("fp8")
    for found, exact, scales in zip(fused("fp8"), fused("fp32"), (kept.key_scale, kept.value_scale), strict=True):
        scale = scales[:, None, None, None, None]
        numbers = (exact / scale).clamp(-FP8_MAX, FP8_MAX)
        wanted = numbers.to(torch.float8_e4m3fn).float() * scale
        bits = numbers.contiguous().view(torch.int32)
        exponent, mantissa = (bits >> 23 & 255) - 127, bits & 0x7FFFFF
        cut, up = mantissa & 0xFFFFF, (mantissa & 0x80000) > 0
        carried = up & (mantissa >> 20 == 7) & ((exponent + 7) % 2 == 1)
        known = carried | (cut == 0x80000) | (exponent < -6)
        different += int((found != wanted).sum())
        unexplained += int(((found != wanted) & ~known).sum())
    return {"different": different, "unexplained": unexplained}


def differences():
    return {kind: difference(kind) for kind in kernels.FUSED_DTYPES} | {"fp8": fp8_in_the_interpreter()}
