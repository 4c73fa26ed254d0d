"""The two operators that everything is built from (section 2.1), over any incidence: vertices to hyperedges, and back.

Nothing here forms an N x N matrix: a hyperedge of s vertices costs s entries, where a Laplacian takes s^2.

Dimensions: N source vertices, T target vertices (T = N for a whole hypergraph), E hyperedges, I incidences,
c channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.lighthgnn.sparse import SparseMatrix


class Structure:
    """Incidence from N source vertices into E hyperedges and out to T target vertices.

    `into_edges` (E x N) and `out_of_edges` (T x E) hold ones. Sizes and degrees are those of the whole hypergraph,
    also where only a part of it is here: `edge_size` |e|, `edge_weight` w_e, `source_degree` and `target_degree`
    d_v = sum_e w_e H_ve. Target t is source t: targets come first among the sources.
    """

    def __init__(
        self,
        into_edges: SparseMatrix,
        out_of_edges: SparseMatrix,
        edge_size: Float[Tensor, " E"],
        edge_weight: Float[Tensor, " E"] | None,
        source_degree: Float[Tensor, " N"],
        target_degree: Float[Tensor, " T"],
        edge_mean_degree: Float[Tensor, " E"] | None = None,
    ) -> None:
        self.into_edges, self.out_of_edges = into_edges, out_of_edges
        self.edge_size = edge_size
        self._edge_weight = edge_weight  # None: all ones, and the operators skip the product
        self.source_degree, self.target_degree = source_degree, target_degree
        self._edge_mean_degree = edge_mean_degree

    @property
    def num_edges(self) -> int:
        """E."""
        return self.into_edges.shape[0]

    @property
    def num_sources(self) -> int:
        """N."""
        return self.into_edges.shape[1]

    @property
    def num_targets(self) -> int:
        """T."""
        return self.out_of_edges.shape[0]

    @property
    def edge_weight(self) -> Float[Tensor, " E"]:
        """w_e, all ones where none were given."""
        return torch.ones_like(self.edge_size) if self._edge_weight is None else self._edge_weight

    @property
    def edge_mean_degree(self) -> Float[Tensor, " E"]:
        """The mean degree of a hyperedge's vertices, d~_e of UniGCN (section 2.2)."""
        if self._edge_mean_degree is None:
            total = self.into_edges @ self.source_degree.unsqueeze(1)
            self._edge_mean_degree = total.squeeze(1) / self.edge_size
        return self._edge_mean_degree

    def v2e(self, X: Float[Tensor, "N c"], reduce: str = "mean", weighted: bool = False) -> Float[Tensor, "E c"]:
        """D_e^{-1} H^T X ("mean") or H^T X ("sum"); times w_e if `weighted`, as a convolution's hyperedge features.

        2 I c FLOP. Raises `ValueError` on another `reduce` or number of rows.
        """
        _check_reduce(reduce)
        Y = self.into_edges @ X
        if reduce == "mean":
            Y = Y / self.edge_size.to(Y.dtype).unsqueeze(1)
        if weighted and self._edge_weight is not None:
            Y = Y * self._edge_weight.to(Y.dtype).unsqueeze(1)
        return Y

    def e2v(self, Y: Float[Tensor, "E c"], reduce: str = "mean") -> Float[Tensor, "T c"]:
        """D_v^{-1} H Y ("mean") or H Y ("sum"). A vertex in no hyperedge gets 0. 2 I c FLOP."""
        _check_reduce(reduce)
        X = self.out_of_edges @ Y
        if reduce == "sum":
            return X
        return X / self.target_degree.to(X.dtype).clamp(min=1e-12).unsqueeze(1)

    def smooth(self, X: Float[Tensor, "N c"], kind: str = "hgnn") -> Float[Tensor, "T c"]:
        """D_v^{-1/2} H W D_e^{-1} H^T D_v^{-1/2} X ("hgnn") or D_v^{-1} H W D_e^{-1} H^T X ("hgnnp"), factored.

        4 I c FLOP, whatever the sizes of the hyperedges.
        """
        if kind == "hgnnp":
            return self.e2v(self.v2e(X, "mean", weighted=True), "mean")
        if kind != "hgnn":
            raise ValueError(f"expected kind to be hgnn or hgnnp, got {kind!r}")
        Y = self.v2e(X * _inverse_root(self.source_degree, X), "mean", weighted=True)
        return self.e2v(Y, "sum") * _inverse_root(self.target_degree, X)

    def to(self, device: str | torch.device) -> Structure:
        """The same structure on `device`."""
        tensors = (self.edge_size, self._edge_weight, self.source_degree, self.target_degree, self._edge_mean_degree)
        size, weight, source, target, mean = (None if t is None else t.to(device) for t in tensors)
        parts = (self.into_edges.to(device), self.out_of_edges.to(device))
        return Structure(*parts, size, weight, source, target, mean)  # type: ignore[arg-type]

    def targets(self, X: Float[Tensor, "N c"]) -> Float[Tensor, "T c"]:
        """The rows of X that belong to the target vertices."""
        return X if self.num_targets == self.num_sources else X[: self.num_targets]


def _inverse_root(degree: Tensor, like: Tensor) -> Tensor:
    """d^{-1/2} as a column; 0 for a vertex in no hyperedge, as dhg has it."""
    return torch.where(degree > 0, degree.clamp(min=1e-12).rsqrt(), 0.0).to(like.dtype).unsqueeze(1)


def _check_reduce(reduce: str) -> None:
    if reduce not in ("mean", "sum"):
        raise ValueError(f"expected reduce to be mean or sum, got {reduce!r}")
