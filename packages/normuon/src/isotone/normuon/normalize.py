"""The neuron-wise second moment, and the step sizes in use (arXiv 2510.05491, algorithm 1, lines 4 to 6).

Row statistics are means of squares in float32 or better, without bias correction: a common factor of v cancels
in the rescaling.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

SCALES = ("rms", "original", "spectral", "match_rms_adamw")


def row_normalize(
    orthogonal: Float[Tensor, "*batch m n"],
    second_moment: Float[Tensor, "*batch m 1"],
    beta2: float,
    eps: float,
) -> Float[Tensor, "*batch m n"]:
    """O / (sqrt(v) + eps) row by row, after v <- beta2 v + (1 - beta2) mean(O²) in place (lines 4 and 5).

    The plain form, for inspection; the optimizer folds the division into its update. Rows with v = 0 are zero.
    """
    second_moment.lerp_(mean_square(orthogonal, -1).to(second_moment.dtype), 1 - beta2)
    return (orthogonal * inverse_root(second_moment, eps)).to(orthogonal.dtype)


def mean_square(orthogonal: Tensor, dim: int) -> Tensor:
    """Mean of squares over `dim`, kept, accumulated in float32 or better."""
    dtype = torch.promote_types(orthogonal.dtype, torch.float32)
    return torch.linalg.vector_norm(orthogonal, dim=dim, keepdim=True, dtype=dtype).square_() / max(
        1, orthogonal.shape[dim]
    )


def inverse_root(second_moment: Tensor, eps: float) -> Tensor:
    """1 / (sqrt(v) + eps), 0 where v = 0: a dead neuron is not moved."""
    return torch.where(second_moment > 0, 1 / (second_moment.sqrt() + eps), torch.zeros_like(second_moment))


def shape_factor(scale: str | None, m: int, n: int) -> float:
    """What an m x n matrix's step is multiplied by, beside the learning rate (section 2.2)."""
    if scale == "rms":
        return 0.2 * math.sqrt(m * n)  # over the Frobenius norm: the step's RMS is 0.2 lr
    if scale == "original":
        return math.sqrt(max(1.0, m / n))
    if scale == "spectral":
        return math.sqrt(m / n)
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return 1.0


def step_factor(
    scale: str | None, shape: Tensor, before: Float[Tensor, "k p"], after: Float[Tensor, "k p"]
) -> Float[Tensor, "k p"]:
    """The factor of each matrix from ||O||² (`before`) and ||O^||² (`after`); 0 where O^ = 0 (2.9, step 6).

    `shape`: `shape_factor` of each matrix. "rms" divides by ||O^||; the others keep the norm of O.
    """
    numerator = torch.ones_like(before) if scale == "rms" else before
    return torch.where(after > 0, shape * (numerator / after.clamp_min(1e-30)).sqrt(), torch.zeros_like(after))


def convert_lr(lr: float, old: str | None, new: str | None, m: int, n: int) -> float:
    """The learning rate of scale mode `new` whose steps have the RMS that `lr` has in mode `old` (section 2.10).

    For an m x n matrix, with ||O||_F = sqrt(min(m, n)). Raises `ValueError` on an unknown mode.
    """
    return lr * step_rms(old, m, n) / step_rms(new, m, n)


def step_rms(scale: str | None, m: int, n: int) -> float:
    """RMS of a step of learning rate 1 (section 2.10)."""
    check_scale(scale)
    norm = 1.0 if scale == "rms" else math.sqrt(min(m, n))
    return shape_factor(scale, m, n) * norm / math.sqrt(m * n)


def check_scale(scale: str | None) -> None:
    """Raise `ValueError` on an unknown scale mode."""
    if scale is not None and scale not in SCALES:
        raise ValueError(f"expected scale to be one of {', '.join(SCALES)} or None, got {scale!r}")
