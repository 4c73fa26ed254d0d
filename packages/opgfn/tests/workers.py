"""What spawned ranks run."""

from __future__ import annotations

import torch

from isotone.opgfn import distributed
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import MOOGrid
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.order import order_preserving_loss, random_pairs


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


def both(rank: int, world: int) -> dict[str, list]:
    """Every case in one spawn."""
    features, weights, u = batch()
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {mode: gradient(mode, features[rows], weights, u[rows]).tolist() for mode in ("pareto", "pairwise", "rank")}
    env = MOOGrid(side=6)
    trained = GFlowNet(env, config=TrainConfig(batch_size=16)).fit(steps=5)
    found["weights"] = torch.cat([p.detach().flatten() for p in trained.policy.parameters()]).tolist()
    found["first"] = trained.buffer.states[:3].tolist()
    try:
        GFlowNet(env, config=TrainConfig(objective="op-subtb", batch_size=16)).fit(steps=1)
        found["refused"] = []
    except ValueError as error:
        found["refused"] = [str(error)]
    return found
