"""The plots' style, and how they are saved."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotone.shared.checkpoint import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(title: str, xlabel: str, ylabel: str, *, size: tuple[float, float] = (7.0, 4.2)) -> tuple[Figure, Axes]:
    """An empty plot in the house's style: eight colours that the colour-blind can tell apart, no frame.

    `size` in inches. The figure belongs to no window system and to no global state of matplotlib.
    """
    from matplotlib import rc_context, rcsetup
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Okabe and Ito's colours, the yellow last, which is faint on white
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
    grey = "#555555"
    style: Any = {
        "axes.prop_cycle": rcsetup.cycler(color=colours),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": grey,
        "axes.labelcolor": "#222222",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "xtick.color": grey,
        "ytick.color": grey,
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
    }
    with rc_context(style):
        drawing = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(drawing)
        axes = drawing.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    return drawing, axes


def save_figure(drawing: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    # without the version of matplotlib, the same figure is the same file
    drawing.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    atomic_write(path, buffer.getvalue())
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(drawing)
