"""Plots: fields with their errors, error against training time, error of the arms, step time against resolution."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isotone.shared.claims import figure

Rows = Sequence[Mapping[str, Any]]


def error_against_time(rows: Rows, title: str) -> Any:
    """A line for each arm: test error as training went on, the mean over seeds at equal shares of the training."""
    drawing, axes = figure(title, "seconds of training, without compiling", "test error, relative L2", size=(8.4, 5.0))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        curves = [row["curve"] for row in rows if row["arm"] == arm]
        shortest = min(len(curve) for curve in curves)
        seconds = [statistics.mean(curve[-shortest + i][0] for curve in curves) for i in range(shortest)]
        errors = [statistics.mean(curve[-shortest + i][1] for curve in curves) for i in range(shortest)]
        axes.plot(seconds, errors, marker="o", markersize=3, label=arm)
    floors = [row["floor"] for row in rows if row.get("floor")]
    if floors:
        axes.axhline(min(floors), color="#888888", linestyle="--", linewidth=1)
        axes.annotate("irreducible", (1, min(floors)), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def step_times(rows: Sequence[Sequence[Any]], title: str = "Time of a training step") -> Any:
    """(arm, size, seconds): a line for each arm over the resolution."""
    drawing, axes = figure(title, "points a side", "seconds a step", size=(7.4, 4.6))
    for arm in dict.fromkeys(arm for arm, *_ in rows):
        mine = sorted((size, seconds) for name, size, seconds in rows if name == arm)
        axes.plot([size for size, _ in mine], [seconds for _, seconds in mine], marker="o", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize=9)
    return drawing


def fields(inputs: np.ndarray, targets: np.ndarray, predictions: Mapping[str, np.ndarray], channel: int = 0) -> Any:
    """One sample (N1, N2, C): input, target, and for each model its field and its error on one scale; of one axis
    (N, C), lines; of three, the middle of the first."""
    if targets.ndim == 2:
        drawing, axes = figure("One test sample", "point", "field", size=(7.4, 4.4))
        for name, line in {"input": inputs, "target": targets, **predictions}.items():
            axes.plot(line[:, channel], label=name, linestyle="--" if name == "input" else "-")
        axes.legend(fontsize=9)
        return drawing
    if targets.ndim == 4:
        inputs, targets = inputs[len(inputs) // 2], targets[len(targets) // 2]
        predictions = {name: field[len(field) // 2] for name, field in predictions.items()}
    columns = 2 + len(predictions)
    drawing, whole = figure("", "", "", size=(2.6 * columns, 5.4))
    drawing.delaxes(whole)
    panels: Any = drawing.subplots(2, columns, squeeze=False)
    truth = targets[..., channel]
    low, high = float(truth.min()), float(truth.max())
    gaps = {name: np.abs(field[..., channel] - truth) for name, field in predictions.items()}
    most = max((float(gap.max()) for gap in gaps.values()), default=1.0)
    _show(panels[0][0], inputs[..., 0], "input")
    _show(panels[0][1], truth, "target", low, high)
    for column, (name, field) in enumerate(predictions.items(), 2):
        image = _show(panels[0][column], field[..., channel], name, low, high)
        error = _show(panels[1][column], gaps[name], f"|error|, mean {gaps[name].mean():.2g}", 0.0, most, "magma")
    for axis in panels[1][:2]:
        axis.axis("off")
    if predictions:
        drawing.colorbar(image, ax=list(panels[0]), shrink=0.8)
        drawing.colorbar(error, ax=list(panels[1]), shrink=0.8)
    return drawing


def _show(axis: Any, field: np.ndarray, title: str, low: Any = None, high: Any = None, colours: str = "viridis") -> Any:
    image = axis.imshow(field, origin="lower", vmin=low, vmax=high, cmap=colours)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    return image


def irreducible(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Any:
    """The irreducible error against the number of modes, a line for each set of fields."""
    drawing, axes = figure("What a truncation costs", "modes an axis", "irreducible relative L2", size=(6.4, 4.2))
    for name, curve in curves.items():
        axes.plot([m for m, _ in curve], [max(error, 1e-7) for _, error in curve], marker=".", label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=9)
    return drawing
