"""The paper's claims, measured again: T1 beside FNO (ours and neuraloperator's), F-FNO, U-Net and a plain network.

Every arm chooses its rate from as many as the others, by the error on a validation split, and is then trained from each
seed; test errors are of another split. Arms that finished are not run again: a run that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared import device, progress
from isotone.shared.claims import ArmLog, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.data import local, sha256
from isotone.shared.errors import InputError
from isotone.transform_once import claims, modes, peers, plots
from isotone.transform_once.data import Fields, generate, load
from isotone.transform_once.initializers import mixing_scale
from isotone.transform_once.scales import SCALES, Scale, Task
from isotone.transform_once.solvers import plume
from isotone.transform_once.solvers.plume import PlumeConfig
from isotone.transform_once.speed import curve
from isotone.transform_once.study import trained, tuned
from isotone.transform_once.transforms import Transform

VERSION = 4
FILES = {
    "darcy": ("darcy_train_16.npz", "darcy_test_16.npz"),
    "burgers": ("burgers_train_16.npz", "burgers_test_16.npz"),
}
FINER = {"darcy": "darcy_test_32.npz"}
"""The test fields of a file on a finer grid: predicted by the same weights."""


def reproduce(scale: str, run: Run, task: str | None = None) -> Report:
    """Measure every claim at `scale`, or those of one `task`; finished arms in `run.out` are not run again.

    Raises `InputError` on another scale or task, and where gpu or paper find no GPU.
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting = SCALES[scale]
    names = [each.name for each in setting.tasks]
    if task is not None and task not in names:
        raise InputError(f"expected --task to be one of {', '.join(names)}, got {task!r}")
    where = device.resolve(run.device, "jax")
    large = any(each.recipe.epochs * each.samples > 20_000 and each.seconds is None for each in setting.tasks)
    if large and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    begin = time.perf_counter()
    log = ArmLog(run.out, {"scale": scale, "version": VERSION}, run.resume)
    seeds = run.seeds or setting.seeds
    measurements: list[Measurement] = []
    figures: dict[str, Any] = {}
    data: list[dict[str, str]] = []
    for each in setting.tasks:
        if task in (None, each.name) and (fields := _data(each, run.out / "data")) is not None:
            data.append({"name": each.problem + f" {each.name}", "sha256": fields.sha256})
            rows = _rows(each, fields, log, seeds, run, where)
            measurements += claims.compared(each.name, each.words, rows, each.threshold, setting.judged)
            if each.seconds is not None:
                # what was asked of the throughput is of 64 points an axis and more
                measurements += claims.times(each.name, each.words, rows, setting.judged and each.size >= 64)
            figures |= _figures(each, fields, rows)
    measurements += claims.variance(log.arm("variance", partial(variance, setting.draws)))
    if setting.speed:
        steps = log.arm("speed", partial(_speed, setting, where))["rows"]
        figures["speed"] = plots.step_times(steps)
        measurements += claims.speed(steps)
    return Report(
        "transform-once",
        "reproduce",
        scale,
        seeds,
        "jax",
        measurements=measurements,
        data=data,
        seconds=max(log.seconds, time.perf_counter() - begin),
        figures=figures,
    )


def _data(task: Task, folder: Path) -> Fields | None:
    """The task's fields, solved once and kept; of files None where they are away."""
    if task.problem in FILES:
        return _at_hand(*FILES[task.problem])
    total = task.samples + task.valid + task.test
    size = task.solve_size or task.size
    settings = dict(task.settings)
    if task.problem == "plume":
        # so many plumes, of which each frame is a sample
        settings.setdefault("frames", 30)
    said = "-".join([task.problem, str(total), str(size), *(f"{k}{v}" for k, v in sorted(settings.items()))])
    path = folder / f"{said}.npz"
    if not path.is_file():
        generate(task.problem, total, size, 0, **settings).save(path)
    fields = load(path)
    fields = fields.increments(task.order)
    return fields.coarser(task.size) if task.solve_size else fields


def _at_hand(*names: str) -> Fields | None:
    """The samples of several files of `operators` in the folder that ISOTONE_DATA_DIR names, one after the other."""
    paths = [local(f"operators/{name}") for name in names]
    if None in paths:
        return None
    found = [load(path) for path in paths if path is not None]
    inputs, targets = (np.concatenate([getattr(each, what) for each in found]) for what in ("inputs", "targets"))
    return Fields(inputs, targets, ", ".join(names), sha256(inputs.tobytes() + targets.tobytes()))


