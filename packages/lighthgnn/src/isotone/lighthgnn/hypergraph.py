"""The hypergraph: hyperedges in canonical form, from and to the forms that users have them in.

Dimensions: N vertices, E hyperedges, I incidences, d features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.lighthgnn.arrays import read_npz
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.lighthgnn.structure import Structure
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError


class Hypergraph(Structure):
    """N vertices and E hyperedges, each a set of vertices with a weight above 0.

    `edges`: a list of vertex lists; or I incidences as a tuple (vertex index, hyperedge index) of two arrays or
    lists, or as one 2 x I array or tensor, torch-geometric's `hyperedge_index`.
    Canonical form: the vertices of a hyperedge ascend, a vertex listed twice counts once, and equal hyperedges are
    merged into the first of them, their weights averaged, as dhg does (`merge=False` keeps them). Raises
    `InputError` on a vertex id outside 0..N-1, an empty hyperedge, or a weight that is not above 0.
    """

    def __init__(
        self,
        num_vertices: int,
        edges: Any,
        edge_weight: Any = None,
        *,
        merge: bool = True,
    ) -> None:
        vertices, indptr = _incidences(num_vertices, edges)
        weight = _weights(edge_weight, len(indptr) - 1)
        indptr, vertices = _sorted_sets(num_vertices, indptr, vertices)
        self.merged_into = np.arange(len(indptr) - 1)
        """For each hyperedge given, the hyperedge here that it became."""
        if merge:
            indptr, vertices, weight, self.merged_into = _merge_equal(indptr, vertices, weight)
        by_edge = SparseMatrix(torch.from_numpy(indptr), torch.from_numpy(vertices), None, num_vertices)
        self._finish(by_edge, None if weight is None else torch.from_numpy(weight))

    def _finish(self, by_edge: SparseMatrix, weight: Tensor | None) -> None:
        size = by_edge.row_counts().float()
        by_vertex = by_edge.T
        counts = by_vertex.row_counts().float()
        degree = counts if weight is None else (by_vertex @ weight.unsqueeze(1)).squeeze(1)
        super().__init__(by_edge, by_vertex, size, weight, degree, degree)

    @classmethod
    def _from_csr(cls, by_edge: SparseMatrix, weight: Tensor | None) -> Hypergraph:
        made = cls.__new__(cls)
        made.merged_into = np.arange(by_edge.shape[0])
        made._finish(by_edge, weight)
        return made

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def num_vertices(self) -> int:
        """N."""
        return self.num_sources

    @property
    def nnz(self) -> int:
        """I, the incidences."""
        return self.into_edges.nnz

    @property
    def device(self) -> torch.device:
        """Where the arrays lie."""
        return self.into_edges.device

    @property
    def vertex_degree(self) -> Float[Tensor, " N"]:
        """d_v = sum_e w_e H_ve."""
        return self.source_degree

    @property
    def hyperedge_index(self) -> Int[Tensor, "2 I"]:
        """(vertex, hyperedge) of each incidence: torch-geometric's form."""
        return torch.stack((self.into_edges.indices, self.into_edges.row_ids()))

    def edges(self) -> list[list[int]]:
        """The hyperedges as lists of vertices."""
        return [part.tolist() for part in self.into_edges.indices.cpu().split(self.edge_size.int().tolist())]

    def isolated(self) -> Int[Tensor, " n"]:
        """The vertices that are in no hyperedge."""
        return (self.out_of_edges.row_counts() == 0).nonzero().squeeze(1)

    def laplacian_entries(self) -> int:
        """sum_e |e|^2, what a materialised N x N smoothing matrix would store at most."""
        return int(self.into_edges.row_counts().square().sum())

    def __repr__(self) -> str:
        return f"Hypergraph(num_vertices={self.num_vertices}, num_edges={self.num_edges}, nnz={self.nnz})"

    # --- other forms of input -----------------------------------------------------------------------------

    @classmethod
    def from_incidence(cls, incidence: Any, edge_weight: Any = None) -> Hypergraph:
        """From an N x E incidence matrix: scipy sparse, torch sparse or dense; an entry that is not 0 is incidence."""
        if isinstance(incidence, Tensor):
            coo = incidence.to_sparse_coo().coalesce().cpu()
            keep = coo.values() != 0
            vertices, edges = coo.indices()[:, keep].numpy()
        else:
            matrix = scipy.sparse.coo_matrix(incidence)
            keep = matrix.data != 0
            vertices, edges = matrix.row[keep], matrix.col[keep]
        num_vertices, num_edges = incidence.shape
        if missing := sorted(set(range(num_edges)) - set(edges.tolist())):
            raise InputError(f"expected no empty hyperedge, got hyperedge {missing[0]} without vertices")
        return cls(num_vertices, (vertices, edges), edge_weight)

    @classmethod
    def from_graph(cls, num_vertices: int, edge_index: Any, khop: int = 1) -> Hypergraph:
        """A graph as a hypergraph (section 2.6): its edges, and each vertex's closed neighbourhood of 1..`khop` hops.

        `edge_index`: 2 x M; direction, self loops and repeats do not matter. `khop` 0: the edges alone.
        """
        index = np.asarray(edge_index, dtype=np.int64).reshape(2, -1)
        _check_ids(index.ravel(), num_vertices)
        low, high = index.min(0), index.max(0)
        pairs = np.unique(np.stack((low, high), 1)[low != high], axis=0)
        matrices = [
            scipy.sparse.csr_matrix(
                (np.ones(pairs.size), pairs.ravel(), np.arange(0, pairs.size + 1, 2)), (len(pairs), num_vertices)
            )
        ]
        adjacency = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), (num_vertices, num_vertices))
        step = reach = scipy.sparse.csr_matrix(adjacency + adjacency.T + scipy.sparse.identity(num_vertices))
        for _ in range(khop):
            matrices.append(reach)
            reach = reach @ step
        stacked = scipy.sparse.vstack(matrices, format="csr")
        return cls(num_vertices, _RowSets(stacked.indptr, stacked.indices))

    @classmethod
    def from_knn(cls, X: Any, k: int = 10) -> Hypergraph:
        """A hyperedge for each sample: itself and its `k` nearest others (Euclidean)."""
        from sklearn.neighbors import NearestNeighbors

        samples = X.to_scipy() if isinstance(X, SparseMatrix) else np.asarray(X)
        if not 1 <= k < samples.shape[0]:
            raise InputError(f"expected k from 1 to {samples.shape[0] - 1}, got {k}")
        near = NearestNeighbors(n_neighbors=k).fit(samples).kneighbors(return_distance=False)
        return cls(samples.shape[0], np.column_stack((np.arange(len(near)), near)).tolist())

    @classmethod
    def from_dhg(cls, hypergraph: Any) -> Hypergraph:
        """From a `dhg.Hypergraph`."""
        edges, weights = hypergraph.e
        return cls(hypergraph.num_v, [list(edge) for edge in edges], weights)

    def to_pyg(self) -> Any:
        """A `torch_geometric.data.Data` with `hyperedge_index` and `hyperedge_weight`."""
        from torch_geometric.data import Data

        return Data(
            hyperedge_index=self.hyperedge_index, hyperedge_weight=self.edge_weight, num_nodes=self.num_vertices
        )

    # --- other hypergraphs --------------------------------------------------------------------------------

    def to(self, device: str | torch.device) -> Hypergraph:
        """The same hypergraph on `device`."""
        weight = None if self._edge_weight is None else self._edge_weight.to(device)
        return Hypergraph._from_csr(self.into_edges.to(device), weight)

    def add_singletons(self) -> Hypergraph:
        """With a hyperedge of its own for each isolated vertex, which else would lose its features (section 2.6)."""
        lonely = self.isolated()
        if len(lonely) == 0:
            return self
        old = self.into_edges
        ends = old.indptr[-1] + torch.arange(1, len(lonely) + 1, device=self.device)
        by_edge = SparseMatrix(torch.cat((old.indptr, ends)), torch.cat((old.indices, lonely)), None, self.num_vertices)
        weight = self._edge_weight
        if weight is not None:
            weight = torch.cat((weight, torch.ones(len(lonely), device=self.device)))
        return Hypergraph._from_csr(by_edge, weight)

    def subgraph(self, vertices: Int[Tensor, " n"]) -> Hypergraph:
        """The hypergraph that only `vertices` are seen of, renumbered in their order (section 2.6, "observed").

        Each hyperedge keeps its observed vertices; one left empty is dropped, one left with a single vertex stays.
        Hyperedges that become equal stay apart: each is a relation of its own.
        """
        number = torch.full((self.num_vertices,), -1, device=self.device)
        number[vertices] = torch.arange(len(vertices), device=self.device)
        renumbered = number[self.into_edges.indices]
        kept = renumbered >= 0
        edges = self.into_edges.row_ids()[kept]
        counts = torch.bincount(edges, minlength=self.num_edges)
        alive = counts > 0
        indptr = torch.cat((counts.new_zeros(1), counts[alive].cumsum(0)))
        by_edge = SparseMatrix(indptr, renumbered[kept], None, len(vertices))
        weight = None if self._edge_weight is None else self._edge_weight[alive]
        return Hypergraph._from_csr(by_edge, weight)

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an npz of `indptr`, `indices`, `num_vertices` and, where given, `edge_weight`; nothing pickled."""
        import io

        parts: dict[str, Any] = {
            "num_vertices": np.array(self.num_vertices),
            "indptr": self.into_edges.indptr.cpu().numpy(),
            "indices": self.into_edges.indices.cpu().numpy(),
        }
        if self._edge_weight is not None:
            parts["edge_weight"] = self._edge_weight.cpu().numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **parts)
        path = Path(path)
        atomic_write(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Hypergraph:
        """What `save` wrote, hyperedges in the same order."""
        arrays = read_npz(path)
        try:
            rows = _RowSets(arrays["indptr"], arrays["indices"])
            return cls(int(arrays["num_vertices"]), rows, arrays.get("edge_weight"), merge=False)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"expected a hypergraph's npz at {os.fspath(path)!r}: {error}") from None


class _RowSets:
    """Hyperedges as CSR rows, the form that needs no Python list."""

    def __init__(self, indptr: Any, indices: Any) -> None:
        self.indptr, self.indices = np.asarray(indptr, np.int64), np.asarray(indices, np.int64)
        if self.indptr.ndim != 1 or self.indices.ndim != 1 or len(self.indptr) == 0:
            raise InputError(f"expected indptr and indices in one dimension, got {indptr.shape} and {indices.shape}")
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.indices) or (np.diff(self.indptr) < 0).any():
            raise InputError(f"expected indptr to ascend from 0 to {len(self.indices)}, the incidences")


def _incidences(num_vertices: int, edges: Any) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of all hyperedges in a row, and where each hyperedge begins."""
    if num_vertices < 1:
        raise InputError(f"expected at least 1 vertex, got {num_vertices}")
    if isinstance(edges, _RowSets):
        vertices, indptr = edges.indices, edges.indptr
    elif _are_incidences(edges):
        vertices, owner = (np.asarray(part.cpu() if isinstance(part, Tensor) else part).ravel() for part in edges)
        if len(vertices) != len(owner):
            raise InputError(f"expected as many vertices as hyperedge ids, got {len(vertices)} and {len(owner)}")
        _check_integers(vertices, owner)
        if len(owner) and owner.min() < 0:
            raise InputError(f"expected hyperedge ids of 0 or more, got {owner.min()}")
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner) if len(owner) else np.zeros(0, np.int64)
        vertices, indptr = vertices[order].astype(np.int64), np.concatenate(([0], np.cumsum(counts)))
    else:
        listed: Sequence[Sequence[int]] = list(edges)
        lengths = np.fromiter((len(edge) for edge in listed), np.int64, len(listed))
        flat = list(chain.from_iterable(listed))
        vertices = np.array(flat) if flat else np.zeros(0, np.int64)
        _check_integers(vertices)
        indptr = np.concatenate(([0], np.cumsum(lengths)))
    if len(indptr) < 2:
        raise InputError("expected at least 1 hyperedge, got none")
    empty = np.flatnonzero(np.diff(indptr) == 0)
    if len(empty):
        raise InputError(f"expected no empty hyperedge, got hyperedge {empty[0]} without vertices")
    _check_ids(vertices, num_vertices)
    return vertices.astype(np.int64), indptr.astype(np.int64)


