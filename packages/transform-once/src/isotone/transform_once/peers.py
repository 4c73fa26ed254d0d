"""neuraloperator's FNO (PyTorch), trained as ours are: the peer that a user would pick instead (extra `neuralop`)."""

from __future__ import annotations

import copy
import importlib.util
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from isotone.shared.errors import InputError
from isotone.transform_once.training import TrainConfig, timed_epochs


def available() -> bool:
    """Whether neuraloperator is installed."""
    return importlib.util.find_spec("neuralop") is not None


class NeuralopTrainer:
    """Its FNO under `Trainer`'s methods: the same batches a step, AdamW, schedule and relative L2.

    `modes` as ours: its own n_modes counts both signs, and of the last axis 2 m - 1 keeps m. Raises `InputError` where
    it is not installed.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        config: TrainConfig,
        *,
        modes: tuple[int, ...],
        width: int,
        depth: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if not available():
            raise InputError("expected neuraloperator (extra neuralop), it is not installed")
        import torch
        from neuralop.models import FNO

        torch.manual_seed(seed)
        self.torch, self.config, self.device = torch, config, device
        self.model = FNO(
            n_modes=(*(2 * m for m in modes[:-1]), 2 * modes[-1] - 1),
            hidden_channels=width,
            n_layers=depth,
            in_channels=inputs.shape[-1],
            out_channels=targets.shape[-1],
        ).to(device)
        self.x, self.y = (
            torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1))).to(device) for a in (inputs, targets)
        )
        # its weights are complex, which AdamW takes as they are
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.lr, weight_decay=config.weight_decay)
        self.batches = len(inputs) // config.batch_size
        self.epoch = 0
        self.generator = torch.Generator().manual_seed(config.seed)

    def run(self, epochs: int, total: int | None = None) -> np.ndarray:
        """Train `epochs` more of `total`: the loss of each."""
        torch, config = self.torch, self.config
        total = total or config.epochs
        found = []
        self.model.train()
        for _ in range(epochs):
            order = torch.randperm(len(self.x), generator=self.generator).to(self.device)
            shares = (self.epoch + np.arange(self.batches) / self.batches) / total
            rates = config.lr * np.asarray(config.rate(jnp.asarray(shares))) * np.ones(self.batches)
            losses = []
            for number in range(self.batches):
                rows = order[number * config.batch_size : (number + 1) * config.batch_size]
                for group in self.optimizer.param_groups:
                    group["lr"] = float(rates[number])
                y = self.y[rows].flatten(1)
                gap = self.model(self.x[rows]).flatten(1) - y
                loss = (gap.norm(dim=1) / y.norm(dim=1)).mean()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach())
            self.epoch += 1
            found.append(float(torch.stack(losses).mean()))
        return np.array(found)

    def warm_up(self) -> float:
        """One forward and backward pass; the seconds that took."""
        start = time.perf_counter()
        rows = slice(0, self.config.batch_size)
        (self.model(self.x[rows]) - self.y[rows]).square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def seconds_per_epoch(self, seconds: float = 0.3) -> float:
        """As `Trainer`'s, undone afterwards."""
        kept = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.generator.get_state()))
        epoch = self.epoch
        found = timed_epochs(self.run, seconds)
        self.model.load_state_dict(kept[0])
        self.optimizer.load_state_dict(kept[1])
        self.generator.set_state(kept[2])
        self.epoch = epoch
        return found

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Fields, channels last."""
        torch = self.torch
        self.model.eval()
        found: list[Any] = []
        with torch.no_grad():
            for part in torch.from_numpy(np.ascontiguousarray(np.moveaxis(inputs, -1, 1))).split(64):
                found.append(self.model(part.to(self.device)).cpu().numpy())
        return np.moveaxis(np.concatenate(found), 1, -1)
