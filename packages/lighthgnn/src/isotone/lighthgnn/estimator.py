"""LightHGNN as a scikit-learn estimator: fit on a hypergraph, predict from rows of features alone."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from isotone.lighthgnn.distill import DistillConfig, distill, train_teacher
from isotone.lighthgnn.features import as_features
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import check_label_sets, is_known
from isotone.lighthgnn.reliability import reliable_hyperedge_scores
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.teachers import calibrated_temperature, make_teacher, predict_proba
from isotone.lighthgnn.training import TrainConfig, seeded
from isotone.shared.errors import InputError


class LightHGNN(ClassifierMixin, BaseEstimator):
    """A teacher is trained on the hypergraph, a student MLP is distilled from it, the hypergraph is let go.

    `fit(X, hyperedges, y)` then `predict(X_new)`. `teacher`: a name of `TEACHERS`, or a module that is called with
    (X, hypergraph) and gives logits, trained here in place. `plus`: LightHGNN+. Other parameters as in
    `DistillConfig`, `TrainConfig` and `reliable_hyperedge_scores`; `calibrate_teacher`: scores at the temperature that
    fits the teacher to the validation labels. `val_share`: the share of each class's labels
    that is held out to choose the epoch, where `val_idx` is not given.

    After fitting: `classes_`, `student_` (a `LightMLP`), `teacher_`, `rho_` (a score for each of `hypergraph_`'s
    hyperedges), `teacher_history_`, `student_history_`.
    """

    def __init__(
        self,
        teacher: Any = "hgnn",
        plus: bool = True,
        *,
        lam: float = 0.0,
        tau: float = 1.0,
        target: str = "mean_prob",
        kd_loss: str = "kl",
        sampling: str = "reliability",
        noise: str = "multiplicative",
        noise_level: float = 1.0,
        noise_samples: int = 5,
        normalize_scores: str = "max",
        change: str = "mean",
        calibrate_teacher: bool = False,
        teacher_hidden: int = 32,
        student_hidden: int = 128,
        student_layers: int = 2,
        dropout: float = 0.5,
        batch_norm: bool = True,
        epochs: int = 200,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        batch_size: int | None = None,
        val_share: float = 0.2,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.teacher = teacher
        self.plus = plus
        self.lam = lam
        self.tau = tau
        self.target = target
        self.kd_loss = kd_loss
        self.sampling = sampling
        self.noise = noise
        self.noise_level = noise_level
        self.noise_samples = noise_samples
        self.normalize_scores = normalize_scores
        self.change = change
        self.calibrate_teacher = calibrate_teacher
        self.teacher_hidden = teacher_hidden
        self.student_hidden = student_hidden
        self.student_layers = student_layers
        self.dropout = dropout
        self.batch_norm = batch_norm
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.val_share = val_share
        self.seed = seed
        self.device = device

    def fit(self, X: Any, hyperedges: Any, y: Any, train_idx: Any = None, val_idx: Any = None) -> LightHGNN:
        """Train teacher and student on all rows of `X` (N x d; NumPy, scipy sparse or tensor).

        `hyperedges`: a `Hypergraph`, lists of rows, or (row, hyperedge) index arrays. `y`: N labels of any kind, or
        N x C zeros and ones where a row may have any number of labels; where `train_idx` is not given, -1 or None
        (a row of -1) marks the unlabelled rows. `train_idx`, `val_idx`: row numbers, or N flags. Labels outside them
        are never looked at. Raises `InputError` on bad input.
        """
        features = as_features(X).to(self.device)
        num_vertices = features.shape[0]
        train_idx = _rows(train_idx, num_vertices, "train_idx")
        val_idx = _rows(val_idx, num_vertices, "val_idx")
        self.classes_, encoded = _encode(y, num_vertices, train_idx, val_idx)
        train, val = self._split(encoded, train_idx, val_idx)
        hypergraph = hyperedges if isinstance(hyperedges, Hypergraph) else Hypergraph(num_vertices, hyperedges)
        if hypergraph.num_vertices != num_vertices:
            raise InputError(f"expected a hypergraph of {num_vertices} vertices, got {hypergraph.num_vertices}")
        hypergraph = hypergraph.add_singletons().to(self.device)
        labels = torch.from_numpy(encoded).to(self.device)
        parts = (torch.from_numpy(train).to(self.device), torch.from_numpy(val).to(self.device))
        config = self._config()
        with seeded(self.seed):
            teacher = self._make_teacher(features.shape[1], encoded.ndim == 2).to(self.device)
        self.teacher_history_ = train_teacher(teacher, features, hypergraph, labels, *parts, config.train)
        multilabel = labels.ndim == 2
        probabilities = predict_proba(teacher, features, hypergraph, multilabel)
        rho = None
        if self.plus:
            fitted = (teacher, features, hypergraph, labels, parts[1])
            temperature = calibrated_temperature(*fitted) if self.calibrate_teacher else 1.0
            rho = reliable_hyperedge_scores(
                teacher,
                features,
                hypergraph,
                noise=self.noise,
                level=self.noise_level,
                samples=self.noise_samples,
                normalize=self.normalize_scores,
                change=self.change,
                temperature=temperature,
                multilabel=multilabel,
                generator=torch.Generator().manual_seed(self.seed),
            )
        with seeded(self.seed):
            student = LightMLP(
                features.shape[1],
                self.student_hidden,
                len(self.classes_),
                layers=self.student_layers,
                dropout=self.dropout,
                batch_norm=self.batch_norm,
                multilabel=multilabel,
            ).to(self.device)
        self.student_history_ = distill(
            *(student, features, labels, *parts, config), teacher=probabilities, hypergraph=hypergraph, rho=rho
        )
        self.teacher_, self.student_, self.hypergraph_ = teacher, student, hypergraph
        self.rho_ = None if rho is None else rho.cpu().numpy()
        self.n_features_in_ = features.shape[1]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of each class, or of each label by itself, from rows of features alone."""
        return _fitted_student(self).predict_proba(X).cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, one of `classes_`; or zeros and ones (B x C) of label sets."""
        if _fitted_student(self).config["multilabel"]:
            return (self.predict_proba(X) > 0.5).astype(np.int64)
        return self.classes_[self.predict_proba(X).argmax(1)]

    def _make_teacher(self, in_channels: int, multilabel: bool) -> Any:
        if not isinstance(self.teacher, str):
            return self.teacher
        options = {"hidden": self.teacher_hidden, "dropout": self.dropout, "multilabel": multilabel}
        return make_teacher(self.teacher, in_channels, len(self.classes_), **options)

    def _config(self) -> DistillConfig:
        own = {part.name: getattr(self, part.name) for part in fields(TrainConfig) if hasattr(self, part.name)}
        names = [part.name for part in fields(DistillConfig) if part.name != "train"]
        return DistillConfig(**{name: getattr(self, name) for name in names}, train=TrainConfig(**own))

    def _split(self, y: np.ndarray, train_idx: Any, val_idx: Any) -> tuple[np.ndarray, np.ndarray]:
        train = _labelled(train_idx, y, "train_idx") if train_idx is not None else np.flatnonzero(is_known(y))
        if val_idx is not None:
            val = _labelled(val_idx, y, "val_idx")
            train = train if train_idx is not None else np.setdiff1d(train, val)
        else:
            if not 0 < self.val_share < 1:
                raise InputError(f"expected val_share between 0 and 1, got {self.val_share}")
            source = np.random.default_rng(self.seed)
            held: list[Any] = []
            groups = y[train] if y.ndim == 1 else np.zeros(len(train))  # label sets are drawn from as a whole
            for label in np.unique(groups):
                members = source.permutation(train[groups == label])
                held.append(members[: max(1, round(self.val_share * len(members)))] if len(members) > 1 else [])
            val = np.sort(np.concatenate(held)).astype(np.int64)
            train = np.setdiff1d(train, val)
        if len(train) == 0 or len(val) == 0:
            raise InputError(f"expected labelled rows to train and validate on, got {len(train)} and {len(val)}")
        if len(shared := np.intersect1d(train, val)):
            raise InputError(f"expected disjoint vertex sets, got vertex {shared[0]} in train_idx and val_idx")
        return train, val


class LightHGNNClassifier(LightHGNN):
    """`LightHGNN` with scikit-learn's order of arguments: `fit(X, y, hypergraph, train_idx, val_idx)`."""

    def fit(  # type: ignore[override]
        self, X: Any, y: Any, hypergraph: Any = None, train_idx: Any = None, val_idx: Any = None
    ) -> LightHGNNClassifier:
        """As `LightHGNN.fit`; raises `InputError` without a hypergraph."""
        if hypergraph is None:
            raise InputError("expected a hypergraph to learn from, got none")
        super().fit(X, hypergraph, y, train_idx, val_idx)
        return self


