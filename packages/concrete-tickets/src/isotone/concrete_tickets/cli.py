"""`isotone concrete-tickets ...`: search, train, ltr, sanity, compare, export, reproduce, bench, info."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import numpy as np
import typer

from isotone.concrete_tickets import bench as benchmark
from isotone.concrete_tickets import folder as runs
from isotone.concrete_tickets import lottery, plots
from isotone.concrete_tickets import reproduce as reproduction
from isotone.concrete_tickets.arms import Arm, Experiment
from isotone.concrete_tickets.images import FORMS
from isotone.concrete_tickets.layout import Layout, named_weights
from isotone.concrete_tickets.objectives import OBJECTIVES, resolve_objective
from isotone.concrete_tickets.sanity import sanity_check
from isotone.concrete_tickets.search import SearchConfig
from isotone.concrete_tickets.study import Study
from isotone.concrete_tickets.ticket import Ticket
from isotone.concrete_tickets.torch_masks import torch_state
from isotone.concrete_tickets.training import Recipe
from isotone.concrete_tickets.training import train as train_network
from isotone.concrete_tickets.weights import load_arrays, load_weights, save_weights
from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import ArmLog, Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("concrete-tickets", framework="jax")
Opt = typer.Option
Data = Annotated[str, Opt(help=FORMS)]
ModelName = Annotated[str, Opt(help="mlp, lenet, resnet20 or vgg16")]
Epochs = Annotated[int, Opt(help="epochs of the recipe")]
Batch = Annotated[int, Opt(help="batch size")]
Rate = Annotated[float, Opt(help="SGD's learning rate")]
Decay = Annotated[float, Opt(help="weight decay")]
Rewind = Annotated[int, Opt(help="epochs before the rewind point")]
RunFolder = Annotated[Path, typer.Argument(help="the folder that `search` or `ltr` wrote")]


@verb(app)
def search(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    density: Annotated[float, Opt(help="share of the prunable weights to keep, in (0, 1]; N:M has its own")] = 0.0074,
    objective: Annotated[str, Opt(help=", ".join(OBJECTIVES))] = "kl",
    when: Annotated[str, Opt(help="rewind or init: the weights that are searched")] = "rewind",
    epochs: Epochs = 40,
    batch_size: Batch = 128,
    lr: Rate = 0.1,
    weight_decay: Decay = 5e-4,
    rewind: Rewind = 3,
    search_epochs: Annotated[int, Opt(help="epochs of the search")] = 40,
    search_lr: Annotated[float, Opt(help="Adam's learning rate for the logits")] = 0.1,
    controller: Annotated[str, Opt(help="grad_balance or lagrangian")] = "grad_balance",
    structure: Annotated[str, Opt(help="weight, input, output or N:M")] = "weight",
    parametrization: Annotated[str, Opt(help="scaled or standard")] = "scaled",
    checkpoint_every: Annotated[int, Opt(help="epochs between checkpoints")] = 10,
) -> dict:
    """Find a ticket by Concrete Ticket Search; resumes where it was killed."""
    with _on(run.device):
        _check_when(when, checkpoint_every)
        resolve_objective(objective)
        config = SearchConfig(
            epochs=search_epochs,
            batch_size=batch_size,
            lr=search_lr,
            controller=controller,
            structure=structure,
            parametrization=parametrization,
        )
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay)
        experiment = Experiment.load(data, model, recipe, rewind if when == "rewind" else 0, config)
        seed = _one_seed(run)
        wanted = None if ":" in structure else density
        _count(experiment, wanted, structure)
        told = {"method": "search", "density": wanted, "objective": objective, "search": dataclasses.asdict(config)}
        settings = runs.settings_of(experiment, data, model, seed, **told)
        runs.begin(run.out, settings, run.resume)
        start = experiment.start(seed)
        begin = time.perf_counter()
        arm = Arm("cts", objective)
        with progress.bar("search", quiet=run.silent):
            result = experiment.search(
                *(start, wanted, arm, seed),
                checkpoint=run.out / "checkpoints" / "search",
                checkpoint_every=checkpoint_every,
                resume=run.resume,
            )
        seconds = time.perf_counter() - begin
        history = {name: values.tolist() for name, values in result.history.items()}
        runs.finish(run.out, settings, start.rewind, result.ticket, result.logits, history)
        return _said(run, result.ticket, {"arm": f"cts:{objective}", "seconds of this call": round(seconds, 2)})


@verb(app)
def ltr(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    density: Annotated[float, Opt(help="share of the prunable weights to keep, in (0, 1]")] = 0.0074,
    keep: Annotated[float, Opt(help="share that each round keeps")] = 0.8,
    when: Annotated[str, Opt(help="rewind (LTR) or init (IMP)")] = "rewind",
    epochs: Epochs = 40,
    batch_size: Batch = 128,
    lr: Rate = 0.1,
    weight_decay: Decay = 5e-4,
    rewind: Rewind = 3,
) -> dict:
    """Find a ticket by iterative magnitude pruning with rewinding; goes on with the round it was killed in."""
    with _on(run.device):
        _check_when(when, 1)
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay)
        experiment = Experiment.load(data, model, recipe, rewind if when == "rewind" else 0)
        _count(experiment, density)
        total = lottery.rounds_to(density, keep)
        seed = _one_seed(run)
        settings = runs.settings_of(experiment, data, model, seed, method="ltr", density=density, keep=keep)
        runs.begin(run.out, settings, run.resume)
        start = experiment.start(seed)
        folder = run.out / "rounds"
        with progress.bar("rounds", total, run.silent) as bar:

            def train_fn(params: Any, ticket: Ticket) -> Any:
                bar.advance(1, kept=ticket.kept)
                return train_network(
                    *(experiment.trainer, params, experiment.data),
                    key=start.key,
                    ticket=ticket,
                    first=experiment.rewind,
                ).params

            where = experiment.model.where
            tickets = lottery.imp(
                *(train_fn, start.rewind, density),
                keep=keep,
                where=where,
                folder=folder,
                identity={"training": experiment.said(), "first": experiment.rewind},
            )
        runs.finish(run.out, settings, start.rewind, tickets[-1])
        seconds = lottery.round_seconds(folder)
        return _said(run, tickets[-1], {"arm": "ltr", "rounds": total, "seconds": round(seconds, 2)})


@verb(app)
def train(
    run: Run,
    folder: RunFolder,
    checkpoint_every: Annotated[int, Opt(help="epochs between checkpoints")] = 10,
) -> dict:
    """Train the ticket of a folder from its rewind weights; resumes where it was killed."""
    with _on(run.device):
        _check_when("rewind", checkpoint_every)
        opened = runs.open_run(folder)
        experiment, start, ticket = opened.experiment, opened.start, opened.ticket
        out = _out(run, folder)
        trained = train_network(
            *(experiment.trainer, start.rewind, experiment.data),
            key=start.key,
            ticket=ticket,
            first=experiment.rewind,
            checkpoint=out / "checkpoints" / "train",
            checkpoint_every=checkpoint_every,
            resume=run.resume,
        )
        save_weights(out / "sparse.safetensors", trained.params, {"run": opened.stamp})
        return {
            "test accuracy (%)": round(100 * experiment.evaluate(trained.params), 2),
            "kept": f"{ticket.kept} of {ticket.total}",
            "written": str(out / "sparse.safetensors"),
        }


@verb(app)
def sanity(run: Run, folder: RunFolder) -> dict:
    """Train a ticket and its changes: shuffled in each layer, inverted, and with weights drawn again."""
    with _on(run.device):
        opened = runs.open_run(folder)
        experiment, start, ticket = opened.experiment, opened.start, opened.ticket
        logits = runs.own(folder / "logits.safetensors", opened.stamp)
        # a ticket of everything was not searched for, and has none
        scores = {n: jax.numpy.asarray(a) for n, a in (load_arrays(logits) if logits else {}).items()} or None

        def evaluate(params: Any, other: Ticket) -> float:
            return experiment.finish(start, other, weights=params)[1]

        report = sanity_check(ticket, start.rewind, evaluate, key=jax.random.fold_in(start.key, 9), scores=scores)
        out = _out(run, folder)
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"arm": name, "density": ticket.density, "layers": t.layer_densities()}
            for name, t in {"ticket": ticket, **report.tickets}.items()
        ]
        plots.layer_densities(rows, ticket.density).savefig(out / "sanity.png", dpi=120)
        passed = report.passed()
        found = {"ticket (%)": round(100 * report.accuracy, 2)}
        for name, value in report.changed.items():
            words = "passed: the change hurts" if passed[name] else "not passed"
            found[f"{name} (%)"] = f"{100 * value:.2f}, {words}"  # type: ignore[assignment]
        runs.write_json(out / "sanity.json", {"ticket": report.accuracy, **report.changed})
        return found


@verb(app)
def compare(
    run: Run,
    arms: Annotated[str, Opt(help="METHOD[:OPTION][@init], by commas")] = "cts,ltr,snip,synflow,magnitude,random",
    density: Annotated[str, Opt(help="densities by commas")] = "0.05,0.0074",
    data: Data = "digits",
    model: ModelName = "mlp",
    epochs: Epochs = 40,
    batch_size: Batch = 128,
    lr: Rate = 0.1,
    weight_decay: Decay = 5e-4,
    rewind: Rewind = 3,
    search_epochs: Annotated[int, Opt(help="epochs of the search")] = 40,
) -> dict:
    """Accuracy and seconds of several ways to a ticket, from the same weights; three plots."""
    with _on(run.device):
        names = [name.strip() for name in arms.split(",")]
        for name in names:
            Arm.parse(name)
        densities = _densities(density)
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay)
        config = SearchConfig(epochs=search_epochs, batch_size=batch_size)
        experiment = Experiment.load(data, model, recipe, rewind, config)
        for value in densities:
            _count(experiment, value)
        identity = repr((experiment.recipe, experiment.config, experiment.rewind, experiment.model.name))
        log = ArmLog(run.out, {"data": experiment.images.sha256, "config": identity}, run.resume)
        rows = Study(experiment, log, run).rows(names, densities, run.seeds or (0,))
        run.out.mkdir(parents=True, exist_ok=True)
        runs.write_json(run.out / "compare.json", rows)
        plots.accuracy_against_density(rows).savefig(run.out / "accuracy-density.png", dpi=120)
        plots.accuracy_against_time(rows, densities[-1]).savefig(run.out / "accuracy-time.png", dpi=120)
        plots.layer_densities(rows, densities[-1]).savefig(run.out / "layers.png", dpi=120)
        found: dict[str, Any] = {}
        for name in names:
            for value in densities:
                mine = [row for row in rows if row["arm"] == name and row["density"] == value]
                accuracies = [row["accuracy"] for row in mine]
                seconds = [row["ticket_seconds"] for row in mine], [row["train_seconds"] for row in mine]
                compiled = mine[0]["first_seconds"]
                found[f"{name} at {100 * value:.3g} %"] = (
                    f"{np.mean(accuracies):.2f} ± {np.std(accuracies):.2f} %, "
                    f"ticket {np.median(seconds[0]):.2f} s, training {np.median(seconds[1]):.2f} s"
                    + (f", first run with compiling {compiled:.2f} s" if compiled else "")
                )
        return {**found, "written": str(run.out / "compare.json")}


@verb(app)
def export(
    run: Run,
    folder: RunFolder,
    format: Annotated[str, Opt(help="npz (with zeros), safetensors (with masks) or torch")] = "safetensors",
) -> dict:
    """Write a trained ticket (or, untrained, its rewind weights) for other tools."""
    with _on(run.device):
        if format not in ("npz", "safetensors", "torch"):
            raise InputError(f"expected --format to be npz, safetensors or torch, got {format!r}")
        opened = runs.open_run(folder)
        experiment, rewind, ticket = opened.experiment, opened.start.rewind, opened.ticket
        sparse = runs.own(folder / "sparse.safetensors", opened.stamp)
        params = load_weights(sparse, rewind) if sparse else ticket.apply(rewind)
        out = _out(run, folder)
        out.mkdir(parents=True, exist_ok=True)
        leaves = named_weights(params, lambda name, leaf: True)
        arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        path = out / {"npz": "dense.npz", "safetensors": "model.safetensors", "torch": "torch.safetensors"}[format]
        if format == "npz":
            import io

            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            atomic_write(path, buffer.getvalue())
        elif format == "safetensors":
            masks = {f"{name}.mask": np.asarray(mask) for name, mask in ticket.masks.items()}
            save_weights(path, {**arrays, **masks})
        else:
            # the names and the order of axes of torch.nn.utils.prune: weight_orig and weight_mask
            save_weights(path, torch_state(arrays, ticket.masks, experiment.model.flattened))
        return {"format": format, "trained": sparse is not None, "written": str(path)}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    data: Annotated[str | None, Opt(help=f"{FORMS}; the scale's own if not given")] = None,
) -> Report:
    """Measure the paper's claims again."""
    with _on(run.device):
        return reproduction.reproduce(scale, run, data)


