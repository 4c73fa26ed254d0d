"""Measures of a set of candidates: convergence and coverage of a front, diversity of molecules, modes (section 2.8).

Objectives are maximised throughout. `front` is the set that is judged (n, d), `reference` the true front (m, d).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from isotone.opgfn.checks import check_objectives
from isotone.opgfn.volume import hypervolume

__all__ = [
    "avg_hausdorff",
    "diverse_top_k",
    "extreme_faces",
    "gd_plus",
    "hypervolume",
    "igd_plus",
    "modes_found",
    "pc_entropy",
    "r2",
    "simplex_lattice",
    "tanimoto_diversity",
    "top_k_mean",
]


def _pair(front: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    front, reference = np.asarray(front, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    check_objectives(front)
    check_objectives(reference)
    if front.shape[1] != reference.shape[1]:
        raise ValueError(f"expected as many objectives as the reference's {reference.shape[1]}, got {front.shape[1]}")
    if len(front) == 0 or len(reference) == 0:
        raise ValueError(f"expected at least one point each, got {len(front)} and {len(reference)}")
    return front, reference


def _shortfall(front: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(m, n): the length of max(p - a, 0), what point a lacks of reference point p."""
    square = np.zeros((len(reference), len(front)))
    for k in range(front.shape[1]):
        square += np.maximum(reference[:, k, None] - front[None, :, k], 0.0) ** 2
    return np.sqrt(square)


def igd_plus(front: np.ndarray, reference: np.ndarray) -> float:
    """IGD+ = mean over reference points p of the least ||max(p - a, 0)|| over a."""
    return float(_shortfall(*_pair(front, reference)).min(1).mean())


def gd_plus(front: np.ndarray, reference: np.ndarray) -> float:
    """GD+ = mean over points a of the least ||max(p - a, 0)|| over reference points p."""
    return float(_shortfall(*_pair(front, reference)).min(0).mean())


def avg_hausdorff(front: np.ndarray, reference: np.ndarray) -> float:
    """The larger of GD+ and IGD+."""
    return max(gd_plus(front, reference), igd_plus(front, reference))


def extreme_faces(objectives: int, points: int = 10) -> np.ndarray:
    """The reference where no front is known: the points of a grid of [0, 1]^d with some coordinate equal to 1."""
    if objectives < 1 or points < 2:
        raise ValueError(f"expected at least 1 objective and 2 points an axis, got {objectives} and {points}")
    axis = np.linspace(0.0, 1.0, points)
    grid = np.array(list(itertools.product(axis, repeat=objectives)))
    return grid[(grid == 1.0).any(1)]


def simplex_lattice(objectives: int, divisions: int) -> np.ndarray:
    """All weight vectors with coordinates k / divisions that sum to 1: C(divisions + d - 1, d - 1) rows."""
    if objectives < 1 or divisions < 1:
        raise ValueError(f"expected at least 1 objective and 1 division, got {objectives} and {divisions}")
    bars = itertools.combinations(range(divisions + objectives - 1), objectives - 1)
    rows = [np.diff([-1, *places, divisions + objectives - 1]) - 1 for places in bars]
    return np.array(rows, dtype=np.float64) / divisions


def r2(
    front: np.ndarray,
    weights: np.ndarray | None = None,
    ideal: np.ndarray | float = 1.0,
    *,
    normalisation: str = "mean",
    divisions: int = 10,
) -> float:
    """R2 = c sum_v min_a max_j v_j |z_j - a_j|: smaller is better.

    `normalisation`: "mean", the textbook's c = 1 / |V|, or "frobenius", c = 1 / ||V||_F, the reference code's.
    `weights` V (m, d): the simplex lattice of `divisions` where not given.
    """
    front = np.asarray(front, dtype=np.float64)
    check_objectives(front)
    weights = simplex_lattice(front.shape[1], divisions) if weights is None else np.asarray(weights, dtype=np.float64)
    _pair(front, weights)
    if normalisation not in ("mean", "frobenius"):
        raise ValueError(f"expected normalisation to be mean or frobenius, got {normalisation!r}")
    gap = np.abs(np.asarray(ideal, dtype=np.float64) - front)
    worst = np.zeros((len(weights), len(front)))
    for k in range(front.shape[1]):
        worst = np.maximum(worst, weights[:, k, None] * gap[None, :, k])
    divisor = float(len(weights)) if normalisation == "mean" else float(np.linalg.norm(weights))
    return float(worst.min(1).sum()) / divisor


