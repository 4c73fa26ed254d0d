"""The plots: losses, when each lane worked, and the link sweep beside its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isotone.distzo2.link import LANES, Span
from isotone.shared.claims import figure


def loss_plot(losses: Mapping[str, Sequence[float]], title: str, floor: float | None = None, smooth: int = 1) -> Any:
    """Training losses by arm, as means over `smooth` steps; a line at the `floor`, if there is one."""
    drawing, axes = figure(title, "step", "loss, nats")
    for name, values in losses.items():
        usable = len(values) // smooth * smooth
        means = np.asarray(values[:usable], dtype=float).reshape(-1, smooth).mean(1)
        axes.plot((np.arange(len(means)) + 1) * smooth, means, label=name)
    if floor is not None:
        axes.axhline(floor, color="#999999", linestyle=":")
    axes.legend(frameon=False)
    return drawing


def seconds_plot(
    runs: Mapping[str, Sequence[tuple[float, Sequence[float]]]], title: str, floor: float | None = None
) -> Any:
    """Training losses over wall time, steps being as long as one another: (seconds, losses) of each seed, by arm."""
    drawing, axes = figure(title, "seconds", "loss, nats")
    for number, (name, seeds) in enumerate(runs.items()):
        for place, (seconds, losses) in enumerate(seeds):
            smooth = max(1, len(losses) // 60)
            usable = len(losses) // smooth * smooth
            means = np.asarray(losses[:usable], dtype=float).reshape(-1, smooth).mean(1)
            at = seconds / max(len(losses), 1) * smooth * (np.arange(len(means)) + 1)
            axes.plot(at, means, color=f"C{number}", label=None if place else name)
    if floor is not None:
        axes.axhline(floor, color="#999999", linestyle=":")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return drawing


def timeline_plot(spans: Sequence[Span], title: str) -> Any:
    """When each lane worked on which block: seconds from left to right, a lane a row."""
    drawing, axes = figure(title, "milliseconds", "", size=(8.0, 3.0))
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    begin = min(span.start for span in spans)
    whole = 1000 * (max(span.end for span in spans) - begin)
    for row, lane in enumerate(lanes):
        for span in (s for s in spans if s.lane == lane):
            left, width = 1000 * (span.start - begin), 1000 * (span.end - span.start)
            axes.barh(row, width, left=left, height=0.8, color=f"C{row}", edgecolor="white", linewidth=0.5)
            if span.block >= 0 and width > 0.015 * whole:  # wide enough for its number
                axes.text(left + width / 2, row, str(span.block), ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return drawing


def sweep_plot(points: Sequence[Mapping[str, float]], title: str) -> Any:
    """Measured step times over the ratio of compute to transfer, and the model's: overlapped, and in turn."""
    drawing, axes = figure(title, "compute / upload of a block", "milliseconds a step")
    ratios = [point["ratio"] for point in points]
    for name, style, label in (
        ("measured", "o", "overlapped, measured"),
        ("predicted", "-", "N max(T) + fill"),
        ("serial_measured", "s", "in turn, measured"),
        ("serial_predicted", "--", "N sum(T)"),
    ):
        axes.plot(ratios, [1000 * point[name] for point in points], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.legend(frameon=False)
    return drawing
