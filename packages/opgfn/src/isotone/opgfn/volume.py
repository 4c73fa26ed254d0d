"""Exact hypervolume for maximisation: the volume dominated by a set of points above a reference point.

One and two objectives by sorting, three by a sweep that keeps a staircase, O(n log n) insertions, four by slicing
into three-dimensional sweeps, O(n^2 log n). More are approximated, on request, by Monte Carlo.
"""

from __future__ import annotations

import bisect

import numpy as np
import torch

from isotone.opgfn.checks import check_objectives
from isotone.opgfn.pareto import non_dominated_mask

EXACT_OBJECTIVES = 4


def hypervolume(
    u: np.ndarray | torch.Tensor,
    reference: np.ndarray | float = 0.0,
    *,
    approx: bool = False,
    samples: int = 200_000,
    seed: int = 0,
) -> float:
    """Volume of the union of the boxes [reference, u_i], all objectives maximised.

    `u`: (n, d), finite; points not above the reference in every objective dominate no volume. Exact for d <= 4;
    beyond, `approx=True` samples `samples` uniform points of the bounding box: relative standard error
    sqrt((1 - p) / (p samples)) for a share p of the box. Raises `ValueError` for d > 4 without it.
    """
    points = np.asarray(u, dtype=np.float64)
    check_objectives(points)
    points = points - reference
    points = points[(points > 0).all(1)]
    if len(points) == 0:
        return 0.0
    d = points.shape[1]
    if d > EXACT_OBJECTIVES and not approx:
        raise ValueError(
            f"expected at most {EXACT_OBJECTIVES} objectives for an exact hypervolume, got {d}: use approx=True"
        )
    if d > EXACT_OBJECTIVES:
        return _monte_carlo(_front(points), samples, seed)
    if d == 1:
        return float(points.max())
    if d == 2:
        return _area(points)
    return _volume_3d(points) if d == 3 else _volume_4d(_front(points))


def _front(points: np.ndarray) -> np.ndarray:
    points = np.unique(points, axis=0)
    return points[non_dominated_mask(torch.from_numpy(points)).numpy()]


def _area(points: np.ndarray) -> float:
    """Rows by x descending: each adds its rise in y above all of larger x."""
    order = np.argsort(-points[:, 0], kind="stable")
    x, top = points[order, 0], np.maximum.accumulate(points[order, 1])
    return float((x * np.diff(top, prepend=0.0)).sum())


def _volume_3d(points: np.ndarray) -> float:
    """Sweep z downwards; between two levels the slice is the area under the staircase of what came before."""
    order = np.argsort(-points[:, 2], kind="stable")
    x, y, z = (column.tolist() for column in points[order].T)
    # corners of the staircase, x ascending and y descending, between two sentinels
    xs, ys = [0.0, np.inf], [np.inf, 0.0]
    volume = area = 0.0
    level = z[0]
    for px, py, pz in zip(x, y, z, strict=True):
        end = bisect.bisect_left(xs, px)
        if ys[end] >= py:
            continue  # a corner with larger x and y stands already, and its z is larger
        volume += area * (level - pz)
        level = pz
        if xs[end] == px:
            end += 1
        # the new corner's box above the corner to its right, less the steps that it swallows
        start, edge = end, ys[end]
        area += px * (py - edge)
        while ys[start - 1] <= py:
            start -= 1
            area -= xs[start] * (ys[start] - edge)
            edge = ys[start]
        area -= xs[start - 1] * (py - edge)
        xs[start:end] = [px]
        ys[start:end] = [py]
    return volume + area * level


def _volume_4d(points: np.ndarray) -> float:
    """Sweep the last objective downwards; each point adds to the slice what it covers alone."""
    points = points[np.argsort(-points[:, 3], kind="stable")]
    slices = points[:, :3]
    total = volume = 0.0
    levels = np.append(points[:, 3], 0.0)
    standing = np.empty((0, 3))
    for k, corner in enumerate(slices):
        if not (standing >= corner).all(1).any():
            shared = np.minimum(standing, corner)
            volume += float(corner.prod()) - (_volume_3d(shared) if len(shared) else 0.0)
            standing = np.concatenate([standing[~(standing <= corner).all(1)], corner[None]])
        total += volume * float(levels[k] - levels[k + 1])
    return total


def _monte_carlo(points: np.ndarray, samples: int, seed: int) -> float:
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, got {samples}")
    generator, top = np.random.default_rng(seed), points.max(0)
    inside, rows = 0, max(1, 2**22 // len(points))
    for start in range(0, samples, rows):
        drawn = generator.random((min(rows, samples - start), points.shape[1])) * top
        covered = np.ones((len(drawn), len(points)), dtype=bool)
        for k in range(points.shape[1]):
            covered &= points[:, k] >= drawn[:, k, None]
        inside += int(covered.any(1).sum())
    return float(top.prod()) * inside / samples
