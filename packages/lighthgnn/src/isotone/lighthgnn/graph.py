"""Graphs, for the baselines GCN and GAT: given as edges, or the clique expansion of a hypergraph (section 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.shared.errors import InputError

MOST_ENTRIES = 200_000_000
"""A clique expansion of more entries than this is refused: that is what hypergraph teachers avoid."""


class Graph:
    """An undirected graph of N vertices with self loops: `adjacency` (N x N, ones), what GCN and GAT work on."""

    def __init__(self, adjacency: SparseMatrix) -> None:
        self.adjacency = adjacency
        degree = adjacency.row_counts().float()
        scale = degree.rsqrt()
        self._normalized = adjacency.with_values(scale[adjacency.row_ids()] * scale[adjacency.indices])
        self._normalized._transpose = self._normalized  # symmetric

    @property
    def num_vertices(self) -> int:
        """N."""
        return self.adjacency.shape[0]

    @classmethod
    def from_edges(cls, num_vertices: int, edge_index: Any) -> Graph:
        """From 2 x M vertex pairs; direction, self loops and repeats do not matter."""
        index = np.asarray(edge_index, dtype=np.int64).reshape(2, -1)
        wrong = (index < 0) | (index >= num_vertices)
        if wrong.any():
            raise InputError(f"expected vertex ids from 0 to {num_vertices - 1}, got {index[wrong][0]}")
        pairs = scipy.sparse.coo_matrix((np.ones(index.shape[1]), index), (num_vertices, num_vertices))
        return cls(_with_loops(pairs + pairs.T))

    @classmethod
    def clique_expansion(cls, hypergraph: Hypergraph) -> Graph:
        """Two vertices are neighbours where some hyperedge holds both. Up to sum_e |e|^2 entries.

        Raises `InputError` where that is more than `MOST_ENTRIES`.
        """
        if hypergraph.laplacian_entries() > MOST_ENTRIES:
            raise InputError(
                f"expected a clique expansion of at most {MOST_ENTRIES} entries, got {hypergraph.laplacian_entries()}"
            )
        incidence = hypergraph.into_edges.to_scipy()
        return cls(_with_loops(incidence.T @ incidence))

    def smooth(self, X: Float[Tensor, "N c"]) -> Float[Tensor, "N c"]:
        """D^{-1/2} (A + I) D^{-1/2} X."""
        return self._normalized @ X

    def to(self, device: str | torch.device) -> Graph:
        """The same graph on `device`."""
        return Graph(self.adjacency.to(device))


def _with_loops(pairs: Any) -> SparseMatrix:
    matrix = scipy.sparse.csr_matrix(pairs + scipy.sparse.identity(pairs.shape[0]))
    matrix.sum_duplicates()
    adjacency = SparseMatrix(torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices), None, matrix.shape[1])
    adjacency._transpose = adjacency  # symmetric
    return adjacency
