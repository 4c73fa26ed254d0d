"""Vertices with any number of labels: each formula is the sum over labels of its two-outcome form."""

import csv
import json

import numpy as np
import pytest
import reference
import torch
from contract import files
from problem import EDGES, MADE
from sklearn.metrics import f1_score

from isotone.lighthgnn import (
    DistillConfig,
    HighOrderConstraint,
    Hypergraph,
    LightHGNN,
    LightMLP,
    TrainConfig,
    distill,
    export_onnx,
    export_torch,
    kd_loss,
    make_teacher,
    predict_proba,
    reliable_hyperedge_scores,
    train_teacher,
    transductive_split,
)
from isotone.lighthgnn.cli import app
from isotone.lighthgnn.outputs import agreement, check_label_sets, cross_entropy, entropy
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli

# the class, and whether it is one of the first two
SETS = torch.cat((torch.eye(3)[MADE.y], (MADE.y < 2).float().unsqueeze(1)), 1).long()


def shares(rows, labels=4, seed=0):
    return torch.randn(rows, labels, generator=torch.Generator().manual_seed(seed)).sigmoid()


def both(row):
    """The two outcomes of each label."""
    return [[p, 1 - p] for p in row]


def test_kl_is_the_sum_over_labels():
    teacher, logits = shares(5).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = kd_loss(logits, teacher, multilabel=True)
    rows = zip(teacher.tolist(), logits.sigmoid().tolist(), strict=True)
    expected = sum(reference.kl(a, b) for p, q in rows for a, b in zip(both(p), both(q), strict=True)) / 5
    assert abs(loss.item() - expected) < 1e-6
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, (logits.sigmoid() - teacher).detach() / 5, rtol=1e-5, atol=1e-6)
    one = torch.randn(6, 1)
    two_classes = torch.cat((one, torch.zeros(6, 1)), 1)
    p = shares(6, 1)
    for kind in ("kl", "official"):
        as_classes = kd_loss(two_classes, torch.cat((p, 1 - p), 1), kind)
        torch.testing.assert_close(kd_loss(one, p, kind, multilabel=True), as_classes)
    sure = kd_loss(torch.tensor([[300.0, -300.0]]), torch.tensor([[1.0, 0.0]]), multilabel=True)
    assert sure.item() == 0, "0 log 0 = 0"


def test_entropy_and_cross_entropy():
    p = shares(3)
    expected = [sum(reference.entropy(pair) for pair in both(row)) for row in p.tolist()]
    torch.testing.assert_close(entropy(p, True), torch.tensor(expected))
    assert torch.equal(entropy(torch.tensor([[0.0, 1.0]]), True), torch.zeros(1))
    logits, labels = torch.randn(5, 4), (shares(5) > 0.5).long()
    hard = kd_loss(logits, labels.float(), multilabel=True)
    torch.testing.assert_close(cross_entropy(logits, labels), hard)  # the KL to certainty
    micro = f1_score(labels.numpy(), (logits > 0).numpy(), average="micro")
    assert abs(agreement(logits, labels) - micro) < 1e-6


@pytest.mark.parametrize("target", ["mean_prob", "softmax"])
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_the_constraint_is_the_sum_over_labels(target, tau):
    hg, teacher, logits = Hypergraph(7, EDGES), shares(7), torch.randn(7, 4)
    drawn = torch.tensor([True, False, True, True, True])
    loss = HighOrderConstraint(tau, target, multilabel=True)(logits, hg.v2e(teacher), hg, drawn)
    student = logits.sigmoid()
    total = torch.zeros(())
    for label in range(4):
        two = [torch.stack((p[:, label], 1 - p[:, label]), 1) for p in (teacher, student)]
        means = [hg.v2e(p) for p in two]
        each = HighOrderConstraint(tau, target).divergences(means[1], means[0])
        total = total + (each * drawn).sum() / 4
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-6)


