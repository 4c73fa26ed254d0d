"""The conditional baselines' rewards and encodings, from their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from isotone.opgfn.conditional import Goal, LogZ, Preference, thermometer


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_thermometer_fills_from_the_left() -> None:
    values = torch.tensor([[0.0, 0.5], [1.0, 0.3]], dtype=torch.float64)
    expected = [[0, 0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0.2, 0, 0]]
    assert thermometer(values, 4).tolist() == pytest.approx([pytest.approx(row) for row in expected])
    assert thermometer(torch.tensor([[6.0]]), 2, 4.0, 8.0).tolist() == [[1.0, 0.0]]


def test_preferences() -> None:
    preference = Preference(3, beta=2.0)
    raw = preference.sample(4000, generator())
    assert torch.allclose(raw[:, :3].sum(1), torch.ones(4000, dtype=torch.float64)) and (raw[:, 3] == 2).all()
    # Dirichlet(1): mean 1/3 with standard error 0.0037, six of them; false alarm 2e-9 each
    assert (raw[:, :3].mean(0) - 1 / 3).abs().max() < 6 * 0.0038
    u = torch.tensor([[0.2, 0.5, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.5, 0.25, 0.25, 2.0]], dtype=torch.float64)
    assert preference.log_reward(u, w).item() == pytest.approx(2 * math.log(0.225))
    assert preference.log_reward(0 * u, w).item() == pytest.approx(2 * math.log(1e-8))
    assert preference.dim == 48 and preference.encode(raw).shape == (4000, 48)
    ranged = Preference(2, beta=8.0, beta_low=1.0)
    betas = ranged.sample(500, generator())[:, 2]
    assert (
        1 <= betas.min() < 2 and 7 < betas.max() <= 8 and ranged.encode(ranged.sample(5, generator())).shape == (5, 48)
    )
    with pytest.raises(ValueError, match="beta above 0"):
        Preference(2, beta=0.0)


def test_goals() -> None:
    goal = Goal(2)
    raw = goal.sample(100, generator())
    assert torch.allclose(raw.norm(dim=1), torch.ones(100, dtype=torch.float64)) and (raw >= 0).all()
    assert goal.encode(raw).shape == (100, goal.dim)
    direction = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angle = math.acos(0.99)
    u = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    gamma = math.log(0.2) / math.log(0.98)
    assert goal.log_reward(u, direction).item() == pytest.approx(math.log(float(u.sum()) * 0.99**gamma))
    assert goal.log_reward(u.flip(1), direction).item() == pytest.approx(math.log(1e-30))
    at_focus = torch.tensor([[0.98 + 1e-12, math.sqrt(1 - 0.98**2)]], dtype=torch.float64)
    assert math.exp(goal.log_reward(at_focus, direction).item()) == pytest.approx(0.2 * float(at_focus.sum()), rel=1e-6)


def test_hindsight_makes_some_goals_what_was_reached() -> None:
    goal = Goal(2, hindsight=0.3)
    raw, u = goal.sample(2000, generator()), torch.tensor([[3.0, 4.0]], dtype=torch.float64).repeat(2000, 1)
    told = goal.relabel(raw, u, generator())
    changed = (told != raw).any(1)
    assert torch.allclose(told[changed], torch.tensor([0.6, 0.8], dtype=torch.float64))
    # a share of 0.3 of 2,000 has a standard error of 0.0102: six of them
    assert abs(changed.double().mean().item() - 0.3) < 0.062
    nowhere = goal.relabel(raw, 0 * u, generator())
    assert torch.equal(nowhere, raw) and Preference(2).relabel(raw, u, generator()) is raw


def test_log_z() -> None:
    plain = LogZ(initial=5.0)
    assert plain().item() == 5.0 and plain(torch.zeros(3, 2)).item() == 5.0
    conditional = LogZ(2)
    assert conditional(torch.randn(3, 2)).shape == (3,)
