"""One seed of one comparison: every arm on the same split, trained with the same epochs and the same validation.

Accuracies are in per cent of the test vertices.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isotone.lighthgnn import baselines
from isotone.lighthgnn.dataset import Dataset
from isotone.lighthgnn.distill import DistillConfig, distill, train_teacher
from isotone.lighthgnn.export import with_int8_weights
from isotone.lighthgnn.features import Features, take_rows
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.krd import distill_from_vertices, vertex_reliability
from isotone.lighthgnn.reliability import reliable_hyperedge_scores
from isotone.lighthgnn.settings import (
    Split,
    local_ids,
    observed_hypergraph,
    production_split,
    transductive_split,
)
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.lighthgnn.teachers import Teacher, calibrated_temperature, make_teacher, predict_proba
from isotone.lighthgnn.topology import topology_score
from isotone.lighthgnn.training import TrainConfig, seeded


@dataclass(frozen=True)
class Recipe:
    """What all arms of a comparison share; the defaults are the paper's (sections 2.2, 2.3, 2.6)."""

    epochs: int = 200
    num_train: int = 20
    num_val: int = 100
    teacher: str = "hgnn"
    teacher_hidden: int = 32
    student_hidden: int = 128
    student_layers: int = 2
    noise_samples: int = 5
    many_samples: int = 50
    test_ind_ratio: float = 0.9
    scikit: bool = True