def _parts(task: Task, fields: Fields) -> tuple[Fields, Fields, Fields]:
    """Training, validation and test, in this order; of plumes whole trajectories."""
    whole = task.samples + task.valid + task.test
    each = len(fields) // whole
    # windows of one time lie together: sample s of plume p is row s * plumes + p
    index = np.arange(len(fields)).reshape(each, whole)
    cuts = (0, task.samples, task.samples + task.valid, whole)
    parts = [fields.take(index[:, a:b].reshape(-1)) for a, b in zip(cuts, cuts[1:], strict=False)]
    return parts[0], parts[1], parts[2]


def _rows(task: Task, fields: Fields, log: ArmLog, seeds: Sequence[int], run: Run, where: str) -> list[dict[str, Any]]:
    train, valid, test = _parts(task, fields)
    frames = None
    if task.rollout:
        config = PlumeConfig(2 * task.size, task.size)
        # plumes that no training saw, from when they have risen
        frames = plume(1000, task.test, task.rollout + 12, config)[:, 10:]
    finer = _at_hand(FINER[task.problem]) if task.problem in FINER else None
    arms = [arm for arm in task.arms if arm.config is not None or peers.available()]
    found = []
    with progress.bar(task.name, len(arms) * (1 + len(seeds)), run.silent) as bar:
        for arm in arms:
            bar.advance(0, arm=arm.name, what="rate")
            tune = partial(tuned, arm, train, valid, task.recipe, seconds=task.seconds, device=where)
            rate = log.arm(f"{task.name} {arm.name} rate", tune)["lr"]
            bar.advance(1)
            for seed in seeds:
                bar.advance(0, arm=arm.name, what=f"seed {seed}")
                own = dataclasses.replace(task.recipe, lr=rate, seed=seed)
                finish = partial(
                    trained,
                    *(arm, train, valid, test, own),
                    seconds=task.seconds,
                    device=where,
                    frames=frames,
                    order=task.order,
                    finer=finer,
                )
                found.append(log.arm(f"{task.name} {arm.name} seed {seed}", finish))
                bar.advance(1)
    return found


def _figures(task: Task, fields: Fields, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    _, _, test = _parts(task, fields)
    samples = {row["arm"]: np.array(row["sample"]) for row in rows if "sample" in row}
    shown = {
        name: samples[name]
        for name in ("t1-naive", "t1-vp-first", "fno", "neuralop", "t1u", "u-net")
        if name in samples
    }
    whole = fields.targets[: min(len(fields), 200)]
    most = min(whole.shape[1:-1])
    counts = sorted({max(1, most * share // 16) for share in range(1, 17)})
    floor = {task.problem: [(m, float(modes.irreducible_error(whole, m).mean())) for m in counts]}
    return {
        f"{task.name}-time": plots.error_against_time(rows, task.words),
        f"{task.name}-fields": plots.fields(test.inputs[0], test.targets[0], shown),
        f"{task.name}-modes": plots.irreducible(floor),
    }


def variance(draws: int, size: int = 64, kept: int = 24, width: int = 24) -> dict[str, float]:
    """Variance a point after one linear layer of the vp initialisation over that before: mean and standard error."""
    transform = Transform("dct", (size, size), (kept, kept))
    scale = mixing_scale("vp", width, width, size * size, kept * kept, False)

    @jax.jit
    def one(field: Any, weights: Any) -> jax.Array:
        block = transform.forward(field)[0].reshape(-1, 1, width)
        return jnp.mean(transform.inverse((block @ (scale * weights)).reshape(1, kept, kept, width)) ** 2)

    rng, shapes = np.random.default_rng(0), ((1, size, size, width), (kept * kept, width, width))
    found = np.array([float(one(*(rng.standard_normal(shape, np.float32) for shape in shapes))) for _ in range(draws)])
    return {"vp": float(found.mean()), "vp_error": float(found.std(ddof=1)) / math.sqrt(draws)}


def _speed(setting: Scale, where: str) -> dict[str, Any]:
    return {"rows": curve(setting.speed, where)}
