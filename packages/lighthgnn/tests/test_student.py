"""The student: batch norm folded, dropout, calibration."""

import pytest
import torch
from problem import MADE, QUICK, distilled, small_teacher
from torch import nn

from isotone.lighthgnn import (
    CompiledStudent,
    DistillConfig,
    LightMLP,
    predict_proba,
)
from isotone.lighthgnn.features import as_features
from isotone.lighthgnn.training import seeded


def test_folding_batch_norm_and_compiling_keep_the_function():
    teacher, _ = small_teacher()
    student, _ = distilled(
        DistillConfig(plus=False, train=QUICK), teacher=predict_proba(teacher, MADE.X, MADE.hypergraph)
    )
    folded = student.fold_batchnorm()
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    torch.testing.assert_close(folded(MADE.X), student(MADE.X), rtol=1e-5, atol=1e-5)
    compiled = CompiledStudent(student)
    torch.testing.assert_close(compiled(MADE.X[:5]), student(MADE.X[:5]), rtol=1e-5, atol=1e-5)
    sparse = as_features(torch.cat((torch.eye(12), torch.zeros(300, 12))))
    torch.testing.assert_close(compiled(sparse), student(sparse), rtol=1e-5, atol=1e-5)
    for rows in (1, 5, 1):
        asked = MADE.X[:rows].clone().requires_grad_(rows == 5)
        torch.testing.assert_close(compiled(asked), student(asked).detach(), rtol=1e-5, atol=1e-5)
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