def test_teacher_and_student_learn_label_sets(tmp_path):
    split = transductive_split(SETS, 8, 15, 0)
    assert len(split.train) == 32 and len(split.val) == 60 and len(split.test) == 148
    parts = (MADE.X, MADE.hypergraph, SETS, split.train, split.val)
    torch.manual_seed(0)
    teacher = make_teacher("hgnn", 12, 4, hidden=8, multilabel=True)
    train_teacher(teacher, *parts, TrainConfig(epochs=150))
    soft = predict_proba(teacher, MADE.X, MADE.hypergraph)
    assert (soft.sum(1) - 1).abs().max() > 0.1, "not a distribution over classes"
    rho = reliable_hyperedge_scores(teacher, MADE.X, MADE.hypergraph)
    assert rho.min() == 0 and rho.max() <= 1
    given = {"teacher": soft, "hypergraph": MADE.hypergraph, "rho": rho}
    for epochs, options in ((40, {"lam": 0.5, "batch_size": 64}), (150, {})):
        student = LightMLP(12, 16, 4, multilabel=True)
        config = DistillConfig(**options, train=TrainConfig(epochs=epochs))
        distill(student, MADE.X, SETS, split.train, split.val, config, **given)
        found = student.predict(MADE.X[split.test])
        assert f1_score(SETS[split.test].numpy(), found.numpy(), average="micro") > 0.75, "a plain MLP has 0.65"
    student.calibrate(MADE.X[split.val], SETS[split.val])
    expected = student.predict_proba(MADE.X[:5])
    program = torch.export.load(export_torch(student, tmp_path / "s.pt2")).module()
    torch.testing.assert_close(program(MADE.X[:5]), expected, rtol=1e-5, atol=1e-6)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(export_onnx(student, tmp_path / "s.onnx")))
    (answer,) = session.run(None, {"X": MADE.X[:5].numpy()})
    np.testing.assert_allclose(answer, expected.numpy(), atol=1e-5)


def test_estimator_with_label_sets():
    hidden = SETS.clone()
    hidden[60:] = -1
    model = LightHGNN(epochs=150, teacher_hidden=8, student_hidden=16, calibrate_teacher=True, change="vertices")
    model.fit(MADE.X, MADE.hypergraph, hidden)
    found = model.predict(MADE.X[60:].numpy())
    assert found.shape == (180, 4) and f1_score(SETS[60:].numpy(), found, average="micro") > 0.7


def test_commands_with_label_sets(tmp_path):
    files(tmp_path)
    data = np.load(tmp_path / "data.npz")
    lines = [np.flatnonzero(data["hyperedge_index"][1] == e) for e in range(12)]
    (tmp_path / "mine.txt").write_text("\n".join(" ".join(map(str, line)) for line in lines if len(line)))
    np.save(tmp_path / "x.npy", data["x"])
    np.save(tmp_path / "y.npy", np.stack((data["y"] == 0, data["y"] < 2), 1).astype(int))
    for argv in (
        ["convert", "mine.txt", "--features", "x.npy", "--labels", "y.npy", "--out", "c"],
        ["train", "--data", "c/mine.npz", "--out", "run", "--num-train", "3", "--num-val", "4", "--epochs", "20"],
        ["distill", "--data", "c/mine.npz", "--out", "run", "--epochs", "20", "--calibrate-teacher"],
        ["predict", "x.npy", "--out", "run"],
    ):
        done = run_cli(app, argv, tmp_path)
        assert done.code == 0, done.stderr
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").open()))
    assert rows[0] == ["row", "labels", "p0", "p1"] and set(rows[1][1].split()) <= {"0", "1"}
    scores = run_cli(app, ["evaluate", "--data", "c/mine.npz", "--out", "run", "--json"], tmp_path)
    assert json.loads(scores.stdout)["student"]["trans"]["micro_f1"] > 50


def test_bad_label_sets_are_refused():
    parts = (MADE.X, SETS, torch.arange(20), torch.arange(20, 60))
    for call, words in (
        (lambda: check_label_sets([[0, 2]]), "got 2"),
        (lambda: check_label_sets([[-1, -1]]), "at least one row"),
        (lambda: check_label_sets([["a", "b"]]), "zeros and ones"),
        (lambda: transductive_split(SETS, 30, 40), "at least 281"),
        (lambda: distill(LightMLP(12, 8, 4), *parts), "multilabel student"),
        (lambda: distill(LightMLP(12, 8, 3, multilabel=True), MADE.X, MADE.y, *parts[2:]), "multilabel student"),
        (lambda: LightHGNN().fit(MADE.X, MADE.hypergraph, SETS * 3), "got 3"),
        (
            lambda: train_teachers_together(
                [make_teacher("hgnn", 12, 4)], MADE.X, MADE.hypergraph, SETS, parts[2][None], parts[3][None]
            ),
            "one class a vertex",
        ),
        (lambda: predict_proba(make_teacher("hgnn", 12, 3), MADE.X, MADE.hypergraph, temperature=0.0), "got 0.0"),
    ):
        with pytest.raises(InputError, match=words):
            call()
