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


def test_flags_stand_for_the_rows_they_mark():
    flags = {f"{name}_idx": torch.zeros(240, dtype=torch.bool) for name in ("train", "val")}
    flags["train_idx"][SPLIT.train], flags["val_idx"][SPLIT.val] = True, True
    numbers = {"train_idx": SPLIT.train, "val_idx": SPLIT.val.tolist()}
    for convert in (lambda flag: flag, lambda flag: flag.numpy(), lambda flag: flag.tolist()):
        given = {name: convert(flag) for name, flag in flags.items()}
        models = [LightHGNN(epochs=2).fit(MADE.X, MADE.hypergraph, MADE.y, **rows) for rows in (numbers, given)]
        assert same(models[0].student_, models[1].student_)


def test_incidences_of_torch_geometric():
    index = MADE.hypergraph.hyperedge_index
    model = LightHGNN(epochs=1).fit(MADE.X, index, MADE.y)
    assert model.hypergraph_.edges() == MADE.hypergraph.edges()


@pytest.mark.parametrize("names", [(1, 0, 7), ("b", "a", "c"), (True, False, 2), (1, "x", (2, 3)), (2.5, 1, "y")])
def test_labels_of_any_kind_come_back_as_they_were(names):
    y = np.empty(240, dtype=object)
    for row, label in enumerate(MADE.y.tolist()):
        y[row] = names[label] if row < 200 else None
    model = LightHGNN(epochs=1, teacher_hidden=8, student_hidden=16).fit(MADE.X, MADE.hypergraph, y)
    assert {(type(label), label) for label in model.classes_.tolist()} == {(type(label), label) for label in names}
    assert set(model.predict(MADE.X).tolist()) <= set(names)


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
        (MADE.X, MADE.hypergraph, np.array([np.nan, "a"] * 120, dtype=object), {}, "NaN"),
        (MADE.X, MADE.hypergraph, MADE.y, {"train_idx": [0, 999]}, "train_idx from 0 to 239, got 0 to 999"),
        (MADE.X, MADE.hypergraph, MADE.y, {"train_idx": [0, 1], "val_idx": [-1]}, "val_idx from 0 to 239, got -1"),
        (MADE.X, MADE.hypergraph, MADE.y, {"train_idx": [True, False]}, "240 flags in train_idx"),
        (MADE.X, MADE.hypergraph, MADE.y, {"train_idx": [0.5, 1.0]}, "row numbers or flags"),
    ],
)
def test_estimator_refuses(X, edges, y, options, words):
    with pytest.raises(InputError, match=words):
        LightHGNN(epochs=2).fit(X, edges, y, **options)
    with pytest.raises(InputError, match="hypergraph"):
        LightHGNNClassifier().fit(MADE.X, MADE.y)
