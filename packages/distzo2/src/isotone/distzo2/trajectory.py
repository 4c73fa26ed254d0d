"""A fine-tune as the list of its steps: seeds, projected gradients, learning rates; 16 bytes a step at a constant rate.

The weights follow from the base model and the list, bit for bit (section 7, item 11).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from isotone.distzo2 import kernels
from isotone.distzo2.kernels import Update
from isotone.distzo2.layout import Bucket, decaying, lay_tensors
from isotone.distzo2.rng import RNG_VERSION, PhiloxNoise
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError


@dataclass
class Trajectory:
    """The steps of a run. `seeds` and `grads`: a tuple of K a step; `lrs`: one. A skipped step has rate 0.

    `base`: the hash of the trained tensors before the first step.
    """

    base: str
    weight_decay: float = 0.0
    stochastic_rounding: bool = False
    stored: str = ""
    rng: str = RNG_VERSION
    seeds: list[tuple[int, ...]] = field(default_factory=list)
    grads: list[tuple[float, ...]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.seeds)

    def append(self, seeds: tuple[int, ...], grads: tuple[float, ...], lr: float) -> None:
        """Add a step."""
        self.seeds.append(seeds)
        self.grads.append(grads)
        self.lrs.append(lr)

    def update(self, step: int) -> Update | None:
        """What step `step` does to the weights; None where that is nothing."""
        return make_update(self.seeds[step], self.grads[step], self.lrs[step], self.weight_decay)

    def arrays(self) -> dict[str, Tensor]:
        """The steps as tensors: seeds int64 (T, K), grads float64 (T, K), and the rates run by run."""
        runs: list[tuple[float, int]] = []
        for lr in self.lrs:
            runs[-1:] = [(lr, runs[-1][1] + 1)] if runs and runs[-1][0] == lr else [*runs[-1:], (lr, 1)]
        width = len(self.seeds[0]) if self.seeds else 1
        return {
            "seeds": torch.tensor(self.seeds, dtype=torch.int64).reshape(-1, width),
            "grads": torch.tensor(self.grads, dtype=torch.float64).reshape(-1, width),
            "lrs": torch.tensor([lr for lr, _ in runs], dtype=torch.float64),
            "lr_steps": torch.tensor([count for _, count in runs], dtype=torch.int64),
        }

    def fill(self, arrays: dict[str, Tensor]) -> None:
        """Take the steps of `arrays`. Raises `InputError` where they do not belong together."""
        try:
            seeds, grads = arrays["seeds"], arrays["grads"]
            lrs = torch.repeat_interleave(arrays["lrs"], arrays["lr_steps"])
            whole = seeds.shape == grads.shape and seeds.ndim == 2 and len(lrs) == len(seeds)
        except (KeyError, RuntimeError):
            whole = False
        if not whole:
            raise InputError("expected seeds and grads of one shape (T, K) and T learning rates in the trajectory")
        if not bool(grads.isfinite().all() & lrs.isfinite().all()):
            raise InputError("expected finite gradients and rates in the trajectory, got NaN or infinity")
        self.seeds = [tuple(row) for row in seeds.tolist()]
        self.grads = [tuple(row) for row in grads.tolist()]
        self.lrs = lrs.tolist()


def make_update(seeds: tuple[int, ...], grads: tuple[float, ...], lr: float, weight_decay: float) -> Update | None:
    """theta <- theta - lr (mean_k g_k z_k + lambda theta), as coefficients of the z_k; None at rate 0."""
    if lr == 0:
        return None
    return Update(seeds, tuple(lr * g / len(grads) for g in grads), lr * weight_decay)


def save_trajectory(trajectory: Trajectory, path: str | os.PathLike[str]) -> None:
    """Write a trajectory as safetensors, whole or not at all."""
    header = {
        name: getattr(trajectory, name) for name in ("base", "weight_decay", "stochastic_rounding", "stored", "rng")
    }
    atomic_write(Path(path), save(trajectory.arrays(), {"isotone": json.dumps(header)}))


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """The trajectory in a file. Raises `InputError` where there is none."""
    try:
        with safe_open(os.fspath(path), "pt") as file:
            found = Trajectory(**json.loads(file.metadata()["isotone"]))
            found.fill({name: file.get_tensor(name) for name in file.keys()})
        return found
    except FileNotFoundError:
        raise InputError(f"expected a trajectory at {os.fspath(path)!r}, found none") from None
    except InputError as error:
        raise InputError(f"{error}: {os.fspath(path)!r}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise InputError(f"expected a trajectory file, got another or a torn one: {os.fspath(path)!r}") from None


def replay(
    model: nn.Module, trajectory: Trajectory, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> nn.Module:
    """Bring the base model to where the trajectory ends, bit for bit, and return it.

    `on_tensor(done, total)` is called after each tensor. Raises `InputError` where the base is another model, or the
    trajectory of another generator.
    """
    if trajectory.rng != RNG_VERSION:
        raise InputError(f"expected a trajectory of {RNG_VERSION}, got one of {trajectory.rng}")
    if (found := base_hash(model)) != trajectory.base:
        raise InputError(f"expected the base model {trajectory.base[:12]} of the trajectory, got {found[:12]}")
    stored = getattr(torch, trajectory.stored) if trajectory.stored else None
    updates = [update for step in range(len(trajectory)) if (update := trajectory.update(step)) is not None]
    buckets = _single_buckets(model)
    with torch.no_grad():
        for done, bucket in enumerate(buckets, 1):
            flat = bucket.entries[0].parameters[0].detach().reshape(-1).to(stored or bucket.dtype, copy=True)
            for update in updates:
                segments, stochastic = bucket.segments(0, flat.numel()), trajectory.stochastic_rounding
                kernels.advance(flat, segments, PhiloxNoise(), update, stochastic=stochastic)
            shaped = flat.view(bucket.entries[0].shape)
            for parameter in bucket.entries[0].parameters:
                parameter.copy_(shaped)
            on_tensor(done, len(buckets))
    return model


def base_hash(model: nn.Module) -> str:
    """A hash of the numbers, types, shapes and values of a model's trained tensors."""
    digest = hashlib.sha256()
    for bucket in _single_buckets(model):
        entry = bucket.entries[0]
        digest.update(f"{entry.number} {bucket.dtype} {tuple(entry.shape)}\n".encode())
        raw = entry.parameters[0].detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _single_buckets(model: nn.Module) -> list[Bucket]:
    """Each trained tensor of a model in a bucket of its own."""
    decays = decaying(model)
    return [bucket for bucket in lay_tensors(model, decays) if bucket.trainable]
