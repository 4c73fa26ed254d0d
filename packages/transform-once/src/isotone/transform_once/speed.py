"""Seconds of a training step, T1 beside FNO at equal modes, width and depth: what the resolution costs each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from isotone.transform_once.config import FFNOConfig, FNOConfig, OperatorConfig, T1Config
from isotone.transform_once.models import make_model
from isotone.transform_once.peers import NeuralopTrainer, available
from isotone.transform_once.training import TrainConfig, Trainer


def arms(size: int, modes: int = 24, width: int = 48, depth: int = 4) -> dict[str, OperatorConfig]:
    """The models of the curve."""
    both = (modes, modes)
    return {
        "t1": T1Config(modes=both, width=width, depth=depth, sizes=(size, size), init="naive"),
        "fno": FNOConfig(modes=both, width=width, depth=depth),
        "fno-matmul": FNOConfig(modes=both, width=width, depth=depth, fft="matmul"),
        "f-fno": FFNOConfig(modes=both, width=width, depth=depth),
    }


def fields(size: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise: the time of a step does not depend on what is in it."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, samples, size, size, 1), np.float32)
    return x, y


def trainer(config: OperatorConfig | None, size: int, batch: int, batches: int, device: str, **shape: int) -> Any:
    """A trainer of epochs of `batches` steps; None: neuraloperator's FNO of `shape` (modes, width, depth)."""
    x, y = fields(size, batch * batches)
    recipe = TrainConfig(epochs=1, batch_size=batch)
    if config is None:
        modes = shape["modes"]
        return NeuralopTrainer(
            x, y, recipe, modes=(modes, modes), width=shape["width"], depth=shape["depth"], device=device
        )
    return Trainer(make_model(config), x, y, recipe)


def curve(
    sizes: Sequence[int], device: str, batch: int = 16, modes: int = 24, width: int = 48, depth: int = 4
) -> list[tuple[str, int, float]]:
    """(arm, size, seconds a step), the median of three epochs of four steps, compiled beforehand."""
    found = []
    for size in sizes:
        models: dict[str, OperatorConfig | None] = dict(arms(size, modes, width, depth))
        if available():
            models["neuralop"] = None
        for name, config in models.items():
            made = trainer(config, size, batch, 4, device, modes=modes, width=width, depth=depth)
            made.warm_up()
            times = []
            for _ in range(3):
                start = time.perf_counter()
                made.run(1)
                if config is not None:
                    jax.block_until_ready(made.loop)
                times.append(time.perf_counter() - start)
            found.append((name, size, float(np.median(times)) / 4))
            del made
            jax.clear_caches()
    return found
