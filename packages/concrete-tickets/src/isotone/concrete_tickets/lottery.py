"""Lottery-ticket rewinding, iterative magnitude pruning, and gradual magnitude pruning during one training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from isotone.concrete_tickets.layout import Params, Where, default_kernels, named_weights
from isotone.concrete_tickets.resume import fingerprint
from isotone.concrete_tickets.ticket import Ticket
from isotone.concrete_tickets.training import Trained, Trainer, train
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

TrainFn = Callable[[Params, Ticket], Params]
"""`train_fn(rewind_params, ticket) -> trained params`, the sparse network trained to its end."""


def rounds_to(density: float, keep: float = 0.8) -> int:
    """How many rounds of `keep` reach `density`: 22 for 0.8^22."""
    if not 0 < keep < 1:
        raise InputError(f"expected keep in (0, 1), got {keep}")
    # 0.8^22 is 22 rounds, whatever the last bit of its logarithm says
    return max(1, math.ceil(math.log(density) / math.log(keep) - 1e-9))


def imp(
    train_fn: TrainFn,
    rewind_params: Params,
    density: float,
    *,
    keep: float = 0.8,
    where: Where = default_kernels,
    folder: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    stop: Callable[[int], bool] = lambda round: False,
) -> list[Ticket]:
    """Iterative magnitude pruning with rewinding: train, keep the largest |w| globally, rewind; repeat.

    Round n keeps `keep`^n of the weights, the last one exactly floor(density * d). `rewind_params`: the weights of
    the rewind point (LTR) or the initial ones (IMP). Returns the tickets of the rounds; the last one is not trained
    yet. `folder`: tickets are saved as they come, with the seconds that each took (`round_seconds`), and found again.
    `identity`: what `train_fn` does, as JSON says it (recipe, data, seed): a function does not tell. `stop(rounds
    done)` ends early. Raises `InputError` where a trained network has NaN, or `folder` holds the tickets of other
    weights or of another identity.
    """
    total = rounds_to(density, keep)
    ticket = Ticket.dense(rewind_params, where)
    tickets: list[Ticket] = []
    if folder is not None:
        _check_folder(Path(folder), rewind_params, density, keep, sorted(ticket.masks), identity or {})
    for number in range(1, total + 1):
        target = density if number == total else keep**number
        path = None if folder is None else Path(folder) / f"round-{number:03d}.safetensors"
        # one without its seconds would count for nothing
        if path is not None and path.exists() and path.with_suffix(".json").exists():
            ticket = Ticket.load(path)
            ticket.check(rewind_params)
        else:
            if stop(number - 1):
                break
            begin = time.perf_counter()
            trained = train_fn(rewind_params, ticket)
            ticket = prune_magnitude(trained, ticket, target)
            if path is not None:
                # before the ticket: a round that is there has its seconds
                taken = json.dumps({"seconds": time.perf_counter() - begin})
                atomic_write(path.with_suffix(".json"), taken.encode())
                ticket.save(path)
        tickets.append(ticket)
    return tickets


def round_seconds(folder: str | Path) -> float:
    """What the rounds in a folder of `imp` took to run, whenever that was."""
    return sum(json.loads(path.read_text())["seconds"] for path in sorted(Path(folder).glob("round-*.json")))


def _check_folder(
    folder: Path, params: Params, density: float, keep: float, leaves: list[str], training: Mapping[str, Any]
) -> None:
    """The folder says whose rounds it holds."""
    identity: dict[str, Any] = {"weights": fingerprint(params), "density": density, "keep": keep}
    identity["leaves"] = leaves
    identity["training"] = json.loads(json.dumps(training))
    path = folder / "rounds.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        if stored != identity:
            other = next((name for name in identity if stored.get(name) != identity[name]), "rounds")
            raise InputError(f"expected the rounds of this pruning in {str(folder)!r}, got those of other {other}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(identity).encode())


def prune_magnitude(trained: Params, ticket: Ticket, density: float) -> Ticket:
    """The floor(density * d) largest |w| among the weights that `ticket` keeps."""
    names = set(ticket.masks)
    weights = named_weights(trained, lambda name, _: name in names)
    scores = {name: np.where(np.asarray(ticket.masks[name]), np.abs(np.asarray(w)), -1) for name, w in weights.items()}
    if any(np.isnan(score).any() for score in scores.values()):
        raise InputError("expected trained weights without NaN, got NaN")
    return Ticket.from_scores(scores, density)


@dataclass(frozen=True)
class Gradual:
    """The cubic schedule of gradual magnitude pruning (Zhu & Gupta 2017), a step an epoch.

    Density after the epoch `e`, from `begin` to `end` (shares of the training): final + (1 - final) (1 - t)^3.
    """

    begin: float = 0.1
    end: float = 0.7

    def density(self, final: float, epoch: int, epochs: int) -> float:
        first, last = self.begin * epochs, self.end * epochs
        t = min(1.0, max(0.0, (epoch - first) / max(1.0, last - first)))
        return final + (1 - final) * (1 - t) ** 3


def gradual_magnitude(
    trainer: Trainer,
    params: Params,
    data: tuple[Any, Any],
    density: float,
    *,
    key: Array | None = None,
    schedule: Gradual | None = None,
    where: Where = default_kernels,
) -> tuple[Trained, Ticket]:
    """Prune while training once; the sparse network comes out trained. Returns it and its ticket."""
    schedule = schedule or Gradual()
    epochs = trainer.recipe.epochs
    ticket, state = Ticket.dense(params, where), None
    trained = Trained(params, None, np.zeros(0))
    reached = 1.0
    for epoch in range(epochs):
        # the last epoch trains the ticket that was asked for, however short the schedule
        target = density if epoch == epochs - 1 else schedule.density(density, epoch, epochs)
        if target < reached:
            ticket, reached = prune_magnitude(trained.params, ticket, target), target
        trained = train(
            trainer, trained.params, data, key=key, ticket=ticket, first=epoch, last=epoch + 1, optimizer=state
        )
        state = trained.optimizer
    return trained, ticket


def round_densities(density: float, keep: float = 0.8) -> Sequence[float]:
    """The densities of the rounds, the last one the target."""
    total = rounds_to(density, keep)
    return [keep**n for n in range(1, total)] + [density]