@dataclass
class _Task:
    """What teacher and students of a seed are trained on: the observed vertices, renumbered."""

    X: Features
    y: Tensor
    train: Tensor
    val: Tensor
    hypergraph: Hypergraph
    num_classes: int
    recipe: Recipe
    seed: int

    def config(self, **options: Any) -> DistillConfig:
        return DistillConfig(**options, train=TrainConfig(epochs=self.recipe.epochs, seed=self.seed))

    def student(self, batch_norm: bool = True) -> LightMLP:
        with seeded(self.seed):
            return LightMLP(
                self.X.shape[1],
                self.recipe.student_hidden,
                self.num_classes,
                layers=self.recipe.student_layers,
                batch_norm=batch_norm,
            ).to(self.y.device)

    def teach(self, name: str, structure: Any) -> Teacher:
        with seeded(self.seed):
            teacher = make_teacher(name, self.X.shape[1], self.num_classes, hidden=self.recipe.teacher_hidden)
        teacher = teacher.to(self.y.device)
        train_teacher(teacher, self.X, structure, self.y, self.train, self.val, self.config().train)
        return teacher

    def mlp(self, batch_norm: bool) -> LightMLP:
        student = self.student(batch_norm)
        distill(student, self.X, self.y, self.train, self.val, self.config(lam=1.0, plus=False))
        return student

    def pupil(self, teacher: Tensor, rho: Tensor | None, **options: Any) -> LightMLP:
        student = self.student()
        config = self.config(plus=rho is not None, **options)
        parts = (self.X, self.y, self.train, self.val, config)
        distill(student, *parts, teacher=teacher, hypergraph=self.hypergraph, rho=rho)
        return student

    def temperature(self, teacher: Teacher, structure: Any = None) -> float:
        """Fit on the validation vertices, that choose epochs already."""
        structure = self.hypergraph if structure is None else structure
        return calibrated_temperature(teacher, self.X, structure, self.y, self.val)

    def scores(self, teacher: Teacher, samples: int | None = None, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        samples = samples or self.recipe.noise_samples
        parts = (teacher, self.X, self.hypergraph)
        return reliable_hyperedge_scores(*parts, samples=samples, generator=generator, **options)


def _task(data: Dataset, split: Split, recipe: Recipe, seed: int) -> _Task:
    device = data.y.device
    hypergraph = observed_hypergraph(data.hypergraph, split)
    X, y, train, val = data.X, data.y, split.train, split.val
    if len(split.test_ind):
        observed = split.observed.to(device)
        X, y = take_rows(data.X, observed), data.y[observed]
        train, val = local_ids(split, train), local_ids(split, val)
    return _Task(X, y, train.to(device), val.to(device), hypergraph, data.num_classes, recipe, seed)


def _percent(predictions: Any, y: Tensor, vertices: Tensor) -> float:
    predictions = torch.as_tensor(predictions).to(y.device)
    return 100 * float((predictions[vertices] == y[vertices]).float().mean())


def _scikit(data: Dataset, task: _Task, split: Split, score: Any) -> None:
    if task.recipe.scikit:
        cpu = dataclasses.replace(data, X=data.X.to("cpu"), y=data.y.cpu(), hypergraph=task.hypergraph.to("cpu"))
        score("logistic regression", baselines.logistic_regression(cpu, split))
        score("label spreading", baselines.label_spreading(cpu, split))
        score("label spreading on hypergraph", baselines.hypergraph_label_spreading(cpu, split))


def transductive(data: Dataset, seed: int, recipe: Recipe, ablations: bool = False) -> dict[str, Any]:
    """Every arm on one transductive split of a hypergraph; and rho, topology scores.

    `ablations`: also the authors' KD term and all hyperedges instead of drawn ones.
    """
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, seed)
    task = _task(data, split, recipe, seed)
    found: dict[str, float] = {}

    def score(name: str, predictions: Any) -> None:
        found[name] = _percent(predictions, data.y, split.test)

    score("fair MLP", task.mlp(batch_norm=False).predict(data.X))
    plain = task.mlp(batch_norm=True)
    score("paper's MLP", plain.predict(data.X))
    _scikit(data, task, split, score)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    soft = predict_proba(teacher, data.X, task.hypergraph)
    score("teacher", soft.argmax(1))
    rho = task.scores(teacher)
    light, plus = task.pupil(soft, None), task.pupil(soft, rho)
    score("LightHGNN", light.predict(data.X))
    score("LightHGNN+", plus.predict(data.X))
    temperature = task.temperature(teacher)
    sure = predict_proba(teacher, data.X, task.hypergraph, temperature=temperature)
    student = task.pupil(sure, task.scores(teacher, temperature=temperature))
    score("LightHGNN+, calibrated teacher", student.predict(data.X))
    score("LightHGNN+, int8 weights", with_int8_weights(plus).predict(data.X))
    if ablations:
        score("LightHGNN, official KD", task.pupil(soft, None, kd_loss="official").predict(data.X))
        score("LightHGNN+, official KD", task.pupil(soft, rho, kd_loss="official").predict(data.X))
        score("LightHGNN+, all hyperedges", task.pupil(soft, rho, sampling="all").predict(data.X))
    with torch.no_grad():
        parts: dict[str, Any] = {"teacher": teacher.embed(data.X, task.hypergraph)}
        parts |= {
            "paper's MLP": plain.embed(data.X),
            "LightHGNN": light.embed(data.X),
            "LightHGNN+": plus.embed(data.X),
        }
        smooth = {name: float(topology_score(x, task.hypergraph, normalize=True)) for name, x in parts.items()}
    return {"accuracy": found, "topology": smooth, "rho": np.histogram(rho.cpu().numpy(), 20, (0, 1))[0].tolist(),
            "rho_mean": float(rho.mean())}  # fmt: skip


