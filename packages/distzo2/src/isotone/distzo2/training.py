"""A run of steps that can be killed at any moment and goes on where it was, on as many ranks as there are then."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isotone.distzo2.checkpoints import clear_runs, forget_after, load_run, save_run
from isotone.distzo2.distributed import shard, to_device
from isotone.distzo2.engine import ZOEngine, ZOStep
from isotone.shared.checkpoint import Checkpoint, CheckpointStore
from isotone.shared.errors import InputError, check_count


@dataclass(frozen=True)
class Schedule:
    """The rate of a step as a function of it: constant, or falling linearly to zero over `steps`."""

    lr: float
    steps: int
    kind: str = "constant"

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear"):
            raise InputError(f"expected the schedule to be constant or linear, got {self.kind!r}")

    def __call__(self, step: int) -> float:
        """The rate of step `step`, from 0."""
        return self.lr * (1 - step / self.steps) if self.kind == "linear" else self.lr


@dataclass
class History:
    """Losses l+ of the steps taken, scores by step, seconds of this process."""

    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    engine: ZOEngine,
    batches: Callable[[int], Any],
    steps: int,
    *,
    schedule: Schedule | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    data_id: str = "",
    evaluate: Callable[[ZOEngine], float] | None = None,
    evaluate_every: int = 0,
    on_step: Callable[[ZOStep], None] = lambda step: None,
) -> History:
    """Train to step `steps`; every rank calls it, and rank 0 writes.

    `batches(step)`: the global batch of a step; each rank takes its rows, and they alone come to its device. `folder`:
    of checkpoints, each with the trained tensors, a file a block, and the trajectory; with `resume` the newest is
    taken, whatever the number of ranks that wrote it. `data_id`: what the batches depend on, compared on resuming.
    `evaluate`, every `evaluate_every` steps and at the end, 0 for neither. Raises `InputError` where the checkpoint is
    of another run.
    """
    check_count("steps", steps, 0)
    check_count("checkpoint_every", checkpoint_every)
    schedule = schedule or Schedule(engine.config.lr, max(steps, 1))
    identity = _identity(engine, data_id, schedule)
    history = History()
    start = time.perf_counter()
    with ExitStack() as stack:
        store = engine.wire.together(partial(_store, stack, folder, engine.ranks.rank == 0))
        if folder is not None and resume:
            _resume(engine, folder, identity, history, steps)
            if store is not None:
                forget_after(store, engine.steps)
        elif store is not None:
            clear_runs(store)
        while engine.steps < steps:
            engine.lr = schedule(engine.steps)
            own = shard(batches(engine.steps), engine.ranks)
            found = engine.step(to_device(own, engine.device))
            history.losses.append(found.loss)
            on_step(found)
            last = engine.steps == steps
            if evaluate and evaluate_every and (last or engine.steps % evaluate_every == 0):
                history.scores[engine.steps] = evaluate(engine)
            if folder is not None and (last or engine.steps % checkpoint_every == 0):
                _save(engine, store, identity, history)
        engine.flush()
    history.seconds = time.perf_counter() - start
    return history


def _store(stack: ExitStack, folder: str | os.PathLike[str] | None, writes: bool) -> CheckpointStore | None:
    return stack.enter_context(CheckpointStore(folder)) if writes and folder is not None else None


def _identity(engine: ZOEngine, data_id: str, schedule: Schedule) -> dict[str, Any]:
    """What a run's result depends on; not how many ranks share it, nor where blocks rest."""
    config = engine.config
    names = ("eps", "weight_decay", "n_directions", "estimator", "rng", "seed", "stochastic_rounding")
    own = {name: getattr(config, name) for name in names}
    own |= {name: str(getattr(config, name)) for name in ("working_dtype", "offload_dtype")}
    rate = [schedule.kind, schedule.lr, schedule.steps if schedule.kind == "linear" else 0]
    return {**own, "base": engine.trajectory.base, "data": data_id, "schedule": rate}


def _save(engine: ZOEngine, store: CheckpointStore | None, identity: dict[str, Any], history: History) -> None:
    state = {"identity": identity, "losses": history.losses, "skipped": engine.skipped}
    scores = {str(step): score for step, score in history.scores.items()}
    save_run(engine, store, engine.trajectory.arrays(), {**state, "scores": scores})


def _resume(
    engine: ZOEngine, folder: str | os.PathLike[str], identity: dict[str, Any], history: History, steps: int
) -> None:
    found = engine.wire.together(partial(_newest, folder, identity, steps))
    step, digest = (-1, 0) if found is None else (found[0].step, zlib.crc32(found[0].path.name.encode()))
    if engine.wire.differing(torch.tensor([step, digest])):
        raise InputError(
            f"expected the same checkpoint in {os.fspath(folder)!r} for all ranks, got others: is the folder shared?"
        )
    if found is None:
        return
    checkpoint, weights = found
    engine.wire.together(partial(engine.load_state_dict, weights))
    engine.trajectory.fill(checkpoint.arrays)
    engine.steps, engine.skipped = checkpoint.step, checkpoint.state["skipped"]
    history.losses = list(checkpoint.state["losses"])
    history.scores = {int(step): score for step, score in checkpoint.state["scores"].items()}


def _newest(
    folder: str | os.PathLike[str], identity: dict[str, Any], steps: int
) -> tuple[Checkpoint, Mapping[str, Tensor]] | None:
    found = load_run(folder)
    if found is None:
        return None
    if found[0].step > steps:
        raise InputError(
            f"expected steps of at least {found[0].step}, those of the checkpoint in {os.fspath(folder)!r}, got {steps}"
        )
    there = found[0].state["identity"]
    other = [name for name, value in identity.items() if there.get(name) != value]
    if other:
        raise InputError(
            f"expected a checkpoint with {other[0]} {identity[other[0]]!r} in {os.fspath(folder)!r}, "
            f"got {there.get(other[0])!r}; start anew with --fresh"
        )
    return found
