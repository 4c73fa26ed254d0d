"""The kernels beside what one would use instead, on the same work, equal answers checked first (section 9).

Each function returns an `isotone.shared.bench.Timing`, its ratio above 1 where the kernel is faster. They run on either
device; those named for decoding matter on a GPU, where the time of a token is theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from isotone.quamba2.hadamard import hadamard_matrix, hadamard_transform
from isotone.quamba2.linear import matmul_w4a8, matmul_w4a16
from isotone.quamba2.packing import (
    dequantize_groups,
    expand_levels,
    group_scales,
    pack_int4,
    quantize_groups,
    relative_scales,
)
from isotone.quamba2.ssd import (
    ScanScales,
    dequantize_state,
    ssd_chunk_scan,
    ssd_chunk_scan_int8,
    ssd_sequential,
    ssd_step,
    ssd_step_int8,
)
from isotone.shared.bench import Timing, compare


def fwht(n: int = 5120, rows: int = 64, device: str = "cpu", rounds: int = 20) -> Timing:
    """`hadamard_transform` of `rows` rows of `n` float32 numbers beside the product with the dense matrix."""
    x, H = _normal(rows, n, device=device), hadamard_matrix(n, device=device)
    return _timed(lambda: hadamard_transform(x), lambda: x @ H, 1e-3, device, rounds)


def packed_linear(
    out: int = 4096, columns: int = 1024, rows: int = 64, bits: int = 16, device: str = "cpu", rounds: int = 20
) -> Timing:
    """A product with 4-bit weights, `bits` of the activations 8 or 16, beside that with the same weights as floats.

    The floats are float32 on a CPU, float16 on a GPU: with `rows` 1 there, the projection of a token in decoding.
    """
    dtype = torch.float32 if device == "cpu" else torch.float16
    scales = group_scales(weight := _normal(out, columns, device=device), 128, torch.float16)
    codes = quantize_groups(weight, scales)
    packed, x = pack_int4(codes), _normal(rows, columns, device=device, seed=1)
    if bits == 16:
        given, plain = x.to(dtype), dequantize_groups(codes, scales).to(dtype)
        return _timed(lambda: matmul_w4a16(given, packed, scales), lambda: F.linear(given, plain), 1e-2, device, rounds)
    relative, steps = relative_scales(codes, scales)
    q = (32 * x).round().clamp(-128, 127).to(torch.int8)
    levels = (expand_levels(codes, relative).float() * steps[:, None] / 32).to(dtype)
    given = q.to(dtype)
    return _timed(
        lambda: matmul_w4a8(q, packed, relative, steps / 32, out_dtype=dtype),
        lambda: F.linear(given, levels),
        1e-2,
        device,
        rounds,
    )


def chunked_scan(length: int = 512, heads: int = 8, device: str = "cpu", rounds: int = 20) -> Timing:
    """`ssd_chunk_scan` of one sequence, head_dim 64 and 128 states, beside the recurrence token by token."""
    x, dt, A, B, C = _sequence(1, length, heads, 1, device)
    return _timed(
        lambda: ssd_chunk_scan(x, dt, A, B, C)[0], lambda: ssd_sequential(x, dt, A, B, C)[0], 1e-3, device, rounds
    )


def int8_scan(
    length: int = 1024, batch: int = 8, heads: int = 128, groups: int = 8, device: str = "cuda", rounds: int = 20
) -> Timing:
    """The scan with int8 loads beside that of the same numbers in float16, or float32 on a CPU (section 1, "SSD")."""
    codes, scales, A = _codes(batch, length, heads, groups, device)
    x, dt, B, C = codes
    floats = _floats(codes, scales, device)
    return _timed(
        lambda: ssd_chunk_scan_int8(x, dt, A, B, C, scales)[0],
        lambda: ssd_chunk_scan(floats[0], floats[1], A, floats[2], floats[3])[0],
        3e-2,
        device,
        rounds,
    )


def int8_step(batch: int = 128, heads: int = 128, groups: int = 8, device: str = "cuda", rounds: int = 20) -> Timing:
    """A decode step on an int8 state beside one on a float16 state, or float32 on a CPU, both in place."""
    codes, scales, A = _codes(batch, 1, heads, groups, device)
    x, dt, B, C = (values[:, 0] for values in codes)
    floats = [values[:, 0] for values in _floats(codes, scales, device)]
    small = torch.randint(-100, 101, (batch, heads, 64, 128), generator=_seeded(7), dtype=torch.int8).to(device)
    wide = dequantize_state(small, scales).to(floats[0].dtype)
    return _timed(
        lambda: ssd_step_int8(small, x, dt, A, B, C, scales, inplace=True)[0],
        lambda: ssd_step(wide, floats[0], floats[1], A, floats[2], floats[3], inplace=True)[0],
        3e-2,
        device,
        rounds,
    )


def _timed(
    ours: Callable[[], Tensor], peer: Callable[[], Tensor], tolerance: float, device: str, rounds: int
) -> Timing:
    """`tolerance`: how far the two may be apart, relative to the largest number."""
    found, wanted = ours().double(), peer().double()
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    if not apart <= tolerance:
        raise AssertionError(f"expected answers alike to {tolerance}, got {apart:.2e}")
    return compare(ours, peer, rounds=rounds, device=device)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_seeded(seed)).to(device)


def _sequence(
    batch: int, length: int, heads: int, groups: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _normal(batch, length, heads, 64, device=device)
    dt = F.softplus(_normal(batch, length, heads, device=device, seed=1) - 3)
    A = -_normal(heads, device=device, seed=2).exp()
    B, C = _normal(2, batch, length, groups, 128, device=device, seed=3)
    return x, dt, A, B, C


def _codes(
    batch: int, length: int, heads: int, groups: int, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ScanScales, Tensor]:
    """Codes of x, dt, B and C; 16 scales of channels a group; A."""
    x, _, A, B, C = _sequence(batch, length, heads, groups, device)
    x, B, C = ((30 * values).round().clamp(-128, 127).to(torch.int8) for values in (x, B, C))
    dt = (30 * _normal(batch, length, heads, device=device, seed=1)).round().clamp(-128, 127).to(torch.int8)
    shares = torch.arange(64, device=device) // 16
    parts = torch.arange(heads, device=device) * 4 * groups // heads
    one = torch.full((1,), 1 / 30, device=device)
    scales = ScanScales(
        parts[:, None] * 4 + shares, one.repeat(16 * groups), one.repeat(groups), one.repeat(groups), one,
        one.repeat(16 * groups)[:, None].repeat(1, 128),
    )  # fmt: skip
    return (x, dt, B, C), scales, A


def _floats(codes: tuple[Tensor, ...], scales: ScanScales, device: str) -> list[Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.float16
    x, dt, B, C = (values.float() / 30 for values in codes)
    return [values.to(dtype) for values in (x, F.softplus(dt), B, C)]
