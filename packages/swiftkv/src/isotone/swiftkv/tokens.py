"""Text to token ids and back: by the model folder's own tokenizer, or where it has none, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv.loading import reading
from isotone.swiftkv.losses import IGNORED


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none: then a token is a byte."""
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    with reading(folder):
        return AutoTokenizer.from_pretrained(folder)


def encode(text: str, folder: Path, vocab_size: int, starts: bool = True, tokenizer: Any = None) -> Int[Tensor, " n"]:
    """The ids of `text`, with the tokens that the tokenizer puts around a text where it `starts` one.

    `tokenizer`: the folder's, where it is loaded already. Raises `InputError` where there is no tokenizer and the model
    has too few tokens for bytes, or the tokenizer gives ids that the model lacks.
    """
    tokenizer = tokenizer or tokenizer_of(folder)
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(text, add_special_tokens=starts)["input_ids"], dtype=torch.long)
        if len(ids) and int(ids.max()) >= vocab_size:
            raise InputError(
                f"expected the tokenizer of {str(folder)!r} to give ids below its model's {vocab_size}, got "
                f"{int(ids.max())}"
            )
        return ids
    raw = list(text.encode())
    if raw and max(raw) >= vocab_size:
        raise InputError(
            f"expected a tokenizer in {str(folder)!r}: its model has {vocab_size} tokens, too few for bytes"
        )
    return torch.tensor(raw, dtype=torch.long)


def conversation(messages: list[dict[str, str]], tokenizer: Any, vocab_size: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation by the tokenizer's own template; only the assistant's words are asked for.

    `messages`: role and content of each. Raises `InputError` without a template, without an answer, and where the
    template writes earlier turns anew as a conversation goes on, so that what an answer is can not be told.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError("expected a tokenizer with a chat template for messages")
    ids: list[int] = []
    labels: list[int] = []
    said = ""

    def add(text: str, asked: bool) -> None:
        nonlocal said
        if not text.startswith(said):
            raise InputError("expected a chat template that only adds to a conversation")
        new = tokenizer(text[len(said) :], add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if asked else [IGNORED] * len(new))
        said = text

    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            if number:
                add(_written(tokenizer, messages[:number], True), False)
            add(_written(tokenizer, messages[: number + 1], False), True)
    if not ids:
        raise InputError("expected a message of the assistant")
    if max(ids) >= vocab_size:
        raise InputError(f"expected the tokenizer to give ids below the model's {vocab_size}, got {max(ids)}")
    return ids, labels


def _written(tokenizer: Any, messages: list[dict[str, str]], answer: bool) -> str:
    """The conversation as its template writes it, up to where an `answer` begins."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # a template is a program of the model's author
        raise InputError(f"expected messages that the chat template takes: {error}") from None
