"""Hypergraphs from the files and objects that others keep them in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isotone.lighthgnn.dataset import Dataset, from_graph, make_dataset, planetoid
from isotone.lighthgnn.features import l1_normalize
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.old_pickles import read_pickle
from isotone.shared import data
from isotone.shared.errors import InputError


def read_edge_list(path: str | os.PathLike[str], num_vertices: int | None = None) -> Hypergraph:
    """One hyperedge a line, its vertex numbers apart by blanks or commas; `#` begins a remark.

    `num_vertices`: one more than the largest number where not given.
    """
    edges: list[list[int]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split("#")[0].replace(",", " ").split()
        try:
            if words:
                edges.append([int(word) for word in words])
        except ValueError:
            raise InputError(f"{os.fspath(path)!r}, line {number}: expected vertex numbers, got {line!r}") from None
    if not edges:
        raise InputError(f"expected hyperedges in {os.fspath(path)!r}, found none")
    return Hypergraph(num_vertices or max(map(max, edges)) + 1, edges)


def read_hif(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Hypergraph, list[Hashable]]:
    """A hypergraph in the Hypergraph Interchange Format, a file or its parsed JSON; and the name of each vertex.

    Vertices are numbered as "nodes" lists them, then by first incidence. An edge's "weight", its own or among its
    "attrs", is its weight. Raises `InputError` on a directed network or a simplicial complex (asc), whose faces are
    not listed, on an edge without incidences, and on what is not HIF.
    """
    document = source
    if not isinstance(document, Mapping):
        path = os.fspath(source)  # type: ignore[arg-type]
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"expected JSON in {path!r}: {error}") from None
    if not isinstance(document, Mapping) or not isinstance(document.get("incidences"), list):
        raise InputError("expected HIF with a list of incidences, found none")
    if (kind := document.get("network-type", "undirected")) != "undirected":
        raise InputError(f"expected HIF of network-type undirected, got {kind!r}")
    try:
        members: dict[Hashable, list[Hashable]] = {item["edge"]: [] for item in document.get("edges", ())}
        names = [item["node"] for item in document.get("nodes", ())]
        for incidence in document["incidences"]:
            members.setdefault(incidence["edge"], []).append(incidence["node"])
        weights = {item["edge"]: _hif_weight(item) for item in document.get("edges", ())}
    except KeyError as error:
        raise InputError(f"expected HIF records with edge and node, missing {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"expected HIF records with names and weights as numbers: {error}") from None
    return _named(members, names, weights)


def _hif_weight(edge: Mapping[str, Any]) -> float:
    return float(edge.get("weight", (edge.get("attrs") or {}).get("weight", 1.0)))


def write_hif(hypergraph: Hypergraph, path: str | os.PathLike[str], names: Iterable[Hashable] | None = None) -> Path:
    """Write HIF JSON; `names` of the vertices, their numbers if not given."""
    known = list(range(hypergraph.num_vertices) if names is None else names)
    weights = hypergraph.edge_weight.tolist()
    document = {
        "network-type": "undirected",
        "nodes": [{"node": name} for name in known],
        "edges": [{"edge": number, "weight": weight} for number, weight in enumerate(weights)],
        "incidences": [
            {"edge": number, "node": known[vertex]} for number, e in enumerate(hypergraph.edges()) for vertex in e
        ],
    }
    path = Path(path)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def from_hypernetx(hypergraph: Any) -> tuple[Hypergraph, list[Hashable]]:
    """From a `hypernetx.Hypergraph` (its `incidence_dict`, `nodes`, edges' weights); and the name of each vertex."""
    members = {edge: list(nodes) for edge, nodes in hypergraph.incidence_dict.items()}
    weights = {edge: float(hypergraph.edges[edge].weight) for edge in members}
    return _named(members, list(hypergraph.nodes), weights)


def from_xgi(hypergraph: Any) -> tuple[Hypergraph, list[Hashable]]:
    """From an `xgi.Hypergraph` (its `edges.members`, `nodes`, edges' attribute "weight"); and each vertex's name."""
    members = {edge: sorted(nodes, key=str) for edge, nodes in hypergraph.edges.members(dtype=dict).items()}
    weights = {edge: float(weight) for edge, weight in hypergraph.edges.attrs("weight", missing=1.0).asdict().items()}
    return _named(members, list(hypergraph.nodes), weights)


def _named(
    members: Mapping[Hashable, list[Hashable]], names: list[Hashable], weights: Mapping[Hashable, float]
) -> tuple[Hypergraph, list[Hashable]]:
    number: dict[Hashable, int] = {}
    for name in [*names, *(node for nodes in members.values() for node in nodes)]:
        number.setdefault(name, len(number))
    edges = [[number[node] for node in nodes] for nodes in members.values()]
    given = [weights.get(edge, 1.0) for edge in members]
    return Hypergraph(len(number), edges, given), list(number)


def read_hypergcn(folder: str | os.PathLike[str], normalize: bool = False) -> Dataset:
    """A data set of malllabiisc/HyperGCN: features.pickle, hypergraph.pickle, labels.pickle in `folder`."""
    folder = Path(folder)
    X = read_pickle(folder / "features.pickle")
    named = read_pickle(folder / "hypergraph.pickle")
    labels = read_pickle(folder / "labels.pickle")
    if not isinstance(named, dict):
        raise InputError(f"expected a dict of hyperedges in {str(folder)!r}, got {type(named).__name__}")
    y = np.asarray(labels)
    y = y.argmax(1) if y.ndim == 2 else y
    edges = [[int(vertex) for vertex in vertices] for vertices in named.values()]
    made = make_dataset(folder.name, X, y, Hypergraph(len(y), edges), source=_provenance(folder.name, folder))
    return _normalized(made) if normalize else made


def read_planetoid(prefix: str | os.PathLike[str], normalize: bool = False) -> Dataset:
    """A graph of kimiyoung/planetoid: the files `prefix`.allx, .tx, .ally, .ty, .graph, .test.index."""
    prefix = os.fspath(prefix)
    parts = {name: read_pickle(f"{prefix}.{name}") for name in ("allx", "tx", "ally", "ty")}
    neighbours = read_pickle(f"{prefix}.graph")
    index = [int(line) for line in Path(f"{prefix}.test.index").read_text().split()]
    X, y = planetoid(parts, index)
    pairs = np.array([(vertex, other) for vertex, others in neighbours.items() for other in others]).T
    name = Path(prefix).name
    made = from_graph(name, X, y, pairs, data.provenance(name, Path(f"{prefix}.graph")))
    return _normalized(made) if normalize else made


def _normalized(made: Dataset) -> Dataset:
    return dataclasses.replace(made, X=l1_normalize(made.X))


def _provenance(name: str, folder: Path) -> dict[str, str]:
    return data.provenance(name, folder / "hypergraph.pickle")
