"""L_OP over the batches of all ranks: its softmax is over the global batch, so r and u are gathered before labels.

With every rank's gradients averaged, as data-parallel training does, n ranks of B / n trajectories take the step
that one rank of B takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order. Each rank goes on to compute the same loss, so that no gradient travels: a
    rank's own rows get world size times theirs, which averaging over ranks turns into the global gradient."""

    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        context.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        first = dist.get_rank() * context.rows
        return gradients[0][first : first + context.rows] * dist.get_world_size()


def active() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_log_rewards(log_r: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
    """The global batch's log-rewards, differentiable; every rank must hold as many."""
    return _Gather.apply(log_r) if active() else log_r


def gather_rows(rows: Tensor) -> Tensor:
    """The global batch's objectives (or flags), without gradient."""
    if not active():
        return rows
    whole = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    parts = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, whole.contiguous())
    return torch.cat(parts).to(rows.dtype)


def mean_count(count: Tensor) -> Tensor:
    """The mean over ranks of a number of terms, at least 1: a sum divided by it, averaged over ranks, is divided by
    all terms."""
    if not active():
        return count.clamp(min=1)
    whole = count.double().clone()
    dist.all_reduce(whole)
    whole = whole.clamp(min=1)
    return whole / dist.get_world_size()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The mean over ranks of every gradient, in one message."""
    if not active():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
