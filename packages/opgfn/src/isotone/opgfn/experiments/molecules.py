"""Fragments on molecular objectives at equal unique calls: the front, its hypervolume and its diversity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from isotone.opgfn import evolution
from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.conditional import conditioner_of
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import FragmentEnv
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.memo import Memo
from isotone.opgfn.metrics import (
    diverse_top_k,
    extreme_faces,
    hypervolume,
    igd_plus,
    pc_entropy,
    r2,
    tanimoto_diversity,
)
from isotone.opgfn.pareto import non_dominated_mask
from isotone.opgfn.policies import GraphPolicy
from isotone.opgfn.replay import ReplayConfig

MOLECULE_ARMS = ("op-tb", "pc-tb", "gc-tb", "genetic", "random")


@dataclass(frozen=True)
class MoleculeSetting:
    """`budget` distinct molecules may be evaluated by each arm; a GFlowNet takes at most `steps` steps to use them."""

    objectives: tuple[str, ...] = ("qed", "sa")
    max_fragments: int = 5
    budget: int = 2000
    steps: int = 400
    batch: int = 32
    channels: int = 64
    layers: int = 2
    lr: float = 1e-3
    warmup: int = 200
    samples: int = 500
    workers: int = 0


def molecule_arm(
    setting: MoleculeSetting,
    arm: str,
    beta: float,
    label: str | None,
    seed: int,
    device: str = "cpu",
    objectives: Any = None,
) -> dict[str, Any]:
    """Run one arm until its budget is used: hypervolume on the way, the front, its measures, and samples'.

    `objectives`: an `Objectives` to share between arms (its memo saves time, and counts nothing here).
    """
    env = FragmentEnv(max_fragments=setting.max_fragments)
    scorer = objectives or Objectives(setting.objectives, workers=setting.workers)
    memo = Memo(env, scorer, len(setting.objectives))
    generator = torch.Generator().manual_seed(seed)
    sampled: list[str] = []
    if arm == "random":
        evolution.random_search(env, memo, setting.budget, generator, setting.batch)
    elif arm == "genetic":
        evolution.fragment_ga(env, memo, setting.budget, generator)
    else:
        gfn = _gflownet(env, setting, arm, beta, label, seed, device)
        gfn.memo = memo
        while memo.evaluations < setting.budget and gfn.step < setting.steps:
            gfn.fit(scorer, gfn.step + 1)
        drawn = gfn.sample(setting.samples, seed=seed + 1)
        sampled = [text for text in drawn.objects if text]
    if objectives is None:
        scorer.close()
    states, u, valid = (part[: setting.budget] for part in memo.seen())
    texts = env.decode(torch.from_numpy(states))
    return summary(u, valid, texts, sampled, scorer, memo)


def _gflownet(
    env: FragmentEnv, setting: MoleculeSetting, arm: str, beta: float, label: str | None, seed: int, device: str
) -> GFlowNet:
    config = TrainConfig(
        objective=arm,
        label=label,
        beta=beta,
        lr=setting.lr,
        lr_log_z=1e-2,
        batch_size=setting.batch,
        epsilon=0.01,
        weight_decay=1e-8,
        seed=seed,
    )
    count = len(setting.objectives)
    conditioner = conditioner_of(config.kind, count, beta)
    condition = conditioner.dim if conditioner else 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = GraphPolicy(env, setting.channels, setting.layers, condition_dim=condition, autocast=device == "cuda")
    replay = ReplayConfig("uniform", warmup=setting.warmup)
    return GFlowNet(env, policy, config=config, replay=replay, objectives=count, device=device)


def _diverse(smiles: list[str], u: np.ndarray, k: int = 100) -> dict[str, float]:
    """The best k by the mean of their objectives of which no two are more alike than 0.7: their mean and diversity."""
    value = u.mean(1)
    chosen = diverse_top_k(smiles, value, k)
    return {
        "top_diverse": float(value[chosen].mean()),
        "top_diverse_diversity": tanimoto_diversity([smiles[i] for i in chosen]),
    }


def summary(
    u: np.ndarray, valid: np.ndarray, texts: Sequence[str | None], sampled: Sequence[str], scorer: Any, memo: Memo
) -> dict[str, Any]:
    """What the figures and plots are made of."""
    good = u[valid]
    front = non_dominated_mask(torch.from_numpy(good)).numpy()
    names = [str(text) for text, ok in zip(texts, valid, strict=True) if ok]
    best = {names[i]: good[i] for i in np.flatnonzero(front)}
    points = np.array(list(best.values()))
    marks = np.unique(np.linspace(1, len(u), 20).astype(int))
    curve = [hypervolume(u[:m][valid[:m]]) if valid[:m].any() else 0.0 for m in marks]
    faces = extreme_faces(u.shape[1])
    result: dict[str, Any] = {
        "hypervolume": hypervolume(points),
        "igd_plus": igd_plus(points, faces),
        "r2": r2(points),
        "diversity": tanimoto_diversity(list(best)),
        **_diverse(names, good),
        "front": points.tolist(),
        "smiles": list(best),
        "curve": [marks.tolist(), curve],
        "evaluations": len(u),
        "valid": float(valid.mean()),
        "reuse": memo.reuse,
    }
    if sampled:
        values = np.asarray(scorer(sampled))
        result["sampled_hypervolume"] = hypervolume(values)
        result["sampled_pc_entropy"] = pc_entropy(values, faces)
        result["sampled_mean"] = values.mean(0).tolist()
    return result
