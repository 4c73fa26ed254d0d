"""Quantised and float16 models beside each other on one GPU: same kernels, same graph, weights of any value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isotone.quamba2 import shapes
from isotone.quamba2.architecture import Architecture
from isotone.quamba2.decode import Decoder
from isotone.quamba2.half import HalfMamba2
from isotone.quamba2.packing import ScanScales
from isotone.quamba2.ssd import ssd_chunk_scan, ssd_chunk_scan_int8
from isotone.shared.bench import compare
from isotone.shared.errors import InputError

ROUNDS = 30


def ratios(name: str, device: str = "cuda", prompt: int = 1024, batch: int = 128) -> dict[str, float | None]:
    """By the keys of `claims.SPEED` but "scan", for shape `name`: float16's time over ours; None where a peer is away.

    Needs a GPU but on a tiny shape. Raises `InputError` without.
    """
    if device != "cuda" and name != "tiny":
        raise InputError(f"expected a GPU to time Mamba2 {name}, got {device}")
    config = shapes.shape(name)
    rounds = ROUNDS if device == "cuda" else 6
    dtype = torch.float16 if device == "cuda" else torch.float32
    half = HalfMamba2(config, device, dtype)
    found: dict[str, float | None] = {}
    ids = torch.randint(half.arch.vocab, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def faster(ours: Callable[[], Any], peer: Callable[[], Any]) -> float:
        return compare(ours, peer, rounds=rounds, warmup=3, device=device).ratio

    peer = _stepping(half, ids[:1])
    for key, mode in (("tpot", "W4A8"), ("tpot w4a16", "W4A16")):
        model = shapes.random_model(config, shapes.options(mode), device)
        ours = _stepping(model, ids[:1])
        found[key] = faster(ours, peer)
        if key == "tpot":
            theirs = partial(_transformers, config, device, dtype, ids[:1])
            found["transformers"] = _or_none(partial(_beside, faster, ours, theirs))
            wide = HalfMamba2(config, device, dtype)
            found["batch"] = faster(_stepping(model, ids[:, :16]), _stepping(wide, ids[:, :16]))
            del wide
        else:
            with _int4(config, device) as other:
                found["torchao"] = None if other is None else faster(ours, _stepping(other, ids[:1]))
    model = shapes.random_model(config, shapes.options("W8A8"), device)
    found["prefill"] = faster(lambda: model(ids[:1], last_only=True), lambda: half(ids[:1], last_only=True))
    return found


def _stepping(model: Any, ids: Tensor) -> Callable[[], Any]:
    """A step of a token for each row of `ids`, after them."""
    decoder = Decoder(model, len(ids))
    decoder.prefill(ids)
    tokens = ids[:, -1].clone()
    return lambda: decoder.step(tokens)


def _beside(faster: Callable[..., float], ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    return faster(ours, theirs())


def _or_none(measure: Callable[[], float]) -> float | None:
    """None where a peer that is only reported fails in a way of its own."""
    try:
        return measure()
    except (RuntimeError, TypeError, AttributeError, ValueError, ImportError):
        return None


def _transformers(config: Any, device: str, dtype: torch.dtype, ids: Tensor) -> Callable[[], Any]:
    from transformers import Mamba2ForCausalLM

    with torch.device(device):
        model: Any = Mamba2ForCausalLM(config.hugging_face())
    model = model.to(dtype).eval()
    with torch.no_grad():
        kept = model(ids, use_cache=True).cache_params

    @torch.no_grad()
    def step() -> Any:
        return model(ids[:, -1:], cache_params=kept, use_cache=True).logits

    return step


@contextmanager
def _int4(config: Any, device: str) -> Iterator[Any]:
    """Our float model, its projections in torchao's int4 of groups of 128; None where torchao is away or refuses."""
    made = None
    if device == "cuda":  # pragma: no cover - needs a GPU
        try:
            from torchao.quantization import Int4WeightOnlyConfig, quantize_

            made = HalfMamba2(config, device, torch.bfloat16)
            made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone(), requires_grad=False)
            quantize_(made, Int4WeightOnlyConfig(group_size=128), filter_fn=lambda m, _: isinstance(m, nn.Linear))
        except (ImportError, RuntimeError, ValueError, AssertionError):
            made = None
    yield made


def scan_ratio(name: str, device: str = "cuda", batch: int = 8, length: int = 1024) -> dict[str, float | None]:
    """ "scan": the time of the scan of float16 values over that of int8 codes, for a layer of shape `name`."""
    arch = Architecture.of(shapes.shape(name))
    generator = torch.Generator().manual_seed(0)

    def codes(*size: int) -> Tensor:
        return torch.randint(-127, 128, size, dtype=torch.int8, generator=generator).to(device)

    h, G = arch.heads, arch.groups
    x, dt = codes(batch, length, h, arch.head_dim), codes(batch, length, h)
    B, C = (codes(batch, length, G, arch.state) for _ in range(2))
    A, D, one = -torch.ones(h, device=device), torch.ones(h, device=device), torch.full((G,), 1 / 64, device=device)
    labels = torch.arange(16 * G).repeat_interleave(h * arch.head_dim // (16 * G)).reshape(h, arch.head_dim).to(device)
    table = torch.full((16 * G, arch.state), 0.05, device=device)
    scales = ScanScales(labels, table[:, 0], one, one, one[:1], table)
    dtype = torch.float16 if device == "cuda" else torch.float32
    floats = [(values.float() / 64).to(dtype) for values in (x, B, C)]
    steps = torch.nn.functional.softplus(dt.float() / 64 - 4)
    timing = compare(
        lambda: ssd_chunk_scan_int8(x, dt, A, B, C, scales, D, chunk=arch.chunk),
        lambda: ssd_chunk_scan(floats[0], steps, A, floats[1], floats[2], D, chunk=arch.chunk),
        rounds=ROUNDS if device == "cuda" else 6,
        warmup=3,
        device=device,
    )
    return {"scan": timing.ratio}
