"""What the engine is given: prompts of different lengths, the rows they go to, tokens to decode; and its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError, check_count
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig, check_family
from isotone.swiftkv.families import CacheSpec

Prompt = Int[Tensor, " _"]  # any length: the prompts of one call differ


def unpad(
    input_ids: Int[Tensor, "batch n"],
    attention_mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> list[Prompt]:
    """The rows of a batch without their padding, which may stand left or right; `attention_mask` (batch, n).

    Raises `InputError` on ids that are no whole numbers of two dimensions, an empty prompt, a mask with holes, or an
    id outside the vocabulary.
    """
    check_batch(input_ids, vocab_size)
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"expected an attention_mask of shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    prompts = []
    for number, row in enumerate(input_ids):
        if attention_mask is not None:
            if not bool(((attention_mask[number] == 0) | (attention_mask[number] == 1)).all()):
                raise InputError(
                    f"expected an attention_mask of 0 and 1, got {float(attention_mask[number].float().min()):g} to "
                    f"{float(attention_mask[number].float().max()):g} in row {number}"
                )
            kept = attention_mask[number].bool().nonzero().squeeze(-1)
            if len(kept) and int(kept[-1] - kept[0]) != len(kept) - 1:
                raise InputError(
                    f"expected padding at the left or right end only, got a mask with holes in row {number}"
                )
            row = row[kept]
        if len(row) == 0:
            raise InputError(f"expected at least one token in every prompt, got an empty one in row {number}")
        prompts.append(row)
    return prompts


def check_batch(ids: Tensor, vocab_size: int | None = None) -> None:
    """Raise `InputError` where `ids` are not token ids of shape (batch, n)."""
    if ids.ndim != 2:
        raise InputError(f"expected token ids of shape (batch, n), got {tuple(ids.shape)}")
    check_ids(ids, vocab_size)


def check_ids(ids: Tensor, vocab_size: int | None) -> None:
    """Raise `InputError` where `ids` are not whole numbers from 0 to `vocab_size` - 1."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"expected token ids to be whole numbers, got {ids.dtype}")
    if ids.numel() and vocab_size is not None:
        low, high = map(int, ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(f"expected token ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}")


def check_extension(
    model: Any, prompts: Sequence[Tensor], cache: SwiftKVCache, rows: Sequence[int], keeps: Sequence[int]
) -> None:
    """Raise `InputError` where `prompts` cannot go to `rows`, the last `keeps` tokens of each surviving."""
    if not len(prompts):
        raise InputError("expected at least one prompt, got none")
    if len(rows) != len(prompts) or len(keeps) != len(prompts):
        raise InputError(
            f"expected a row and a number of survivors for each of {len(prompts)} prompts, got {len(rows)} rows and "
            f"{len(keeps)} numbers"
        )
    if len(set(rows)) != len(rows) or not all(0 <= row < cache.batch for row in rows):
        raise InputError(f"expected different rows from 0 to {cache.batch - 1}, got {list(rows)}")
    for row, prompt, kept in zip(rows, prompts, keeps, strict=True):
        if prompt.ndim != 1 or not 0 <= kept <= len(prompt) or len(prompt) == 0:
            raise InputError(
                f"expected a prompt of 1 token or more, of which 0 to all survive, in row {row}, got one of shape "
                f"{tuple(prompt.shape)} and {kept} survivors"
            )
        cache.room(row, len(prompt))
    check_ids(torch.cat([prompt.to(cache.device) for prompt in prompts]), model.config.vocab_size)


def check_positions(position_ids: Tensor, mask: Tensor | None, prompts: list[Prompt], cache: SwiftKVCache) -> None:
    """Raise `InputError` where `position_ids` (batch or 1, n) do not count each row on from its cached length."""
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise InputError(f"expected position_ids to be whole numbers, got {position_ids.dtype}")
    n = max(map(len, prompts)) if mask is None else mask.shape[1]
    if tuple(position_ids.shape) not in ((len(prompts), n), (1, n)):
        raise InputError(f"expected position_ids of shape ({len(prompts)}, {n}), got {tuple(position_ids.shape)}")
    position_ids = position_ids.expand(len(prompts), n)
    for row, prompt in enumerate(prompts):
        given = position_ids[row] if mask is None else position_ids[row][mask[row].bool()]
        first = cache.lengths[row]
        if not torch.equal(given.cpu(), torch.arange(first, first + len(prompt))):
            raise InputError(
                f"expected position_ids of row {row} to count from {first} to {first + len(prompt) - 1}, got "
                f"{given.tolist()[:8]}"
            )


def check_chunk(chunk: Any) -> None:
    """Raise `InputError` where `chunk`, the most tokens at a time, is neither None nor a whole number above 0."""
    if chunk is not None:
        check_count("prefill_chunk", chunk)


def check_tokens(tokens: Tensor, cache: SwiftKVCache, vocab_size: int | None = None) -> None:
    """Raise `InputError` where `tokens` are not ids, one for each row of `cache`, or a row has no room."""
    if tuple(tokens.shape) != (cache.batch,):
        raise InputError(f"expected a token for each of the cache's {cache.batch} rows, got {tuple(tokens.shape)}")
    check_ids(tokens, vocab_size)
    for row in range(cache.batch):
        cache.room(row, 1)


def check_cache(model: Any, cache: SwiftKVCache) -> None:
    """Raise `InputError` where `cache` is not of this model: another shape, split, type or device."""
    check_family(model.config)
    weight = model.lm_head.weight
    if cache.dtype != weight.dtype or cache.device.type != weight.device.type:
        raise InputError(
            f"expected a cache for a model in {weight.dtype} on {weight.device.type}, got one for {cache.dtype} on "
            f"{cache.device.type}; make_cache takes both from the model"
        )
    own = SwiftKVConfig.of(model.config)
    base = len(cache.split.upper) == 0 and cache.split.num_hidden_layers == own.num_hidden_layers
    if cache.spec != CacheSpec.of(model.config) or (cache.split != own and not base):
        raise InputError(f"expected a cache for {own}, got one for {cache.split}")
    if base and len(own.upper) and not model.config.teacher_weights:
        raise InputError("expected a model with its teacher's weights for a cache of every layer, they were dropped")
    on = getattr(model.config, "swiftkv", True)
    if len(own.upper) and base == on:
        raise InputError(
            f"expected a cache made {'outside' if on else 'inside'} model.teacher(), as it is used, got one of "
            f"{cache.split.slots} slots"
        )
