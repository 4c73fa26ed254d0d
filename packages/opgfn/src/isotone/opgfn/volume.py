"""Hypervolume for maximisation: the volume dominated by a set of points above a reference point.

Computed by moocore, exactly up to six objectives and on request approximately beyond.
"""

from __future__ import annotations

import moocore
import numpy as np
import torch

from isotone.opgfn.checks import check_objectives

EXACT_OBJECTIVES = 6


def hypervolume(
    u: np.ndarray | torch.Tensor,
    reference: np.ndarray | float = 0.0,
    *,
    approx: bool = False,
    samples: int = 200_000,
    seed: int = 0,
) -> float:
    """Volume of the union of the boxes [reference, u_i], all objectives maximised.

    `u`: (n, d), finite; points not above the reference in every objective dominate no volume. `reference`: one
    number, or one an objective. Exact for d <= 6, O(n log n) up to three objectives and O(n^2) for four; beyond,
    `approx=True` integrates over `samples` random directions. Raises `ValueError` for d > 6 without it, on NaN,
    infinity, or a reference of another length.
    """
    points = np.asarray(u, dtype=np.float64)
    check_objectives(points)
    d = points.shape[1]
    origin = np.asarray(reference, dtype=np.float64)
    if origin.shape not in ((), (d,)) or not np.isfinite(origin).all():
        raise ValueError(f"expected a reference of one finite number or of {d}, got {reference}")
    if d > EXACT_OBJECTIVES and not approx:
        raise ValueError(
            f"expected at most {EXACT_OBJECTIVES} objectives for an exact hypervolume, got {d}: use approx=True"
        )
    if samples < 1:
        raise ValueError(f"expected at least 1 sample, got {samples}")
    corner = np.broadcast_to(-origin, (d,))
    if len(points) == 0:
        return 0.0
    if d <= EXACT_OBJECTIVES:
        return float(moocore.hypervolume(-points, ref=corner))
    above = points[(points > origin).all(1)]
    if len(above) == 0:
        return 0.0
    return float(moocore.hv_approx(-above, ref=corner, nsamples=samples, seed=seed, method="DZ2019-MC"))
