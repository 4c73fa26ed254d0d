"""The claims of the reproduction, and what its arms say about them: measurements and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from isotone.shared.claims import Claim, Measurement, figure

PAPER = "arXiv 2410.03960"
CACHES = ("fp32", "bf16", "fp8", "int8", "int4")
Arms = Sequence[tuple[int, int]]  # (l in eighths of the layers, g)

GAP = Claim(
    "gap-closed",
    "50 % SingleInputKV: share of the cross-entropy lost at conversion that distillation wins back",
    f"{PAPER}: Llama-3.1-8B keeps 72.70 of 73.71 points; the loss at conversion was not found",
    "%",
    None,
    80.0,
    "min",
)
KEPT = Claim(
    "recall-kept",
    "50 % SingleInputKV: key-value recall at 16 pairs after distillation, of the base's",
    f"{PAPER}: GSM8K of Llama-3.1-8B keeps 96.2 %, 79.45 of 82.56; recall is not measured there",
    "%",
    None,
    95.0,
    "min",
)
BYTES = Claim(
    "kv-bytes",
    "Allocated KV bytes of the base's, off (l + (L - l) / g) / L: the largest of all l and g",
    "closed form of section 3",
    "%",
    None,
    0.0,
    "max",
)
FLOPS = Claim(
    "prefill-flops",
    "50 % SingleInputKV: counted prefill FLOPs, off the closed form",
    "closed form of section 3; torch's counter",
    "%",
    None,
    1.0,
    "max",
)
SAVED = Claim(
    "prefill-saved",
    "50 % SingleInputKV: counted prefill FLOPs saved",
    f"{PAPER}, abstract: prefill compute cut by 25 to 50 %",
    "%",
    "25 to 50",
    45.0,
    "min",
)
SPEED = Claim(
    "prefill-speed",
    "50 % SingleInputKV: base over swift prefill time, 16 layers, the longest prompt measured",
    "closed form: 1.9 where compute is the limit",
    "x",
    None,
    1.75,
    "min",
)
ORDER_L = Claim(
    "order-l",
    "Skipping more costs more after distillation: the smaller of KL(l=4) - KL(l=6) and KL(l=2) - KL(l=4)",
    f"{PAPER}: 73.59, 72.70 and 66.09 points at 25, 50 and 62.5 %",
    "nats",
    None,
    0.0,
    "min",
)
ORDER_G = Claim(
    "order-g",
    "Sharing more costs more after distillation: the smaller of KL(g=2) - KL(g=1) and KL(g=4) - KL(g=2)",
    f"{PAPER}: 72.70, 71.82 and 71.49 points at g = 1, 2, 4",
    "nats",
    None,
    0.0,
    "min",
)
KD_LM = Claim(
    "kd-over-lm",
    "Narrow text: cross-entropy of Q/K/V + LM loss over Q/K/V + distillation",
    f"{PAPER}, ablation: 70.06 against 72.70 points",
    "nats",
    None,
    0.0,
    "min",
)
KD_ALL_LM = Claim(
    "kd-over-all-lm",
    "Narrow text: cross-entropy of all weights + LM loss over Q/K/V + distillation",
    f"{PAPER}, ablations",
    "nats",
    None,
    0.0,
    "min",
)
ALL_KD = Claim(
    "all-kd",
    "Narrow text: cross-entropy of all weights + distillation over Q/K/V + distillation (reported wherever it lands)",
    f"{PAPER}, ablation: 68.23 against 72.70 points",
    "nats",
    None,
    None,
    "min",
)
DROPPED = Claim(
    "over-dropped",
    "KL of the upper layers dropped, distilled, over SwiftKV's (l = 4)",
    "the alternative of the same prefill cost",
    "nats",
    None,
    0.0,
    "min",
)
COPIED = Claim(
    "over-copied",
    "KL of reusing the cache of the layer below, distilled, over SwiftKV's (l = 4)",
    "the alternative of the same prefill cost",
    "nats",
    None,
    0.0,
    "min",
)
FP8 = Claim(
    "fp8-cache",
    "50 % SingleInputKV, distilled: cross-entropy lost to skipping, less that lost to an FP8 cache (reported)",
    f"{PAPER}: the 62.5 % less KV memory of its first version has an FP8 cache; its quality was not found",
    "nats",
    None,
    None,
    "min",
)
THROUGHPUT = Claim(
    "throughput",
    "Tokens a second at equal KV memory over the base: 50 % SingleInputKV, 4-way AcrossKV and FP8",
    f"{PAPER}, abstract: up to 2 times",
    "x",
    2.0,
    1.8,
    "min",
)


def measure(
    texts: list[dict[str, Any]], recalls: list[dict[str, Any]], side: dict[str, Any], arms: Arms, told: bool
) -> list[Measurement]:
    """The claims; spreads are standard deviations over the seeds. At smoke nothing is told but what is exact."""

    def kl(seed: dict[str, Any], arm: str) -> float:
        return seed[arm]["after"]["kl"]

    def cross(seed: dict[str, Any], arm: str) -> float:
        return seed[arm]["after"]["cross_entropy"]

    exact = [
        Measurement(BYTES, max(abs(arm["measured"] - arm["formula"]) for arm in side["bytes"].values())),
        Measurement(FLOPS, side["off"]),
    ]
    gains = _gains(side)
    if not told:
        silent = (GAP, KEPT, SAVED, SPEED, ORDER_L, ORDER_G, KD_LM, KD_ALL_LM, ALL_KD, DROPPED, COPIED, FP8, THROUGHPUT)
        return [*exact, *(Measurement(claim, None) for claim in silent)]
    last = side["curve"][-1]
    return [
        Measurement(GAP, *_over([_gap(seed["l4-g1"]) for seed in texts])),
        Measurement(
            KEPT,
            *_over([100 * seed["l4-g1"]["after"]["16"] / max(seed["base"]["after"]["16"], 1e-9) for seed in recalls]),
        ),
        *exact,
        Measurement(SAVED, side["saved"]),
        Measurement(SPEED, last["ratio"], (last["high"] - last["low"]) / 2),
        Measurement(
            ORDER_L,
            *_over([min(kl(s, "l4-g1") - kl(s, "l6-g1"), kl(s, "l2-g1") - kl(s, "l4-g1")) for s in texts]),
        ),
        Measurement(
            ORDER_G,
            *_over([min(kl(s, "l4-g2") - kl(s, "l4-g1"), kl(s, "l4-g4") - kl(s, "l4-g2")) for s in texts]),
        ),
        Measurement(KD_LM, *_over([cross(s, "narrow-qkv-lm") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(KD_ALL_LM, *_over([cross(s, "narrow-full-lm") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(ALL_KD, *_over([cross(s, "narrow-full-kd") - cross(s, "narrow-qkv-kd") for s in texts])),
        Measurement(DROPPED, *_over([kl(s, "dropped") - kl(s, "l4-g1") for s in texts])),
        Measurement(COPIED, *_over([kl(s, "copied") - kl(s, "l4-g1") for s in texts])),
        Measurement(FP8, *_over([_spared(seed["l4-g1"]) for seed in texts])),
        Measurement(THROUGHPUT, gains.pop("g4-fp8", None)),
        *(Measurement(_throughput(name), gain) for name, gain in gains.items()),
        *_reported(texts, recalls, side, arms),
    ]


def _gap(arm: dict[str, Any]) -> float:
    """The share of the cross-entropy lost at conversion that distillation wins back, %."""
    lost = arm["before"]["cross_entropy"] - arm["before"]["teacher_cross_entropy"]
    left = arm["after"]["cross_entropy"] - arm["before"]["teacher_cross_entropy"]
    return 100 * (1 - left / lost) if lost > 0 else math.nan


def _gains(side: dict[str, Any]) -> dict[str, float]:
    """Tokens a second over the base's, for each swift model that was timed."""
    timed = dict(side.get("throughput", {}))
    base = timed.pop("base", None)
    return {name: found["tokens_per_second"] / base["tokens_per_second"] for name, found in timed.items()}


