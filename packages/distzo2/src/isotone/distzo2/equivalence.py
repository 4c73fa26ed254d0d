"""That every arrangement takes the same steps: g_t of one process, offloaded, and over ranks (section 6 a)."""

from __future__ import annotations

from typing import Any

import torch

from isotone.distzo2.config import ZOConfig
from isotone.distzo2.distributed import init_mesh, shard
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.tasks import KeywordTask, batch_of, keyword_model, score
from isotone.distzo2.trajectory import replay


def _flat(engine: ZOEngine) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in engine.trained_state().values()])


def single(task: KeywordTask, lr: float, steps: int, seed: int, where: str) -> dict[str, Any]:
    """One process on the device `where`, in memory and offloaded: steps whose g_t differ, weights that do, and the
    replay's. `grads` are those in memory.
    """
    engines = {
        offload: ZOEngine(keyword_model(task, seed), ZOConfig(lr=lr, seed=seed, offload=offload), device=where)
        for offload in ("none", "cpu")
    }
    grads: dict[str, list[float]] = {}
    for offload, engine in engines.items():
        grads[offload] = [engine.step(batch_of(task, seed, step)).projected_grad for step in range(steps)]
    theta = {offload: _flat(engine) for offload, engine in engines.items()}
    replayed = replay(keyword_model(task, seed).to(where), engines["cpu"].trajectory)
    again = torch.cat([p.detach().cpu().reshape(-1) for p in replayed.parameters()])
    return {
        "grads": grads["none"],
        "differing": sum(a != b for a, b in zip(grads["none"], grads["cpu"], strict=True)),
        "weights": int((theta["none"] != theta["cpu"]).sum()),
        "replayed": int((again != theta["none"]).sum()),
        "theta": theta["none"].tolist(),
    }


def ranks(rank: int, world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """On `world` ranks: PertP over all steps; DDP and 2D each step from the weights of one process's run."""
    task, lr, steps, seed, where = _given(arguments)
    found: dict[str, Any] = {}
    if world == 2:
        engine = _engine_on_ranks(task, lr, seed, where, 2, offload="cpu")
        steps_taken = [engine.step(shard(batch_of(task, seed, step), engine.ranks)) for step in range(steps)]
        found["pertp"] = {
            "grads": [step.projected_grad for step in steps_taken],
            "theta": _flat(engine).tolist(),
            "bytes": engine.scalar_bytes / steps,
        }
        found["ddp"] = _beside_one(task, lr, steps, seed, where, 1)
    else:
        found["2d"] = _beside_one(task, lr, steps, seed, where, 2)
        found["ddp"] = _beside_one(task, lr, steps, seed, where, 1)
    return found


def run_2d(rank: int, world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """A whole run on the 2D mesh, offloaded (and sliced, on a CPU): loss and accuracy where it ends."""
    task, lr, steps, seed, where = _given(arguments)
    engine = _engine_on_ranks(task, lr, seed, where, 2, offload="cpu")
    losses = [engine.step(shard(batch_of(task, seed, step), engine.ranks)).loss for step in range(steps)]
    engine.close()
    return {**score(engine.model, task), "losses": losses if rank == 0 else []}


def _given(arguments: dict[str, Any]) -> tuple[KeywordTask, float, int, int, str]:
    names = ("lr", "steps", "seed", "where")
    lr, steps, seed, where = (arguments[name] for name in names)
    return KeywordTask(**arguments["task"]), lr, steps, seed, where


def _engine_on_ranks(task: KeywordTask, lr: float, seed: int, where: str, pertp: int, offload: str) -> ZOEngine:
    # ranks that share a GPU exchange scalars by gloo, not slices: they have one link between them
    slicing: bool | str = "auto" if where == "cpu" else False
    config = ZOConfig(lr=lr, seed=seed, offload=offload, slicing=slicing)
    return ZOEngine(keyword_model(task, seed), config, init_mesh(pertp), device=where)


def _beside_one(task: KeywordTask, lr: float, steps: int, seed: int, where: str, pertp: int) -> dict[str, Any]:
    """The differences of g_t between ranks with shards and one process with the whole batch, same weights each step."""
    alone = ZOEngine(keyword_model(task, seed), ZOConfig(lr=lr, seed=seed), device=where)
    engine = _engine_on_ranks(task, lr, seed, where, pertp, offload="none")
    pairs = []
    for step in range(steps):
        batch = batch_of(task, seed, step)
        pairs.append((alone.step(batch).projected_grad, engine.step(shard(batch, engine.ranks)).projected_grad))
        # both go on from the same weights
        engine.pending = alone.pending
    return {"pairs": pairs, "bytes": engine.scalar_bytes / steps}


def relative(pairs: list[list[float]]) -> float:
    """The largest difference of a pair, of the root mean square of the first: g_t itself may be near zero."""
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    return float((first - second).abs().max() / first.square().mean().sqrt())
