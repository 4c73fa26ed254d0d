"""The arms of a comparison: who is trained, at which rates, for how long, and what came of it.

Every arm has the same data, batch, recipe and number of rates to choose from; a rate is chosen by the error on a
validation split that neither training nor the table sees. Seconds are those of training, compiled beforehand.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from isotone.transform_once import metrics, modes
from isotone.transform_once.config import FNOConfig, OperatorConfig, T1Config
from isotone.transform_once.data import Fields
from isotone.transform_once.models import make_model
from isotone.transform_once.peers import NeuralopTrainer
from isotone.transform_once.training import TrainConfig, Trainer

CHECKS = 8
"""Test errors that are taken along a training."""


@dataclass(frozen=True)
class Arm:
    """A model and the rates it may be trained at; `config` None: neuraloperator's FNO of the shape of `like`."""

    name: str
    config: OperatorConfig | None
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    like: FNOConfig | None = None


@runtime_checkable
class Runner(Protocol):
    """What a study needs of a trainer."""

    def warm_up(self) -> float: ...
    def seconds_per_epoch(self, seconds: float = 0.3) -> float: ...
    def run(self, epochs: int, total: int | None = None) -> np.ndarray: ...
    def predict(self, inputs: np.ndarray) -> np.ndarray: ...


class OurRunner:
    """`Trainer` of one seed, with a `predict`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.warm_up, self.run = trainer.warm_up, trainer.run
        self.seconds_per_epoch = trainer.seconds_per_epoch

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Fields of the weights as they are now."""
        return self.trainer.models()[0].predict(inputs)


def runner(arm: Arm, train: Fields, recipe: TrainConfig, device: str = "cpu") -> Runner:
    """The arm, ready to be trained by `recipe`, whose seed is also that of its weights."""
    if arm.config is None:
        assert arm.like is not None
        like = arm.like
        return NeuralopTrainer(
            train.inputs,
            train.targets,
            recipe,
            modes=like.axes_modes,
            width=like.width,
            depth=like.depth,
            seed=recipe.seed,
            device=device,
        )
    return OurRunner(Trainer(make_model(arm.config, recipe.seed), train.inputs, train.targets, recipe))


def trained(
    arm: Arm,
    train: Fields,
    test: Fields,
    recipe: TrainConfig,
    *,
    seconds: float | None = None,
    device: str = "cpu",
    frames: np.ndarray | None = None,
    order: int = 0,
    finer: Fields | None = None,
) -> dict[str, Any]:
    """Train one arm for so many `seconds`, or for the recipe's epochs: a row of the table.

    `error`: mean relative L2 on `test`; `curve`: (seconds, error) on the way; `above`: the least ratio of a sample's
    error to the irreducible one, where the arm is truncated; `rollout`: errors on test trajectories `frames` (B, T,
    ..), by step; `finer`: the error on those fields, of a finer grid.
    """
    made = runner(arm, train, recipe, device)
    errors = found = np.zeros(0)
    compile_seconds = made.warm_up()
    epoch_seconds = made.seconds_per_epoch(0.3 if seconds is None else min(0.3, seconds / 4))
    total = max(1, int(seconds / epoch_seconds)) if seconds is not None else recipe.epochs
    spent, done, curve = 0.0, 0, []
    for check in range(1, CHECKS + 1):
        more = round(total * check / CHECKS) - done
        if more < 1:
            continue
        start = time.perf_counter()
        losses = made.run(more, total)
        spent += time.perf_counter() - start
        done += more
        found = made.predict(test.inputs)
        errors = metrics.relative_l2(found, test.targets)
        curve.append((spent, float(errors.mean())))
    row = {"arm": arm.name, "seed": recipe.seed, "lr": recipe.lr, "error": curve[-1][1], "curve": curve}
    row |= {"train": float(losses[-1]), "epochs": done, "seconds": spent, "epoch_seconds": epoch_seconds}
    row["compile_seconds"] = compile_seconds
    if recipe.seed == 0:
        row["sample"] = found[0].astype(float).round(5).tolist()
    if frames is not None:
        row["rollout"] = rolled(made, frames, order)
    if finer is not None:
        row["finer"] = float(metrics.relative_l2(made.predict(finer.inputs), finer.targets).mean())
    if isinstance(arm.config, T1Config):
        floor = modes.irreducible_error(test.targets, arm.config.axes_modes)
        real = arm.config.transform == "dct" and not arm.config.keep_high
        row["above"] = float((errors / np.maximum(floor, 1e-12)).min()) if real else None
        row["floor"] = float(floor.mean())
    return row


def tuned(
    arm: Arm, train: Fields, valid: Fields, recipe: TrainConfig, *, seconds: float | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The rate of the arm's own with the least validation error, all of them trained alike."""
    if len(arm.rates) == 1:
        return {"arm": arm.name, "lr": arm.rates[0], "errors": {}}
    rows = [
        trained(arm, train, valid, dataclasses.replace(recipe, lr=rate), seconds=seconds, device=device)
        for rate in arm.rates
    ]
    best = min(rows, key=lambda row: row["error"] if np.isfinite(row["error"]) else np.inf)
    return {"arm": arm.name, "lr": best["lr"], "errors": {str(row["lr"]): row["error"] for row in rows}}


def rolled(made: Any, frames: np.ndarray, order: int) -> dict[str, float]:
    """Mean relative L2 of predicted frames by step, from the first two frames of each trajectory (B, T, ..)."""
    window, found = [frames[:, 0], frames[:, 1]], {}
    for step in range(1, frames.shape[1] - 1):
        given = made.predict(np.concatenate(window, -1))
        window = [window[1], window[1] + given if order == 1 else given]
        found[str(step)] = float(metrics.relative_l2(window[1], frames[:, step + 1]).mean())
    return found
