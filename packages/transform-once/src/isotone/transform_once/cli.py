"""`isotone transform-once ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import jax.numpy as jnp
import typer

from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError
from isotone.transform_once.bench import bench as run_bench
from isotone.transform_once.method import method
from isotone.transform_once.reproduce import SCALES
from isotone.transform_once.reproduce import reproduce as run_reproduce

app = paper_app("transform-once", framework="jax")


@verb(app)
def reproduce(run: Run, scale: Annotated[str, typer.Option(help="smoke, cpu, gpu or paper")] = "smoke") -> Report:
    """Measure the paper's claims again."""
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    return run_reproduce(scale, run)


@verb(app)
def bench(run: Run) -> Report:
    """Time it beside its peers."""
    return run_bench(run)


@verb(app)
def apply(run: Run, file: Annotated[Path, typer.Argument(help="a text file of numbers, one a line")]) -> dict:
    """FILL: the package's own job on the user's own input."""
    try:
        values = [float(line) for line in file.read_text(encoding="utf-8").split()]
    except ValueError as error:
        raise InputError(f"expected a number on each line of {file}: {error}") from None
    run.out.mkdir(parents=True, exist_ok=True)
    target = run.out / "result.txt"
    target.write_text("\n".join(map(str, method(jnp.array(values)).tolist())), encoding="utf-8")
    return {"values": len(values), "written": str(target)}


def main() -> NoReturn:
    """Entry point of `isotone-transform-once`."""
    run_main(app, "transform-once")
