"""Splits and the three settings (section 2.6): transductive, inductive, production."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import check_label_sets, is_known
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Split:
    """Vertex ids, each ascending: no two parts share a vertex.

    `test_tran`: observed while training, unlabelled. `test_ind`: unseen until testing; empty when transductive.
    """

    train: Int[Tensor, " a"]
    val: Int[Tensor, " b"]
    test_tran: Int[Tensor, " c"]
    test_ind: Int[Tensor, " d"]

    def __post_init__(self) -> None:
        check_disjoint({"train": self.train, "val": self.val, "test": self.test})
        if min(len(self.train), len(self.val)) == 0:
            raise InputError(f"expected train and val vertices, got {len(self.train)} and {len(self.val)}")

    @property
    def test(self) -> Int[Tensor, " e"]:
        """All test vertices: the production setting's."""
        return torch.cat((self.test_tran, self.test_ind)).sort().values

    @property
    def observed(self) -> Int[Tensor, " f"]:
        """What teacher and student may see: everything but `test_ind`."""
        return torch.cat((self.train, self.val, self.test_tran)).sort().values


def transductive_split(
    labels: Any, num_train: int = 20, num_val: int = 100, seed: int = 0, num_classes: int | None = None
) -> Split:
    """`num_train` and `num_val` random vertices of each class, all others test; labels below 0 are unknown, left out.

    Of label sets (N x C) C times as many random vertices, whatever their labels. Raises `InputError` where a class
    has fewer than num_train + num_val + 1 vertices, or labels leave 0..C-1.
    """
    source = np.random.default_rng(seed)
    if np.ndim(labels) == 2:
        return _split_label_sets(check_label_sets(labels), num_train, num_val, source)
    y = check_labels(labels, num_classes)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for label in range(int(y.max()) + 1 if num_classes is None else num_classes):
        members = source.permutation(np.flatnonzero(y == label))
        if len(members) < num_train + num_val + 1:
            needed = f"at least {num_train + num_val + 1} vertices ({num_train} train, {num_val} val, 1 test)"
            raise InputError(f"expected {needed} of class {label}, got {len(members)}")
        parts["train"].append(members[:num_train])
        parts["val"].append(members[num_train : num_train + num_val])
        parts["test"].append(members[num_train + num_val :])
    train, val, test = (torch.from_numpy(np.sort(np.concatenate(part))) for part in parts.values())
    return Split(train, val, test, test[:0])


def _split_label_sets(y: np.ndarray, num_train: int, num_val: int, source: np.random.Generator) -> Split:
    known = source.permutation(np.flatnonzero(is_known(y)))
    train, val = num_train * y.shape[1], num_val * y.shape[1]
    if len(known) < train + val + 1:
        needed = f"at least {train + val + 1} vertices ({train} train, {val} val, 1 test)"
        raise InputError(f"expected {needed} with labels, got {len(known)}")
    parts = (known[:train], known[train : train + val], known[train + val :])
    first, second, test = (torch.from_numpy(np.sort(part)) for part in parts)
    return Split(first, second, test, test[:0])


def production_split(
    labels: Any,
    num_train: int = 20,
    num_val: int = 100,
    test_ind_ratio: float = 0.5,
    seed: int = 0,
    num_classes: int | None = None,
) -> Split:
    """A transductive split whose test set is divided at random: a share of `test_ind_ratio` stays unseen."""
    if not 0 < test_ind_ratio < 1:
        raise InputError(f"expected test_ind_ratio between 0 and 1, got {test_ind_ratio}")
    split = transductive_split(labels, num_train, num_val, seed, num_classes)
    test = split.test_tran.numpy()
    unseen = np.random.default_rng((seed, 1)).permutation(len(test))[: round(test_ind_ratio * len(test))]
    mask = np.isin(np.arange(len(test)), unseen)
    return Split(split.train, split.val, torch.from_numpy(test[~mask]), torch.from_numpy(test[mask]))


def observed_hypergraph(hypergraph: Hypergraph, split: Split) -> Hypergraph:
    """What is seen of the hypergraph while training, renumbered, with singletons for isolated vertices."""
    if len(split.test_ind) == 0:
        return hypergraph.add_singletons()
    return hypergraph.subgraph(split.observed).add_singletons()


def local_ids(split: Split, vertices: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Positions of `vertices` among the observed ones."""
    return torch.searchsorted(split.observed, vertices)


def check_labels(labels: Any, num_classes: int | None = None) -> np.ndarray:
    """Labels as int64 of 0..C-1, or below 0 where unknown; `InputError` on anything else."""
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if y.ndim != 1 or len(y) == 0:
        raise InputError(f"expected one label a vertex, got shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        if not (np.issubdtype(y.dtype, np.floating) and np.isfinite(y).all() and (y == y.astype(np.int64)).all()):
            raise InputError(f"expected labels as whole numbers, got {y.dtype}")
    y = y.astype(np.int64)
    if num_classes is not None and y.max() >= num_classes:
        raise InputError(f"expected labels from 0 to {num_classes - 1}, got {y.max()}")
    if y.max() < 0:
        raise InputError("expected at least one label of 0 or more, got none")
    return y


def check_parts(y: Tensor, train: Tensor, val: Tensor, num_vertices: int) -> int:
    """How many classes the labels of two vertex sets need (of label sets: their labels, C).

    Raises `InputError` on labels of another number of vertices, sets that are empty, leave 0..N-1 or share a vertex,
    and labels in them that are unknown, fractions, or (of label sets) not zeros and ones.
    """
    if len(y) != num_vertices:
        raise InputError(f"expected {num_vertices} labels, one a row of X, got {len(y)}")
    for name, index in (("train", train), ("val", val)):
        if index.ndim != 1 or len(index) == 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise InputError(
                f"expected {name} as a list of vertex ids, got shape {tuple(index.shape)} of {index.dtype}"
            )
        if int(index.min()) < 0 or int(index.max()) >= num_vertices:
            got = f"{int(index.min())} to {int(index.max())}"
            raise InputError(f"expected {name} from 0 to {num_vertices - 1}, got {got}")
    if len(shared := train[torch.isin(train, val)]):
        raise InputError(f"expected disjoint vertex sets, got vertex {int(shared[0])} in train and val")
    if y.is_floating_point() or (y.ndim == 1 and y.dtype != torch.long):
        raise InputError(f"expected labels as whole numbers (int64), got {y.dtype}")
    seen = y[torch.cat((train, val))]
    least, most = int(seen.min()), int(seen.max())
    if y.ndim == 2:
        if least < 0 or most > 1:
            raise InputError(f"expected label sets of zeros and ones, got {least if least < 0 else most}")
        return y.shape[1]
    if least < 0:
        raise InputError(f"expected a label for every vertex of train and val, got {least}")
    return most + 1


def check_width(logits: Tensor, needed: int) -> None:
    """Raise `InputError` where a model's outputs (N x C) are fewer than the classes that the labels need."""
    if logits.ndim != 2 or logits.shape[1] < needed:
        got = f"{tuple(logits.shape)} for labels of {needed} classes"
        raise InputError(f"expected logits N x C with a column for each class, got {got}")


def check_disjoint(parts: dict[str, Tensor]) -> None:
    """Raise `InputError` where two index sets share a vertex, or one lists a vertex twice."""
    owner: dict[int, str] = {}
    for name, index in parts.items():
        for vertex in index.tolist():
            if vertex in owner:
                raise InputError(f"expected disjoint vertex sets, got vertex {vertex} in {owner[vertex]} and {name}")
            owner[vertex] = name
