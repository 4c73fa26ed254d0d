"""The loop that trains teachers and students alike: Adam, a fixed number of epochs, the best validated state kept.

What is random in an epoch is a function of the seed and the epoch alone, so that a run that was killed and resumed
ends as the uninterrupted one: bit for bit on a CPU at the same number of threads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """Adam at `lr` with `weight_decay` for `epochs` (section 2.2; the same for students, 2.3).

    `validate_every`: epochs between validations; the state with the best validation accuracy, the first of equals,
    is the result. `checkpoint_every`: epochs between checkpoints, where a folder is given.
    """

    epochs: int = 200
    lr: float = 0.01
    weight_decay: float = 5e-4
    seed: int = 0
    validate_every: int = 1
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in ("epochs", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"expected a finite lr above 0, got {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"expected a finite weight_decay of 0 or more, got {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"expected a seed from 0 to 2**32 - 1, got {self.seed}")


@dataclass
class History:
    """Mean loss and validation accuracy of each validated epoch, the best epoch, and seconds in all."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    best_epoch: int = -1
    best_accuracy: float = -1.0
    seconds: float = 0.0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators seeded within, and put back after: the caller's randomness is not touched."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def epoch_seed(seed: int, epoch: int, stream: int = 0) -> int:
    """A seed for one epoch and one purpose."""
    return (seed * 1_000_003 + epoch * 16 + stream) % 2**63


def fit(
    model: nn.Module,
    losses: Callable[[int], Iterator[Tensor]],
    validate: Callable[[], float],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    resume: bool = True,
    run_key: dict[str, Any] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
) -> History:
    """Train `model` in place and leave it in its best validated state, in eval mode.

    `losses(epoch)` yields the loss of each step of an epoch; `validate()` gives the accuracy of the model in eval
    mode. With `folder`, checkpoints are kept there and the newest is continued if `resume`. `run_key`: what else
    the result depends on; a checkpoint of another is refused with `InputError`. Raises `InputError` on a loss that
    is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    history = History()
    best = _copy(model)
    first = 0
    key = json.loads(json.dumps({"config": dataclasses.asdict(config), **(run_key or {})}))
    if folder is None:
        _run(model, optimizer, losses, validate, config, history, best, first, on_epoch, lambda epoch: None)
    else:
        with CheckpointStore(folder) as store:
            if not resume:
                store.clear()
            elif (saved := load_latest(folder, "torch")) is not None:
                _check_key(key, saved.state["key"], folder)
                _restore(model, optimizer, best, saved.arrays)
                history, first = History(**saved.state["history"]), saved.step

            def keep(epoch: int) -> None:
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    state = {"key": key, "history": dataclasses.asdict(history)}
                    store.save(epoch, _snapshot(model, optimizer, best), state)

            _run(model, optimizer, losses, validate, config, history, best, first, on_epoch, keep)
    model.load_state_dict(best)
    model.eval()
    return history


def _run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Iterator[Tensor]],
    validate: Callable[[], float],
    config: TrainConfig,
    history: History,
    best: dict[str, Tensor],
    first: int,
    on_epoch: Callable[[int, float], None],
    keep: Callable[[int], None],
) -> None:
    for epoch in range(first, config.epochs):
        start = time.perf_counter()
        model.train()
        total, steps = 0.0, 0
        with seeded(epoch_seed(config.seed, epoch)):
            for loss in losses(epoch):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, steps = total + float(loss.detach()), steps + 1
        mean = total / max(steps, 1)
        if not math.isfinite(mean):
            raise InputError(f"expected a finite loss, got {mean} at epoch {epoch} with lr {config.lr}")
        done = epoch + 1
        if done % config.validate_every == 0 or done == config.epochs:
            model.eval()
            with torch.no_grad():
                accuracy = validate()
            history.losses.append(mean)
            history.accuracies.append(accuracy)
            if accuracy > history.best_accuracy:  # strictly: the first of equals (section 2.2)
                history.best_accuracy, history.best_epoch = accuracy, epoch
                for name, tensor in model.state_dict().items():
                    best[name].copy_(tensor)
        history.seconds += time.perf_counter() - start
        keep(done)
        on_epoch(done, history.accuracies[-1] if history.accuracies else 0.0)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    arrays = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    arrays |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, values in optimizer.state_dict()["state"].items():
        arrays |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    return arrays


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], arrays: dict[str, Tensor]
) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")})
    for name, tensor in best.items():
        tensor.copy_(arrays[f"best.{name}"])
    document = optimizer.state_dict()
    for name, value in arrays.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, entry = rest.partition(".")
            document["state"].setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict(document)


def _check_key(ours: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    if ours == saved:
        return
    flat_ours, flat_saved = _flat(ours), _flat(saved)
    differing = [k for k in {**flat_ours, **flat_saved} if flat_ours.get(k) != flat_saved.get(k)]
    pairs = ", ".join(f"{k} {flat_saved.get(k)} (now {flat_ours.get(k)})" for k in differing[:3])
    raise InputError(f"expected to resume the run in {str(folder)!r} with its own settings: {pairs}; or use --fresh")


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found
