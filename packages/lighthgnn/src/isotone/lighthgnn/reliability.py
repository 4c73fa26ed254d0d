"""How reliable a hyperedge is (section 2.5): by how little its mean prediction entropy moves under feature noise.

Dimensions: N vertices, E hyperedges, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isotone.lighthgnn.features import Features, perturb
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import entropy
from isotone.lighthgnn.teachers import is_multilabel, predict_proba
from isotone.shared.errors import InputError

SAMPLINGS = ("reliability", "uniform", "all")
CHANGES = ("mean", "vertices")


@torch.no_grad()
def reliable_hyperedge_scores(
    teacher: nn.Module,
    X: Features,
    hypergraph: Hypergraph,
    *,
    noise: str = "multiplicative",
    level: float = 1.0,
    samples: int = 1,
    normalize: str = "max",
    change: str = "mean",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    structure: Any = None,
    multilabel: bool | None = None,
) -> Float[Tensor, " E"]:
    """rho_e in [0, 1] for each hyperedge (steps 1 to 5): 1 where noise leaves its mean entropy as it is.

    delta_e = | mean_e h~ - mean_e h |, averaged over `samples` noise draws; rho_e = 1 - delta_e / max delta. All
    delta zero (no noise, a constant teacher) gives rho = 1. `normalize` "quantile" divides by the 95 % quantile
    instead, clipped, so that one outlying hyperedge does not decide all scores. `noise`: see `features.perturb`.

    `change` "vertices" is not the paper's: delta_e = mean_e |h~ - h|, so that opposite changes within a hyperedge of
    mixed classes do not cancel. `temperature` divides the teacher's logits (`calibrated_temperature`): one that is
    less sure than it is right has its largest changes on pure hyperedges, and ranks them last.
    `structure`: what the teacher is called with, where it is not the hypergraph (a `Graph`). `multilabel`: as in
    `predict_proba`.
    """
    if samples < 1:
        raise InputError(f"expected at least 1 noise draw, got {samples}")
    if normalize not in ("max", "quantile"):
        raise InputError(f"expected normalize to be max or quantile, got {normalize!r}")
    if change not in CHANGES:
        raise InputError(f"expected change to be {' or '.join(CHANGES)}, got {change!r}")
    structure = hypergraph if structure is None else structure
    multilabel = is_multilabel(teacher) if multilabel is None else multilabel

    def entropies(features: Features) -> Float[Tensor, " N"]:
        return entropy(predict_proba(teacher, features, structure, multilabel, temperature), multilabel)

    clean = entropies(X)
    total = torch.zeros(hypergraph.num_edges, device=hypergraph.device)
    for _ in range(samples):
        moved = entropies(perturb(X, noise, level, generator)) - clean
        moved = moved.abs() if change == "vertices" else moved
        total += hypergraph.v2e(moved.unsqueeze(1)).squeeze(1).abs()
    return normalize_scores(total / samples, normalize)


def normalize_scores(delta: Float[Tensor, " E"], normalize: str = "max") -> Float[Tensor, " E"]:
    """rho = 1 - delta / max delta (step 5), or by the 95 % quantile; 1 where all delta are 0."""
    largest = delta.max() if normalize == "max" else delta.quantile(0.95)
    if not bool(largest > 0):
        return torch.ones_like(delta)
    return (1 - delta / largest).clamp(0, 1)


def sample_hyperedges(
    rho: Float[Tensor, " E"], sampling: str, generator: torch.Generator | None = None
) -> Bool[Tensor, " E"]:
    """The drawn hyperedges E' of one step (step 6); it may be empty.

    "reliability": s_e ~ Bernoulli(rho_e). The ablations: "uniform", every hyperedge at the mean of rho; "all".
    """
    if sampling not in SAMPLINGS:
        raise InputError(f"expected sampling of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if sampling == "all":
        return torch.ones_like(rho, dtype=torch.bool)
    probability = rho if sampling == "reliability" else rho.mean().expand_as(rho)
    device = generator.device if generator is not None else rho.device
    return torch.rand(rho.shape, generator=generator, device=device).to(rho.device) < probability
