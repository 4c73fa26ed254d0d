"""The paper's claims, measured again: every arm from the same weights, through the same sparse training.

Thresholds were set before measuring, from the paper (arXiv 2512.07142) and from what a prototype of the specification
saw. SNIP, GraSP, SynFlow and magnitude stand at the initial weights and at CTS's rewind point, once and in rounds;
the claim against SNIP is against the best of its four forms. Times are without compiling: the first seed's arm is run
once before, and what it took is kept apart.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from isotone.concrete_tickets import known, lottery, plots
from isotone.concrete_tickets.arms import Arm, Experiment, Start
from isotone.concrete_tickets.batches import accuracy
from isotone.concrete_tickets.images import load_images
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.sanity import sanity_check
from isotone.concrete_tickets.search import SearchConfig, search
from isotone.concrete_tickets.training import Recipe
from isotone.shared import device, progress
from isotone.shared.claims import ArmLog, Claim, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

PAPER = "arXiv 2512.07142"
TARGET = 0.8**22
SNIPS = ("snip", "snip@init", "snip:100", "snip:100@init")
BASELINES = (
    *SNIPS,
    *("grasp", "grasp@init", "grasp:100", "grasp:100@init", "synflow", "synflow@init"),
    *("magnitude", "magnitude@init", "random", "erk"),
)
CTS = ("cts", "cts:kl_forward", "cts:loss", "cts:delta_loss", "cts:feature_mse", "cts:grad_match", "cts:grad_norm")
TIMED = ("ltr:7", "ltr@init", "gmp")
VALUES = ("kl", "loss")


def _claim(
    id: str, words: str, source: str, unit: str, paper: Any, threshold: float | None, least: bool = True
) -> Claim:
    return Claim(id, words, source, unit, paper, threshold, "min" if least else "max")


SNIP = _claim(
    "above-snip",
    "CTS-KL minus the best of SNIP's four forms, at 0.74 % (mean and s.d. over seeds)",
    f"{PAPER}, ResNet-20 / CIFAR-10: 74.0 and, in the authors' tables, 62.6",
    "points",
    11.4,
    15.0,
)
SNIP_ONCE = _claim(
    "above-snip-once",
    "CTS-KL minus one-shot SNIP at the rewind point, at 0.74 %",
    "the same figures",
    "points",
    11.4,
    15.0,
)
SHUFFLED = _claim(
    "above-shuffled",
    "CTS-KL minus its own ticket shuffled inside each layer, at 0.74 %",
    f"{PAPER}: passes the sanity checks",
    "points",
    None,
    40.0,
)
SPEED = _claim(
    "faster-than-ltr",
    "Seconds of LTR's 22 rounds and training over those of CTS-KL's search and training, compiled",
    f"{PAPER}, abstract: 95.2 and 7.9 minutes",
    "×",
    12.05,
    8.0,
)
LTR = _claim(
    "above-ltr",
    "CTS-KL minus LTR (22 rounds), at 0.74 %",
    f"{PAPER}, abstract: 74.0 and 68.3",
    "points",
    5.7,
    0.0,
)
EQUAL = _claim(
    "above-ltr-equal-time",
    "CTS-KL minus LTR in as many rounds as fit into CTS-KL's time, at 0.74 %",
    "equal time, asked of this reproduction",
    "points",
    None,
    None,
)
NEAR = _claim(
    "near-ltr",
    "Distance of CTS-KL from LTR at 1.44 % (19 rounds)",
    f"{PAPER}: level with LTR at moderate sparsity",
    "points",
    None,
    2.0,
    False,
)
EXACT = _claim(
    "known-ticket",
    "Known optimum, large weights separated: share of seeds whose ticket is exactly it",
    "the specification's orthonormal regression",
    "of seeds",
    None,
    1.0,
)
ENERGY = _claim(
    "known-energy",
    "Known optimum, normal weights: the ticket's energy over the best one's",
    "the same, where 0.92 to 0.95 was seen",
    "ratio",
    None,
    None,
)
TEACHER = _claim(
    "planted-teacher",
    "Planted teacher: accuracy of the found subnetwork, no weight trained",
    "the specification's generator",
    "%",
    None,
    None,
)
JACCARD = _claim(
    "planted-jaccard", "Planted teacher: overlap of the found mask with the planted", "the same", "Jaccard", None, None
)
VALUE = {
    name: _claim(
        f"value-{name}",
        f"{words} of the found ticket at frozen weights over that of the best other mask",
        f"{PAPER}, figure 1: lowest of all",
        "ratio",
        paper,
        1.0,
        False,
    )
    for name, words, paper in (("kl", "Reverse KL", None), ("loss", "Cross-entropy", 0.58))
}
RESNET = _claim("resnet20", "CTS-KL, ResNet-20 / CIFAR-10 at 0.74 %", f"{PAPER}, abstract", "%", 74.0, 72.0)


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: sizes, arms, densities, seeds; never the path."""

    data: str = "digits"
    model: str = "mlp"
    recipe: Recipe = Recipe()
    rewind: int = 3
    config: SearchConfig = SearchConfig()
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = (*CTS, "cts@init", "cts:kl+lagrangian", "ltr", *TIMED, *BASELINES)
    curve: tuple[str, ...] = ("cts", "ltr", "snip", "synflow", "magnitude", "random")
    densities: tuple[float, ...] = (0.8**8, 0.8**14, 0.8**19, 0.8**24)
    known_epochs: int = 1500
    teacher_epochs: int = 60
    dtype: str = "float32"


