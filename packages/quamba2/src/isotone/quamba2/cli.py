"""`isotone quamba2 ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from isotone.quamba2.bench import bench as run_bench
from isotone.quamba2.method import method
from isotone.quamba2.reproduce import SCALES
from isotone.quamba2.reproduce import reproduce as run_reproduce
from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("quamba2", framework="torch")


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
    target.write_text("\n".join(map(str, method(torch.tensor(values)).tolist())), encoding="utf-8")
    return {"values": len(values), "written": str(target)}


def main() -> NoReturn:
    """Entry point of `isotone-quamba2`."""
    run_main(app, "quamba2")
