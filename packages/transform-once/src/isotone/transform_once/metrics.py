"""How far fields are from the truth, sample by sample; NumPy in and out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isotone.shared.errors import InputError


def relative_l2(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """|y^ - y| / |y| of each sample, (B,). Raises `InputError` on a target that is 0 everywhere."""
    _check(predicted, target)
    norm = np.sqrt((target.astype(np.float64) ** 2).reshape(len(target), -1).sum(1))
    if (norm == 0).any():
        raise InputError(f"expected targets that are not 0 everywhere, got sample {int(np.argmin(norm))} of norm 0")
    gap = (predicted.astype(np.float64) - target).reshape(len(target), -1)
    return np.sqrt((gap**2).sum(1)) / norm


def mse(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean squared error of each sample."""
    _check(predicted, target)
    return ((predicted.astype(np.float64) - target) ** 2).reshape(len(target), -1).mean(1)


def mae(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean absolute error of each sample."""
    _check(predicted, target)
    return np.abs(predicted.astype(np.float64) - target).reshape(len(target), -1).mean(1)


def mape(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The sum of absolute errors over the sum of absolute values, of each sample: the official code's relativel1."""
    _check(predicted, target)
    scale = np.abs(target.astype(np.float64)).reshape(len(target), -1).mean(1)
    if (scale == 0).any():
        raise InputError("expected targets that are not 0 everywhere")
    return mae(predicted, target) / scale


def smape(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean of 2 |y^ - y| / (|y^| + |y|), 0 where both are, of each sample."""
    _check(predicted, target)
    total = np.abs(predicted.astype(np.float64)) + np.abs(target)
    share = np.where(total > 0, 2 * np.abs(predicted - target) / np.where(total > 0, total, 1), 0)
    return share.reshape(len(target), -1).mean(1)


def psnr(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """10 log10(range of the target^2 / mean squared error), dB, of each sample."""
    span = (target.reshape(len(target), -1).max(1) - target.reshape(len(target), -1).min(1)).astype(np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(span**2 / mse(predicted, target))


def mae_at(predicted: np.ndarray, target: np.ndarray, steps: Sequence[int]) -> dict[int, float]:
    """Mean absolute error at the given steps (from 1) of rollouts (B, T, ...)."""
    _check(predicted, target)
    if any(not 1 <= step <= target.shape[1] for step in steps):
        raise InputError(f"expected steps from 1 to {target.shape[1]}, got {tuple(steps)}")
    return {step: float(mae(predicted[:, step - 1], target[:, step - 1]).mean()) for step in steps}


def _check(predicted: np.ndarray, target: np.ndarray) -> None:
    if predicted.shape != target.shape or not len(target):
        raise InputError(f"expected predictions of the targets' shape {target.shape}, got {predicted.shape}")
