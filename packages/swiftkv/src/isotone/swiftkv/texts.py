"""What a user's text file trains or scores: tokens, examples, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from isotone.shared.errors import InputError
from isotone.swiftkv.data import Batch, Windows, fingerprint, pack
from isotone.swiftkv.losses import IGNORED
from isotone.swiftkv.tokens import conversation, encode, tokenizer_of


def tokens_of(text: Path, folder: Path, model: Any) -> torch.Tensor:
    """The ids of a text file by the tokenizer in `folder`, or of its bytes."""
    return encode(read(text), folder, model.config.vocab_size)


def read(text: Path) -> str:
    """Raises `InputError` where the file is not UTF-8."""
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {str(text)!r}") from None


def batches_of(
    text: Path, folder: Path, model: Any, batch: int, context: int, seed: int, fuse: float
) -> tuple[Any, list[Any], str]:
    """Training batches as a function of the step, held-out ones to score on (of the last tenth), and the data's id."""
    if text.suffix == ".jsonl":
        rows = pack(examples_of(text, folder, model), context, fuse, seed)
        cut = min(len(rows) * 9 // 10, len(rows) - 1)
        if cut < 1:
            raise InputError(
                f"expected {str(text)!r} to fill at least 2 rows of --context {context} tokens, one to train on and "
                f"one held out, got {len(rows)}"
            )
        kept, held = rows[:cut], rows[cut:]

        def packed(step: int) -> Batch:
            generator = torch.Generator().manual_seed(1_000_003 * seed + step)
            chosen = [kept[int(i)] for i in torch.randint(len(kept), (batch,), generator=generator)]
            parts = zip(*((row.input_ids, row.labels, row.position_ids) for row in chosen), strict=True)
            return Batch(*(torch.cat(part) for part in parts))  # type: ignore[arg-type]

        parts = (part for row in rows for part in (row.input_ids, row.labels, row.position_ids))
        return packed, [row.to(model.device) for row in held[:8]], fingerprint(batch, context, seed, *parts)
    ids = tokens_of(text, folder, model)
    cut = len(ids) * 9 // 10
    if len(ids) - cut < context:
        raise InputError(
            f"expected {str(text)!r} to have at least {10 * context} tokens for --context {context}, got {len(ids)}"
        )
    held_out = Windows(ids[cut:], context, batch, 7)
    training = Windows(ids[:cut], context, batch, seed)
    return training, [held_out(step).input_ids.to(model.device) for step in range(4)], training.data_id


def examples_of(text: Path, folder: Path, model: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each line of a .jsonl file: prompt and completion, or messages."""
    tokenizer = tokenizer_of(folder)
    end = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples: list[tuple[list[int], list[int]]] = []
    for number, line in enumerate(read(text).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if "messages" in item:
                examples.append(conversation(item["messages"], tokenizer, model.config.vocab_size))
                continue
            asked, answered = str(item["prompt"]), str(item["completion"])
        except InputError as error:
            raise InputError(f"{error}, on line {number} of {str(text)!r}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"expected prompt and completion, or messages, on line {number} of {str(text)!r}"
            ) from None
        words = encode(asked, folder, model.config.vocab_size, tokenizer=tokenizer).tolist()
        reply = encode(answered, folder, model.config.vocab_size, starts=False, tokenizer=tokenizer).tolist() + end
        examples.append((words + reply, [IGNORED] * len(words) + reply))
    return examples