def _are_incidences(edges: Any) -> bool:
    """A pair of index arrays, or both as the rows of one array; a list of two lists is two hyperedges."""
    if isinstance(edges, (np.ndarray, Tensor)):
        return edges.ndim == 2 and edges.shape[0] == 2
    return isinstance(edges, tuple) and len(edges) == 2


def _check_integers(*arrays: np.ndarray) -> None:
    for array in arrays:
        if len(array) and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"expected vertices and hyperedges as integers, got {array.dtype}")


def _check_ids(vertices: np.ndarray, num_vertices: int) -> None:
    wrong = (vertices < 0) | (vertices >= num_vertices)
    if wrong.any():
        raise InputError(f"expected vertex ids from 0 to {num_vertices - 1}, got {vertices[wrong][0]}")


def _weights(given: Any, num_edges: int) -> np.ndarray | None:
    if given is None:
        return None
    weight = np.asarray(given.cpu() if isinstance(given, Tensor) else given, dtype=np.float32).ravel()
    if len(weight) != num_edges:
        raise InputError(f"expected {num_edges} hyperedge weights, got {len(weight)}")
    if not (np.isfinite(weight) & (weight > 0)).all():
        wrong = weight[~(np.isfinite(weight) & (weight > 0))][0]
        raise InputError(f"expected finite hyperedge weights above 0, got {wrong}")
    return None if (weight == 1).all() else weight


