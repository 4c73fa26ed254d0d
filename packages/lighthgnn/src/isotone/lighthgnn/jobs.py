"""The steps behind the command line: a run's folder holds the teacher, its split and the student beside each other."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from isotone.lighthgnn import readers
from isotone.lighthgnn.arrays import read_npy, read_npz
from isotone.lighthgnn.dataset import KNOWN, Dataset, digits_knn, known_dataset, load_dataset, make_dataset
from isotone.lighthgnn.features import Features, as_features, blend_noise, l1_normalize, take_rows
from isotone.lighthgnn.settings import Split, local_ids, observed_hypergraph
from isotone.lighthgnn.synthetic import make_synthetic
from isotone.lighthgnn.teachers import is_multilabel, predict_proba
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

BUILT_IN = ("synthetic", "digits")


def open_data(name: str, normalize: bool = False, seed: int = 0) -> Dataset:
    """A built-in set, one of `dataset.KNOWN`, or an npz file; `InputError` where it is not to be had."""
    if name == "synthetic":
        made = make_synthetic(seed=seed)
        return Dataset("synthetic", made.X, made.y, made.hypergraph)
    if name == "digits":
        return digits_knn()
    if name in KNOWN and not Path(name).exists():
        found = known_dataset(name)
        if found is None:
            raise InputError(f"expected {KNOWN[name]} in the folder that ISOTONE_DATA_DIR names, found none")
        return found
    if not Path(name).is_file():
        known = ", ".join((*BUILT_IN, *KNOWN))
        raise InputError(f"expected a data set of {known}, or an npz file, got {name!r}")
    return load_dataset(name, normalize)


def save_split(split: Split, folder: Path, **facts: Any) -> None:
    """Write split.npz, and run.json with what else the run was made with."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{part.name: getattr(split, part.name).numpy() for part in dataclasses.fields(split)})
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "split.npz", buffer.getvalue())
    atomic_write(folder / "run.json", json.dumps(facts, indent=1).encode())


def load_split(folder: Path, num_vertices: int) -> tuple[Split, dict[str, Any]]:
    """What `save_split` wrote; `InputError` where it is missing, or of another data set."""
    for name in ("split.npz", "run.json"):
        if not (folder / name).is_file():
            raise InputError(f"expected {name} in {str(folder)!r} (isotone lighthgnn train makes it), found none")
    arrays, facts = read_npz(folder / "split.npz"), read_facts(folder)
    try:
        split = Split(**{part.name: torch.from_numpy(arrays[part.name]) for part in dataclasses.fields(Split)})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"expected a run's split in {str(folder)!r}: {error}") from None
    if facts.get("num_vertices") != num_vertices:
        raise InputError(f"expected the run's own data of {facts.get('num_vertices')} vertices, got {num_vertices}")
    return split, facts


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json of a run's folder holds; `InputError` where that is no object with a seed."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected JSON in {str(path)!r}: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("seed"), int):
        raise InputError(f"expected an object with the run's seed in {str(path)!r}, got {str(facts)[:40]}")
    return facts


@dataclass(frozen=True)
class Observed:
    """What may be seen while training, renumbered."""

    X: Features
    y: Tensor
    train: Tensor
    val: Tensor
    structure: Any
    hypergraph: Any


def observe(data: Dataset, split: Split, on_graph: bool = False) -> Observed:
    """The observed part of a data set; a graph teacher on a graph data set gets the graph itself."""
    hypergraph = observed_hypergraph(data.hypergraph, split)
    graph = data.graph if on_graph and len(split.test_ind) == 0 else None
    if len(split.test_ind) == 0:
        return Observed(data.X, data.y, split.train, split.val, graph or hypergraph, hypergraph)
    ids = (local_ids(split, split.train), local_ids(split, split.val))
    seen = split.observed
    return Observed(take_rows(data.X, seen), data.y[seen], *ids, hypergraph, hypergraph)