def _fitted_student(model: LightHGNN) -> LightMLP:
    """The student; scikit-learn's `NotFittedError` before `fit`."""
    check_is_fitted(model, "student_")
    return model.student_


def _encode(y: Any, num_vertices: int, train_idx: Any, val_idx: Any) -> tuple[np.ndarray, np.ndarray]:
    """The classes, and their numbers, -1 where unlabelled or not to be looked at."""
    labels = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)
    if labels.ndim == 2 and len(labels) == num_vertices:
        return np.arange(labels.shape[1]), check_label_sets(labels)
    if labels.shape != (num_vertices,):
        raise InputError(f"expected {num_vertices} labels, one a row of X, got shape {labels.shape}")
    if labels.dtype == object:
        known = np.array([label is not None and not (isinstance(label, Real) and label == -1) for label in labels])
    else:
        known = labels != -1 if labels.dtype.kind in "if" else np.ones(num_vertices, bool)
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise InputError("expected labels without NaN, got NaN or infinity")
    if train_idx is not None:
        seen = np.zeros(num_vertices, bool)
        for index in (train_idx, [] if val_idx is None else val_idx):
            seen[index] = True
        known &= seen
    if not known.any():
        raise InputError("expected at least one labelled row, got none")
    classes, numbers = _distinct(labels[known])
    if len(classes) < 2:
        raise InputError(f"expected at least 2 classes among the labelled rows, got {len(classes)}")
    encoded = np.full(num_vertices, -1, np.int64)
    encoded[known] = numbers
    return classes, encoded


