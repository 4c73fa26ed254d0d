"""A user's own file as batches: running text, prompts with completions, or texts with classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotone.distzo2.data import Batch, Windows
from isotone.distzo2.objective import IGNORED
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """Batches of training as a function of the step, batches held out (the file's last tenth), and a hash of both."""

    train: Callable[[int], Batch]
    held_out: list[Batch]
    data_id: str


def corpus_of(path: Path, folder: Path, model: Any, rows: int, length: int, seed: int) -> Corpus:
    """What `path` trains a model of `folder` on, `rows` a batch, at most `length` tokens each.

    A .jsonl file has a line of {"prompt", "completion"} each, of which the completion is asked for, or of {"text",
    "label"} for a classifier; any other file is text, taken in windows. Raises `InputError` where it is none of them,
    or too short.
    """
    encode = _encoder(folder, model.config.vocab_size)
    digest = hashlib.sha256(_read(path).encode()).hexdigest()
    data_id = f"{digest[:16]} {rows} {length} {seed}"
    if path.suffix == ".jsonl":
        examples = [_example(line, number, path, encode, length) for number, line in _lines(path)]
        cut = len(examples) * 9 // 10
        if cut < 1 or len(examples) - cut < 1:
            raise InputError(f"expected at least 2 lines in {str(path)!r}, got {len(examples)}")
        held = [_padded(examples[i : i + rows]) for i in range(cut, len(examples), rows)]
        return Corpus(_Drawn(examples[:cut], rows, seed), held[:8], data_id)
    ids = torch.tensor(encode(_read(path)), dtype=torch.long)
    cut = len(ids) * 9 // 10
    if len(ids) - cut < length:
        raise InputError(f"expected {str(path)!r} to have at least {10 * length} tokens, got {len(ids)}")
    held_out = Windows(ids[cut:], length, rows, 7)
    return Corpus(Windows(ids[:cut], length, rows, seed), [held_out(step) for step in range(4)], data_id)


@dataclass(frozen=True)
class _Drawn:
    """Examples drawn with replacement, as a function of the step."""

    examples: Sequence[tuple[list[int], list[int] | int]]
    rows: int
    seed: int

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        chosen = torch.randint(len(self.examples), (self.rows,), generator=generator).tolist()
        return _padded([self.examples[i] for i in chosen])


def _padded(examples: Sequence[tuple[list[int], list[int] | int]]) -> Batch:
    """Rows of one length, padded on the right where nothing is asked for."""
    width = max(len(ids) for ids, _ in examples)

    def rows(values: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    ids = [ids for ids, _ in examples]
    labels = [label for _, label in examples]
    asked = [label for label in labels if isinstance(label, list)]
    return {
        "input_ids": rows(ids, 0),
        "attention_mask": rows([[1] * len(row) for row in ids], 0),
        "labels": rows(asked, IGNORED) if asked else torch.tensor(labels),
    }


def _example(
    line: str, number: int, path: Path, encode: Callable[[str], list[int]], length: int
) -> tuple[list[int], list[int] | int]:
    try:
        item = json.loads(line)
        if "label" in item:
            return encode(str(item["text"]))[:length], int(item["label"])
        asked, answer = encode(str(item["prompt"])), encode(str(item["completion"]))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"expected prompt and completion, or text and label, on line {number} of {str(path)!r}"
        ) from None
    # what does not fit is cut off the prompt's beginning
    asked = asked[max(0, len(asked) + len(answer) - length) :]
    return (asked + answer)[:length], ([IGNORED] * len(asked) + answer)[:length]


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {str(path)!r}") from None


def _encoder(folder: Path, vocab_size: int) -> Callable[[str], list[int]]:
    """The folder's tokenizer or, where it has none, one byte a token."""
    tokenizer: Any = None
    if any(folder.glob("tokenizer*")):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer else list(text.encode())
        if ids and max(ids) >= vocab_size:
            raise InputError(f"expected token ids below the model's {vocab_size}, got {max(ids)}; give it a tokenizer")
        return list(ids)

    return encode
