"""The paper's claims, measured again.

The scan's ladder on drawn layers (what each way to scale x, B and C costs), a byte-level Mamba2 trained on the
interpreter's own library source with and without planted gains (the premise, and every row of the ablation), bytes of
the 2.7B and 8B shapes counted on the meta device, and on a GPU the speed of those shapes. Finished arms are not run
again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from isotone.quamba2 import claims, plots, shapes, small, speed, synthetic
from isotone.quamba2.small import LADDER, OTHERS, SIGMA, Recipe
from isotone.shared import device, progress
from isotone.shared.claims import ArmLog, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.data import local, provenance, stdlib_text
from isotone.shared.errors import InputError

VERSION = 1
CHECKPOINT = "quamba2"
"""The folder in ISOTONE_DATA_DIR that scale paper reads: `model`, and the texts named here."""
TEXTS = ("calibration.txt", "test.txt")


@dataclasses.dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: numbers, never the path.

    `seeds` of the scan's ladder, of which the first `trained` train the small model by `recipe` on `text` bytes and
    score the rows `names`; `samples` of `length` bytes calibrate, `scored` are scored. `more_heads`: the ladder with 64
    heads too. `memory`: shapes whose bytes are counted; `speed`: shapes that are timed. `judged`: whether it is enough
    for verdicts. `checkpoint`: rows of a real model too.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    trained: int = 3
    recipe: Recipe = Recipe(steps=400)
    text: int = 4_000_000
    names: tuple[str, ...] = (*LADDER, *OTHERS)
    samples: int = 32
    scored: int = 32
    length: int = 128
    more_heads: bool = True
    memory: tuple[str, ...] = ("2.7b", "8b")
    speed: tuple[str, ...] = ()
    judged: bool = True
    checkpoint: bool = False


LARGE = Recipe(hidden=512, layers=12, head_dim=64, state=64, steps=1500, batch=32, length=256, rate=1e-3)
SCALES = {
    "smoke": Scale(
        seeds=(0,),
        trained=1,
        recipe=Recipe(layers=1, steps=8, batch=4, length=64),
        text=100_000,
        names=("+ GPTQ", "+ SnC"),
        samples=4,
        scored=4,
        length=64,
        more_heads=False,
        judged=False,
    ),
    "cpu": Scale(),
    "gpu": Scale(recipe=LARGE, text=10_000_000, samples=128, scored=64, length=256, speed=("2.7b", "8b")),
    "paper": Scale(
        recipe=LARGE,
        text=10_000_000,
        samples=512,
        scored=64,
        length=512,
        speed=("2.7b", "8b"),
        checkpoint=True,
    ),
}


def reproduce(scale: str, run: Run, settings: Scale | None = None) -> Report:
    """Measure every claim at `scale`; arms that are finished in `run.out` are not run again.

    Raises `InputError` on another scale, where gpu or paper find no GPU, and where paper finds no checkpoint.
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    setting, where = settings or SCALES[scale], device.resolve(run.device)
    if any(name != "tiny" for name in setting.speed) and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    folder = _checkpoint() if setting.checkpoint else None
    begin = time.perf_counter()
    seeds = run.seeds or setting.seeds
    log = ArmLog(run.out, {"scale": scale, "version": VERSION, **dataclasses.asdict(setting)}, run.resume)
    text = stdlib_text(setting.text)
    measurements, figures = _scan(setting, seeds, log, run)
    for sigma in (0.0, SIGMA):
        found, drawn = _small(setting, seeds[: setting.trained], sigma, text, log, run, where)
        measurements += found
        figures |= drawn
    for name in setting.memory:
        measurements += claims.memory(name, log.arm(f"memory {name}", partial(shapes.memory, name)))
    for name in setting.speed or ("2.7b", "8b"):
        found_here: dict[str, float | None] = {}
        if setting.speed:
            found_here |= log.arm(f"speed {name}", partial(speed.ratios, name, where))
            found_here |= log.arm(f"scan {name}", partial(speed.scan_ratio, name, where))
        measurements += claims.speed(name, found_here)
    data = [provenance("Python's standard library, source", text.encode())]
    if folder is not None:
        measurements += _released(folder, setting, log, where)
        data += [provenance(name, folder / name) for name in TEXTS]
    return Report(
        "quamba2",
        "reproduce",
        scale,
        seeds,
        "torch",
        measurements=measurements,
        data=data,
        seconds=max(log.seconds, time.perf_counter() - begin),
        figures=figures,
    )


