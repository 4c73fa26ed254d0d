"""L_OP over ranks: two ranks of half the batch take the step of one rank of the whole."""

from __future__ import annotations

import pytest
import torch
import workers

from isotone.opgfn import distributed
from isotone.shared.testing import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(workers.both, 2)


@pytest.mark.parametrize("mode", ["pareto", "pairwise", "rank"])
def test_two_halves_are_the_whole(mode: str, ranks: list[dict]) -> None:
    expected = workers.gradient(mode, *workers.batch()).tolist()
    assert max(map(abs, expected)) > 1e-3
    for found in ranks:
        assert found[mode] == pytest.approx(expected, abs=1e-12)
    # labels within each half alone are another loss
    features, weights, u = workers.batch()
    halves = [workers.gradient(mode, features[rows], weights, u[rows]) for rows in (slice(4), slice(4, 8))]
    assert not torch.allclose((halves[0] + halves[1]) / 2, torch.tensor(expected, dtype=torch.float64), atol=1e-3)


def test_ranks_train_in_step_on_their_own_samples(ranks: list[dict]) -> None:
    assert ranks[0]["weights"] == ranks[1]["weights"] and ranks[0]["replayed"] == ranks[1]["replayed"]
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    assert ranks[0]["buffer"] == ranks[1]["buffer"] and len(ranks[0]["buffer"]) > 8, "one buffer of all objects"
    assert all("multiple of the 2 ranks" in found["odd"][0] for found in ranks)
    assert all("whole batches" in found["refused"][0] for found in ranks)


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(4)
    assert not distributed.active() and distributed.gather_log_rewards(rows) is rows
    distributed.average_gradients([torch.nn.Parameter(rows)])


@pytest.mark.parametrize("case", workers.CASES)
def test_two_ranks_take_the_step_of_one(case: str, ranks: list[dict]) -> None:
    """Trajectories of different lengths: residuals are divided by all ranks' edges, labels see all ranks' objects."""
    expected = workers.training_gradient(case, slice(16))
    assert max(map(abs, expected)) > 1e-4
    for found in ranks:
        assert found["steps"][case] == pytest.approx(expected, abs=1e-9, rel=1e-6)
