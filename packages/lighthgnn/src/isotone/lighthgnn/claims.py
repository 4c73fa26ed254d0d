"""What the paper claims, and how each claim is read off the arms.

Thresholds are the paper's where it has a figure, a target of this package where it has none at hand, else what its
sentence means (a gain is above 0). Claims whose source says "exploratory" were added when the first of their kind was
known to fall short; their thresholds are those of the first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from isotone.shared.claims import Claim, Measurement

PAPER = "arXiv 2402.04296"
EXPLORATORY = "; exploratory"
TARGET = "target of this package; the paper's figure for this set was not at hand"
GRAPHS = ("cora", "citeseer")
BASELINES = ("fair MLP", "paper's MLP", "logistic regression", "label spreading", "label spreading on hypergraph")


def _gain(id: str, words: str, threshold: float) -> Claim:
    return Claim(id, words, TARGET, "points", None, threshold, "min")


GAINS = {
    ("coauthorship-cora", "LightHGNN"): _gain(
        "cora-gain", "Co-authorship Cora: LightHGNN above the fair MLP (no batch norm)", 8.0
    ),
    ("coauthorship-cora", "LightHGNN+"): _gain(
        "cora-gain-plus", "Co-authorship Cora: LightHGNN+ above the fair MLP", 8.0
    ),
    ("synthetic", "LightHGNN+"): _gain(
        "synthetic-gain-plus", "Synthetic, a = 0.35: LightHGNN+ above the fair MLP", 8.0
    ),
    ("synthetic", "LightHGNN"): _gain("synthetic-gain", "Synthetic, a = 0.35: LightHGNN above the fair MLP", 8.0),
    ("cocitation-cora", "LightHGNN+"): _gain(
        "cocitation-gain-plus", "Co-citation Cora (47 % isolated): LightHGNN+ above the fair MLP", 0.0
    ),
    ("cocitation-citeseer", "LightHGNN+"): _gain(
        "citeseer-gain-plus", "Co-citation Citeseer (56 % isolated): LightHGNN+ above the fair MLP", 0.0
    ),
    ("digits", "LightHGNN+"): _gain("digits-gain-plus", "Digits-kNN: LightHGNN+ above the fair MLP", 0.0),
}
HEADLINE = {
    arm: Claim(
        f"mean-gain{tag}",
        f"{words} above the paper's MLP (batch norm), mean over the hypergraph sets at hand",
        f"{PAPER}, abstract: mean over 8 sets" + (EXPLORATORY if tag == "-calibrated" else ""),
        "points",
        16.3,
        16.3,
        "min",
    )
    for arm, tag, words in (
        ("LightHGNN+", "", "LightHGNN+"),
        ("LightHGNN", "-light", "LightHGNN"),
        ("LightHGNN+, calibrated teacher", "-calibrated", "LightHGNN+ of a calibrated teacher"),
    )
}
OWN_SETS = ("coauthorship-cora", "cocitation-cora", "cocitation-citeseer")
OWN = Claim(
    "mean-gain-own-sets",
    "LightHGNN+ above the paper's MLP, mean over the paper's own sets at hand (co-authorship Cora, co-citation Cora "
    "and Citeseer)",
    f"{PAPER}, abstract: mean over 8 sets{EXPLORATORY}",
    "points",
    16.3,
    16.3,
    "min",
)
TEACHER = {
    name: Claim(
        f"cora-teacher-{tag}",
        f"Co-authorship Cora: {name} minus its teacher HGNN",
        f"{PAPER}: competitive or better",
        "points",
        "competitive or better",
        -1.0,
        "min",
    )
    for name, tag in (("LightHGNN", "light"), ("LightHGNN+", "plus"))
}
GRAPH = {
    arm: Claim(
        f"graphs-best{tag}",
        f"Graphs Cora and Citeseer: {words}, mean over the graphs",
        f"{PAPER}, graphs: best on average" + (EXPLORATORY if tag == "-calibrated" else ""),
        "points",
        "best on average",
        0.0,
        "min",
    )
    for arm, tag, words in (
        ("LightHGNN+", "", "LightHGNN+ minus the better of GLNN and reliability KD"),
        ("LightHGNN", "-light", "LightHGNN minus the better of GLNN and reliability KD"),
        ("LightHGNN+, calibrated teacher", "-calibrated",
         "LightHGNN+ of a calibrated teacher minus the best of GLNN and reliability KD, theirs calibrated or not"),
    )
}  # fmt: skip
AUC = {
    way: Claim(
        "noise-auc" if way == "default" else f"noise-auc-{way}",
        f"Synthetic: reliability ranks true hyperedges above planted noise (AUC), {words}",
        f"{PAPER}, reliable hyperedges" + ("" if way == "default" else EXPLORATORY),
        "AUC",
        None,
        0.5,
        "min",
    )
    for way, words in (
        ("default", "multiplicative noise, 5 draws"),
        ("additive", "additive noise, 50 draws"),
        ("calibrated", "calibrated teacher, 50 draws"),
        ("vertices", "changes of vertices that do not cancel, 50 draws"),
        ("both", "calibrated teacher and changes that do not cancel, 50 draws"),
    )
}
GAP = Claim(
    "noise-gap",
    "Synthetic: mean reliability of true hyperedges minus that of planted noise",
    f"{PAPER}, reliable hyperedges",
    "",
    None,
    0.0,
    "min",
)
SHRINKS = Claim(
    "gain-shrinks",
    "Synthetic: gain over the fair MLP at the weakest features minus at the strongest",
    "what a hypergraph can add shrinks as features suffice",
    "points",
    None,
    0.0,
    "min",
)
PRODUCTION = {
    name: Claim(
        f"production-{name}",
        f"Production, 90 % of the test vertices unseen, {words}: LightHGNN+ above the fair MLP",
        f"{PAPER}: a gain in this setting too; its figures were not at hand",
        "points",
        None,
        0.0,
        "min",
    )
    for name, words in (("coauthorship-cora", "co-authorship Cora"), ("synthetic", "synthetic"))
}
INDUCTIVE = {
    name: dataclasses.replace(
        claim, id=f"inductive-{name}", statement=claim.statement.replace("Production,", "Inductive, those alone,")
    )
    for name, claim in PRODUCTION.items()
}
PRODUCTION_TEACHER = {
    name: dataclasses.replace(
        claim,
        id=f"production-teacher-{name}",
        statement=claim.statement.replace("LightHGNN+ above the fair MLP", "LightHGNN+ minus its teacher"),
        threshold=-1.0,
    )
    for name, claim in PRODUCTION.items()
}
INT8 = Claim(
    "int8",
    "Co-authorship Cora: LightHGNN+ with int8 weights minus itself",
    "target of this package; the paper gives none",
    "points",
    None,
    -0.2,
    "min",
)
TOPOLOGY = {
    pair: Claim(
        f"topology-{tag}",
        f"Co-authorship Cora: normalised topology-aware score of {words}",
        f"{PAPER}: LightHGNN+ lies between MLP and HGNN",
        "",
        None,
        0.0,
        "min",
    )
    for pair, tag, words in (
        (("paper's MLP", "LightHGNN+"), "mlp", "the paper's MLP minus LightHGNN+"),
        (("LightHGNN+", "teacher"), "teacher", "LightHGNN+ minus its teacher"),
    )
}
TOGETHER = Claim(
    "stacked-teachers",
    "Co-authorship Cora: HGNN of all seeds trained as one job minus trained one by one",
    "target of this package; the paper gives none",
    "points",
    None,
    -1.0,
    "min",
)
FIT = Claim(
    "fit-seconds",
    "Co-authorship Cora: teacher, reliability and LightHGNN+ trained",
    "target of this package; the paper gives none",
    "s",
    None,
    6.0,
    "max",
)
SPEED = Claim(
    "speed-55000",
    "55,000 vertices, one unseen vertex: student against the faster of closure and factored pass",
    f"{PAPER}, figure of inference time",
    "times",
    100.0,
    100.0,
    "min",
)
CLAIMS = (
    *GAINS.values(),
    *HEADLINE.values(),
    OWN,
    *TEACHER.values(),
    *GRAPH.values(),
    *AUC.values(),
    GAP,
    SHRINKS,
    *PRODUCTION.values(),
    *INDUCTIVE.values(),
    *PRODUCTION_TEACHER.values(),
    *TOPOLOGY.values(),
    INT8,
    TOGETHER,
    FIT,
    SPEED,
)


def measure(
    results: dict[str, dict[str, list[Any]]], speed: list[dict[str, Any]], fit: float | None
) -> list[Measurement]:
    """The claims from the arms, differences taken seed by seed. Spreads are standard deviations over the seeds."""

    def accuracies(kind: str, name: str, arm: str) -> list[float] | None:
        runs = results.get(kind, {}).get(name)
        return None if runs is None else [run["accuracy"][arm] for run in runs]

    def difference(claim: Claim, ours: list[float] | None, theirs: list[float] | None) -> Measurement:
        if ours is None or theirs is None:
            return Measurement(claim, None)
        return Measurement(claim, *_mean_std([a - b for a, b in zip(ours, theirs, strict=True)]))

    def against(claim: Claim, kind: str, name: str, arm: str, other: str) -> Measurement:
        return difference(claim, accuracies(kind, name, arm), accuracies(kind, name, other))

    found = [against(claim, "hypergraph", name, arm, "fair MLP") for (name, arm), claim in GAINS.items()]
    names = list(results["hypergraph"])
    for arm, claim in HEADLINE.items():
        ours = _columns_mean(accuracies("hypergraph", name, arm) for name in names)
        theirs = _columns_mean(accuracies("hypergraph", name, "paper's MLP") for name in names)
        found.append(difference(claim, ours, theirs))
    own = [name for name in OWN_SETS if name in names]
    of = {arm: _columns_mean(accuracies("hypergraph", n, arm) for n in own) for arm in ("LightHGNN+", "paper's MLP")}
    found.append(difference(OWN, of["LightHGNN+"], of["paper's MLP"]))
    for name, claim in TEACHER.items():
        found.append(against(claim, "hypergraph", "coauthorship-cora", name, "teacher"))
    found += [_graphs(claim, arm, results, accuracies) for arm, claim in GRAPH.items()]
    weak, strong = list(results["signal"])[0], list(results["signal"])[-1]
    noise = results["noise"]["synthetic"]
    for way, claim in AUC.items():
        aucs = [run[way]["auc"] for run in noise if run[way]["auc"] is not None]
        found.append(Measurement(claim, *_mean_std(aucs)) if aucs else Measurement(claim, None))
    gaps = [run["default"]["true"] - run["default"]["noise"] for run in noise if run["default"]["auc"] is not None]
    found.append(Measurement(GAP, *_mean_std(gaps)) if gaps else Measurement(GAP, None))

    def gains(name: str) -> list[float]:
        return [run["accuracy"]["LightHGNN+"] - run["accuracy"]["fair MLP"] for run in results["signal"][name]]

    found.append(difference(SHRINKS, gains(weak), gains(strong)) if weak != strong else Measurement(SHRINKS, None))
    settings = (
        ("prod", PRODUCTION, "fair MLP"),
        ("ind", INDUCTIVE, "fair MLP"),
        ("prod", PRODUCTION_TEACHER, "teacher"),
    )
    for setting, claims, other in settings:
        for name, claim in claims.items():
            runs = results.get("production", {}).get(name)
            values = [r["LightHGNN+"][setting] - r[other][setting] for r in runs or []]
            found.append(Measurement(claim, *_mean_std(values)) if values else Measurement(claim, None))
    cora = "coauthorship-cora"
    smooth = [run["topology"] for run in results["hypergraph"].get(cora, [])]
    for (upper, lower), claim in TOPOLOGY.items():
        pair = ([s[upper] for s in smooth], [s[lower] for s in smooth]) if smooth else (None, None)
        found.append(difference(claim, *pair))
    found.append(against(INT8, "hypergraph", cora, "LightHGNN+, int8 weights", "LightHGNN+"))
    together = results.get("stacked", {}).get(cora)
    stacked = together[0]["hgnn"]["accuracy"] if together else None
    found.append(difference(TOGETHER, stacked, accuracies("hypergraph", cora, "teacher")))
    found.append(Measurement(FIT, fit))
    found.append(Measurement(SPEED, speed[0]["ratio"], speed[0]["spread"]))
    return found + _beside_baselines(results) + _arms(results)


def _beside_baselines(results: dict[str, Any]) -> list[Measurement]:
    """LightHGNN+ beside the best baseline of each hypergraph, which is chosen by its mean: in the baseline's favour."""
    found = []
    for name, runs in results["hypergraph"].items():
        columns = {arm: [run["accuracy"][arm] for run in runs] for arm in BASELINES if arm in runs[0]["accuracy"]}
        best = max(columns, key=lambda arm: statistics.mean(columns[arm]))
        words = f"{name}: LightHGNN+ minus the best baseline, {best}"
        claim = Claim(f"best-baseline-{name}", words, "no threshold", "points", None, None, "min")
        ours = [run["accuracy"]["LightHGNN+"] for run in runs]
        found.append(Measurement(claim, *_mean_std([a - b for a, b in zip(ours, columns[best], strict=True)])))
    return found


