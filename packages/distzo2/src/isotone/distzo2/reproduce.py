"""The paper's claims, measured again: a small OPT in real ranks, a modelled link, and on a GPU the paper's shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isotone.distzo2 import __version__, equivalence, offloading, tasks, timing
from isotone.distzo2.findings import CLAIMS
from isotone.distzo2.plots import loss_plot, seconds_plot, sweep_plot, timeline_plot
from isotone.distzo2.ranks import run_ranks
from isotone.distzo2.scales import SCALES, TUNING_SEED, Scale
from isotone.shared import device, progress
from isotone.shared.bench import median_interval
from isotone.shared.claims import ArmLog, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

LN2 = math.log(2)
LORA_RANKS = {"adamw": 0, "lora": 4}
"""Rank of the factors that are trained; 0 trains all weights."""
Arm = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Ratios of two arms timed in turns, a round each."""

    ratios: list[float]


Values = dict[str, list[float] | Rounds]


@dataclasses.dataclass(frozen=True)
class Given:
    """What the scale "paper" is measured on: a model folder, lines of text and label, a causal model's label words."""

    model: Path
    text: Path
    words: tuple[str, ...] = ()


def reproduce(scale: str, run: Run, given: Given | None = None) -> Report:
    """Measure every claim at `scale`; finished arms are not run again. `given`: of the scale "paper"."""
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = SCALES[scale]
    where = device.resolve(setting.device if run.device == "auto" else run.device)
    if setting.needs_model and given is None:
        raise InputError(f"expected --model and --text with --scale {scale}: the paper's checkpoint and examples")
    if setting.needs_gpu and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    return measure(setting, scale, run, where, given)