def _throughput(name: str) -> Claim:
    what = f"Tokens a second at equal KV memory over the base: 50 % SingleInputKV, {name} (reported)"
    return Claim(f"throughput-{name}", what, f"{PAPER}, abstract: up to 2 times", "x", None, None, "min")


def _spared(arm: dict[str, Any]) -> float:
    skipping = arm["after"]["cross_entropy"] - arm["after"]["teacher_cross_entropy"]
    return skipping - (arm["kept in"]["fp8"]["cross_entropy"] - arm["kept in"]["fp32"]["cross_entropy"])


def _over(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds."""
    if not all(map(math.isfinite, values)):
        return None, None  # nothing was lost at conversion, so that no share of it can be won back
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _reported(
    texts: list[dict[str, Any]], recalls: list[dict[str, Any]], side: dict[str, Any], arms: Arms
) -> list[Measurement]:
    """The figures behind the claims, arm by arm, without a threshold."""
    rows: list[Measurement] = []

    def row(id: str, what: str, unit: str, source: str, values: list[float]) -> None:
        claim = Claim(id, f"{what} (reported)", source, unit, None, None, "min")
        rows.append(Measurement(claim, *_over(values)))

    swift = [f"l{e}-g{g}" for e, g in arms]
    narrow = {
        f"narrow-{train}-{loss}": f"{said} + {named}, narrow text"
        for train, said in (("qkv", "Q/K/V"), ("full", "all weights"))
        for loss, named in (("kd", "distillation"), ("lm", "LM loss"))
    }
    titles = {name: _title(name) for name in swift} | narrow
    titles |= {"dropped": "upper layers dropped", "copied": "cache of the layer below"}
    titles |= {"recipe": "l = 4/8, g = 1, the recipe's steps"}
    row("gap-closed-recipe", "Gap closed: l = 4/8, g = 1, the recipe's steps", "%", "text, held out",
        [_gap(seed["recipe"]) for seed in texts])  # fmt: skip
    for name in swift:
        row(f"kv-bytes-{name}", f"KV bytes of the base's: {_title(name)}", "%", f"{PAPER}: 62.5 at l = 4/8, g = 4",
            [side["bytes"][name]["measured"]])  # fmt: skip
    base = [seed[swift[0]]["before"]["teacher_cross_entropy"] for seed in texts]
    row("cross-entropy-base", "Cross-entropy: the base", "nats", "text, held out", base)
    for key, said, unit, factor in (
        ("cross_entropy", "Cross-entropy", "nats", 1),
        ("kl", "KL to the base", "nats", 1),
        ("agreement", "Top-1 agreement with the base", "%", 100),
    ):
        for name, title in titles.items():
            for when, then in (("before", "at conversion"), ("after", "distilled")):
                if name in narrow and when == "before":
                    continue  # the same converted model as l = 4/8, g = 1
                if name in narrow:
                    then = "trained"
                values = [factor * seed[name][when][key] for seed in texts]
                row(
                    f"{key}-{name}-{when}".replace("_", "-"), f"{said}: {title}, {then}", unit, "text, held out", values
                )
    for name in ("dropped", "copied"):
        row(f"weights-{name}", f"Weights trained: {titles[name]}", "", "this package",
            [float(seed[name]["weights"]) for seed in texts])  # fmt: skip
        for rate in texts[0][name]["tried"]:
            values = [seed[name]["tried"][rate]["kl"] for seed in texts]
            row(
                f"kl-{name}-lr-{rate}", f"KL to the base: {titles[name]}, rate {rate}", "nats", "text, held out", values
            )
    for pairs in ("16", "24"):
        for name in ("base", *swift):
            for when, then in (("before", ", at conversion"), ("after", "" if name == "base" else ", distilled")):
                if when in recalls[0][name]:
                    values = [100 * seed[name][when][pairs] for seed in recalls]
                    said = f"Key-value recall at {pairs} pairs: {_title(name)}{then}"
                    row(f"recall-{pairs}-{name}-{when}", said, "%", "generated sequences", values)
    for name in [name for name in swift if "kept in" in texts[0][name]]:
        for kind in CACHES:
            said = f"{_title(name)}, distilled, cache in {kind}"
            values = [seed[name]["kept in"][kind]["kl"] for seed in texts]
            row(f"kl-{name}-{kind}", f"KL to the base: {said}", "nats", "text, held out", values)
            values = [100 * seed[name]["kept in"][kind]["16"] for seed in recalls]
            row(f"recall-16-{name}-{kind}", f"Key-value recall at 16 pairs: {said}", "%", "generated sequences", values)
    return rows


def _title(name: str) -> str:
    if name == "base":
        return "the base"
    kept, group = name.split("-")
    return f"l = {kept[1:]}/8, g = {group[1:]}"


def figures(
    texts: list[dict[str, Any]], recalls: list[dict[str, Any]], side: dict[str, Any], arms: Arms
) -> dict[str, Any]:
    names = [f"l{e}-g{g}" for e, g in arms]
    labels = [f"l={e}/8\ng={g}" for e, g in arms]
    places = list(range(len(names)))

    def bars(axes: Any, values: list[list[float]], label: str, shift: float) -> None:
        means = [statistics.mean(v) for v in values]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.bar([i + shift for i in range(len(values))], means, 0.38, yerr=spreads, capsize=3, label=label)

    quality, axes = figure(
        "Quality lost and won back", "layers kept and layers a group", "KL to the base, nats a token"
    )
    for when, label, shift in (("before", "at conversion", -0.08), ("after", "distilled", 0.08)):
        # a logarithmic axis has no 0 for bars to stand on: the mean as a mark, every seed as a point
        shares = [[seed[n][when]["kl"] for seed in texts] for n in names]
        (mark,) = axes.plot([i + shift for i in places], [statistics.mean(v) for v in shares], "_", markersize=16,
                            markeredgewidth=2.5, label=label)  # fmt: skip
        dots = [(i + shift, value) for i, values in enumerate(shares) for value in values]
        axes.plot(*zip(*dots, strict=True), "o", color=mark.get_color(), markersize=4, alpha=0.6)
    axes.set_xticks(places, labels)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    recall, axes = figure("Key-value recall after distillation", "layers kept and layers a group", "right answers, %")
    for pairs, shift in (("16", -0.2), ("24", 0.2)):
        # seeds as points: some learn it and some do not, so that a mean and its deviation say little
        shares = [[100 * seed[n]["after"][pairs] for seed in recalls] for n in names]
        axes.bar([i + shift for i in places], [statistics.mean(v) for v in shares], 0.38, label=f"{pairs} pairs")
        dots = [(i + shift, value) for i, values in enumerate(shares) for value in values]
        axes.plot(*zip(*dots, strict=True), "o", color="black", markersize=4, alpha=0.7)
        level = statistics.mean(100 * seed["base"]["after"][pairs] for seed in recalls)
        axes.axhline(
            level, color="#0072B2" if pairs == "16" else "#D55E00", linestyle=":", label=f"base, {pairs} pairs"
        )
    axes.set_xticks(places, labels)
    axes.set_ylim(0, 130)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, ncols=2, loc="upper center")
    ablation, axes = figure("Loss and trained weights, narrow text", "arm", "cross-entropy on held-out text, nats")
    cases = ["narrow-qkv-kd", "narrow-qkv-lm", "narrow-full-kd", "narrow-full-lm"]
    values = [[seed[c]["after"]["cross_entropy"] for seed in texts] for c in cases]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.bar(range(4), [statistics.mean(v) for v in values], 0.6, yerr=spreads, capsize=3, color="#0072B2")
    axes.set_xticks(range(4), ["Q/K/V\ndistilled", "Q/K/V\nLM loss", "all\ndistilled", "all\nLM loss"])
    base = statistics.mean(seed["narrow-qkv-kd"]["before"]["teacher_cross_entropy"] for seed in texts)
    start = statistics.mean(seed["narrow-qkv-kd"]["before"]["cross_entropy"] for seed in texts)
    axes.axhline(base, color="#009E73", linestyle=":", label="base")
    axes.axhline(start, color="#D55E00", linestyle=":", label="at conversion")
    axes.set_ylim(min(base, *(min(v) for v in values)) - 0.05)
    axes.legend(frameon=False)
    kept = [name for name in names if "kept in" in texts[0][name]]
    cached, axes = figure("Caches of fewer bits, distilled models", "cache", "KL to the base, nats a token")
    for name, shift in zip(kept, (-0.2, 0.2), strict=True):
        bars(axes, [[seed[name]["kept in"][kind]["kl"] for seed in texts] for kind in CACHES], _title(name), shift)
    axes.set_xticks(range(len(CACHES)), CACHES)
    low, high = axes.get_ylim()
    axes.set_ylim(low, 1.25 * high)
    axes.legend(frameon=False, ncols=2, loc="upper center")
    speed, axes = figure("Prefill time", "prompt, tokens", "seconds")
    lengths = [point["n"] for point in side["curve"]]
    axes.plot(lengths, [point["base_seconds"] for point in side["curve"]], "o-", label="base, our engine")
    axes.plot(lengths, [point["swift_seconds"] for point in side["curve"]], "o-", label="swift, l = L/2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    for point in side["curve"]:
        axes.annotate(f"{point['ratio']:.2f}x", (point["n"], point["swift_seconds"]), xytext=(4, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.legend(frameon=False)
    return {"quality": quality, "recall": recall, "ablation": ablation, "cache": cached, "prefill": speed}
