"""The paper's claims, measured again: every arm from the same weights, through the same sparse training.

SNIP, GraSP, SynFlow and magnitude stand at the initial weights and at CTS's rewind point, once and in rounds; the claim
against SNIP is against the best of its four forms. Times are without compiling: an arm's programs are compiled before
its first run, and what that took is kept apart.
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
import numpy as np

from isotone.concrete_tickets import known, lottery, plots
from isotone.concrete_tickets.arms import Experiment
from isotone.concrete_tickets.batches import accuracy
from isotone.concrete_tickets.claims import MODERATE, SNIPS, TARGET, Outcomes, measure
from isotone.concrete_tickets.images import Images, load_images
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.search import SearchConfig, search
from isotone.concrete_tickets.study import Study
from isotone.concrete_tickets.training import Recipe
from isotone.shared import device
from isotone.shared.claims import ArmLog, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

CTS = ("cts", "cts:kl_forward", "cts:loss", "cts:delta_loss", "cts:feature_mse", "cts:grad_match", "cts:grad_norm")
CTS_FORMS = ("cts@init", "cts:kl+short", "cts:kl+lagrangian", "cts:loss+lagrangian")
TRAINED = ("ltr", "ltr:7", "ltr@init", "gmp")
BASELINES = (
    *SNIPS,
    *("grasp", "grasp@init", "grasp:100", "grasp:100@init", "synflow", "synflow@init"),
    *("magnitude", "magnitude@init", "random", "erk"),
    *("saliency:kl", "saliency:kl+100", "saliency:loss", "saliency:loss+100"),
)
TEACHER_TEST = 4000
VALUES = ("kl", "loss")
"""The objectives that every ticket is evaluated with."""


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: sizes, arms, densities, seeds; never the path."""

    data: str = "digits"
    model: str = "mlp"
    recipe: Recipe = Recipe()
    rewind: int = 3
    config: SearchConfig = SearchConfig(cache_dense="examples")
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = (*CTS, *CTS_FORMS, *TRAINED, *BASELINES)
    curve: tuple[str, ...] = ("cts", "ltr", "snip", "synflow", "magnitude", "random")
    densities: tuple[float, ...] = (0.8**8, 0.8**14, MODERATE, 0.8**24)
    known_epochs: int = 1500
    teacher: bool = True
    dtype: str = "float32"


_RESNET = Scale(
    data="cifar10",
    model="resnet20",
    recipe=Recipe(epochs=160, batch_size=512, weight_decay=1e-3),
    rewind=9,
    config=SearchConfig(epochs=160, batch_size=512),
    dtype="bfloat16",
)
SCALES = {
    "smoke": Scale(
        recipe=Recipe(epochs=4),
        rewind=1,
        config=SearchConfig(epochs=12),
        seeds=(0,),
        arms=("cts", "ltr", "snip", "magnitude"),
        curve=("cts", "magnitude"),
        densities=(MODERATE,),
        known_epochs=50,
        teacher=False,
    ),
    "cpu": Scale(),
    "gpu": dataclasses.replace(
        _RESNET,
        seeds=(0,),
        arms=(
            *("cts", "cts:kl+short", "cts:kl+lagrangian", "ltr", *SNIPS, "synflow", "synflow@init"),
            *("saliency:kl", "saliency:kl+100", "magnitude", "random", "gmp"),
        ),
        curve=(),
        densities=(),
    ),
    "paper": dataclasses.replace(_RESNET, densities=tuple(0.8**n for n in range(2, 33, 2) if n != 22)),
}


