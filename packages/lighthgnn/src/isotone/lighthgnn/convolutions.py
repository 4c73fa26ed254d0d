"""The convolutions of the teachers (section 2.2), over whole hypergraphs and sampled blocks alike.

Each is linear map first, then smoothing, then activation, batch norm, dropout; the last one of a network stops after
the smoothing. Parameter names are dhg's, so that its state dicts load.

Dimensions: N source vertices, T target vertices (T = N on a whole hypergraph), in and out channels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isotone.lighthgnn.features import Features
from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.sparse import SparseLinear
from isotone.lighthgnn.structure import Structure

SCORE_RANGE = (0.001, 5.0)
"""Attention scores are clamped to this range before the softmax, as in dhg; it also makes exp safe."""


class Convolution(nn.Module):
    """`convolve`: theta, then `propagate`; then (unless `last`) activation, batch norm and dropout."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dropout: float = 0.5, batch_norm: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.last = last
        self.theta = SparseLinear(in_channels, out_channels)
        self.act: nn.Module = nn.ReLU()
        self.bn = nn.BatchNorm1d(out_channels) if batch_norm else None
        self.drop: nn.Module = nn.Dropout(dropout)

    def propagate(self, X: Float[Tensor, "N out"], structure: Any) -> Float[Tensor, "T out"]:
        """The smoothing, after the linear map."""
        raise NotImplementedError

    def convolve(self, X: Features, structure: Any) -> Float[Tensor, "T out"]:
        """What stands before the activation."""
        return self.propagate(self.theta(X), structure)

    def forward(self, X: Features, structure: Any) -> Float[Tensor, "T out"]:
        """`X`: N x in features, dense or sparse."""
        hidden = self.convolve(X, structure)
        if self.last:
            return hidden
        hidden = self.act(hidden)
        if self.bn is not None:
            hidden = self.bn(hidden)
        return self.drop(hidden)


class HGNNConv(Convolution):
    """D_v^{-1/2} H W D_e^{-1} H^T D_v^{-1/2} X Theta."""

    def propagate(self, X: Float[Tensor, "N out"], structure: Structure) -> Float[Tensor, "T out"]:
        return structure.smooth(X, "hgnn")


class HGNNPConv(Convolution):
    """HGNN+: D_v^{-1} H W D_e^{-1} H^T X Theta."""

    def propagate(self, X: Float[Tensor, "N out"], structure: Structure) -> Float[Tensor, "T out"]:
        return structure.smooth(X, "hgnnp")


class HNHNConv(Convolution):
    """Y = relu(v2e_mean(X Theta_1)); e2v_mean(Y Theta_2): hyperedges are neurons too."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.theta_v2e = self.theta
        del self.theta
        self.theta_e2v = nn.Linear(out_channels, out_channels)

    def convolve(self, X: Features, structure: Structure) -> Float[Tensor, "T out"]:
        edges = self.act(structure.v2e(self.theta_v2e(X), "mean", weighted=True))
        return structure.e2v(self.theta_e2v(edges), "mean")


class UniGCNConv(Convolution):
    """D_v^{-1/2} H d~_e^{-1/2} Y, with Y the hyperedge means and d~_e the mean degree within a hyperedge."""

    def propagate(self, X: Float[Tensor, "N out"], structure: Structure) -> Float[Tensor, "T out"]:
        Y = structure.v2e(X, "mean", weighted=True)
        mean_degree = structure.edge_mean_degree.unsqueeze(1)
        hidden = structure.e2v(Y * mean_degree.rsqrt(), "sum")
        return hidden * structure.target_degree.clamp(min=1e-12).rsqrt().unsqueeze(1)


class UniSAGEConv(Convolution):
    """(I + H D_e^{-1} H^T) X Theta."""

    eps: Tensor | float = 0.0

    def propagate(self, X: Float[Tensor, "N out"], structure: Structure) -> Float[Tensor, "T out"]:
        neighbours = structure.e2v(structure.v2e(X, "mean", weighted=True), "sum")
        return neighbours + (1 + self.eps) * structure.targets(X)


class UniGINConv(UniSAGEConv):
    """((1 + eps) I + H D_e^{-1} H^T) X Theta; eps is learnt if `train_eps`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, eps: float = 0.0, train_eps: bool = False, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.eps = nn.Parameter(torch.tensor([eps])) if train_eps else eps


class UniGATConv(Convolution):
    """Attention of a vertex over its hyperedges, `heads` of them side by side; ELU; dropout of the scores alone.

    Score LeakyReLU_0.2(a_e^T y_e + a_v^T x_v), clamped to `SCORE_RANGE`, softmax over the vertex's hyperedges.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        heads: int = 1,
        dropout: float = 0.5,
        batch_norm: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__(in_channels, heads * out_channels, dropout=dropout, batch_norm=batch_norm, last=last)
        self.heads, self.width = heads, out_channels
        self.atten_e = _head_vectors(heads, out_channels)
        self.atten_dst = _head_vectors(heads, out_channels)
        self.act, self.drop, self.drop_scores = nn.ELU(), nn.Identity(), nn.Dropout(dropout)

    def propagate(self, X: Float[Tensor, "N out"], structure: Structure) -> Float[Tensor, "T out"]:
        Y = structure.v2e(X, "mean", weighted=True)
        paths = structure.out_of_edges
        rows = paths.row_ids()
        by_edge = _head_scores(Y, self.atten_e)[paths.indices]
        scores = by_edge + _head_scores(structure.targets(X), self.atten_dst)[rows]
        return _attend(scores, Y, paths, rows, self)


class GCNConv(Convolution):
    """D^{-1/2} (A + I) D^{-1/2} X Theta on a graph."""

    def propagate(self, X: Float[Tensor, "N out"], structure: Graph) -> Float[Tensor, "N out"]:
        return structure.smooth(X)


class GATConv(UniGATConv):
    """Attention of a vertex over its neighbours in a graph, itself among them."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.atten_src = self.atten_e
        del self.atten_e

    def propagate(self, X: Float[Tensor, "N out"], structure: Graph) -> Float[Tensor, "N out"]:  # type: ignore[override]
        paths = structure.adjacency
        rows = paths.row_ids()
        scores = _head_scores(X, self.atten_src)[paths.indices] + _head_scores(X, self.atten_dst)[rows]
        return _attend(scores, X, paths, rows, self)


def _head_vectors(heads: int, width: int) -> nn.Parameter:
    bound = width**-0.5  # nn.Linear's own, for a map from `width` to 1
    return nn.Parameter(torch.empty(heads, width).uniform_(-bound, bound))


def _head_scores(X: Tensor, vectors: Tensor) -> Tensor:
    """a_h^T x for each head: rows x heads."""
    return (X.view(X.shape[0], *vectors.shape) * vectors).sum(2)


def _attend(scores: Tensor, values: Tensor, paths: Any, rows: Tensor, layer: UniGATConv) -> Tensor:
    """Sums of `values` along `paths`, weighted by the softmax of `scores` (paths x heads) within each row."""
    scores = layer.drop_scores(nn.functional.leaky_relu(scores, 0.2)).clamp(*SCORE_RANGE)
    weights = scores.exp()
    total = weights.new_zeros(paths.shape[0], layer.heads).index_add(0, rows, weights)
    messages = values[paths.indices].view(-1, layer.heads, layer.width) * weights.unsqueeze(2)
    summed = messages.new_zeros(paths.shape[0], layer.heads, layer.width).index_add(0, rows, messages)
    return (summed / total.clamp(min=1e-12).unsqueeze(2)).flatten(1)
