"""Architecture search and binding strings: what is found for so many evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isotone.opgfn import evolution
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import BindingTable, NasCell
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.memo import Memo
from isotone.opgfn.metrics import top_k_mean
from isotone.opgfn.policies import MLPPolicy
from isotone.opgfn.replay import ReplayConfig


@dataclass(frozen=True)
class NasSetting:
    """Rounds of ten new cells after `initial` random ones, as the paper's, with fewer steps a round.

    `steps`: gradient steps a round, of every arm alike: with augmentation half of them are on augmented batches.
    """

    initial: int = 64
    rounds: int = 20
    proposals: int = 10
    steps: int = 60
    batch: int = 64
    width: int = 64
    task_seed: int = 0

    @property
    def budget(self) -> int:
        """Cells evaluated in all."""
        return self.initial + self.rounds * self.proposals


NAS_ARMS = ("op-tb", "op-tb-kl-aug", "tb", "tb-kl-aug", "reinforce", "evolution", "random")


def nas_arm(setting: NasSetting, arm: str, beta: float, label: str | None, seed: int) -> dict[str, Any]:
    """The truth of the cell that the noisy proxy likes best, after each number of evaluated cells."""
    env = NasCell(seed=setting.task_seed)
    generator = torch.Generator().manual_seed(seed)
    initial = _distinct(env, setting.initial, generator)
    memo = Memo(env, env.objective)
    memo(initial)
    if arm == "random":
        evolution.random_search(env, memo, setting.budget, generator)
    elif arm == "evolution":
        evolution.regularised_evolution(initial, memo, setting.budget, generator, operations=env.operations)
    else:
        _rounds(env, setting, arm, beta, label, seed, initial, memo)
    states, u, _ = memo.seen()
    truth = env.truth(torch.from_numpy(states))[:, 0].numpy()
    leader = np.array([int(u[: i + 1, 0].argmax()) for i in range(len(u))])
    found = truth[leader][: setting.budget]
    return {"incumbent": found.tolist(), "final": float(found[-1]), "evaluations": len(u)}


def _distinct(env: NasCell, n: int, generator: torch.Generator) -> torch.Tensor:
    drawn = evolution.random_objects(env, 4 * n, generator)
    _, first = np.unique(drawn.numpy(), axis=0, return_index=True)
    return drawn[np.sort(first)[:n]]


def _rounds(
    env: NasCell,
    setting: NasSetting,
    arm: str,
    beta: float,
    label: str | None,
    seed: int,
    initial: torch.Tensor,
    memo: Memo,
) -> None:
    plus = arm.endswith("-kl-aug")
    config = TrainConfig(
        objective=arm.removesuffix("-kl-aug"),
        label=label,
        beta=beta,
        lr=3e-3,
        lr_log_z=1e-1,
        batch_size=setting.batch,
        floor=0.05,
        lambda_kl=0.1 if plus else 0.0,
        seed=seed,
    )
    # reinforce has no off-policy correction: it samples, and every sample costs an evaluation
    fresh = arm == "reinforce"
    replay = ReplayConfig() if fresh else ReplayConfig("offline", augment=1 if plus else 0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = MLPPolicy(env, (setting.width, setting.width), backward=plus)
    if fresh:
        config = TrainConfig(objective=arm, lr=3e-3, batch_size=setting.proposals, entropy=0.01, seed=seed)
        gfn = GFlowNet(env, policy, config=config, table=False)
        gfn.memo = memo
        while memo.evaluations < setting.budget and gfn.step < 50 * setting.rounds:
            gfn.fit(memo.objective, gfn.step + 1)
        return
    gfn = GFlowNet(env, policy, config=config, replay=replay, table=False)
    gfn.memo = memo
    gfn.observe(initial)
    for number in range(setting.rounds):
        gfn.fit(memo.objective, (number + 1) * (setting.steps // 2 if plus else setting.steps))
        gfn.observe(_new(gfn, memo, setting.proposals, seed * 1000 + number))


def _new(gfn: GFlowNet, memo: Memo, n: int, seed: int) -> torch.Tensor:
    """n objects from the policy that were not evaluated yet; a policy that repeats itself is warmed up."""
    found: dict[bytes, torch.Tensor] = {}
    for attempt in range(12):
        drawn = gfn.sample(8 * n, temperature=1.0 + 0.5 * attempt, seed=seed + 97 * attempt)
        for row, key in zip(drawn.states, memo.env.identities(drawn.states), strict=True):
            if not memo.has(key) and len(found) < n:
                found[key] = row
        if len(found) == n:
            break
    return torch.stack(list(found.values())) if found else drawn.states[:0]


@dataclass(frozen=True)
class StringSetting:
    """TFBind-like strings of eight: fresh and prioritised batches of 32 (section 2.4, 4), until `budget` distinct
    strings are evaluated, or for `steps` steps where a sampler repeats itself."""

    budget: int = 8000
    steps: int = 1500
    batch: int = 32
    offline: int = 32
    width: int = 128
    top: int = 100


def string_arm(setting: StringSetting, objective: str, beta: float, label: str | None, seed: int) -> dict[str, Any]:
    """Top-k mean and modes among the distinct strings evaluated within the budget."""
    env = BindingTable()
    memo = Memo(env, env.objective)
    generator = torch.Generator().manual_seed(seed)
    if objective == "random":
        evolution.random_search(env, memo, setting.budget, generator, batch=256)
    else:
        config = TrainConfig(
            objective=objective,
            label=label,
            beta=beta,
            lr=1e-3,
            lr_log_z=1e-2,
            batch_size=setting.batch,
            floor=1e-3,
            seed=seed,
        )
        policy = _seeded_policy(env, setting.width, config)
        gfn = GFlowNet(
            env, policy, config=config, replay=ReplayConfig("prioritized", offline=setting.offline), table=False
        )
        gfn.memo = memo
        while memo.evaluations < setting.budget and gfn.step < setting.steps:
            gfn.fit(memo.objective, gfn.step + 1)
    states, u, _ = memo.seen()
    states, values = states[: setting.budget], u[: setting.budget, 0]
    found = set(env.objects(torch.from_numpy(states)))
    return {
        "top": top_k_mean(values, setting.top),
        "modes": len(found & env.modes),
        "of": len(env.modes),
        "evaluations": len(values),
    }


def _seeded_policy(env: BindingTable, width: int, config: TrainConfig) -> MLPPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return MLPPolicy(env, (width, width), flow=config.needs_flow)
