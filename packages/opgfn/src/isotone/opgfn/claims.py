"""What the paper claims, each with what it must reach here; set before measuring.

The figures of the paper's tables were not found, so that where it claims "better" or "comparable", the difference to a
baseline must not be below zero.
"""

from __future__ import annotations

from typing import Any

from isotone.shared.claims import Claim

PAPER = "arXiv 2310.00386"


def claimed(
    name: str, statement: str, source: str, unit: str, threshold: float | None, direction: Any = "min"
) -> Claim:
    return Claim(name, statement, source, unit, None, threshold, direction)


CLAIMS = {
    claim.id: claim
    for claim in (
        claimed("moo-mass", "branin-currin: OP-TB's exact terminal mass on the Pareto cells",
               f"{PAPER}, MOO HyperGrid figure: mass concentrates on the front", "mass", 0.85),
        claimed("moo-cells", "branin-currin: Pareto cells among OP-TB's 1,280 samples, of 36",
               f"{PAPER}, MOO HyperGrid figure: the whole front, not one end", "cells", 33.0),
        claimed("moo-pc", "branin-currin: mass x share of cells found, OP-TB minus PC-GFN at its tuned beta",
               f"{PAPER}, MOO HyperGrid: OP against PC-GFN", "mass x coverage", 0.0),
        claimed("moo-scalar", "branin-currin: OP-TB's mass over that of TB on mean(u)^4",
               "own expectation, from an earlier prototype", "times", 5.0),
        claimed("moo-entropy", "branin-currin: PC-ent of OP-TB's samples minus PC-GFN's",
               f"{PAPER}, metrics of the MOO tables", "nats", None),
        claimed("moo-pc-mass", "branin-currin: PC-GFN's exact mass at its tuned beta", "baseline", "mass", None),
        claimed("moo-pc-cells", "branin-currin: PC-GFN's Pareto cells among 1,280 samples", "baseline", "cells", None),
        claimed("hyper-beta", "HyperGrid: mass x (modes / 4) of OP-TB minus the second worst beta's of TB",
               f"{PAPER}, HyperGrid: no beta to tune", "score", 0.0),
        claimed("hyper-op", "HyperGrid: mass x (modes / 4) of OP-TB", f"{PAPER}, HyperGrid", "score", None),
        claimed("hyper-best", "HyperGrid: mass x (modes / 4) of TB at its best beta", "baseline", "score", None),
        claimed("hyper-worst", "HyperGrid: mass x (modes / 4) of TB at its worst beta", "baseline", "score", None),
        claimed("hyper-modes", "HyperGrid: modes of 4 that OP-TB finds with replay",
               f"{PAPER}, HyperGrid: finds the maxima", "modes", 4.0),
        claimed("hyper-order", "HyperGrid: largest change of OP-TB's curves under u^3, rank(u), R_0 of 0.01 and 0.001",
               f"{PAPER}: insensitive to R_0", "mass, modes or nats", 0.0, "max"),
        claimed("hyper-sparse", "HyperGrid: entropy of OP-TB's exact distribution, end minus first step",
               f"{PAPER}, proposition: training sparsifies the reward", "nats", 0.0, "max"),
        claimed("hyper-fall", "HyperGrid: the same, end minus its highest",
               "the sampler first spreads from the origin, where it starts", "nats", None, "max"),
        claimed("nas-beta", "NAS stand-in: true value of the incumbent, OP-TB-KL-AUG minus GFN-beta at its tuned beta",
               f"{PAPER}, NATS-Bench figures: above GFN-beta", "value", 0.0),
        claimed("nas-plain", "NAS stand-in: true value of the incumbent, OP-TB minus GFN-beta at its tuned beta",
               f"{PAPER}, NATS-Bench figures: above GFN-beta", "value", 0.0),
        claimed("nas-beta-aug", "NAS stand-in: OP-TB-KL-AUG minus GFN-beta with the same regulariser and augmentation",
               "what the order brings beside them", "value", None),
        claimed("nas-evolution", "NAS stand-in: OP-TB-KL-AUG minus regularised evolution",
               f"{PAPER}, NATS-Bench figures: above REA", "value", 0.0),
        claimed("nas-random", "NAS stand-in: OP-TB-KL-AUG minus random search",
               f"{PAPER}, NATS-Bench figures: above random", "value", 0.0),
        claimed("nas-reinforce", "NAS stand-in: OP-TB-KL-AUG minus REINFORCE",
               f"{PAPER}, NATS-Bench figures: above REINFORCE", "value", 0.0),
        claimed("nas-op", "NAS stand-in: OP-TB's true value (without regulariser and augmentation)",
               f"{PAPER}, NATS-Bench figures", "value", None),
        claimed("string-top", "Binding strings: top-100 mean at equal evaluations, OP-TB minus TB at its tuned beta",
               f"{PAPER}: best top-100 mean reward", "value", 0.0),
        claimed("string-modes", "Binding strings: modes found at equal evaluations, OP-TB minus TB at its tuned beta",
               f"{PAPER}: most modes", "modes", 0.0),
        claimed("string-random", "Binding strings: top-100 mean, OP-TB minus random",
               f"{PAPER}", "value", 0.0),
        claimed("fragments-random", "Fragments: hypervolume at equal unique calls, OP-TB minus random",
               f"{PAPER}, fragment tables", "volume", 0.0),
        claimed("fragments-pc", "Fragments: hypervolume at equal unique calls, OP-TB minus PC-GFN at its tuned beta",
               f"{PAPER}, fragment tables: comparable or better", "volume", 0.0),
        claimed("fragments-gc", "Fragments: hypervolume at equal unique calls, OP-TB minus GC-GFN",
               f"{PAPER}, fragment tables: comparable or better", "volume", 0.0),
        claimed("fragments-genetic", "Fragments: hypervolume at equal unique calls, OP-TB minus the genetic algorithm",
               "whoever wins is reported", "volume", None),
        claimed("fragments-diversity", "Fragments: Tanimoto diversity of OP-TB's front",
               "reported", "1 - similarity", None),
        claimed("fragments-diversity-genetic", "Fragments: Tanimoto diversity of the genetic algorithm's front",
               "reported", "1 - similarity", None),
    )
}  # fmt: skip
