"""What is claimed, and how it is measured from rows of arms, curves and leaks.

Thresholds were set before measuring: by what was asked of this reproduction and by the theory. The paper (arXiv
2210.08371) states theorems, and no experiment of it was at hand; its sections are those of its specification here.
Rows without a threshold are reported, whoever wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from isotone.shared.claims import Claim, Measurement
from isotone.sketching.study import bytes_to

PAPER = "arXiv 2210.08371"
ASKED = "asked of this reproduction"
SPEC = "seen by the specification"
OURS = "srht"
"""The arm that the claims are judged by: the package's default sketch."""
Row = Mapping[str, Any]


def federated_claims(rows: Sequence[Row]) -> list[Measurement]:
    """Accuracy at equal total bytes, bytes a round, and bytes to FedAvg's accuracy, of every arm; bytes with the
    headers of messages."""
    each = {row["arm"]: row for row in rows}
    plain, found = each["fedavg"], []
    for arm, row in each.items():
        if arm == "fedavg":
            continue
        gaps = [a - b for a, b in zip(_final(row), _final(plain), strict=True)]
        text = f"Accuracy of {arm} minus FedAvg's at equal total bytes, digits over {plain['clients']} clients"
        found.append(_claim(f"equal-{arm}", text, ASKED, "points", gaps, -1.0 if arm == OURS else None))
        times = _round_bytes(plain) / _round_bytes(row)
        text = f"Bytes a round of FedAvg over those of {arm}, up and down, with headers"
        if arm == "fetchsgd":
            text += " (five rows of as many columns as the others send numbers)"
        source = f"{PAPER}, abstract: s numbers for d"
        found.append(_claim(f"cheap-{arm}", text, source, "×", [times], 10.0 if arm == OURS else None))
    target = statistics.mean(_final(plain)) - 1
    for arm, row in each.items():
        found.append(_bytes_claim(row, target))
        text = f"Accuracy of {arm}: {row['rounds']} rounds of {_round_bytes(row)} bytes, rate {row['rate']:g}"
        text += ", an end of those tried" if row["end"] else ""
        found.append(_claim(f"accuracy-{arm}", text, "test accuracy", "%", _final(row)))
    return found


def _bytes_claim(row: Row, target: float) -> Measurement:
    """Bytes until the target accuracy, or, where not every seed reaches it, how far below it the others stay."""
    arm, source = row["arm"], f"{PAPER} promises cheap rounds, not fewer bytes in all"
    reached = bytes_to(row, target)
    values = [value / 1e3 for value in reached if value is not None]
    if len(values) == len(reached):
        text = f"kB of one client until {arm} has FedAvg's accuracy less a point ({target:.1f} %)"
        return _claim(f"bytes-{arm}", text, source, "kB", values, direction="max")
    some = f"for {len(values)} of {len(reached)} seeds" if values else "never"
    text = f"FedAvg's accuracy less a point ({target:.1f} %) by {arm}: {some} within "
    text += f"{row['bytes'][-1] / 1e3:.0f} kB of one client; short of it at best"
    short = [max(0.0, target - max(curve)) for curve in row["accuracy"]]
    return _claim(f"bytes-{arm}", text, source, "points", short, direction="max")


