"""Figures, times and table cells as a reader wants them."""

from __future__ import annotations

import math


def quantity(value: float | str | None, spread: float | None = None, unit: str = "") -> str:
    """A figure as a reader wants it: four digits, or as many as its spread leaves standing."""
    if value is None or isinstance(value, str):
        return value or "–"
    shown = number(value)
    if spread is not None:
        shown = f"{shown} ± {number(spread)}"
        decimals = 1 - math.floor(math.log10(spread)) if spread > 0 else 0
        if spread > 0 and decimals <= 6 and abs(value) < 1e6:
            shown = f"{value:,.{max(0, decimals)}f} ± {spread:,.{max(0, decimals)}f}"
    return f"{shown} {unit}".rstrip()


def number(value: float) -> str:
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if 1000 <= size < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= size < 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
