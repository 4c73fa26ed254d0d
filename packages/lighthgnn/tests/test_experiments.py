"""The arms of `reproduce`."""

import numpy as np

from isotone.lighthgnn.experiments import Recipe, graph_arms, ranking_auc


def test_ranking_auc_equals_scikit_learns():
    from sklearn.metrics import roc_auc_score

    source = np.random.default_rng(0)
    upper, lower = source.integers(6, size=40) / 5, source.integers(5, size=30) / 5
    expected = roc_auc_score(np.repeat([1, 0], [40, 30]), np.concatenate((upper, lower)))
    assert abs(ranking_auc(upper, lower) - expected) < 1e-12


def test_graph_arms_run():
    from isotone.lighthgnn.dataset import from_graph

    source = np.random.default_rng(0)
    y = source.integers(3, size=120)
    pairs = source.integers(120, size=(2, 900))
    pairs = pairs[:, y[pairs[0]] == y[pairs[1]]]
    data = from_graph("g", np.eye(3, dtype=np.float32)[y] + source.normal(size=(120, 3)), y, pairs)
    found = graph_arms(data, 0, Recipe(epochs=10, num_train=5, num_val=10, student_hidden=16))["accuracy"]
    assert {"GLNN", "reliability KD", "GCN", "LightHGNN+"} <= set(found) and found["GCN"] > 60