_CIFAR = Recipe(epochs=160, batch_size=512, weight_decay=1e-3)
SCALES = {
    "smoke": Scale(
        recipe=Recipe(epochs=12),
        config=SearchConfig(epochs=12),
        seeds=(0,),
        arms=("cts", "ltr:2", "snip", "magnitude"),
        curve=(),
        densities=(),
        known_epochs=0,
        teacher_epochs=0,
    ),
    "cpu": Scale(),
    # 40 epochs instead of 160, so that LTR's 22 rounds end in a day's calls; short search: an eighth of the epochs
    "gpu": Scale(
        data="cifar10",
        model="resnet20",
        recipe=dataclasses.replace(_CIFAR, epochs=40),
        rewind=3,
        config=SearchConfig(epochs=40, batch_size=512),
        seeds=(0,),
        arms=("cts", "ltr", "ltr:7", "gmp", *SNIPS, "synflow@init", "magnitude", "random"),
        curve=(),
        densities=(),
        dtype="bfloat16",
    ),
    "paper": Scale(
        data="cifar10",
        model="resnet20",
        recipe=_CIFAR,
        rewind=9,
        config=SearchConfig(epochs=160, batch_size=512),
        densities=tuple(0.8**n for n in range(2, 33, 2) if n != 22),
        dtype="bfloat16",
    ),
}
CLAIMS = (SNIP, SNIP_ONCE, SHUFFLED, SPEED, LTR, EQUAL, NEAR, EXACT, ENERGY, TEACHER, JACCARD, *VALUE.values(), RESNET)


