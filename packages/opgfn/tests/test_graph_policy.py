"""The graph transformer: it sees trees, not the order of their nodes; symmetric actions; training on molecules."""

from __future__ import annotations

import pytest
import torch

from isotone.opgfn.chem import vocabulary
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import FragmentEnv
from isotone.opgfn.gflownet import GFlowNet, default_policy
from isotone.opgfn.policies import GraphPolicy
from isotone.opgfn.replay import ReplayConfig
from isotone.opgfn.rollout import sample_forward
from isotone.opgfn.scoring import evaluate

ENV = FragmentEnv(max_fragments=5)


def partial_states(n: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    batch = sample_forward(
        ENV, lambda s, _: torch.randn(len(s), ENV.num_actions, generator=generator) - 4.0 * stop_row(), n
    )
    return batch.states[batch.mask]


def stop_row() -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ENV.stop), ENV.num_actions).float()


def renumbered(row: list[int], seed: int) -> tuple[list[int], dict[int, int]]:
    """The same tree grown from another root in another order; and each old node's new number."""
    n = ENV.n
    size = sum(value < ENV.v for value in row[:n])
    near = {i: {} for i in range(size)}
    for j in range(1, size):
        i, upper, lower = row[n + j], row[2 * n + j], row[3 * n + j]
        near[i][j], near[j][i] = (upper, lower), (lower, upper)
    generator = torch.Generator().manual_seed(seed)
    order, edge = [int(torch.randint(max(size, 1), (1,), generator=generator))][:size], {}
    while len(order) < size:
        ways = [(i, j) for i in order for j in near[i] if j not in order]
        i, j = ways[int(torch.randint(len(ways), (1,), generator=generator))]
        order.append(j)
        edge[j] = (order.index(i), *near[i][j])
    rest = n - size
    parts = [
        [row[i] for i in order] + [ENV.v] * rest,
        [edge[i][0] if i in edge else n for i in order] + [n] * rest,
        [edge[i][1] if i in edge else ENV.k for i in order] + [ENV.k] * rest,
        [edge[i][2] if i in edge else ENV.k for i in order] + [ENV.k] * rest,
    ]
    return sum(parts, []), {old: new for new, old in enumerate(order)}


def test_isomorphic_trees_get_the_same_distribution() -> None:
    """Each child, as a class, has the same probability however the state's nodes are numbered."""
    policy = GraphPolicy(ENV, 32, 2, backward=True, flow=True, inter=True).double()
    states = partial_states()
    others = torch.tensor([renumbered(row, 7)[0] for row in states.tolist()])
    assert (ENV.keys(states) == ENV.keys(others)).all() and (states != others).any(1).sum() > 20
    ours, theirs = policy(states), policy(others)
    assert torch.allclose(ours.log_flow, theirs.log_flow) and torch.allclose(ours.log_inter, theirs.log_inter)
    for (a, mask_a, orbit_a), (b, mask_b, orbit_b) in [
        (
            (ours.logits, ENV.forward_mask(states), ENV.orbits(states)),
            (theirs.logits, ENV.forward_mask(others), ENV.orbits(others)),
        ),
        (
            (ours.backward_logits, ENV.backward_mask(states), ENV.backward_orbits(states)),
            (theirs.backward_logits, ENV.backward_mask(others), ENV.backward_orbits(others)),
        ),
    ]:
        for i in range(len(states)):
            one = sorted(zip(orbit_a[i, mask_a[i]].tolist(), a[i, mask_a[i]].tolist(), strict=True))
            two = sorted(zip(orbit_b[i, mask_b[i]].tolist(), b[i, mask_b[i]].tolist(), strict=True))
            assert [o for o, _ in one] == [o for o, _ in two]
            assert torch.allclose(torch.tensor([x for _, x in one]), torch.tensor([x for _, x in two]), atol=1e-9)


def test_a_tree_is_scored_alike_in_any_batch() -> None:
    policy = GraphPolicy(ENV, 32, 2, flow=True).double()
    states = partial_states(6)
    whole = policy(states).logits.masked_fill(~ENV.forward_mask(states), 0)
    for i, row in enumerate(states):
        alone = policy(row[None]).logits.masked_fill(~ENV.forward_mask(row[None]), 0)
        assert torch.allclose(alone[0], whole[i], atol=1e-9)


def test_the_network_tells_different_trees_apart() -> None:
    policy = GraphPolicy(ENV, 32, 2, flow=True).double()
    states = partial_states(60)
    keys, first = torch.unique(ENV.keys(states), return_inverse=True)
    flows = policy(states).log_flow
    assert len(torch.unique(flows.detach().round(decimals=10))) == len(keys)


