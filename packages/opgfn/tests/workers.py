"""What spawned ranks run."""

from __future__ import annotations

import torch

from isotone.opgfn import distributed
from isotone.opgfn.conditional import LogZ
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import MOOGrid
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.objective import Target, training_loss
from isotone.opgfn.order import order_preserving_loss, random_pairs
from isotone.opgfn.policies import MLPPolicy
from isotone.opgfn.replay import ReplayConfig
from isotone.opgfn.rollout import Trajectories, sample_forward
from isotone.opgfn.scoring import evaluate


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, a weight vector to learn, objectives: of the global batch."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(3, dtype=torch.float64, generator=generator)
    return features, weights, torch.randint(4, (8, 2), generator=generator).double()


def gradient(mode: str, features: torch.Tensor, weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The gradient of L_OP for r = features @ weights, over all ranks' rows."""
    leaf = torch.nn.Parameter(weights.clone())
    log_r = distributed.gather_log_rewards(features @ leaf)
    u, valid = distributed.gather_rows(u), distributed.gather_rows(torch.ones(len(features), dtype=torch.bool))
    pairs = random_pairs(len(log_r), torch.Generator().manual_seed(5)) if mode == "pairwise" else None
    order_preserving_loss(log_r, u, mode=mode, pairs=pairs, valid=valid).backward()
    distributed.average_gradients([leaf])
    return leaf.grad


CASES = {
    **{
        objective: {"objective": objective, "label": None}
        for objective in ("op-db", "op-fm", "db", "fm", "tb", "subtb")
    },
    **{f"op-tb {label}": {"objective": "op-tb", "label": label} for label in ("buffer", "rank", "all-pairs")},
    "op-tb kl": {"objective": "op-tb", "lambda_kl": 0.5},
}


def training_gradient(case: str, rows: slice) -> list[float]:
    """The gradient of one training step on some of a batch of trajectories of different lengths."""
    env = MOOGrid(side=6)
    config = TrainConfig(batch_size=16, beta=2.0, **CASES[case])
    torch.manual_seed(0)
    policy = MLPPolicy(env, (16,), flow=config.needs_flow, backward=config.lambda_kl > 0, head_scale=1.0).double()
    whole = sample_forward(
        env, lambda s, _: torch.zeros(len(s), env.num_actions), 16, generator=torch.Generator().manual_seed(1)
    )
    assert len(set(whole.lengths.tolist())) > 2 and whole.lengths[:8].sum() != whole.lengths[8:].sum()
    batch = Trajectories(*(part[rows] for part in (whole.states, whole.actions, whole.backward_actions, whole.lengths)))
    u = env.objective(batch.terminals())
    reference = torch.tensor([[0.7, 0.7], [0.2, 0.95]], dtype=torch.float64)
    target = Target(u, torch.ones(len(u), dtype=torch.bool), None, reference)
    evaluation = evaluate(env, policy, batch)
    loss = training_loss(
        config, evaluation, target, policy, LogZ(), torch.Generator(), torch.Generator().manual_seed(5)
    )
    policy.zero_grad()
    loss.backward()
    distributed.average_gradients(policy.parameters())
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).tolist()


def both(rank: int, world: int) -> dict[str, list]:
    """Every case in one spawn."""
    features, weights, u = batch()
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {mode: gradient(mode, features[rows], weights, u[rows]).tolist() for mode in ("pareto", "pairwise", "rank")}
    env = MOOGrid(side=6)
    trained = GFlowNet(env, config=TrainConfig(batch_size=16)).fit(steps=5)
    found["weights"] = torch.cat([p.detach().flatten() for p in trained.policy.parameters()]).tolist()
    found["buffer"] = trained.buffer.states[: len(trained.buffer)].tolist()
    found["drawn"] = trained.sample(8).states.tolist()
    half = slice(rank * 16 // world, (rank + 1) * 16 // world)
    found["steps"] = {case: training_gradient(case, half) for case in CASES}
    replay = ReplayConfig("prioritized", offline=8, augment=1, augment_batch=4)
    more = GFlowNet(env, config=TrainConfig(batch_size=16, label="buffer"), replay=replay).fit(steps=3)
    found["replayed"] = torch.cat([p.detach().flatten() for p in more.policy.parameters()]).tolist()
    try:
        GFlowNet(env, config=TrainConfig(batch_size=15))
    except ValueError as error:
        found["odd"] = [str(error)]
    try:
        GFlowNet(env, config=TrainConfig(objective="op-subtb", batch_size=16)).fit(steps=1)
        found["refused"] = []
    except ValueError as error:
        found["refused"] = [str(error)]
    return found