def reproduce(scale: str, run: Run, data: str | None = None) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again.

    `data`: another data set than the scale's own, which for gpu and paper is CIFAR-10 in the folder `cifar10` of
    ISOTONE_DATA_DIR and, where there is none, the digits.
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = SCALES[scale]
    if setting.dtype == "bfloat16" and device.resolve(run.device, "jax") != "cuda" and setting.recipe.epochs > 2:
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    begin = time.perf_counter()
    source = data or _source(setting.data)
    images = load_images(source)
    batch = min(setting.recipe.batch_size, len(images.train[1]))
    experiment = Experiment(
        images,
        make_model(setting.model, images.shape, images.classes, setting.dtype),
        dataclasses.replace(setting.recipe, batch_size=batch),
        setting.rewind,
        dataclasses.replace(setting.config, batch_size=batch),
    )
    seeds = run.seeds or setting.seeds
    identity = {"scale": scale, "data": images.sha256, "version": 1, "model": setting.model}
    identity["config"] = repr((experiment.recipe, experiment.config, experiment.rewind, setting.known_epochs))
    log = ArmLog(run.out, identity, run.resume)
    table = rows(experiment, setting.arms, (TARGET,), seeds, run, identity, log)
    table += rows(experiment, setting.curve, setting.densities, seeds, run, identity, log)
    equal = _equal_time_rounds(table)
    if equal is not None:
        arm = f"ltr:{equal}"
        if arm not in {row["arm"] for row in table if row["density"] == TARGET}:
            table += rows(experiment, (arm,), (TARGET,), seeds, run, identity, log)
    dense = [log.arm(f"dense-{s}", partial(_dense, experiment, s))["accuracy"] for s in seeds]
    checks = [log.arm(f"sanity-{s}", partial(_sanity, experiment, s)) for s in seeds]
    generators = [log.arm(f"known-{s}", partial(_known, setting, s)) for s in seeds] if setting.known_epochs else []
    figures = {
        "density": plots.accuracy_against_density(
            [row for row in table if row["arm"] in (setting.curve or setting.arms)], statistics.mean(dense)
        ),
        "time": plots.accuracy_against_time(table, TARGET),
        "layers": plots.layer_densities(
            [row for row in table if row["arm"] in ("cts", "ltr", "snip", "synflow", "magnitude", "random")], TARGET
        ),
    }
    real = scale in ("gpu", "paper") and images.name == "cifar10"
    return Report(
        "concrete-tickets",
        "reproduce",
        scale,
        seeds,
        "jax",
        measurements=measure(table, checks, generators, dense, equal, scale != "smoke", real),
        data=[{"name": images.name, "sha256": images.sha256}],
        seconds=max(log.seconds, time.perf_counter() - begin),
        figures=figures,
    )


def rows(
    experiment: Experiment,
    arms: Sequence[str],
    densities: Sequence[float],
    seeds: Sequence[int],
    run: Run,
    identity: Mapping[str, Any],
    log: ArmLog | None = None,
) -> list[dict[str, Any]]:
    """Every arm at every density on every seed, as JSON rows; finished ones are read back.

    An arm that is new to this process is run once before its first time is taken ("first_seconds": with compiling).
    """
    config = repr((experiment.recipe, experiment.config, experiment.rewind, experiment.model.name))
    log = log or ArmLog(run.out, {**identity, "config": config}, run.resume)
    starts: dict[int, Start] = {}
    warmed: set[str] = set()
    found = []
    with progress.bar("arms", len(arms) * len(densities) * len(seeds), run.silent) as bar:
        for density in densities:
            for seed in seeds:
                for arm in arms:

                    def one(arm: str = arm, density: float = density, seed: int = seed) -> dict[str, Any]:
                        if seed not in starts:
                            starts[seed] = experiment.start(seed)
                        return _timed(experiment, arm, density, seed, starts[seed], warmed, run.out)

                    bar.advance(0, arm=f"{arm} {density:.3g}")
                    result = log.arm(f"{arm} at {density!r} seed {seed}", one)
                    found.append({"arm": arm, "density": density, "seed": seed, **result})
                    bar.advance(1)
    return found


def _timed(
    experiment: Experiment, arm: str, density: float, seed: int, start: Start, warmed: set[str], out: Path
) -> dict[str, Any]:
    method = Arm.parse(arm).method
    # whatever trains is compiled by one training; the rest compiles the first time it runs
    kind = "train" if method in ("ltr", "gmp") else arm
    first = None
    if kind not in warmed:
        begin = time.perf_counter()
        if kind == "train":
            experiment.finish(start, None)
            experiment.run("magnitude", 0.5, seed, start)
        else:
            experiment.run(arm, density, seed, start)
        first = time.perf_counter() - begin
        warmed.add(kind)
    folder = out / "rounds" / f"{arm.replace(':', '-')}-{density:.6g}-{seed}" if _long(experiment, arm) else None
    outcome = experiment.run(arm, density, seed, start, folder)
    result = {**outcome.summary(), "first_seconds": first, "expected_count": experiment.count(start.initial, density)}
    if method in ("cts", "ltr", "snip", "magnitude", "random", "saliency") and density == TARGET:
        weights = start.weights(Arm.parse(arm).at_init)
        result["values"] = experiment.objective_values(weights, outcome.ticket, VALUES)
    return result