def _distinct(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels there are, as they were given and in their own order, and the number of each one's label."""
    if labels.dtype != object:
        return np.unique(labels, return_inverse=True)
    if any(isinstance(label, float) and label != label for label in labels):
        raise InputError("expected labels without NaN, got NaN")
    if {type(label) for label in labels} in ({str}, {int}, {float}, {bool}):
        return np.unique(np.array(labels.tolist()), return_inverse=True)
    try:
        distinct = list(dict.fromkeys(labels))
    except TypeError:
        raise InputError("expected labels that can be compared for equality (hashable), got others") from None
    try:
        distinct.sort()
    except TypeError:  # numbers beside names
        distinct.sort(key=lambda label: (type(label).__name__, str(label)))
    number = {label: position for position, label in enumerate(distinct)}
    classes = np.empty(len(distinct), dtype=object)
    classes[:] = distinct
    return classes, np.array([number[label] for label in labels])


def _rows(index: Any, num_rows: int, name: str) -> np.ndarray | None:
    """Row numbers, ascending and each once, from row numbers or a flag for each row."""
    if index is None:
        return None
    given = np.asarray(index.cpu() if isinstance(index, torch.Tensor) else index)
    if given.dtype == bool:
        if given.shape != (num_rows,):
            raise InputError(f"expected {num_rows} flags in {name}, one a row of X, got shape {given.shape}")
        return np.flatnonzero(given)
    if given.ndim != 1 or (len(given) and not np.issubdtype(given.dtype, np.integer)):
        raise InputError(f"expected {name} as row numbers or flags, got shape {given.shape} of {given.dtype}")
    if len(given) and (given.min() < 0 or given.max() >= num_rows):
        raise InputError(f"expected {name} from 0 to {num_rows - 1}, got {given.min()} to {given.max()}")
    return np.unique(given.astype(np.int64))


def _labelled(rows: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
    if not (known := is_known(y[rows])).all():
        raise InputError(f"expected a label for every row of {name}, row {rows[~known][0]} has none")
    return rows
