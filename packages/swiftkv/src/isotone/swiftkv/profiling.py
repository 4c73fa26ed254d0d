"""Measuring prefill and decoding: counted FLOPs, peak memory, TTFT and TPOT against prompt length, throughput."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isotone.shared.bench import compare
from isotone.shared.errors import InputError
from isotone.swiftkv import engine
from isotone.swiftkv.accounting import kv_bytes, speedup_bound
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.decoders import Decoder

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def random_ids(model: Any, batch: int, n: int, seed: int = 0) -> Tensor:
    """Token ids (batch, n) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, n), generator=generator).to(model.lm_head.weight.device)


def prefill_once(model: Any, ids: Tensor, chunk: int | None = None, kv_dtype: str = "model") -> Tensor:
    """Prefill into a new cache; the logits of the last tokens."""
    cache = engine.make_cache(model, ids.shape[0], ids.shape[1], kv_dtype)
    return engine.extend(model, list(ids), cache, chunk=chunk)


def counted_flops(function: Callable[[], Any]) -> int:
    """What torch's counter counts while `function` runs, and products grouped by expert, which it does not know."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped})
    with counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def _grouped(rows: Sequence[int], experts: Sequence[int], *unused: Any, **options: Any) -> int:
    """Each of (m, k) rows times one of (experts, k, n) matrices."""
    return 2 * rows[0] * rows[1] * experts[-1]


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), known)
        return out

    def _add(self, storage: Any, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in known or key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory that tensors made by `function` take at once; what was there before does not count."""
    if device == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Live() as live, torch.no_grad():
        function()
    return live.peak


def prefill_curve(
    base: Any, swift: Any, lengths: Sequence[int], *, rounds: int = 6, warmup: int = 1, device: str = "cpu"
) -> list[dict[str, float | int]]:
    """For each prompt length: seconds of the base and of the swift model's prefill, and their ratio with its interval.

    `base`: any model that the engine takes, prefilled without skipping. The two take turns (shared bench).
    """
    points = []
    for n in lengths:
        ids = random_ids(swift, 1, n)
        timing = compare(
            lambda ids=ids: prefill_once(swift, ids),  # type: ignore[misc]
            lambda ids=ids: prefill_once(base, ids),  # type: ignore[misc]
            rounds=rounds,
            warmup=warmup,
            device=device,
        )
        points.append(
            {
                "n": n,
                "swift_seconds": timing.ours_seconds,
                "base_seconds": timing.peer_seconds,
                "ratio": timing.ratio,
                "low": timing.low,
                "high": timing.high,
            }
        )
    return points


@dataclass(frozen=True)
class BenchmarkPoint:
    """One prompt length `n`, batch 1. `ttft`: seconds of prefill up to the first token's logits; `tpot`: seconds of one
    more token after the prompt; ratios are the base's over the swift model's, > 1: swift is faster. `bound`: the ratio
    of the counted FLOPs of prefill. `cache_bytes` and `peak_bytes`: allocated, and the most that prefill takes at once.
    """

    n: int
    ttft: float
    base_ttft: float
    ttft_ratio: float
    bound: float
    tpot: float
    base_tpot: float
    tpot_ratio: float
    cache_bytes: int
    base_cache_bytes: int
    peak_bytes: int
    base_peak_bytes: int