def _long(experiment: Experiment, arm: str) -> bool:
    """Whether rounds are kept on the disk: not where they are so quick that files would be part of the time."""
    return Arm.parse(arm).method == "ltr" and experiment.model.name in ("resnet20", "vgg16")


def _equal_time_rounds(table: Sequence[Mapping[str, Any]]) -> int | None:
    """How many rounds of LTR, with the training after them, fit into CTS's time."""
    cts = [row for row in table if row["arm"] == "cts" and row["density"] == TARGET]
    ltr = [row for row in table if row["arm"] == "ltr" and row["density"] == TARGET]
    if not cts or not ltr:
        return None
    training = statistics.median(row["ticket_seconds"] for row in ltr) / lottery.rounds_to(TARGET)
    budget = statistics.median(row["ticket_seconds"] + row["train_seconds"] for row in cts)
    return max(1, int(budget / training) - 1)


def _dense(experiment: Experiment, seed: int) -> dict[str, float]:
    _, correct, seconds = experiment.finish(experiment.start(seed), None)
    return {"accuracy": 100 * correct, "seconds": seconds}


def _sanity(experiment: Experiment, seed: int) -> dict[str, Any]:
    start = experiment.start(seed)
    result = experiment.search(start, TARGET, Arm("cts"), seed)

    def evaluate(params: Any, ticket: Any) -> float:
        return experiment.finish(start, ticket, weights=params)[1]

    key = jax.random.fold_in(jax.random.key(seed), 4)
    report = sanity_check(result.ticket, start.rewind, evaluate, key=key, scores=result.logits)
    return {"ticket": 100 * report.accuracy, **{name: 100 * value for name, value in report.changed.items()}}


def _known(setting: Scale, seed: int) -> dict[str, float]:
    """The generators whose best ticket is known."""
    key, found = jax.random.key(seed), {}
    for name, large in (("separated", 2.0), ("normal", None)):
        problem = known.orthonormal_regression(key, large=large)
        result = search(
            *(problem.apply_fn, problem.params, problem.data, 0.1, problem.objective),
            key=key,
            epochs=setting.known_epochs,
            batch_size=200,
        )
        found[f"{name}_recovered"] = problem.recovered(result.ticket) / problem.best.kept
        found[f"{name}_energy"] = known.energy(problem, result.ticket)
    network = make_model("mlp", (32,), 10)
    teacher = known.planted_teacher(key, network.apply, network.init(key), 0.05)
    result = search(
        *(teacher.apply_fn, teacher.params, teacher.data, 0.05, teacher.objective),
        key=key,
        epochs=setting.teacher_epochs,
    )
    x = jax.random.normal(jax.random.fold_in(key, 99), (4096, 32))
    y = jnp.argmax(network.apply(teacher.best.apply(teacher.params), x), -1)
    found["teacher"] = 100 * accuracy(network.apply, result.ticket.apply(teacher.params), (x, y))
    found["jaccard"] = teacher.jaccard(result.ticket)
    return found