def measure(setting: Scale, scale: str, run: Run, where: str, given: Given | None = None) -> Report:
    """Every arm in turn; a scale is a setting, never another path."""
    start = time.perf_counter()
    seeds = run.seeds or setting.seeds
    log = ArmLog(run.out, {"version": __version__, "device": where}, run.resume)
    values: Values = {}
    figures: dict[str, Any] = {}
    threads = torch.get_num_threads()
    if where == "cpu":
        # an arm on one thread is comparable with ranks of one thread, and as fast at these sizes
        torch.set_num_threads(1)
    try:
        with progress.bar(f"distzo2 {scale}", None, run.silent) as bar:

            def arm(name: str, config: Any, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
                bar.advance(0, arm=name)
                result = log.arm(f"{name} {config}", function)
                bar.advance(1)
                return result

            if setting.shapes:
                values |= _one_device(setting, arm, where)
                values |= _offloading(setting, arm, where, figures)
            elif given is not None:
                values |= _paper(setting, arm, seeds, given, where, run)
            else:
                rates = _rates(setting, arm, where)
                values |= _equivalences(setting, arm, rates["zo"], where)
                values |= _learning(setting, arm, seeds, rates, figures, where)
                values |= _timing(setting, arm, figures, threads)
    finally:
        torch.set_num_threads(threads)
    return Report(
        package="distzo2",
        kind="reproduce",
        scale=scale,
        seeds=seeds,
        framework="torch",
        measurements=[_measurement(name, values.get(name)) for name in CLAIMS],
        seconds=max(log.seconds, time.perf_counter() - start),
        figures=figures,
    )


def _measurement(name: str, values: list[float] | Rounds | None) -> Measurement:
    """The mean over seeds and its standard error, or the median over rounds and half its 95 % interval; nothing where
    this scale cannot tell."""
    if isinstance(values, Rounds):
        few = len(values.ratios) < 6  # no such interval
        low, high = (0.0, 0.0) if few else median_interval(values.ratios)
        return Measurement(CLAIMS[name], statistics.median(values.ratios), None if few else (high - low) / 2)
    if not values:
        return Measurement(CLAIMS[name], None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measurement(CLAIMS[name], statistics.mean(values), error)


def _rates(setting: Scale, arm: Arm, where: str) -> dict[str, float]:
    """Each method's learning rate, of as many tries, on a seed that is not evaluated."""
    task, config = setting.task, [dataclasses.asdict(setting.task), setting.tuning_steps]
    zo = arm("rate zo", [*config, setting.zo_rates], lambda: _zo_rate(setting, where))
    found = {"zo": zo["rate"]}
    for name, rates in (("adamw", setting.adamw_rates), ("lora", setting.lora_rates)):
        if rates:

            def run(rate: float, lora: int = LORA_RANKS[name]) -> dict[str, Any]:
                # as long as the zeroth-order runs that chose theirs took
                return tasks.first_order(task, rate, zo["seconds"], TUNING_SEED, where, lora)

            choose = functools.partial(tasks.best_rate, rates, run)
            found[name] = arm(f"rate {name}", [*config, rates], functools.partial(_as_rate, choose))["rate"]
    return found


def _as_rate(choose: Callable[[], float]) -> dict[str, float]:
    return {"rate": choose()}


def _on_ranks(function: Callable[..., Any], world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ranks": run_ranks(function, world, arguments)}


def _zo_rate(setting: Scale, where: str) -> dict[str, Any]:
    seconds: list[float] = []

    def run(rate: float) -> dict[str, Any]:
        found = tasks.zeroth_order(setting.task, rate, setting.tuning_steps, TUNING_SEED, where)
        seconds.append(found["seconds"])
        return found

    rate = tasks.best_rate(setting.zo_rates, run)
    return {"rate": rate, "seconds": statistics.mean(seconds)}


def _equivalences(setting: Scale, arm: Arm, lr: float, where: str) -> Values:
    """One process in memory and offloaded, and 2 and 4 ranks."""
    task, steps = setting.task, setting.equal_steps
    config = [dataclasses.asdict(task), steps, lr]
    one = arm("single", config, lambda: equivalence.single(task, lr, steps, 0, where))
    found = {"same-steps": [float(one["differing"])], "same-weights": [float(max(one["weights"], one["replayed"]))]}
    if not setting.ranks:
        return {**found}
    arguments = {"task": dataclasses.asdict(task), "lr": lr, "steps": steps, "seed": 0, "where": where}
    two, four = (
        arm(f"{n} ranks", config, functools.partial(_on_ranks, equivalence.ranks, n, arguments))["ranks"][0]
        for n in (2, 4)
    )
    sharded = (two["ddp"], four["ddp"], four["2d"])
    return {
        **_with_pertp(one, two),
        "shards": [max(equivalence.relative(part["pairs"]) for part in sharded)],
        "bytes": [max(part["bytes"] for part in (two["pertp"], *sharded))],
    }


def _one_device(setting: Scale, arm: Arm, where: str) -> Values:
    """The same steps of one process and of PertP on two that share a GPU, by gloo: nccl refuses them."""
    task, steps, lr = setting.task, setting.equal_steps, setting.zo_rates[0]
    config = [dataclasses.asdict(task), steps, lr]
    one = arm("single", config, lambda: equivalence.single(task, lr, steps, 0, where))
    arguments = {"task": dataclasses.asdict(task), "lr": lr, "steps": steps, "seed": 0, "where": where}
    two = arm("2 ranks", config, functools.partial(_on_ranks, equivalence.ranks, 2, arguments))["ranks"][0]
    return {**_with_pertp(one, two), "bytes": [max(two["pertp"]["bytes"], two["ddp"]["bytes"])]}


def _with_pertp(one: dict[str, Any], two: dict[str, Any]) -> Values:
    """Steps and weights that differ between one process in memory, the same offloaded, its replay, and PertP."""
    steps = sum(a != b for a, b in zip(one["grads"], two["pertp"]["grads"], strict=True))
    weights = sum(a != b for a, b in zip(one["theta"], two["pertp"]["theta"], strict=True))
    return {
        "same-steps": [float(one["differing"] + steps)],
        "same-weights": [float(max(one["weights"], one["replayed"], weights))],
    }


def _learning(
    setting: Scale,
    arm: Arm,
    seeds: tuple[int, ...],
    rates: dict[str, float],
    figures: dict[str, Any],
    where: str,
) -> Values:
    """The keyword task in memory, and first-order training for as long; on ranks, and in the reference's order."""
    task, config = setting.task, [dataclasses.asdict(setting.task), setting.steps, rates]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    for seed in seeds:
        train_zo = functools.partial(tasks.zeroth_order, task, rates["zo"], setting.steps, seed, where)
        zo = arm(f"keyword zo {seed}", config, train_zo)
        runs["zo"].append(zo)
        for name in [name for name in rates if name != "zo"]:
            train = functools.partial(
                tasks.first_order, task, rates[name], zo["seconds"], seed, where, LORA_RANKS[name]
            )
            runs[name].append(arm(f"keyword {name} {seed}", config, train))
    figures["loss-seconds"] = seconds_plot(
        {name: [(run["seconds"], run["losses"]) for run in each] for name, each in runs.items()},
        "Keyword task: training loss by wall time",
        LN2,
    )
    smooth = max(1, setting.steps // 60)
    figures["loss"] = loss_plot(
        {f"seed {seed}": run["losses"] for seed, run in zip(seeds, runs["zo"], strict=True)},
        "Keyword task, zeroth order in memory",
        LN2,
        smooth,
    )
    if not setting.learns:
        return {}
    named = {"keyword": "zo", "adamw": "adamw", "lora": "lora"}
    found: Values = {claim: [LN2 - run["loss"] for run in runs.get(name, [])] for claim, name in named.items()}
    accuracies = {name: [run["accuracy"] for run in each] for name, each in runs.items()}
    found["keyword-accuracy"] = accuracies["zo"]
    tokens = setting.steps * task.rows * task.length
    found["keyword-tokens"] = [tokens / run["seconds"] for run in runs["zo"]]
    found |= {f"accuracy-{name}": accuracies[name] for name in ("adamw", "lora") if name in accuracies}
    return {**found, **_trained_alike(setting, arm, seeds[0], rates["zo"], runs["zo"][0]["accuracy"], where)}


def _trained_alike(setting: Scale, arm: Arm, seed: int, lr: float, memory: float, where: str) -> Values:
    """Accuracies after as many steps at one rate: on four ranks, in the reference's order, and `memory`, of one."""
    if not setting.ranks:
        return {}
    task, steps = setting.task, setting.steps
    config = [dataclasses.asdict(task), steps, lr, seed]
    arguments = {"task": dataclasses.asdict(task), "lr": lr, "steps": steps, "seed": seed, "where": where}
    ours = arm("2d run", config, functools.partial(_on_ranks, equivalence.run_2d, 4, arguments))["ranks"][0]
    theirs = arm("reference run", config, functools.partial(tasks.reference, task, lr, steps, seed, where))
    accuracies = {"2d": ours["accuracy"], "memory": memory, "reference": theirs["accuracy"]}
    apart = max(abs(ours["accuracy"] - accuracies[name]) for name in ("memory", "reference"))
    return {"accuracy": [apart], **{f"accuracy-{name}": [value] for name, value in accuracies.items()}}


def _timing(setting: Scale, arm: Arm, figures: dict[str, Any], threads: int) -> Values:
    """The schedule beside its model, slices over ranks, and real ranks on real cores."""
    sweep = setting.sweep
    swept = arm(
        "sweep",
        dataclasses.asdict(sweep),
        lambda: timing.sweep(sweep.ratios, sweep.layers, sweep.transfer, sweep.rounds),
    )
    points = swept["points"]
    figures["sweep"] = sweep_plot(points, "A throttled link: the step time and its model")
    if swept["spans"]:
        spans = timing.spans_of(swept["spans"])
        figures["timeline"] = timeline_plot(spans, "One step, compute = upload: blocks by lane")
    found: Values = {"overlap": [100 * max(abs(p["measured"] / p["predicted"] - 1) for p in points)]}
    found["overlap-gain"] = [p["serial_measured"] / p["measured"] for p in points if p["ratio"] == 1]
    options = dataclasses.asdict(setting.ablation)
    left_out = arm("ablations", options, functools.partial(timing.ablations, **options))
    ours = left_out["ours"]
    for claim, name in (("deferred", "immediate"), ("overlap", "in turn"), ("naive", "naive")):
        found[f"ablation-{claim}"] = [left_out[name] / ours]
    found["ablation-amp"] = [ours / left_out["half"]]
    if not setting.ranks:
        return found
    sliced = dataclasses.asdict(setting.sliced)
    four = arm("four ranks sliced", sliced, functools.partial(_on_ranks, timing.sliced, 4, sliced))["ranks"]
    slowest = {name: max(rank[name] for rank in four) for name in ("all", "whole", "ddp")}
    found["throughput"] = [four[0]["one"] / slowest["all"]]
    predicted = {n: timing.sliced_seconds(n, sliced) for n in (1, 4)}
    measured = {1: four[0]["one"], 4: slowest["all"]}
    found["slices-law"] = [100 * max(abs(measured[n] / predicted[n] - 1) for n in predicted)]
    found["link-bytes"] = [max(rank["uploaded"] for rank in four)]
    found["ablation-slices"] = [slowest["whole"] / slowest["all"]]
    found["ablation-2d"] = [slowest["ddp"] / slowest["all"]]
    spans = timing.spans_of(four[0]["spans"])
    figures["timeline-sliced"] = timeline_plot(spans, "One step of rank 0 of 4, 2D with slices")
    pert = setting.pert
    arguments = {"shape": pert.shape, "rounds": pert.rounds}
    two = arm("pertp", arguments, functools.partial(_on_ranks, timing.pert_parallel, 2, arguments))["ranks"][0]
    cores = arm("cores", [arguments, threads], lambda: {"seconds": timing.all_cores(pert.shape, pert.rounds, threads)})
    for claim, name in (("pertp", "pertp"), ("ddp", "ddp"), ("cores-limit", "limit")):
        found[claim] = Rounds(two["ratios"][name])
    found["pertp-cores"] = [cores["seconds"] / two["seconds"]["pertp"]]
    return found


def _offloading(setting: Scale, arm: Arm, where: str, figures: dict[str, Any]) -> Values:
    """The paper's shapes on a GPU: offloaded beside resident, with parts left out, and what stays on the device."""
    found: dict[str, list[float]] = {}
    for shape in setting.shapes:
        ours = arm(f"{shape} offloaded", where, functools.partial(offloading.offloaded, shape, where))
        there = arm(f"{shape} resident", where, functools.partial(offloading.resident, shape, where))
        without = arm(f"{shape} left out", where, functools.partial(offloading.left_out, shape, where))
        short = ours["short"]["seconds"]
        for claim, value in (
            ("gpu-speed", there["long"]["seconds"] / ours["long"]["seconds"]),
            ("gpu-naive", without["naive"]["seconds"] / short),
            ("gpu-buckets", without["tensors"]["seconds"] / short),
            ("gpu-overlap", ours["in turn"]["seconds"] / short),
            ("gpu-deferred", ours["immediate"]["seconds"] / short),
            ("gpu-line", ours["bytes"] / ours["bound"]["seconds"] / ours["line_rate"]),
        ):
            found.setdefault(claim, []).append(value)
        spans = timing.spans_of(ours["spans"])
        figures[f"timeline-{shape}"] = timeline_plot(spans, f"One step of {shape}, 1 x 128 tokens: transfers by lane")
        if shape == "opt-13b":
            found["gpu-memory"] = [ours["short"]["used"] / 1e9]
            found["gpu-allocated"] = [ours["short"]["peak"] / 1e9]
    return {claim: [min(values)] for claim, values in found.items()}


def _paper(setting: Scale, arm: Arm, seeds: tuple[int, ...], given: Given, where: str, run: Run) -> Values:
    """The recipe of section 6 (c) on the given model and examples, of the rate whose training loss ends lowest."""
    accuracies = []
    for seed in seeds:
        found = []
        for rate in setting.paper_rates:
            train = functools.partial(
                offloading.finetune, given.model, given.text, rate, seed, where, run.out, words=given.words
            )
            found.append(arm(f"paper {rate} {seed}", [str(given.model), str(given.text), given.words], train))
        last = [statistics.mean(one["losses"][-max(1, len(one["losses"]) // 10) :]) for one in found]
        accuracies.append(found[last.index(min(last))]["accuracy"])
    return {"paper-accuracy": accuracies}
