"""A small hypergraph with its split, and the trainings that several tests look at."""

import torch
from torch import nn

from isotone.lighthgnn import (
    DistillConfig,
    LightMLP,
    TrainConfig,
    distill,
    make_synthetic,
    make_teacher,
    train_teacher,
    transductive_split,
)
from isotone.lighthgnn.training import seeded

EDGES = [[0, 1, 2], [2, 3], [4, 5, 0, 3], [1, 5], [6]]
MADE = make_synthetic(num_vertices=240, num_edges=120, dim=12, num_classes=3, signal=0.6, seed=1)
SPLIT = transductive_split(MADE.y, 10, 20, 0)
QUICK = TrainConfig(epochs=12)
LONGER = TrainConfig(epochs=40)


def probabilities(rows, classes=4, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


class Fixed(nn.Module):
    """A teacher that gives the features themselves as logits, or a constant."""

    def __init__(self, constant=None):
        super().__init__()
        self.constant = constant

    def forward(self, X, structure):
        return X if self.constant is None else self.constant.expand(len(X), -1)


def small_student(**options):
    with seeded(0):
        return LightMLP(12, 16, 3, **options)


def small_teacher(config=QUICK):
    with seeded(0):
        teacher = make_teacher("hgnn", 12, 3, hidden=8)
    history = train_teacher(teacher, MADE.X, MADE.hypergraph, MADE.y, SPLIT.train, SPLIT.val, config)
    return teacher, history


def distilled(config: DistillConfig, X=MADE.X, **given):
    student = small_student()
    history = distill(student, X, MADE.y, SPLIT.train, SPLIT.val, config, **given)
    return student, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
