"""What is minimised: a mean loss over a batch and how many terms it has, in fp64 where it is summed.

l+ - l- loses most of its digits to cancellation, so that losses are summed in fp64 from fp32 terms whatever type the
model computes in (section 7, pitfalls).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from isotone.shared.errors import InputError

IGNORED = -100
Loss = float | Tensor
Objective = Callable[[nn.Module, Any], tuple[Loss, int] | Loss]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Mean loss and number of its terms (tokens that carry loss, or examples) of a Hugging Face model on a batch.

    `batch`: what the model takes, with "labels": (B, T) token ids, -100 where none is asked, for a causal model; (B,)
    classes for a classifier. Other models' own mean loss is taken as it is, over B examples. Raises `InputError` where
    the batch has no labels.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise InputError('expected a batch with "labels", or a closure that returns a loss')
    labels = batch["labels"]
    if not isinstance(labels, Tensor):
        raise InputError(f'expected a tensor of "labels", got {type(labels).__name__}')
    inputs = _inputs(model, batch)
    if _is_causal(model):
        return _next_tokens(model, inputs, labels)
    if labels.ndim == 1 and not labels.is_floating_point():
        logits = model(**inputs).logits
        if logits.ndim == 2 and logits.shape[1] > 1:
            return _mean(logits, labels)
    return model(**inputs, labels=labels).loss, len(labels)


def label_words(token_ids: Sequence[int]) -> Objective:
    """The prompted classification of section 2.11: cross-entropy over the logits of the label words at the last token.

    `token_ids`: one token a class. The batch has "labels" (B,) of classes; padding, if any, is masked by
    "attention_mask" (B, T).
    """
    if len(token_ids) < 2 or len(set(token_ids)) < len(token_ids):
        raise InputError(f"expected two or more different label words, got {list(token_ids)}")

    def objective(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        return _mean(class_logits(model, batch, token_ids), batch["labels"])

    return objective


def class_logits(model: nn.Module, batch: Mapping[str, Any], words: Sequence[int] = ()) -> Float[Tensor, "B classes"]:
    """A classifier's logits or, with label `words`, a causal model's at the last token of each row."""
    inputs = _inputs(model, batch)
    if not words:
        return model(**inputs).logits
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (places * mask).amax(1) if mask is not None else places[-1].expand(len(ids))
    asked, row = torch.unique(last, return_inverse=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=asked).logits
    else:
        # soft prompts stand before the tokens
        logits = model(**inputs).logits[:, -ids.shape[1] :][:, asked]
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, row.to(logits.device)][:, list(words)]


def as_loss(value: Any) -> tuple[float, int]:
    """What an objective or closure returned, as a Python float and a number of terms (1 where it gave none).

    Raises `InputError` for anything but a number, or a pair of it and a count.
    """
    loss, count = value if isinstance(value, tuple) and len(value) == 2 else (value, 1)
    number = isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1)
    if not number or isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"expected a loss, or a loss and the number of its terms, got {value!r:.80}")
    return float(loss), count


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with but for the labels; keys and values of all layers are not kept."""
    found = {name: value for name, value in batch.items() if name != "labels"}
    if "use_cache" in inspect.signature(_inner(model).forward).parameters:
        found.setdefault("use_cache", False)
    return found


def _inner(model: nn.Module) -> nn.Module:
    base: Any = getattr(model, "get_base_model", None)  # peft's
    return base() if callable(base) else model


def _is_causal(model: nn.Module) -> bool:
    return type(_inner(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _next_tokens(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, int]:
    """Only the positions at which some row's next token is asked go through the head."""
    asked = labels[:, 1:]
    places = (asked != IGNORED).any(0).nonzero().flatten()
    # a rank whose shard asks for nothing computes a position nonetheless: others may wait for it at every block
    places = places if len(places) else places.new_zeros(1)
    whole = len(places) == asked.shape[1]
    if not whole and "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=places).logits
    else:
        # soft prompts stand before the tokens
        logits = model(**inputs).logits[:, -labels.shape[1] :][:, places]
    return _mean(logits.flatten(0, 1), asked[:, places].flatten())


def _mean(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The mean cross-entropy over labels that are not -100, and how many they are."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    count = int((labels != IGNORED).sum())
    terms = functional.cross_entropy(wide, labels.to(wide.device), reduction="none", ignore_index=IGNORED)
    return terms.double().sum() / max(count, 1), count
