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
from isotone.shared.claims import ArmLog, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

LN2 = math.log(2)
LORA_RANKS = {"adamw": 0, "lora": 4}
"""Rank of the factors that are trained; 0 trains all weights."""
Arm = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]
Values = dict[str, list[float]]


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
    setting, where = SCALES[scale], device.resolve(run.device)
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
                values |= _offloading(setting, arm, where)
            elif given is not None:
                values |= _paper(setting, arm, seeds, given, where, run)
            else:
                rates = _rates(setting, arm)
                values |= _equivalences(setting, arm, rates["zo"])
                values |= _learning(setting, arm, seeds, rates, figures)
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


def _measurement(name: str, values: list[float] | None) -> Measurement:
    """The mean over seeds or rounds and its standard error; nothing where this scale cannot tell."""
    if not values:
        return Measurement(CLAIMS[name], None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measurement(CLAIMS[name], statistics.mean(values), error)


def _rates(setting: Scale, arm: Arm) -> dict[str, float]:
    """Each method's learning rate, of as many tries, on a seed that is not evaluated."""
    task, config = setting.task, [dataclasses.asdict(setting.task), setting.tuning_steps]
    zo = arm("rate zo", [*config, setting.zo_rates], lambda: _zo_rate(setting))
    found = {"zo": zo["rate"]}
    for name, rates in (("adamw", setting.adamw_rates), ("lora", setting.lora_rates)):
        if rates:

            def run(rate: float, lora: int = LORA_RANKS[name]) -> dict[str, Any]:
                # as long as the zeroth-order runs that chose theirs took
                return tasks.first_order(task, rate, zo["seconds"], TUNING_SEED, lora)

            choose = functools.partial(tasks.best_rate, rates, run)
            found[name] = arm(f"rate {name}", [*config, rates], functools.partial(_as_rate, choose))["rate"]
    return found


def _as_rate(choose: Callable[[], float]) -> dict[str, float]:
    return {"rate": choose()}


def _on_ranks(function: Callable[..., Any], world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ranks": run_ranks(function, world, arguments)}


def _zo_rate(setting: Scale) -> dict[str, Any]:
    seconds: list[float] = []

    def run(rate: float) -> dict[str, Any]:
        found = tasks.zeroth_order(setting.task, rate, setting.tuning_steps, TUNING_SEED)
        seconds.append(found["seconds"])
        return found

    rate = tasks.best_rate(setting.zo_rates, run)
    return {"rate": rate, "seconds": statistics.mean(seconds)}


def _equivalences(setting: Scale, arm: Arm, lr: float) -> Values:
    """One process in memory and offloaded, and 2 and 4 ranks."""
    task, steps = setting.task, setting.equal_steps
    config = [dataclasses.asdict(task), steps, lr]
    one = arm("single", config, lambda: equivalence.single(task, lr, steps, 0))
    differing, weights = one["differing"], max(one["weights"], one["replayed"])
    found: Values = {}
    if setting.ranks:
        arguments = {"task": dataclasses.asdict(task), "lr": lr, "steps": steps, "seed": 0}
        two, four = (
            arm(f"{n} ranks", config, functools.partial(_on_ranks, equivalence.ranks, n, arguments))["ranks"][0]
            for n in (2, 4)
        )
        differing += sum(a != b for a, b in zip(one["grads"], two["pertp"]["grads"], strict=True))
        weights = max(weights, sum(a != b for a, b in zip(one["theta"], two["pertp"]["theta"], strict=True)))
        sharded = (two["ddp"], four["ddp"], four["2d"])
        found["shards"] = [max(equivalence.relative(part["pairs"]) for part in sharded)]
        found["bytes"] = [max(part["bytes"] for part in (two["pertp"], *sharded))]
        found["accuracy"] = [abs(four["run"]["accuracy"] - one["accuracy"])]
    return {"same-steps": [float(differing)], "same-weights": [float(weights)], **found}


def _learning(
    setting: Scale, arm: Arm, seeds: tuple[int, ...], rates: dict[str, float], figures: dict[str, Any]
) -> Values:
    """The keyword task in memory, and first-order training for as long."""
    task, config = setting.task, [dataclasses.asdict(setting.task), setting.steps, rates]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    for seed in seeds:
        train_zo = functools.partial(tasks.zeroth_order, task, rates["zo"], setting.steps, seed)
        zo = arm(f"keyword zo {seed}", config, train_zo)
        runs["zo"].append(zo)
        for name in [name for name in rates if name != "zo"]:
            train = functools.partial(tasks.first_order, task, rates[name], zo["seconds"], seed, LORA_RANKS[name])
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
    found = {claim: [LN2 - run["loss"] for run in runs.get(name, [])] for claim, name in named.items()}
    return {**found, "keyword-accuracy": [run["accuracy"] for run in runs["zo"]]}


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
    if not setting.ranks:
        return found
    sliced = dataclasses.asdict(setting.sliced)
    four = arm("sliced", sliced, functools.partial(_on_ranks, timing.sliced, 4, sliced))["ranks"]
    found["throughput"] = [four[0]["one"] / max(rank["all"] for rank in four)]
    spans = timing.spans_of(four[0]["spans"])
    figures["timeline-sliced"] = timeline_plot(spans, "One step of rank 0 of 4, 2D with slices")
    pert = setting.pert
    arguments = {"shape": pert.shape, "rounds": pert.rounds}
    two = arm("pertp", arguments, functools.partial(_on_ranks, timing.pert_parallel, 2, arguments))["ranks"][0]
    cores = arm("cores", [arguments, threads], lambda: {"seconds": timing.all_cores(pert.shape, pert.rounds, threads)})
    for claim, name in (("pertp", "pertp"), ("ddp", "ddp"), ("cores-limit", "limit")):
        found[claim] = [statistics.median(two["ratios"][name])]
    found["pertp-cores"] = [cores["seconds"] / two["seconds"]["pertp"]]
    return found


def _offloading(setting: Scale, arm: Arm, where: str) -> Values:
    """The paper's shapes on a GPU: offloaded beside resident, and what stays allocated."""
    found: Values = {"gpu-speed": [], "gpu-memory": []}
    speeds = []
    for shape in setting.shapes:
        long = arm(f"{shape} 8", where, functools.partial(offloading.beside_resident, shape, 8, 2048, where))
        speeds.append(long["resident"] / long["offloaded"])
        short = arm(f"{shape} 1", where, functools.partial(offloading.offloaded, shape, 1, 2048, where))
        if shape == "opt-13b":
            found["gpu-memory"] = [short["peak"] / 1e9]
    found["gpu-speed"] = [min(speeds)] if speeds else []
    return found


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
