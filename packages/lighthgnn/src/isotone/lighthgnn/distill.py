"""LightHGNN and LightHGNN+ (sections 2.4, 2.5), and the training of the teacher that they learn from.

Dimensions: N observed vertices, E hyperedges, d features, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.lighthgnn.features import Features, take_rows
from isotone.lighthgnn.fingerprint import describe, fingerprint
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.losses import KD_LOSSES, TARGETS, HighOrderConstraint, kd_loss
from isotone.lighthgnn.outputs import agreement, cross_entropy, probabilities
from isotone.lighthgnn.reliability import SAMPLINGS, sample_hyperedges
from isotone.lighthgnn.settings import check_parts, check_width
from isotone.lighthgnn.sparse import SparseMatrix, row_positions
from isotone.lighthgnn.student import LightMLP
from isotone.lighthgnn.training import History, TrainConfig, epoch_seed, fit
from isotone.shared.errors import InputError

_ROUNDING = 0.02
"""How far a sum of probabilities in half precision may be from 1."""

OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns. `lam` is lambda, the share of the labels' cross-entropy: 0 soft labels alone, 1 none.

    `plus`: LightHGNN+, with the high-order constraint at `tau` and `target` over hyperedges drawn by `sampling`.
    `kd_loss`: "kl", or "official" for the authors' term. `batch_size`: vertices a step, None for all at once.
    """

    plus: bool = True
    lam: float = 0.0
    tau: float = 1.0
    target: str = "mean_prob"
    kd_loss: str = "kl"
    sampling: str = "reliability"
    batch_size: int | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise InputError(f"expected lambda from 0 to 1, got {self.lam}")
        for name, known in (("kd_loss", KD_LOSSES), ("target", TARGETS), ("sampling", SAMPLINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"expected {name} of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.batch_size is not None and self.batch_size < 2:
            raise InputError(f"expected batch_size to be at least 2, got {self.batch_size}")
        self.constraint()

    def constraint(self, multilabel: bool = False) -> HighOrderConstraint:
        """L_hc as configured; raises `InputError` on tau <= 0."""
        return HighOrderConstraint(self.tau, self.target, self.kd_loss, multilabel)


def train_teacher(
    teacher: nn.Module,
    X: Features,
    structure: Any,
    y: Int[Tensor, " N *C"],
    train: Int[Tensor, " a"],
    val: Int[Tensor, " b"],
    config: TrainConfig | None = None,
    *,
    folder: Path | None = None,
    resume: bool = True,
    on_epoch: OnEpoch = lambda epoch, accuracy: None,
) -> History:
    """Cross-entropy on `train`, full batch, validated each epoch on `val` (section 2.2); trains in place.

    `y`: N classes; or N x C zeros and ones, which a vertex may have any number of: then a sigmoid's cross-entropy,
    validated by micro F1.
    """
    needed = check_parts(y, train, val, X.shape[0])
    labels, targets = y[train], y[val]

    def losses(epoch: int) -> Iterator[Tensor]:
        logits = teacher(X, structure)
        check_width(logits, needed)
        yield cross_entropy(logits[train], labels)

    def validate() -> float:
        return agreement(teacher(X, structure)[val], targets)

    key = None
    if folder is not None:
        key = {"model": describe(teacher)} | fingerprint(X=X, y=y, train=train, val=val, structure=structure)
    return fit(
        *(teacher, losses, validate, config or TrainConfig()),
        folder=folder, resume=resume, run_key=key, on_epoch=on_epoch,
    )  # fmt: skip


def distill(
    student: LightMLP,
    X: Features,
    y: Int[Tensor, " N *C"],
    train: Int[Tensor, " a"],
    val: Int[Tensor, " b"],
    config: DistillConfig | None = None,
    *,
    teacher: Float[Tensor, "rows C"] | None = None,
    hypergraph: Hypergraph | None = None,
    rho: Float[Tensor, " E"] | None = None,
    folder: Path | None = None,
    resume: bool = True,
    on_epoch: OnEpoch = lambda epoch, accuracy: None,
) -> History:
    """L = lambda CE + (1 - lambda) (KL + L_hc) over the observed vertices (section 2.5, step 9); trains in place.

    `teacher`: its probabilities. `y` is N x C where the student is `multilabel`. `hypergraph`, `rho` (E): needed for
    `plus` alone. With lambda = 1 nothing of the teacher is touched: that is the plain MLP. Raises `InputError` on a
    teacher that is missing, of another number of vertices, or whose rows are no probabilities, on scores that are
    not of these hyperedges, on train and val that overlap, and on bad labels.
    """
    config = config or DistillConfig()
    if student.config["multilabel"] != (y.ndim == 2):
        raise InputError(f"expected N x C labels for a multilabel student and N classes else, got {tuple(y.shape)}")
    needed = check_parts(y, train, val, X.shape[0])
    if student.config["num_classes"] < needed:
        raise InputError(f"expected labels below {student.config['num_classes']}, got {needed - 1}")
    if config.lam < 1:
        _check_teacher(teacher, X, student)
        if config.plus:
            _check_scores(hypergraph, rho, X.shape[0])
    objective = _Objective(student, X, y, train, config, teacher, hypergraph, rho)
    X_val, targets = take_rows(X, val), y[val]

    def validate() -> float:
        return agreement(student(X_val), targets)

    key: dict[str, Any] | None = None
    if folder is not None:
        parts: dict[str, Any] = {"X": X, "y": y, "train": train, "val": val}
        if config.lam < 1:
            parts |= {"teacher": teacher} | ({"hypergraph": hypergraph, "rho": rho} if config.plus else {})
        key = {"distill": dataclasses.asdict(config), "student": describe(student)} | fingerprint(**parts)
    return fit(
        *(student, objective.losses, validate, config.train),
        folder=folder, resume=resume, run_key=key, on_epoch=on_epoch,
    )  # fmt: skip


class _Objective:
    """The loss of each step, full batch or by minibatches of vertices and of drawn hyperedges."""

    def __init__(
        self,
        student: LightMLP,
        X: Features,
        y: Tensor,
        train: Tensor,
        config: DistillConfig,
        teacher: Tensor | None,
        hypergraph: Hypergraph | None,
        rho: Tensor | None,
    ) -> None:
        self.student, self.X, self.y, self.train, self.config = student, X, y, train, config
        self.teacher, self.hypergraph, self.rho = teacher, hypergraph, rho
        self.multilabel = bool(student.config["multilabel"])
        self.constraint = config.constraint(self.multilabel)
        self.learns_edges = config.plus and config.lam < 1
        # z^t of every hyperedge, once for the whole training
        self.means = hypergraph.v2e(teacher) if self.learns_edges else None  # type: ignore[union-attr, arg-type]
        without_norm = not student.config["batch_norm"]
        self.labelled = take_rows(X, train) if config.lam == 1 and without_norm else None
        self.labels = y[train]

    def losses(self, epoch: int) -> Iterator[Tensor]:
        drawn = None
        if self.learns_edges:
            assert self.rho is not None
            generator = torch.Generator().manual_seed(epoch_seed(self.config.train.seed, epoch, 1))
            drawn = sample_hyperedges(self.rho, self.config.sampling, generator)
        if self.config.batch_size is None:
            yield self._whole(drawn)
        else:
            yield from self._batches(epoch, self.config.batch_size, drawn)

    def _whole(self, drawn: Tensor | None) -> Tensor:
        lam = self.config.lam
        if self.labelled is not None:
            # without batch norm the other rows do not matter to the labels' loss
            return cross_entropy(self.student(self.labelled), self.labels)
        logits = self.student(self.X)
        loss = logits.new_zeros(())
        if lam > 0:
            loss = loss + lam * cross_entropy(logits[self.train], self.labels)
        if lam < 1:
            assert self.teacher is not None
            loss = loss + (1 - lam) * self._soft(logits, self.teacher)
        if drawn is not None:
            assert self.means is not None and self.hypergraph is not None
            loss = loss + (1 - lam) * self.constraint(logits, self.means, self.hypergraph, drawn)
        return loss

    def _soft(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(logits, teacher, self.config.kd_loss, self.multilabel)

    def _batches(self, epoch: int, size: int, drawn: Tensor | None) -> Iterator[Tensor]:
        """Steps over a random order of the vertices; the drawn hyperedges are dealt out to them evenly."""
        generator = torch.Generator().manual_seed(epoch_seed(self.config.train.seed, epoch, 2))
        num_vertices, device = self.X.shape[0], self.y.device
        batches = torch.randperm(num_vertices, generator=generator).to(device).split(size)
        hands: list[Tensor | None] = [None] * len(batches)
        if drawn is not None:
            ids = drawn.nonzero().squeeze(1)
            ids = ids[torch.randperm(len(ids), generator=generator).to(device)]
            hands = list(ids.tensor_split(len(batches)))
        labelled = torch.zeros(num_vertices, dtype=torch.bool, device=device)
        labelled[self.train] = True
        for batch, edges in zip(batches, hands, strict=True):
            yield self._batch(batch, edges, labelled)

    def _batch(self, batch: Tensor, edges: Tensor | None, labelled: Tensor) -> Tensor:
        lam = self.config.lam
        vertices, structure = batch, None
        if edges is not None and len(edges):
            assert self.hypergraph is not None
            vertices, structure = _with_members(batch, edges, self.hypergraph)
        known = labelled[batch]
        if lam > 0 and not bool(known.any()):
            # a batch without labels takes some, so that every step has the whole loss
            extra = self.train[torch.randint(len(self.train), (min(32, len(self.train)),), device=batch.device)]
            vertices = torch.cat((vertices, extra))
            last = torch.arange(len(vertices) - len(extra), len(vertices), device=batch.device)
            chosen, labels = last, self.y[extra]
        else:
            chosen, labels = known.nonzero().squeeze(1), self.y[batch[known]]
        logits = self.student(take_rows(self.X, vertices))
        loss = logits.new_zeros(())
        if lam > 0:
            loss = loss + lam * cross_entropy(logits[chosen], labels)
        if lam < 1:
            assert self.teacher is not None
            loss = loss + (1 - lam) * self._soft(logits[: len(batch)], self.teacher[batch])
        if structure is not None:
            assert self.means is not None and edges is not None
            into, sizes = structure
            means = (into @ probabilities(logits[: into.shape[1]], self.multilabel)) / sizes.unsqueeze(1)
            loss = loss + (1 - lam) * self.constraint.divergences(means, self.means[edges]).mean()
        return loss


def _with_members(batch: Tensor, edges: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, tuple[SparseMatrix, Tensor]]:
    """The batch, then the members of `edges` that are not in it; and the incidence of `edges` in that numbering."""
    positions, indptr = row_positions(hypergraph.into_edges.indptr, edges)
    members = hypergraph.into_edges.indices[positions]
    number = torch.full((hypergraph.num_vertices,), -1, device=batch.device)
    number[batch] = torch.arange(len(batch), device=batch.device)
    new = members[number[members] < 0].unique()
    number[new] = torch.arange(len(batch), len(batch) + len(new), device=batch.device)
    vertices = torch.cat((batch, new))
    return vertices, (SparseMatrix(indptr, number[members], None, len(vertices)), hypergraph.edge_size[edges])


def _check_teacher(teacher: Tensor | None, X: Features, student: LightMLP) -> None:
    if teacher is None:
        raise InputError("expected the teacher's probabilities for lambda below 1, got none")
    expected = (X.shape[0], student.config["num_classes"])
    if tuple(teacher.shape) != expected:
        raise InputError(f"expected teacher probabilities of shape {expected}, got {tuple(teacher.shape)}")
    if not bool(torch.isfinite(teacher).all()):
        raise InputError("expected finite teacher probabilities, got NaN or infinity")
    least, most = float(teacher.min()), float(teacher.max())
    if least < 0 or most > 1 + _ROUNDING:
        raise InputError(f"expected teacher probabilities from 0 to 1, not logits, got {least:.3g} to {most:.3g}")
    off = float((teacher.float().sum(1) - 1).abs().max())
    if not student.config["multilabel"] and off > _ROUNDING:
        raise InputError(f"expected teacher probabilities that sum to 1 for a vertex, got a sum {off:.3g} off")


def _check_scores(hypergraph: Hypergraph | None, rho: Tensor | None, num_vertices: int) -> None:
    if hypergraph is None or rho is None:
        raise InputError("expected a hypergraph and rho for LightHGNN+ (plus), got none")
    if hypergraph.num_vertices != num_vertices:
        raise InputError(f"expected a hypergraph of {num_vertices} vertices, got {hypergraph.num_vertices}")
    if tuple(rho.shape) != (hypergraph.num_edges,):
        raise InputError(f"expected rho of {hypergraph.num_edges} hyperedges, got shape {tuple(rho.shape)}")
    if not bool(((rho >= 0) & (rho <= 1)).all()):
        raise InputError("expected rho from 0 to 1, got NaN or a score beyond it")
