"""What a GFlowNet refuses: settings, values, states, and the checkpoint of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import Grid, HyperGrid, MOOGrid, NasCell, StringEnv
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.policies import MLPPolicy
from isotone.opgfn.replay import ReplayConfig
from isotone.shared.errors import InputError

GRID = HyperGrid(2, 5)


def test_objectives_that_mean_nothing_are_refused() -> None:
    env = HyperGrid(2, 4)
    for function, words in [
        (lambda s: [float("nan")] * len(s), "nan for object 0"),
        (lambda s: [1.0], "objects, got 1"),
        (lambda s: np.ones((len(s), 2, 2)), "(batch, objectives)"),
    ]:
        with pytest.raises(ValueError) as error:
            GFlowNet(env, config=TrainConfig(batch_size=8)).fit(function, steps=1)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="no objective of its own"):
        GFlowNet(Grid(2, 4)).fit(steps=1)
    with pytest.raises(ValueError, match="partial objects"):
        GFlowNet(StringEnv("ab", 3), objective="op-fl-db").fit(lambda xs: [1.0 * x.count("a") for x in xs], steps=1)
    with pytest.raises(ValueError, match="learned P_B"):
        GFlowNet(env, MLPPolicy(env), config=TrainConfig(lambda_kl=0.1)).fit(steps=1)
    with pytest.raises(ValueError, match="condition_dim 32"):
        GFlowNet(MOOGrid(side=4), MLPPolicy(MOOGrid(side=4)), objective="pc-tb")
    with pytest.raises(ValueError, match="objectives="):
        GFlowNet(env, objective="gc-tb")
    with pytest.raises(ValueError, match="exact distributions"):
        GFlowNet(env, table=False).terminal_distribution()


@pytest.mark.parametrize(
    ("field", "value"),
    [("objective", "op-xx"), ("label", "best"), ("batch_size", 1), ("lr", float("nan")), ("epsilon", 2.0), ("ema", 1.0)]
    + [("lam", 0.0), ("clip_norm", 0.0), ("lr_half_life", 0), ("lambda_kl", -1.0), ("beta", 0.0), ("updates", 0)],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value).replace(".", r"\.")):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("mode", "x"), ("rest", "x"), ("capacity", 0), ("pareto_fraction", 2.0), ("augment_batch", 1), ("offline", 1)],
)
def test_replay_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        ReplayConfig(**{field: value})


@pytest.mark.parametrize(
    "options", [{"steps": 1.5}, {"steps": -1}, {"steps": 2, "checkpoint_every": 0}, {"steps": True}]
)
def test_fit_refuses_numbers_that_count_nothing(options: dict) -> None:
    with pytest.raises((ValueError, TypeError), match="whole number|steps|checkpoint"):
        GFlowNet(HyperGrid(2, 4), config=TrainConfig(batch_size=8)).fit(**options)


def test_forward_looking_losses_have_no_archive() -> None:
    with pytest.raises(ValueError, match="buffer"):
        TrainConfig(objective="op-fl-db", label="buffer")


@pytest.mark.parametrize(("field", "value"), [("batch_size", 8.5), ("log_z", float("nan")), ("beta_low", 2.0)])
def test_config_refuses_more(field: str, value: float) -> None:
    # TypeError from the checks of annotations, where they are on
    with pytest.raises((ValueError, TypeError), match=field):
        TrainConfig(**{field: value})


def test_another_function_is_another_run(tmp_path) -> None:
    env = HyperGrid(2, 5)
    make = lambda: GFlowNet(env, config=TrainConfig(batch_size=8))  # noqa: E731
    make().fit(lambda s: s.double().sum(1), steps=4, folder=tmp_path, checkpoint_every=2)
    make().fit(lambda s: s.double().sum(1), steps=6, folder=tmp_path, checkpoint_every=2)
    with pytest.raises(InputError, match="objective"):
        make().fit(lambda s: -s.double().sum(1), steps=8, folder=tmp_path)
    with pytest.raises(InputError, match="an order"):
        make().fit(order_fn=lambda s: np.zeros((len(s), len(s)), bool), steps=8, folder=tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GFlowNet(GRID).sample(0), "at least 1"),
        (lambda: GFlowNet(GRID).sample(3, temperature=float("inf")), "temperature"),
        (lambda: GFlowNet(GRID, device="foo"), "foo"),
        (lambda: GFlowNet(GRID, MLPPolicy(HyperGrid(2, 9))), "policy for HyperGrid"),
        (lambda: GFlowNet(GRID, objective="op-fl-db").fit(order_fn=lambda s: s, steps=1), "comparisons"),
        (lambda: GFlowNet(GRID, config=TrainConfig(label="rank")).fit(order_fn=lambda s: s, steps=1), "comparisons"),
        (lambda: GFlowNet(GRID).observe(torch.zeros(2, 3, dtype=torch.int64)), r"\(n, 2\)"),
        (lambda: GFlowNet(GRID).observe(torch.tensor([[0, 7]])), r"\[0, 7\]"),
        (lambda: GFlowNet(MOOGrid(side=4), objective="pc-tb", objectives=3).fit(steps=1), "conditioned on"),
        (lambda: GFlowNet(MOOGrid(side=4), objective="gc-tb", objectives=3).fit(steps=1), "conditioned on"),
        (lambda: ReplayConfig("uniform", capacity=10, warmup=20), "capacity"),
        (lambda: TrainConfig(objective="op-fm", idempotent=True), "idempotent"),
    ],
)
def test_what_can_not_be_meant(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_condition_for_each_object() -> None:
    gfn = GFlowNet(MOOGrid(side=4), objective="pc-tb")
    with pytest.raises(ValueError, match="each of 3"):
        gfn.sample(3, condition=torch.tensor([[0.5, 0.5, 1.0]], dtype=torch.float64))


def test_a_run_is_told_apart_by_what_scores_it_and_by_its_environments_seed(tmp_path: Path) -> None:
    env = NasCell(3, 3)
    GFlowNet(env, objective="op-tb").fit(lambda s: s.sum(1), steps=2, folder=tmp_path)
    with pytest.raises(InputError, match="objective"):
        GFlowNet(env, objective="op-tb").fit(lambda s: [-sum(r) for r in s.tolist()], steps=3, folder=tmp_path)
    with pytest.raises(InputError, match="seed"):
        GFlowNet(NasCell(3, 3, seed=1), objective="op-tb").fit(lambda s: s.sum(1), steps=3, folder=tmp_path)
    with pytest.raises(InputError, match="steps of at least"):
        GFlowNet(env, objective="op-tb").fit(lambda s: s.sum(1), steps=1, folder=tmp_path)