def bound_claims(curves: Sequence[Row], sent: Sequence[Row], broken: Mapping[str, float] | None) -> list[Measurement]:
    """Measured convergence inside the bounds; numbers sent; what a fixed sketch and a step of 1 / L do, if known."""
    found = []
    for problem, steps in dict.fromkeys((curve["problem"], curve["local_steps"]) for curve in curves):
        mine = [curve for curve in curves if (curve["problem"], curve["local_steps"]) == (problem, steps)]
        share = statistics.mean(float(curve["inside"]) for curve in mine)
        text = f"Share of {len(mine)} sketches whose curve, of {mine[0]['draws']} draws, is inside the bound, {problem}"
        source, id = f"{PAPER}: as fast as descent, L for (1 + alpha) L", f"inside-{problem.replace(' ', '-')}"
        if steps > 1:
            text += f", {mine[0]['clients']} unlike clients of K = {steps} local steps"
            source, id = f"section 2.4, {mine[0]['source']}", f"{id}-k{steps}"
        found.append(_claim(id, text, source, "of sketches", [share], 1.0))
    for row in sent:
        name = f"{row['kind']}-{row['s']}"
        source = f"section 2.4: (1 + alpha) s / d = {row['promised']:.3g}"
        text = (
            f"Numbers sent by {row['kind']}, s = {row['s']}, over gradient descent's, to the accuracy of its 20 rounds"
        )
        values = [] if row["equal"] is None else [row["equal"]]
        item = _claim(f"sent-{name}", text, source, "×", values, row["most"], "max")
        found.append(Measurement(item.claim, item.measured, row["error"]))
        text = f"The same, {row['kind']}, s = {row['s']}, to the bound of its 20 rounds"
        found.append(_claim(f"sent-bound-{name}", text, source, "×", [row["guaranteed"]], row["most"], "max"))
    if broken is None:
        return found
    text = "One sketch for all rounds stalls: f after 2,000 rounds over f before"
    found.append(_claim("fixed", text, SPEC, "ratio", [broken["fixed"]], 0.5, paper=0.83))
    text = "The step 1 / L diverges: |w| after 50 rounds, s = 16, d = 128"
    found.append(_claim("large-step", text, SPEC, "norm", [broken["large"]], 1e6, paper=2e12))
    return found


def embedding_claims(rows: Sequence[Row]) -> list[Measurement]:
    """1 + alpha against theory, in standard errors; the constant of a coordinate-wise embedding."""
    found = []
    for row in rows:
        off = abs(row["alpha"] - row["alpha_theory"]) / max(row["alpha_error"], 1e-12)
        text = f"{row['kind']}, d = {row['d']}, s = {row['s']}: 1 + alpha is {1 + row['alpha']:.3f}, theory "
        text += f"{1 + row['alpha_theory']:.3f}; standard errors between them"
        found.append(_claim(f"alpha-{row['kind']}", text, "section 2.2", "s.e.", [off], 4.0, "max"))
        text = f"{row['kind']}: coordinate-wise constant a, the largest s Var(g^T R^T R h), less four standard errors"
        item = _claim(f"a-{row['kind']}", text, "section 2.2", "", [row["a"] - 4 * row["a_error"]], 2.0, "max", 2.0)
        found.append(Measurement(item.claim, item.measured, row["a_error"]))
    return found


def leak_claims(audits: Mapping[str, Sequence[Row]], inputs: int) -> list[Measurement]:
    """What was recovered from messages that nothing hides, by size of sketch, batch and local steps."""
    found = []
    for name, leaks in audits.items():
        for leak in leaks:
            what = "the whole vector" if leak["s"] is None else f"{leak['s']} of {leak['d']} numbers"
            id = f"{'all' if leak['s'] is None else leak['s']}-b{leak['batch']}-k{leak['local_steps']}"
            id += "-bounded" if name == "bounded" else ""
            text = f"Attack on {what}, batch {leak['batch']}, K = {leak['local_steps']}"
            text += ", pixels known to lie in [0, 1]" if name in ("bounded", "batches") else ""
            text += f": PSNR (SSIM {leak['ssim']:.2f}, identified {leak['found']} of {leak['tried']})"
            found.append(_claim(f"psnr-{id}", text, f"{PAPER}: inputs are recovered", "dB", leak["psnrs"]))
            if name != "single":
                continue
            if leak["s"] is None or leak["s"] >= 2 * inputs:
                text = f"Median error of the attack on {what}, batch 1, K = 1"
                item = _claim(f"error-{id}", text, f"{SPEC}: below 1e-31", "MSE", [leak["median"]], 1e-10, "max")
                found.append(Measurement(item.claim, item.measured, _spread(leak["medians"])))
            elif leak["s"] == inputs:
                text = f"Median error of the attack on {what}, as many as pixels: it breaks down"
                item = _claim(f"error-{id}", text, f"{SPEC}: 5e-4 to 5e-3", "MSE", [leak["median"]], 1e-4)
                found.append(Measurement(item.claim, item.measured, _spread(leak["medians"])))
    return found


