"""Texts as token ids: by the model folder's own tokenizer, or where it has none, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, or None where a token is a byte. Raises `InputError` on a broken one."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a tokenizer's file is read by a library of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a whole tokenizer in {str(folder)!r}: {first}") from None


def read(text: Path) -> str:
    """Raises `InputError` where the file is not UTF-8."""
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {str(text)!r}") from None


def encode(text: str, folder: Path, vocab: int) -> Int[Tensor, " n"]:
    """The ids of `text` for the model in `folder`. Raises `InputError` where the model has too few tokens for them."""
    tokenizer = tokenizer_of(folder)
    ids = list(text.encode()) if tokenizer is None else list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids and max(ids) >= vocab:
        kind = "bytes" if tokenizer is None else "its tokenizer"
        raise InputError(f"expected ids below the {vocab} tokens of {str(folder)!r}, got {max(ids)} out of {kind}")
    return torch.tensor(ids, dtype=torch.long)


def decode(ids: Sequence[int] | Tensor, folder: Path) -> str:
    """The text of `ids`."""
    numbers = [int(i) for i in ids]
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        return str(tokenizer.decode(numbers))
    return bytes(i for i in numbers if i < 256).decode("utf-8", errors="replace")


def samples(ids: Int[Tensor, " n"], count: int, length: int) -> list[Tensor]:
    """`count` windows of `length` tokens, or as many as there are, evenly spread over `ids`.

    Raises `InputError` where there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise InputError(f"expected a text of at least 2 tokens, got {len(ids)}")
    length = min(length, len(ids))
    whole = min(count, max(1, len(ids) // length))
    starts = torch.linspace(0, len(ids) - length, whole).long().tolist()
    return [ids[start : start + length] for start in starts]
