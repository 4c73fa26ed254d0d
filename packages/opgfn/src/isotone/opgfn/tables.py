"""The tables of the reproduction: the arms of each, and what they say of the claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from isotone.opgfn import plots
from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.claims import claimed
from isotone.opgfn.envs import MOOGrid
from isotone.opgfn.experiments.grids import TRANSFORMS, hypergrid_arm, moo_arm
from isotone.opgfn.experiments.molecules import MOLECULE_ARMS, MoleculeSetting, molecule_arm
from isotone.opgfn.experiments.strings import NAS_ARMS, nas_arm, string_arm
from isotone.opgfn.scales import MOLECULE_LABELS, TUNING_SEEDS, Scale
from isotone.shared.claims import Claim

Arm = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]
Rows = list[tuple[Claim, list[float]]]
Choice = TypeVar("Choice")
Table = tuple[dict[str, list[float]], dict[str, Any], Rows]
"""Values of claims by id, plots by name, and the figures of each arm behind them."""


def _row(name: str, statement: str, unit: str, values: Iterable[float]) -> tuple[Claim, list[float]]:
    """An arm's own figure, which has no threshold."""
    return claimed(name, statement, "an arm of the claims above", unit, None), list(values)


def _tuned(tried: tuple[Choice, ...], score: Callable[[Choice, int], float]) -> tuple[Choice, list[list[float]]]:
    """What does best on the tuning seeds on average, and how each did; where there is one to choose from, that one."""
    if len(tried) == 1:
        return tried[0], []
    scores = [[score(one, seed) for seed in TUNING_SEEDS] for one in tried]
    means = [statistics.mean(values) for values in scores]
    return tried[means.index(max(means))], scores


def _tries(name: str, what: str, unit: str, tried: Sequence[Any], scores: list[list[float]]) -> Rows:
    """How every try did on the tuning seeds."""
    return [
        _row(f"{name}-{value}", f"{what} {value}, tuning seeds", unit, score)
        for value, score in zip(tried, scores, strict=bool(scores))
    ]


