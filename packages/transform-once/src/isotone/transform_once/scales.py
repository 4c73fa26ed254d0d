"""What changes from one scale of the reproduction to the next: sizes, arms, seconds; never the path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isotone.transform_once.config import (
    FFNOConfig,
    FNOConfig,
    MLPConfig,
    T1Config,
    T1UConfig,
    UNetConfig,
)
from isotone.transform_once.study import Arm
from isotone.transform_once.training import TrainConfig

RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Task:
    """One table: a problem's data, the arms, and how long each is trained.

    `samples` train, `valid` and `test` of them; `settings` of the solver. `seconds` of training an arm, and of each
    rate that it chooses from (None: the recipe's epochs): what is best after fewer is too large. `solve_size`:
    coarsened to `size`.
    `rollout`: how many frames after the context are predicted and measured too; `order` 1: the models give what a frame
    adds to the one before. Problems "darcy" and "burgers" are files, and left out where ISOTONE_DATA_DIR has none.
    """

    name: str
    words: str
    problem: str
    size: int
    samples: int
    valid: int
    test: int
    arms: tuple[Arm, ...]
    recipe: TrainConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    solve_size: int | None = None
    seconds: float | None = None
    threshold: float | None = 0.8
    rollout: int = 0
    order: int = 0


@dataclass(frozen=True)
class Scale:
    """`tasks`; `draws` of the variance test; whether claims are judged; `speed`: sizes of the curve of step times."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 200
    judged: bool = True
    speed: tuple[int, ...] = ()


def spectral(
    size: int, modes: int, width: int, depth: int, rates: tuple[float, ...] = RATES, dims: int = 2, **more: Any
) -> list[Arm]:
    """T1 in its three initialisations, on a grid of `size` points an axis."""
    forms: dict[str, dict[str, Any]] = {
        "t1-vp": {"init": "vp"},
        "t1-naive": {"init": "naive"},
        "t1-vp-first": {"init": "vp", "first_layer_init_only": True},
    }
    shape: dict[str, Any] = {"modes": (modes,) * dims, "sizes": (size,) * dims, "width": width, "depth": depth}
    return [Arm(name, T1Config(**shape, **form, **more), rates) for name, form in forms.items()]


def fnos(modes: int, width: int, depth: int, rates: tuple[float, ...] = RATES, dims: int = 2, **more: Any) -> list[Arm]:
    """Ours, and neuraloperator's of the same shape."""
    config = FNOConfig(modes=(modes,) * dims, width=width, depth=depth, **more)
    return [Arm("fno", config, rates), Arm("neuralop", None, rates, like=config)]


def _equal(size: int) -> tuple[Arm, ...]:
    """Seven models, as large as a CPU trains in minutes."""
    sizes = (size, size)
    return (
        *spectral(size, 16, 16, 4),
        Arm("t1u", T1UConfig(modes=(16, 16), exponent=4, sizes=sizes), RATES),
        *fnos(12, 16, 3)[:1],
        Arm("f-fno", FFNOConfig(modes=(12, 12), width=16, depth=4), RATES),
        Arm("u-net", UNetConfig(exponent=3, depth=5), RATES),
        Arm("mlp", MLPConfig(modes=(16, 16), width=256, depth=4, sizes=sizes), RATES),
    )


_NS = {"viscosity": 1e-3, "t_final": 10.0, "dt": 0.02}
_WALL = Task(
    "wall",
    "Navier-Stokes nu = 1e-3, T = 10, 64 x 64, 300 samples, 25 s of training",
    "navier-stokes",
    *(64, 300, 60, 100),
    (*spectral(64, 16, 16, 4), *fnos(12, 16, 3), Arm("mlp", MLPConfig(modes=(16, 16), width=256, depth=4), RATES)),
    TrainConfig(batch_size=20),
    _NS,
    seconds=25.0,
    threshold=1.0,
)
_EQUAL = Task(
    "equal",
    "The same fields at 32 x 32, 30 epochs for all",
    "navier-stokes",
    *(32, 300, 60, 100),
    _equal(32),
    TrainConfig(batch_size=20, epochs=30),
    _NS,
    solve_size=64,
    threshold=0.8,
)

_DARCY = Task(
    "darcy",
    "Darcy's flow of neuraloperator's files, 16 x 16, 900 samples, 8 s of training",
    "darcy",
    *(16, 900, 100, 50),
    (
        *spectral(16, 12, 16, 4),
        *fnos(8, 16, 4),
        Arm("mlp", MLPConfig(modes=(12, 12), width=256, sizes=(16, 16)), RATES),
    ),
    TrainConfig(batch_size=20),
    seconds=8.0,
    threshold=1.0,
)
_BURGERS = Task(
    "burgers",
    "Burgers' equation of neuraloperator's files, 16 points, 700 samples, 8 s of training",
    "burgers",
    *(16, 700, 100, 400),
    (
        *spectral(16, 12, 32, 4, dims=1),
        *fnos(8, 32, 4, dims=1),
        Arm("mlp", MLPConfig(modes=(12,), width=256, sizes=(16,)), RATES),
    ),
    TrainConfig(batch_size=20),
    seconds=8.0,
    threshold=1.0,
)


def _paper_ns(name: str, words: str, viscosity: float, t_final: float, epochs: int, samples: int) -> Task:
    """Section 2.8's arms on the generator's fields."""
    return Task(
        name,
        words,
        "navier-stokes",
        *(64, samples, 100, 200),
        (
            *spectral(64, 24, 48, 8, (1e-3,)),
            Arm("t1u", T1UConfig(modes=(24, 24), exponent=6, sizes=(64, 64)), (1e-3,)),
            *fnos(24, 32, 6, (1e-3,)),
            Arm("f-fno", FFNOConfig(), (1e-3,)),
            Arm("u-net", UNetConfig(exponent=6), (1e-3,)),
        ),
        TrainConfig(batch_size=64, epochs=epochs),
        {"viscosity": viscosity, "t_final": t_final, "dt": 2e-3, "solve_size": 128},
    )


def _airfoils(size: int, modes: int, samples: int, epochs: int, widths: tuple[int, int, int]) -> Task:
    more: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
    t1, fno, exponent = widths
    return Task(
        "airfoils",
        f"Joukowski airfoils, {size} x {size}",
        "joukowski",
        *(size, samples, samples // 8, samples // 4),
        (
            *spectral(size, modes, t1, 6, (1e-3,), **more),
            Arm("t1u", T1UConfig(modes=(modes, modes), exponent=exponent, sizes=(size, size), **more), (1e-3,)),
            *fnos(size // 2 - 1 if size < 64 else 64, fno, 6, (1e-3,), **more),
            Arm("u-net", UNetConfig(exponent=exponent, **more), (3e-3,)),
        ),
        TrainConfig(batch_size=64 if samples > 200 else 16, epochs=epochs, every=0.25, factor=0.6),
    )


def _plumes(size: int, modes: int, samples: int, epochs: int, batch: int) -> Task:
    more: dict[str, Any] = {"in_channels": 2, "out_channels": 1}
    tall = (2 * size, size)
    return Task(
        "plume",
        f"Plume of {2 * size} x {size}, two frames to the next, and rollouts of 10",
        "plume",
        *(size, samples, max(1, samples // 8), max(1, samples // 4)),
        (
            Arm(
                "t1-naive", T1Config(modes=(modes, modes), width=24, depth=4, sizes=tall, init="naive", **more), (1e-3,)
            ),
            Arm("t1-vp", T1Config(modes=(modes, modes), width=24, depth=4, sizes=tall, **more), (1e-3,)),
            Arm("t1u", T1UConfig(modes=(modes, modes), exponent=5, sizes=tall, **more), (1e-3,)),
            *fnos(min(48, size // 2 - 1), 24, 4, (1e-3,), **more),
            Arm("u-net", UNetConfig(exponent=5, **more), (1e-3,)),
        ),
        TrainConfig(batch_size=batch, epochs=epochs, schedule="cosine"),
        {"frames": 30},
        rollout=10,
        order=1,
    )


_SMOKE = Task(
    "wall",
    "Navier-Stokes at 16 x 16, 0.2 s of training",
    "navier-stokes",
    *(16, 40, 10, 10),
    (
        *spectral(16, 8, 8, 1, (3e-3,))[1:2],
        *fnos(4, 8, 1, (3e-3,))[:1],
    ),
    TrainConfig(batch_size=10),
    {"viscosity": 1e-3, "t_final": 1.0, "dt": 0.05},
    seconds=0.2,
    threshold=1.0,
)
SCALES = {
    "smoke": Scale((_SMOKE,), seeds=(0,), draws=20, judged=False),
    "cpu": Scale((_WALL, _EQUAL, _DARCY, _BURGERS)),
    "gpu": Scale(
        (
            _paper_ns("ns3", "Navier-Stokes nu = 1e-3, T = 50", 1e-3, 50.0, 200, 1000),
            _paper_ns("ns4", "Navier-Stokes nu = 1e-4, T = 15", 1e-4, 15.0, 200, 1000),
            _airfoils(128, 100, 2000, 60, (24, 42, 6)),
            _plumes(128, 64, 16, 20, 16),
        ),
        speed=(64, 128, 256, 512, 1024),
    ),
    "paper": Scale(
        (
            _paper_ns("ns3", "Navier-Stokes nu = 1e-3, T = 50", 1e-3, 50.0, 500, 1000),
            _paper_ns("ns4", "Navier-Stokes nu = 1e-4, T = 15", 1e-4, 15.0, 500, 1000),
            _airfoils(128, 100, 8000, 400, (24, 42, 6)),
            _plumes(128, 64, 64, 50, 16),
        ),
        seeds=tuple(range(8)),
        speed=(64, 128, 256, 512, 1024),
    ),
}
