"""Speed and memory beside what a user would run instead: transformers with SDPA, and our own engine without skipping.

All arms have the same weights and are checked to give the same logits first (the base against transformers, the swift
model against its own full forward).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from isotone.shared import device
from isotone.shared.bench import Timing, compare
from isotone.shared.claims import Ratio, Report, figure
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.swiftkv import engine, profiling
from isotone.swiftkv.accounting import speedup_bound
from isotone.swiftkv.basemodel import random_llama
from isotone.swiftkv.convert import convert
from isotone.swiftkv.data import Batch
from isotone.swiftkv.distill import DistillConfig, step_loss


@dataclass(frozen=True)
class Size:
    """What is timed: a shape, a prompt, a context to decode at, windows to distil on."""

    shape: str
    dtype: torch.dtype
    n: int
    context: int
    lengths: tuple[int, ...]
    windows: tuple[int, int]
    rounds: int
    tolerance: float
    prefill_target: float | None
    decode_target: float | None
    bound_target: float | None
    step_target: float | None


# targets from the issue: 1.75 on CPU, 1.85 and 0.95 of the FLOPs bound on GPU, TPOT at most 1.03 of the base's; the
# specification: a distillation step at most 0.75 of the one with two full forwards
SIZES = {
    "tiny": Size("tiny", torch.float32, 48, 32, (16, 32), (2, 16), 6, 1e-4, None, None, None, None),
    "cpu": Size(
        "512x16", torch.float32, 2048, 512, (256, 512, 1024, 2048), (4, 128), 8, 2e-3, 1.75, 1 / 1.03, None, 1 / 0.75
    ),
    "gpu": Size(
        "llama-3.1-8b",
        torch.bfloat16,
        8192,
        8192,
        (2048, 8192, 32768),
        (1, 4096),
        10,
        0.5,
        1.85,
        1 / 1.03,
        0.95,
        1 / 0.75,
    ),
}


def bench(run: Run, size: str = "auto") -> Report:
    """Time prefill, decoding and a distillation step, and weigh the cache. `size`: auto, cpu, gpu or tiny."""
    where = device.resolve(run.device)
    if size == "auto":
        size = "gpu" if where == "cuda" else "cpu"
    if size not in SIZES:
        raise InputError(f"expected --size to be auto or one of {', '.join(SIZES)}, got {size!r}")
    if size == "gpu" and where != "cuda":
        raise InputError("expected a GPU for --size gpu, found none; --size cpu runs here")
    start = time.perf_counter()
    sizes = SIZES[size]
    base = random_llama(sizes.shape, sizes.dtype, where)
    layers = base.config.num_hidden_layers
    # its own modules, so that the base stays as transformers has it
    swift = convert(random_llama(sizes.shape, sizes.dtype, where), layers // 2, 1)
    shape = f"{sizes.shape}, l = {layers // 2} of {layers}"
    ids = profiling.random_ids(base, 1, sizes.n)
    _agree(base, swift, ids[:, : min(sizes.n, 512)], sizes.tolerance)

    def peer() -> Any:
        with torch.no_grad():
            return base(input_ids=ids, logits_to_keep=1, use_cache=True).logits

    def timed(ours: Any, theirs: Any, rounds: int = sizes.rounds) -> Timing:
        return compare(ours, theirs, rounds=rounds, warmup=2, device=where)

    def row(name: str, work: str, ours: str, other: str, version: str, timing: Timing, target: float | None) -> Ratio:
        # both values from the median ratio, so that the pairs are compared and not two medians
        return Ratio(
            name, work, ours, other, version, timing.ours_seconds, timing.ours_seconds * timing.ratio, "s", target
        )

    hf = transformers.__version__
    work = f"prefill, {shape}, n = {sizes.n}"
    against_hf = timed(lambda: profiling.prefill_once(swift, ids), peer)
    against_own = timed(lambda: profiling.prefill_once(swift, ids), lambda: profiling.prefill_once(base, ids))
    bound = speedup_bound(base.config, sizes.n, layers // 2)
    ratios = [
        row("prefill-hf", work, "swift", "transformers, sdpa, one row of logits", hf, against_hf, sizes.prefill_target),
        row(
            "prefill-own",
            work,
            "swift",
            "our engine without skipping",
            "this package",
            against_own,
            sizes.prefill_target,
        ),
        Ratio(
            "prefill-bound",
            f"{work}: speed-up over our engine, of the FLOPs bound",
            "measured",
            "closed form",
            "this package",
            against_own.ratio,
            bound,
            "x",
            sizes.bound_target,
            higher_is_better=True,
        ),
    ]
    ratios += _decoding(base, swift, sizes, shape, timed, row, hf, where)
    ratios += _memory(base, sizes, layers, ids, swift, where)
    ratios += _step(swift, sizes, shape, timed, row)
    shorter = [n for n in sizes.lengths if n != sizes.n]
    curve = profiling.prefill_curve(base, swift, shorter, rounds=6, device=where)
    # the longest was timed above
    curve.append({"n": sizes.n, "ratio": against_own.ratio, "low": against_own.low, "high": against_own.high})
    curve.sort(key=lambda point: point["n"])
    bounds = [speedup_bound(base.config, int(point["n"]), layers // 2) for point in curve]
    return Report(
        "swiftkv",
        "bench",
        "gpu" if where == "cuda" else "cpu",
        (),
        "torch",
        ratios=ratios,
        seconds=time.perf_counter() - start,
        figures={"prefill": _plot(curve, bounds, shape)},
    )


def _agree(base: Any, swift: Any, ids: torch.Tensor, tolerance: float) -> None:
    """Engine against transformers on the base, and skipping against the full student; raises where they differ."""
    with torch.no_grad():
        for model in (base, swift):
            whole = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1]
            ours = profiling.prefill_once(model, ids)
            off = float((whole - ours).abs().max())
            if not off <= tolerance * max(1.0, float(whole.abs().max())):
                raise RuntimeError(f"expected the same logits before timing, got {off} apart")


def _decoding(
    base: Any, swift: Any, sizes: Size, shape: str, timed: Any, row: Any, version: str, where: str
) -> list[Ratio]:
    """Time per output token at a context, batch 1, and beside transformers' own decoding."""
    ids = profiling.random_ids(base, 1, sizes.context)
    token = ids[:, 0]
    mode = "cudagraph" if where == "cuda" else "eager"
    steps = {
        name: profiling.decode_step(model, ids, mode=mode)[0] for name, model in (("swift", swift), ("base", base))
    }
    with torch.no_grad():
        past = base(input_ids=ids, logits_to_keep=1, use_cache=True).past_key_values

    def peer() -> Any:
        with torch.no_grad():
            out = base(input_ids=token[:, None], past_key_values=past, use_cache=True).logits
        past.crop(-1)  # takes the one token off again
        return out

    work = f"time per output token, {shape}, context {sizes.context}, batch 1"
    rounds = 2 * sizes.rounds
    return [
        row(
            "tpot-own",
            work,
            "swift",
            "our engine without skipping",
            "this package",
            timed(steps["swift"], steps["base"], rounds),
            sizes.decode_target,
        ),
        row("tpot-hf", work, "swift", "transformers, DynamicCache", version, timed(steps["swift"], peer, rounds), None),
    ]


