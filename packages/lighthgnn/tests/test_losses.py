"""The losses of distillation: section 7, 8 to 10, and half precision."""

import pytest
import reference
import torch
from problem import EDGES, probabilities

from isotone.lighthgnn import (
    HighOrderConstraint,
    Hypergraph,
    kd_loss,
)
from isotone.shared.errors import InputError


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
