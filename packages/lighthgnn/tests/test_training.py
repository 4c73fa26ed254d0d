"""Trainings of teachers and students: section 7, 12 and 13, resumed runs, seeds stacked."""

import copy
import dataclasses

import pytest
import torch
from problem import (
    LONGER,
    MADE,
    QUICK,
    SPLIT,
    distilled,
    probabilities,
    same,
    small_student,
    small_teacher,
)

from isotone.lighthgnn import (
    DistillConfig,
    Hypergraph,
    LightMLP,
    SparseMatrix,
    TrainConfig,
    distill,
    make_teacher,
    predict_proba,
    reliable_hyperedge_scores,
    train_teacher,
    transductive_split,
)
from isotone.lighthgnn.features import as_features, l1_normalize
from isotone.lighthgnn.fingerprint import describe, fingerprint
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.lighthgnn.training import seeded
from isotone.shared.errors import InputError


def test_lambda_one_is_the_plain_mlp_whatever_thesmall_teacher():
    config = DistillConfig(lam=1.0, train=QUICK)
    plain, _ = distilled(config)
    for seed in (1, 2):
        soft = probabilities(240, 3, seed)
        taught, _ = distilled(
            config, teacher=soft, hypergraph=MADE.hypergraph, rho=torch.rand(MADE.hypergraph.num_edges)
        )
        assert same(plain, taught)
    changed, _ = distilled(DistillConfig(plus=False, train=QUICK), teacher=probabilities(240, 3))
    assert not same(plain, changed)


def test_distillation_learns_and_reruns_to_the_bit():
    teacher, history = small_teacher(LONGER)
    assert history.best_accuracy == max(history.accuracies)
    assert history.best_epoch == history.accuracies.index(history.best_accuracy), "the first of equals"
    soft = predict_proba(teacher, MADE.X, MADE.hypergraph)
    rho = reliable_hyperedge_scores(teacher, MADE.X, MADE.hypergraph, generator=torch.Generator().manual_seed(0))
    given = {"teacher": soft, "hypergraph": MADE.hypergraph, "rho": rho}
    state = torch.get_rng_state()
    students = {}
    for name, config in {
        "plus": DistillConfig(train=LONGER),
        "light": DistillConfig(plus=False, train=LONGER),
        "official": DistillConfig(kd_loss="official", lam=0.3, train=LONGER),
        "batches": DistillConfig(batch_size=64, lam=0.3, train=LONGER),
        "softmax": DistillConfig(target="softmax", tau=0.5, sampling="uniform", train=LONGER),
    }.items():
        students[name], done = distilled(config, **given)
        again, _ = distilled(config, **given)
        assert same(students[name], again) and done.losses[-1] < done.losses[0], name
        agreement = (students[name].predict(MADE.X)[SPLIT.test] == soft.argmax(1)[SPLIT.test]).float().mean()
        assert agreement > 0.6, name
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is not touched"
    private = Hypergraph(240, MADE.hypergraph.edges())
    kept, _ = distilled(DistillConfig(train=QUICK), teacher=soft, hypergraph=private, rho=rho)
    before = kept.predict_proba(MADE.X)
    private.into_edges.indices.zero_()  # nothing of the hypergraph is in the student
    private.out_of_edges.indices.zero_()
    assert torch.equal(copy.deepcopy(kept).predict_proba(MADE.X), before)
    deep = LightMLP(12, 16, 3, layers=4)
    distill(deep, MADE.X, MADE.y, SPLIT.train, SPLIT.val, DistillConfig(train=QUICK), **given)


def test_sparse_and_dense_features_train_alike():
    X = torch.zeros(240, 400)
    X[torch.arange(240), MADE.y * 100 + torch.randint(60, (240,))] = 1.0
    results = []
    for features in (X, as_features(X)):
        with seeded(0):
            student = LightMLP(400, 16, 3, dropout=0.0)
        distill(student, features, MADE.y, SPLIT.train, SPLIT.val, DistillConfig(lam=1.0, train=QUICK))
        results.append(student(features))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    sums = l1_normalize(as_features(X)).to_dense().sum(1)
    torch.testing.assert_close(sums, torch.ones(240))
    torch.testing.assert_close(l1_normalize(X), l1_normalize(as_features(X)).to_dense())


def test_the_best_state_is_validated_without_dropout_or_batch_statistics():
    student, history = distilled(DistillConfig(lam=1.0, train=QUICK))
    assert not student.training
    again = float((student.predict(MADE.X)[SPLIT.val] == MADE.y[SPLIT.val]).float().mean())
    assert again == history.best_accuracy


