"""Environments: exact masks both ways, enumeration, values (section 7, invariant 10)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from isotone.opgfn.envs import Bag, Grid, HyperGrid, MOOGrid, NasCell, StringEnv
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.pareto import non_dominated_mask
from isotone.opgfn.rollout import join, sample_backward, sample_forward

ENVS = {
    "hypergrid": lambda: HyperGrid(2, 8),
    "grid3": lambda: Grid(3, 4),
    "boundary": lambda: Grid(2, 6, boundary_stop=True),
    "bag": lambda: Bag(3, 5),
    "both ends": lambda: StringEnv("abc", 4),
    "right end": lambda: StringEnv("ab", 4, grow="right", min_length=1),
    "nas": lambda: NasCell(3, 2),
}


def graph_of(name: str) -> StateGraph:
    return StateGraph(ENVS[name]())


@pytest.mark.parametrize("name", ENVS)
def test_backward_undoes_forward_and_the_other_way(name: str) -> None:
    graph = graph_of(name)
    env, states = graph.env, graph.states
    mask = env.forward_mask(states)
    mask[:, env.stop] = False
    row, action = mask.nonzero().T
    children, undo = env.step(states[row], action)
    assert env.backward_mask(children)[torch.arange(len(row)), undo].all()
    parents, redo = env.backward_step(children, undo)
    assert (parents == states[row]).all() and (redo == action).all()
    row, action = env.backward_mask(states).nonzero().T
    parents, redo = env.backward_step(states[row], action)
    assert env.forward_mask(parents)[torch.arange(len(row)), redo].all()
    children, undo = env.step(parents, redo)
    assert (children == states[row]).all() and (undo == action).all()
    stopped, undo = env.step(states, torch.full((len(states),), env.stop))
    assert (stopped == states).all() and (undo == -1).all()


@pytest.mark.parametrize("name", ENVS)
def test_parents_are_the_states_that_point_here(name: str) -> None:
    graph = graph_of(name)
    children = graph.child[graph.child >= 0]
    pointing = torch.bincount(children, minlength=len(graph))
    assert (pointing == graph.backward_mask.sum(1)).all()
    assert (graph.parent >= 0).sum() == len(children)
    # no two actions of a state lead to the same child: an edge is one action
    for row in graph.child:
        legal = row[row >= 0].tolist()
        assert len(set(legal)) == len(legal)
    assert graph.env.is_source(graph.states).nonzero().tolist() == [[0]]
    assert graph.forward_mask.any(1).all(), "no dead ends"
    assert (graph.index(graph.states) == torch.arange(len(graph))).all()
    if graph.env.num_states is not None and name != "boundary":
        assert len(graph) == graph.env.num_states


@pytest.mark.parametrize("name", ENVS)
def test_table_and_steps_draw_the_same_trajectories(name: str) -> None:
    graph = graph_of(name)
    env = graph.env
    table = torch.randn(len(graph), env.num_actions, generator=torch.Generator().manual_seed(0))
    for epsilon, temperature in ((0.0, 1.0), (0.3, 0.5)):
        options = {"epsilon": epsilon, "temperature": temperature}
        a = graph.sample_forward(table, 50, generator=torch.Generator().manual_seed(1), **options)
        b = sample_forward(
            env, lambda s, _: table[graph.index(s)], 50, generator=torch.Generator().manual_seed(1), **options
        )
        for field in ("lengths", "actions"):
            assert (getattr(a, field) == getattr(b, field)).all()
        assert (a.states[a.mask] == b.states[b.mask]).all()
        assert (a.backward_actions[a.mask] == b.backward_actions[b.mask]).all()
    back = torch.randn(len(graph), env.num_backward_actions, generator=torch.Generator().manual_seed(2))
    ends = a.terminals()
    for learned in (None, back):
        c = graph.sample_backward(graph.index(ends), learned, generator=torch.Generator().manual_seed(3))
        logits = None if learned is None else lambda s, _, table=learned: table[graph.index(s)]
        d = sample_backward(env, ends, logits, generator=torch.Generator().manual_seed(3))
        assert (c.lengths == d.lengths).all() and (c.terminals() == ends).all()
        assert (c.actions[c.mask] == d.actions[d.mask]).all() and (c.states[c.mask] == d.states[d.mask]).all()
        assert (c.backward_actions[c.mask] == d.backward_actions[d.mask]).all()
        assert (c.lengths == graph_level(graph, ends) + 1).all()


def graph_level(graph: StateGraph, states: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.tensor(graph.levels), graph.index(states), right=True) - 1


def test_joined_batches_keep_their_trajectories() -> None:
    graph = graph_of("hypergrid")
    table = torch.zeros(len(graph), 3)
    short = graph.sample_forward(table + torch.tensor([0.0, 0.0, 5.0]), 5)
    long = graph.sample_forward(table - torch.tensor([0.0, 0.0, 5.0]), 5)
    both = join([short, long])
    assert (both.terminals() == torch.cat([short.terminals(), long.terminals()])).all()
    assert both.mask.sum() == short.mask.sum() + long.mask.sum() and both.ids is not None


@pytest.mark.parametrize("name", ENVS)
def test_no_illegal_action_in_many_steps(name: str) -> None:
    """Over all environments together at least 10^5 drawn actions, extreme logits included."""
    env = ENVS[name]()
    generator = torch.Generator().manual_seed(0)
    steps = 0
    while steps < 20_000:
        batch = sample_forward(
            env,
            lambda s, _: 30 * torch.randn(len(s), env.num_actions, generator=generator),
            2000,
            epsilon=0.1,
            generator=generator,
        )
        rows, actions = batch.states[batch.mask], batch.actions[batch.mask]
        env.check_actions(rows, actions)
        assert (batch.actions[torch.arange(len(batch)), batch.lengths - 1] == env.stop).all()
        steps += len(rows)


def test_features_are_one_hot() -> None:
    for make in ENVS.values():
        graph = StateGraph(make())
        features = graph.env.features(graph.states)
        assert (features.sum(1) == graph.env.width).all() and features.shape[1] == graph.env.num_tokens
        assert len(torch.unique(features, dim=0)) == len(graph)


def test_hypergrid_values() -> None:
    env = HyperGrid(2, 32, r0=0.1)
    states = StateGraph(env).states
    u = env.objective(states)[:, 0]
    x = states.numpy() / 31
    expected = [
        0.1 + 0.5 * all(abs(a - 0.5) > 0.25 for a in row) + 2.0 * all(0.3 < abs(a - 0.5) < 0.4 for a in row)
        for row in x
    ]
    assert np.allclose(u, expected)
    assert int((u == u.max()).sum()) == 36 and float(u.max()) == pytest.approx(2.6)
    modes = env.mode_of(states)
    assert sorted(set(modes.tolist())) == [-1, 0, 1, 2, 3] and ((modes >= 0) == (u == u.max())).all()


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        ("branin currin", 36),
        ("branin shubert", 14),
        ("branin beale", 44),
        ("currin shubert", 32),
        ("currin beale", 8),
        ("shubert beale", 22),
        ("branin currin shubert", 104),
        ("branin currin shubert beale", 373),
    ],
)
def test_moo_grid_has_the_known_pareto_cells(names: str, cells: int) -> None:
    env = MOOGrid(names.split())
    u = env.objective(StateGraph(env).states)
    assert int(non_dominated_mask(u).sum()) == cells


def test_boundary_stop_leaves_out_the_far_corner() -> None:
    graph = graph_of("boundary")
    assert len(graph) == 35
    with pytest.raises(ValueError, match=r"\[5, 5\]"):
        graph.index(torch.tensor([[5, 5]]))


def test_bag_modes() -> None:
    env = Bag()
    fillers = math.comb(7 + 6 - 1, 6)
    assert len(env.modes) <= 7 * (fillers // 4) and len(env.modes) > 6 * (fillers // 4)
    assert (env.modes.sum(1) == 13).all() and (env.modes.max(1).values >= 7).all()
    u = env.objective(torch.cat([env.modes[:3], torch.tensor([[13, 0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2, 1]])]))
    assert u[:3, 0].tolist() == [30.0] * 3 and u[3, 0] in (10.0, 30.0) and u[4, 0] == 0.01
    assert (Bag(seed=0).modes == env.modes).all() and not torch.equal(Bag(seed=1).modes, env.modes)


def test_strings_both_ways() -> None:
    env = StringEnv("ACGT", 8)
    codes = env.encode(["ACG", "AAAA", "", "ACGTACGT"])
    assert env.objects(codes) == ["ACG", "AAAA", "", "ACGTACGT"]
    assert env.backward_mask(codes).sum(1).tolist() == [2, 1, 0, 2]
    assert env.forward_mask(codes).sum(1).tolist() == [8, 7, 4, 1]
    state = env.reset(1)
    for action in (0, 1 + 4, 2):  # append A, prepend C, append G
        state, _ = env.step(state, torch.tensor([action]))
    assert env.objects(state) == ["CAG"]
    with pytest.raises(ValueError, match="'ACX'"):
        env.encode(["ACX"])


def test_number_of_paths_to_a_string() -> None:
    """A string of k tokens has 2^(k-1) growth orders, counting equal ones once where all letters are equal."""
    graph = graph_of("both ends")
    paths = torch.zeros(len(graph), dtype=torch.int64)
    paths[0] = 1
    for i in range(len(graph)):
        for child in graph.child[i][graph.child[i] >= 0].tolist():
            paths[child] += paths[i]
    found = dict(zip(graph.env.objects(graph.states), paths.tolist(), strict=True))
    assert found["aaaa"] == 1 and found["abca"] == 2**3 and found["ab"] == 2 and found["aab"] == 3


def test_nas_proxy_resembles_its_truth() -> None:
    env = NasCell()
    cells = torch.tensor(list(itertools.product(range(5), repeat=6)))
    truth, proxy = env.truth(cells)[:, 0].numpy(), env.objective(cells)[:, 0].numpy()
    assert len(cells) == 15_625 and truth.min() == 0 and truth.max() == 1
    ranks = [np.argsort(np.argsort(v)) for v in (truth, proxy)]
    assert 0.7 < np.corrcoef(*ranks)[0, 1] < 0.9, "Spearman's rho of NATS-Bench's 12 and 200 epochs is about 0.8"
    with pytest.raises(ValueError, match="empty slot"):
        env.objective(env.reset(1))


def test_environments_refuse() -> None:
    for call, words in [
        (lambda: Grid(0, 3), "got 0 and 3"),
        (lambda: HyperGrid(r0=float("nan")), "got nan"),
        (lambda: MOOGrid(["rastrigin"]), "rastrigin"),
        (lambda: Bag(0, 3), "got 0 and 3"),
        (lambda: StringEnv("aa", 3), "distinct"),
        (lambda: StringEnv("ab", 3, grow="left"), "'left'"),
        (lambda: StringEnv("ab", 0), "got 0"),
        (lambda: StringEnv("ab", 3, min_length=4), "got 4"),
        (lambda: NasCell(0), "got 0 and 5"),
        (lambda: StateGraph(Grid(2, 8), limit=20), "at most 20"),
        (lambda: Grid(2, 4).check_actions(torch.tensor([[3, 0]]), torch.tensor([0])), "got 0 in state [3, 0]"),
        (lambda: sample_forward(Grid(2, 4), lambda s, _: torch.zeros(len(s), 3), 0), "n >= 1"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)


def test_dead_ends_and_endless_walks_are_named() -> None:
    class Dead(Grid):
        def forward_mask(self, states):
            mask = super().forward_mask(states)
            mask[(states == 1).all(1)] = False
            return mask

    with pytest.raises(ValueError, match=r"\[1, 1\]: a dead end"):
        sample_forward(Dead(2, 4), lambda s, _: torch.tensor([[0.0, 0.0, -9.0]]).repeat(len(s), 1), 200)

    class Endless(Grid):
        def step(self, states, actions):
            return states, actions

    with pytest.raises(ValueError, match="at most 7 actions"):
        sample_forward(Endless(2, 4), lambda s, _: torch.tensor([[9.0, 9.0, -99.0]]).repeat(len(s), 1), 4)
    orphan = Grid(2, 4)
    orphan.backward_mask = lambda states: torch.zeros(len(states), 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="finite logits"):
        sample_forward(Grid(2, 4), lambda s, _: torch.full((len(s), 3), torch.nan), 4)
    with pytest.raises(ValueError, match="a parent of every state"):
        sample_backward(orphan, torch.tensor([[1, 1]]))