def three_settings(data: Dataset, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Observed vertices alone to learn from; accuracies `trans`, `ind` and `prod` (section 2.6)."""
    split = production_split(data.y, recipe.num_train, recipe.num_val, recipe.test_ind_ratio, seed)
    task = _task(data, split, recipe, seed)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    soft = predict_proba(teacher, task.X, task.hypergraph)
    full = data.hypergraph.add_singletons()
    on_full = predict_proba(teacher, data.X, full).argmax(1)
    on_observed = torch.full_like(data.y, -1)
    on_observed[split.observed.to(data.y.device)] = soft.argmax(1)
    parts = {"trans": split.test_tran, "ind": split.test_ind, "prod": split.test}
    found = {
        "teacher": {
            name: _percent(on_observed if name == "trans" else on_full, data.y, ids) for name, ids in parts.items()
        }
    }
    students = {
        "fair MLP": task.mlp(batch_norm=False),
        "paper's MLP": task.mlp(batch_norm=True),
        "LightHGNN": task.pupil(soft, None),
        "LightHGNN+": task.pupil(soft, task.scores(teacher)),
    }
    if recipe.scikit:
        # logistic regression learns from the training rows alone; label spreading sees the unseen rows' features
        cpu = dataclasses.replace(data, X=data.X.to("cpu"), y=data.y.cpu())
        for name, method in (
            ("logistic regression", baselines.logistic_regression),
            ("label spreading", baselines.label_spreading),
        ):
            guesses = method(cpu, split)
            found[name] = {setting: _percent(guesses, data.y, ids) for setting, ids in parts.items()}
    for name, student in students.items():
        predictions = student.predict(data.X)
        found[name] = {setting: _percent(predictions, data.y, ids) for setting, ids in parts.items()}
    return found


def graph_arms(data: Dataset, seed: int, recipe: Recipe) -> dict[str, Any]:
    """A graph: GNN-to-MLP methods on it, and ours on its hypergraph of edges and neighbourhoods."""
    assert data.graph is not None
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, seed)
    task = _task(data, split, recipe, seed)
    found: dict[str, float] = {}

    def score(name: str, predictions: Any) -> None:
        found[name] = _percent(predictions, data.y, split.test)

    score("fair MLP", task.mlp(batch_norm=False).predict(data.X))
    score("paper's MLP", task.mlp(batch_norm=True).predict(data.X))
    _scikit(data, task, split, score)
    gcn = task.teach("gcn", data.graph)
    score("GCN", predict_proba(gcn, data.X, data.graph).argmax(1))
    for tag, temperature in (("", 1.0), (", calibrated teacher", task.temperature(gcn, data.graph))):
        soft = predict_proba(gcn, data.X, data.graph, temperature=temperature)
        score(f"GLNN{tag}", task.pupil(soft, None).predict(data.X))
        draws: dict[str, Any] = {"samples": recipe.noise_samples, "seed": seed, "temperature": temperature}
        reliability = vertex_reliability(gcn, data.X, data.graph, **draws)
        student = task.student()
        distill_from_vertices(student, data.X, data.y, task.val, data.graph, soft, reliability, task.config())
        score(f"reliability KD{tag}", student.predict(data.X))
    teacher = task.teach(recipe.teacher, task.hypergraph)
    score("teacher", predict_proba(teacher, data.X, task.hypergraph).argmax(1))
    for tag, temperature in (("", 1.0), (", calibrated teacher", task.temperature(teacher))):
        soft = predict_proba(teacher, data.X, task.hypergraph, temperature=temperature)
        if not tag:
            score("LightHGNN", task.pupil(soft, None).predict(data.X))
        rho = task.scores(teacher, temperature=temperature)
        score(f"LightHGNN+{tag}", task.pupil(soft, rho).predict(data.X))
    return {"accuracy": found}


NOISE: dict[str, dict[str, Any]] = {
    "default": {},
    "additive": {"noise": "additive", "draws": True},
    "calibrated": {"calibrated": True, "draws": True},
    "vertices": {"change": "vertices", "draws": True},
    "both": {"change": "vertices", "calibrated": True, "draws": True},
}
"""The ways to score hyperedges that are held to planted noise; `draws`: as many as `Recipe.many_samples`."""


def signal_arms(config: SyntheticConfig, seed: int, recipe: Recipe) -> dict[str, Any]:
    """A synthetic hypergraph: the fair MLP, the teacher and LightHGNN+."""
    data, task, split, _ = _synthetic_task(config, seed, recipe)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    soft = predict_proba(teacher, data.X, task.hypergraph)
    accuracy = {
        "fair MLP": _percent(task.mlp(batch_norm=False).predict(data.X), data.y, split.test),
        "teacher": _percent(soft.argmax(1), data.y, split.test),
        "LightHGNN+": _percent(task.pupil(soft, task.scores(teacher)).predict(data.X), data.y, split.test),
    }
    return {"accuracy": accuracy}


def planted_noise(config: SyntheticConfig, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Whether planted noise hyperedges are scored below true ones, by each way of `NOISE`: AUC, mean rho of both."""
    _, task, _, made = _synthetic_task(config, seed, recipe)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    real, noisy = made.planted & ~made.is_noise, made.planted & made.is_noise
    temperature = task.temperature(teacher)
    found: dict[str, Any] = {"temperature": temperature}
    for name, given in NOISE.items():
        options = dict(given)
        samples = recipe.many_samples if options.pop("draws", False) else None
        if options.pop("calibrated", False):
            options["temperature"] = temperature
        rho = task.scores(teacher, samples, **options).cpu()
        if min(int(real.sum()), int(noisy.sum())) == 0:
            found[name] = {"auc": None, "true": None, "noise": None}
            continue
        auc = ranking_auc(rho[real].numpy(), rho[noisy].numpy())
        found[name] = {"auc": auc, "true": float(rho[real].mean()), "noise": float(rho[noisy].mean())}
    return found


def ranking_auc(upper: np.ndarray, lower: np.ndarray) -> float:
    """The chance that a value of `upper` is above one of `lower`, ties counting half: the area under the ROC."""
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, upper, "left") + np.searchsorted(ordered, upper, "right")
    return float(below.mean() / 2 / len(lower))