def attack_claims(leaks: Sequence[Row], local: Mapping[float, Row], control: float) -> list[Measurement]:
    """Whether noise ends the attack on one release, with the accuracy at the epsilon of all of them. `local`:
    `epsilon`, `releases` and `accuracy` of each noise, of clients that trust nobody."""
    found = []
    for leak in leaks:
        ratio = leak["mse"] / leak["guess"]
        sent = "the whole vector" if leak["s"] is None else f"{leak['s']} of {leak['d']} numbers"
        name = "" if leak["s"] is None else f"-s{leak['s']}"
        seen = f"identified {leak['found']} of {leak['tried']}, chance {100 * leak['chance']:.1f} %, p = "
        seen += f"{leak['p_found']:.2g}; likeliest of the pool {leak['by_likelihood']}, chance "
        seen += f"{100 / leak['pool']:.1f} %, p = {leak['p_likelihood']:.2g}"
        spread = leak["gap_error"] / leak["guess"]
        if leak["noise"] == control:
            text = f"Control, noise {control:g}, {sent}: the attack's error over the class mean's ({seen})"
            item = _claim(f"control{name}", text, ASKED, "ratio", [ratio], direction="max")
            found.append(Measurement(item.claim, item.measured, spread))
            continue
        row = local[leak["noise"]]
        accuracy = f"{statistics.mean(row['accuracy']):.1f} %" if row["accuracy"] else "not measured"
        one = f"epsilon {row['epsilon']:g} of {row['releases']} releases (accuracy {accuracy}), one of them attacked"
        text = f"{one}, {sent}: the attack fails, neither error below the class mean's nor identification above "
        text += f"chance at 5 % ({seen})"
        id = f"fails-{row['epsilon']:g}{name}"
        found.append(_claim(id, text, ASKED, "1 = yes", [float(leak["failed"])], 1.0))
        text = f"{one}, {sent}: the attack's error over the class mean's"
        item = _claim(f"error-{row['epsilon']:g}{name}", text, ASKED, "ratio", [ratio])
        found.append(Measurement(item.claim, item.measured, spread))
    return found


def private_claims(rows: Sequence[Row]) -> list[Measurement]:
    """Accuracy at each epsilon by trust; the accountants side by side."""
    found = []
    for row in rows:
        epsilon, trust = f"{row['epsilon']:g}", row["trust"]
        word = trust.replace(", not sketched", "-plain")
        text = f"Accuracy at epsilon {epsilon}, delta {row['delta']:g}, trust {trust}: {row['releases']} releases of "
        text += f"noise {row['noise']:.3g}"
        found.append(_claim(f"private-{word}-{epsilon}", text, f"{PAPER}: private and cheap", "%", row["accuracy"]))
        if trust in ("local", "client"):
            tight = "not installed" if row["pld"] is None else f"{row['pld']:.3g}"
            text = f"Noise by the theorem's composition over that by Renyi divergence at epsilon {epsilon}, "
            text += f"{row['releases']} releases, sampling {row['sampling']:g} (epsilon by Renyi {row['rdp']:.3g}, "
            text += f"by loss distributions {tight})"
            source = "section 2.6"
            found.append(_claim(f"noise-{word}-{epsilon}", text, source, "×", [row["theorem"] / row["noise"]]))
    return found


def unjudged(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same, those with a threshold "not at this scale"."""
    return [m if m.claim.threshold is None else Measurement(m.claim, None) for m in measurements]


def _final(row: Row) -> list[float]:
    """Accuracy at the last look of each seed."""
    return [curve[-1] for curve in row["accuracy"]]


def _round_bytes(row: Row) -> int:
    """Of one client, up and down, headers counted."""
    return int(row["bytes_up"] + row["bytes_down"])


def _claim(
    id: str,
    statement: str,
    source: str,
    unit: str,
    values: Sequence[float],
    threshold: float | None = None,
    direction: Literal["min", "max"] = "min",
    paper: float | None = None,
) -> Measurement:
    """The mean over `values` with its spread; nothing of none."""
    claim = Claim(id, statement, source, unit, paper, threshold, direction)
    if not values:
        return Measurement(claim, None)
    return Measurement(claim, statistics.mean(values), _spread(values))


def _spread(values: Sequence[float]) -> float | None:
    """The deviation over seeds, of more than one."""
    return statistics.stdev(values) if len(values) > 1 else None
