"""The paper's claims, measured again: every arm beside a fair MLP, the paper's own, and scikit-learn's.

Data: co-authorship Cora, co-citation Cora and Citeseer, the graphs Cora and Citeseer where ISOTONE_DATA_DIR has them;
scikit-learn's digits with nearest-neighbour hyperedges and the synthetic set always.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isotone.lighthgnn import experiments, latency
from isotone.lighthgnn.claims import CLAIMS, GRAPHS, measure
from isotone.lighthgnn.dataset import Dataset, digits_knn, known_dataset
from isotone.lighthgnn.experiments import Recipe
from isotone.lighthgnn.plots import plots
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.shared import device, progress
from isotone.shared.claims import ArmLog, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.data import provenance
from isotone.shared.errors import InputError

SIGNALS = (0.2, 0.8)  # beside the synthetic set's own
HYPERGRAPHS = ("coauthorship-cora", "cocitation-cora", "cocitation-citeseer")


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: sizes, seeds, data; never the path."""

    recipe: Recipe
    seeds: tuple[int, ...]
    synthetic: SyntheticConfig
    real: bool
    signals: tuple[float, ...]
    speed: SyntheticConfig
    batches: tuple[int, ...] = (1, 32)
    least_seeds: int = 3
    digits: bool = True
    stacked: tuple[str, ...] = ("hgnn",)
    """Teachers of which all seeds are trained as one job, on the first `stacked_sets` hypergraphs."""
    stacked_sets: int = 1


_SPEED = SyntheticConfig(num_vertices=55_000, num_edges=27_500)
SCALES = {
    "smoke": Scale(
        Recipe(epochs=10, num_train=10, num_val=20, noise_samples=2, many_samples=3, student_hidden=32, scikit=False),
        *((0,), SyntheticConfig(num_vertices=300, num_edges=150), False, ()),
        SyntheticConfig(num_vertices=1000, num_edges=500),
        batches=(1,),
        digits=False,
    ),
    "cpu": Scale(Recipe(), (0, 1, 2, 3, 4), SyntheticConfig(), True, SIGNALS, _SPEED),
    "gpu": Scale(
        *(Recipe(), tuple(range(20)), SyntheticConfig(), True, SIGNALS),
        SyntheticConfig(num_vertices=1_000_000, num_edges=200_000, dim=256, sizes=(50, 150)),
        batches=(1, 32, 1_000_000),
        stacked=("hgnn", "hgnnp", "hnhn", "unigcn"),
        stacked_sets=3,
    ),
    "paper": Scale(Recipe(), (0, 1, 2, 3, 4), SyntheticConfig(), True, SIGNALS, _SPEED),
}


