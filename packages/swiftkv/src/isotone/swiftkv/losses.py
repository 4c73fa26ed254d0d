"""Knowledge-preserving loss: KL of softened logits and MSE of hidden states, a tile of logits at a time.

The (tokens, V) logits of a long batch are the largest thing in memory, so they are made tile by tile, from the final
hidden states, and made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def distillation_kl(
    student: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"],
    temperature: float = 2.0,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """T^2 times the mean, over all tokens, of mask * KL(softmax(t / T) || softmax(s / T)).

    The mean divides by all tokens, masked ones included. Both sides are log-probabilities, so that a teacher's
    probability of exactly 0 gives 0 and not NaN. T^2 keeps the gradient's size the same at every temperature.
    """
    return temperature**2 * _kl(student, teacher, temperature, mask).mean()


def tiled_kl(
    student_hidden: Float[Tensor, "tokens d"],
    teacher_hidden: Float[Tensor, "tokens d"],
    head: Float[Tensor, "vocab d"],
    temperature: float = 2.0,
    mask: Bool[Tensor, " tokens"] | None = None,
    tile_bytes: int = 2**30,
) -> Float[Tensor, ""]:
    """`distillation_kl` of the logits of both final hidden states, at most `tile_bytes` of fp32 logits at a time."""

    def part(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
        with torch.no_grad():
            targets = teacher @ head.T
        return _kl(student @ head.T, targets, temperature, kept).sum()

    total = student_hidden.new_zeros((), dtype=torch.float32)
    for tile in _tiles(len(student_hidden), head.shape[0], tile_bytes):
        kept = None if mask is None else mask[tile]
        total = total + _recomputed(part, student_hidden[tile], teacher_hidden[tile], kept)
    return temperature**2 * total / len(student_hidden)


def tiled_cross_entropy(
    hidden: Float[Tensor, "tokens d"],
    head: Float[Tensor, "vocab d"],
    labels: Int[Tensor, " tokens"],
    tile_bytes: int = 2**30,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labels that are not -100; hidden state i is asked for label i."""

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy((states @ head.T).float(), wanted, ignore_index=IGNORED, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for tile in _tiles(len(hidden), head.shape[0], tile_bytes):
        total = total + _recomputed(part, hidden[tile], labels[tile])
    return total / (labels != IGNORED).sum().clamp_min(1)


def _kl(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    ours = F.log_softmax(student.float() / temperature, -1)
    theirs = F.log_softmax(teacher.float() / temperature, -1)
    each = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    return each if mask is None else each * mask


def _tiles(tokens: int, vocab: int, tile_bytes: int) -> list[slice]:
    size = max(1, tile_bytes // (4 * vocab))
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    made: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return made
