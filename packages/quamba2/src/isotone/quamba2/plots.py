"""The drawings of the command line and of `reproduce`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from isotone.quamba2.clustering import sort_and_cluster
from isotone.quamba2.report import Report
from isotone.shared.claims import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blocks(found: Report, path: Path) -> None:
    """Each block's decibels against the float model, 8 and 16 bits apart."""
    drawing, axes = figure("Each block against the float model", "block", "signal over noise, dB")
    for bits, mark in ((8, "o"), (16, "s")):
        kept = [(number, one.sqnr) for number, one in enumerate(found.blocks) if one.bits == bits]
        if kept:
            axes.plot(*zip(*kept, strict=True), mark, label=f"activations of {bits} bits")
    axes.legend(frameon=False)
    save(drawing, path)


def search(best: list[float], path: Path) -> None:
    """The best loss of each generation."""
    drawing, axes = figure("Search for blocks of 16 bits", "generation", "loss, nats a token")
    axes.plot(range(len(best)), best, "o-")
    save(drawing, path)


def ladder(rows: Sequence[Mapping[str, float]], arms: Sequence[str]) -> Figure:
    """Error of the scan by the scales of x, a dot a seed, the `arms` in their order."""
    drawing, axes = figure("What the scales of x cost the scan", "", "median error of a channel", size=(7.0, 4.6))
    for number, arm in enumerate(arms):
        axes.plot([number] * len(rows), [row[arm] for row in rows], "o", color="#0072B2", alpha=0.6)
    axes.set_xticks(range(len(arms)), arms, rotation=35, ha="right")
    axes.set_yscale("log")
    return drawing


def profiles(
    stats: Tensor, head_dim: int, groups: int, head_groups: int = 4, dim_groups: int = 4, clustering: str = "kmeans"
) -> Figure:
    """max |x| of the channels of a layer's first SSM group as they lie, and in their clusters with each one's scale.

    `stats` (d,) and the sizes are those of `sort_and_cluster`.
    """
    width = len(stats) // groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cut of the clusters has been said where they were made
        plan = sort_and_cluster(stats, head_dim, groups, head_groups, dim_groups, clustering)
    after = stats[plan.channel_index][:width]
    labels = plan.labels[:width]
    tops = stats.new_zeros(plan.count).scatter_reduce(0, labels, after, "amax")
    drawing, axes = figure("Channels of an SSM group before and after sort-and-cluster", "channel", "max |x|")
    axes.plot(stats[:width].tolist(), ".", markersize=4, label="as they lie")
    axes.plot(after.tolist(), "-", label="sorted and clustered")
    axes.step(range(width), tops[labels].tolist(), where="mid", label="what each scale covers")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return drawing


def rows(
    found: Sequence[Mapping[str, Mapping[str, float]]], sizes: Mapping[str, int], names: Sequence[str], what: str
) -> Figure:
    """KL to the float model against the bytes of the weights, the mean over seeds of each row in `names`."""
    drawing, axes = figure(f"KL against bytes, {what}", "bytes of weights over float16's", "KL, nats", size=(7.0, 5.0))
    for number, name in enumerate(names):
        mean = sum(row[name]["kl"] for row in found) / len(found)
        axes.plot(sizes[name] / sizes["float"], mean, "os^D"[number // 8], label=name)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def save(drawing: Figure, path: Path) -> None:
    """Write it as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
