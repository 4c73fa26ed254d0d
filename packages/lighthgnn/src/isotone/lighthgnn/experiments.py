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
from sklearn.metrics import roc_auc_score
from torch import Tensor

from isotone.lighthgnn import baselines
from isotone.lighthgnn.dataset import Dataset
from isotone.lighthgnn.distill import DistillConfig, distill, train_teacher
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
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.lighthgnn.teachers import Teacher, make_teacher, predict_proba
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
    test_ind_ratio: float = 0.9
    scikit: bool = True
    ablations: bool = True


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

    def scores(self, teacher: Teacher) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        samples = self.recipe.noise_samples
        return reliable_hyperedge_scores(teacher, self.X, self.hypergraph, samples=samples, generator=generator)


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


def transductive(data: Dataset, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Every arm on one transductive split of a hypergraph; and rho, topology scores."""
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, seed)
    task = _task(data, split, recipe, seed)
    found: dict[str, float] = {}

    def score(name: str, predictions: Any) -> None:
        found[name] = _percent(predictions, data.y, split.test)

    score("fair MLP", task.mlp(batch_norm=False).predict(data.X))
    score("paper's MLP", task.mlp(batch_norm=True).predict(data.X))
    if recipe.scikit:
        cpu = dataclasses.replace(data, X=data.X.to("cpu"), y=data.y.cpu(), hypergraph=task.hypergraph.to("cpu"))
        score("logistic regression", baselines.logistic_regression(cpu, split))
        score("label spreading", baselines.label_spreading(cpu, split))
        score("label spreading on hypergraph", baselines.hypergraph_label_spreading(cpu, split))
    teacher = task.teach(recipe.teacher, task.hypergraph)
    soft = predict_proba(teacher, data.X, task.hypergraph)
    score("teacher", soft.argmax(1))
    rho = task.scores(teacher)
    light, plus = task.pupil(soft, None), task.pupil(soft, rho)
    score("LightHGNN", light.predict(data.X))
    score("LightHGNN+", plus.predict(data.X))
    if recipe.ablations:
        score("LightHGNN, official KD", task.pupil(soft, None, kd_loss="official").predict(data.X))
        score("LightHGNN+, official KD", task.pupil(soft, rho, kd_loss="official").predict(data.X))
        score("LightHGNN+, all hyperedges", task.pupil(soft, rho, sampling="all").predict(data.X))
    with torch.no_grad():
        parts = {"teacher": teacher.embed(data.X, task.hypergraph), "LightHGNN": light.embed(data.X)}
        parts["LightHGNN+"] = plus.embed(data.X)
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
        "LightHGNN": task.pupil(soft, None),
        "LightHGNN+": task.pupil(soft, task.scores(teacher)),
    }
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
    gcn = task.teach("gcn", data.graph)
    soft_gcn = predict_proba(gcn, data.X, data.graph)
    score("GCN", soft_gcn.argmax(1))
    score("GLNN", task.pupil(soft_gcn, None).predict(data.X))
    reliability = vertex_reliability(gcn, data.X, data.graph, samples=recipe.noise_samples, seed=seed)
    student = task.student()
    distill_from_vertices(student, data.X, data.y, task.val, data.graph, soft_gcn, reliability, task.config())
    score("reliability KD", student.predict(data.X))
    teacher = task.teach(recipe.teacher, task.hypergraph)
    soft = predict_proba(teacher, data.X, task.hypergraph)
    score("teacher", soft.argmax(1))
    score("LightHGNN", task.pupil(soft, None).predict(data.X))
    score("LightHGNN+", task.pupil(soft, task.scores(teacher)).predict(data.X))
    return {"accuracy": found}


def noise_and_signal(config: SyntheticConfig, seed: int, recipe: Recipe) -> dict[str, Any]:
    """A synthetic hypergraph: accuracies, and whether planted noise hyperedges are scored below true ones."""
    made = make_synthetic(config, seed)
    data = Dataset("synthetic", made.X, made.y, made.hypergraph)
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, seed)
    task = _task(data, split, recipe, seed)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    rho = task.scores(teacher)
    soft = predict_proba(teacher, data.X, task.hypergraph)
    accuracy = {
        "fair MLP": _percent(task.mlp(batch_norm=False).predict(data.X), data.y, split.test),
        "teacher": _percent(soft.argmax(1), data.y, split.test),
        "LightHGNN+": _percent(task.pupil(soft, rho).predict(data.X), data.y, split.test),
    }
    real, noisy = rho[made.planted & ~made.is_noise], rho[made.planted & made.is_noise]
    if min(len(real), len(noisy)) == 0:
        return {"accuracy": accuracy, "auc": None, "rho_true": None, "rho_noise": None}
    auc = roc_auc_score(np.repeat([1, 0], [len(real), len(noisy)]), torch.cat((real, noisy)).numpy())
    parts = {"auc": float(auc), "rho_true": float(real.mean()), "rho_noise": float(noisy.mean())}
    return {"accuracy": accuracy, **parts}


def fit_seconds(data: Dataset, recipe: Recipe) -> dict[str, float]:
    """Seconds of one whole LightHGNN+: teacher, reliability scores and student, without baselines."""
    start = time.perf_counter()
    split = transductive_split(data.y, recipe.num_train, recipe.num_val, 0)
    task = _task(data, split, recipe, 0)
    teacher = task.teach(recipe.teacher, task.hypergraph)
    task.pupil(predict_proba(teacher, data.X, task.hypergraph), task.scores(teacher))
    return {"seconds": time.perf_counter() - start}
