"""The paper's claims, measured again. FILL: what is compared with what, on which data, at each scale."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial

import torch

from isotone.quamba2.method import method
from isotone.shared.claims import ArmLog, Claim, Measurement, Report
from isotone.shared.cli import Run

ORDER = Claim(
    id="order",
    statement="FILL: what the paper claims",
    source="FILL: arXiv number, table or section",
    unit="fraction",
    paper=None,
    threshold=1.0,  # FILL: set before measuring, with the reason
    direction="min",
)


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: numbers, never the path."""

    length: int
    seeds: tuple[int, ...]


SCALES = {
    "smoke": Scale(10, (0,)),
    "cpu": Scale(1000, (0, 1, 2, 3, 4)),
    "gpu": Scale(1000, (0, 1, 2, 3, 4)),
    "paper": Scale(1000, (0, 1, 2, 3, 4)),
}


def reproduce(scale: str, run: Run) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again."""
    start = time.perf_counter()
    setting = SCALES[scale]
    seeds = run.seeds or setting.seeds
    arms = ArmLog(run.out, {"scale": scale, "length": setting.length}, run.resume)
    shares = [arms.arm(f"order-{seed}", partial(_arm, setting.length, seed))["share"] for seed in seeds]
    return Report(
        package="quamba2",
        kind="reproduce",
        scale=scale,
        seeds=seeds,
        framework="torch",
        measurements=[Measurement(ORDER, sum(shares) / len(shares))],
        seconds=time.perf_counter() - start,
    )


def _arm(length: int, seed: int) -> dict[str, float]:
    source = random.Random(seed)
    values = method(torch.tensor([source.random() for _ in range(length)])).tolist()
    return {"share": sum(a <= b for a, b in zip(values, values[1:], strict=False)) / (length - 1)}
