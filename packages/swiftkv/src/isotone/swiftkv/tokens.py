"""Text to token ids and back: by the model folder's own tokenizer, or where it has none, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv.loading import reading


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none: then a token is a byte."""
    if not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    with reading(folder):
        return AutoTokenizer.from_pretrained(folder)


def encode(text: str, folder: Path, vocab_size: int, starts: bool = True) -> Int[Tensor, " n"]:
    """The ids of `text`, with the tokens that the tokenizer puts around a text where it `starts` one.

    Raises `InputError` where there is no tokenizer and the model has too few tokens for bytes.
    """
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        return torch.tensor(tokenizer(text, add_special_tokens=starts)["input_ids"], dtype=torch.long)
    raw = list(text.encode())
    if raw and max(raw) >= vocab_size:
        raise InputError(
            f"expected a tokenizer in {str(folder)!r}: its model has {vocab_size} tokens, too few for bytes"
        )
    return torch.tensor(raw, dtype=torch.long)
