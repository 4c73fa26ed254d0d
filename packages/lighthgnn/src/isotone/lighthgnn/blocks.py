"""Neighbourhoods of a few vertices: exact closures for inference, sampled blocks to train beyond memory.

A network of L convolutions needs, for its target vertices, their hyperedges, those hyperedges' vertices, and so on L
times. One `Block` a convolution holds a step of that; sizes and degrees stay those of the whole hypergraph, so that
the closure without sampling gives exactly what the whole pass gives. No Python loop over vertices or hyperedges.

Dimensions: N vertices, E hyperedges, I incidences, T targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from isotone.lighthgnn.fingerprint import describe, fingerprint
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import agreement, cross_entropy
from isotone.lighthgnn.settings import check_parts, check_width
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.lighthgnn.structure import Structure
from isotone.lighthgnn.training import History, TrainConfig, epoch_seed, fit
from isotone.shared.errors import InputError

Block = Structure
_ARRAYS = ("edge_indptr", "edge_indices", "vertex_indptr", "vertex_indices", "degree", "features")


class Incidences:
    """Both CSR orientations of a hypergraph, and its degrees, as arrays that may lie in files (memory maps)."""

    def __init__(
        self,
        edge_indptr: Any,
        edge_indices: Any,
        vertex_indptr: Any,
        vertex_indices: Any,
        degree: Any,
        edge_weight: Any | None = None,
    ) -> None:
        self.edge_indptr, self.edge_indices = edge_indptr, edge_indices
        self.vertex_indptr, self.vertex_indices = vertex_indptr, vertex_indices
        self.degree, self.edge_weight = degree, edge_weight
        # scratch for renumbering, kept so that a request does not pay for clearing N numbers
        self._number = np.full(len(vertex_indptr) - 1, -1, np.int64)

    @classmethod
    def of(cls, hypergraph: Hypergraph) -> Incidences:
        """Of a hypergraph in memory; nothing is copied on a CPU."""
        into, out = hypergraph.into_edges, hypergraph.out_of_edges
        weight = None if hypergraph._edge_weight is None else hypergraph._edge_weight.cpu().numpy()
        rows = (into.indptr.cpu().numpy(), into.indices.cpu().numpy())
        columns = (out.indptr.cpu().numpy(), out.indices.cpu().numpy())
        return Incidences(*rows, *columns, hypergraph.vertex_degree.cpu().numpy(), weight)

    @property
    def num_vertices(self) -> int:
        """N."""
        return len(self.vertex_indptr) - 1

    def blocks(
        self,
        seeds: Int[Tensor, " T"],
        layers: int = 2,
        *,
        edges_per_vertex: int | None = None,
        vertices_per_edge: int | None = None,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Block], Int[Tensor, " N_input"]]:
        """One block a layer, first layer first, and the vertices whose features the first needs, `seeds` first.

        Without limits the closure is exact. With them, at most so many hyperedges of a vertex and vertices of a
        hyperedge are drawn; sums over hyperedges are then scaled up by d_v / drawn, and means over the drawn
        vertices stand for the hyperedge's mean: unbiased in each operator.
        """
        found: list[Block] = []
        targets = np.asarray(seeds, dtype=np.int64)
        for _ in range(layers):
            block, targets = self._block(targets, edges_per_vertex, vertices_per_edge, generator)
            found.append(block)
        return found[::-1], torch.from_numpy(targets)

    def _block(
        self, targets: np.ndarray, most_edges: int | None, most_vertices: int | None, generator: Any
    ) -> tuple[Block, np.ndarray]:
        edge_ids, out_indptr = _gather(self.vertex_indptr, self.vertex_indices, targets, most_edges, generator)
        edges, edge_columns = np.unique(edge_ids, return_inverse=True)
        members, into_indptr = _gather(self.edge_indptr, self.edge_indices, edges, most_vertices, generator)
        number = self._number
        number[targets] = np.arange(len(targets))
        unseen = members[number[members] < 0]
        new = np.unique(unseen)
        number[new] = np.arange(len(targets), len(targets) + len(new))
        sources = np.concatenate((targets, new))
        columns = number[members]
        number[sources] = -1
        degree = torch.from_numpy(np.asarray(self.degree[sources]))
        size = torch.from_numpy(np.diff(into_indptr).astype(np.float32))
        weight = None if self.edge_weight is None else torch.from_numpy(np.asarray(self.edge_weight[edges]))
        into = SparseMatrix(torch.from_numpy(into_indptr), torch.from_numpy(columns), None, len(sources))
        values = None
        if most_edges is not None:
            whole = self.vertex_indptr[targets + 1] - self.vertex_indptr[targets]
            drawn = np.diff(out_indptr)
            values = torch.from_numpy(np.repeat(whole / np.maximum(drawn, 1), drawn).astype(np.float32))
        out = SparseMatrix(torch.from_numpy(out_indptr), torch.from_numpy(edge_columns.ravel()), values, len(edges))
        return Block(into, out, size, weight, degree, degree[: len(targets)]), sources


def _gather(
    indptr: Any, indices: Any, rows: np.ndarray, most: int | None, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """The entries of CSR rows, at most `most` random ones of each, and their new indptr."""
    starts = np.asarray(indptr[rows])
    counts = np.asarray(indptr[rows + 1]) - starts
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    positions = np.repeat(starts, counts) + within
    if most is not None and len(counts) and counts.max() > most:
        generator = generator or np.random.default_rng(0)
        owner = np.repeat(np.arange(len(rows)), counts)
        order = np.lexsort((generator.random(len(owner)), owner))
        positions = positions[np.sort(order[within < most])]
        counts = np.minimum(counts, most)
        ends = np.cumsum(counts)
    return np.asarray(indices[positions]), np.concatenate(([0], ends)).astype(np.int64)


class StoredHypergraph(Incidences):
    """A hypergraph and its features in a folder of .npy files, read by memory map: larger than memory is fine.

    Write one with `StoredHypergraph.write` or, where it does not fit in memory, `write_stream`; open it with
    `StoredHypergraph(folder)`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        missing = [name for name in _ARRAYS if not (folder / f"{name}.npy").is_file()]
        if missing:
            raise InputError(f"expected {missing[0]}.npy in {str(folder)!r}, found none")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        self.features = arrays.pop("features")
        weight = folder / "edge_weight.npy"
        super().__init__(
            **arrays, edge_weight=np.load(weight, mmap_mode="r", allow_pickle=False) if weight.exists() else None
        )

    @staticmethod
    def write(folder: str | os.PathLike[str], hypergraph: Hypergraph, features: Any) -> Path:
        """Write the files; `features` N x d, an array or a memory map."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = Incidences.of(hypergraph)
        for name in _ARRAYS[:-1]:
            np.save(folder / f"{name}.npy", getattr(parts, name), allow_pickle=False)
        if parts.edge_weight is not None:
            np.save(folder / "edge_weight.npy", parts.edge_weight, allow_pickle=False)
        _write_rows(folder / "features.npy", [features], parts.num_vertices)
        return folder

    @staticmethod
    def write_stream(
        folder: str | os.PathLike[str],
        num_vertices: int,
        hyperedges: Iterable[Sequence[int]],
        features: Iterable[Any],
        edge_weight: Any = None,
        chunk: int = 65_536,
    ) -> Path:
        """Write the files of a hypergraph that is never whole in memory, which holds N and E numbers but not I.

        `hyperedges`: vertices of one after another, read once; `features`: N rows in pieces (n x d); `edge_weight`:
        E weights. Incidences are handled about `chunk` at a time. A vertex listed twice counts once; equal hyperedges
        stay apart. Raises `InputError` on a vertex id outside 0..N-1, an empty hyperedge, weights that are not E, and
        rows that are not N.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        raw = folder / "edge_indices.part"
        edge_indptr, vertex_indptr = _spool(raw, num_vertices, hyperedges)
        weight = None if edge_weight is None else np.asarray(edge_weight, np.float32)
        if weight is not None and weight.shape != (len(edge_indptr) - 1,):
            raise InputError(f"expected {len(edge_indptr) - 1} hyperedge weights, got shape {weight.shape}")
        degree = _both_orders(folder, np.memmap(raw, np.int64, "r"), edge_indptr, vertex_indptr, weight, chunk)
        raw.unlink()
        for name, array in (("edge_indptr", edge_indptr), ("vertex_indptr", vertex_indptr)):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        np.save(folder / "degree.npy", degree, allow_pickle=False)
        (folder / "edge_weight.npy").unlink(missing_ok=True)
        if weight is not None:
            np.save(folder / "edge_weight.npy", weight, allow_pickle=False)
        _write_rows(folder / "features.npy", features, num_vertices)
        return folder

    def rows(self, vertices: Int[Tensor, " n"]) -> Tensor:
        """Features of some vertices, read from the file."""
        return torch.from_numpy(np.ascontiguousarray(self.features[vertices.numpy()]))


