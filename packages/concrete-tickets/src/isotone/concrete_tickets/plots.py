"""The plots of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from isotone.shared.claims import figure

Rows = Sequence[Mapping[str, Any]]
"""Outcomes as JSON: arm, density, seed, accuracy (%), ticket_seconds, train_seconds, layers."""


def accuracy_against_density(rows: Rows, dense: float | None = None) -> Any:
    """A line for each arm over the densities, with the standard deviation over the seeds as its band."""
    drawing, axes = figure("Accuracy of the trained ticket", "weights kept, %", "test accuracy, %", size=(8.4, 5.0))
    styles = ["-", "--", ":"]
    for number, arm in enumerate(_arms(rows)):
        groups = _by_density([row for row in rows if row["arm"] == arm])
        densities = sorted(groups)
        means = [statistics.mean(groups[d]) for d in densities]
        spreads = [statistics.stdev(groups[d]) if len(groups[d]) > 1 else 0.0 for d in densities]
        x = [100 * d for d in densities]
        (line,) = axes.plot(x, means, marker="o", markersize=4, linestyle=styles[number // 8 % 3], label=arm)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())
    if dense is not None:
        axes.axhline(dense, color="#888888", linewidth=1, linestyle="--")
        axes.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    _plain_log(axes)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def accuracy_against_time(rows: Rows, density: float) -> Any:
    """A point for each arm at one density: seconds to the trained ticket, accuracy, and its spread."""
    title = f"Time and accuracy at {100 * density:.3g} %"
    drawing, axes = figure(title, "seconds to a trained ticket, without compiling", "test accuracy, %", size=(9.0, 5.4))
    markers = "osD^v<>Ph*X"
    for number, arm in enumerate(_arms(rows)):
        mine = [row for row in rows if row["arm"] == arm and row["density"] == density]
        if not mine:
            continue
        seconds = statistics.median(row["ticket_seconds"] + row["train_seconds"] for row in mine)
        values = [row["accuracy"] for row in mine]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(
            *(seconds, statistics.mean(values), spread),
            marker=markers[number % len(markers)],
            linestyle="none",
            capsize=2,
            label=arm,
        )
    _plain_log(axes)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 if len(_arms(rows)) < 16 else 2)
    return drawing


def layer_densities(rows: Rows, density: float) -> Any:
    """The share of each layer that each arm keeps, at one density; the mean over the seeds."""
    title = f"Layers at {100 * density:.3g} %"
    mine = [row for row in rows if row["density"] == density]
    layers = list(mine[0]["layers"]) if mine else []
    size = (max(8.0, 0.35 * len(layers) + 5), 5.0)
    drawing, axes = figure(title, "", "weights kept, %", size=size)
    markers = "osD^v<>Ph*X"
    lowest = 1.0
    for number, arm in enumerate(_arms(mine)):
        values = [100 * statistics.mean(row["layers"][layer] for row in mine if row["arm"] == arm) for layer in layers]
        lowest = min([lowest, *(v for v in values if v > 0)])
        axes.plot(range(len(layers)), values, marker=markers[number % len(markers)], label=arm, alpha=0.8)
    # a layer with no weight left stands at 0, below the logarithmic part
    axes.set_yscale("symlog", linthresh=lowest)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    short = [layer.removesuffix("/kernel") for layer in layers]
    axes.set_xticks(range(len(layers)), short, rotation=90 if len(layers) > 6 else 0)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def _plain_log(axes: Any) -> None:
    """A logarithmic x axis with numbers as one reads them."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _arms(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _by_density(rows: Rows) -> dict[float, list[float]]:
    groups: dict[float, list[float]] = {}
    for row in rows:
        groups.setdefault(row["density"], []).append(row["accuracy"])
    return groups
