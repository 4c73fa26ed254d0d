"""Reliability distillation on a graph's vertices (Wu et al., ICML 2023), the ancestor of LightHGNN+; and GLNN.

There the reliability belongs to a vertex, and a reliable neighbour's soft label is one more target of a vertex:
L = mean_v KL(p^t_v || p^s_v) + mean_v mean_{u in N(v), drawn} KL(p^t_u || p^s_v). GLNN (Zhang et al., ICLR 2022) is
the first term alone: `distill` with `plus=False` and a graph teacher.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.lighthgnn.distill import DistillConfig
from isotone.lighthgnn.features import Features, perturb, take_rows
from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.losses import kd_loss
from isotone.lighthgnn.outputs import agreement, entropy
from isotone.lighthgnn.reliability import normalize_scores
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.teachers import Teacher, predict_proba
from isotone.lighthgnn.training import History, epoch_seed, fit


@torch.no_grad()
def vertex_reliability(
    teacher: Teacher,
    X: Features,
    graph: Graph,
    *,
    level: float = 1.0,
    samples: int = 5,
    seed: int = 0,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """The chance that a vertex is drawn: 1 - (rho_v / max rho)^alpha with alpha = 1.

    rho_v is the mean squared change of the vertex's entropy under noise, over level^2 (a constant of the scores).
    """
    generator = torch.Generator().manual_seed(seed)
    clean = entropy(predict_proba(teacher, X, graph, temperature=temperature))
    total = torch.zeros_like(clean)
    for _ in range(samples):
        noisy = perturb(X, "multiplicative", level, generator)
        moved = entropy(predict_proba(teacher, noisy, graph, temperature=temperature)) - clean
        total += moved.square()
    return normalize_scores(total / samples)


def distill_from_vertices(
    student: LightMLP,
    X: Features,
    y: Int[Tensor, " N"],
    val: Int[Tensor, " b"],
    graph: Graph,
    teacher: Float[Tensor, "N C"],
    reliability: Float[Tensor, " N"],
    config: DistillConfig,
) -> History:
    """Train `student` in place on its own and its reliable neighbours' soft labels."""
    paths = graph.adjacency
    rows = paths.row_ids()

    def losses(epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(epoch_seed(config.train.seed, epoch, 4))
        drawn = (torch.rand(len(reliability), generator=generator).to(X.device) < reliability)[paths.indices]
        drawn &= rows != paths.indices
        logits = student(X)
        log_student = logits.log_softmax(1)
        weights = drawn.float()
        counts = torch.zeros(len(y), device=X.device).index_add(0, rows, weights)
        # sum_u KL(p_u || p_v) is linear in p_u but for its entropy: no row of classes is gathered for a path
        targets = paths.with_values(weights) @ teacher
        entropies = paths.with_values(weights) @ (-entropy(teacher)).unsqueeze(1)
        sums = entropies.squeeze(1) - (targets * log_student).sum(1)
        yield kd_loss(logits, teacher, config.kd_loss) + (sums / counts.clamp(min=1)).mean()

    X_val = take_rows(X, val)
    return fit(student, losses, lambda: agreement(student(X_val), y[val]), config.train)