def _scan(setting: Scale, seeds: Sequence[int], log: ArmLog, run: Run) -> tuple[list[Measurement], dict[str, Any]]:
    rows: dict[int, list[dict[str, float]]] = {16: [], 64: []}
    with progress.bar("scan", len(seeds) * (1 + setting.more_heads), run.silent) as bar:
        for heads in (16, 64) if setting.more_heads else (16,):
            for seed in seeds:
                rows[heads].append(log.arm(f"scan {heads} {seed}", partial(synthetic.ladder, seed, heads)))
                bar.advance(1, heads=heads, seed=seed)
    figures = {
        "scan": plots.ladder(rows[16], [arm for arm in claims.WORDS if not arm.startswith("BC")]),
        "profiles": _profiles(seeds[0]),
    }
    return claims.scan(rows[16], rows[64], setting.judged), figures


def _profiles(seed: int) -> Any:
    drawn = synthetic.draw(seed)
    return plots.profiles(synthetic.magnitudes(drawn), drawn.sizes.head_dim, drawn.sizes.groups)


def _small(
    setting: Scale, seeds: Sequence[int], sigma: float, text: str, log: ArmLog, run: Run, where: str
) -> tuple[list[Measurement], dict[str, Any]]:
    what = "planted gains" if sigma else "no planted gains"
    found = []
    recipe = setting.recipe
    with progress.bar(what, len(seeds) * (recipe.steps + len(setting.names)), run.silent) as bar:

        def advance(seed: int, said: float | str) -> None:
            bar.advance(1, seed=seed, now=round(said, 3) if isinstance(said, float) else said)

        for seed in seeds:
            arm = partial(_arm, setting, seed, sigma, text, where, partial(advance, seed))
            found.append(log.arm(f"small {sigma} {seed}", arm))
    premise = [one["premise"] for one in found]
    rows = [one["rows"] for one in found]
    figures = {f"rows-{'planted' if sigma else 'plain'}": plots.rows(rows, found[0]["bytes"], setting.names, what)}
    return [*claims.premise(what, premise), *claims.ablation(what, rows, setting.judged)], figures


def _arm(
    setting: Scale, seed: int, sigma: float, text: str, where: str, advance: Callable[[float | str], None]
) -> dict[str, Any]:
    training, held_out = small.corpus(text)
    model = small.train(setting.recipe, training, seed, sigma, where, advance)
    calibration = [row[0] for row in small.windows(training, setting.samples, setting.length)]
    scored = small.windows(held_out, setting.scored, setting.length)
    return {
        "premise": small.persistence(model, scored),
        "rows": small.rows_of(model, setting.names, calibration, scored, seed, advance),
        "bytes": small.bytes_of(model, setting.names),
    }


def _checkpoint() -> Path:
    found = local(f"{CHECKPOINT}/model/config.json")
    missing = [name for name in TEXTS if local(f"{CHECKPOINT}/{name}") is None]
    if found is None or missing:
        raise InputError(
            f"expected a Mamba2 at {CHECKPOINT}/model and the texts {', '.join(TEXTS)} beside it in the folder that "
            "ISOTONE_DATA_DIR names, for --scale paper"
        )
    return found.parent.parent


def _released(folder: Path, setting: Scale, log: ArmLog, where: str) -> list[Measurement]:
    """Every row of the ablation on the checkpoint in `folder`."""
    from isotone.quamba2.loading import load
    from isotone.quamba2.texts import encode, read

    def rows() -> dict[str, Any]:
        model = load(folder / "model").to(where)
        known, held = (encode(read(folder / name), folder / "model", model.config.vocab_size) for name in TEXTS)
        calibration = [row[0] for row in small.windows(known, setting.samples, setting.length)]
        return small.rows_of(model, setting.names, calibration, small.windows(held, setting.scored, setting.length))

    return claims.ablation("checkpoint", [log.arm("checkpoint", rows)], setting.judged)
