"""The paper's claims, measured again on a Llama of 8 layers that is trained here, on real text and on recall.

For each seed: a base on text, swift arms at l = 6, 4, 2 of 8 and g = 1, 2, 4, distilled on the training text; the loss
and parameter ablations on narrow text; the upper layers dropped and the layer below's cache reused, as they are and
distilled with the same budget; a base on key-value recall and the same swift arms of it. Thresholds were set before
measuring: from the issue where it names one (80 % of the gap, 1 % of the closed form, 62.5 % of the bytes), from the
paper's tables (recall keeps 95 %: GSM8K keeps 79.45 of 82.56), else 0: the order that the paper found must show.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isotone.shared import data, device, progress
from isotone.shared.claims import ArmLog, Claim, Measurement, Report, figure
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.swiftkv import benchmark
from isotone.swiftkv.accounting import flops, kv_bytes
from isotone.swiftkv.baselines import CopiedKeyValues, EarlyExit, train_baseline
from isotone.swiftkv.basemodel import random_llama, shape_config, train_base, train_recall
from isotone.swiftkv.convert import convert
from isotone.swiftkv.data import RECALL_VOCAB, Batch, Bytes, Windows, recall_task
from isotone.swiftkv.distill import DistillConfig, distill
from isotone.swiftkv.engine import make_cache
from isotone.swiftkv.evaluate import fidelity, recall_accuracy, student_logits, teacher_logits

PAPER = "arXiv 2410.03960"
SHAKESPEARE = "text/tinyshakespeare.txt"

GAP = Claim(
    "gap-closed",
    "50 % SingleInputKV: share of the cross-entropy lost at conversion that distillation wins back",
    f"{PAPER}: Llama-3.1-8B keeps 72.70 of 73.71 points; the loss at conversion was not found",
    "%",
    None,
    80.0,
    "min",
)
KEPT = Claim(
    "recall-kept",
    "50 % SingleInputKV: key-value recall at 16 pairs after distillation, of the base's",
    f"{PAPER}, GSM8K of Llama-3.1-8B: 79.45 of 82.56",
    "%",
    96.2,
    95.0,
    "min",
)
BYTES = Claim(
    "kv-bytes",
    "50 % SingleInputKV and 4-way AcrossKV: allocated KV bytes of the base's",
    f"{PAPER}, table of configurations",
    "%",
    62.5,
    62.5,
    "max",
)
FLOPS = Claim(
    "prefill-flops",
    "50 % SingleInputKV: counted prefill FLOPs, off the closed form",
    "closed form of section 3; torch's counter",
    "%",
    None,
    1.0,
    "max",
)
SAVED = Claim(
    "prefill-saved",
    "50 % SingleInputKV: counted prefill FLOPs saved",
    f"{PAPER}, abstract: prefill compute cut by 25 to 50 %",
    "%",
    "25 to 50",
    45.0,
    "min",
)
SPEED = Claim(
    "prefill-speed",
    "50 % SingleInputKV: base over swift prefill time, 16 layers, the longest prompt measured",
    "closed form: 1.9 where compute is the limit",
    "x",
    None,
    1.75,
    "min",
)
ORDER_L = Claim(
    "order-l",
    "Skipping more costs more after distillation: the smaller of KL(l=4) - KL(l=6) and KL(l=2) - KL(l=4)",
    f"{PAPER}: 73.59, 72.70 and 66.09 points at 25, 50 and 62.5 %",
    "nats",
    None,
    0.0,
    "min",
)
ORDER_G = Claim(
    "order-g",
    "Sharing more costs more after distillation: the smaller of KL(g=2) - KL(g=1) and KL(g=4) - KL(g=2)",
    f"{PAPER}: 72.70, 71.82 and 71.49 points at g = 1, 2, 4",
    "nats",
    None,
    0.0,
    "min",
)
KD_LM = Claim(
    "kd-over-lm",
    "Narrow text: cross-entropy of Q/K/V + LM loss over Q/K/V + distillation",
    f"{PAPER}, ablation: 70.06 against 72.70 points",
    "nats",
    None,
    0.0,
    "min",
)
KD_ALL_LM = Claim(
    "kd-over-all-lm",
    "Narrow text: cross-entropy of all weights + LM loss over Q/K/V + distillation",
    f"{PAPER}, ablations",
    "nats",
    None,
    0.0,
    "min",
)
ALL_KD = Claim(
    "all-kd",
    "Narrow text: cross-entropy of all weights + distillation over Q/K/V + distillation (reported wherever it lands)",
    f"{PAPER}, ablation: 68.23 against 72.70 points",
    "nats",
    None,
    None,
    "min",
)
DROPPED = Claim(
    "over-dropped",
    "KL of the upper layers dropped, distilled, over SwiftKV's (l = 4)",
    "the alternative of the same prefill cost",
    "nats",
    None,
    0.0,
    "min",
)
COPIED = Claim(
    "over-copied",
    "KL of reusing the cache of the layer below, distilled, over SwiftKV's (l = 4)",
    "the alternative of the same prefill cost",
    "nats",
    None,
    0.0,
    "min",
)
THROUGHPUT = Claim(
    "throughput",
    "Tokens a second at equal KV memory, 50 % SingleInputKV, 4-way AcrossKV and FP8, over the base",
    f"{PAPER}, abstract: up to 2 times",
    "x",
    2.0,
    1.8,
    "min",
)
ARMS = ((6, 1), (4, 1), (2, 1), (4, 2), (4, 4))


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: numbers, never the path. l is given in eighths of the layers."""

    seeds: tuple[int, ...]
    shape: str = "tiny"
    context: int = 64
    batch: int = 16
    base_steps: int = 500
    base_lr: float = 2e-3
    steps: int = 200
    recall_steps: int = 150
    narrow_steps: int = 200
    lr: float = 1e-3
    rates: tuple[float, ...] = (1e-3, 4e-3)
    narrow: int = 20_000
    text: int = 1_115_394
    validation: int = 8
    copying: int = 2500
    recalling: int = 250
    examples: int = 256
    speed_shape: str = "256x16"
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    speed_dtype: str = "float32"
    rounds: int = 6
    flops_n: int = 512
    compute_dtype: str = "model"
    prompt: int = 0
    output: int = 0
    memory: int = 0
    arms: tuple[tuple[int, int], ...] = ARMS
    workers: int = 2