def _arms(results: dict[str, Any]) -> list[Measurement]:
    """Every arm's test accuracy, as it is."""

    def reported(name: str, arm: str, values: list[float], where: str) -> Measurement:
        slug = "-".join(part for part in (name, arm, where) if part).replace(" ", "-").replace(",", "").lower()
        words = ", ".join(part for part in (name, where, arm) if part)
        claim = Claim(f"accuracy-{slug}", words, "test accuracy", "%", None, None, "min")
        return Measurement(claim, *_mean_std(values))

    found = []
    for kind in ("hypergraph", "graph"):
        for name, runs in results.get(kind, {}).items():
            for arm in runs[0]["accuracy"]:
                values = [run["accuracy"][arm] for run in runs]
                found.append(reported(f"{kind} {name}", arm, values, ""))
    words = {"trans": "observed", "ind": "unseen", "prod": "all test vertices"}
    for name, runs in results.get("production", {}).items():
        for arm in runs[0]:
            for setting in runs[0][arm]:
                values = [run[arm][setting] for run in runs]
                found.append(reported(f"production {name}", arm, values, words.get(setting, setting)))
    return found


def _graphs(
    claim: Claim, arm: str, results: dict[str, Any], accuracies: Callable[..., list[float] | None]
) -> Measurement:
    names = [name for name in GRAPHS if name in results.get("graph", {})]
    if not names:
        return Measurement(claim, None)
    calibrated = ", calibrated teacher"
    tags = ("", calibrated) if arm.endswith(calibrated) else ("",)
    best: dict[str, str] = {}
    for name in names:
        rivals = [rival + tag for rival in ("GLNN", "reliability KD") for tag in tags]
        means = {rival: statistics.mean(accuracies("graph", name, rival) or []) for rival in rivals}
        best[name] = max(means, key=means.__getitem__)
    ours = _columns_mean(accuracies("graph", name, arm) for name in names)
    theirs = _columns_mean(accuracies("graph", name, best[name]) for name in names)
    return Measurement(claim, *_mean_std([a - b for a, b in zip(ours or [], theirs or [], strict=True)]))


def _columns_mean(rows: Iterable[list[float] | None]) -> list[float] | None:
    kept = [row for row in rows if row is not None]
    return [statistics.mean(column) for column in zip(*kept, strict=True)] if kept else None


def _mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