def benchmark(
    model: Any,
    lengths: Sequence[int] = (256, 512, 1024),
    *,
    base: Any = None,
    kv_dtype: str = "model",
    chunk: int | None = None,
    mode: str = "eager",
    rounds: int = 6,
    warmup: int = 1,
) -> list[BenchmarkPoint]:
    """A swift model beside the one it came from, for each prompt length; the two take turns.

    `base`: any model that the engine takes; default the teacher inside `model`. `kv_dtype` and `chunk` hold for the
    swift model, whose base keeps its own type; `mode`: how both decode. Raises `InputError` where there is no teacher,
    and on a length below 1.
    """
    if base is None and not getattr(model.config, "teacher_weights", False):
        raise InputError("expected a model with its teacher's weights (export dual), or base=, to compare with")
    if not lengths or min(lengths) < 1:
        raise InputError(f"expected prompt lengths of at least 1 token, got {list(lengths)}")
    whole, off = (base, nullcontext) if base is not None else (model, model.teacher)
    device = model.lm_head.weight.device.type
    split = SwiftKVConfig.of(model.config)
    points = []
    for n in lengths:
        ids = random_ids(model, 1, n)

        def swift(ids: Tensor = ids) -> Tensor:
            return prefill_once(model, ids, chunk, kv_dtype)

        def full(ids: Tensor = ids) -> Tensor:
            with off():
                return prefill_once(whole, ids)

        first = compare(swift, full, rounds=rounds, warmup=warmup, device=device)
        ours, cache = decode_step(model, ids, kv_dtype, mode)
        with off():
            base_step, base_cache = decode_step(whole, ids, "model", mode)

        def theirs(step: Callable[[], Tensor] = base_step) -> Tensor:
            with off():
                return step()

        more = compare(ours, theirs, rounds=rounds, warmup=warmup, device=device)
        points.append(
            BenchmarkPoint(
                n,
                first.ours_seconds,
                first.peer_seconds,
                first.ratio,
                speedup_bound(model.config, n, split.num_key_value_layers, split.key_value_group_size),
                more.ours_seconds,
                more.peer_seconds,
                more.ratio,
                cache.bytes,
                base_cache.bytes,
                peak_bytes(swift, device),
                peak_bytes(full, device),
            )
        )
    return points


def decode_step(
    model: Any, ids: Tensor, kv_dtype: str = "model", mode: str = "eager"
) -> tuple[Callable[[], Tensor], SwiftKVCache]:
    """One step of decoding after a prompt (1, n), which can be taken again and again, and its cache."""
    n = ids.shape[1]
    cache = engine.make_cache(model, 1, n + 1, kv_dtype)
    engine.extend(model, list(ids), cache)
    decoder = Decoder(model, cache, mode)

    def step() -> Tensor:
        cache.crop(0, n)  # the same step again: same context, same work
        return decoder(ids[:, 0])

    return step, cache


def throughput(
    model: Any,
    memory: int,
    prompt: int,
    output: int,
    *,
    kv_dtype: str = "model",
    chunk: int = 8192,
    mode: str = "eager",
    most: int = 256,
) -> dict[str, float | int]:
    """Aggregate tokens a second, prompts and outputs, of as many rows as a cache of `memory` bytes holds.

    Prompts go in one after another, `chunk` tokens at a time, then all rows decode together. Raises `InputError` where
    not even one row fits.
    """
    split = SwiftKVConfig.of(model.config)
    named = _NAMES[model.lm_head.weight.dtype] if kv_dtype == "model" else kv_dtype
    row = kv_bytes(
        model.config,
        prompt + output,
        split.num_key_value_layers,
        split.key_value_group_size,
        kv_dtype=named,
    )
    batch = min(most, memory // row)
    if batch < 1:
        raise InputError(f"expected memory for a row of {prompt + output} tokens, {row} bytes, got {memory}")
    cuda = model.lm_head.weight.is_cuda
    prompts = list(random_ids(model, batch, prompt))
    cache = engine.make_cache(model, batch, prompt + output, kv_dtype)
    _wait(cuda)
    start = time.perf_counter()
    tokens = engine.extend(model, prompts, cache, chunk=chunk).argmax(-1)
    _wait(cuda)
    first = time.perf_counter() - start
    decoder = Decoder(model, cache, mode)
    for _ in range(output - 1):
        tokens = decoder(tokens).argmax(-1)
    _wait(cuda)
    seconds = time.perf_counter() - start
    return {
        "batch": batch,
        "tokens_per_second": batch * (prompt + output) / seconds,
        "prefill_seconds": first,
        "seconds_per_step": (seconds - first) / max(1, output - 1),
    }


def _wait(cuda: bool) -> None:
    if cuda:  # pragma: no cover - needs a GPU
        torch.cuda.synchronize()
