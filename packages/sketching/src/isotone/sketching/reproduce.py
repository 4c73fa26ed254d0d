"""The paper's claims, measured again: cheap rounds, bounds, what leaks, and what privacy costs.

One federated problem (scikit-learn's digits over 20 clients, not evenly dealt), problems of known constants, attacks on
what a client sends, and the private mode. Arms that finished are not run again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from isotone.shared import device, progress
from isotone.shared.claims import ArmLog, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.sketching import claims, convergence, plots, privacy, study
from isotone.sketching.audit import AuditConfig, AuditReport, audit_networks
from isotone.sketching.data import Dataset, load
from isotone.sketching.embedding import measure_embedding
from isotone.sketching.models import make_model
from isotone.sketching.private_study import private
from isotone.sketching.scales import SCALES, Scale
from isotone.sketching.sketches import make_sketch
from isotone.sketching.training import run_keys

VERSION = 3
SHOWN = 6
"""Pictures of a row that are kept."""


def reproduce(scale: str, run: Run, data: str = "digits") -> Report:
    """Measure every claim at `scale` on the digits or an .npz of pictures; finished arms in `run.out` are kept.

    Raises `InputError` on another scale, and on "gpu" and "paper" where there is no GPU.
    """
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    where = device.resolve(run.device, "jax")
    if scale in ("gpu", "paper") and where != "cuda":
        raise InputError(f"expected a GPU for --scale {scale}, found none; --scale cpu runs here")
    with jax.default_device(jax.devices("gpu" if where == "cuda" else "cpu")[0]):
        return _reproduce(SCALES[scale], scale, run, data)


def _reproduce(setting: Scale, scale: str, run: Run, data: str) -> Report:
    begin = time.perf_counter()
    source = load(data)
    seeds = tuple(run.seeds or setting.seeds)
    identity = {"scale": scale, "version": VERSION, "data": source.digest, "seeds": list(seeds)}
    log = ArmLog(run.out, identity, run.resume)
    bounds = len(setting.problems) * len(setting.curves) + len(setting.local_curves) + len(setting.sent)
    steps = (
        len(setting.arms)
        + len(setting.kinds)
        + bounds
        + len(setting.trusts)
        + len(setting.audits)
        + setting.ablations
        + 1
    )
    with progress.bar("sketching", steps, run.silent) as bar:

        def arm(name: str, config: Any, function: Callable[[], Any]) -> Any:
            bar.advance(0, arm=name)
            found = log.arm(f"{name}: {config!r}", lambda: {"rows": function()})["rows"]
            bar.advance(1)
            return found

        rows = [
            arm(name, setting.setting, partial(study.compare, source, setting.setting, name, seeds))
            for name in setting.arms
        ]
        draws = setting.curve_draws
        tables = [
            arm(f"embedding {kind}", setting.draws, partial(_embedding, kind, setting.draws)) for kind in setting.kinds
        ]
        curves = [
            arm(f"{problem}, {kind} {s}", draws, partial(convergence.measured, problem, kind, s, draws))
            for problem in setting.problems
            for kind, s in setting.curves
        ]
        curves += [
            arm(
                f"{problem}, {kind} {s}, locally", draws, partial(convergence.measured_locally, problem, kind, s, draws)
            )
            for problem, kind, s in setting.local_curves
        ]
        sent = [
            arm(f"numbers {kind} {s}", draws, partial(convergence.numbers_sent, kind, s, draws))
            for kind, s in setting.sent
        ]
        broken = arm("ablations", None, convergence.ablations) if setting.ablations else None
        audits = {
            name: arm(f"attack {name}", (setting.hidden, config), partial(_audit, source, setting, seeds, config))
            for name, config in setting.audits
        }
        trained = [
            row
            for trust in setting.trusts
            for row in arm(
                f"private, {trust}",
                (setting.setting, setting.private),
                partial(private, source, setting.setting, setting.private, trust, seeds),
            )
        ]
        noises = {row["noise"]: row for row in trained if row["trust"] == "local"} or _untrained(setting)
        hidden = dataclasses.replace(setting.private_audit, noises=(setting.control, *noises))
        under = arm("attack private", (setting.hidden, hidden), partial(_audit, source, setting, seeds, hidden))
    inputs = int(np.prod(source.x.shape[1:]))
    leaks = {name: found["leaks"] for name, found in audits.items()}
    measurements = claims.federated_claims(rows) + claims.embedding_claims(tables)
    measurements += claims.bound_claims(curves, sent, broken) + claims.leak_claims(leaks, inputs)
    measurements += claims.attack_claims(under["leaks"], noises, setting.control) + claims.private_claims(trained)
    return Report(
        "sketching",
        "reproduce",
        scale,
        seeds,
        "jax",
        measurements=measurements if setting.judged else claims.unjudged(measurements),
        data=[{"name": source.name, "sha256": source.digest}],
        seconds=max(log.seconds, time.perf_counter() - begin),
        figures=_figures(rows, curves, audits, under, trained, inputs),
    )


def _embedding(kind: str, draws: int, d: int = 64, s: int = 16) -> dict[str, Any]:
    found = measure_embedding(make_sketch(kind, d, s), draws, jax.random.key(0))
    return {"kind": kind, "d": d, "s": s, **dataclasses.asdict(found)}


def _untrained(setting: Scale) -> dict[float, dict[str, Any]]:
    """The noise of each epsilon, where no training says how many rounds there are."""
    mode = setting.private
    found = [(privacy.calibrate(e, mode.delta, mode.sampling, mode.rounds[-1]), e) for e in mode.epsilons]
    shared = {"accuracy": [], "releases": mode.rounds[-1]}
    return {noise: {"noise": noise, "epsilon": epsilon, **shared} for noise, epsilon in found}


def _audit(source: Dataset, setting: Scale, seeds: tuple[int, ...], config: AuditConfig) -> dict[str, Any]:
    """Attacks on examples of the test split by an attacker who has the training split: weights that were not trained,
    those of each seed."""
    model = make_model("mlp", source.x.shape[1:], source.classes, setting.hidden)
    networks = [model.init(run_keys(seed)[0]) for seed in seeds]
    known = (source.x, source.y)
    report = audit_networks(model, networks, source.test_x, source.test_y, config, known=known, seeds=seeds)
    return {"leaks": report.to_json(), "pictures": kept_pictures(report)}


def kept_pictures(report: AuditReport) -> dict[str, list[Any]]:
    """The first pictures of every row as JSON can say them: (name, pictures), in their order."""
    return {
        sheet: [(name, np.asarray(shown[:SHOWN]).round(3).tolist()) for name, shown in rows.items()]
        for sheet, rows in report.pictures.items()
    }


def _figures(
    rows: list[Any], curves: list[Any], audits: Mapping[str, Any], under: Any, trained: list[Any], inputs: int
) -> dict[str, Any]:
    plain = next(row for row in rows if row["arm"] == "fedavg")
    pictures: dict[str, dict[str, np.ndarray]] = {}
    for found in (*audits.values(), under):
        for sheet, shown in found["pictures"].items():
            # the first audit's rows stay: others of the same sheet are of other attackers
            pictures.setdefault(sheet, {name: np.array(row) for name, row in shown})
    drawn = [leak for name, found in audits.items() if name != "bounded" for leak in found["leaks"]]
    figures = {
        "accuracy-bytes": plots.against_bytes(rows),
        "loss-bytes": plots.against_bytes(rows, "loss"),
    }
    if drawn:
        figures["psnr"] = plots.psnr_by_size(drawn, inputs)
    if curves:
        figures["bounds"] = plots.convergence(curves)
    if trained:
        final = float(np.mean([curve[-1] for curve in plain["accuracy"]]))
        figures["epsilon"] = plots.accuracy_by_epsilon(trained, final)
    if len(np.shape(next(iter(next(iter(pictures.values())).values())))) >= 3:
        for sheet, shown in pictures.items():
            figures[f"sheet-{sheet.replace(' ', '-')}"] = plots.sheet(shown)
    return figures
