"""`isotone transform-once ...`: generate, train, evaluate, rollout, modes, benchmark, export, reproduce, bench,
info."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import jax
import numpy as np
import typer

from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError, check_count
from isotone.transform_once import bench as benchmarks
from isotone.transform_once import data as fields_of
from isotone.transform_once import metrics, modes, plots, speed
from isotone.transform_once import reproduce as reproduction
from isotone.transform_once.config import (
    FFNOConfig,
    FNOConfig,
    MLPConfig,
    OperatorConfig,
    T1Config,
    T1UConfig,
    UNetConfig,
)
from isotone.transform_once.data import Fields
from isotone.transform_once.export import export_model
from isotone.transform_once.models import make_model
from isotone.transform_once.operator import Operator
from isotone.transform_once.training import TrainConfig, fit

app = paper_app("transform-once", framework="jax")
Opt = typer.Option
FORMS = "fields: .npz, .h5 (PDEBench), .mat (FNO's), .pt"
KINDS = {
    "t1": T1Config,
    "t1u": T1UConfig,
    "mlp": MLPConfig,
    "fno": FNOConfig,
    "f-fno": FFNOConfig,
    "u-net": UNetConfig,
}
if TYPE_CHECKING:
    Called = typer.Context
else:
    Called = typer.Context.__mro__[1]  # what is handed over: click's own, which versions of typer keep in two places
UNUSED = {
    "t1u": ("width",),
    "mlp": ("init",),
    "fno": ("transform",),
    "f-fno": ("init", "transform"),
    "u-net": ("modes", "width", "init", "transform"),
}
"""Options that a model has no use for."""
STEP_ERRORS = ("relative_l2", "mae", "smape", "psnr")
File = Annotated[Path, typer.Argument(help=FORMS)]
Model = Annotated[Path, typer.Argument(help="the folder that `train` wrote")]
Context = Annotated[int | None, Opt(help="frames a sample starts from, of a file of trajectories (1)")]
Step = Annotated[int | None, Opt(help="frames from the last of them to the target (1)")]
Channels = Annotated[
    bool | None, Opt("--channels/--no-channels", help="whether the arrays' last axis is one of channels")
]


@verb(app)
def generate(
    run: Run,
    problem: Annotated[str, Opt(help=", ".join(fields_of.PROBLEMS))] = "navier-stokes",
    samples: Annotated[int, Opt(help="how many fields (plumes: trajectories)")] = 100,
    size: Annotated[int, Opt(help="points a side (plumes are twice as high)")] = 64,
    viscosity: Annotated[float | None, Opt(help="of navier-stokes (1e-3) and plume (1e-3)")] = None,
    t_final: Annotated[float | None, Opt(help="of navier-stokes (10)")] = None,
    dt: Annotated[float | None, Opt(help="of navier-stokes (0.02)")] = None,
    frames: Annotated[int | None, Opt(help="of plume (60)")] = None,
) -> dict:
    """Solve a problem for fields to train on: fields.npz."""
    with _on(run.device):
        given = {"viscosity": viscosity, "t_final": t_final, "dt": dt, "frames": frames}
        fitting = {
            "navier-stokes": {"viscosity", "t_final", "dt"},
            "joukowski": set(),
            "plume": {"viscosity", "frames"},
        }
        settings = {name: value for name, value in given.items() if value is not None}
        if problem in fitting and (odd := sorted(set(settings) - fitting[problem])):
            raise InputError(f"expected no --{odd[0].replace('_', '-')} for {problem}, got {settings[odd[0]]}")
        made = fields_of.generate(problem, samples, size, _one_seed(run), **settings)
        made.save(run.out / "fields.npz")
        picture = plots.fields(made.inputs[0], made.targets[0], {})
        picture.savefig(run.out / "fields.png", dpi=120)
        shapes = {"inputs": str(made.inputs.shape), "targets": str(made.targets.shape)}
        return {**shapes, "written": str(run.out / "fields.npz")}


@verb(app)
def train(
    run: Run,
    file: File,
    model: Annotated[str, Opt(help=", ".join(KINDS))] = "t1",
    modes: Annotated[str | None, Opt(help="kept an axis: 24, or 24,16; from the data if not given (auto)")] = None,
    width: Annotated[int | None, Opt(help="channels; the model's own if not given")] = None,
    depth: Annotated[int | None, Opt(help="layers")] = None,
    init: Annotated[str | None, Opt(help="vp, naive, kaiming or zero; of t1, t1u and fno")] = None,
    transform: Annotated[str | None, Opt(help="dct (as if not given) or dft, of t1 and mlp")] = None,
    epochs: Annotated[int, Opt(help="of the recipe")] = 100,
    batch_size: Annotated[int, Opt(help="samples a step")] = 20,
    lr: Annotated[float, Opt(help="AdamW's rate")] = 1e-3,
    weight_decay: Annotated[float, Opt(help="AdamW's")] = 1e-4,
    loss: Annotated[str, Opt(help="relative_l2 or mse")] = "relative_l2",
    test: Annotated[float, Opt(help="share of the samples, or trajectories, to test on: the last ones")] = 0.2,
    context: Context = None,
    step: Step = None,
    channels: Channels = None,
    order: Annotated[int, Opt(help="0: the model gives frames; 1, 2: what they add to one or two before")] = 0,
    dtype: Annotated[str, Opt(help="of the layers: float32 or bfloat16")] = "float32",
    checkpoint_every: Annotated[int, Opt(help="epochs between checkpoints")] = 10,
) -> dict:
    """Train an operator on fields; a killed training goes on where it was."""
    with _on(run.device):
        whole = fields_of.load(file, context, step, channels)
        training, testing = whole.increments(order).split(test)
        given = {"modes": modes, "width": width, "depth": depth, "init": init, "transform": transform}
        config = _config(model, training, given, dtype)
        seed = _one_seed(run)
        made = make_model(config, seed)
        recipe = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            loss=loss,
            seed=seed,
            eval_every=max(1, epochs // 10),
        )
        with progress.bar("train", epochs, run.silent) as bar:
            history = fit(
                *(made, training.inputs, training.targets),
                test=(testing.inputs, testing.targets),
                config=recipe,
                checkpoint=run.out / "checkpoints",
                checkpoint_every=checkpoint_every,
                resume=run.resume,
                progress=lambda epoch, value: bar.advance(1, loss=f"{value:.4g}"),
            )
        made.save(run.out)
        frames = {"order": order, "context": whole.frames, "step": whole.step}
        _write(run.out / "run.json", json.dumps({**frames, "data": whole.name, "sha256": whole.sha256}, indent=1))
        _write(run.out / "history.json", json.dumps(dataclasses.asdict(history)))
        _log(run.out / "history.csv", ["epoch", "loss"], list(enumerate(history.loss, 1)))
        kept = {} if isinstance(config, UNetConfig) else {"modes": str(config.axes_modes)}
        return {
            "parameters": made.parameters(),
            **kept,
            f"test relative L2{f', increments of order {order}' if order else ''}": round(history.tests[-1][1], 5),
            **_floor(config, testing.targets),
            "seconds of training": round(history.seconds, 2),
            "written": str(run.out),
        }


@verb(app)
def evaluate(
    run: Run,
    called: Called,
    folder: Model,
    file: File,
    context: Context = None,
    step: Step = None,
    channels: Channels = None,
) -> dict:
    """Errors of a model on fields, a sample each in errors.csv, and a picture of the median one. Windows of a file of
    trajectories are those of the training, where no others are asked for."""
    with _on(run.device):
        model, info = Operator.load(folder), _info(folder)
        given = fields_of.load(file, context, step, channels, windows=(info["context"], info["step"]))
        found = model.predict(given.inputs)
        if found.shape != given.targets.shape:
            raise InputError(f"expected targets of shape {found.shape} in {str(file)!r}, got {given.targets.shape}")
        found = found + given.base(info["order"])
        each = {name: getattr(metrics, name)(found, given.targets) for name in ("relative_l2", "mse", "mae", "psnr")}
        out = _beside(run, called, folder)
        rows = list(zip(range(len(found)), *each.values(), strict=True))
        _log(out / "errors.csv", ["sample", *each], rows)
        middle = int(np.argsort(each["relative_l2"])[len(found) // 2])
        picture = plots.fields(given.inputs[middle], given.targets[middle], {"prediction": found[middle]})
        picture.savefig(out / "prediction.png", dpi=120)
        means = {f"{name.replace('_', ' ')}": _figure(values.mean()) for name, values in each.items()}
        floor = {} if info["order"] else _floor(model.config, given.targets)
        return {**means, **floor, "written": str(out / "errors.csv")}


@verb(app)
def rollout(
    run: Run,
    called: Called,
    folder: Model,
    file: File,
    steps: Annotated[int, Opt(help="frames to predict")] = 10,
    start: Annotated[int | None, Opt(help="frame of each trajectory to begin at (0)")] = None,
    order: Annotated[int | None, Opt(help="0: the model gives frames; 1, 2: what they add; as it was trained")] = None,
    domain: Annotated[str, Opt(help="auto, frequency or physical")] = "auto",
    channels: Channels = None,
) -> dict:
    """Predict frames from the inputs of a file, each a context of one frame or more: rollout.npz.

    Of a file of trajectories, from the first frames of each; the errors against its own frames at every step are in
    rollout-errors.csv.
    """
    with _on(run.device):
        check_count("steps", steps)
        model, info = Operator.load(folder), _info(folder)
        if order is not None and info["known"] and order != info["order"]:
            raise InputError(f"expected --order {info['order']}, which the model was trained for, got {order}")
        order = info["order"] if order is None else order
        if info["context"] > 1 and info["step"] > 1:
            raise InputError(
                f"expected a model of step 1 or of one frame, got step {info['step']} of {info['context']}"
            )
        own = model.config.out_channels
        context = max(1, model.config.in_channels // own)
        given = fields_of.load(file, channels=channels, windows=(context, info["step"]))
        if given.inputs.shape[-1] != model.config.in_channels or given.inputs.shape[-1] % own:
            wanted = f"{model.config.in_channels} channels of frames of {own}"
            raise InputError(f"expected {wanted} in {str(file)!r}, got {given.inputs.shape[-1]}")
        following = given.following(start or 0, steps)
        if following is None and start is not None:
            raise InputError(f"expected no --start for pairs, got {start}")
        if following is not None and info["known"] and given.step != info["step"]:
            raise InputError(f"expected windows of step {info['step']} in {str(file)!r}, got {given.step}")
        inputs = given.inputs if following is None else given.inputs[following[0]]
        frames = np.stack(np.split(inputs, inputs.shape[-1] // own, -1), 1)
        found = model.rollout(frames, steps, order, domain)
        out = _beside(run, called, folder)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=found)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "rollout.npz", buffer.getvalue())
        facts = {"frames": str(found.shape), "finite": bool(np.isfinite(found).all())}
        if following is not None:
            rows = [_errors(found[:, t], following[1][:, t]) for t in range(following[1].shape[1])]
            _log(out / "rollout-errors.csv", ["step", *STEP_ERRORS], [(t, *row) for t, row in enumerate(rows, 1)])
            facts[f"relative L2 at step {len(rows)}"] = _figure(rows[-1][0])
            facts["errors"] = str(out / "rollout-errors.csv")
        return {**facts, "written": str(out / "rollout.npz")}


@verb(app, "modes")
def modes_verb(
    run: Run,
    file: File,
    tol: Annotated[float, Opt(help="mean irreducible relative error to allow")] = 0.02,
    per_axis: Annotated[bool, Opt(help="a number for each axis")] = False,
    context: Context = None,
    step: Step = None,
    channels: Channels = None,
) -> dict:
    """How many modes the targets need, and what each number of them costs: modes.csv, modes.png."""
    targets = fields_of.load(file, context, step, channels).targets[:500]
    most = max(targets.shape[1:-1])
    counts = sorted({max(1, round(most * share / 32)) for share in range(1, 33)})
    rows = []
    for count in counts:
        kept = tuple(min(count, size) for size in targets.shape[1:-1])
        rows.append((count, float(modes.irreducible_error(targets, kept).mean())))
    run.out.mkdir(parents=True, exist_ok=True)
    _log(run.out / "modes.csv", ["modes", "irreducible relative L2"], rows)
    plots.irreducible({file.name: rows}).savefig(run.out / "modes.png", dpi=120)
    chosen = modes.select_modes(targets, tol, per_axis=per_axis)
    return {
        "grid": str(targets.shape[1:-1]),
        f"modes for {tol:g}": str(chosen),
        "irreducible error there": float(f"{modes.irreducible_error(targets, chosen).mean():.4g}"),
        "modes for 99 % of the energy": str(modes.select_modes(targets, energy=0.99)),
        "written": str(run.out / "modes.csv"),
    }


@verb(app)
def benchmark(
    run: Run,
    sizes: Annotated[str, Opt(help="points a side, by commas")] = "64,128,256",
    kept: Annotated[int, Opt("--modes", help="modes an axis")] = 24,
    width: Annotated[int, Opt(help="channels")] = 16,
    depth: Annotated[int, Opt(help="layers")] = 4,
    batch_size: Annotated[int, Opt(help="fields a step")] = 8,
) -> dict:
    """Seconds of a training step by resolution, T1 beside the others: steps.csv, steps.png."""
    with _on(run.device):
        rows = speed.curve(
            _numbers(sizes, "--sizes"), device.resolve(run.device, "jax"), batch_size, kept, width, depth
        )
        run.out.mkdir(parents=True, exist_ok=True)
        _log(run.out / "steps.csv", ["arm", "size", "seconds"], rows)
        plots.step_times(rows).savefig(run.out / "steps.png", dpi=120)
        return {f"{arm} {size}": f"{1000 * seconds:.3g} ms" for arm, size, seconds in rows}


@verb(app)
def export(
    run: Run,
    called: Called,
    folder: Model,
    sizes: Annotated[str, Opt(help="the grid, such as 64,64; that of the training if not given")] = "",
) -> dict:
    """Write a model as one file of jax.export, which runs without this package: model.jax."""
    with _on(run.device):
        model = Operator.load(folder)
        own = getattr(model.config, "sizes", None)
        if not sizes and own is None:
            raise InputError("expected --sizes such as 64,64: the model names no grid")
        grid = _numbers(sizes, "--sizes") if sizes else own
        assert grid is not None
        out = _beside(run, called, folder)
        out.mkdir(parents=True, exist_ok=True)
        path = export_model(model, tuple(grid), out / "model.jax")
        return {"fields": f"(batch, {', '.join(map(str, grid))}, {model.config.in_channels})", "written": str(path)}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    task: Annotated[str | None, Opt(help="one table of the scale")] = None,
) -> Report:
    """Measure the paper's claims again."""
    with _on(run.device):
        return reproduction.reproduce(scale, run, task)


