"""What is claimed, each with its figure, source and threshold, and how the arms' numbers become figures.

Thresholds are those of the paper's sheet and of what was asked of this reproduction, set before measuring. Rows without
one are reported as they come. Where a range over seeds was given, the seed that is worst for us has the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Literal

from isotone.quamba2.small import LADDER, OTHERS
from isotone.shared.claims import Claim, Measurement

ARXIV = "arXiv 2503.22879"
EXPECTED = "section 4, measured for the sheet that this package was built from"
ASKED = "asked of this reproduction"
RANGES = {
    "tensor": (0.19, 0.42),
    "percentile": (0.13, 0.17),
    "snc 1 1": (0.15, 0.21),
    "snc 2 2": (0.035, 0.050),
    "snc 4 4": (0.011, 0.014),
    "snc 4 8": (0.009, 0.011),
    "channel": (0.0085, 0.0097),
    "BC tensor": (0.010, 0.045),
    "BC group": (0.004, 0.007),
}
"""Expected of each arm of the scan's ladder over seeds 0 to 4: the least and the largest median error."""
WORDS = {
    "tensor": "x in int8, one scale",
    "percentile": "x in int8, one scale at the percentile 0.9995",
    "snc 1 1": "x in int8, a scale an SSM group",
    "snc 2 2": "x in int8, sort-and-cluster of 2 x 2 scales a group",
    "snc 4 4": "x in int8, sort-and-cluster of 4 x 4 scales a group",
    "snc 4 8": "x in int8, sort-and-cluster of 4 x 8 scales a group",
    "snc 4 4 dp": "x in int8, 4 x 4 scales a group, channels cut by dynamic programming",
    "one cluster": "x in int8, 16 scales a group, sorted channels, heads not clustered",
    "unsorted": "x in int8, 4 x 4 scales a group, runs of heads and channels as they lie",
    "heads as they lie": "x in int8, 4 x 4 scales a group, sorted channels, runs of heads as they lie",
    "channel": "x in int8, a scale a channel",
    "BC tensor": "B and C in int8, one scale each",
    "BC group": "B and C in int8, a scale an SSM group",
}
Rows = Sequence[Mapping[str, float]]


def _claim(
    name: str,
    statement: str,
    source: str,
    unit: str,
    paper: float | str | None = None,
    threshold: float | None = None,
    direction: Literal["min", "max"] = "max",
) -> Claim:
    return Claim(_word(name), statement, source, unit, paper, threshold, direction)


