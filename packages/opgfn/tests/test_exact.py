"""Exact flows and distributions, and what training converges to (section 7, invariants 5, 6 and 8)."""

from __future__ import annotations

import math

import pytest
import torch

from isotone.opgfn import losses
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import Grid, HyperGrid, StringEnv
from isotone.opgfn.exact import StateGraph, entropy, mass_on, reward_distribution
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.policies import Policy, PolicyOutput
from isotone.opgfn.rollout import Trajectories
from isotone.opgfn.scoring import edge_flows, evaluate


class Table(Policy):
    """A policy that is a table: one row of numbers a state."""

    def __init__(self, graph: StateGraph, logits, backward=None, flow=None, inter=None) -> None:
        super().__init__()
        self.graph = graph
        self.logits = torch.nn.Parameter(logits)
        self.backward = None if backward is None else torch.nn.Parameter(backward)
        self.flow = None if flow is None else torch.nn.Parameter(flow)
        self.inter = None if inter is None else torch.nn.Parameter(inter)

    def forward(self, states, condition=None) -> PolicyOutput:
        i = self.graph.index(states)
        rest = (None if head is None else head[i] for head in (self.backward, self.flow, self.inter))
        return PolicyOutput(self.logits[i], *rest)


def problem(seed: int = 0) -> tuple[StateGraph, torch.Tensor]:
    graph = StateGraph(Grid(2, 5))
    log_reward = torch.randn(len(graph), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return graph, log_reward


@pytest.mark.parametrize("learned", [False, True])
def test_exact_flows_make_every_loss_zero(learned: bool) -> None:
    """Invariant 6, and that the exact policy's distribution is R / Z."""
    graph, log_reward = problem()
    generator = torch.Generator().manual_seed(1)
    back = torch.randn(graph.backward_mask.shape, dtype=torch.float64, generator=generator) if learned else None
    flow, edges = graph.exact_flows(log_reward, back)
    logits = torch.where(graph.forward_mask, edges, 0.0)
    log_z = torch.logsumexp(log_reward, 0)
    assert flow[0].item() == pytest.approx(log_z.item(), abs=1e-12)
    distribution = graph.terminal_distribution(logits)
    assert torch.allclose(distribution, reward_distribution(graph, log_reward), atol=1e-14)
    policy = Table(graph, logits, back, flow)
    batch = graph.sample_forward(logits, 64, epsilon=0.5, generator=generator)
    target = log_reward[graph.index(batch.terminals())]
    for shared in (graph, None):
        evaluation = evaluate(graph.env, policy, batch, None, shared)
        scores = evaluation.scores()
        found = [
            losses.tb_loss(scores, log_z, target),
            losses.db_loss(scores, target),
            losses.subtb_loss(scores, target),
            losses.fm_loss(*edge_flows(evaluation, policy), target),
        ]
        assert all(loss.item() < 1e-10 for loss in found)
        # and away from the exact flows none of them is
        with torch.no_grad():
            policy.logits[0, 0] += 0.5
        evaluation = evaluate(graph.env, policy, batch, None, shared)
        scores = evaluation.scores()
        assert losses.tb_loss(scores, log_z, target) > 1e-3 and losses.db_loss(scores, target) > 1e-3
        with torch.no_grad():
            policy.logits[0, 0] -= 0.5


def test_flow_matching_is_the_same_by_table_and_by_steps() -> None:
    graph, log_reward = problem()
    policy = Table(graph, torch.randn(len(graph), 3, dtype=torch.float64))
    batch = graph.sample_forward(policy.logits.detach(), 32)
    by_table = edge_flows(evaluate(graph.env, policy, batch, None, graph), policy)
    by_steps = edge_flows(evaluate(graph.env, policy, batch), policy)
    for table, steps in zip(by_table, by_steps, strict=True):
        assert torch.allclose(table, steps)


def test_distribution_is_the_monte_carlo_frequency() -> None:
    """Invariant 5, by a chi-squared test whose false-alarm rate is about 1e-6."""
    graph, _ = problem()
    logits = torch.randn(len(graph), 3, generator=torch.Generator().manual_seed(5))
    exact = graph.terminal_distribution(logits)
    assert exact.sum().item() == pytest.approx(1.0, abs=1e-12)
    n = 20_000
    drawn = graph.index(graph.sample_forward(logits, n, generator=torch.Generator().manual_seed(6)).terminals())
    counts = torch.bincount(drawn, minlength=len(graph)).double()
    common = exact * n >= 5
    statistic = ((counts - exact * n).square() / (exact * n))[common].sum().item()
    freedom = int(common.sum())
    # Wilson and Hilferty: (X / k)^(1/3) is normal with mean 1 - 2/9k and variance 2/9k
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.9


@pytest.mark.parametrize("objective", ["tb", "db", "subtb", "fm"])
def test_training_on_a_reward_reaches_its_distribution(objective: str) -> None:
    """Invariant 5: fitted to R, the exact distribution is R / Z to 1e-3 in total variation."""
    graph = StateGraph(Grid(2, 4))
    log_reward = torch.randn(len(graph), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(len(graph), dtype=torch.float64)
    policy = Table(graph, torch.zeros(len(graph), 3, dtype=torch.float64), None, flow)
    config = TrainConfig(
        objective=objective, lr=0.1, lr_log_z=0.1, batch_size=64, epsilon=0.3, lr_half_life=150, floor=1e-12
    )
    gfn = GFlowNet(graph.env, policy, config=config, graph=graph)
    gfn.fit(lambda states: log_reward[graph.index(states)].exp(), steps=700)
    target = reward_distribution(graph, log_reward)
    assert 0.5 * (gfn.terminal_distribution() - target).abs().sum() < 1e-3


def test_two_ways_to_one_object_agree_at_the_optimum_only() -> None:
    """Invariant 8."""
    graph, log_reward = problem()
    states = graph.states[torch.tensor([graph.index(torch.tensor([[2, 1]])).item()] * 64)]
    flow, edges = graph.exact_flows(log_reward)
    before = Table(graph, torch.randn(len(graph), 3, dtype=torch.float64))
    after = Table(graph, torch.where(graph.forward_mask, edges, 0.0))
    batch = graph.sample_backward(graph.index(states), generator=torch.Generator().manual_seed(0))
    assert len(torch.unique(batch.actions, dim=0)) == 3, "three ways to (2, 1)"
    for policy, same in ((before, False), (after, True)):
        gfn = GFlowNet(graph.env, policy, objective="tb", graph=graph)
        r = gfn.learned_log_reward(batch)
        assert (r.max() - r.min() < 1e-10).item() is same


def test_learned_reward_is_the_flow_into_the_sink() -> None:
    graph, log_reward = problem()
    flow, edges = graph.exact_flows(log_reward)
    logits = torch.where(graph.forward_mask, edges, 0.0)
    batch = graph.sample_forward(logits, 32)
    truth = log_reward[graph.index(batch.terminals())]
    for objective in ("db", "subtb", "op-db", "fm", "op-fm"):
        gfn = GFlowNet(graph.env, Table(graph, logits.clone(), None, flow.clone()), objective, graph=graph)
        assert torch.allclose(gfn.learned_log_reward(batch), truth)
    half = flow / 2
    gfn = GFlowNet(graph.env, Table(graph, logits.clone(), None, half, flow - half), "op-fl-subtb", graph=graph)
    assert torch.allclose(gfn.learned_log_reward(batch), truth)


def test_entropy_and_mass() -> None:
    graph = StateGraph(HyperGrid(2, 8))
    uniform = torch.full((64,), 1 / 64, dtype=torch.float64)
    assert entropy(uniform) == pytest.approx(math.log(64))
    assert mass_on(uniform, graph.env.objective(graph.states)[:, 0] > 1) == pytest.approx(4 / 64)


def test_a_trajectory_batch_without_ids_is_found_in_the_table() -> None:
    graph = StateGraph(StringEnv("ab", 3))
    policy = Table(graph, torch.randn(len(graph), graph.env.num_actions))
    batch = graph.sample_forward(policy.logits.detach(), 8)
    bare = Trajectories(batch.states, batch.actions, batch.backward_actions, batch.lengths)
    with_ids, without = (evaluate(graph.env, policy, b, None, graph).scores() for b in (batch, bare))
    assert torch.equal(with_ids.log_pf, without.log_pf) and torch.equal(with_ids.log_pb, without.log_pb)