def test_a_teacher_that_is_missing_or_bad_is_refused():
    parts = (MADE.X, MADE.y, SPLIT.train, SPLIT.val, DistillConfig(train=QUICK))
    edges = MADE.hypergraph.num_edges
    whole = {"teacher": probabilities(240, 3), "hypergraph": MADE.hypergraph, "rho": torch.ones(edges)}
    for given, words in [
        ({}, "got none"),
        ({"teacher": probabilities(240, 3)}, "hypergraph and rho"),
        ({"teacher": probabilities(10, 3)}, "shape"),
        ({"teacher": torch.full((240, 3), float("nan"))}, "finite teacher"),
        ({"teacher": torch.randn(240, 3)}, "not logits"),
        ({"teacher": torch.rand(240, 3)}, "sum to 1"),
        ({**whole, "rho": torch.ones(5)}, r"rho of \d+ hyperedges, got shape \(5,\)"),
        ({**whole, "rho": torch.full((edges,), float("nan"))}, "from 0 to 1, got NaN"),
        ({**whole, "rho": torch.full((edges,), 1.5)}, "from 0 to 1"),
        ({**whole, "hypergraph": Hypergraph(5, [[0, 1]])}, "240 vertices, got 5"),
    ]:
        with pytest.raises(InputError, match=words):
            distill(small_student(), *parts, **given)
    with pytest.raises(InputError, match="finite loss"):
        distill(small_student(), *parts[:4], DistillConfig(lam=1.0, train=TrainConfig(epochs=9, lr=1e30)))


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    soft = probabilities(240, 3)
    rho = torch.rand(MADE.hypergraph.num_edges, generator=torch.Generator().manual_seed(1))
    given = {"teacher": soft, "hypergraph": MADE.hypergraph, "rho": rho}
    config = DistillConfig(train=TrainConfig(epochs=12, checkpoint_every=3))
    whole, history = distilled(config, **given)

    def stop(epoch, accuracy):
        if epoch == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(config, folder=tmp_path, on_epoch=stop, **given)
    resumed, again = distilled(config, folder=tmp_path, **given)
    assert same(whole, resumed) and again.losses == history.losses and again.best_epoch == history.best_epoch
    with pytest.raises(InputError, match="teacher"):
        distilled(config, folder=tmp_path, **{**given, "teacher": probabilities(240, 3, 9)})
    other = dataclasses.replace(config, lam=0.5)
    with pytest.raises(InputError, match="lam 0.0"):
        distilled(other, folder=tmp_path, **given)
    distilled(other, folder=tmp_path, resume=False, **given)


def _edited(tensor):
    """Two entries exchanged: the same sum and the same sum of squares."""
    changed = tensor.clone()
    changed[[0, 1]] = changed[[1, 0]]
    assert not torch.equal(changed, tensor)
    return changed


def test_a_student_of_anything_else_is_not_resumed(tmp_path):
    rho = torch.linspace(0, 1, MADE.hypergraph.num_edges)
    given = {"teacher": probabilities(240, 3), "hypergraph": MADE.hypergraph, "rho": rho}
    config = DistillConfig(train=TrainConfig(epochs=2))
    first, _ = distilled(config, folder=tmp_path, **given)
    again, _ = distilled(config, folder=tmp_path, **given)
    assert same(first, again)
    changes = {"teacher": _edited(given["teacher"]), "rho": _edited(rho), "X": _edited(MADE.X)}
    changes["hypergraph"] = Hypergraph(240, [*MADE.hypergraph.edges()[1:], [5, 6, 7]])
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"own settings: {name} "):
            distilled(config, folder=tmp_path, **{**given, name: value})
    other = small_student(dropout=0.2)
    with pytest.raises(InputError, match=r"dropout 0.5 \(now 0.2\)"):
        distill(other, MADE.X, MADE.y, SPLIT.train, SPLIT.val, config, folder=tmp_path, **given)
    plain = DistillConfig(lam=1.0, train=TrainConfig(epochs=2))
    distilled(plain, folder=tmp_path / "plain", **given)
    distilled(plain, folder=tmp_path / "plain", **{**given, **changes, "X": MADE.X})  # lambda 1: the labels alone


def test_a_teacher_of_anything_else_is_not_resumed(tmp_path):
    hg, y = MADE.hypergraph, MADE.y
    swapped = y.clone()
    a = SPLIT.train[0]
    b = SPLIT.train[y[SPLIT.train] != y[a]][0]
    swapped[a], swapped[b] = y[b], y[a]
    weighted = Hypergraph(240, hg.edges(), torch.linspace(1, 2, hg.num_edges))

    def train(made=None, X=MADE.X, structure=hg, labels=y, **options):
        teacher = made or make_teacher("hgnn", 12, 3, **{"hidden": 8, **options})
        return train_teacher(teacher, X, structure, labels, SPLIT.train, SPLIT.val, TrainConfig(2), folder=tmp_path)

    train()
    train()
    mine = torch.nn.Linear(12, 3)
    for changes, words in [
        ({"dropout": 0.1}, r"dropout 0.5 \(now 0.1\)"),
        ({"hidden": 16}, r"hidden 8 \(now 16\)"),
        ({"layers": 3}, r"layers 2 \(now 3\)"),
        ({"batch_norm": True}, "batch_norm False"),
        ({"X": _edited(MADE.X)}, "X "),
        ({"labels": swapped}, "y "),
        ({"structure": weighted}, "structure "),
        ({"made": mine}, "class HGNN"),
    ]:
        with pytest.raises(InputError, match=words):
            train(**changes)