def measure(
    table: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, float]],
    generators: Sequence[Mapping[str, float]],
    dense: Sequence[float],
    equal: int | None,
    enough: bool,
    real: bool,
) -> list[Measurement]:
    """The claims, paired by seed, and after them every arm's accuracy. Spreads are standard deviations over seeds."""

    def series(arm: str, what: str = "accuracy", density: float = TARGET) -> list[float]:
        return [row[what] for row in table if row["arm"] == arm and row["density"] == density]

    def total(arm: str) -> list[float]:
        return [a + b for a, b in zip(series(arm, "ticket_seconds"), series(arm, "train_seconds"), strict=True)]

    def values(arm: str, name: str) -> list[float]:
        return [row["values"][name] for row in table if row["arm"] == arm and row["density"] == TARGET]

    wrong = [row for row in table if row["kept"] != row["expected_count"]]
    if wrong:
        raise RuntimeError(f"expected {wrong[0]['expected_count']} weights, {wrong[0]['arm']} kept {wrong[0]['kept']}")
    cts = series("cts")
    found: dict[str, Measurement] = {}

    def put(claim: Claim, numbers: Sequence[float]) -> None:
        if numbers and (enough or claim.threshold is None):
            found[claim.id] = Measurement(claim, *mean_spread(numbers))

    snips = [series(arm) for arm in SNIPS if series(arm)]
    if snips:
        best = max(snips, key=statistics.mean)
        put(SNIP, [a - b for a, b in zip(cts, best, strict=True)])
        put(SNIP_ONCE, [a - b for a, b in zip(cts, series("snip"), strict=True)])
    put(SHUFFLED, [check["ticket"] - check["shuffled"] for check in checks])
    if series("ltr"):
        put(SPEED, [b / a for a, b in zip(total("cts"), total("ltr"), strict=True)])
        put(LTR, [a - b for a, b in zip(cts, series("ltr"), strict=True)])
        if equal is not None:
            put(EQUAL, [a - b for a, b in zip(cts, series(f"ltr:{equal}"), strict=True)])
    sides = series("cts", density=0.8**19), series("ltr", density=0.8**19)
    if all(sides):
        gap, spread = mean_spread([a - b for a, b in zip(*sides, strict=True)])
        found[NEAR.id] = Measurement(NEAR, abs(gap), spread)
    if generators:
        exact = [float(g["separated_recovered"] == 1) for g in generators]
        found[EXACT.id] = Measurement(EXACT, statistics.mean(exact))
        put(ENERGY, [g["normal_energy"] for g in generators])
        put(TEACHER, [g["teacher"] for g in generators])
        put(JACCARD, [g["jaccard"] for g in generators])
    others = [a for a in ("snip", "snip:100", "magnitude", "random", "ltr") if series(a)]
    for name, arm in (("kl", "cts"), ("loss", "cts:loss")):
        if enough and series(arm) and others:
            best_other = min(others, key=lambda other: statistics.mean(values(other, name)))
            put(VALUE[name], [a / b for a, b in zip(values(arm, name), values(best_other, name), strict=True)])
    if real:
        put(RESNET, cts)
    listed = [found.get(claim.id, Measurement(claim, None)) for claim in CLAIMS]
    return listed + [*_reported(table, checks, dense)]


def _reported(
    table: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, float]], dense: Sequence[float]
) -> list[Measurement]:
    """Every arm's accuracy at 0.74 %, whoever wins, with its seconds."""
    paper = {"ltr": 68.4, "ltr@init": 68.7, "cts": 74.0, "cts:kl_forward": 72.5, "cts:loss": 72.2, "snip": 62.6}
    paper |= {"synflow@init": 64.6, "magnitude": 61.4, "cts:kl+lagrangian": 67.0}
    found = [Measurement(_accuracy("dense", "The dense network", 92.2), *mean_spread(dense))]
    for arm in dict.fromkeys(row["arm"] for row in table):
        mine = [row for row in table if row["arm"] == arm and row["density"] == TARGET]
        if not mine:
            continue
        seconds = statistics.median(row["ticket_seconds"] + row["train_seconds"] for row in mine)
        collapsed = sum(bool(row["collapsed"]) for row in mine)
        words = f"{arm} at 0.74 %, trained in {seconds:.2g} s" + (
            f"; a layer is cut in {collapsed} of {len(mine)}" if collapsed else ""
        )
        found.append(Measurement(_accuracy(arm, words, paper.get(arm)), *mean_spread([r["accuracy"] for r in mine])))
    for change in checks[0] if checks else ():
        if change != "ticket":
            claim = _accuracy(f"cts-{change}", f"CTS-KL's ticket, {change}", None)
            found.append(Measurement(claim, *mean_spread([check[change] for check in checks])))
    return found


def _accuracy(arm: str, words: str, paper: float | None) -> Claim:
    id = arm.replace(":", "-").replace("@", "-").replace("+", "-").replace("_", "-").replace(".", "-")
    return _claim(
        f"accuracy-{id}", words, "test accuracy; the paper's column is ResNet-20 / CIFAR-10", "%", paper, None
    )


def mean_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over the seeds; None of one seed."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _source(name: str) -> str:
    """The scale's data where it is at hand, and the digits where not."""
    folder = os.environ.get("ISOTONE_DATA_DIR")
    if name == "digits":
        return name
    return f"{name}:{folder}/{name}" if folder and Path(folder, name).is_dir() else "digits"
