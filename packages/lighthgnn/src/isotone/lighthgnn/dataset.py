"""A data set: features, labels, hypergraph (and the graph it came from), in one npz that needs no unpickling."""

from __future__ import annotations

import dataclasses
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Int
from torch import Tensor

from isotone.lighthgnn.arrays import read_npz
from isotone.lighthgnn.features import Features, as_features, l1_normalize
from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import check_label_sets
from isotone.lighthgnn.settings import check_labels
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.shared import data
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

KNOWN = {
    "coauthorship-cora": "hypergraphs/coauthorship-cora.npz",
    "cocitation-cora": "hypergraphs/cocitation-cora.npz",
    "cocitation-citeseer": "hypergraphs/cocitation-citeseer.npz",
    "cora": "graphs/planetoid-cora.npz",
    "citeseer": "graphs/planetoid-citeseer.npz",
}
"""Data sets looked for in the folder that ISOTONE_DATA_DIR names."""


@dataclass(frozen=True)
class Dataset:
    """N vertices with features (N x d) and labels (below 0: unknown), and E hyperedges without empty ones.

    `y`: N classes, or N x C zeros and ones where a vertex may have any number of labels.

    `graph` is there where the hyperedges were made of a graph. `source`: name and SHA-256 for the results.
    """

    name: str
    X: Features
    y: Int[Tensor, " N *C"]
    hypergraph: Hypergraph
    graph: Graph | None = None
    source: dict[str, str] | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.y.shape[1]) if self.multilabel else int(self.y.max()) + 1

    @property
    def multilabel(self) -> bool:
        """Whether a vertex may have any number of labels."""
        return self.y.ndim == 2

    def to(self, device: str | torch.device) -> Dataset:
        """The same data set on `device`."""
        graph = None if self.graph is None else self.graph.to(device)
        parts = (self.X.to(device), self.y.to(device), self.hypergraph.to(device))
        return Dataset(self.name, *parts, graph, self.source)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the npz that `load_dataset` reads: x (or x_data, x_indices, x_indptr, x_shape), hyperedge_index, y."""
        parts: dict[str, Any] = {"y": self.y.numpy(), "hyperedge_index": self.hypergraph.hyperedge_index.numpy()}
        if self.hypergraph._edge_weight is not None:
            parts["edge_weight"] = self.hypergraph._edge_weight.numpy()
        if isinstance(self.X, SparseMatrix):
            matrix = self.X.to_scipy()
            parts |= {"x_data": matrix.data, "x_indices": matrix.indices, "x_indptr": matrix.indptr}
            parts["x_shape"] = np.array(matrix.shape)
        else:
            parts["x"] = self.X.numpy()
        if self.graph is not None:
            adjacency = self.graph.adjacency
            parts["edge_index"] = torch.stack((adjacency.row_ids(), adjacency.indices)).numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **parts)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())
        return path


def make_dataset(
    name: str, X: Any, y: Any, hypergraph: Hypergraph, graph: Graph | None = None, source: Any = None
) -> Dataset:
    """A checked data set; `InputError` where the numbers of vertices differ."""
    features = as_features(X)
    labels = torch.from_numpy(check_label_sets(y) if np.ndim(y) == 2 else check_labels(y))
    if not features.shape[0] == len(labels) == hypergraph.num_vertices:
        sizes = f"{features.shape[0]} rows of features, {len(labels)} labels and {hypergraph.num_vertices} vertices"
        raise InputError(f"expected equal numbers, got {sizes}")
    return Dataset(name, features, labels, hypergraph, graph, source)


def load_dataset(path: str | os.PathLike[str], normalize: bool = False) -> Dataset:
    """The npz at `path`: one of ours, or a Planetoid graph's (allx, tx, ally, ty, test_index, edge_index).

    `normalize`: rows of features divided by their sum. Raises `InputError` where a field is missing or bad.
    """
    path = Path(path)
    arrays = read_npz(path)
    source = data.provenance(path.name, path.read_bytes())
    try:
        made = (
            _from_planetoid(path.stem, arrays, source)
            if "allx_data" in arrays
            else _from_npz(path.stem, arrays, source)
        )
    except KeyError as error:
        raise InputError(f"expected the array {error} in {os.fspath(path)!r}, found none") from None
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{os.fspath(path)!r}: {error}") from None
    if not normalize:
        return made
    return dataclasses.replace(made, X=l1_normalize(made.X))


def known_dataset(name: str) -> Dataset | None:
    """A data set of `KNOWN`, its bags of words row-normalised, or None where its file is not there."""
    if name not in KNOWN:
        raise InputError(f"expected a data set of {', '.join(KNOWN)}, got {name!r}")
    path = data.local(KNOWN[name])
    return None if path is None else load_dataset(path, normalize=True)


def digits_knn(k: int = 10) -> Dataset:
    """scikit-learn's bundled digits (1,797 x 64, ten classes): each sample and its k nearest are a hyperedge."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    source = data.provenance("scikit-learn digits", X.tobytes())
    return make_dataset("digits", X, y, Hypergraph.from_knn(X, k), source=source)


def from_graph(name: str, X: Any, y: Any, edge_index: Any, source: Any = None) -> Dataset:
    """A graph with features and labels as a hypergraph: its edges and its closed neighbourhoods (section 2.6)."""
    num_vertices = len(y)
    hypergraph = Hypergraph.from_graph(num_vertices, edge_index)
    return make_dataset(name, X, y, hypergraph, Graph.from_edges(num_vertices, edge_index), source)


def planetoid(parts: dict[str, Any], test_index: Any) -> tuple[Any, np.ndarray]:
    """Features and labels by vertex from allx, tx, ally, ty: row i of tx and ty belongs to vertex test_index[i].

    Citeseer's test ids have gaps: those vertices get no features and an unknown label.
    """
    index = np.asarray(test_index, dtype=np.int64)
    first, last = parts["allx"].shape[0], int(index.max()) + 1
    rows = scipy.sparse.lil_matrix((last, parts["allx"].shape[1]), dtype=np.float32)
    rows[:first] = parts["allx"]
    rows[index] = parts["tx"]
    y = np.full(last, -1, np.int64)
    y[:first], y[index] = _class_ids(parts["ally"]), _class_ids(parts["ty"])
    return rows.tocsr(), y


def _class_ids(labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    return labels.argmax(1) if labels.ndim == 2 else labels


def _csr(arrays: dict[str, np.ndarray], name: str) -> Any:
    parts = tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return scipy.sparse.csr_matrix(parts, tuple(arrays[f"{name}_shape"]))


def _from_planetoid(name: str, arrays: dict[str, np.ndarray], source: Any) -> Dataset:
    parts = {"allx": _csr(arrays, "allx"), "tx": _csr(arrays, "tx"), "ally": arrays["ally"], "ty": arrays["ty"]}
    X, y = planetoid(parts, arrays["test_index"])
    return from_graph(name, X, y, arrays["edge_index"], source)


def _from_npz(name: str, arrays: dict[str, np.ndarray], source: Any) -> Dataset:
    X = arrays["x"] if "x" in arrays else _csr(arrays, "x")
    y = arrays["y"]
    index = arrays["hyperedge_index"]
    if index.ndim != 2 or index.shape[0] != 2:
        raise InputError(f"expected hyperedge_index of shape (2, incidences), got {index.shape}")
    hypergraph = Hypergraph(len(y), (index[0], index[1]), arrays.get("edge_weight"))
    graph = Graph.from_edges(len(y), arrays["edge_index"]) if "edge_index" in arrays else None
    return make_dataset(name, X, y, hypergraph, graph, source)