def reproduce(scale: str, run: Run, recipe: Recipe | None = None) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again."""
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = SCALES[scale]
    if recipe is not None:
        setting = dataclasses.replace(setting, recipe=recipe)
    where = device.resolve(run.device)
    if scale == "gpu" and where != "cuda" and setting.speed.num_vertices > 100_000:
        raise InputError("expected a GPU for --scale gpu, found none; --scale cpu runs here")
    seeds = run.seeds or setting.seeds
    sets = [made.to(where) for made in _data(setting)]
    sources = [made.source for made in sets if made.source] + [_synthetic_source(setting)]
    key = {"recipe": setting.recipe, "synthetic": setting.synthetic, "speed": setting.speed, "device": where}
    log = ArmLog(run.out, {"scale": scale, "data": sources, **key}, run.resume)
    results: dict[str, dict[str, list[Any]]] = {}
    jobs = _jobs(setting, sets, where)
    with progress.bar(f"lighthgnn {scale}", len(jobs) * len(seeds) + 2, run.silent) as bar:
        # the arms of one seed run in turn, so that a slow stretch of the machine falls on all of them
        for seed in seeds:
            for kind, name, function in jobs:
                bar.advance(0, arm=f"{kind} {name} seed {seed}")
                result = log.arm(f"{kind}-{name}-{seed}", lambda f=function, s=seed: f(s))  # type: ignore[misc]
                results.setdefault(kind, {}).setdefault(name, []).append(result)
                bar.advance(1)
        stacked = {made.name: made for made in sets if made.graph is None}
        for name in list(stacked)[: setting.stacked_sets]:
            bar.advance(0, arm=f"teachers of all seeds, {name}")
            function = functools.partial(
                experiments.teachers_together, stacked[name], setting.stacked, seeds, setting.recipe
            )
            results.setdefault("stacked", {})[name] = [log.arm(f"stacked-{name}-{seeds}", function)]
        bar.advance(1)
        speed = log.arm("speed", lambda: _speed(setting, where))["times"]
        bar.advance(1)
        cora = next((made for made in sets if made.name == "coauthorship-cora"), None)
        timed = cora and log.arm("fit", lambda: experiments.fit_seconds(cora, setting.recipe))
        fit = timed["seconds"] if timed else None
    # the synthetic set's own signal is one more point of the sweep
    own = results["hypergraph"]["synthetic"]
    signals = {**results.get("signal", {}), f"{setting.synthetic.signal:g}": own}
    results["signal"] = dict(sorted(signals.items(), key=lambda item: float(item[0])))
    enough = len(seeds) >= setting.least_seeds and scale != "smoke"
    return Report(
        "lighthgnn",
        "reproduce",
        scale,
        seeds,
        "torch",
        measurements=measure(results, speed, fit) if enough else [Measurement(claim, None) for claim in CLAIMS],
        data=sources,
        seconds=log.seconds,
        figures=plots(results),
    )


def _data(setting: Scale) -> list[Dataset]:
    found = [known_dataset(name) for name in (*HYPERGRAPHS, *GRAPHS)] if setting.real else []
    made = [item for item in found if item is not None]
    return [*made, digits_knn()] if setting.digits else made


def _synthetic_source(setting: Scale) -> dict[str, str]:
    made = make_synthetic(setting.synthetic, 0)
    return provenance("synthetic hypergraph, generated (seed 0 hashed)", made.X.numpy().tobytes())


def _jobs(setting: Scale, sets: list[Dataset], where: str) -> list[tuple[str, str, Callable[[int], Any]]]:
    recipe = setting.recipe

    def synthetic(seed: int) -> Dataset:
        made = make_synthetic(setting.synthetic, seed)
        return Dataset("synthetic", made.X, made.y, made.hypergraph).to(where)

    jobs: list[tuple[str, str, Callable[[int], Any]]] = []
    for data in sets:
        arms: Any = experiments.graph_arms if data.graph is not None else experiments.transductive
        if data.name == "coauthorship-cora":
            arms = functools.partial(arms, ablations=True)
        kind = "graph" if data.graph is not None else "hypergraph"
        jobs.append((kind, data.name.removeprefix("planetoid-"), lambda s, d=data, f=arms: f(d, s, recipe)))  # type: ignore[misc]
        if data.name == "coauthorship-cora":
            jobs.append(("production", data.name, lambda s, d=data: experiments.three_settings(d, s, recipe)))  # type: ignore[misc]
    jobs.append(("hypergraph", "synthetic", lambda s: experiments.transductive(synthetic(s), s, recipe)))
    jobs.append(("production", "synthetic", lambda s: experiments.three_settings(synthetic(s), s, recipe)))
    jobs.append(("noise", "synthetic", lambda s: experiments.planted_noise(setting.synthetic, s, recipe)))
    for signal in setting.signals:
        config = dataclasses.replace(setting.synthetic, signal=signal)
        jobs.append(("signal", f"{signal:g}", functools.partial(_signal_arms, config, recipe)))
    return jobs


def _signal_arms(config: SyntheticConfig, recipe: Recipe, seed: int) -> dict[str, Any]:
    return experiments.signal_arms(config, seed, recipe)


def _speed(setting: Scale, where: str) -> dict[str, Any]:
    contest = latency.make_contest(setting.speed, where)
    sizes = [min(batch, setting.speed.num_vertices) for batch in setting.batches]
    return {"times": [latency.answer_times(contest, batch, device=where) for batch in sizes]}
