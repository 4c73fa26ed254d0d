"""Speed: T1 beside FNO, ours and neuraloperator's, at equal modes, width and depth, on the same fields and threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.transform_once import peers, plots, speed
from isotone.transform_once.transforms import dct

MODES, WIDTH, DEPTH, BATCH = 24, 16, 4, 8
SIZES = {"cpu": (64, 128, 256), "cuda": (64, 128, 256, 512, 1024)}


def bench(run: Run, sizes: tuple[int, ...] | None = None, rounds: int = 8) -> Report:
    """Training steps by resolution, predictions, and the truncated DCT."""
    begin = time.perf_counter()
    where = device.resolve(run.device, "jax")
    plan: list[Callable[[], list[Ratio]]] = [
        partial(train_rows, size, where, rounds) for size in sizes or SIZES["cuda" if where == "cuda" else "cpu"]
    ]
    plan += [partial(predict_rows, 64, where, rounds), partial(dct_row, where, rounds)]
    ratios: list[Ratio] = []
    with progress.bar("transform-once bench", len(plan), run.silent) as bar:
        for row in plan:
            ratios += row()
            bar.advance(1)
    return Report(
        "transform-once",
        "bench",
        "gpu" if where == "cuda" else "cpu",
        (),
        "jax",
        ratios=ratios,
        seconds=time.perf_counter() - begin,
        figures={"step-time": plots.step_times(_curve(ratios))},
    )


def _curve(ratios: Sequence[Ratio]) -> list[tuple[str, int, float]]:
    """(arm, size, seconds a step) of the training rows."""
    rows = [(r.id.removeprefix("train-").split("-", 1), r) for r in ratios if r.id.startswith("train-")]
    ours = {int(size): ("T1", int(size), r.ours_value) for (size, _), r in rows}
    return [*ours.values(), *((name, int(size), r.peer_value) for (size, name), r in rows)]


def rivals(size: int) -> dict[str, Any]:
    """The FNOs by name, None for neuraloperator's."""
    models: dict[str, Any] = {
        name: config
        for name, config in speed.arms(size, MODES, WIDTH, DEPTH).items()
        if name in ("fno", "fno-matmul", "f-fno")
    }
    return models | ({"neuralop": None} if peers.available() else {})


def version(name: str) -> str:
    """Of the peer called `name`."""
    if name != "neuralop":
        return f"jax {jax.__version__}"
    from importlib.metadata import version as of

    return f"{of('neuraloperator')}, torch {of('torch')}"


def train_rows(size: int, where: str, rounds: int) -> list[Ratio]:
    """An epoch of two steps, T1 beside every FNO; the fastest of them has the target."""
    shape = {"modes": MODES, "width": WIDTH, "depth": DEPTH}
    ours = speed.trainer(speed.arms(size, **shape)["t1"], size, BATCH, 2, where)
    found, memory, own = [], [], ours.memory()
    for name, config in rivals(size).items():
        theirs = speed.trainer(config, size, BATCH, 2, where, **shape)
        timing = compare(_epoch(ours), _epoch(theirs), rounds=max(6, rounds), warmup=2, device=where)
        found.append((name, timing))
        if config is not None:
            memory.append((name, theirs.memory()))
        del theirs
        jax.clear_caches()
    fastest = min((pair for pair in found if pair[0] != "f-fno"), key=lambda pair: pair[1].ratio)[0]
    bar = 10.0 if size >= 256 else 3.0
    return [
        Ratio(
            f"train-{size}-{name}",
            f"a training step of {BATCH} fields of {size} x {size}, {MODES} modes, width {WIDTH}, depth {DEPTH}",
            "T1",
            *(name, version(name)),
            timing.ours_seconds / 2,
            timing.ours_seconds * timing.ratio / 2,
            "s",
            bar if name == fastest else None,
        )
        for name, timing in found
    ] + [
        Ratio(
            f"memory-{size}-{name}",
            f"memory that the program of that step works in, {size} x {size}",
            "T1",
            *(name, version(name)),
            own / 1e6,
            peer / 1e6,
            "MB",
            None,
        )
        for name, peer in memory
    ]


def _epoch(trainer: Any) -> Callable[[], Any]:
    def run() -> Any:
        trainer.run(1)
        return getattr(trainer, "loop", None)

    return run


def predict_rows(size: int, where: str, rounds: int) -> list[Ratio]:
    """Fields to fields: T1 with its two transforms beside the FNOs."""
    x, _ = speed.fields(size, 16)
    from isotone.transform_once.models import make_model

    ours = make_model(speed.arms(size, MODES, WIDTH, DEPTH)["t1"])
    found = []
    for name, config in rivals(size).items():
        shape = {"modes": MODES, "width": WIDTH, "depth": DEPTH}
        theirs = make_model(config) if config is not None else speed.trainer(None, size, 16, 1, where, **shape)
        timing = compare(
            partial(ours.predict, x), partial(theirs.predict, x), rounds=max(6, rounds), warmup=2, device=where
        )
        found.append(
            Ratio(
                f"predict-{size}-{name}",
                f"predictions of 16 fields of {size} x {size}",
                "T1, both transforms",
                *(name, version(name)),
                timing.ours_seconds,
                timing.ours_seconds * timing.ratio,
                "s",
                None,
            )
        )
    return found


def dct_row(where: str, rounds: int) -> list[Ratio]:
    """The truncated transform as matrices beside JAX's whole one and a slice, after both gave the same block."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 64, 64, 24)), jnp.float32)
    ours = jax.jit(lambda x: dct(x, (1, 2), modes=(MODES, MODES)))
    theirs = jax.jit(lambda x: jax.scipy.fft.dctn(x, axes=(1, 2), norm="ortho")[:, :MODES, :MODES])
    if float(jnp.abs(ours(x) - theirs(x)).max()) > 1e-4:
        raise RuntimeError("expected one block of modes from both transforms")
    timing = compare(partial(ours, x), partial(theirs, x), rounds=max(6, rounds), warmup=2, device=where)
    work = f"DCT of 20 fields of 64 x 64 x 24 to {MODES} modes"
    peer = ("jax.scipy.fft.dctn and a slice", f"jax {jax.__version__}")
    seconds = timing.ours_seconds
    return [Ratio("dct", work, "truncated matrices", *peer, seconds, seconds * timing.ratio, "s", 1.0)]
