"""What is looked at: fronts, mass on a grid, curves with their spread, molecules drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isotone.shared.claims import figure


def front_figure(
    fronts: Mapping[str, np.ndarray], reference: np.ndarray | None, names: Sequence[str], title: str
) -> Any:
    """Points of the first two objectives by arm, over the reference front in grey."""
    drawing, axes = figure(title, names[0], names[1])
    if reference is not None and len(reference):
        order = np.argsort(reference[:, 0])
        axes.plot(
            *reference[order, :2].T,
            color="#bbbbbb",
            marker="s",
            markersize=5,
            linewidth=1,
            label="true front",
            zorder=1,
        )
    for name, points in fronts.items():
        if len(points):
            axes.scatter(points[:, 0], points[:, 1], s=16, alpha=0.65, label=name, zorder=2, linewidths=0)
    axes.legend(frameon=False)
    return drawing


def mass_figure(states: np.ndarray, mass: Mapping[str, np.ndarray], marked: np.ndarray, title: str) -> Any:
    """Terminal mass of each arm over a two-dimensional grid, on a log scale; marked cells are framed."""
    from matplotlib.colors import LogNorm

    side = int(states.max()) + 1
    drawing, first = figure(title, "", "", size=(3.4 * len(mass) + 0.9, 3.9))
    first.remove()
    panels = drawing.subplots(1, len(mass), squeeze=False)[0]
    picture: Any = None
    for axes, (name, values) in zip(panels, mass.items(), strict=True):
        grid = np.zeros((side, side))
        grid[states[:, 1], states[:, 0]] = values
        picture = axes.imshow(np.maximum(grid, 1e-6), origin="lower", cmap="viridis", norm=LogNorm(1e-6, 1.0))
        axes.scatter(states[marked, 0], states[marked, 1], s=9, facecolors="none", edgecolors="#D55E00", linewidths=0.7)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xticks([0, side - 1])
        axes.set_yticks([0, side - 1])
    drawing.suptitle(title, x=0.01, ha="left", fontweight="bold")
    drawing.colorbar(picture, ax=list(panels), label="P(x)", shrink=0.8)
    return drawing


def curve_figure(curves: Mapping[str, tuple[Sequence[Any], np.ndarray]], title: str, xlabel: str, ylabel: str) -> Any:
    """Mean over seeds of each arm, with its standard error: (x, values of shape (seeds, x))."""
    drawing, axes = figure(title, xlabel, ylabel, size=(8.6, 4.2))
    styles = ["-", "--", "-.", ":"]
    for number, (name, (x, values)) in enumerate(curves.items()):
        values = np.atleast_2d(values)
        mean = values.mean(0)
        (line,) = axes.plot(x, mean, label=name, linestyle=styles[number // 8 % 4])
        if len(values) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(values))
            axes.fill_between(x, mean - error, mean + error, alpha=0.2, color=line.get_color(), linewidth=0)
    # beside the curves: there may be as many as settings of a baseline
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawing


def molecules_figure(smiles: Sequence[str], captions: Sequence[str], title: str, columns: int = 4) -> Any:
    """Up to twelve molecules with a line of words each."""
    from matplotlib.image import imread
    from rdkit import Chem
    from rdkit.Chem import Draw

    chosen = list(smiles)[:12]
    molecules = [Chem.MolFromSmiles(text) for text in chosen]
    options = Draw.rdMolDraw2D.MolDrawOptions()
    options.legendFontSize = 22  # type: ignore[assignment]
    picture = Draw.MolsToGridImage(
        molecules,
        molsPerRow=columns,
        subImgSize=(360, 270),
        legends=list(captions)[:12],
        drawOptions=options,
        returnPNG=False,
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    buffer.seek(0)
    rows = -(-len(chosen) // columns)
    drawing, axes = figure(title, "", "", size=(2.2 * columns, 1.7 * rows + 0.5))
    axes.imshow(imread(buffer))
    axes.set_axis_off()
    return drawing