def _sorted_sets(num_vertices: int, indptr: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of each hyperedge ascending, each once."""
    matrix = scipy.sparse.csr_matrix(
        (np.ones(len(vertices), np.int8), vertices, indptr), (len(indptr) - 1, num_vertices)
    )
    # scipy keeps indices at 32 bits where they fit, and flattening is never needed
    if not matrix.has_sorted_indices:
        matrix.sort_indices()
    matrix.sum_duplicates()
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)


def _merge_equal(
    indptr: np.ndarray, vertices: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Equal hyperedges become the first of them, at the mean of their weights."""
    num_edges = len(indptr) - 1
    sizes = np.diff(indptr)
    # equal sets have equal sums of random words; that these are equal sets is then checked
    words = np.random.default_rng(0).integers(0, 2**63, int(vertices.max()) + 1, dtype=np.uint64)
    sums = np.add.reduceat(words[vertices], indptr[:-1])
    keys = sums ^ (sizes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == num_edges:
        return indptr, vertices, weight, np.arange(num_edges)
    representative = first[group.ravel()]
    copies = np.flatnonzero(representative != np.arange(num_edges))
    if not _rows_equal(indptr, vertices, copies, representative[copies]):  # pragma: no cover - 2^-63 a pair
        return indptr, vertices, weight, np.arange(num_edges)
    kept = np.sort(first)
    number = np.empty(num_edges, np.int64)
    number[kept] = np.arange(len(kept))
    merged_into = number[representative]
    if weight is not None:
        weight = (np.bincount(merged_into, weight) / np.bincount(merged_into)).astype(np.float32)
    chosen = np.repeat(np.isin(np.arange(num_edges), kept), sizes)
    return np.concatenate(([0], np.cumsum(sizes[kept]))), vertices[chosen], weight, merged_into


def _rows_equal(indptr: np.ndarray, vertices: np.ndarray, these: np.ndarray, those: np.ndarray) -> bool:
    sizes = np.diff(indptr)
    if not np.array_equal(sizes[these], sizes[those]):
        return False
    within = np.arange(sizes[these].sum()) - np.repeat(np.cumsum(sizes[these]) - sizes[these], sizes[these])
    left = vertices[np.repeat(indptr[these], sizes[these]) + within]
    return np.array_equal(left, vertices[np.repeat(indptr[those], sizes[these]) + within])
