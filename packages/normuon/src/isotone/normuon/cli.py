"""`isotone normuon ...`: train, inspect, reproduce, bench, info."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from isotone.normuon import bench as benchmark
from isotone.normuon import reproduce as reproduction
from isotone.normuon import train as training
from isotone.normuon.gpt import GPTConfig
from isotone.normuon.normalize import convert_lr
from isotone.normuon.stats import matrix_stats
from isotone.shared import data, device, progress
from isotone.shared.claims import Report, figure
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("normuon", framework="torch")
Opt = typer.Option


@verb(app)
def train(
    run: Run,
    text: Annotated[Path | None, Opt(help="a file of bytes; default: the interpreter's own library source")] = None,
    optimizer: Annotated[str, Opt(help="adamw, torch-muon, muon or normuon")] = "normuon",
    lr: Annotated[
        float | None, Opt(help="rate of the hidden matrices, in the units of --scale-mode; a usual one if not given")
    ] = None,
    scale_mode: Annotated[str, Opt(help="rms, original, spectral or match_rms_adamw")] = "original",
    steps: Annotated[int, Opt(help="steps")] = 300,
    batch: Annotated[int, Opt(help="windows a step")] = 16,
    dim: Annotated[int, Opt(help="width")] = 64,
    layers: Annotated[int, Opt(help="blocks")] = 2,
    heads: Annotated[int, Opt(help="attention heads")] = 2,
    context: Annotated[int, Opt(help="bytes a window")] = 64,
    checkpoint_every: Annotated[int, Opt(help="steps between checkpoints")] = 50,
) -> dict:
    """Train a small GPT on a file of yours; resumes where it was killed."""
    if checkpoint_every < 1:
        raise InputError(f"expected --checkpoint-every to be at least 1, got {checkpoint_every}")
    try:
        model_config = GPTConfig(dim=dim, layers=layers, heads=heads, context=context)
    except ValueError as error:
        raise InputError(str(error)) from None
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed for one training, got --seeds {','.join(map(str, seeds))}")
    reproduction.check_scale_mode(scale_mode)
    if lr is None:
        lr = 2e-3 if optimizer == "adamw" else convert_lr(0.02, "original", scale_mode, dim, dim)
    config = training.TrainConfig(
        optimizer, lr, scale=scale_mode, steps=steps, batch=batch, seed=seeds[0], model=model_config
    )
    if text is not None:
        parts = training.Text.from_file(text, context)
    else:
        parts = training.Text.from_bytes(data.stdlib_text(1_100_000).encode(), context, "the library source")
    where = device.resolve(run.device)
    with progress.bar(f"{optimizer}", steps, run.silent) as bar:
        model, history = training.train(
            *(config, parts, where, run.out / "checkpoints", checkpoint_every, run.resume),
            on_step=lambda step, loss: bar.advance(1, loss=round(loss, 3)),
        )
    path = training.export(model, run.out / "model")
    (run.out / "history.json").write_text(json.dumps(vars(history), indent=1), encoding="utf-8")
    drawing, axes = figure("Validation loss", "step", "nats a byte")
    axes.plot(history.steps, history.losses, label=optimizer)
    drawing.savefig(run.out / "loss.png", dpi=120)
    return {
        "validation loss (nats a byte)": round(history.losses[-1], 4),
        "steps": history.steps[-1],
        "seconds": round(history.seconds, 1),
        "model": str(path),
        "sample": training.sample(model),
    }


@verb(app)
def inspect(
    run: Run, checkpoint: Annotated[Path, typer.Argument(help="a .safetensors file, or a folder that holds some")]
) -> dict:
    """Row-norm and spectrum statistics of every matrix of a checkpoint."""
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    if not files:
        raise InputError(f"expected .safetensors files in {str(checkpoint)!r}, found none")
    found: dict[str, dict[str, float | None]] = {}
    for path in files:
        if not path.exists():
            raise InputError(f"expected a checkpoint at {str(path)!r}, found none")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_tensor(name)
                    if tensor.ndim < 2 or not tensor.is_floating_point():
                        continue
                    if not tensor.isfinite().all():
                        raise InputError(f"expected finite numbers, got NaN or infinity in {name} of {str(path)!r}")
                    # three dimensions are a batch of matrices, four a convolution, as the optimizer has them
                    several = {f"{name}[{i}]": part for i, part in enumerate(tensor)} if tensor.ndim == 3 else {}
                    for key, matrix in (several or {name: tensor.flatten(1)}).items():
                        if matrix.numel():
                            figures = matrix_stats(matrix.float()).items()
                            found[key] = {k: value if math.isfinite(value) else None for k, value in figures}
        except SafetensorError as error:
            raise InputError(f"expected a safetensors file, got {str(path)!r}: {error}") from None
    if run.json:
        return {"matrices": found}
    if not run.quiet:
        from rich.console import Console
        from rich.table import Column, Table

        table = Table(Column("matrix", no_wrap=True), *next(iter(found.values()), {}))
        for name, stats in found.items():
            table.add_row(name, *("inf" if value is None else f"{value:.3g}" for value in stats.values()))
        Console().print(table)
    return {"matrices": len(found)}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    text: Annotated[Path | None, Opt(help="a file of bytes; default: the interpreter's own library source")] = None,
) -> Report:
    """Measure the paper's claims again, against AdamW and Muon tuned with the same budget."""
    return reproduction.reproduce(scale, run, text)


@verb(app)
def bench(
    run: Run,
    shapes: Annotated[
        str | None,
        Opt(help="gpt-124m (a GPU's default), gpt-1.1b, gpt-5.4b, gpt-124m-layer (a CPU's), gpt-256-layer or tiny"),
    ] = None,
) -> Report:
    """Step time and optimizer memory beside torch.optim.Muon, AdamW and pytorch-optimizer's NorMuon."""
    return benchmark.bench(run, shapes)


def main() -> NoReturn:
    """Entry point of `isotone-normuon`."""
    run_main(app, "normuon")