@verb(app)
def bench(run: Run) -> Report:
    """Time training steps and predictions beside FNO's, ours and neuraloperator's."""
    with _on(run.device):
        return benchmarks.bench(run)


@contextmanager
def _on(name: str) -> Iterator[None]:
    where = device.resolve(name, "jax")
    with jax.default_device(jax.devices("cpu" if where == "cpu" else "gpu")[0]):
        yield


def _one_seed(run: Run) -> int:
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed, got --seeds {','.join(map(str, seeds))}")
    return seeds[0]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected {option} as whole numbers by commas, got {text!r}") from None
    if not found or min(found) < 1:
        raise InputError(f"expected {option} of at least 1, got {text!r}")
    return found


def _config(name: str, fields: Fields, given: dict[str, Any], dtype: str) -> OperatorConfig:
    """The model's config, of what was given (None: not) and of the data. Raises `InputError` on what the model has no
    use for."""
    if name not in KINDS:
        raise InputError(f"expected --model to be one of {', '.join(KINDS)}, got {name!r}")
    settings = {key: value for key, value in given.items() if value is not None}
    for key in UNUSED.get(name, ()):
        if key in settings:
            raise InputError(f"expected no --{key} for {name}, got {settings[key]}")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"expected --dtype float32 or bfloat16, got {dtype!r}")
    kind, sizes = KINDS[name], fields.sizes
    settings |= {"in_channels": fields.inputs.shape[-1], "out_channels": fields.targets.shape[-1], "dtype": dtype}
    settings["modes"] = _modes(kind, settings.get("modes", "auto"), fields, settings.get("transform", "dct"))
    if issubclass(kind, T1Config | FNOConfig):
        settings["sizes"] = sizes
    if kind is T1Config and "init" not in settings:
        # what a stack wants whose modes are cut once
        settings |= {"init": "vp", "first_layer_init_only": True}
    return kind(**settings)