@verb(app)
def bench(run: Run) -> Report:
    """Time a search step beside a training step, and beside an eager PyTorch loop of the same search."""
    with _on(run.device):
        return benchmark.bench(run)


@contextmanager
def _on(name: str) -> Iterator[None]:
    where = device.resolve(name, "jax")
    with jax.default_device(jax.devices("cpu" if where == "cpu" else "gpu")[0]):
        yield


def _check_when(when: str, checkpoint_every: int) -> None:
    if when not in ("rewind", "init"):
        raise InputError(f"expected --when to be rewind or init, got {when!r}")
    if checkpoint_every < 1:
        raise InputError(f"expected --checkpoint-every to be at least 1, got {checkpoint_every}")


def _one_seed(run: Run) -> int:
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed for one ticket, got --seeds {','.join(map(str, seeds))}")
    return seeds[0]


def _densities(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"expected --density as numbers by commas such as 0.05,0.01, got {text!r}") from None


def _count(experiment: Experiment, density: float | None, structure: str = "weight") -> None:
    """Refuse what cannot be kept, before anything is trained."""
    Layout.of(experiment.model.shapes, experiment.model.where, structure).check_density(density)


def _out(run: Run, folder: Path) -> Path:
    """Beside the ticket, where no --out was given; never into another run's folder."""
    default = Path("isotone-results") / "concrete-tickets"
    if run.out == default:
        return folder
    if (run.out / "run.json").exists() and run.out.resolve() != folder.resolve():
        raise InputError(f"expected --out without a run of its own, found another run in {str(run.out)!r}")
    return run.out


def _said(run: Run, ticket: Ticket, facts: dict[str, Any]) -> dict[str, Any]:
    layers = {name: f"{100 * share:.3g} %" for name, share in ticket.layer_densities().items()}
    kept = f"{ticket.kept} of {ticket.total} ({100 * ticket.density:.3g} %)"
    collapsed = {"collapsed": ", ".join(ticket.collapsed())} if ticket.collapsed() else {}
    return {**facts, "kept": kept, **layers, **collapsed, "written": str(run.out / "ticket.safetensors")}


def main() -> NoReturn:
    """Entry point of `isotone-concrete-tickets`."""
    run_main(app, "concrete-tickets")