def reproduce(scale: str, run: Run, data: str | None = None) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again.

    `data`: another data set than the scale's own, which for gpu and paper is CIFAR-10 in the folder `cifar10` of
    ISOTONE_DATA_DIR and, where there is none, MNIST in `mnist` there or the digits.
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = SCALES[scale]
    if setting.dtype == "bfloat16" and device.resolve(run.device, "jax") != "cuda" and setting.recipe.epochs > 2:
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    begin = time.perf_counter()
    images = load_images(data or _source(setting.data))
    experiment = _experiment(setting, images)
    seeds = run.seeds or setting.seeds
    identity = {"scale": scale, "data": images.sha256, "version": 3, "model": setting.model}
    identity["config"] = repr((experiment.recipe, experiment.config, experiment.rewind, setting.known_epochs))
    log = ArmLog(run.out, identity, run.resume)
    study = Study(experiment, log, run, VALUES)
    table = study.rows(setting.arms, (TARGET,), seeds) + study.rows(setting.curve, setting.densities, seeds)
    equal = _equal_time_rounds(table)
    stopped = [arm for arm in (f"ltr:{equal}", f"ltr:{equal}@init") if arm not in setting.arms]
    table += study.rows(stopped, (TARGET,), seeds)
    dense = [study.dense(seed) for seed in seeds]
    checks = [study.sanity(TARGET, seed) for seed in seeds]
    generators = [log.arm(f"known-{seed}", partial(_known, experiment, setting, seed)) for seed in seeds]
    drawn = [row for row in table if row["arm"] in (setting.curve or setting.arms)]
    figures = {
        "density": plots.accuracy_against_density(drawn, statistics.mean(dense)),
        "time": plots.accuracy_against_time(table, TARGET),
        "layers": plots.layer_densities(drawn, TARGET),
    }
    resnet = setting.model == "resnet20" and images.name == "cifar10"
    return Report(
        "concrete-tickets",
        "reproduce",
        scale,
        seeds,
        "jax",
        measurements=measure(table, checks, generators, dense, equal=equal, judged=scale != "smoke", resnet=resnet),
        data=[{"name": images.name, "sha256": images.sha256}],
        seconds=max(log.seconds, time.perf_counter() - begin),
        figures=figures,
    )


def _experiment(setting: Scale, images: Images) -> Experiment:
    """The scale's network and recipe; the batch is the whole data set where that is smaller."""
    batch = min(setting.recipe.batch_size, len(images.train[1]))
    return Experiment(
        images,
        make_model(setting.model, images.shape, images.classes, setting.dtype),
        dataclasses.replace(setting.recipe, batch_size=batch),
        setting.rewind,
        dataclasses.replace(setting.config, batch_size=batch),
    )


def _equal_time_rounds(table: Sequence[Mapping[str, Any]]) -> int:
    """How many rounds of LTR, with the training after them, fit into CTS's time: 1 at least."""
    outcomes = Outcomes(table)
    training = statistics.median(row["ticket_seconds"] for row in outcomes.of("ltr")) / lottery.rounds_to(TARGET)
    return max(1, int(statistics.median(outcomes.seconds("cts")) / training) - 1)


def _known(experiment: Experiment, setting: Scale, seed: int) -> dict[str, float]:
    """The generators whose best ticket is known: the regression, and a teacher in the MLP."""
    key, found = jax.random.key(seed), {}
    for name, large in (("separated", 2.0), ("normal", None)):
        problem = known.orthonormal_regression(key, large=large)
        result = search(
            *(problem.apply_fn, problem.params, problem.data, 0.1, problem.objective),
            key=key,
            epochs=setting.known_epochs,
            batch_size=200,
        )
        found[f"{name}_exact"] = float(problem.recovered(result.ticket) == problem.best.kept)
        found[f"{name}_energy"] = known.energy(problem, result.ticket)
    if not setting.teacher:
        return found
    shape, examples = experiment.images.shape, len(experiment.data[1])
    network = make_model("mlp", shape, experiment.images.classes)
    weights = network.init(key)
    teacher = known.planted_teacher(key, network.apply, weights, 0.05, shape=shape, examples=examples + TEACHER_TEST)
    x, y = (np.asarray(part) for part in teacher.data)
    result = search(
        *(teacher.apply_fn, teacher.params, (x[:examples], y[:examples]), 0.05, teacher.objective),
        key=key,
        config=experiment.config,
        where=network.where,
        features_fn=network.features,
    )
    sparse, unseen = result.ticket.apply(teacher.params), (x[examples:], y[examples:])
    found["teacher"] = 100 * accuracy(network.apply, sparse, unseen, batch_size=len(experiment.test[1]))
    found["jaccard"] = teacher.jaccard(result.ticket)
    return found


def _source(name: str) -> str:
    """The scale's data where it is at hand, else MNIST, else the digits."""
    folder = os.environ.get("ISOTONE_DATA_DIR")
    if name != "digits" and folder:
        for kind in (name, "mnist"):
            if Path(folder, kind).is_dir():
                return f"{kind}:{Path(folder, kind)}"
    return "digits"