def _modes(kind: type[OperatorConfig], said: str, fields: Fields, transform: str) -> tuple[int, ...]:
    """Of each axis, as many as `said`; "auto": as the data needs and the transform has."""
    sizes = fields.sizes
    if kind is UNetConfig:
        return (1,) * len(sizes)  # only how many axes there are counts
    if said != "auto":
        chosen = _numbers(said, "--modes")
        if len(chosen) not in (1, len(sizes)):
            raise InputError(f"expected --modes of 1 or {len(sizes)} numbers for the grid {sizes}, got {said!r}")
        return chosen * len(sizes) if len(chosen) == 1 else chosen
    # the rule of thumb: a third of the error that a model may be expected to reach, here 5 %
    chosen = modes.select_modes(fields.targets[:200], 0.017)
    if issubclass(kind, T1Config) and transform != "dft":
        return chosen
    limits = (*(n // 2 for n in sizes[:-1]), sizes[-1] // 2 + 1)
    return tuple(min(m, limit) for m, limit in zip(chosen, limits, strict=True))


def _info(folder: Path) -> dict[str, Any]:
    """What the training's frames were: order, context and step; of a model that `train` did not write, none is
    known."""
    path = folder / "run.json"
    if not path.is_file():
        return {"order": 0, "context": 1, "step": 1, "known": False}
    try:
        found = json.loads(path.read_text())
        for name, least in (("order", 0), ("context", 1), ("step", 1)):
            check_count(name, found[name], least)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"expected order, context and step in {str(path)!r}: {error}") from None
    return {**found, "known": True}


def _errors(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """The mean over trajectories of each of `STEP_ERRORS` at one step; NaN of frames that have none."""
    with np.errstate(all="ignore"):
        # relative to nothing: a frame that is 0 everywhere
        empty = not truth.reshape(len(truth), -1).any(1).all()
        each = (
            np.nan if empty and name == "relative_l2" else getattr(metrics, name)(found, truth).mean()
            for name in STEP_ERRORS
        )
        return [float(value) for value in each]


def _figure(value: Any) -> float | None:
    """Five digits; None where there is no finite number, which JSON has no word for."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _floor(config: OperatorConfig, targets: np.ndarray) -> dict[str, float]:
    """The least error that the model's modes allow."""
    if not isinstance(config, T1Config) or config.transform != "dct" or config.keep_high:
        return {}
    if any(m > n for m, n in zip(config.axes_modes, targets.shape[1:-1], strict=True)):
        return {}
    return {"irreducible": round(float(modes.irreducible_error(targets, config.axes_modes).mean()), 5)}


def _beside(run: Run, called: Called, folder: Path) -> Path:
    """Beside the model, where no --out was given."""
    source = called.get_parameter_source("out")
    return folder if source is None or source.name.startswith("DEFAULT") else run.out


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())


def _log(path: Path, names: list[str], rows: list[Any]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    _write(path, buffer.getvalue())


def main() -> NoReturn:
    """Entry point of `isotone-transform-once`."""
    run_main(app, "transform-once")