def moo_table(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    moo = setting.moo

    def one(objective: str, beta: float, seed: int) -> dict[str, Any]:
        return arm(f"moo {objective} {beta:g} {seed}", moo, lambda: moo_arm(moo, objective, beta, seed))

    def quality(result: dict[str, Any]) -> float:
        return result["mass"] * result["cells"] / result["of"]

    beta, scores = _tuned(setting.pc_betas, lambda b, seed: quality(one("pc-tb", b, seed)))
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
    arms = {"OP-TB": ours, f"PC-GFN, beta {beta:g}": preference, "TB on mean(u)^4": scalar}
    measures = (("igd_plus", "IGD+"), ("gd_plus", "GD+"), ("r2", "R2"), ("pc_entropy", "PC-ent"))
    rows = [
        _row(f"moo-{what}-{number}".replace("_", "-"), f"branin-currin: {said} of the samples, {name}", "",
             [r[what] for r in results])
        for what, said in measures
        for number, (name, results) in enumerate(arms.items())
    ]  # fmt: skip
    rows += _tries("moo-tried-beta", "branin-currin: mass x coverage of PC-GFN, beta", "", setting.pc_betas, scores)
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
    return values, figures, rows


def hypergrid_table(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
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


def nas_table(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    nas = setting.nas

    def one(name: str, beta: float, label: str | None, seed: int) -> dict[str, Any]:
        return arm(f"nas {name} {beta:g} {label} {seed}", nas, lambda: nas_arm(nas, name, beta, label, seed))

    def final(name: str, seed: int, beta: float = 1.0, label: str | None = None) -> float:
        return one(name, beta, label, seed)["final"]

    beta, scores = _tuned(setting.nas_betas, lambda b, seed: final("tb", seed, beta=b))
    label, tried = _tuned(setting.nas_labels, lambda chosen, seed: final("op-tb", seed, label=chosen))
    options = {"op": (1.0, label), "tb": (beta, None)}
    found = {name: [one(name, *options.get(name[:2], (1.0, None)), seed) for seed in seeds] for name in NAS_ARMS}

    def against(name: str, ours: str = "op-tb-kl-aug") -> list[float]:
        return [o["final"] - r["final"] for o, r in zip(found[ours], found[name], strict=True)]

    values = {
        "nas-beta": against("tb"),
        "nas-plain": against("tb", "op-tb"),
        "nas-beta-aug": against("tb-kl-aug"),
        "nas-evolution": against("evolution"),
        "nas-random": against("random"),
        "nas-reinforce": against("reinforce"),
        "nas-op": [r["final"] for r in found["op-tb"]],
    }
    labels = {
        "op-tb": f"OP-TB, {label}",
        "op-tb-kl-aug": f"OP-TB-KL-AUG, {label}",
        "tb": f"GFN-beta, {beta:g}",
        "tb-kl-aug": f"GFN-beta-KL-AUG, {beta:g}",
        "reinforce": "REINFORCE",
    }
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
    rows += _tries("nas-tried-beta", "NAS stand-in: true value of GFN-beta,", "value", setting.nas_betas, scores)
    rows += _tries("nas-tried-label", "NAS stand-in: true value of OP-TB, label", "value", setting.nas_labels, tried)
    return values, {"nas": drawing}, rows


def strings_table(setting: Scale, seeds: tuple[int, ...], arm: Arm) -> Table:
    strings = setting.strings

    def one(name: str, beta: float, label: str | None, seed: int) -> dict[str, Any]:
        key = f"strings {name} {beta:g} {label} {seed}"
        return arm(key, strings, lambda: string_arm(strings, name, beta, label, seed))

    beta, scores = _tuned(setting.string_betas, lambda b, seed: one("tb", b, None, seed)["top"])
    label, tried = _tuned(setting.string_labels, lambda chosen, seed: one("op-tb", 1.0, chosen, seed)["top"])
    ours = [one("op-tb", 1.0, label, seed) for seed in seeds]
    reward = [one("tb", beta, None, seed) for seed in seeds]
    chance = [one("random", 1.0, None, seed) for seed in seeds]
    arms = {f"OP-TB, {label}": ours, f"TB, beta {beta:g}": reward, "random": chance}
    measures = (
        ("top", "top-100 mean", "value"),
        ("modes", "modes found", "modes"),
        ("evaluations", "strings evaluated", "strings"),
    )
    rows = [
        _row(f"string-{what}-{number}", f"Binding strings: {words}, {name}", unit, (float(r[what]) for r in results))
        for what, words, unit in measures
        for number, (name, results) in enumerate(arms.items())
    ]
    rows += _tries("string-tried-beta", "Binding strings: top-100 mean of TB, beta", "value", setting.string_betas,
                   scores)  # fmt: skip
    rows += _tries("string-tried-label", "Binding strings: top-100 mean of OP-TB, label", "value",
                   setting.string_labels, tried)  # fmt: skip
    return (
        {
            "string-top": [o["top"] - r["top"] for o, r in zip(ours, reward, strict=True)],
            "string-modes": [float(o["modes"] - r["modes"]) for o, r in zip(ours, reward, strict=True)],
            "string-random": [o["top"] - r["top"] for o, r in zip(ours, chance, strict=True)],
        },
        {},
        rows,
    )


def fragments_table(
    setting: Scale, molecules: tuple[MoleculeSetting, ...], seeds: tuple[int, ...], arm: Arm, where: str
) -> Table:
    values: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    rows: list[tuple[Claim, list[float]]] = []
    for number, molecule in enumerate(molecules):
        with Objectives(molecule.objectives, workers=molecule.workers) as scorer:
            found, tries, chosen = _molecule_arms(setting, molecule, seeds, arm, where, scorer)
        ours = found["op-tb"]
        for name, claim in (("random", "random"), ("pc-tb", "pc"), ("gc-tb", "gc"), ("genetic", "genetic")):
            gaps = [o["hypervolume"] - r["hypervolume"] for o, r in zip(ours, found[name], strict=True)]
            values.setdefault(f"fragments-{claim}", []).extend(gaps)
        values.setdefault("fragments-diversity", []).extend(r["diversity"] for r in ours)
        values.setdefault("fragments-diversity-genetic", []).extend(r["diversity"] for r in found["genetic"])
        pair = " x ".join(name.upper() for name in molecule.objectives)
        measures = (
            ("hypervolume", "volume", "hypervolume", "volume"),
            ("diversity", "diversity", "Tanimoto diversity of the front", ""),
            ("igd_plus", "igd", "IGD+ to the extreme faces", ""),
            ("r2", "r2", "R2", ""),
            ("sampled_pc_entropy", "pc-ent", "PC-ent of the final samples", "nats"),
            ("top_diverse", "top", "mean of the best 100 no more alike than 0.7", "value"),
            ("top_diverse_diversity", "top-diversity", "Tanimoto diversity of those", ""),
        )
        for key, short, words, unit in measures:
            for name, results in found.items():
                if key not in results[0]:
                    continue  # random search and the genetic algorithm have no samples
                label = f"{MOLECULE_LABELS.get(name, name)}{chosen.get(name, '')}"
                said = f"Fragments, {pair}: {words} of {label}"
                rows.append(
                    _row(f"{short}-{'-'.join(molecule.objectives)}-{name}", said, unit, [r[key] for r in results])
                )
        rows += tries
        if number == 0:
            figures |= _molecule_plots(found, molecule)
    return values, figures, rows


def _molecule_arms(
    setting: Scale, molecule: MoleculeSetting, seeds: tuple[int, ...], arm: Arm, where: str, scorer: Objectives
) -> tuple[dict[str, list[dict[str, Any]]], Rows, dict[str, str]]:
    """The results of each arm, how every try did on the tuning seed, and what was chosen."""
    pair = "-".join(molecule.objectives)

    def one(name: str, beta: float, label: str | None, seed: int) -> dict[str, Any]:
        def function() -> dict[str, Any]:
            return molecule_arm(molecule, name, beta, label, seed, where, scorer)

        return arm(f"fragments {pair} {name} {beta:g} {label} {seed}", molecule, function)

    def volume(name: str, seed: int, beta: float = 1.0, label: str | None = None) -> float:
        return one(name, beta, label, seed)["hypervolume"]

    rows: Rows = []
    options: dict[str, tuple[float, str | None]] = {}
    chosen: dict[str, str] = {}
    title = f"Fragments, {' x '.join(name.upper() for name in molecule.objectives)}: hypervolume of"
    for name in ("pc-tb", "gc-tb"):
        beta, scores = _tuned(setting.molecule_betas, lambda b, seed: volume(name, seed, beta=b))  # noqa: B023
        options[name], chosen[name] = (beta, None), f", beta {beta:g}"
        said = f"{title} {MOLECULE_LABELS[name]}, beta"
        rows += _tries(f"tried-{pair}-{name}", said, "volume", setting.molecule_betas, scores)
    label, scores = _tuned(setting.molecule_labels, lambda tried, seed: volume("op-tb", seed, label=tried))
    options["op-tb"], chosen["op-tb"] = (1.0, label), f", {label}"
    rows += _tries(f"tried-{pair}-op-tb", f"{title} OP-TB, label", "volume", setting.molecule_labels, scores)
    found = {name: [one(name, *options.get(name, (1.0, None)), seed) for seed in seeds] for name in MOLECULE_ARMS}
    return found, rows, chosen


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
