"""Hypergraphs with known classes and known noise hyperedges (section 5): ground truth for the reliability score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class SyntheticConfig:
    """`signal` is a, the distance of class centres; `p_in` the chance that a member is of the hyperedge's class.

    A share `noise` of the hyperedges draws its members from all vertices alike (p_in = 1 / C).
    """

    num_vertices: int = 2000
    num_edges: int = 1000
    num_classes: int = 5
    dim: int = 64
    signal: float = 0.35
    p_in: float = 0.8
    noise: float = 0.2
    sizes: tuple[int, int] = (3, 20)

    def __post_init__(self) -> None:
        if min(self.num_vertices, self.num_edges, self.num_classes, self.dim, self.sizes[0]) < 1:
            raise InputError(f"expected sizes of at least 1, got {self}")
        if self.sizes[0] > self.sizes[1] or not (0 <= self.p_in <= 1 and 0 <= self.noise <= 1):
            raise InputError(f"expected ascending sizes and shares from 0 to 1, got {self}")


@dataclass(frozen=True)
class Synthetic:
    """Features, labels, a hypergraph without isolated vertices, and which of its hyperedges are noise.

    `planted`: hyperedges that the generator made (not the singletons added for isolated vertices).
    """

    X: Float[Tensor, "N d"]
    y: Int[Tensor, " N"]
    hypergraph: Hypergraph
    is_noise: Bool[Tensor, " E"]
    planted: Bool[Tensor, " E"]


def make_synthetic(config: SyntheticConfig | None = None, seed: int = 0, **changes: Any) -> Synthetic:
    """x_v = a mu_{y_v} + N(0, I), hyperedges of members mostly of one class; vectorised over hyperedges."""
    config = SyntheticConfig(**changes) if config is None else config
    g = np.random.default_rng(seed)
    N, M, C = config.num_vertices, config.num_edges, config.num_classes
    y = g.integers(C, size=N)
    y[: min(N, C)] = np.arange(min(N, C))  # no class is empty
    centres = g.standard_normal((C, config.dim))
    X = config.signal * centres[y] + g.standard_normal((N, config.dim))
    order = np.argsort(y, kind="stable")
    counts = np.bincount(y, minlength=C)
    starts = np.cumsum(counts) - counts
    size = g.integers(config.sizes[0], config.sizes[1] + 1, size=M)
    noisy = g.random(M) < config.noise
    edge = np.repeat(np.arange(M), size)
    own = g.integers(C, size=M)[edge]
    inside = (g.random(len(edge)) < config.p_in) & ~noisy[edge]
    from_class = order[starts[own] + (g.random(len(edge)) * counts[own]).astype(np.int64)]
    members = np.where(inside, from_class, g.integers(N, size=len(edge)))
    # a merged pair of equal hyperedges keeps the first one's kind
    bare = Hypergraph(N, (members, edge))
    is_noise = np.zeros(bare.num_edges, bool)
    is_noise[bare.merged_into[::-1]] = noisy[::-1]
    hypergraph = bare.add_singletons()
    pad = hypergraph.num_edges - bare.num_edges
    planted = np.arange(hypergraph.num_edges) < bare.num_edges
    return Synthetic(
        torch.from_numpy(X).float(),
        torch.from_numpy(y),
        hypergraph,
        torch.from_numpy(np.pad(is_noise, (0, pad))),
        torch.from_numpy(planted),
    )
