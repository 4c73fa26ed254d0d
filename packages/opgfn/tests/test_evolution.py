"""The evolutionary baselines: budgets kept, selection as pymoo's, children that are legal molecules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isotone.opgfn import evolution
from isotone.opgfn.envs import FragmentEnv, NasCell
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.memo import Memo
from isotone.opgfn.replay import ReplayConfig

ENV = FragmentEnv(max_fragments=4)


def nitrogen_and_size(smiles: list[str]) -> list[list[float]]:
    return [[text.upper().count("N") / 10, 1 - len(text) / 100] for text in smiles]


def test_selection_is_nsga2s() -> None:
    select = evolution.NSGA2(torch.Generator().manual_seed(0))
    line = np.array([[0.0, 1.0], [0.4, 0.6], [0.5, 0.5], [1.0, 0.0]])
    kept, pairs = select(np.concatenate([line, line - 1]), np.ones(8, bool), 3, 50)
    assert set(kept) == {0, 3, 2}, "the ends, then the lonelier"
    assert pairs.shape == (50, 2) and set(pairs.ravel()) <= {0, 1, 2}
    assert set(select(line, np.array([True, False, True, True]), 3, 1)[0]) == {0, 2, 3}
    kept, pairs = select(np.concatenate([line, line - 1]), np.ones(8, bool), 8, 400)
    wins = (kept[pairs] < 4).mean()
    # a member of the first front loses only to another: 3 of 4 tournaments of different members have one, and more
    assert wins > 0.7
    _, pairs = select(line, np.array([False, False, False, True]), 4, 100)
    assert np.bincount(pairs.ravel(), minlength=4).argmax() == 0, "the only valid one stands first and wins most"
    nothing, _ = select(line, np.zeros(4, bool), 2, 4)
    assert len(nothing) == 2


def test_searches_keep_their_budget() -> None:
    for search in (evolution.random_search, evolution.fragment_ga):
        memo = Memo(ENV, nitrogen_and_size)
        options = {"population": 20} if search is evolution.fragment_ga else {}
        search(ENV, memo, 130, torch.Generator().manual_seed(0), **options)
        assert memo.evaluations == 130


def test_evolution_beats_chance() -> None:
    random, bred = Memo(ENV, nitrogen_and_size), Memo(ENV, nitrogen_and_size)
    evolution.random_search(ENV, random, 400, torch.Generator().manual_seed(0))
    evolution.fragment_ga(ENV, bred, 400, torch.Generator().manual_seed(0), population=40)
    assert bred.seen()[1][-200:, 0].mean() > random.seen()[1][-200:, 0].mean()


def test_children_are_whole_and_legal() -> None:
    generator = torch.Generator().manual_seed(1)
    states = evolution.random_objects(ENV, 60, generator)
    back = evolution.mutated(ENV, states, generator)
    assert (back != states).any(1).sum() > 20 and (ENV.sizes(back) >= 1).all()
    joined = torch.stack([evolution.grafted(ENV, a, b, generator) for a, b in zip(back, states.flip(0), strict=True)])
    assert (ENV.sizes(joined) > ENV.sizes(back)).sum() > 10
    whole = evolution.completed(ENV, torch.cat([back, joined]), generator)
    assert ENV.forward_mask(whole)[:, ENV.stop].all()
    assert (ENV.sizes(whole) <= 4).all()


def test_regularised_evolution_on_cells() -> None:
    env = NasCell()
    memo = Memo(env, env.objective)
    generator = torch.Generator().manual_seed(0)
    initial = evolution.random_objects(env, 64, generator)
    evolution.regularised_evolution(initial, memo, 300, generator, operations=5)
    states, u, _ = memo.seen()
    assert memo.evaluations == 300 and u[-100:].mean() > u[:64].mean() + 0.1


def test_offline_rounds_train_on_what_was_observed() -> None:
    env = NasCell()
    gfn = GFlowNet(env, replay=ReplayConfig("offline"), table=False)
    with pytest.raises(ValueError, match="observe first"):
        gfn.fit(steps=1)
    u = gfn.observe(evolution.random_objects(env, 64, torch.Generator().manual_seed(0)))
    assert u.shape == (64, 1)
    evaluated = gfn.memo.evaluations
    gfn.fit(steps=80)
    assert gfn.memo.evaluations == evaluated, "training asks for nothing"
    drawn = env.objective(gfn.sample(200, seed=0).states).mean()
    assert drawn > u.mean()