def pc_entropy(samples: np.ndarray, reference: np.ndarray) -> float:
    """PC-ent: each sample goes to its nearest reference point; entropy of the counts in nats, at most log m."""
    samples, reference = _pair(samples, reference)
    square = np.zeros((len(samples), len(reference)))
    for k in range(samples.shape[1]):
        square += (samples[:, k, None] - reference[None, :, k]) ** 2
    counts = np.bincount(square.argmin(1), minlength=len(reference))
    share = counts[counts > 0] / len(samples)
    return float(-(share * np.log(share)).sum()) + 0.0


def top_k_mean(values: np.ndarray, k: int = 100) -> float:
    """Mean of the k largest values, of all where there are fewer."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or k < 1:
        raise ValueError(f"expected at least one value and k of at least 1, got shape {values.shape} and k {k}")
    return float(np.sort(values)[-k:].mean())


def modes_found(samples: Sequence[object], modes: Sequence[object]) -> int:
    """How many of the known `modes` are among the samples; both hashable."""
    return len(set(samples) & set(modes))


def _fingerprint(text: str, radius: int, bits: int) -> Any:
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    molecule = Chem.MolFromSmiles(text)
    if molecule is None:
        raise ValueError(f"expected a SMILES that RDKit reads, got {text!r}")
    return rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits).GetFingerprint(molecule)


def diverse_top_k(
    smiles: Sequence[str],
    values: np.ndarray,
    k: int = 100,
    *,
    threshold: float = 0.7,
    radius: int = 2,
    bits: int = 2048,
) -> list[int]:
    """The best k of n molecules of which no two are more alike than `threshold` (Tanimoto, Morgan fingerprints).

    Greedy, from the largest of `values` (n,) down: a molecule too near a chosen one is passed over. Returns indices,
    best first, fewer than k where no others are left. Raises `ValueError` on another shape, NaN, k below 1 or a
    threshold outside [0, 1], and naming a SMILES that RDKit cannot read.
    """
    from rdkit import DataStructs

    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(smiles),) or not np.isfinite(values).all():
        raise ValueError(f"expected a finite value for each of {len(smiles)} molecules, got shape {values.shape}")
    if k < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"expected k of at least 1 and a threshold in [0, 1], got {k} and {threshold}")
    chosen: list[int] = []
    prints: list[Any] = []
    for i in np.argsort(-values, kind="stable").tolist():
        own = _fingerprint(smiles[i], radius, bits)
        if prints and max(DataStructs.BulkTanimotoSimilarity(own, prints)) > threshold:
            continue
        chosen.append(i)
        prints.append(own)
        if len(chosen) == k:
            break
    return chosen


def tanimoto_diversity(smiles: Sequence[str], *, radius: int = 2, bits: int = 2048) -> float:
    """Mean of 1 - Tanimoto similarity over the pairs of molecules, on Morgan fingerprints; 0 for fewer than two.

    Raises `ValueError` naming a SMILES that RDKit cannot read.
    """
    from rdkit import DataStructs

    prints = [_fingerprint(text, radius, bits) for text in smiles]
    if len(prints) < 2:
        return 0.0
    total = math.fsum(
        math.fsum(DataStructs.BulkTanimotoSimilarity(prints[i], prints[:i])) for i in range(1, len(prints))
    )
    return 1.0 - total / (len(prints) * (len(prints) - 1) / 2)
