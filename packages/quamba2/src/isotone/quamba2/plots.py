"""The drawings of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isotone.quamba2.report import Report
from isotone.shared.claims import figure


def blocks(found: Report, path: Path) -> None:
    """Each block's decibels against the float model, 8 and 16 bits apart."""
    drawing, axes = figure("Each block against the float model", "block", "signal over noise, dB")
    for bits, mark in ((8, "o"), (16, "s")):
        kept = [(number, one.sqnr) for number, one in enumerate(found.blocks) if one.bits == bits]
        if kept:
            axes.plot(*zip(*kept, strict=True), mark, label=f"activations of {bits} bits")
    axes.legend(frameon=False)
    _save(drawing, path)


def search(best: list[float], path: Path) -> None:
    """The best loss of each generation."""
    drawing, axes = figure("Search for blocks of 16 bits", "generation", "loss, nats a token")
    axes.plot(range(len(best)), best, "o-")
    _save(drawing, path)


def _save(drawing: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
