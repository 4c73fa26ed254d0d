"""Measuring a model's prefill and decoding: counted FLOPs, peak memory, time against prompt length, throughput."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isotone.shared.bench import compare
from isotone.shared.errors import InputError
from isotone.swiftkv import engine
from isotone.swiftkv.accounting import kv_bytes
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
