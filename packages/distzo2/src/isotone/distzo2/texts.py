"""A user's own file as batches: running text, prompts with completions, or texts with classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isotone.distzo2.data import Batch, Windows
from isotone.distzo2.distributed import to_device
from isotone.distzo2.loading import reading
from isotone.distzo2.objective import IGNORED, Objective, as_loss, class_logits, label_words, model_loss
from isotone.shared.errors import InputError

Example = tuple[list[int], list[int] | int]
"""Tokens, and what is asked of each of them, or a class."""


@dataclass(frozen=True)
class Corpus:
    """Batches of training as a function of the step, batches held out (the file's last tenth), and a hash of both."""

    train: Callable[[int], Batch]
    held_out: list[Batch]
    data_id: str
    words: tuple[int, ...] = ()
    classes: bool = False

    @property
    def objective(self) -> Objective:
        """What a batch costs: the model's own mean loss, or the label words' cross-entropy."""
        return label_words(self.words) if self.words else model_loss

    def judge(
        self, model: Any, run: Callable[[Callable[[], Any]], Any], device: torch.device | str, most: int | None = None
    ) -> dict[str, float]:
        """`model` on what is held out: mean `loss`, `terms` that it is over and, of classes, the `accuracy` in %.

        `run(function)` calls a function of the model: an engine's `run`, or just that. `most`: batches.
        """
        total, terms, right = 0.0, 0, 0
        for held in self.held_out[:most]:
            batch = to_device(held, device)
            if self.classes:
                logits = run(partial(class_logits, model, batch, self.words))
                labels = batch["labels"].to(logits.device)
                right += int((logits.argmax(-1) == labels).sum())
                loss, count = float(functional.cross_entropy(logits.double(), labels)), len(labels)
            else:
                loss, count = as_loss(run(partial(model_loss, model, batch)))
            total, terms = total + loss * count, terms + count
        if not terms:
            raise InputError("expected held-out rows that ask for something, got none")
        return {"loss": total / terms, "terms": terms, **({"accuracy": 100 * right / terms} if self.classes else {})}


def corpus_of(
    path: Path, folder: Path, model: Any, rows: int, length: int, seed: int, words: Sequence[str] = ()
) -> Corpus:
    """What `path` trains a model of `folder` on, `rows` a batch, at most `length` tokens each.

    A .jsonl file has a line of {"prompt", "completion"} each, of which the completion is asked for, or of {"text",
    "label"} for a classifier or, with label `words` (one token a class), for a causal model; any other file is text,
    taken in windows. Raises `InputError` where it is none of them, or too short.
    """
    if length > (most := getattr(model.config, "max_position_embeddings", None) or length):
        raise InputError(f"expected a context of at most the model's {most} positions, got {length}")
    encode = _Encoder(folder, model.config.vocab_size)
    digest = hashlib.sha256(_read(path).encode()).hexdigest()
    data_id = f"{digest[:16]} {rows} {length} {seed}"
    if path.suffix == ".jsonl":
        examples = [_example(line, number, path, encode, length, bool(words)) for number, line in _lines(path)]
        cut = len(examples) * 9 // 10
        if cut < 1 or len(examples) - cut < 1:
            raise InputError(f"expected at least 2 lines in {str(path)!r}, got {len(examples)}")
        pad = _pad_token(model, rows)
        held = [_padded(examples[i : i + rows], pad) for i in range(cut, len(examples), rows)]
        tokens, classes = _words(words, encode), _classes(examples, path)
        _check_classes(examples, path, model, tokens, classes)
        data_id += f" {tokens}" if tokens else ""
        return Corpus(_Drawn(examples[:cut], rows, seed, pad), held, data_id, tokens, classes)
    if words:
        raise InputError(f"expected lines of text and label for label words, got {str(path)!r}")
    ids = torch.tensor(encode(_read(path)), dtype=torch.long)
    cut = len(ids) * 9 // 10
    if len(ids) - cut < length:
        raise InputError(f"expected {str(path)!r} to have at least {10 * length} tokens, got {len(ids)}")
    held_out = Windows(ids[cut:], length, rows, 7)
    return Corpus(Windows(ids[:cut], length, rows, seed), [held_out(step) for step in range(4)], data_id)


def _pad_token(model: Any, rows: int) -> int:
    """What rows are padded with: a classifier finds its last token by it, others by the mask."""
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None:
        return int(pad)
    if rows > 1 and type(model).__name__.endswith("ForSequenceClassification"):
        raise InputError("expected a pad_token_id in the classifier's config for batches of several rows, found none")
    return 0


def _words(words: Sequence[str], encode: _Encoder) -> tuple[int, ...]:
    """The token of each label word."""
    found = []
    for word in words:
        ids = encode(word)
        if len(ids) != 1:
            raise InputError(f"expected a label word of one token, got {word!r} of {len(ids)}")
        found += ids
    if found:
        label_words(found)  # refuses one word, and the same word twice
    return tuple(found)


def _classes(examples: Sequence[Example], path: Path) -> bool:
    """Whether all lines have classes, none of them completions."""
    kinds = {isinstance(label, int) for _, label in examples}
    if len(kinds) > 1:
        raise InputError(f"expected lines of one kind in {str(path)!r}, got completions and labels")
    return kinds.pop()


def _check_classes(examples: Sequence[Example], path: Path, model: Any, words: tuple[int, ...], classes: bool) -> None:
    """That lines, model and label words belong together, and that every label is a class."""
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    if classifier and (words or not classes):
        raise InputError(f"expected lines of text and label, and no label words, for a classifier: {str(path)!r}")
    if not classes:
        if words:
            raise InputError(f"expected lines of text and label for label words, got completions: {str(path)!r}")
        return
    if not classifier and not words:
        raise InputError(f"expected label words for a causal model on lines of text and label: {str(path)!r}")
    most = len(words) or model.config.num_labels
    for number, (_, label) in enumerate(examples, 1):
        if not (isinstance(label, int) and 0 <= label < most):
            raise InputError(f"expected labels below {most}, got {label} in example {number} of {str(path)!r}")


@dataclass(frozen=True)
class _Drawn:
    """Examples drawn with replacement, as a function of the step."""

    examples: Sequence[Example]
    rows: int
    seed: int
    pad: int

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        chosen = torch.randint(len(self.examples), (self.rows,), generator=generator).tolist()
        return _padded([self.examples[i] for i in chosen], self.pad)


def _padded(examples: Sequence[Example], pad: int) -> Batch:
    """Rows of one length, padded on the right where nothing is asked for."""
    width = max(len(ids) for ids, _ in examples)

    def rows(values: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    ids = [ids for ids, _ in examples]
    labels = [label for _, label in examples]
    asked = [label for label in labels if isinstance(label, list)]
    return {
        "input_ids": rows(ids, pad),
        "attention_mask": rows([[1] * len(row) for row in ids], 0),
        "labels": rows(asked, IGNORED) if asked else torch.tensor(labels),
    }


def _example(line: str, number: int, path: Path, encode: _Encoder, length: int, prompts: bool) -> Example:
    try:
        item = json.loads(line)
        if "label" in item:
            ids = encode(str(item["text"]), _PROMPT if prompts else _WHOLE)
            if not ids:
                raise ValueError
            # a prompt ends in what asks for the class
            return _tail(ids, length, encode.first) if prompts else ids[:length], int(item["label"])
        asked, answer = encode(str(item["prompt"]), _PROMPT), encode(str(item["completion"]))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"expected prompt and completion, or text and label, on line {number} of {str(path)!r}"
        ) from None
    if not answer or len(asked) + len(answer) < 2:
        raise InputError(
            f"expected a completion after another token on line {number} of {str(path)!r}, got nothing to ask for"
        )
    # what does not fit is cut off the prompt's beginning
    asked = _tail(asked, max(1, length - len(answer)), encode.first)
    return (asked + answer)[:length], ([IGNORED] * len(asked) + answer)[:length]


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {str(path)!r}") from None


def _tail(ids: list[int], most: int, first: int | None) -> list[int]:
    """The last `most` tokens; a token that begins every text stays at the beginning."""
    if len(ids) <= most:
        return ids
    return [first, *ids[len(ids) - most + 1 :]] if first is not None and ids[0] == first else ids[len(ids) - most :]


_WHOLE, _PROMPT = "whole", "prompt"


class _Encoder:
    """The folder's tokenizer or, where it has none, one byte a token. `first`: the token that begins a text, if any."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._vocab_size, self._tokenizer, self.first = vocab_size, None, None
        if any(folder.glob("tokenizer*")):
            from transformers import AutoTokenizer

            with reading(folder):
                tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._tokenizer, self.first = tokenizer, tokenizer.bos_token_id

    def __call__(self, text: str, kind: str = "") -> list[int]:
        """The tokens of a piece of text; those that the tokenizer puts around a whole text, or before a prompt."""
        if self._tokenizer is None:
            ids = list(text.encode())
        else:
            ids = list(self._tokenizer(text, add_special_tokens=bool(kind))["input_ids"])
            # what follows a prompt is not after its end
            ends = (
                kind == _PROMPT
                and len(ids) > 1
                and ids[-1] in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
            )
            ids = ids[:-1] if ends else ids
        if ids and max(ids) >= self._vocab_size:
            raise InputError(
                f"expected token ids below the model's {self._vocab_size}, got {max(ids)}; give it a tokenizer"
            )
        return ids