_SMOKE = dict(
    seeds=(0,),
    context=32,
    batch=4,
    base_steps=6,
    steps=2,
    recall_steps=2,
    narrow_steps=2,
    narrow=2000,
    rates=(1e-3,),
    text=60_000,
    validation=1,
    copying=3,
    recalling=3,
    examples=16,
    speed_shape="tiny",
    lengths=(32, 64),
    flops_n=64,
    workers=1,
)
SCALES = {
    "smoke": Scale(**_SMOKE, arms=((4, 1), (4, 4))),  # type: ignore[arg-type]
    "cpu": Scale((0, 1, 2)),
    "gpu": Scale(
        (0,),
        shape="llama-100m",
        context=1024,
        batch=32,
        base_steps=2000,
        base_lr=1e-3,
        steps=400,
        narrow_steps=200,
        lr=5e-4,
        narrow=200_000,
        text=30_000_000,
        copying=4000,
        speed_shape="llama-3.1-8b",
        lengths=(2048, 8192, 32768, 131072),
        speed_dtype="bfloat16",
        flops_n=8192,
        compute_dtype="bf16",
        prompt=8192,
        output=256,
        memory=16 * 2**30,
        workers=1,
    ),
    "paper": Scale(
        (0,),
        shape="llama-3.1-8b",
        context=8192,
        batch=8,
        steps=20_000,
        narrow_steps=2000,
        lr=2e-4,
        text=1 << 40,
        speed_shape="llama-3.1-8b",
        lengths=(2048, 8192, 32768, 131072),
        speed_dtype="bfloat16",
        flops_n=8192,
        compute_dtype="bf16",
        prompt=8192,
        output=256,
        memory=16 * 2**30,
        workers=1,
    ),
}