def _memory(base: Any, sizes: Size, layers: int, ids: torch.Tensor, swift: Any, where: str) -> list[Ratio]:
    """Bytes allocated for the cache, and the most that a prefill takes at once."""
    whole = engine.make_cache(base, 1, sizes.n).bytes
    rows = []
    for group, kind, target in ((4, "model", 1.6), (4, "int8", None), (4, "fp8", None), (4, "int4", None)):
        config = type(swift.config).from_dict({**swift.config.to_dict(), "key_value_group_size": group})
        cache = engine.SwiftKVCache(config, 1, sizes.n, kv_dtype=kind, dtype=sizes.dtype, device=where)
        name = "the model's type" if kind == "model" else kind
        rows.append(
            Ratio(
                f"cache-g{group}-{kind}",
                f"KV cache, n = {sizes.n}, g = {group}, {name}",
                "swift",
                "base, the model's type",
                "this package",
                cache.bytes / 2**20,
                whole / 2**20,
                "MiB",
                target,
            )
        )
    ours = profiling.peak_bytes(lambda: profiling.prefill_once(swift, ids), where)
    theirs = profiling.peak_bytes(lambda: profiling.prefill_once(base, ids), where)
    chunked = profiling.peak_bytes(lambda: profiling.prefill_once(swift, ids, chunk=max(16, sizes.n // 4)), where)
    for name, value in (("whole", ours), (f"chunks of {max(16, sizes.n // 4)}", chunked)):
        rows.append(
            Ratio(
                f"peak-{name.split()[0]}",
                f"peak memory of a prefill, n = {sizes.n}, {name}",
                "swift",
                "our engine without skipping, whole",
                "this package",
                value / 2**20,
                theirs / 2**20,
                "MiB",
                None,
            )
        )
    return rows


def _step(swift: Any, sizes: Size, shape: str, timed: Any, row: Any) -> list[Ratio]:
    """One distillation step, forward and backward, against the lower half run twice (two full forwards), in time and in
    counted FLOPs: both have the same backward pass, so that more than the FLOPs' ratio is not to be had by sharing."""
    batch = Batch(profiling.random_ids(swift, *sizes.windows))
    parameters = [p for p in swift.parameters() if p.requires_grad]

    def step(share: bool) -> None:
        with torch.enable_grad():
            loss = step_loss(swift, batch, DistillConfig(share_lower=share))
            torch.autograd.grad(loss, parameters)

    timing = timed(lambda: step(True), lambda: step(False))
    work = f"distillation step, {shape}, {sizes.windows[0]} x {sizes.windows[1]} tokens"
    ours, theirs = (profiling.counted_flops(partial(step, share)) for share in (True, False))
    counted = Ratio(
        "distil-flops",
        f"{work}: counted FLOPs",
        "lower half shared",
        "two full forwards",
        "this package",
        ours / 1e9,
        theirs / 1e9,
        "GFLOP",
        None,
    )
    return [
        row("distil-step", work, "lower half shared", "two full forwards", "this package", timing, sizes.step_target),
        counted,
    ]


def _plot(curve: list[dict[str, float | int]], bounds: list[float], shape: str) -> Any:
    drawing, axes = figure(f"Prefill: {shape}", "prompt, tokens", "times faster than without skipping")
    lengths = [point["n"] for point in curve]
    ratios = [point["ratio"] for point in curve]
    below = [point["ratio"] - point["low"] for point in curve]
    above = [point["high"] - point["ratio"] for point in curve]
    axes.errorbar(lengths, ratios, yerr=[below, above], fmt="o-", capsize=4, label="measured")
    axes.plot(lengths, bounds, ":", color="#D55E00", label="bound: the FLOPs' ratio")
    axes.axhline(1.0, color="#999999", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(0.9, 2.1)
    axes.legend(frameon=False)
    return drawing
