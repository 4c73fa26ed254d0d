"""How much of the base model is left: cross-entropy, KL to the base, top-1 agreement, key-value recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv import engine
from isotone.swiftkv.data import Batch, recall_task
from isotone.swiftkv.losses import IGNORED

Logits = Callable[..., Float[Tensor, "batch n vocab"]]
"""Token ids (batch, n), and where an example's positions are not 0 to n - 1 these (batch, n), to logits."""


def student_logits(model: Any) -> Logits:
    """Token ids to the logits of `model` as it is switched."""
    return lambda ids, position_ids=None: model(input_ids=ids, position_ids=position_ids, use_cache=False).logits


def teacher_logits(model: Any) -> Logits:
    """Token ids to the logits of the model that `model` was converted from."""

    def logits(ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        with model.teacher():
            return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits

    return logits


def cached_logits(model: Any, kv_dtype: str = "model") -> Logits:
    """Token ids to the logits of `model` attending to what a cache of `kv_dtype` keeps, rounded as it is kept."""

    def logits(ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        batch, n = ids.shape
        if position_ids is not None and not torch.equal(position_ids.cpu(), torch.arange(n).expand(batch, n)):
            raise InputError("expected whole rows for a cache, got packed ones: its positions count from 0 to n - 1")
        cache = engine.make_cache(model, batch, n, kv_dtype)
        return engine.extend(model, list(ids), cache, keep=n).unflatten(0, (batch, n))

    return logits


@torch.no_grad()
def fidelity(student: Logits, teacher: Logits, batches: Sequence[Tensor | Batch]) -> dict[str, float]:
    """Of next-token prediction on `batches`: "cross_entropy" and "teacher_cross_entropy" (nats a token), "kl" (of
    teacher to student, nats a token), "agreement" (share of tokens whose likeliest successor is the same).

    A batch is ids (b, n), or a `Batch` with its positions, of which the tokens that have a label count. Raises
    `InputError` where no token is asked for, or a logit is not finite.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in batches:
        whole = batch if isinstance(batch, Batch) else Batch(batch)
        arguments = [part for part in (whole.input_ids, whole.position_ids) if part is not None]
        labels = whole.input_ids if whole.labels is None else whole.labels
        asked = labels[:, 1:] != IGNORED
        ours, theirs = (logits(*arguments)[:, :-1][asked].float() for logits in (student, teacher))
        for name, logits in (("the model", ours), ("the model it is compared with", theirs)):
            if not bool(logits.isfinite().all()):
                raise InputError(f"expected finite logits of {name}, got NaN or infinity: are its weights whole?")
        wanted = labels[:, 1:][asked]
        log_ours, log_theirs = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
        parts = [
            F.nll_loss(log_ours, wanted, reduction="sum"),
            F.nll_loss(log_theirs, wanted, reduction="sum"),
            F.kl_div(log_ours, log_theirs, log_target=True, reduction="sum"),
            (ours.argmax(-1) == theirs.argmax(-1)).sum(),
        ]
        sums += torch.tensor([float(part) for part in parts], dtype=torch.float64)
        count += wanted.numel()
    if not count:
        raise InputError("expected at least one token to evaluate on, got none")
    cross, base, kl, agreement = (sums / count).tolist()
    return {"cross_entropy": cross, "teacher_cross_entropy": base, "kl": max(0.0, kl), "agreement": agreement}


@torch.no_grad()
def recall_accuracy(
    logits: Logits, pairs: int, *, offset: int = 0, examples: int = 256, batch: int = 64, seed: int = 0
) -> float:
    """The share of key-value recall sequences of `pairs` pairs whose answer is the likeliest value.

    `offset` is added to the task's ids: where its symbols begin in the model's vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    right = total = 0
    while total < examples:
        ids, labels = recall_task(min(batch, examples - total), pairs, generator)
        found = logits(ids + offset)[:, :-1].argmax(-1)
        asked = labels[:, 1:] != IGNORED
        right += int((found[asked] == labels[:, 1:][asked] + offset).sum())
        total += len(ids)
    return right / total
