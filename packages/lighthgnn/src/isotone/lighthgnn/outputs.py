"""What a network's C outputs mean: one class of C (softmax), or any number of C labels (a sigmoid each, multi-label).

A label is a distribution over two outcomes, so that entropies and divergences of label sets are sums over labels of
those of `pairs` (p, 1 - p), and every formula of the paper holds as it stands.

Dimensions: B rows, C classes or labels; K = C outcomes of one variable, or C x 2 of C variables.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from isotone.shared.errors import InputError


def probabilities(logits: Float[Tensor, "B C"], multilabel: bool = False) -> Float[Tensor, "B C"]:
    """Of each class, summing to 1; or of each label by itself. At least float32."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits.sigmoid() if multilabel else logits.softmax(1)


def log_probabilities(logits: Float[Tensor, "B C"], multilabel: bool = False) -> Float[Tensor, " B *K"]:
    """Logarithms of the outcomes' probabilities, without rounding to 0 first."""
    if multilabel:
        return torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), -1)
    return logits.log_softmax(1)


def outcomes(p: Float[Tensor, "B C"], multilabel: bool = False) -> Float[Tensor, " B *K"]:
    """Probabilities of all outcomes: p itself, or (p, 1 - p) of each label."""
    return torch.stack((p, 1 - p), -1) if multilabel else p


def entropy(p: Float[Tensor, "B C"], multilabel: bool = False) -> Float[Tensor, " B"]:
    """-sum p log p in nats over all outcomes, with 0 log 0 = 0."""
    q = outcomes(p, multilabel)
    return -torch.special.xlogy(q, q).flatten(1).sum(1)


def cross_entropy(logits: Float[Tensor, "B C"], labels: Tensor) -> Float[Tensor, ""]:
    """Mean over rows; `labels`: B classes of 0..C-1, or B x C zeros and ones (then a sum over labels)."""
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels)
    each = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return each.sum(1).mean()


def predicted(logits: Float[Tensor, "B C"], multilabel: bool = False) -> Tensor:
    """The most probable class (B), or a one for each label above an even chance (B x C)."""
    return (logits > 0).long() if multilabel else logits.argmax(1)


def agreement(logits: Float[Tensor, "B C"], labels: Tensor) -> float:
    """What chooses an epoch: the share of right classes; of label sets the micro F1, 2 TP / (2 TP + FP + FN)."""
    guesses = predicted(logits, labels.ndim == 2)
    if labels.ndim == 1:
        return float((guesses == labels).float().mean())
    return float(2 * (guesses * labels).sum() / (guesses.sum() + labels.sum()).clamp(min=1))


def fit_temperature(logits: Float[Tensor, "B C"], labels: Tensor) -> float:
    """The temperature of 0.05 to 20, a divisor of the logits, with the least cross-entropy on these rows.

    Golden-section search of the logarithm; the loss is convex in 1 / temperature.
    """

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(logits / math.exp(log_temperature), labels))

    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def check_label_sets(labels: Any) -> np.ndarray:
    """N x C zeros and ones as int64, rows of -1 (or NaN) where unknown; `InputError` on anything else."""
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if y.ndim != 2 or 0 in y.shape or y.dtype.kind not in "buif":
        raise InputError(f"expected label sets as N x C zeros and ones, got shape {y.shape} of {y.dtype}")
    unknown = (y == -1).all(1) | np.isnan(y.astype(np.float64)).all(1)
    known = y[~unknown]
    if len(known) == 0:
        raise InputError("expected at least one row of labels, got none")
    if not np.isin(known, (0, 1)).all():
        raise InputError(f"expected label sets of zeros and ones, got {known[~np.isin(known, (0, 1))][0]}")
    sets = np.full(y.shape, -1, np.int64)
    sets[~unknown] = known
    return sets


def is_known(labels: Any) -> np.ndarray:
    """Which vertices have labels: N flags."""
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    return np.asarray(y >= 0 if y.ndim == 1 else (y >= 0).all(1))