def _synthetic_task(config: SyntheticConfig, seed: int, recipe: Recipe) -> tuple[Dataset, _Task, Split, Any]:
    made = make_synthetic(config, seed)
    data = Dataset("synthetic", made.X, made.y, made.hypergraph)
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, seed)
    return data, _task(data, split, recipe, seed), split, made


def teachers_together(data: Dataset, names: tuple[str, ...], seeds: tuple[int, ...], recipe: Recipe) -> dict[str, Any]:
    """Test accuracies of teachers of all seeds trained as one job (`stacked.py`), and its seconds; by name."""
    splits = [transductive_split(data.y, recipe.num_train, recipe.num_val, seed) for seed in seeds]
    train, val = (torch.stack([getattr(s, part) for s in splits]).to(data.y.device) for part in ("train", "val"))
    hypergraph = data.hypergraph.add_singletons()
    found = {}
    for name in names:
        teachers = []
        for seed in seeds:
            with seeded(seed):
                made = make_teacher(name, data.X.shape[1], data.num_classes, hidden=recipe.teacher_hidden)
            teachers.append(made.to(data.y.device))
        start = time.perf_counter()
        config = TrainConfig(epochs=recipe.epochs, seed=seeds[0])
        train_teachers_together(teachers, data.X, hypergraph, data.y, train, val, config)
        seconds = time.perf_counter() - start
        guesses = (predict_proba(teacher, data.X, hypergraph).argmax(1) for teacher in teachers)
        accuracy = [_percent(g, data.y, s.test) for g, s in zip(guesses, splits, strict=True)]
        found[name] = {"accuracy": accuracy, "seconds": seconds}
    return found


def fit_seconds(data: Dataset, recipe: Recipe) -> dict[str, float]:
    """Seconds of one whole LightHGNN+: teacher, reliability scores and student, without baselines."""
    start = time.perf_counter()
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, 0)
    task = _task(data, split, recipe, 0)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    task.pupil(predict_proba(teacher, data.X, task.hypergraph), task.scores(teacher))
    return {"seconds": time.perf_counter() - start}
