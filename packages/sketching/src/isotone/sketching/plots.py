"""Plots: accuracy against bytes, curves beside bounds, reconstructions, PSNR by size, accuracy by epsilon."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isotone.shared.claims import figure

Row = Mapping[str, Any]
STYLES = ("-", "--", ":")


def against_bytes(rows: Sequence[Row], what: str = "accuracy") -> Any:
    """A line for each arm, the mean over the seeds."""
    label = "test accuracy, %" if what == "accuracy" else "training loss, nats"
    drawing, axes = figure("What the bytes bought", "kB of one client, up and down", label, size=(8.4, 5.0))
    for number, row in enumerate(rows):
        x = [value / 1e3 for value in row["bytes"]]
        axes.plot(x, np.mean(row[what], 0), STYLES[number // 6 % 3], marker=".", markersize=4, label=row["arm"])
    axes.set_xscale("log")
    if what == "accuracy":
        # what matters is close to the top
        top = max(max(np.mean(row[what], 0)) for row in rows)
        axes.set_ylim(max(0, top - 30), top + 2)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def convergence(curves: Sequence[Row]) -> Any:
    """Each measured curve with its bound, dashed, of the same colour: a panel for each problem and number of local
    steps."""
    panels = list(dict.fromkeys((curve["problem"], curve["local_steps"]) for curve in curves))
    drawing, first = figure("Measured (solid) and bound (dashed)", "", "", size=(8.4, 3.1 * len(panels)))
    # the house's colours are the first axes' own
    colours = [first.plot([])[0].get_color() for _ in range(8)]
    first.remove()
    axes = drawing.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (problem, steps) in zip(axes, panels, strict=True):
        axis.set_prop_cycle(color=colours)
        for curve in (curve for curve in curves if (curve["problem"], curve["local_steps"]) == (problem, steps)):
            start, rounds = curve["value"][0], range(1, len(curve["value"]))
            value = np.array(curve["value"][1:]) / start
            (line,) = axis.plot(rounds, value, label=f"{curve['kind']}, s = {curve['s']}")
            error = np.array(curve["error"][1:]) / start
            axis.fill_between(rounds, np.maximum(value - error, 1e-9), value + error, color=line.get_color(), alpha=0.2)
            axis.plot(rounds, np.array(curve["bound"][1:]) / start, "--", linewidth=1, color=line.get_color())
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
        what = "least |gradient|^2" if problem == "non-convex" else "f - f*"
        axis.set_ylabel(f"{what}, over the start")
        many = f", K = {steps}, {curve['clients']} clients, bound recalled" if steps > 1 else ""
        axis.set_title(f"{problem}{many}: measured (solid), bound (dashed)", loc="left", fontsize=11, fontweight="bold")
        axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel("rounds")
    return drawing


def sheet(pictures: Mapping[str, np.ndarray], columns: int = 6) -> Any:
    """Rows of pictures (n, height, width, channels) by name: the truth first."""
    count = min(columns, *(len(row) for row in pictures.values()))
    drawing, only = figure("", "", "", size=(0.8 * count + 1.6, 0.8 * len(pictures) + 0.2))
    only.remove()
    axes = drawing.subplots(len(pictures), count, squeeze=False)
    for row, (name, shown) in zip(axes, pictures.items(), strict=True):
        for axis, picture in zip(row, shown[:count], strict=True):
            grey = picture.shape[-1] == 1 if picture.ndim == 3 else True
            axis.imshow(
                picture.reshape(picture.shape[:2]) if grey else np.clip(picture, 0, 1), "gray_r", vmin=0, vmax=1
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return drawing


def psnr_by_size(leaks: Sequence[Row], inputs: int) -> Any:
    """A line for each batch and number of local steps; the dashed line is the number of inputs."""
    drawing, axes = figure(
        "What leaks through a sketch", "numbers sent", "PSNR of the reconstruction, dB", size=(7.4, 4.6)
    )
    plain = [leak for leak in leaks if leak["noise"] is None]
    for key in dict.fromkeys((leak["batch"], leak["local_steps"]) for leak in plain):
        mine = sorted(
            (leak["s"] or leak["d"], leak["psnr"]) for leak in plain if (leak["batch"], leak["local_steps"]) == key
        )
        axes.plot([s for s, _ in mine], [v for _, v in mine], marker="o", label=f"batch {key[0]}, K = {key[1]}")
    axes.axvline(inputs, color="#888888", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=9)
    return drawing


def accuracy_by_epsilon(rows: Sequence[Row], plain: float) -> Any:
    """Accuracy with its spread at each epsilon, a line for each trust; the dashed line is without privacy."""
    drawing, axes = figure("What privacy costs", "epsilon", "test accuracy, %", size=(7.4, 4.4))
    for trust in dict.fromkeys(row["trust"] for row in rows):
        mine = [row for row in rows if row["trust"] == trust]
        means = [statistics.mean(row["accuracy"]) for row in mine]
        spread = [statistics.stdev(row["accuracy"]) if len(row["accuracy"]) > 1 else 0.0 for row in mine]
        axes.errorbar([row["epsilon"] for row in mine], means, spread, marker="o", capsize=3, label=trust)
    axes.axhline(plain, color="#888888", linestyle="--", linewidth=1)
    axes.annotate("not private", (1, plain), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    axes.set_xscale("log")
    ticks = sorted({row["epsilon"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing
