"""`isotone lighthgnn ...`: train, distill, predict, evaluate, export, convert, reproduce, bench, info."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import typer

from isotone.lighthgnn import bench as benchmark
from isotone.lighthgnn import export as exports
from isotone.lighthgnn import jobs
from isotone.lighthgnn import reproduce as reproduction
from isotone.lighthgnn.dataset import KNOWN
from isotone.lighthgnn.distill import DistillConfig, train_teacher
from isotone.lighthgnn.distill import distill as run_distill
from isotone.lighthgnn.features import take_rows
from isotone.lighthgnn.reliability import reliable_hyperedge_scores
from isotone.lighthgnn.settings import production_split, transductive_split
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.teachers import TEACHERS, calibrated_temperature, make_teacher, predict_proba
from isotone.lighthgnn.training import TrainConfig, seeded
from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import Report, figure
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("lighthgnn", framework="torch")
Opt = typer.Option
DATA = Opt(help=f"synthetic, digits, {', '.join(KNOWN)}, or an npz of `convert`")
Data = Annotated[str, DATA]
Folder = Annotated[Path | None, Opt(help="the folder of the run that trained it; default: --out")]


@verb(app)
def train(
    run: Run,
    data: Data = "synthetic",
    teacher: Annotated[str, Opt(help=", ".join(TEACHERS))] = "hgnn",
    hidden: Annotated[int, Opt(help="width")] = 32,
    layers: Annotated[int, Opt(help="convolutions")] = 2,
    dropout: Annotated[float, Opt(help="dropout")] = 0.5,
    epochs: Annotated[int, Opt(help="epochs")] = 200,
    lr: Annotated[float, Opt(help="Adam's rate")] = 0.01,
    weight_decay: Annotated[float, Opt(help="Adam's weight decay")] = 5e-4,
    num_train: Annotated[int, Opt(help="training vertices a class")] = 20,
    num_val: Annotated[int, Opt(help="validation vertices a class")] = 100,
    test_ind_ratio: Annotated[float, Opt(help="share of the test vertices kept unseen; 0: transductive")] = 0.0,
    normalize: Annotated[bool, Opt("--normalize", help="divide rows of features by their sum")] = False,
    checkpoint_every: Annotated[int, Opt(help="epochs between checkpoints")] = 50,
) -> dict:
    """Train a teacher on a hypergraph with features and labels; resumes where it was killed."""
    seed = (run.seeds or (0,))[0]
    config = TrainConfig(epochs, lr, weight_decay, seed, checkpoint_every=checkpoint_every)
    dataset = jobs.open_data(data, normalize, seed)
    if test_ind_ratio > 0:
        split = production_split(dataset.y, num_train, num_val, test_ind_ratio, seed)
    else:
        split = transductive_split(dataset.y, num_train, num_val, seed)
    where = device.resolve(run.device)
    sizes: dict[str, Any] = {"in_channels": dataset.X.shape[1], "num_classes": dataset.num_classes}
    sizes |= {"hidden": hidden, "layers": layers, "dropout": dropout, "multilabel": dataset.multilabel}
    if not 0 <= dropout < 1:
        raise InputError(f"expected --dropout from 0 to below 1, got {dropout}")
    with seeded(seed):
        model = make_teacher(teacher, **sizes).to(where)
    seen = jobs.observe(dataset, split, model.on_graph)
    with progress.bar(f"teacher {teacher}", epochs, run.silent) as bar:
        history = train_teacher(
            *(model, seen.X.to(where), seen.structure.to(where), seen.y.to(where)),
            *(seen.train.to(where), seen.val.to(where), config),
            folder=run.out / "checkpoints-teacher",
            resume=run.resume,
            on_epoch=lambda epoch, accuracy: bar.advance(1, accuracy=round(accuracy, 3)),
        )
    path = exports.save_teacher(model, run.out, teacher, **sizes)
    facts = {"data": data, "normalize": normalize, "seed": seed, "num_vertices": len(dataset.y)}
    jobs.save_split(split, run.out, **facts)
    return {
        "teacher": str(path),
        "validation accuracy": round(history.best_accuracy, 4),
        "epoch": history.best_epoch,
        "seconds": round(history.seconds, 2),
        "next": f"isotone lighthgnn distill --data {data} --out {run.out}",
    }


@verb(app)
def distill(
    run: Run,
    data: Data = "synthetic",
    teacher: Folder = None,
    light: Annotated[bool, Opt("--light", help="LightHGNN: soft labels alone, no hyperedges")] = False,
    lam: Annotated[float, Opt(help="share of the labels' cross-entropy; 1: a plain MLP")] = 0.0,
    tau: Annotated[float, Opt(help="temperature on hyperedges")] = 1.0,
    target: Annotated[str, Opt(help="mean_prob or softmax")] = "mean_prob",
    kd_loss: Annotated[str, Opt(help="kl, or official: the authors' term")] = "kl",
    sampling: Annotated[str, Opt(help="reliability, uniform or all")] = "reliability",
    noise: Annotated[str, Opt(help="multiplicative, additive or official")] = "multiplicative",
    noise_level: Annotated[float, Opt(help="level of the feature noise")] = 1.0,
    noise_samples: Annotated[int, Opt(help="noise draws")] = 5,
    normalize_scores: Annotated[str, Opt(help="max or quantile")] = "max",
    change: Annotated[str, Opt(help="mean: the paper's; vertices: changes within a hyperedge do not cancel")] = "mean",
    calibrate_teacher: Annotated[
        bool, Opt("--calibrate-teacher", help="score at a temperature fit on validation")
    ] = False,
    hidden: Annotated[int, Opt(help="width of the student")] = 128,
    layers: Annotated[int, Opt(help="layers of the student")] = 2,
    dropout: Annotated[float, Opt(help="dropout of the student")] = 0.5,
    no_batch_norm: Annotated[bool, Opt("--no-batch-norm", help="a student without batch norm")] = False,
    batch_size: Annotated[int | None, Opt(help="vertices a step; all if not given")] = None,
    calibrate: Annotated[bool, Opt("--calibrate", help="fit a temperature on the validation vertices")] = False,
    epochs: Annotated[int, Opt(help="epochs")] = 200,
    lr: Annotated[float, Opt(help="Adam's rate")] = 0.01,
    weight_decay: Annotated[float, Opt(help="Adam's weight decay")] = 5e-4,
    checkpoint_every: Annotated[int, Opt(help="epochs between checkpoints")] = 50,
) -> dict:
    """Distil a trained teacher into an MLP; resumes where it was killed."""
    source = teacher or run.out
    config, dataset, split, facts = _distillation(
        run, data, source, (epochs, lr, weight_decay), checkpoint_every,
        plus=not light, lam=lam, tau=tau, target=target, kd_loss=kd_loss, sampling=sampling, batch_size=batch_size,
    )  # fmt: skip
    model = exports.load_teacher(source)
    where = device.resolve(run.device)
    seen = jobs.observe(dataset, split, model.on_graph)
    model.to(where)
    X, hypergraph, structure = seen.X.to(where), seen.hypergraph.to(where), seen.structure.to(where)
    soft = predict_proba(model, X, structure)
    rho = None
    if not light:
        generator = torch.Generator().manual_seed(config.train.seed)
        labelled = (seen.y.to(where), seen.val.to(where))
        temperature = calibrated_temperature(model, X, structure, *labelled) if calibrate_teacher else 1.0
        rho = reliable_hyperedge_scores(
            *(model, X, hypergraph),
            noise=noise, level=noise_level, samples=noise_samples, normalize=normalize_scores, change=change,
            temperature=temperature, generator=generator, structure=structure,
        )  # fmt: skip
    with seeded(config.train.seed):
        batch_norm = not no_batch_norm
        student = LightMLP(
            *(X.shape[1], hidden, dataset.num_classes),
            layers=layers, dropout=dropout, batch_norm=batch_norm, multilabel=dataset.multilabel,
        ).to(where)  # fmt: skip
    parts = (seen.train.to(where), seen.val.to(where))
    with progress.bar("student", epochs, run.silent) as bar:
        history = run_distill(
            *(student, X, seen.y.to(where), *parts, config),
            teacher=soft, hypergraph=hypergraph, rho=rho,
            folder=run.out / "checkpoints-student", resume=run.resume,
            on_epoch=lambda epoch, accuracy: bar.advance(1, accuracy=round(accuracy, 3)),
        )  # fmt: skip
    if calibrate:
        student.calibrate(take_rows(X, parts[1]), seen.y.to(where)[parts[1]])
    path = exports.save_student(student, run.out)
    jobs.save_split(split, run.out, **facts)
    if rho is not None:
        _save_reliability(rho, run.out)
    return {
        "student": str(path),
        "validation accuracy": round(history.best_accuracy, 4),
        "mean reliability": None if rho is None else round(float(rho.mean()), 4),
        "temperature": round(float(student.temperature), 4),
        "seconds": round(history.seconds, 2),
    }


def _distillation(
    run: Run, data: str, source: Path, adam: tuple[int, float, float], checkpoint_every: int, **options: Any
) -> tuple[DistillConfig, Any, Any, dict[str, Any]]:
    seed = (run.seeds or (0,))[0]
    config = DistillConfig(**options, train=TrainConfig(*adam, seed, checkpoint_every=checkpoint_every))
    if not source.is_dir():
        raise InputError(f"expected the folder of a trained teacher, got {str(source)!r}")
    dataset, split, facts = _run_data(data, source)
    return config, dataset, split, facts


def _run_data(data: str, source: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The data of a run, features normalised and synthetic ones seeded as they were when it was trained."""
    facts = jobs.read_facts(source) if (source / "run.json").is_file() else {}
    dataset = jobs.open_data(data, facts.get("normalize", False), facts.get("seed", 0))
    split, facts = jobs.load_split(source, len(dataset.y))
    return dataset, split, facts


