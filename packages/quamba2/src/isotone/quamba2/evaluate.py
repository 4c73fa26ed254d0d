"""How near a quantised model is to the float one on a text: cross-entropy, KL and agreement of the likeliest token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isotone.quamba2.calibrate import batches
from isotone.shared.errors import InputError

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Over the tokens scored: `cross_entropy` in nats a token and `perplexity`, its exponential; against a reference
    `kl` in nats a token and `agreement`, the part of tokens whose likeliest successor is the same; else None."""

    tokens: int
    cross_entropy: float
    perplexity: float
    kl: float | None = None
    agreement: float | None = None


@torch.no_grad()
def evaluate(logits: Logits, samples: Sequence[Int[Tensor, "b l"]], reference: Logits | None = None) -> Evaluation:
    """Score `logits`, a function from ids (b, l) to (b, l, vocab), on `samples` of two tokens or more.

    Each token but the first of a row is predicted. Raises `InputError` without samples.
    """
    if not samples or any(ids.shape[-1] < 2 for ids in samples):
        raise InputError("expected samples of at least 2 tokens, got fewer")
    total, lost, kl, same = 0, 0.0, 0.0, 0
    for ids in batches(samples):
        found = _log_probabilities(logits, ids)
        total += ids[:, 1:].numel()
        lost += float(F.nll_loss(found.flatten(0, 1), ids[:, 1:].flatten().to(found.device), reduction="sum"))
        if reference is not None:
            wanted = _log_probabilities(reference, ids).to(found.device)
            kl += float(F.kl_div(found, wanted, log_target=True, reduction="sum"))
            same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    mean = lost / total
    if not math.isfinite(mean):
        raise InputError("expected finite logits, got NaN or infinity")
    scores = (None, None) if reference is None else (kl / total, same / total)
    return Evaluation(total, mean, math.exp(min(mean, 700.0)), *scores)


def _log_probabilities(logits: Logits, ids: Tensor) -> Float[Tensor, "b l vocab"]:
    return logits(ids)[:, :-1].float().log_softmax(-1)
