"""The losses of distillation (sections 2.4, 2.5): on vertices, and on the mean predictions of hyperedges.

Dimensions: B vertices, E hyperedges, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isotone.lighthgnn.outputs import log_probabilities, outcomes, probabilities
from isotone.lighthgnn.structure import Structure
from isotone.shared.errors import InputError

KD_LOSSES = ("kl", "official")
TARGETS = ("mean_prob", "softmax")
SMALLEST = 1e-30
"""Below this a probability's logarithm is not taken: a normal float32, far from where it matters."""


def kd_loss(
    logits: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], kind: str = "kl", multilabel: bool = False
) -> Float[Tensor, ""]:
    """The mean over vertices of KL(p^t || p^s) (section 2.4).

    `logits`: the student's; `teacher`: probabilities. `kind` "official" is the term of the authors' code, which
    hands probabilities to a function that expects their logarithms: sum_c exp(p^t_c) (p^t_c - log p^s_c). Its
    minimiser is softmax(p^t), an almost flat target: the teacher's argmax without its confidence. `multilabel`: a
    sum over labels, each a distribution of two outcomes.
    """
    log_student = log_probabilities(logits.float(), multilabel)
    return _divergence(log_student, outcomes(teacher, multilabel), kind).mean()


def _divergence(log_student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind == "kl":
        # xlogy twice, not a difference of logarithms: 0 log 0 = 0 in value and gradient
        return (torch.special.xlogy(teacher, teacher) - teacher * log_student).flatten(1).sum(1)
    if kind != "official":
        raise InputError(f"expected kd_loss of {', '.join(KD_LOSSES)}, got {kind!r}")
    return (teacher.exp() * (teacher - log_student)).flatten(1).sum(1)


@dataclass(frozen=True)
class HighOrderConstraint:
    """L_hc (steps 7, 8): the student's mean prediction on a hyperedge matches the teacher's.

    `target` "mean_prob" compares z^{1/tau} / sum z^{1/tau} (at tau 1 the means z themselves); "softmax" compares
    softmax(z / tau), the paper's alpha. `kind` as in `kd_loss`, where "official" has tau divide both means. With
    `multilabel` z is the two outcomes of each label.
    """

    tau: float = 1.0
    target: str = "mean_prob"
    kind: str = "kl"
    multilabel: bool = False

    def __post_init__(self) -> None:
        if not (self.tau > 0 and self.tau < float("inf")):
            raise InputError(f"expected a finite tau above 0, got {self.tau}")
        if self.target not in TARGETS:
            raise InputError(f"expected target of {', '.join(TARGETS)}, got {self.target!r}")
        if self.kind not in KD_LOSSES:
            raise InputError(f"expected kd_loss of {', '.join(KD_LOSSES)}, got {self.kind!r}")

    def divergences(
        self, student_means: Float[Tensor, "E C"], teacher_means: Float[Tensor, "E C"]
    ) -> Float[Tensor, " E"]:
        """The divergence on each hyperedge, from the means z of the probabilities."""
        student_means, teacher_means = (outcomes(z, self.multilabel) for z in (student_means, teacher_means))
        if self.kind == "official":
            student_log = (student_means / self.tau).clamp(min=SMALLEST).log()
            return _divergence(student_log, teacher_means / self.tau, "official")
        if self.target == "softmax":
            return _divergence((student_means / self.tau).log_softmax(-1), (teacher_means / self.tau).softmax(-1), "kl")
        student_log = student_means.clamp(min=SMALLEST).log() / self.tau
        teacher_log = teacher_means.clamp(min=SMALLEST).log() / self.tau
        if self.tau == 1:
            return _divergence(student_log, teacher_means, "kl")
        return _divergence(student_log.log_softmax(-1), teacher_log.softmax(-1), "kl")

    def __call__(
        self,
        logits: Float[Tensor, "B C"],
        teacher_means: Float[Tensor, "E C"],
        structure: Structure,
        drawn: Bool[Tensor, " E"],
    ) -> Float[Tensor, ""]:
        """(1 / |E'|) sum over the drawn hyperedges; 0, with zero gradient, where none was drawn.

        `teacher_means`: v2e_mean(p^t), computed once for the whole training.
        """
        count = drawn.sum()
        means = structure.v2e(probabilities(logits, self.multilabel), "mean")
        each = self.divergences(means, teacher_means)
        return (each * drawn).sum() / count.clamp(min=1)
