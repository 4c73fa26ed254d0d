"""The paper's claims, measured again (its grids, architecture search, strings and molecules, at our scale).

Baselines run on the same networks with the same budget; their exponent beta is tuned on a seed that is not evaluated.
The spread is the standard error over seeds of the (paired) figure.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isotone.opgfn import plots
from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.chem.seh import WEIGHTS
from isotone.opgfn.claims import CLAIMS, claimed
from isotone.opgfn.envs import MOOGrid
from isotone.opgfn.experiments.grids import TRANSFORMS, HyperSetting, MOOSetting, hypergrid_arm, moo_arm
from isotone.opgfn.experiments.molecules import MOLECULE_ARMS, MoleculeSetting, molecule_arm
from isotone.opgfn.experiments.strings import NAS_ARMS, NasSetting, StringSetting, nas_arm, string_arm
from isotone.shared import data, device, progress
from isotone.shared.claims import ArmLog, Claim, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

TUNING_SEED = 1000
MOLECULE_LABELS = {"op-tb": "OP-TB", "pc-tb": "PC-GFN", "gc-tb": "GC-GFN", "genetic": "genetic (NSGA-II)"}
TABLES = ("moo-grid", "hypergrid", "nas", "strings", "fragments")


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: sizes, seeds, the grids of beta; never the path."""

    seeds: tuple[int, ...]
    moo: MOOSetting
    hyper: HyperSetting
    nas: NasSetting
    strings: StringSetting
    molecules: tuple[MoleculeSetting, ...]
    pc_betas: tuple[float, ...] = (1.0, 4.0, 16.0, 32.0)
    hyper_betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    nas_betas: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    string_betas: tuple[float, ...] = (1.0, 3.0, 8.0)
    molecule_betas: tuple[float, ...] = (8.0, 24.0, 60.0)
    tables: tuple[str, ...] = TABLES
    needs_gpu: bool = False
    measured: bool = True


def _pairs(**options: Any) -> tuple[MoleculeSetting, ...]:
    names = ("seh", "qed", "sa", "mw")
    return tuple(MoleculeSetting(objectives=(a, b), **options) for i, a in enumerate(names) for b in names[i + 1 :])


_FULL = {"max_fragments": 9, "lr": 1e-4, "channels": 128, "layers": 4, "workers": 15, "warmup": 1000}
SCALES = {
    "smoke": Scale(
        (0,),
        MOOSetting(side=8, steps=12, batch=16, samples=64, preferences=4),
        HyperSetting(side=8, steps=6, batch=8, offline=8, samples=32, points=2),
        NasSetting(initial=12, rounds=1, proposals=4, steps=2, batch=8, width=16),
        StringSetting(budget=60, steps=2, batch=8, offline=8, width=16, top=10),
        (MoleculeSetting(max_fragments=2, budget=24, steps=2, batch=8, channels=16, layers=1, warmup=8, samples=8),),
        *((4.0,), (1.0, 4.0), (8.0,), (3.0,), (8.0,)),
        measured=False,
    ),
    "cpu": Scale((0, 1, 2), MOOSetting(), HyperSetting(), NasSetting(), StringSetting(), (MoleculeSetting(),)),
    # section 6 (b): fragments on a GPU, the pairs that need no weights first
    "gpu": Scale(
        (0, 1, 2),
        *(MOOSetting(), HyperSetting(), NasSetting(), StringSetting()),
        _pairs(budget=400_000, steps=3000, batch=256, samples=3200, **_FULL),
        molecule_betas=(60.0,),
        tables=("fragments",),
        needs_gpu=True,
    ),
    # section 6 (c): the recipe of the paper, apart from the data that can not be had
    "paper": Scale(
        (0, 1, 2),
        MOOSetting(steps=1000),
        HyperSetting(steps=2000),
        NasSetting(rounds=50, steps=200),
        StringSetting(budget=60_000, steps=2000),
        _pairs(budget=1_300_000, steps=20_000, batch=64, samples=3200, **_FULL),
        needs_gpu=True,
    ),
}


