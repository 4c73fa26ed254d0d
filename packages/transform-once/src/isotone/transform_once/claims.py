"""What is claimed, and how it is measured from rows of trained arms.

Thresholds were set before measuring: by the paper (arXiv 2211.14453) where it has a figure ("more than 20 % lower"),
else by what was asked of this reproduction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from isotone.shared.claims import Claim, Measurement

PAPER = "arXiv 2211.14453, abstract"
ASKED = "asked of this reproduction"
Rows = Sequence[Mapping[str, Any]]
OURS = ("t1-vp", "t1-naive")
FNOS = ("fno", "neuralop")


def fastest(rows: Rows, arms: Sequence[str] = FNOS) -> str | None:
    """Of the arms that were run, the one whose epoch takes the least time."""
    seconds = {
        arm: statistics.median(row["epoch_seconds"] for row in rows if row["arm"] == arm)
        for arm in arms
        if any(row["arm"] == arm for row in rows)
    }
    return min(seconds, key=lambda arm: seconds[arm]) if seconds else None


def ratios(rows: Rows, ours: str, theirs: str | None) -> list[float]:
    """Error of `ours` over that of `theirs`, seed by seed."""
    each = {(row["arm"], row["seed"]): row["error"] for row in rows}
    seeds = sorted({row["seed"] for row in rows if row["arm"] == ours})
    return [each[ours, seed] / each[theirs, seed] for seed in seeds if (theirs, seed) in each]


def _claim(id: str, statement: str, source: str, unit: str, threshold: float | None, paper: Any = None) -> Claim:
    return Claim(id, statement, source, unit, paper, threshold, "max")


def compared(task: str, words: str, rows: Rows, threshold: float | None, judged: bool = True) -> list[Measurement]:
    """The claims of one task's table: T1 in both initialisations over the faster FNO, the plain network, the best of
    all baselines; and whether anything fell below what a truncation can reach."""
    fno = fastest(rows)
    found = []
    limit = threshold if judged else None
    paper = 0.8
    for ours in (*OURS, "t1-vp-first", "t1u"):
        # the first layer alone, and T1U, are reported: what was asked is of the two
        bar = limit if ours in OURS else None
        if values := ratios(rows, ours, fno):
            text = f"{words}: error of {ours} over that of the faster FNO ({fno})"
            found.append(_measured(_claim(f"{task}-{ours}-fno", text, PAPER, "ratio", bar, paper), values))
    for ours in OURS:
        if values := ratios(rows, ours, "mlp"):
            bar = 1.0 if judged else None
            text = f"{words}: error of {ours} over that of a plain network on the same modes"
            found.append(_measured(_claim(f"{task}-{ours}-mlp", text, ASKED, "ratio", bar), values))
    if values := ratios(rows, "t1-vp", "t1-naive"):
        text = f"{words}: error with the vp initialisation over that with the naive one"
        found.append(_measured(_claim(f"{task}-vp-naive", text, f"{PAPER}: vp is the better", "ratio", None), values))
    if above := [row["above"] for row in rows if row.get("above") is not None]:
        text = f"{words}: least ratio of a test sample's error to its irreducible one, over all truncated arms"
        claim = Claim(f"{task}-irreducible", text, "section 2.5, exact", "ratio", 1.0, 1.0 - 1e-4, "min")
        found.append(Measurement(claim, min(above)))
    return found + _walls(task, words, rows, fno) + _reported(task, words, rows)


def _walls(task: str, words: str, rows: Rows, fno: str | None) -> list[Measurement]:
    """Training wall-clock and rollouts of T1 and T1U beside the faster FNO's, where both ran the same epochs."""
    found = []
    for ours in ("t1-vp", "t1u"):
        mine = [row for row in rows if row["arm"] == ours]
        theirs = [row for row in rows if row["arm"] == fno]
        if not mine or not theirs or mine[0]["epochs"] != theirs[0]["epochs"]:
            continue
        pair = (statistics.median(row["seconds"] for row in side) for side in (theirs, mine))
        text = f"{words}: training seconds of the faster FNO ({fno}) over those of {ours}, the same epochs"
        claim = Claim(f"{task}-{ours}-wall", text, f"{PAPER}: 32 h and 5 h", "×", 6.4, None, "min")
        ratio = next(pair) / next(pair)
        found.append(Measurement(claim, ratio))
        if "rollout" in mine[0] and "rollout" in theirs[0]:
            last = max(mine[0]["rollout"], key=int)
            values = [a["rollout"][last] / b["rollout"][last] for a, b in zip(mine, theirs, strict=True)]
            text = f"{words}: error of {ours} after {last} steps over that of the faster FNO ({fno})"
            found.append(_measured(_claim(f"{task}-{ours}-rollout", text, PAPER, "ratio", 0.8, 0.8), values))
    return found


