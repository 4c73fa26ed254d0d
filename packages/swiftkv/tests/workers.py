"""What a process of its own runs: the Triton kernel beside the plain path, and how far they are apart."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from isotone.swiftkv import kernels
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import rotate

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


def difference(kv_dtype, device="cpu"):
    made = tokens(device)
    wanted = plain(cache(kv_dtype, device), *made)
    kept = cache(kv_dtype, device)
    projected, cos, sin, rows, positions = made
    kernels.rope_write(projected, (cos, sin), kept, slice(1, 1 + GROUPS), rows, positions)
    found = contents(kept)
    if kv_dtype == "fp8":
        # the interpreter loses the carry where rounding reaches the next power of two: how often, not how far
        return max(float((f != w).float().mean()) for f, w in zip(found, wanted, strict=True))
    size = [w.abs().clamp_min(1.0) for w in wanted]
    return max(float(((f - w).abs() / s).max()) for f, w, s in zip(found, wanted, size, strict=True))


if __name__ == "__main__":
    print(json.dumps({kind: difference(kind) for kind in kernels.FUSED_DTYPES}))
