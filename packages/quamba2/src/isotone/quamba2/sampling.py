"""Going on with a prompt: prefill once, then a token at a time out of the cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError, check_count


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Int[Tensor, "b l"],
    max_new_tokens: int = 32,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b n"]:
    """`input_ids` and at most `max_new_tokens` after them, the likeliest or, with `do_sample`, drawn.

    `attention_mask` (b, l): 0 for padding on the left. Rows that have given `eos_token_id` go on with `pad_token_id`;
    when all have, the run ends. `model`: a `QuambaForCausalLM`. Raises `InputError` on options out of range.
    """
    check_count("max_new_tokens", max_new_tokens)
    if not (0 < temperature < math.inf and 0 < top_p <= 1) or (top_k is not None and top_k < 1):
        raise InputError(
            f"expected a temperature above 0, top_p from 0 to 1 and top_k of at least 1, got {temperature}, {top_p} "
            f"and {top_k}"
        )
    cache = model.new_cache()
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    logits = model(input_ids, cache, attention_mask, last_only=True).logits[:, -1]
    found = [input_ids]
    for step in range(max_new_tokens):
        if do_sample:
            token = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        token = torch.where(ended, pad_token_id, token)
        found.append(token[:, None])
        if eos_token_id is not None:
            ended |= token == eos_token_id
        if bool(ended.all()) or step + 1 == max_new_tokens:
            break
        logits = model(token[:, None], cache, last_only=True).logits[:, -1]
    return torch.cat(found, 1)


def probabilities(
    logits: Float[Tensor, "b vocab"], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Float[Tensor, "b vocab"]:
    """Softmax of logits / temperature over the `top_k` likeliest tokens, of them the fewest that hold `top_p`."""
    scaled = logits.float() / temperature
    if top_k is not None:
        least = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    chances = scaled.softmax(-1)
    if top_p < 1:
        ordered, places = chances.sort(-1, descending=True)
        # a token stays while those before it hold less than top_p
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        chances = torch.zeros_like(chances).scatter(-1, places, ordered)
    return chances / chances.sum(-1, keepdim=True)
