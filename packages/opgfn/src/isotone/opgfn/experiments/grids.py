"""Grids, where everything is exact: mass on the Pareto cells, modes, entropy, and what an order does not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import HyperGrid, MOOGrid
from isotone.opgfn.exact import StateGraph, entropy, mass_on
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.metrics import gd_plus, igd_plus, pc_entropy, r2
from isotone.opgfn.pareto import non_dominated_mask
from isotone.opgfn.replay import ReplayConfig


@dataclass(frozen=True)
class MOOSetting:
    """A grid with several objectives: section 2.5's network and rates."""

    objectives: tuple[str, ...] = ("branin", "currin")
    side: int = 32
    steps: int = 300
    batch: int = 128
    samples: int = 1280
    preferences: int = 64


def moo_arm(setting: MOOSetting, objective: str, beta: float, seed: int) -> dict[str, Any]:
    """Train on a MOO grid: exact mass on the Pareto cells, cells found among samples, PC-ent, the distribution.

    The mass of a conditional sampler is the mean over `preferences` drawn ones, each exact.
    """
    env = MOOGrid(setting.objectives, setting.side)
    graph = StateGraph(env)
    u = env.objective(graph.states)
    front = non_dominated_mask(u)
    config = TrainConfig(
        objective=objective, beta=beta, lr=1e-2, lr_log_z=1e-2, weight_decay=1e-4, batch_size=setting.batch, seed=seed
    )
    conditional = config.kind in ("pc", "gc")
    gfn = GFlowNet(env, config=config, graph=None if conditional else graph).fit(steps=setting.steps)
    mass = distribution_of(gfn, graph, setting.preferences)
    drawn = graph.index(gfn.sample(setting.samples, seed=seed + 1).states)
    found = torch.unique(drawn[front[drawn]])
    return {
        "mass": mass_on(mass, front),
        "sampled_mass": float(front[drawn].double().mean()),
        "cells": len(found),
        "of": int(front.sum()),
        "pc_entropy": pc_entropy(u[drawn].numpy(), u[front].numpy()),
        "igd_plus": igd_plus(u[drawn].numpy(), u[front].numpy()),
        "gd_plus": gd_plus(u[drawn].numpy(), u[front].numpy()),
        "r2": r2(u[drawn].numpy()),
        "distribution": mass.tolist(),
        "front": front.nonzero().squeeze(1).tolist(),
        "samples": u[drawn].tolist(),
        "states": graph.states.tolist(),
    }


@torch.no_grad()
def distribution_of(gfn: GFlowNet, graph: StateGraph, preferences: int) -> Tensor:
    """The exact terminal distribution, averaged over drawn conditions where there are some."""
    if gfn.conditioner is None:
        return graph.terminal_distribution(gfn.policy(graph.states).logits)
    raw = gfn.conditioner.sample(preferences, torch.Generator().manual_seed(0))
    total = torch.zeros(len(graph), dtype=torch.float64)
    for row in gfn.conditioner.encode(raw):
        logits = gfn.policy(graph.states, row.expand(len(graph), -1)).logits
        total += graph.terminal_distribution(logits) / preferences
    return total


@dataclass(frozen=True)
class HyperSetting:
    """The grid with a peak in each corner; every arm has the same replay."""

    dim: int = 2
    side: int = 32
    steps: int = 600
    batch: int = 64
    offline: int = 64
    samples: int = 1280
    points: int = 12


TRANSFORMS = ("u", "u^3", "rank(u)")


def hypergrid_arm(
    setting: HyperSetting, objective: str, beta: float, seed: int, *, r0: float = 0.1, transform: str = "u"
) -> dict[str, Any]:
    """Train on a hypergrid: exact mass on the maxima, modes among samples, entropy, along the training.

    `transform`: what the sampler is told in place of u. The maxima and modes are those of u.
    """
    env = HyperGrid(setting.dim, setting.side, r0)
    graph = StateGraph(env)
    u = env.objective(graph.states)[:, 0]
    best, modes = u == u.max(), env.mode_of(graph.states)
    config = TrainConfig(
        objective=objective, beta=beta, lr=1e-3, lr_log_z=0.1, batch_size=setting.batch, epsilon=0.05, seed=seed
    )
    replay = ReplayConfig("prioritized", offline=setting.offline)
    gfn = GFlowNet(env, config=config, replay=replay, graph=graph)
    curve: dict[str, list[float]] = {"steps": [], "mass": [], "entropy": [], "modes": []}
    every = max(1, setting.steps // setting.points)

    def watch(trained: GFlowNet, step: int, loss: float) -> None:
        if step % every == 0 or step == setting.steps or step == 1:
            mass = trained.terminal_distribution()
            drawn = graph.index(trained.sample(setting.samples, seed=seed + 1).states)
            curve["steps"].append(step)
            curve["mass"].append(mass_on(mass, best))
            curve["entropy"].append(entropy(mass))
            curve["modes"].append(len(set(modes[drawn].tolist()) - {-1}))

    gfn.fit(_told(env, transform, u), setting.steps, callbacks=[watch])
    total = 2**setting.dim
    return {
        "curve": curve,
        "mass": curve["mass"][-1],
        "modes": curve["modes"][-1],
        "score": curve["mass"][-1] * curve["modes"][-1] / total,
        "distribution": gfn.terminal_distribution().tolist(),
    }


def _told(env: HyperGrid, transform: str, u: Tensor) -> Callable[[Tensor], Tensor]:
    if transform == "u":
        return env.objective
    if transform == "u^3":
        return lambda states: env.objective(states) ** 3
    levels = torch.unique(u)
    return lambda states: torch.searchsorted(levels, env.objective(states)).double()