def _word(name: str) -> str:
    """`name` as one word."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _seeds(claim: Claim, values: Sequence[float]) -> Measurement:
    """The mean over seeds with its standard deviation."""
    return Measurement(claim, mean(values), stdev(values) if len(values) > 1 else None)


# --- the scan's ladder -------------------------------------------------------------------------------------


def scan(rows: Rows, more_heads: Rows, judged: bool) -> list[Measurement]:
    """Of `synthetic.ladder` for each seed, with 16 heads and with 64."""
    found = [
        _seeds(_claim(f"scan {arm}", f"Error of a channel of the scan: {WORDS[arm]}", EXPECTED, "", _range(arm)), kept)
        for arm in WORDS
        if arm != "heads as they lie"  # with four heads in a group these are the four clusters
        if (kept := [row[arm] for row in rows])
    ]
    inside = [all(low <= row[arm] <= high for row in rows) for arm, (low, high) in RANGES.items()]
    words = "Arms of the scan whose every seed lies in the expected range, of draws that are not the sheet's"
    found.append(
        Measurement(_claim("scan ranges", words, ASKED, "of 9", None, 9.0 if judged else None, "min"), sum(inside))
    )
    found += _ratio("over per-channel", "4 x 4 scales a group over a scale a channel", rows, "snc 4 4", "channel",
                    1.4, "max", judged)  # fmt: skip
    found += _ratio("under per-tensor", "one scale over 4 x 4 scales a group", rows, "tensor", "snc 4 4",
                    16.0, "min", judged)  # fmt: skip
    found += _ratio("group of B and C", "one scale for B and C over one an SSM group", rows, "BC tensor", "BC group",
                    1.3, "min", judged)  # fmt: skip
    words = "error of the whole tensor, scale at the percentile over scale at the maximum"
    found += _ratio("clipping", words, rows, "percentile whole", "tensor whole", 1.3, "min", judged)
    for heads, given, arms in (
        (16, rows, ("unsorted", "one cluster")),
        (64, more_heads, ("unsorted", "one cluster", "heads as they lie")),
    ):
        for arm in arms if given else ():
            words = f"{heads} heads, {WORDS[arm].removeprefix('x in int8, ')}, over sort-and-cluster"
            found += _ratio(f"{heads} {arm}", words, given, arm, "snc 4 4", 1.0, "min", judged)
    return found


def _range(arm: str) -> str | None:
    return "{:g} to {:g}".format(*RANGES[arm]) if arm in RANGES else None


def _ratio(
    name: str,
    words: str,
    rows: Rows,
    above: str,
    below: str,
    threshold: float,
    direction: Literal["min", "max"],
    judged: bool,
) -> list[Measurement]:
    """A ratio of errors: the mean over seeds, and the worst seed, which has the verdict."""
    ratios = [row[above] / row[below] for row in rows]
    worst = min(ratios) if direction == "min" else max(ratios)
    bar = threshold if judged else None
    return [
        _seeds(_claim(f"scan {name}", f"Errors of the scan: {words}, mean over seeds", EXPECTED, "x"), ratios),
        Measurement(
            _claim(
                f"scan {name}, worst seed",
                f"Errors of the scan: {words}, the worst seed",
                EXPECTED,
                "x",
                None,
                bar,
                direction,
            ),
            worst,
        ),
    ]


# --- the small model ---------------------------------------------------------------------------------------


def premise(what: str, rows: Rows) -> list[Measurement]:
    """Of `small.persistence`, a row a seed; `what`: planted gains or not."""
    words = "Rank correlation of {} order by max |x|, {}"
    return [
        _seeds(
            _claim(
                f"premise {what} {name}", words.format(*name.split(" ", 1)) + f", {what}", f"{ARXIV}, section 4", ""
            ),
            [row[name] for row in rows],
        )
        for name in rows[0]
    ]


def ablation(what: str, rows: Sequence[Mapping[str, Mapping[str, float]]], judged: bool) -> list[Measurement]:
    """Of `small.rows_of`, a dictionary a seed."""
    names = [name for name in (*LADDER, *OTHERS) if name in rows[0]]
    found = [
        _seeds(
            _claim(f"{what} {name}", f"KL to the float model, {name}, {what}", f"{ARXIV}, ablation tables", "nats"),
            [row[name]["kl"] for row in rows],
        )
        for name in names
    ]
    for name in ("float", "+ SnC", "W4A16 + Hadamard + GPTQ"):
        if name in rows[0]:
            claim = _claim(f"{what} perplexity {name}", f"Perplexity a byte, {name}, {what}", f"{ARXIV}, Table 1", "")
            found.append(_seeds(claim, [row[name]["perplexity"] for row in rows]))
    kl = {name: [row[name]["kl"] for row in rows] for name in names}
    if set(LADDER) <= set(kl):
        steps = list(LADDER)
        lower = [float(sum(k[a] > k[b] for a, b in zip(steps, steps[1:], strict=False))) for k in _by_seed(kl, rows)]
        words = f"Steps of the W4A8 ladder that lower the KL, {what}"
        bar = 4.0 if judged else None
        found.append(_seeds(_claim(f"{what} monotone", words, f"{ARXIV}, Table 8", "of 4", "4", bar, "min"), lower))
        gains = [
            (k["+ PerSG"] / k["+ SnC"]) / (k["+ GPTQ"] / k["+ PerSG"]) for k in _by_seed(kl, rows)
        ]  # what a step divides the KL by
        words = f"What SnC divides the KL by, over what PerSG divides it by, {what}"
        bar = 1.0 if judged else None
        found.append(_seeds(_claim(f"{what} SnC first", words, f"{ARXIV}, Table 8", "x", None, bar, "min"), gains))
    first, last = "W4A16 per group", "W4A16 + Hadamard + GPTQ"
    if {first, last} <= set(kl):
        removed = [1 - k[last] / k[first] for k in _by_seed(kl, rows)]
        words = f"Part of round-to-nearest's KL that GPTQ and Hadamard remove at W4A16, {what}"
        bar = 0.5 if judged else None
        found.append(_seeds(_claim(f"{what} removed", words, ASKED, "", None, bar, "min"), removed))
    return found


def _by_seed(kl: Mapping[str, Sequence[float]], rows: Sequence[object]) -> list[dict[str, float]]:
    return [{name: values[i] for name, values in kl.items()} for i in range(len(rows))]


# --- bytes -------------------------------------------------------------------------------------------------

PAPER_WEIGHTS = {"2.7b": "3.7", "8b": "3.89"}


def memory(name: str, ratios: Mapping[str, float]) -> list[Measurement]:
    """Of `shapes.memory` for shape `name`."""
    said, source = f"Mamba2 {name}, W4A8", f"{ARXIV}, sizes"
    own = {
        "weights": (f"{said}: bytes of weights as stored in float16 over quantised ones", 3.8, PAPER_WEIGHTS.get(name)),
        "untied": (f"{said}: the same, the float16 head a tensor of its own", None, None),
        "states": (f"{said}: bytes of a sequence's cache in float16 over quantised ones", 2.0, "2"),
        "sum 1": (f"{said}: weights and the cache of 1 sequence", None, None),
        "sum 128": (f"{said}: weights and the caches of 128 sequences", None, None),
    }
    return [
        Measurement(_claim(f"memory {name} {key}", words, source, "x", paper, bar, "min"), ratios[key])
        for key, (words, bar, paper) in own.items()
        if key in ratios
    ]


# --- speed on a GPU ----------------------------------------------------------------------------------------

SPEED: dict[str, tuple[str, str, float | str | None, float | None]] = {
    "tpot": ("time per token at batch 1, W4A8 beside float16", "latency tables", 3.06, 2.5),
    "tpot w4a16": ("time per token at batch 1, W4A16 beside float16", "latency tables", 3.0, 2.5),
    "torchao": ("time per token at batch 1, W4A16 beside torchao's int4 under the same graph", ASKED, None, 1.0),
    "prefill": ("1024 tokens of prompt, W8A8 beside float16", "latency tables", 1.62, 1.3),
    "batch": ("time per token at batch 128, W4A8 with int8 states beside float16", "latency tables", None, 1.4),
    "transformers": ("time per token at batch 1, W4A8 beside transformers in float16", ASKED, None, None),
    "scan": ("the SSD scan of 8 prompts of 1024 tokens, int8 beside float16", "kernel table", 1.18, 1.1),
}
"""What is timed, source, the paper's figure (of an A5000, where it has one) and the threshold."""


def speed(name: str, ratios: Mapping[str, float | None]) -> list[Measurement]:
    """Ratios on a GPU by the keys of SPEED, ours above 1 the faster; None, or a key that is away: not at this scale."""
    found = []
    for key, (words, source, paper, bar) in SPEED.items():
        origin = source if source == ASKED else f"{ARXIV}, {source}"
        claim = _claim(f"speed {name} {key}", f"Mamba2 {name}: {words}", origin, "x", paper, bar, "min")
        found.append(Measurement(claim, ratios.get(key)))
    return found
