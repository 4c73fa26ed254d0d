"""The arms of a comparison: who is trained, at which rates, for how long, and what came of it.

Every arm has the same data, batch, recipe and rates to choose from; the rate, and of each training the moment of the
best weights, are chosen by the error on a validation split that neither training nor the table sees. Seconds are those
of training, compiled beforehand.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from isotone.transform_once import metrics, modes
from isotone.transform_once.config import FNOConfig, OperatorConfig, T1Config
from isotone.transform_once.data import Fields
from isotone.transform_once.models import make_model
from isotone.transform_once.peers import NeuralopTrainer
from isotone.transform_once.rollout import advance, channels
from isotone.transform_once.training import TrainConfig, Trainer

CHECKS = 8
"""Looks at validation and test errors along a training."""
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Rates: where the best of an arm's own is the least or the greatest of them, the next is tried too."""


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
    valid: Fields,
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

    An arm of so many seconds runs the epochs that fill them, counted again at every look, and so does its schedule.
    `error`: mean relative L2 on `test` at the look with the least `valid` error, `valid`; `last`: at the last look;
    `curve`: (seconds, error) on the way; `above`: the least ratio of a sample's error to the irreducible one, where the
    arm is truncated; of the weights at the end, `rollout`: errors on test trajectories `frames` (B, T, ..), by step,
    and `finer`: the error on those fields, of a finer grid.
    """
    made = runner(arm, train, recipe, device)
    errors = found = np.zeros(0)
    compile_seconds = made.warm_up()
    epoch_seconds = made.seconds_per_epoch(0.3 if seconds is None else min(0.3, seconds / 4))
    total = max(1, int(seconds / epoch_seconds)) if seconds is not None else recipe.epochs
    spent, done, curve, best = 0.0, 0, [], float("inf")
    for check in range(1, CHECKS + 1):
        if seconds is not None and done:
            total = done + max(0, int((seconds - spent) * done / spent))
        more = round(done + (total - done) / (CHECKS + 1 - check)) - done
        if more < 1 and (done or check < CHECKS):
            continue
        start = time.perf_counter()
        losses = made.run(max(1, more), max(total, done + 1))
        spent += time.perf_counter() - start
        done += max(1, more)
        now = made.predict(test.inputs)
        each = metrics.relative_l2(now, test.targets)
        error = float(each.mean())
        # a rate is tuned on one split, which is both
        score = error if valid is test else float(_mean_error(made, valid))
        curve.append((spent, error))
        if score < best or not errors.size:
            best, errors, found = score, each, now
    row = {"arm": arm.name, "seed": recipe.seed, "lr": recipe.lr, "error": float(errors.mean()), "valid": best}
    row |= {"curve": curve, "last": curve[-1][1]}
    row |= {"train": float(losses[-1]), "epochs": done, "seconds": spent, "epoch_seconds": epoch_seconds}
    row["compile_seconds"] = compile_seconds
    if recipe.seed == 0:
        row["sample"] = found[0].astype(float).round(5).tolist()
    if frames is not None:
        row["rollout"] = rolled(made, frames, order)
    if finer is not None:
        row["finer"] = float(_mean_error(made, finer))
    if isinstance(arm.config, T1Config):
        floor = modes.irreducible_error(test.targets, arm.config.axes_modes)
        real = arm.config.transform == "dct" and not arm.config.keep_high
        row["above"] = float((errors / np.maximum(floor, 1e-12)).min()) if real else None
        row["floor"] = float(floor.mean())
    return row


def _mean_error(made: Runner, fields: Fields) -> np.floating[Any]:
    return metrics.relative_l2(made.predict(fields.inputs), fields.targets).mean()


def tuned(
    arm: Arm, train: Fields, valid: Fields, recipe: TrainConfig, *, seconds: float | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The rate with the least validation error, all of them trained alike: of the arm's own and, while the best is at
    an end of those tried, of the next of `LADDER`."""
    if len(arm.rates) == 1:
        return {"arm": arm.name, "lr": arm.rates[0], "errors": {}}
    errors: dict[float, float] = {}
    waiting = list(arm.rates)
    while waiting:
        for rate in waiting:
            own = dataclasses.replace(recipe, lr=rate)
            row = trained(arm, train, valid, valid, own, seconds=seconds, device=device)
            errors[rate] = row["error"] if np.isfinite(row["error"]) else np.inf
        best = min(errors, key=lambda rate: errors[rate])
        below, above = ([r for r in LADDER if r < best][-1:], [r for r in LADDER if r > best][:1])
        waiting = [rate for rate in (*below, *above) if rate not in errors]
    return {"arm": arm.name, "lr": best, "errors": {str(rate): error for rate, error in sorted(errors.items())}}


def rolled(made: Any, frames: np.ndarray, order: int) -> dict[str, float]:
    """Mean relative L2 of predicted frames by step, from the first two frames of each trajectory (B, T, ..), by any
    runner's predictions."""
    window, found = jnp.asarray(np.moveaxis(frames[:, :2], 1, 0)), {}
    for step in range(1, frames.shape[1] - 1):
        window = advance(order, window, jnp.asarray(made.predict(np.asarray(channels(window)))))
        found[str(step)] = float(metrics.relative_l2(np.asarray(window[-1]), frames[:, step + 1]).mean())
    return found
