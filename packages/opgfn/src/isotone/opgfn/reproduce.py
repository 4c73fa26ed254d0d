"""The paper's claims, measured again (its grids, architecture search, strings and molecules, at our scale).

All arms run on the same networks with the same budget. What each leaves open is tuned on seeds that are not evaluated,
with as many tries each: the baselines' exponent beta, OP's label. The spread is the standard error over seeds of the
(paired) figure.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isotone.opgfn.chem.seh import WEIGHTS
from isotone.opgfn.claims import CLAIMS
from isotone.opgfn.experiments.molecules import MoleculeSetting
from isotone.opgfn.scales import SCALES, TABLES, Scale
from isotone.opgfn.tables import Table, fragments_table, hypergrid_table, moo_table, nas_table, strings_table
from isotone.shared import data, device, progress
from isotone.shared.claims import ArmLog, Claim, Measurement, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError


def reproduce(scale: str, run: Run, tables: tuple[str, ...] = ()) -> Report:
    """Measure every claim at `scale` (of `tables` only, where some are given); finished arms are not run again."""
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise InputError(f"expected --table to be one of {', '.join(TABLES)}, got {unknown[0]!r}")
    setting, where = SCALES[scale], device.resolve(run.device)
    if setting.needs_gpu and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    return measure(setting, scale, run, tables or setting.tables, where)


def measure(setting: Scale, scale: str, run: Run, tables: tuple[str, ...], where: str) -> Report:
    """Every table in turn; a scale is a setting, never another path."""
    start = time.perf_counter()
    seeds = run.seeds or setting.seeds
    found: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    reported: list[tuple[Claim, list[float]]] = []
    log = ArmLog(run.out, {"version": 2, "device": where}, run.resume)
    molecules = available(setting.molecules)
    with progress.bar(f"opgfn {scale}", None, run.silent) as bar:

        def arm(name: str, config: Any, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            bar.advance(0, arm=name)
            key = f"{name} {dataclasses.asdict(config)}"
            result = log.arm(key, function)
            bar.advance(1)
            return result

        table: dict[str, Callable[[], Table]] = {
            "moo-grid": lambda: moo_table(setting, seeds, arm),
            "hypergrid": lambda: hypergrid_table(setting, seeds, arm),
            "nas": lambda: nas_table(setting, seeds, arm),
            "strings": lambda: strings_table(setting, seeds, arm),
            "fragments": lambda: fragments_table(setting, molecules, seeds, arm, where),
        }
        for name in tables:
            values, drawings, rows = table[name]()
            found |= values
            figures |= drawings
            reported += rows
    used = [] if "fragments" not in tables or not any("seh" in m.objectives for m in molecules) else [_seh_provenance()]
    return Report(
        package="opgfn",
        kind="reproduce",
        scale=scale,
        seeds=seeds,
        framework="torch",
        measurements=[
            *(measurement(claim, found.get(claim.id), setting.measured) for claim in CLAIMS.values()),
            *(measurement(claim, values, setting.measured) for claim, values in reported),
        ],
        data=used,
        seconds=max(log.seconds, time.perf_counter() - start),
        figures=figures,
    )


def measurement(claim: Claim, values: list[float] | None, measured: bool) -> Measurement:
    """Mean and standard error over seeds; what this scale cannot tell is None."""
    if not values or not measured:
        return Measurement(claim, None)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measurement(claim, statistics.mean(values), error)


def available(settings: tuple[MoleculeSetting, ...]) -> tuple[MoleculeSetting, ...]:
    """Without the weights of the sEH proxy, the pairs that need them are left out."""
    if data.local(WEIGHTS) is not None:
        return settings
    return tuple(setting for setting in settings if "seh" not in setting.objectives)


def _seh_provenance() -> dict[str, str]:
    path = data.local(WEIGHTS)
    assert path is not None
    return data.provenance("sEH proxy weights (Bengio et al., 2021)", Path(path))
