"""Reliability, losses, students, training and splits: section 7, 6 to 16, and the refusals named there."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from torch import nn

from isotone.lighthgnn import (
    CompiledStudent,
    DistillConfig,
    HighOrderConstraint,
    Hypergraph,
    LightHGNN,
    LightHGNNClassifier,
    LightMLP,
    TrainConfig,
    distill,
    kd_loss,
    make_synthetic,
    make_teacher,
    observed_hypergraph,
    predict_proba,
    production_split,
    reliable_hyperedge_scores,
    sample_hyperedges,
    topology_score,
    train_teacher,
    transductive_split,
)
from isotone.lighthgnn import features as feature_module
from isotone.lighthgnn.experiments import Recipe, graph_arms, ranking_auc
from isotone.lighthgnn.features import as_features, blend_noise, l1_normalize, perturb
from isotone.lighthgnn.reliability import normalize_scores, prediction_entropy
from isotone.lighthgnn.settings import Split, check_labels, local_ids
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.lighthgnn.training import seeded
from isotone.shared.errors import InputError

EDGES = [[0, 1, 2], [2, 3], [4, 5, 0, 3], [1, 5], [6]]
MADE = make_synthetic(num_vertices=240, num_edges=120, dim=12, num_classes=3, signal=0.6, seed=1)
SPLIT = transductive_split(MADE.y, 10, 20, 0)
QUICK = TrainConfig(epochs=12)
LONGER = TrainConfig(epochs=40)


def probabilities(rows, classes=4, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


# --- reliability ------------------------------------------------------------------------------------------


class _Fixed(nn.Module):
    """Gives the features themselves as logits, or a constant."""

    def __init__(self, constant=None):
        super().__init__()
        self.constant = constant

    def forward(self, X, structure):
        return X if self.constant is None else self.constant.expand(len(X), -1)


def test_scores_equal_the_reference():
    hg, X = Hypergraph(7, EDGES), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(5)
    rho = reliable_hyperedge_scores(_Fixed(), X, hg, generator=generator)
    noisy = perturb(X, "multiplicative", 1.0, torch.Generator().manual_seed(5))
    before, after = ([reference.entropy(row) for row in x.softmax(1).tolist()] for x in (X, noisy))
    torch.testing.assert_close(rho, torch.tensor(reference.reliability(before, after, EDGES)), rtol=1e-4, atol=1e-5)
    assert rho.min() == 0 and rho.max() <= 1
    order = [3, 0, 4, 2, 1]
    moved = Hypergraph(7, [EDGES[i] for i in order])
    again = reliable_hyperedge_scores(_Fixed(), X, moved, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, rho[order])


def test_more_noise_draws_average_the_change():
    hg, X = Hypergraph(7, EDGES), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def spread(samples):
        runs = [
            reliable_hyperedge_scores(_Fixed(), X, hg, samples=samples, generator=torch.Generator().manual_seed(seed))
            for seed in range(20)
        ]
        return torch.stack(runs).std(0).mean()

    assert spread(30) < 0.6 * spread(1)


@pytest.mark.parametrize("noise", ["multiplicative", "additive"])
def test_no_noise_or_a_constant_teacher_gives_one(noise):
    hg, X = Hypergraph(7, EDGES), torch.randn(7, 3)
    assert torch.equal(reliable_hyperedge_scores(_Fixed(), X, hg, noise=noise, level=0.0), torch.ones(5))
    constant = _Fixed(torch.tensor([2.0, -1.0, 0.5]))
    assert torch.equal(reliable_hyperedge_scores(constant, X, hg, noise=noise), torch.ones(5))
    sure = _Fixed(torch.tensor([500.0, -500.0, -500.0]))
    assert torch.equal(reliable_hyperedge_scores(sure, X, hg, noise=noise), torch.ones(5))


def test_entropy_of_certainty_is_zero():
    assert torch.equal(prediction_entropy(torch.eye(3)), torch.zeros(3))
    torch.testing.assert_close(prediction_entropy(torch.full((1, 4), 0.25)), torch.tensor([math.log(4)]))


def test_quantile_normalisation_is_not_ruled_by_one_hyperedge():
    delta = torch.cat((torch.linspace(0, 1, 99), torch.tensor([1000.0])))
    assert normalize_scores(delta).median() > 0.999
    assert 0.4 < normalize_scores(delta, "quantile").median() < 0.6
    assert normalize_scores(delta, "quantile").min() == 0


def test_noise():
    X = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    sparse = as_features(torch.cat((X, torch.zeros(2, 60)), 1))
    noisy = perturb(sparse, "multiplicative", 1.0).to_dense()
    assert ((noisy != 0) == (sparse.to_dense() != 0)).all(), "zeros of sparse features stay zero"
    assert (perturb(X, "additive", 1.0) != X).all()
    assert torch.equal(perturb(X, "official", 0.0), torch.zeros(2, 2)), "the authors' level scales the features"
    assert torch.equal(perturb(X, "multiplicative", 0.0), X)
    assert torch.equal(blend_noise(X, 0.0), X) and not torch.equal(blend_noise(X, 0.5), X)
    for call in (lambda: perturb(X, "none", 1.0), lambda: perturb(X, "additive", -1.0), lambda: blend_noise(X, 2.0)):
        with pytest.raises(InputError, match="expected"):
            call()


def test_sampling_frequencies():
    rho = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    generator, draws = torch.Generator().manual_seed(0), 10_000
    counts = sum(sample_hyperedges(rho, "reliability", generator).float() for _ in range(draws))
    sigma = (rho * (1 - rho) / draws).sqrt()
    assert ((counts / draws - rho).abs() <= 4 * sigma).all(), "a false alarm in 2e-4 of runs"
    uniform = sum(sample_hyperedges(rho, "uniform", generator).float() for _ in range(draws)) / draws
    assert ((uniform - 0.5).abs() < 4 * 0.5 / draws**0.5).all()
    assert sample_hyperedges(rho, "all").all() and not sample_hyperedges(torch.zeros(5), "reliability").any()
    with pytest.raises(InputError, match="sampling"):
        sample_hyperedges(rho, "none")


# --- losses -----------------------------------------------------------------------------------------------


def test_kl_and_its_gradient():
    teacher = probabilities(5).double()
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    loss = kd_loss(logits, teacher)
    rows = zip(teacher.tolist(), logits.softmax(1).tolist(), strict=True)
    assert abs(loss.item() - sum(reference.kl(p, q) for p, q in rows) / 5) < 1e-6
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, (logits.softmax(1) - teacher).detach() / 5, rtol=1e-5, atol=1e-6)
    # a central difference in float32 arithmetic
    step = torch.zeros_like(logits)
    step[2, 1] = 1e-2
    difference = (kd_loss(logits + step, teacher) - kd_loss(logits - step, teacher)) / 2e-2
    assert abs(difference.item() - grad[2, 1].item()) < 1e-4
    same = teacher.log().requires_grad_()
    zero = kd_loss(same, teacher)
    assert abs(zero.item()) < 1e-6 and torch.autograd.grad(zero, same)[0].abs().max() < 1e-6
    sure = kd_loss(torch.tensor([[90.0, -90.0]]), torch.tensor([[1.0, 0.0]]))
    assert sure.item() == 0, "0 log 0 = 0"


def test_official_term():
    teacher = probabilities(5).double()
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(kd_loss(logits, teacher, "official"), logits)
    expected = (teacher.exp().sum(1, keepdim=True) * logits.softmax(1) - teacher.exp()).detach() / 5
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.nn.functional.kl_div(logits.log_softmax(1), teacher, log_target=True, reduction="batchmean")
    assert abs(kd_loss(logits, teacher, "official").item() - theirs.item()) < 1e-6
    stationary = teacher.clone().requires_grad_()  # as logits: softmax(p^t) is the minimiser
    (grad,) = torch.autograd.grad(kd_loss(stationary, teacher, "official"), stationary)
    assert grad.abs().max() < 1e-6
    with pytest.raises(InputError, match="kd_loss"):
        kd_loss(logits, teacher, "mse")


def test_high_order_constraint_equals_the_reference_and_is_bounded_by_the_vertices():
    hg, teacher, logits = Hypergraph(7, EDGES), probabilities(7), torch.randn(7, 4)
    means, drawn = hg.v2e(teacher), torch.tensor([True, False, True, True, True])
    loss = HighOrderConstraint()(logits, means, hg, drawn)
    student = logits.softmax(1).tolist()
    assert abs(loss.item() - reference.high_order(teacher.tolist(), student, EDGES, drawn.tolist())) < 1e-5
    each = HighOrderConstraint().divergences(hg.v2e(logits.softmax(1)), means)
    vertex = torch.tensor([reference.kl(p, q) for p, q in zip(teacher.tolist(), student, strict=True)])
    for value, edge in zip(each.tolist(), EDGES, strict=True):
        assert -1e-6 < value <= vertex[edge].mean() + 1e-5, "convexity"
    assert abs(each[4].item() - vertex[6].item()) < 1e-5, "a singleton contributes the vertex's own"


@pytest.mark.parametrize("target", ["mean_prob", "softmax"])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_targets(target, tau):
    hg, teacher = Hypergraph(7, EDGES), probabilities(7)
    constraint = HighOrderConstraint(tau, target)
    means = hg.v2e(teacher)
    student = hg.v2e(probabilities(7, seed=1))
    found = constraint.divergences(student, means)

    def q(z):
        return (z ** (1 / tau)) / (z ** (1 / tau)).sum() if target == "mean_prob" else (z / tau).softmax(0)

    for value, s, t in zip(found.tolist(), student, means, strict=True):
        assert abs(value - reference.kl(q(t).tolist(), q(s).tolist())) < 1e-5
    logits = teacher.log().requires_grad_()
    loss = constraint(logits, means, hg, torch.ones(5, dtype=torch.bool))
    assert abs(loss.item()) < 1e-6 and torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["kl", "official"])
def test_no_hyperedge_drawn_is_zero(kind):
    hg, logits = Hypergraph(7, EDGES), torch.randn(7, 4, requires_grad=True)
    loss = HighOrderConstraint(kind=kind)(logits, hg.v2e(probabilities(7)), hg, torch.zeros(5, dtype=torch.bool))
    assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_half_precision_logits_give_the_losses_of_full_precision():
    hg, teacher = Hypergraph(7, EDGES), probabilities(7)
    logits = (8 * torch.randn(7, 4, generator=torch.Generator().manual_seed(2))).bfloat16()
    drawn = torch.ones(5, dtype=torch.bool)
    for given in (logits, logits.float()):
        losses = kd_loss(given, teacher), HighOrderConstraint()(given, hg.v2e(teacher), hg, drawn)
        assert all(loss.dtype == torch.float32 for loss in losses)
        torch.testing.assert_close(losses[0], kd_loss(logits.float(), teacher))
        torch.testing.assert_close(losses[1], HighOrderConstraint()(logits.float(), hg.v2e(teacher), hg, drawn))


def test_a_student_that_is_certain_and_wrong_gives_finite_losses():
    hg = Hypergraph(4, [[0, 1], [2, 3]])
    logits = torch.tensor([[400.0, -400.0]] * 4, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0]] * 4)
    loss = kd_loss(logits, teacher) + HighOrderConstraint()(logits, hg.v2e(teacher), hg, torch.ones(2).bool())
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: HighOrderConstraint(tau=0.0), "tau"),
        (lambda: HighOrderConstraint(target="x"), "target"),
        (lambda: HighOrderConstraint(kind="x"), "kd_loss"),
        (lambda: DistillConfig(lam=1.5), "1.5"),
        (lambda: DistillConfig(tau=-1.0), "-1.0"),
        (lambda: DistillConfig(batch_size=1), "batch_size"),
        (lambda: DistillConfig(sampling="x"), "sampling"),
        (lambda: TrainConfig(epochs=0), "epochs"),
        (lambda: TrainConfig(lr=float("nan")), "nan"),
        (lambda: TrainConfig(weight_decay=-1.0), "weight_decay"),
        (lambda: TrainConfig(seed=-1), "seed"),
        (lambda: LightMLP(0), "sizes"),
        (lambda: LightMLP(4, dropout=1.0), "dropout"),
        (lambda: make_teacher("gnn", 4, 2), "hgnnp"),
        (lambda: make_teacher("hgnn", 4, 2, layers=0), "layers"),
        (lambda: make_teacher("unigat", 4, 2, hidden=30), "heads"),
        (lambda: transductive_split(MADE.y, 200, 100), "at least 301"),
        (lambda: transductive_split(torch.tensor([0, 1, 5]), 1, 1, num_classes=3), "got 5"),
        (lambda: transductive_split(torch.tensor([0.5, 1.0])), "whole numbers"),
        (lambda: production_split(MADE.y, 10, 20, 1.0), "test_ind_ratio"),
        (lambda: check_labels([-1, -1]), "at least one label"),
        (lambda: Split(*(torch.tensor(i) for i in ([0, 1], [1], [2], [3]))), "vertex 1 in train and val"),
        (lambda: as_features([[1.0, float("inf")]]), "row 0"),
        (lambda: as_features([1.0, 2.0]), "N x d"),
        (lambda: as_features([["a"]]), "numbers"),
        (lambda: LightMLP(3).predict([[1.0, 2.0]]), "expected 3 features, the student's own, got 2"),
        (lambda: reliable_hyperedge_scores(_Fixed(), torch.ones(7, 2), Hypergraph(7, EDGES), samples=0), "draw"),
        (lambda: reliable_hyperedge_scores(_Fixed(), torch.ones(7, 2), Hypergraph(7, EDGES), normalize="x"), "max"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


# --- students and training --------------------------------------------------------------------------------


def _student(**options):
    with seeded(0):
        return LightMLP(12, 16, 3, **options)


def _teacher(config=QUICK):
    with seeded(0):
        teacher = make_teacher("hgnn", 12, 3, hidden=8)
    history = train_teacher(teacher, MADE.X, MADE.hypergraph, MADE.y, SPLIT.train, SPLIT.val, config)
    return teacher, history


def _distill(config, X=MADE.X, seed=0, **given):
    student = _student()
    history = distill(student, X, MADE.y, SPLIT.train, SPLIT.val, config, **given)
    return student, history


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_lambda_one_is_the_plain_mlp_whatever_the_teacher():
    config = DistillConfig(lam=1.0, train=QUICK)
    plain, _ = _distill(config)
    for seed in (1, 2):
        soft = probabilities(240, 3, seed)
        taught, _ = _distill(
            config, teacher=soft, hypergraph=MADE.hypergraph, rho=torch.rand(MADE.hypergraph.num_edges)
        )
        assert _same(plain, taught)
    changed, _ = _distill(DistillConfig(plus=False, train=QUICK), teacher=probabilities(240, 3))
    assert not _same(plain, changed)


def test_distillation_learns_and_reruns_to_the_bit():
    teacher, history = _teacher(LONGER)
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
        students[name], done = _distill(config, **given)
        again, _ = _distill(config, **given)
        assert _same(students[name], again) and done.losses[-1] < done.losses[0], name
        agreement = (students[name].predict(MADE.X)[SPLIT.test] == soft.argmax(1)[SPLIT.test]).float().mean()
        assert agreement > 0.6, name
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is not touched"
    private = Hypergraph(240, MADE.hypergraph.edges())
    kept, _ = _distill(DistillConfig(train=QUICK), teacher=soft, hypergraph=private, rho=rho)
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
    student, history = _distill(DistillConfig(lam=1.0, train=QUICK))
    assert not student.training
    again = float((student.predict(MADE.X)[SPLIT.val] == MADE.y[SPLIT.val]).float().mean())
    assert again == history.best_accuracy


def test_a_teacher_that_is_missing_or_bad_is_refused():
    parts = (MADE.X, MADE.y, SPLIT.train, SPLIT.val, DistillConfig(train=QUICK))
    for given, words in [
        ({}, "got none"),
        ({"teacher": probabilities(240, 3)}, "hypergraph and rho"),
        ({"teacher": probabilities(10, 3)}, "shape"),
        ({"teacher": torch.full((240, 3), float("nan"))}, "finite teacher"),
    ]:
        with pytest.raises(InputError, match=words):
            distill(_student(), *parts, **given)
    with pytest.raises(InputError, match="finite loss"):
        distill(_student(), *parts[:4], DistillConfig(lam=1.0, train=TrainConfig(epochs=9, lr=1e30)))


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    soft = probabilities(240, 3)
    rho = torch.rand(MADE.hypergraph.num_edges, generator=torch.Generator().manual_seed(1))
    given = {"teacher": soft, "hypergraph": MADE.hypergraph, "rho": rho}
    config = DistillConfig(train=TrainConfig(epochs=12, checkpoint_every=3))
    whole, history = _distill(config, **given)

    def stop(epoch, accuracy):
        if epoch == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _distill(config, folder=tmp_path, on_epoch=stop, **given)
    resumed, again = _distill(config, folder=tmp_path, **given)
    assert _same(whole, resumed) and again.losses == history.losses and again.best_epoch == history.best_epoch
    with pytest.raises(InputError, match="teacher"):
        _distill(config, folder=tmp_path, **{**given, "teacher": probabilities(240, 3, 9)})
    other = dataclasses.replace(config, lam=0.5)
    with pytest.raises(InputError, match="lam 0.0"):
        _distill(other, folder=tmp_path, **given)
    _distill(other, folder=tmp_path, resume=False, **given)


def test_folding_batch_norm_and_compiling_keep_the_function():
    teacher, _ = _teacher()
    student, _ = _distill(
        DistillConfig(plus=False, train=QUICK), teacher=predict_proba(teacher, MADE.X, MADE.hypergraph)
    )
    folded = student.fold_batchnorm()
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    torch.testing.assert_close(folded(MADE.X), student(MADE.X), rtol=1e-5, atol=1e-5)
    compiled = CompiledStudent(student)
    torch.testing.assert_close(compiled(MADE.X[:5]), student(MADE.X[:5]), rtol=1e-5, atol=1e-5)
    sparse = as_features(torch.cat((torch.eye(12), torch.zeros(300, 12))))
    torch.testing.assert_close(compiled(sparse), student(sparse), rtol=1e-5, atol=1e-5)
    flat = LightMLP(12, num_classes=3, layers=1).eval()
    torch.testing.assert_close(CompiledStudent(flat)(sparse), flat(sparse))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_the_students_dropout_keeps_its_share_and_the_mean(p):
    student, X = LightMLP(3, dropout=p), torch.ones(500, 401, requires_grad=True)
    with seeded(0):
        dropped = student.drop(X)
    n = X.numel()
    share = float((dropped == 0).float().mean())
    assert abs(share - p) < 4.5 * (p * (1 - p) / n) ** 0.5
    top = dropped.max().item()
    assert set(dropped.unique().tolist()) == {0.0, top} and abs(top * (1 - p) - 1) < 1e-4
    (grad,) = torch.autograd.grad(dropped.sum(), X)
    assert torch.equal(grad, dropped.detach())
    columns = (dropped == 0).float().mean(0)
    assert columns.std() < 1.2 * (p * (1 - p) / 500) ** 0.5, "no column is treated otherwise"
    student.eval()
    assert torch.equal(student.drop(X), X)


def test_calibration_finds_the_temperature():
    torch.manual_seed(0)
    student = LightMLP(4, num_classes=3, layers=1).eval()
    X = torch.randn(4000, 4) * 3
    y = torch.distributions.Categorical(logits=student(X).detach() / 2.5).sample()
    found = student.calibrate(X, y)
    assert 2.0 < found < 3.1, "drawn at 2.5"
    assert torch.equal(student.predict(X), student(X).argmax(1))


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


# --- settings ---------------------------------------------------------------------------------------------


def test_splits():
    split = transductive_split(MADE.y, 10, 20, 3)
    assert all((MADE.y[split.train] == c).sum() == 10 and (MADE.y[split.val] == c).sum() == 20 for c in range(3))
    assert len(split.train) + len(split.val) + len(split.test) == 240 and len(split.test_ind) == 0
    assert torch.equal(split.train, transductive_split(MADE.y, 10, 20, 3).train)
    assert not torch.equal(split.train, transductive_split(MADE.y, 10, 20, 4).train)
    unknown = MADE.y.clone()
    unknown[:30] = -1
    assert not set(range(30)) & set(transductive_split(unknown, 10, 20).test.tolist())
    production = production_split(MADE.y, 10, 20, 0.9, 3)
    assert len(production.test_ind) == round(0.9 * len(production.test))
    assert torch.equal(production.observed[local_ids(production, production.val)], production.val)


def test_unseen_rows_never_reach_the_parameters():
    split = production_split(MADE.y, 10, 20, 0.5)
    results = []
    for fill in (None, float("nan")):
        X = MADE.X.clone()
        if fill is not None:
            X[split.test_ind] = fill
        hg = observed_hypergraph(MADE.hypergraph, split)
        assert len(hg.isolated()) == 0 and hg.num_vertices == len(split.observed)
        seen, y = X[split.observed], MADE.y[split.observed]
        ids = (local_ids(split, split.train), local_ids(split, split.val))
        with seeded(0):
            teacher = make_teacher("hgnn", 12, 3, hidden=8)
        train_teacher(teacher, seen, hg, y, *ids, QUICK)
        rho = reliable_hyperedge_scores(teacher, seen, hg, generator=torch.Generator().manual_seed(0))
        student = _student()
        soft = predict_proba(teacher, seen, hg)
        distill(student, seen, y, *ids, DistillConfig(train=QUICK), teacher=soft, hypergraph=hg, rho=rho)
        results.append((teacher, student))
    assert _same(results[0][0], results[1][0]) and _same(results[0][1], results[1][1])


def test_topology_score():
    hg = Hypergraph(7, EDGES)
    x = torch.randn(7, 3)
    assert abs(topology_score(x, hg).item() - reference.topology(x, EDGES)) < 1e-5
    torch.testing.assert_close(topology_score(3 * x, hg), 3 * topology_score(x, hg))
    torch.testing.assert_close(topology_score(3 * x, hg, True), topology_score(x, hg, True))
    assert topology_score(torch.ones(7, 2), hg) == 0


def test_planted_noise_is_known():
    made = make_synthetic(num_vertices=500, num_edges=300, noise=0.5, p_in=1.0, seed=2)
    purity = [len(set(made.y[e].tolist())) == 1 for e in made.hypergraph.edges()]
    real = made.planted & ~made.is_noise
    assert all(pure for pure, true in zip(purity, real.tolist(), strict=True) if true)
    large = torch.tensor([len(edge) > 15 for edge in made.hypergraph.edges()])
    noisy = (made.is_noise & large).tolist()
    assert any(noisy) and not any(pure for pure, noise in zip(purity, noisy, strict=True) if noise)
    assert len(made.hypergraph.isolated()) == 0 and abs(made.is_noise[made.planted].float().mean() - 0.5) < 0.15
    with pytest.raises(InputError, match="ascending"):
        make_synthetic(sizes=(5, 3))


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


# --- the estimator ----------------------------------------------------------------------------------------


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
    assert _same(*fitted)


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


def test_thresholds_of_sparsity():
    assert feature_module.SPARSE_BELOW < 0.1
    assert as_features(torch.eye(10)).shape == (10, 10) and isinstance(as_features(torch.eye(10)), torch.Tensor)