def _reported(task: str, words: str, rows: Rows) -> list[Measurement]:
    """Every arm's error, whoever wins."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        epochs, seconds = (statistics.median(row[what] for row in mine) for what in ("epochs", "seconds"))
        rates = sorted({row["lr"] for row in mine})
        text = (
            f"{words}: {arm}, {epochs:g} epochs in {seconds:.3g} s at rate {', '.join(f'{rate:g}' for rate in rates)}"
        )
        claim = _claim(f"{task}-error-{arm}", text, "the official table's values are not known", "relative L2", None)
        found.append(_measured(claim, [row["error"] for row in mine]))
        if "finer" in mine[0]:
            text = f"{words}: {arm}, the same weights on the finer grid"
            source = "section 2.3, resolution transfer"
            claim = _claim(f"{task}-finer-{arm}", text, source, "relative L2", None)
            found.append(_measured(claim, [row["finer"] for row in mine]))
    return found


def times(task: str, words: str, rows: Rows, judged: bool = True) -> list[Measurement]:
    """Samples a second in training, T1 over the faster FNO; `task` and `words` as in `compared`."""
    fno = fastest(rows)
    ours = [row["epoch_seconds"] for row in rows if row["arm"] == "t1-naive"]
    theirs = [row["epoch_seconds"] for row in rows if row["arm"] == fno]
    if not ours or not theirs:
        return []
    text = f"{words}: training throughput of T1 over that of the faster FNO ({fno})"
    claim = Claim(f"throughput-{task}", text, f"{PAPER}: 3 to 10", "×", "3 to 10", 3.0 if judged else None, "min")
    return [Measurement(claim, statistics.median(theirs) / statistics.median(ours))]


def speed(steps: Sequence[Sequence[Any]]) -> list[Measurement]:
    """A step of the fastest FNO over T1's, by resolution."""
    found = []
    for size in sorted({row[1] for row in steps}):
        each = {row[0]: row[2] for row in steps if row[1] == size}
        best = min((name for name in each if name in ("fno", "fno-matmul", "neuralop")), key=lambda name: each[name])
        text = (
            f"Seconds of a training step of the fastest FNO ({best}) over T1's, {size} x {size}, equal modes and width"
        )
        bar = 10.0 if size >= 256 else 3.0
        claim = Claim(f"speed-{size}", text, f"{PAPER}: 3 to 10", "×", "3 to 10", bar, "min")
        found.append(Measurement(claim, each[best] / each["t1"]))
    return found


def variance(found: Mapping[str, float]) -> list[Measurement]:
    """The lemma of section 2.6, by simulation: variance a point after one linear layer over that before."""
    text = "Variance a point after linear channel mixing of 24 of 64 modes a side, over that before, vp"
    off = abs(found["vp"] - 1) / found["vp_error"]
    claims = [
        (Claim("vp-variance", text, "section 2.6", "ratio", 1.0, None, "min"), found["vp"], found["vp_error"]),
        (_claim("vp-off", "The same: standard errors from 1", "section 2.6", "standard errors", 3.0), off, None),
    ]
    return [Measurement(claim, value, spread) for claim, value, spread in claims]


def _measured(claim: Claim, values: Sequence[float]) -> Measurement:
    return Measurement(claim, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