def _save_reliability(rho: torch.Tensor, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, rho.cpu().numpy(), allow_pickle=False)
    atomic_write(out / "reliability.npy", buffer.getvalue())
    drawing, axes = figure("Reliability of hyperedges", "reliability rho", "hyperedges")
    axes.hist(rho.cpu().numpy(), bins=20, range=(0, 1))
    drawing.savefig(out / "reliability.png", dpi=120)


@verb(app)
def predict(
    run: Run,
    features: Annotated[Path, typer.Argument(help="rows to classify: .npy, .npz or .csv")],
    student: Folder = None,
) -> dict:
    """Classify rows of features with a student, or label them; no hypergraph is needed."""
    model = exports.load_student(student or run.out)
    probabilities = model.predict_proba(jobs.read_features(features))
    text = io.StringIO()
    writer = csv.writer(text)
    multilabel = model.config["multilabel"]
    writer.writerow(["row", "labels" if multilabel else "class", *(f"p{c}" for c in range(probabilities.shape[1]))])
    for number, row in enumerate(probabilities.tolist()):
        labels = " ".join(str(c) for c, p in enumerate(row) if p > 0.5)
        guess = labels if multilabel else max(range(len(row)), key=row.__getitem__)
        writer.writerow([number, guess, *(f"{p:.6f}" for p in row)])
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / "predictions.csv"
    atomic_write(path, text.getvalue().encode())
    return {"rows": len(probabilities), "written": str(path)}