def read_features(path: Path) -> Features:
    """Rows of features from .npy, .npz (x, or x_data ...), or .csv of numbers, a row a line."""
    if path.suffix == ".npy":
        return as_features(read_npy(path), str(path))
    if path.suffix == ".npz":
        return _features_of(read_npz(path), path)
    text = path.read_text(encoding="utf-8")
    try:
        rows = [[float(cell) for cell in row] for row in csv.reader(text.splitlines()) if row]
        return as_features(np.array(rows, dtype=np.float32), str(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"expected rows of numbers in {str(path)!r}: {error}") from None


def _features_of(arrays: dict[str, Any], path: Path) -> Features:
    if "x" in arrays:
        return as_features(arrays["x"], str(path))
    try:
        parts = tuple(arrays[f"x_{part}"] for part in ("data", "indices", "indptr"))
        return as_features(scipy.sparse.csr_matrix(parts, tuple(arrays["x_shape"])), str(path))
    except KeyError as error:
        raise InputError(f"expected the array x in {str(path)!r}, or {error} of sparse ones; found none") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"expected rows of features in {str(path)!r}: {error}") from None


def convert(source: Path, features: Path | None, labels: Path | None, normalize: bool) -> Dataset:
    """A data set from a HyperGCN folder, a Planetoid prefix, a HIF file or an edge list.

    HIF (.json) and edge lists need `features` and `labels` (a whole number a line, -1 where unknown; or, in .npy,
    N numbers or N x C zeros and ones).
    """
    if source.is_dir():
        return readers.read_hypergcn(source, normalize)
    if Path(f"{source}.allx").is_file():
        return readers.read_planetoid(source, normalize)
    if not source.is_file():
        raise InputError(f"expected a folder, a file or a Planetoid prefix, got {str(source)!r}")
    if features is None or labels is None:
        raise InputError(f"expected --features and --labels beside {source.name}, got none")
    X = read_features(features)
    if source.suffix == ".json":
        hypergraph, _ = readers.read_hif(source)
    else:
        hypergraph = readers.read_edge_list(source, X.shape[0])
    try:
        y = (
            read_npy(labels)
            if labels.suffix == ".npy"
            else np.array([int(word) for word in labels.read_text(encoding="utf-8").split()])
        )
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"expected a whole number a line in {str(labels)!r}: {error}") from None
    made = make_dataset(source.stem, X, y, hypergraph)
    return dataclasses.replace(made, X=l1_normalize(made.X)) if normalize else made


def teacher_scores(teacher: Any, data: Dataset, split: Split) -> dict[str, dict[str, float]]:
    """`scores` of a teacher: observed vertices by what was observed of the hypergraph, others by all (section 2.6)."""
    structure = data.graph if teacher.on_graph and data.graph is not None else data.hypergraph.add_singletons()
    guesses = _guesses(teacher, data.X, structure)
    found = scores(guesses, data.y, split)
    if len(split.test_ind) and len(split.test_tran):
        seen = observe(data, split, teacher.on_graph)
        guesses[split.observed] = _guesses(teacher, seen.X, seen.structure)
        found["trans"] = scores(guesses, data.y, split)["trans"]
    return found


def _guesses(teacher: Any, X: Features, structure: Any) -> Tensor:
    found = predict_proba(teacher, X, structure)
    return (found > 0.5).long() if is_multilabel(teacher) else found.argmax(1)


def scores(predictions: Tensor, y: Tensor, split: Split) -> dict[str, dict[str, float]]:
    """Accuracy, macro and micro F1 in per cent, on each part of the test set that has vertices.

    The accuracy of label sets is the share of vertices with all labels right.
    """
    from sklearn.metrics import f1_score

    found = {}
    parts = {"trans": split.test_tran}
    if len(split.test_ind):
        parts |= {"ind": split.test_ind, "prod": split.test}
    for name, ids in parts.items():
        if len(ids):
            truth, guess = y[ids].numpy(), predictions[ids].numpy()
            right = truth == guess
            found[name] = {
                "accuracy": 100 * float((right if right.ndim == 1 else right.all(1)).mean()),
                "macro_f1": 100 * float(f1_score(truth, guess, average="macro", zero_division=0)),
                "micro_f1": 100 * float(f1_score(truth, guess, average="micro", zero_division=0)),
            }
    return found


def noisy_features(data: Dataset, share: float, seed: int) -> Features:
    """The features of a robustness test: (1 - share) X + share N(0, 1)."""
    return blend_noise(data.X, share, torch.Generator().manual_seed(seed)) if share > 0 else data.X
