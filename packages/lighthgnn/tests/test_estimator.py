"""The scikit-learn estimator."""

import numpy as np
import pytest
import torch
from problem import MADE, SPLIT, same
from torch import nn

from isotone.lighthgnn import (
    Hypergraph,
    LightHGNN,
    LightHGNNClassifier,
)
from isotone.shared.errors import InputError


def test_estimator_takes_any_labels_and_new_rows():
    names = np.array(["ape", "bee", "cat"])[MADE.y.numpy()]
    model = LightHGNN(epochs=60, teacher_hidden=8, student_hidden=16)
    test = SPLIT.test.numpy()
    model.fit(MADE.X.numpy(), MADE.hypergraph.edges(), names, SPLIT.train.numpy(), SPLIT.val.numpy())
    assert model.predict(MADE.X[:2]).dtype.kind == "U" and model.score(MADE.X[test], names[test]) > 0.6
    assert model.rho_.shape == (model.hypergraph_.num_edges,)
    hidden = np.full(240, -1)
    hidden[SPLIT.train] = MADE.y[SPLIT.train]
    other = LightHGNNClassifier(plus=False, epochs=5).fit(MADE.X, hidden, MADE.hypergraph)
    assert other.predict_proba(MADE.X).shape == (240, 3) and other.rho_ is None
    assert other.get_params()["plus"] is False

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, X, hypergraph):
            return hypergraph.smooth(self.linear(X))

    LightHGNN(Mine(), epochs=5).fit(MADE.X, MADE.hypergraph, hidden)


def test_labels_outside_the_given_rows_are_not_looked_at():
    wrong = MADE.y.clone()
    wrong[SPLIT.test] = (wrong[SPLIT.test] + 1) % 3
    fitted = [
        LightHGNN(epochs=5).fit(MADE.X, MADE.hypergraph, y, SPLIT.train, SPLIT.val).student_ for y in (MADE.y, wrong)
    ]
    assert same(*fitted)


@pytest.mark.parametrize(
    "X, edges, y, options, words",
    [
        (MADE.X, [[0, 240]], MADE.y, {}, "got 240"),
        (MADE.X, MADE.hypergraph, MADE.y[:9], {}, "expected 240 labels"),
        (MADE.X, Hypergraph(5, [[0, 1]]), MADE.y, {}, "240 vertices, got 5"),
        (MADE.X, MADE.hypergraph, torch.zeros(240, dtype=torch.long), {}, "at least 2 classes"),
        (MADE.X, MADE.hypergraph, np.full(240, -1), {}, "at least one labelled"),
        (MADE.X, MADE.hypergraph, MADE.y, {"train_idx": [0, 1], "val_idx": [1]}, "vertex 1"),
        (MADE.X, MADE.hypergraph, MADE.y.float() + np.nan, {}, "NaN"),
    ],
)
def test_estimator_refuses(X, edges, y, options, words):
    with pytest.raises(InputError, match=words):
        LightHGNN(epochs=2).fit(X, edges, y, **options)
    with pytest.raises(InputError, match="hypergraph"):
        LightHGNNClassifier().fit(MADE.X, MADE.y)
