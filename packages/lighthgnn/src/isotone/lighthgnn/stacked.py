"""Teachers of many seeds trained as one job: weights stacked, each product with the hypergraph shared by all.

The S seeds differ in initial weights, dropout and split; X and the hypergraph are the same. A smoothing of S hidden
layers is one product with S c columns, so that the incidences are read once for all seeds.

Dimensions: S seeds, N vertices, d features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from isotone.lighthgnn.features import Features
from isotone.lighthgnn.settings import check_parts, check_width
from isotone.lighthgnn.training import TrainConfig, epoch_seed, seeded
from isotone.shared.errors import InputError


def train_teachers_together(
    teachers: Sequence[nn.Module],
    X: Features,
    structure: Any,
    y: Int[Tensor, " N *C"],
    train: Int[Tensor, "S a"],
    val: Int[Tensor, "S_val b"],
    config: TrainConfig | None = None,
) -> Float[Tensor, " S"]:
    """Train S teachers of one kind in place, each on its own rows of `train`, and return their best accuracies.

    The same recipe as `distill.train_teacher`: Adam, validated each epoch, the best state of each kept. Without
    dropout the results are those of S separate trainings within rounding. Raises `InputError` on teachers with
    batch norm, whose running statistics do not stack, or on another number of rows than teachers.
    """
    config = config or TrainConfig()
    if not len(teachers) == len(train) == len(val):
        raise InputError(f"expected a row of train and val for each of {len(teachers)} teachers, got {len(train)}")
    if y.ndim != 1:
        raise InputError(f"expected one class a vertex to train together, got labels of shape {tuple(y.shape)}")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in teachers[0].modules()):
        raise InputError("expected teachers without batch norm to train together")
    needed = max(check_parts(y, *rows, X.shape[0]) for rows in zip(train, val, strict=True))
    base = teachers[0]
    stacked, buffers = stack_module_state(list(teachers))
    weights: dict[str, Tensor] = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in stacked.items()}
    optimizer = torch.optim.Adam(weights.values(), config.lr, weight_decay=config.weight_decay)
    best = {name: tensor.detach().clone() for name, tensor in weights.items()}
    best_accuracy = torch.full((len(teachers),), -1.0, device=y.device)

    def logits(own: dict[str, Tensor], own_buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (own, own_buffers), (X, structure))

    every = vmap(logits, randomness="different")
    for epoch in range(config.epochs):
        base.train()
        with seeded(epoch_seed(config.seed, epoch)):
            scores = every(weights, buffers)
            check_width(scores[0], needed)
            chosen = scores.gather(1, train.unsqueeze(2).expand(-1, -1, scores.shape[2]))
            # the sum over seeds of each seed's mean: no seed's gradient depends on how many there are
            loss = F.cross_entropy(chosen.flatten(0, 1), y[train].flatten()) * len(teachers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        base.eval()
        with torch.no_grad():
            guesses = every(weights, buffers).argmax(2).gather(1, val)
            accuracy = (guesses == y[val]).float().mean(1)
            better = accuracy > best_accuracy
            best_accuracy = torch.where(better, accuracy, best_accuracy)
            for name, tensor in weights.items():
                best[name][better] = tensor[better]
    with torch.no_grad():
        for number, teacher in enumerate(teachers):
            for name, parameter in teacher.named_parameters():
                parameter.copy_(best[name][number])
            teacher.eval()
    return best_accuracy