def test_what_a_module_of_ones_own_is_made_of():
    with_dropout = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(p)) for p in (0.1, 0.2)]
    assert describe(with_dropout[0]) != describe(with_dropout[1])
    assert describe(with_dropout[0]) == describe(copy.deepcopy(with_dropout[0]))
    ones = SparseMatrix(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), None, 3)
    parts = [ones, ones.with_values(torch.ones(2)), torch.ones(2, 3), torch.ones(3, 2), None, torch.ones(())]
    assert len({fingerprint(part=part)["part"] for part in parts}) == len(parts)
    long = torch.arange(200_000)
    assert fingerprint(a=long) != fingerprint(a=_edited(long)) and fingerprint(a=long) == fingerprint(a=long.numpy())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"y": MADE.y + 5}, "8 classes|below 3, got 7"),
        ({"y": torch.full((240,), -1)}, "a label for every"),
        ({"y": MADE.y[:9]}, "240 labels"),
        ({"val": SPLIT.train}, "in train and val"),
        ({"val": torch.tensor([240])}, "got 240 to 240"),
        ({"val": torch.tensor([-1])}, "got -1"),
        ({"val": SPLIT.val[:0]}, "list of vertex ids"),
    ],
)
def test_labels_and_vertex_sets_are_checked(changes, words):
    parts = {"y": MADE.y, "train": SPLIT.train, "val": SPLIT.val, **changes}
    with pytest.raises(InputError, match=words):
        train_teacher(make_teacher("hgnn", 12, 3), MADE.X, MADE.hypergraph, **parts, config=QUICK)
    with pytest.raises(InputError, match=words):
        distill(small_student(), MADE.X, **parts, config=DistillConfig(lam=1.0, train=QUICK))
    rows = {name: parts[name].unsqueeze(0) for name in ("train", "val")}
    with pytest.raises(InputError, match=words):
        teachers = [make_teacher("hgnn", 12, 3)]
        train_teachers_together(teachers, MADE.X, MADE.hypergraph, parts["y"], **rows, config=QUICK)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"y": MADE.y.float()}, "whole numbers|y"),
        ({"val": torch.zeros(240, dtype=torch.bool)}, "list of vertex ids|val"),
    ],
)
def test_labels_and_vertex_sets_have_the_right_type(changes, words):
    """By our own sentence, or before that by the array checker where the tests run with it."""
    parts = {"y": MADE.y, "train": SPLIT.train, "val": SPLIT.val, **changes}
    with pytest.raises((InputError, TypeError), match=words):
        train_teacher(make_teacher("hgnn", 12, 3), MADE.X, MADE.hypergraph, **parts, config=QUICK)


@pytest.mark.parametrize("name", ["hgnn", "hnhn", "unigat"])
def test_seeds_trained_together_equal_seeds_trained_apart(name):
    splits = [transductive_split(MADE.y, 10, 20, seed) for seed in range(3)]
    rows = [torch.stack([getattr(split, part) for split in splits]) for part in ("train", "val")]
    config = TrainConfig(epochs=6)

    def fresh():
        with seeded(1):
            return [make_teacher(name, 12, 3, hidden=8, dropout=0.0) for _ in splits]

    together = fresh()
    best = train_teachers_together(together, MADE.X, MADE.hypergraph, MADE.y, *rows, config)
    for number, (teacher, split) in enumerate(zip(fresh(), splits, strict=True)):
        history = train_teacher(teacher, MADE.X, MADE.hypergraph, MADE.y, split.train, split.val, config)
        assert abs(history.best_accuracy - best[number].item()) < 0.02
        ours, theirs = (t(MADE.X, MADE.hypergraph) for t in (together[number], teacher))
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    with pytest.raises(InputError, match="batch norm"):
        bad = [make_teacher("hgnn", 12, 3, batch_norm=True)] * 3
        train_teachers_together(bad, MADE.X, MADE.hypergraph, MADE.y, *rows, config)
    with pytest.raises(InputError, match="3 teachers"):
        train_teachers_together(together, MADE.X, MADE.hypergraph, MADE.y, rows[0][:2], rows[1], config)