@verb(app)
def evaluate(
    run: Run,
    data: Data = "synthetic",
    student: Folder = None,
    noise_level: Annotated[float, Opt(help="a of (1 - a) X + a N(0, 1) at test")] = 0.0,
) -> dict:
    """Accuracy, macro and micro F1 of student and teacher: observed, unseen, and all test vertices."""
    source = student or run.out
    model = exports.load_student(source)
    dataset, split, facts = _run_data(data, source)
    if not 0 <= noise_level <= 1:
        raise InputError(f"expected --noise-level from 0 to 1, got {noise_level}")
    X = jobs.noisy_features(dataset, noise_level, facts["seed"])
    found = {"student": jobs.scores(model.predict(X), dataset.y, split)}
    if (source / "teacher.safetensors").is_file():
        teacher = exports.load_teacher(source)
        found["teacher"] = jobs.teacher_scores(teacher, dataclasses.replace(dataset, X=X), split)
    drawing, axes = figure("Test accuracy", "", "per cent")
    names = [f"{who}\n{part}" for who, parts in found.items() for part in parts]
    axes.bar(names, [values["accuracy"] for parts in found.values() for values in parts.values()])
    run.out.mkdir(parents=True, exist_ok=True)
    drawing.savefig(run.out / "accuracy.png", dpi=120)
    if run.json:
        return found
    return {
        f"{who}, {part}, {name}": round(value, 2)
        for who, parts in found.items() for part, values in parts.items() for name, value in values.items()
    }  # fmt: skip


@verb(app)
def export(
    run: Run,
    student: Folder = None,
    format: Annotated[str, Opt(help=", ".join(exports.FORMATS))] = "onnx",
) -> dict:
    """Write the student as one file: safetensors without batch norm, ONNX (also int8), or a torch.export program."""
    if format not in exports.FORMATS:
        raise InputError(f"expected --format to be one of {', '.join(exports.FORMATS)}, got {format!r}")
    model = exports.load_student(student or run.out)
    folder = run.out / "export"
    folder.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        path = exports.save_student(model.fold_batchnorm(), folder)
    elif format == "torch-export":
        path = exports.export_torch(model, folder / "student.pt2")
    else:
        name = "student-int8.onnx" if format.endswith("int8") else "student.onnx"
        path = exports.export_onnx(model, folder / name, int8=format.endswith("int8"))
    return {"format": format, "written": str(path), "bytes": path.stat().st_size}


@verb(app)
def convert(
    run: Run,
    source: Annotated[Path, typer.Argument(help="HyperGCN folder, Planetoid prefix, HIF .json, or an edge list")],
    features: Annotated[Path | None, Opt(help="rows of features beside HIF or an edge list")] = None,
    labels: Annotated[
        Path | None, Opt(help="labels: a whole number a line, -1 unknown; or .npy, also N x C of 0 and 1")
    ] = None,
    normalize: Annotated[bool, Opt("--normalize", help="divide rows of features by their sum")] = False,
) -> dict:
    """Make the npz that the other verbs read; old pickles are read without unpickling."""
    made = jobs.convert(source, features, labels, normalize)
    path = made.save(run.out / f"{made.name}.npz")
    sizes = {"vertices": len(made.y), "hyperedges": made.hypergraph.num_edges, "features": made.X.shape[1]}
    return {**sizes, "isolated vertices": len(made.hypergraph.isolated()), "written": str(path)}


@verb(app)
def reproduce(run: Run, scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke") -> Report:
    """Measure the paper's claims again, beside fair baselines."""
    return reproduction.reproduce(scale, run)


@verb(app)
def bench(run: Run, size: Annotated[str, Opt(help="full or tiny")] = "full") -> Report:
    """Time teachers beside dhg and torch-geometric, and the student beside its teacher."""
    return benchmark.bench(run, size)


def main() -> NoReturn:
    """Entry point of `isotone-lighthgnn`."""
    run_main(app, "lighthgnn")
