"""What a user would try first: scikit-learn's logistic regression on the labelled rows, and label spreading.

Each chooses its one setting on the same validation vertices that choose a network's epoch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from isotone.lighthgnn.dataset import Dataset
from isotone.lighthgnn.features import to_numpy
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.settings import Split

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
NEIGHBOURS = (5, 10, 20)
SPREADINGS = (0.2, 0.5, 0.9)


def logistic_regression(data: Dataset, split: Split) -> np.ndarray:
    """Predictions of all vertices by the best of `STRENGTHS` on the validation vertices."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    X, y = to_numpy(data.X), data.y.numpy()

    def fitted(strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=strength, max_iter=300).fit(X[split.train.numpy()], y[split.train.numpy()])

    return _best((fitted(strength).predict(X) for strength in STRENGTHS), y, split)


def label_spreading(data: Dataset, split: Split) -> np.ndarray:
    """Predictions by spreading labels over the features' nearest neighbours, the best number of `NEIGHBOURS`."""
    from sklearn.semi_supervised import LabelSpreading

    X, y = to_numpy(data.X), data.y.numpy()
    known = _only_training_labels(y, split)
    models = (LabelSpreading(kernel="knn", n_neighbors=k, max_iter=100) for k in NEIGHBOURS)
    return _best((_spread(model, X, known) for model in models), y, split)


def hypergraph_label_spreading(data: Dataset, split: Split) -> np.ndarray:
    """Label spreading over the hypergraph itself (H D_e^{-1} H^T as affinity), the best alpha of `SPREADINGS`.

    It sees no features and needs the hypergraph to answer: a bound of another kind.
    """
    from sklearn.semi_supervised import LabelSpreading

    y = data.y.numpy()
    affinity = _affinity(data.hypergraph)
    known = _only_training_labels(y, split)
    ids = np.arange(len(y))[:, None]
    models = (LabelSpreading(kernel=lambda a, b=None: affinity, alpha=a, max_iter=100) for a in SPREADINGS)
    return _best((_spread(model, ids, known) for model in models), y, split)


def _affinity(hypergraph: Hypergraph) -> Any:
    incidence = hypergraph.into_edges.to_scipy()
    scaled = incidence.multiply(1 / hypergraph.edge_size.numpy()[:, None]).tocsr()
    return (incidence.T @ scaled).tocsr()


def _spread(model: Any, X: Any, known: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a vertex that no label reaches divides by zero inside
        model.fit(X, known)
    return model.transduction_


def _only_training_labels(y: np.ndarray, split: Split) -> np.ndarray:
    known = np.full(len(y), -1)
    known[split.train.numpy()] = y[split.train.numpy()]
    return known


def _best(predictions: Any, y: np.ndarray, split: Split) -> np.ndarray:
    val = split.val.numpy()
    return max(predictions, key=lambda p: float((p[val] == y[val]).mean()))