def reproduce(scale: str, run: Run, path: Path | None = None, setting: Scale | None = None) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again.

    `path`: text to train on (default: tiny Shakespeare where it is, else the interpreter's library source).
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = setting or SCALES[scale]
    where = device.resolve(run.device)
    large = shape_config(setting.speed_shape).hidden_size > 1024
    if large and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    if scale == "paper" and path is None:
        raise InputError("expected --text FILE with the training text for --scale paper, got none")
    start = time.perf_counter()
    corpus, source = _corpus(setting, path)
    seeds = run.seeds or setting.seeds
    # seeds and workers are how arms are dealt out, no part of what one is
    identity = {k: v for k, v in asdict(setting).items() if k not in ("seeds", "workers")}
    config = {"setting": identity, "data": source["sha256"], "device": where, "version": 1}
    log = ArmLog(run.out, config, run.resume)
    jobs = [(kind, seed) for seed in seeds for kind in ("text", "recall")]
    arguments = [(kind, setting, corpus, seed, where, str(run.out), config) for kind, seed in jobs]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    workers = min(setting.workers, len(jobs), os.cpu_count() or 1)
    with progress.bar(f"swiftkv {scale}", len(jobs) + 1, run.silent) as bar:
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for job, result in zip(jobs, pool.map(_job, arguments), strict=True):
                    found[job] = result
                    bar.advance(1, arm=f"{job[0]} seed {job[1]}")
        else:
            for job, argument in zip(jobs, arguments, strict=True):
                found[job] = _job(argument)
                bar.advance(1, arm=f"{job[0]} seed {job[1]}")
        engine_side = log.arm("engine", lambda: _engine(setting, where))
        bar.advance(1)
    texts = [found["text", seed] for seed in seeds]
    recalls = [found["recall", seed] for seed in seeds]
    told = scale != "smoke"
    return Report(
        "swiftkv",
        "reproduce",
        scale,
        seeds,
        "torch",
        measurements=_measure(texts, recalls, engine_side, setting, told),
        data=[source],
        seconds=time.perf_counter() - start,
        figures=_figures(texts, recalls, engine_side, setting),
    )


def _corpus(setting: Scale, path: Path | None) -> tuple[bytes, dict[str, str]]:
    if path is not None:
        text, name = path.read_bytes(), path.name
    elif setting.text <= SCALES["cpu"].text and (found := data.local(SHAKESPEARE)) is not None:
        text, name = found.read_bytes(), "tiny Shakespeare"
    else:
        text, name = data.stdlib_text(setting.text).encode(), "python library source"
    text = text[: setting.text]
    if len(text) < 20 * setting.context:
        raise InputError(f"expected a text of at least {20 * setting.context} bytes, got {len(text)}")
    return text, data.provenance(name, text)


def _job(arguments: tuple[str, Scale, bytes, int, str, str, dict[str, Any]]) -> dict[str, Any]:
    """One seed's arms on text, or on recall; each arm is kept when it is done."""
    kind, setting, corpus, seed, where, out, config = arguments
    if setting.workers > 1:
        torch.set_num_threads(1)
    log = ArmLog(out, config, resume=True)
    holder: dict[str, Any] = {}
    make = _text_base if kind == "text" else _recall_base

    def base() -> Any:
        # trained once a seed, only when an arm is missing that needs it; the same seed gives the same weights
        if "base" not in holder:
            holder["base"] = make(setting, corpus, seed, where)
        return copy.deepcopy(holder["base"])

    arms = _text_arms(setting, corpus, seed, where) if kind == "text" else _recall_arms(setting, seed, where)
    return {name: log.arm(f"{kind}-{name}-{seed}", partial(_with, arm, base)) for name, arm in arms.items()}


def _with(arm: Any, base: Any) -> dict[str, Any]:
    made: dict[str, Any] = arm(base())
    return made


def _text_base(setting: Scale, corpus: bytes, seed: int, where: str) -> Any:
    vocabulary = Bytes(corpus)
    train = vocabulary.encode(corpus)[: len(corpus) * 9 // 10]
    model = random_llama(setting.shape, seed=seed, device=where, vocab_size=len(vocabulary))
    windows = Windows(train, setting.context, setting.batch, seed)
    train_base(model, lambda step: (windows(step).input_ids,) * 2, setting.base_steps, setting.base_lr)
    return model


def _recall_base(setting: Scale, corpus: bytes, seed: int, where: str) -> Any:
    # narrow weights at first hold induction up: 0.08 instead of 0.02
    model = random_llama(setting.shape, seed=seed, device=where, vocab_size=RECALL_VOCAB, initializer_range=0.08)
    train_recall(model, batch=setting.batch, copying=setting.copying, recalling=setting.recalling, seed=seed)
    return model


def _kept(model: Any, eighths: int) -> int:
    return max(1, model.config.num_hidden_layers * eighths // 8)


def _settings(setting: Scale, steps: int, **options: Any) -> DistillConfig:
    return DistillConfig(steps=steps, lr=setting.lr, compute_dtype=setting.compute_dtype, **options)


def _text_arms(setting: Scale, corpus: bytes, seed: int, where: str) -> dict[str, Any]:
    vocabulary = Bytes(corpus)
    ids = vocabulary.encode(corpus)
    cut = len(ids) * 9 // 10
    held_out = Windows(ids[cut:], setting.context, setting.batch, 7)
    batches = [held_out(step).input_ids.to(where) for step in range(setting.validation)]
    whole = Windows(ids[:cut], setting.context, setting.batch, seed + 100)
    narrow = Windows(ids[: setting.narrow], setting.context, setting.batch, seed + 100)

    def swift(eighths: int, group: int, windows: Windows, steps: int, **options: Any) -> Any:
        def arm(base: Any) -> dict[str, Any]:
            teacher = copy.deepcopy(base)
            model = convert(base, _kept(base, eighths), group)
            theirs = student_logits(teacher)
            before = fidelity(student_logits(model), theirs, batches)
            history = distill(model, windows, _settings(setting, steps, **options))
            after = fidelity(student_logits(model), theirs, batches)
            return {"before": before, "after": after, "losses": history.losses, "seconds": history.seconds}

        return arm

    def other(kind: Any) -> Any:
        def arm(base: Any) -> dict[str, Any]:
            model = convert(base, _kept(base, 4), 1)
            before = fidelity(kind(model), teacher_logits(model), batches)
            # the alternatives have their rate chosen, on the very text they are scored on; SwiftKV has one rate
            tried = []
            for rate in setting.rates:
                baseline = kind(model)
                train_baseline(baseline, whole, replace(_settings(setting, setting.steps), lr=rate))
                tried.append(fidelity(baseline, teacher_logits(model), batches))
            return {"before": before, "after": min(tried, key=lambda score: score["kl"])}

        return arm

    arms = {f"l{e}-g{g}": swift(e, g, whole, setting.steps) for e, g in setting.arms}
    for train in ("qkv", "full"):
        for loss in ("kd", "lm"):
            arms[f"narrow-{train}-{loss}"] = swift(4, 1, narrow, setting.narrow_steps, train=train, loss=loss)
    return arms | {"dropped": other(EarlyExit), "copied": other(CopiedKeyValues)}


def _recall_arms(setting: Scale, seed: int, where: str) -> dict[str, Any]:
    def batches(step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 100) + step)
        # all tokens are distilled on: with 12 queries, 12 answers a sequence are among them
        return Batch(recall_task(setting.batch, 16, generator, 12)[0])

    def accuracies(logits: Any) -> dict[str, float]:
        found = {}
        for pairs in (16, 24):
            on = lambda ids: logits(ids.to(where)).cpu()  # noqa: E731
            found[str(pairs)] = recall_accuracy(on, pairs, examples=setting.examples, seed=7)
        return found

    def swift(eighths: int, group: int) -> Any:
        def arm(base: Any) -> dict[str, Any]:
            model = convert(base, _kept(base, eighths), group)
            before = accuracies(student_logits(model))
            distill(model, batches, _settings(setting, setting.recall_steps))
            return {"before": before, "after": accuracies(student_logits(model))}

        return arm

    arms: dict[str, Any] = {"base": lambda base: {"after": accuracies(student_logits(base))}}
    return arms | {f"l{e}-g{g}": swift(e, g) for e, g in setting.arms}


def _engine(setting: Scale, where: str) -> dict[str, Any]:
    """What needs no training: bytes, FLOPs, times."""
    dtype = getattr(torch, setting.speed_dtype)
    base = random_llama(setting.speed_shape, dtype, where)
    layers = base.config.num_hidden_layers
    curve_base = base
    n = setting.flops_n
    ids = benchmark.random_ids(base, 1, n)
    full = benchmark.counted_flops(lambda: benchmark.prefill_once(base, ids))
    base_bytes = make_cache(base, 2, n).bytes
    shared = make_cache(convert(base, layers // 2, 4), 2, n).bytes
    swift = convert(base, layers // 2, 1)
    counted = benchmark.counted_flops(lambda: benchmark.prefill_once(swift, ids))
    # torch counts a causal attention as the whole square; so does the closed form here
    closed = flops(base.config, n, layers // 2, causal=False).total
    curve = benchmark.prefill_curve(curve_base, swift, setting.lengths, rounds=setting.rounds, device=where)
    bound = [flops(base.config, n).total / flops(base.config, n, layers // 2).total for n in setting.lengths]
    result: dict[str, Any] = {
        "bytes": 100 * shared / base_bytes,
        "closed_bytes": 100 * kv_bytes(base.config, n, layers // 2, 4) / kv_bytes(base.config, n),
        "off": 100 * abs(counted / closed - 1),
        "saved": 100 * (1 - counted / full),
        "curve": curve,
        "bound": bound,
    }
    if setting.memory:
        mode = "cudagraph" if where == "cuda" else "eager"
        options = dict(prompt=setting.prompt, output=setting.output, mode=mode)
        result["throughput"] = {"base": benchmark.throughput(base, setting.memory, **options)}  # type: ignore[arg-type]
        result["throughput"]["g1"] = benchmark.throughput(swift, setting.memory, **options)  # type: ignore[arg-type]
        del swift
        four = convert(base, layers // 2, 4)
        result["throughput"]["g4"] = benchmark.throughput(four, setting.memory, **options)  # type: ignore[arg-type]
        quantised = benchmark.throughput(four, setting.memory, kv_dtype="fp8", **options)  # type: ignore[arg-type]
        result["throughput"]["g4-fp8"] = quantised
    return result


def _measure(
    texts: list[dict[str, Any]], recalls: list[dict[str, Any]], side: dict[str, Any], setting: Scale, told: bool
) -> list[Measurement]:
    """The claims; spreads are standard deviations over the seeds. At smoke nothing is told but what is exact."""

    def kl(seed: dict[str, Any], arm: str) -> float:
        return seed[arm]["after"]["kl"]

    def cross(seed: dict[str, Any], arm: str) -> float:
        return seed[arm]["after"]["cross_entropy"]

    def gap(seed: dict[str, Any]) -> float:
        arm = seed["l4-g1"]
        lost = arm["before"]["cross_entropy"] - arm["before"]["teacher_cross_entropy"]
        left = arm["after"]["cross_entropy"] - arm["before"]["teacher_cross_entropy"]
        return 100 * (1 - left / lost) if lost > 0 else math.nan

    exact = [
        Measurement(BYTES, side["bytes"]),
        Measurement(FLOPS, side["off"]),
    ]
    timed = side.get("throughput")
    gain = timed["g4-fp8"]["tokens_per_second"] / timed["base"]["tokens_per_second"] if timed else None
    if not told:
        silent = (GAP, KEPT, SAVED, SPEED, ORDER_L, ORDER_G, KD_LM, KD_ALL_LM, ALL_KD, DROPPED, COPIED, THROUGHPUT)
        return [*exact, *(Measurement(claim, None) for claim in silent)]
    last = side["curve"][-1]
    reported = _reported(texts, recalls, setting)
    return [
        Measurement(GAP, *_over([gap(seed) for seed in texts])),
        Measurement(
            KEPT,
            *_over([100 * seed["l4-g1"]["after"]["16"] / max(seed["base"]["after"]["16"], 1e-9) for seed in recalls]),
        ),
        *exact,
        Measurement(SAVED, side["saved"]),
        Measurement(SPEED, last["ratio"], (last["high"] - last["low"]) / 2),
        Measurement(
            ORDER_L,
            *_over([min(kl(s, "l4-g1") - kl(s, "l6-g1"), kl(s, "l2-g1") - kl(s, "l4-g1")) for s in texts]),
        ),
        Measurement(
            ORDER_G,
            *_over([min(kl(s, "l4-g2") - kl(s, "l4-g1"), kl(s, "l4-g4") - kl(s, "l4-g2")) for s in texts]),
        ),
        Measurement(KD_LM, *_over([cross(s, "narrow-qkv-lm") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(KD_ALL_LM, *_over([cross(s, "narrow-full-lm") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(ALL_KD, *_over([cross(s, "narrow-full-kd") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(DROPPED, *_over([kl(s, "dropped") - kl(s, "l4-g1") for s in texts])),
        Measurement(COPIED, *_over([kl(s, "copied") - kl(s, "l4-g1") for s in texts])),
        Measurement(THROUGHPUT, gain),
        *reported,
    ]


def _over(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds."""
    if not all(map(math.isfinite, values)):
        return None, None  # nothing was lost at conversion, so that no share of it can be won back
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _reported(texts: list[dict[str, Any]], recalls: list[dict[str, Any]], setting: Scale) -> list[Measurement]:
    """The figures behind the claims, arm by arm, without a threshold."""
    rows: list[Measurement] = []

    def row(id: str, what: str, unit: str, source: str, values: list[float]) -> None:
        claim = Claim(id, f"{what} (reported)", source, unit, None, None, "min")
        rows.append(Measurement(claim, *_over(values)))

    swift = [f"l{e}-g{g}" for e, g in setting.arms]
    narrow = {
        f"narrow-{train}-{loss}": f"{said} + {named}, narrow text"
        for train, said in (("qkv", "Q/K/V"), ("full", "all weights"))
        for loss, named in (("kd", "distillation"), ("lm", "LM loss"))
    }
    arms = {name: _title(name) for name in swift} | narrow
    arms |= {"dropped": "upper layers dropped", "copied": "cache of the layer below"}
    base = [seed[swift[0]]["before"]["teacher_cross_entropy"] for seed in texts]
    row("cross-entropy-base", "Cross-entropy: the base", "nats", "text, held out", base)
    for key, said, unit, factor in (
        ("cross_entropy", "Cross-entropy", "nats", 1),
        ("kl", "KL to the base", "nats", 1),
        ("agreement", "Top-1 agreement with the base", "%", 100),
    ):
        for name, title in arms.items():
            for when, then in (("before", "at conversion"), ("after", "distilled")):
                if name in narrow and when == "before":
                    continue  # the same converted model as l = 4/8, g = 1
                if name in narrow:
                    then = "trained"
                values = [factor * seed[name][when][key] for seed in texts]
                row(
                    f"{key}-{name}-{when}".replace("_", "-"), f"{said}: {title}, {then}", unit, "text, held out", values
                )
    for pairs in ("16", "24"):
        for name in ("base", *swift):
            for when, then in (("before", ", at conversion"), ("after", "" if name == "base" else ", distilled")):
                if when in recalls[0][name]:
                    values = [100 * seed[name][when][pairs] for seed in recalls]
                    said = f"Key-value recall at {pairs} pairs: {_title(name)}{then}"
                    row(f"recall-{pairs}-{name}-{when}", said, "%", "generated sequences", values)
    return rows


def _title(name: str) -> str:
    if name == "base":
        return "the base"
    kept, group = name.split("-")
    return f"l = {kept[1:]}/8, g = {group[1:]}"


def _figures(
    texts: list[dict[str, Any]], recalls: list[dict[str, Any]], side: dict[str, Any], setting: Scale
) -> dict[str, Any]:
    names = [f"l{e}-g{g}" for e, g in setting.arms]
    labels = [f"l={e}/8\ng={g}" for e, g in setting.arms]
    places = list(range(len(names)))

    def bars(axes: Any, values: list[list[float]], label: str, shift: float) -> None:
        means = [statistics.mean(v) for v in values]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.bar([p + shift for p in places], means, 0.38, yerr=spreads, capsize=3, label=label)

    quality, axes = figure(
        "Quality lost and won back", "layers kept and layers a group", "KL to the base, nats a token"
    )
    bars(axes, [[seed[n]["before"]["kl"] for seed in texts] for n in names], "at conversion", -0.2)
    bars(axes, [[seed[n]["after"]["kl"] for seed in texts] for n in names], "distilled", 0.2)
    axes.set_xticks(places, labels)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    recall, axes = figure("Key-value recall after distillation", "layers kept and layers a group", "right answers, %")
    for pairs, shift in (("16", -0.2), ("24", 0.2)):
        bars(axes, [[100 * seed[n]["after"][pairs] for seed in recalls] for n in names], f"{pairs} pairs", shift)
        level = statistics.mean(100 * seed["base"]["after"][pairs] for seed in recalls)
        axes.axhline(
            level, color="#0072B2" if pairs == "16" else "#D55E00", linestyle=":", label=f"base, {pairs} pairs"
        )
    axes.set_xticks(places, labels)
    axes.set_ylim(0, 112)
    axes.legend(frameon=False, ncols=2, loc="lower left")
    ablation, axes = figure("Loss and trained weights, narrow text", "arm", "cross-entropy on held-out text, nats")
    cases = ["narrow-qkv-kd", "narrow-qkv-lm", "narrow-full-kd", "narrow-full-lm"]
    values = [[seed[c]["after"]["cross_entropy"] for seed in texts] for c in cases]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.bar(range(4), [statistics.mean(v) for v in values], 0.6, yerr=spreads, capsize=3, color="#0072B2")
    axes.set_xticks(range(4), ["Q/K/V\ndistilled", "Q/K/V\nLM loss", "all\ndistilled", "all\nLM loss"])
    base = statistics.mean(seed["narrow-qkv-kd"]["before"]["teacher_cross_entropy"] for seed in texts)
    start = statistics.mean(seed["narrow-qkv-kd"]["before"]["cross_entropy"] for seed in texts)
    axes.axhline(base, color="#009E73", linestyle=":", label="base")
    axes.axhline(start, color="#D55E00", linestyle=":", label="at conversion")
    axes.set_ylim(min(base, *(min(v) for v in values)) - 0.05)
    axes.legend(frameon=False)
    speed, axes = figure("Prefill time", "prompt, tokens", "seconds")
    lengths = [point["n"] for point in side["curve"]]
    axes.plot(lengths, [point["base_seconds"] for point in side["curve"]], "o-", label="base, our engine")
    axes.plot(lengths, [point["swift_seconds"] for point in side["curve"]], "o-", label="swift, l = L/2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for point in side["curve"]:
        axes.annotate(f"{point['ratio']:.2f}x", (point["n"], point["swift_seconds"]), xytext=(4, -14),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.legend(frameon=False)
    return {"quality": quality, "recall": recall, "ablation": ablation, "prefill": speed}
