"""What is refused, and in which words."""

import importlib
import inspect
import pkgutil
from types import FunctionType

import pytest
import torch
from problem import EDGES, MADE, Fixed

import isotone.lighthgnn
from isotone.lighthgnn import (
    CompiledStudent,
    DistillConfig,
    HighOrderConstraint,
    Hypergraph,
    LightMLP,
    TrainConfig,
    make_teacher,
    production_split,
    reliable_hyperedge_scores,
    transductive_split,
)
from isotone.lighthgnn.features import as_features
from isotone.lighthgnn.settings import Split, check_labels
from isotone.shared.errors import InputError


def test_every_annotation_can_be_read():
    """A shape without its quotes is a name that is not there, and checks nothing."""
    for part in pkgutil.iter_modules(isotone.lighthgnn.__path__, "isotone.lighthgnn."):
        if part.name.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(part.name)).values():
            if getattr(thing, "__module__", None) == part.name and isinstance(thing, (type, FunctionType)):
                for owner in [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]:
                    if isinstance(owner, (type, FunctionType)):
                        inspect.get_annotations(owner, eval_str=True)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: HighOrderConstraint(tau=0.0), "tau"),
        (lambda: HighOrderConstraint(target="x"), "target"),
        (lambda: HighOrderConstraint(kind="x"), "kd_loss"),
        (lambda: DistillConfig(lam=1.5), "1.5"),
        (lambda: DistillConfig(tau=-1.0), "-1.0"),
        (lambda: DistillConfig(batch_size=1), "batch_size"),
        (lambda: DistillConfig(sampling="x"), "sampling"),
        (lambda: TrainConfig(epochs=0), "epochs"),
        (lambda: TrainConfig(lr=float("nan")), "nan"),
        (lambda: TrainConfig(weight_decay=-1.0), "weight_decay"),
        (lambda: TrainConfig(seed=-1), "seed"),
        (lambda: LightMLP(0), "sizes"),
        (lambda: LightMLP(4, dropout=1.0), "dropout"),
        (lambda: make_teacher("gnn", 4, 2), "hgnnp"),
        (lambda: make_teacher("hgnn", 4, 2, layers=0), "layers"),
        (lambda: make_teacher("unigat", 4, 2, hidden=30), "heads"),
        (lambda: transductive_split(MADE.y, 200, 100), "at least 301"),
        (lambda: transductive_split(torch.tensor([0, 1, 5]), 1, 1, num_classes=3), "got 5"),
        (lambda: transductive_split(torch.tensor([0.5, 1.0])), "whole numbers"),
        (lambda: production_split(MADE.y, 10, 20, 1.0), "test_ind_ratio"),
        (lambda: check_labels([-1, -1]), "at least one label"),
        (lambda: Split(*(torch.tensor(i) for i in ([0, 1], [1], [2], [3]))), "vertex 1 in train and val"),
        (lambda: as_features([[1.0, float("inf")]]), "row 0"),
        (lambda: as_features([1.0, 2.0]), "N x d"),
        (lambda: as_features([["a"]]), "numbers"),
        (lambda: LightMLP(3).predict([[1.0, 2.0]]), "expected 3 features, the student's own, got 2"),
        (lambda: CompiledStudent(LightMLP(3))(torch.ones(1, 2)), "expected 3 features, the student's own, got 2"),
        (lambda: make_teacher("hgnn", 3, 2)(torch.ones(2, 2), Hypergraph(2, [[0, 1]])), "the teacher's own, got 2"),
        (lambda: reliable_hyperedge_scores(Fixed(), torch.ones(7, 2), Hypergraph(7, EDGES), samples=0), "draw"),
        (lambda: reliable_hyperedge_scores(Fixed(), torch.ones(7, 2), Hypergraph(7, EDGES), normalize="x"), "max"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