def reproduce(scale: str, run: Run, tables: tuple[str, ...] = ()) -> Report:
    """Measure every claim at `scale` (of `tables` only, where some are given); finished arms are not run again."""
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise InputError(f"expected --table to be one of {', '.join(TABLES)}, got {unknown[0]!r}")
    setting, where = SCALES[scale], device.resolve(run.device)
    if setting.needs_gpu and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    return measure(setting, scale, run, tables or setting.tables, where)


def measure(setting: Scale, scale: str, run: Run, tables: tuple[str, ...], where: str) -> Report:
    """Every table in turn; a scale is a setting, never another path."""
    start = time.perf_counter()
    seeds = run.seeds or setting.seeds
    found: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    reported: list[tuple[Claim, list[float]]] = []
    log = ArmLog(run.out, {"version": 1, "device": where}, run.resume)
    molecules = available(setting.molecules)
    with progress.bar(f"opgfn {scale}", None, run.silent) as bar:

        def arm(name: str, config: Any, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            bar.advance(0, arm=name)
            key = f"{name} {dataclasses.asdict(config)}"
            result = log.arm(key, function)
            bar.advance(1)
            return result

        table: dict[str, Callable[[], Table]] = {
            "moo-grid": lambda: _moo(setting, seeds, arm),
            "hypergrid": lambda: _hypergrid(setting, seeds, arm),
            "nas": lambda: _nas(setting, seeds, arm),
            "strings": lambda: _strings(setting, seeds, arm),
            "fragments": lambda: _fragments(setting, molecules, seeds, arm, where),
        }
        for name in tables:
            values, drawings, rows = table[name]()
            found |= values
            figures |= drawings
            reported += rows
    used = [] if "fragments" not in tables or not any("seh" in m.objectives for m in molecules) else [_seh_provenance()]
    return Report(
        package="opgfn",
        kind="reproduce",
        scale=scale,
        seeds=seeds,
        framework="torch",
        measurements=[
            *(measurement(claim, found.get(claim.id), setting.measured) for claim in CLAIMS.values()),
            *(measurement(claim, values, setting.measured) for claim, values in reported),
        ],
        data=used,
        seconds=max(log.seconds, time.perf_counter() - start),
        figures=figures,
    )


def measurement(claim: Claim, values: list[float] | None, measured: bool) -> Measurement:
    """Mean and standard error over seeds; what this scale cannot tell is None."""
    if not values or not measured:
        return Measurement(claim, None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measurement(claim, statistics.mean(values), error)


def available(settings: tuple[MoleculeSetting, ...]) -> tuple[MoleculeSetting, ...]:
    """Without the weights of the sEH proxy, the pairs that need them are left out."""
    if data.local(WEIGHTS) is not None:
        return settings
    return tuple(setting for setting in settings if "seh" not in setting.objectives)


def _seh_provenance() -> dict[str, str]:
    path = data.local(WEIGHTS)
    assert path is not None
    return data.provenance("sEH proxy weights (Bengio et al., 2021)", Path(path))


Arm = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]
Table = tuple[dict[str, list[float]], dict[str, Any], list[tuple[Claim, list[float]]]]
"""Values of claims by id, plots by name, and the figures of each arm behind them."""


def _row(name: str, statement: str, unit: str, values: Iterable[float]) -> tuple[Claim, list[float]]:
    """An arm's own figure, which has no threshold."""
    return claimed(name, statement, "an arm of the claims above", unit, None), list(values)


def _tuned(betas: tuple[float, ...], score: Callable[[float], float]) -> float:
    """The exponent that does best on the tuning seed; where there is one to choose from, that one."""
    return betas[0] if len(betas) == 1 else max(betas, key=score)


def _moo(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    moo = setting.moo

    def one(objective: str, beta: float, seed: int) -> dict[str, Any]:
        return arm(f"moo {objective} {beta:g} {seed}", moo, lambda: moo_arm(moo, objective, beta, seed))

    def quality(result: dict[str, Any]) -> float:
        return result["mass"] * result["cells"] / result["of"]

    beta = _tuned(setting.pc_betas, lambda b: quality(one("pc-tb", b, TUNING_SEED)))
    ours, preference, scalar = [], [], []
    for seed in seeds:
        ours.append(one("op-tb", 1.0, seed))
        preference.append(one("pc-tb", beta, seed))
        scalar.append(one("tb", 4.0, seed))
    pairs = list(zip(ours, preference, scalar, strict=True))
    values = {
        "moo-mass": [o["mass"] for o in ours],
        "moo-cells": [float(o["cells"]) for o in ours],
        "moo-pc": [quality(o) - quality(p) for o, p, _ in pairs],
        "moo-scalar": [o["mass"] / s["mass"] for o, _, s in pairs],
        "moo-entropy": [o["pc_entropy"] - p["pc_entropy"] for o, p, _ in pairs],
        "moo-pc-mass": [p["mass"] for p in preference],
        "moo-pc-cells": [float(p["cells"]) for p in preference],
    }
    first = ours[0]
    states, marked = np.array(first["states"]), np.array(first["front"])
    mass = {
        "OP-TB": np.array(first["distribution"]),
        f"PC-GFN, beta {beta:g}": np.array(preference[0]["distribution"]),
        "TB on mean(u)^4": np.array(scalar[0]["distribution"]),
    }
    u = MOOGrid(moo.objectives, moo.side).objective(torch.from_numpy(states)).numpy()
    clouds = {name: np.array(r["samples"]) for name, r in (("PC-GFN", preference[0]), ("OP-TB", first))}
    figures = {
        "mass": plots.mass_figure(states, mass, marked, "Exact terminal mass; circles: Pareto cells"),
        "front": plots.front_figure(clouds, u[marked], moo.objectives, "Samples and the true front"),
    }
    return values, figures, []


def _hypergrid(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    hyper = setting.hyper

    def one(objective: str, beta: float, seed: int, r0: float = 0.1, transform: str = "u") -> dict[str, Any]:
        name = f"hypergrid {objective} {beta:g} {seed} {r0:g} {transform}"
        return arm(name, hyper, lambda: hypergrid_arm(hyper, objective, beta, seed, r0=r0, transform=transform))

    ours = [one("op-tb", 1.0, seed) for seed in seeds]
    reward = {beta: [one("tb", beta, seed) for seed in seeds] for beta in setting.hyper_betas}
    # what an order does not see: one seed, other values
    same = [one("op-tb", 1.0, seeds[0], 0.1, transform) for transform in TRANSFORMS[1:]]
    same += [one("op-tb", 1.0, seeds[0], r0) for r0 in (0.01, 0.001)]
    change = max(
        abs(a - b)
        for other in same
        for part in ("mass", "entropy", "modes")
        for a, b in zip(other["curve"][part], ours[0]["curve"][part], strict=True)
    )
    ranked = sorted(reward, key=lambda beta: statistics.mean(r["score"] for r in reward[beta]))
    second, worst, best = reward[ranked[min(1, len(ranked) - 1)]], ranked[0], ranked[-1]
    values = {
        "hyper-beta": [o["score"] - s["score"] for o, s in zip(ours, second, strict=True)],
        "hyper-op": [o["score"] for o in ours],
        "hyper-best": [r["score"] for r in reward[best]],
        "hyper-worst": [r["score"] for r in reward[worst]],
        "hyper-modes": [float(o["modes"]) for o in ours],
        "hyper-order": [float(change)],
        "hyper-sparse": [o["curve"]["entropy"][-1] - o["curve"]["entropy"][0] for o in ours],
        "hyper-fall": [o["curve"]["entropy"][-1] - max(o["curve"]["entropy"]) for o in ours],
    }

    def curves(part: Callable[[dict[str, Any]], list[float]]) -> dict[str, tuple[list[Any], np.ndarray]]:
        steps = ours[0]["curve"]["steps"]
        labels = {worst: ", worst", best: ", best"}
        found = {"OP-TB": (steps, np.array([part(o) for o in ours]))}
        for beta, results in reward.items():
            found[f"TB, beta {beta:g}{labels.get(beta, '')}"] = (steps, np.array([part(r) for r in results]))
        return found

    total = 2**hyper.dim

    def scores(result: dict[str, Any]) -> list[float]:
        curve = result["curve"]
        return [m * n / total for m, n in zip(curve["mass"], curve["modes"], strict=True)]

    figures = {
        "hypergrid": plots.curve_figure(curves(scores), "HyperGrid, same replay", "step", "mass x (modes / 4)"),
        "entropy": plots.curve_figure(
            curves(lambda r: r["curve"]["entropy"]), "Entropy of the exact distribution", "step", "nats"
        ),
    }
    said = {worst: ", the worst", best: ", the best"}
    rows = [
        _row(
            f"hyper-beta-{beta:g}",
            f"HyperGrid: mass x (modes / 4) of TB, beta {beta:g}{said.get(beta, '')}",
            "score",
            (r["score"] for r in results),
        )
        for beta, results in reward.items()
    ]
    return values, figures, rows


def _nas(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    nas = setting.nas

    def one(name: str, beta: float, seed: int) -> dict[str, Any]:
        return arm(f"nas {name} {beta:g} {seed}", nas, lambda: nas_arm(nas, name, beta, seed))

    beta = _tuned(setting.nas_betas, lambda b: one("tb", b, TUNING_SEED)["final"])
    found = {name: [one(name, beta if name == "tb" else 1.0, seed) for seed in seeds] for name in NAS_ARMS}

    def against(name: str) -> list[float]:
        return [o["final"] - r["final"] for o, r in zip(found["op-tb-kl-aug"], found[name], strict=True)]

    values = {
        "nas-beta": against("tb"),
        "nas-evolution": against("evolution"),
        "nas-random": against("random"),
        "nas-reinforce": against("reinforce"),
        "nas-op": [r["final"] for r in found["op-tb"]],
    }
    labels = {"op-tb": "OP-TB", "op-tb-kl-aug": "OP-TB-KL-AUG", "tb": f"GFN-beta, {beta:g}", "reinforce": "REINFORCE"}
    length = min(len(r["incumbent"]) for results in found.values() for r in results)
    curves = {
        labels.get(name, name): (list(range(1, length + 1)), np.array([r["incumbent"][:length] for r in results]))
        for name, results in found.items()
    }
    drawing = plots.curve_figure(curves, "True value of the incumbent", "cells evaluated", "value")
    rows = [
        _row(
            f"nas-value-{name}",
            f"NAS stand-in: true value, {labels.get(name, name)}",
            "value",
            [r["final"] for r in results],
        )
        for name, results in found.items()
        if name != "op-tb"
    ]
    return values, {"nas": drawing}, rows


def _strings(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    strings = setting.strings

    def one(name: str, beta: float, seed: int) -> dict[str, Any]:
        return arm(f"strings {name} {beta:g} {seed}", strings, lambda: string_arm(strings, name, beta, seed))

    beta = _tuned(setting.string_betas, lambda b: one("tb", b, TUNING_SEED)["top"])
    ours = [one("op-tb", 1.0, seed) for seed in seeds]
    reward = [one("tb", beta, seed) for seed in seeds]
    chance = [one("random", 1.0, seed) for seed in seeds]
    arms = {"OP-TB": ours, f"TB, beta {beta:g}": reward, "random": chance}
    rows = [
        _row(f"string-{what}-{number}", f"Binding strings: {words}, {name}", unit, (float(r[what]) for r in results))
        for what, words, unit in (("top", "top-100 mean", "value"), ("modes", "modes found", "modes"))
        for number, (name, results) in enumerate(arms.items())
    ]
    return (
        {
            "string-top": [o["top"] - r["top"] for o, r in zip(ours, reward, strict=True)],
            "string-modes": [float(o["modes"] - r["modes"]) for o, r in zip(ours, reward, strict=True)],
            "string-random": [o["top"] - r["top"] for o, r in zip(ours, chance, strict=True)],
        },
        {},
        rows,
    )


def _fragments(
    setting: Scale, molecules: tuple[MoleculeSetting, ...], seeds: tuple[int, ...], arm: Arm, where: str
) -> Table:
    values: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    rows: list[tuple[Claim, list[float]]] = []
    for number, molecule in enumerate(molecules):
        with Objectives(molecule.objectives, workers=molecule.workers) as scorer:
            found = _molecule_arms(setting, molecule, seeds, arm, where, scorer)
        ours = found["op-tb"]
        for name, claim in (("random", "random"), ("pc-tb", "pc"), ("gc-tb", "gc"), ("genetic", "genetic")):
            gaps = [o["hypervolume"] - r["hypervolume"] for o, r in zip(ours, found[name], strict=True)]
            values.setdefault(f"fragments-{claim}", []).extend(gaps)
        values.setdefault("fragments-diversity", []).extend(r["diversity"] for r in ours)
        values.setdefault("fragments-diversity-genetic", []).extend(r["diversity"] for r in found["genetic"])
        pair = " x ".join(name.upper() for name in molecule.objectives)
        for name, results in found.items():
            said = f"Fragments, {pair}: {{}} of {MOLECULE_LABELS.get(name, name)}"
            key = f"{'-'.join(molecule.objectives)}-{name}"
            volumes, spreads = [r["hypervolume"] for r in results], [r["diversity"] for r in results]
            rows.append(_row(f"volume-{key}", said.format("hypervolume"), "volume", volumes))
            rows.append(_row(f"diversity-{key}", said.format("Tanimoto diversity of the front"), "", spreads))
        if number == 0:
            figures |= _molecule_plots(found, molecule)
    return values, figures, rows


def _molecule_arms(
    setting: Scale, molecule: MoleculeSetting, seeds: tuple[int, ...], arm: Arm, where: str, scorer: Objectives
) -> dict[str, list[dict[str, Any]]]:
    pair = "-".join(molecule.objectives)

    def one(name: str, beta: float, seed: int) -> dict[str, Any]:
        def function() -> dict[str, Any]:
            return molecule_arm(molecule, name, beta, seed, where, scorer)

        return arm(f"fragments {pair} {name} {beta:g} {seed}", molecule, function)

    beta = _tuned(setting.molecule_betas, lambda b: one("pc-tb", b, TUNING_SEED)["hypervolume"])
    goal = _tuned(setting.molecule_betas, lambda b: one("gc-tb", b, TUNING_SEED)["hypervolume"])
    exponent = {"pc-tb": beta, "gc-tb": goal}
    return {name: [one(name, exponent.get(name, 1.0), seed) for seed in seeds] for name in MOLECULE_ARMS}


def _molecule_plots(found: dict[str, list[dict[str, Any]]], molecule: MoleculeSetting) -> dict[str, Any]:
    fronts = {MOLECULE_LABELS.get(name, name): np.array(results[0]["front"]) for name, results in found.items()}
    names = [name.upper() for name in molecule.objectives]
    length = min(len(r["curve"][0]) for results in found.values() for r in results)
    curves = {
        MOLECULE_LABELS.get(name, name): (
            results[0]["curve"][0][:length],
            np.array([r["curve"][1][:length] for r in results]),
        )
        for name, results in found.items()
    }
    best = found["op-tb"][0]
    captions = [", ".join(f"{n} {v:.2f}" for n, v in zip(names, row, strict=True)) for row in best["front"]]
    title = "OP-TB's front of molecules"
    return {
        "fragments-front": plots.front_figure(fronts, None, names, "Fronts at equal unique calls"),
        "fragments-hypervolume": plots.curve_figure(curves, "Hypervolume", "distinct molecules evaluated", "volume"),
        "molecules": plots.molecules_figure(best["smiles"], captions, title),
    }