def _spool(path: Path, num_vertices: int, hyperedges: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted vertices of one hyperedge after another into a raw file; where hyperedges and vertices begin."""
    counts, sizes = np.zeros(num_vertices, np.int64), [0]
    with open(path, "wb") as file:
        for number, edge in enumerate(hyperedges):
            members = np.unique(np.asarray(edge, dtype=np.int64))
            if len(members) == 0:
                raise InputError(f"expected no empty hyperedge, got hyperedge {number} without vertices")
            if members[0] < 0 or members[-1] >= num_vertices:
                wrong = members[0] if members[0] < 0 else members[-1]
                raise InputError(f"expected vertex ids from 0 to {num_vertices - 1}, got {wrong}")
            counts[members] += 1
            sizes.append(len(members))
            file.write(members.tobytes())
    if len(sizes) == 1:
        raise InputError("expected at least 1 hyperedge, got none")
    return np.cumsum(sizes), np.concatenate(([0], np.cumsum(counts)))


def _both_orders(
    folder: Path, members: Any, edge_indptr: np.ndarray, vertex_indptr: np.ndarray, weight: Any, chunk: int
) -> np.ndarray:
    """Write the incidences by hyperedge and by vertex, a piece at a time; returns the degrees."""
    by_edge, by_vertex = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.int64, (int(edge_indptr[-1]),))
        for name in ("edge_indices", "vertex_indices")
    )
    degree, place, first = np.zeros(len(vertex_indptr) - 1), vertex_indptr[:-1].copy(), 0
    while first < len(edge_indptr) - 1:
        last = max(first + 1, int(np.searchsorted(edge_indptr, edge_indptr[first] + chunk, "right")) - 1)
        span = slice(int(edge_indptr[first]), int(edge_indptr[last]))
        owner = np.repeat(np.arange(first, last), np.diff(edge_indptr[first : last + 1]))
        piece = np.asarray(members[span])
        by_edge[span] = piece
        # a counting sort by vertex: ranks within the piece, after what earlier pieces placed
        order = np.argsort(piece, kind="stable")
        ordered = piece[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        lengths = np.diff(np.concatenate((starts, [len(ordered)])))
        rank = np.arange(len(ordered)) - np.repeat(starts, lengths)
        by_vertex[place[ordered] + rank] = owner[order]
        place[ordered[starts]] += lengths
        np.add.at(degree, piece, 1.0 if weight is None else weight[owner])
        first = last
    by_edge.flush()
    by_vertex.flush()
    return degree.astype(np.float32)


def _write_rows(path: Path, pieces: Iterable[Any], num_vertices: int) -> None:
    """N rows that come in pieces, as one float32 .npy."""
    whole, done = None, 0
    for piece in pieces:
        rows = np.asarray(piece)
        if rows.ndim != 2 or (whole is not None and rows.shape[1] != whole.shape[1]):
            raise InputError(f"expected pieces of features of one width, got shape {rows.shape}")
        if whole is None:
            whole = np.lib.format.open_memmap(path, "w+", np.float32, (num_vertices, rows.shape[1]))
        if done + len(rows) <= num_vertices:
            whole[done : done + len(rows)] = rows
        done += len(rows)
    if whole is None or done != num_vertices:
        raise InputError(f"expected {num_vertices} rows of features, got {done}")
    whole.flush()


def train_teacher_in_blocks(
    teacher: nn.Module,
    stored: StoredHypergraph,
    y: Int[Tensor, " N *C"],
    train: Int[Tensor, " a"],
    val: Int[Tensor, " b"],
    config: TrainConfig | None = None,
    *,
    layers: int = 2,
    batch_size: int = 512,
    edges_per_vertex: int | None = 10,
    vertices_per_edge: int | None = 25,
    folder: Path | None = None,
    resume: bool = True,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> History:
    """Train on sampled neighbourhoods of minibatches, validate on exact closures; memory is that of a batch.

    `y`, `train`, `val` on the CPU; the batches go to the device that the teacher is on.
    """
    config = config or TrainConfig()
    device = next(teacher.parameters()).device
    needed = check_parts(y, train, val, stored.num_vertices)

    def losses(epoch: int) -> Iterator[Tensor]:
        generator = np.random.default_rng(epoch_seed(config.seed, epoch, 3))
        order = train[torch.from_numpy(generator.permutation(len(train)))]
        for batch in order.split(batch_size):
            blocks, vertices = stored.blocks(
                *(batch, layers),
                edges_per_vertex=edges_per_vertex, vertices_per_edge=vertices_per_edge, generator=generator,
            )  # fmt: skip
            logits = teacher(stored.rows(vertices).to(device), [block.to(device) for block in blocks])
            check_width(logits, needed)
            yield cross_entropy(logits, y[batch].to(device))

    def validate() -> float:
        return agreement(predict_in_blocks(teacher, stored, val, layers, batch_size).cpu(), y[val])

    key = None
    if folder is not None:
        incidences = (stored.edge_indptr, stored.edge_indices, stored.degree, stored.edge_weight)
        parts = {"X": stored.features, "y": y, "train": train, "val": val, "structure": incidences}
        sampled: dict[str, int | None] = {"layers": layers, "batch_size": batch_size}
        sampled |= {"edges_per_vertex": edges_per_vertex, "vertices_per_edge": vertices_per_edge}
        key = {"model": describe(teacher), "blocks": sampled} | fingerprint(**parts)
    return fit(
        *(teacher, losses, validate, config),
        folder=folder, resume=resume, run_key=key, on_epoch=on_epoch,
    )  # fmt: skip


@torch.no_grad()
def predict_in_blocks(
    teacher: nn.Module, stored: StoredHypergraph, vertices: Int[Tensor, " n"], layers: int = 2, batch_size: int = 512
) -> Tensor:
    """Exact logits of `vertices` (n x C), closure by closure."""
    found = []
    device = next(teacher.parameters()).device
    for batch in vertices.split(batch_size):
        blocks, needed = stored.blocks(batch, layers)
        found.append(teacher(stored.rows(needed).to(device), [block.to(device) for block in blocks]))
    return torch.cat(found)