def test_idempotent_scores_count_an_orbit_once() -> None:
    """Summed over classes of children, the corrected probabilities are 1; the plain ones of one action each less."""
    env = FragmentEnv(vocabulary.subset(vocabulary.full(), [0, 15, 65]), 3)
    policy = GraphPolicy(env, 16, 1)
    batch = sample_forward(env, lambda s, _: policy(s).logits, 64, generator=torch.Generator().manual_seed(0))
    evaluation = evaluate(env, policy, batch)
    plain, corrected = evaluation.scores(), evaluation.scores(idempotent=True)
    assert (corrected.log_pf >= plain.log_pf - 1e-6).all() and (corrected.log_pf > plain.log_pf + 1e-3).any()
    assert (corrected.log_pb >= plain.log_pb - 1e-6).all() and (corrected.log_pb > plain.log_pb + 1e-3).any()
    log_pf, orbits = evaluation.log_pf(), env.orbits(evaluation.rows)
    legal = evaluation.forward_mask
    for row in range(0, len(legal), 7):
        p = log_pf[row, legal[row]].detach().exp()
        classes = {o: p[orbits[row, legal[row]] == o].sum() for o in orbits[row, legal[row]].tolist()}
        assert abs(float(sum(classes.values())) - 1) < 1e-5


@pytest.mark.parametrize("objective", ["op-tb", "op-fl-subtb", "op-fm", "pc-tb"])
def test_molecules_train(objective: str) -> None:
    def score(smiles: list[str]) -> list[list[float]]:
        return [[text.upper().count("N") / 10, text.count("O") / 10] for text in smiles]

    env = FragmentEnv(max_fragments=3)
    config = TrainConfig(objective=objective, batch_size=12, lr=1e-3, ema=0.9, idempotent=objective == "op-tb")
    condition = 32 if objective == "pc-tb" else 0
    heads = {"flow": config.needs_flow, "inter": "fl" in objective, "condition_dim": condition}
    gfn = GFlowNet(
        env, GraphPolicy(env, 16, 1, **heads), config=config, replay=ReplayConfig("uniform", warmup=20), objectives=2
    )
    gfn.fit(score, steps=4)
    assert len(gfn.history) == 4 and torch.tensor(gfn.history).isfinite().all()
    drawn = gfn.sample(5, seed=0)
    assert len(drawn.objects) == 5 and drawn.log_reward.isfinite().all()


def test_nitrogen_is_learned_from_its_order() -> None:
    env = FragmentEnv(max_fragments=2)
    config = TrainConfig(batch_size=48, lr=5e-3)
    gfn = GFlowNet(env, GraphPolicy(env, 16, 1), config=config)

    def nitrogen(smiles: list[str]) -> list[float]:
        return [float(text.upper().count("N")) for text in smiles]

    def mean(found: list[str | None]) -> float:
        valid = [text for text in found if text]
        return sum(nitrogen(valid)) / len(valid)

    before = mean(gfn.sample(200, seed=0).objects)
    gfn.fit(nitrogen, steps=60)
    assert mean(gfn.sample(200, seed=0).objects) > before + 1


def test_default_policy_and_refusals() -> None:
    assert isinstance(default_policy(ENV, TrainConfig()), GraphPolicy)
    with pytest.raises(ValueError, match="got 10, 3, 1"):
        GraphPolicy(ENV, 10, 1, 3)
    with pytest.raises(ValueError, match="condition of 4"):
        GraphPolicy(ENV, 8, 1, condition_dim=4)(ENV.reset(1))


def test_a_repeated_state_passes_once_and_means_the_same() -> None:
    """Rows alike are merged; isomorphic trees in other rows are not."""
    env = FragmentEnv(vocabulary.subset(vocabulary.full(), [0, 15, 65]), 3)
    policy = GraphPolicy(env, 16, 1)
    batch = sample_forward(env, lambda s, _: policy(s).logits, 64, generator=torch.Generator().manual_seed(0))
    evaluation = evaluate(env, policy, batch)
    visited = batch.states[batch.mask]
    assert len(evaluation.rows) == len(torch.unique(visited, dim=0)) < len(visited)
    assert len(torch.unique(env.keys(evaluation.rows))) < len(evaluation.rows)
    assert torch.equal(evaluation.rows[evaluation.position[batch.mask]], visited)
    taken = evaluation.forward_mask[evaluation.position, batch.actions][batch.mask]
    assert taken.all()
