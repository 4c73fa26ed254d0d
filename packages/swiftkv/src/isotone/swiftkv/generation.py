"""Generation on the skipping engine, behind transformers' `generate`: sampling, streaming, speculation.

transformers prepares the settings, the logits processors and the stopping criteria; the loop here runs the prompt
through `extend` and each token through `decode`. With a drafter, several tokens are verified at once: they all survive
the lower half (the paper's survivors), and are accepted so that the tokens' distribution is the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from isotone.shared.errors import InputError
from isotone.swiftkv import engine
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.decoders import DECODE_MODES, Decoder
from isotone.swiftkv.prompts import check_chunk, unpad
from isotone.swiftkv.quantize import KV_DTYPES

Drafter = Callable[[Int[Tensor, " n"], int], Int[Tensor, " k"]]

_NOT_DONE = (
    "beams and contrastive search are not supported; drafting is asked for by generate's own arguments, "
    "assistant_model or prompt_lookup_num_tokens"
)


@dataclass(frozen=True)
class GenerationSettings:
    """What `generate` takes beyond transformers' own settings. Raises `InputError` on a value that is none."""

    prefill_chunk: int | None = None
    kv_dtype: str = "model"
    decode_mode: str = "eager"
    cache: SwiftKVCache | None = None
    draft: Drafter | None = None
    draft_length: int = 5

    def __post_init__(self) -> None:
        check_chunk(self.prefill_chunk)
        if self.kv_dtype not in KV_DTYPES:
            raise InputError(f"expected kv_dtype to be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.decode_mode not in DECODE_MODES:
            raise InputError(f"expected decode_mode to be one of {', '.join(DECODE_MODES)}, got {self.decode_mode!r}")
        if self.draft_length < 1:
            raise InputError(f"expected draft_length to be at least 1, got {self.draft_length}")


def settings_of(
    model: Any, generation_config: Any, options: dict[str, Any]
) -> tuple[GenerationSettings, dict[str, Any]]:
    """Our settings out of `generate`'s arguments, and the rest, which is transformers'. Raises `InputError` on what
    skipping cannot do."""
    rest = dict(options)
    assistant = rest.pop("assistant_model", None)
    lookup = rest.pop("prompt_lookup_num_tokens", None)
    cache = rest.get("past_key_values")
    if cache is not None and not isinstance(cache, SwiftKVCache):
        raise InputError(f"expected past_key_values to be a SwiftKVCache, got {type(cache).__name__}")
    rest.pop("past_key_values", None)
    for name in ("inputs_embeds", "position_ids"):
        if rest.get(name) is not None:
            raise InputError(f"expected input_ids alone, got {name}: the engine counts positions of token ids itself")
    if cache is not None and rest.get("kv_dtype") is not None:
        raise InputError("expected kv_dtype or past_key_values, got both: a cache that is there has its own type")
    names = ("prefill_chunk", "kv_dtype", "decode_mode", "draft_length")
    own = {key: value for key in names if (value := rest.pop(key, None)) is not None}
    whole = copy.deepcopy(generation_config or model.generation_config)
    for asked in (rest.pop("cache_implementation", None), getattr(whole, "cache_implementation", None)):
        if asked not in (None, "dynamic", "static"):
            raise InputError("expected no cache_implementation: keys and values are kept in a SwiftKVCache (kv_dtype)")
    whole.update(**{key: value for key, value in rest.items() if hasattr(whole, key) and value is not None})
    mode = whole.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(f"expected greedy search or sampling, got {mode.value.replace('_', ' ')}: {_NOT_DONE}")
    for name in ("output_hidden_states", "output_attentions", "prompt_logprobs"):
        if getattr(whole, name, None) or rest.get(name):
            raise InputError(f"expected {name}=False: the prompt's tokens do not run the upper layers; use forward")
    if rest.get("use_cache", whole.use_cache) is False:
        raise InputError("expected use_cache=True: without a cache there is nothing to skip into; use forward")
    drafter: Drafter | None = None
    if assistant is not None:
        drafter = assistant_drafter(assistant)
        if assistant.config.vocab_size != model.config.vocab_size:
            raise InputError(
                f"expected an assistant of the same vocabulary, {model.config.vocab_size} tokens, got "
                f"{assistant.config.vocab_size}"
            )
    elif lookup is not None:
        drafter = lookup_drafter()
        own.setdefault("draft_length", lookup)
    return GenerationSettings(cache=cache, draft=drafter, **own), rest


def left_mask(ids: Tensor, pad: int | None, config: Any) -> Tensor:
    """The attention mask where none is given: padding tokens before a row's first other one are hidden.

    transformers hides them wherever they stand, also where a prompt means the token; that would leave holes.
    """
    pad = config.pad_token_id if pad is None else pad
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ((ids != pad).cumsum(-1) > 0).long()


@torch.no_grad()
def sample(
    model: Any,
    input_ids: Int[Tensor, "batch n"],
    settings: GenerationSettings,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    attention_mask: Tensor | None = None,
    **unused: Any,
) -> Any:
    """The loop that transformers' `_sample` is; the same sampling steps, so that a seed gives the same tokens.

    Returns the sequences (batch, n + new), or transformers' output object where it was asked for.
    """
    batch = input_ids.shape[0]
    prompts = unpad(input_ids, attention_mask, model.config.vocab_size)
    cache = settings.cache
    # a draft may run past the end before it is cut off
    extra = settings.draft_length if settings.draft is not None else 0
    room = max(map(len, prompts)) + generation_config.max_length - input_ids.shape[1] + extra
    if cache is None:
        cache = engine.make_cache(model, batch, room, settings.kv_dtype)
    # every refusal comes before the prompt is written into a cache that may be the caller's
    if cache.batch != batch:
        raise InputError(f"expected past_key_values of {batch} rows, got {cache.batch}")
    if settings.draft is not None and batch > 1:
        raise InputError(f"expected one prompt with a drafter, got {batch}")
    fresh = [prompt[length:] for prompt, length in zip(prompts, cache.lengths, strict=True)]
    if min(map(len, fresh)) == 0:
        raise InputError("expected input_ids to go on after what past_key_values holds, got no new token")
    for row, prompt in enumerate(fresh):
        cache.room(row, len(prompt) + generation_config.max_length - input_ids.shape[1] - 1)
    decoder = None if settings.draft is not None else Decoder(model, cache, settings.decode_mode)
    logits = engine.extend(model, fresh, cache, chunk=settings.prefill_chunk)
    if not bool(logits.isfinite().all()):
        raise InputError("expected finite logits after the prompt, got NaN or infinity: are the model's weights whole?")
    loop = _Loop(model, cache, logits_processor, stopping_criteria, generation_config, streamer)
    if settings.draft is not None:
        sequences = loop.speculate(input_ids, logits, settings.draft, settings.draft_length)
    else:
        assert decoder is not None
        sequences = loop.run(input_ids, logits, decoder)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=tuple(loop.scores) if generation_config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(loop.logits) if generation_config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=cache,  # type: ignore[arg-type]
        )
    return sequences


class _Loop:
    """The state of one call: what was sampled so far and which rows go on."""

    def __init__(
        self, model: Any, cache: SwiftKVCache, processor: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.model, self.cache, self.processor, self.criteria = model, cache, processor, criteria
        self.config, self.streamer = config, streamer
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.has_end = any(hasattr(one, "eos_token_id") for one in criteria)
        self.pad = getattr(config, "_pad_token_tensor", None)

    def run(self, ids: Tensor, logits: Tensor, decoder: Decoder) -> Tensor:
        """Token by token, every row at once."""
        going = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        while True:
            token = self.pick(self.processed(ids, logits))
            if self.has_end and self.pad is not None:
                token = token * going + self.pad.to(token.device) * (1 - going)
            ids = torch.cat([ids, token[:, None]], -1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            going = going & ~self.criteria(ids, tuple(self.scores) or None)
            if not bool(going.any()):
                return ids
            logits = decoder(token)

    def speculate(self, ids: Tensor, logits: Tensor, draft: Drafter, length: int) -> Tensor:
        """Drafts of up to `length` tokens, all verified by one pass; exactly the model's own distribution.

        The draft is deterministic, so that a drafted token x is kept with probability p(x), and what replaces it is
        drawn from p without x.
        """
        padding = ids.shape[1] - self.cache.lengths[0]  # ids at the left that the cache does not hold
        ids, done = self.append(ids, self.pick(self.processed(ids, logits)))
        while not done:
            pending = ids[0, padding + self.cache.lengths[0] :]
            room = self.cache.max_length - self.cache.lengths[0] - len(pending)
            drafted = draft(ids[0, padding:], length).to(ids.device)[:room]
            block = torch.cat([pending, drafted])
            before = self.cache.lengths[0]
            found = engine.extend(self.model, [block], self.cache, keep=len(drafted) + 1)
            accepted = 0
            for place in range(len(drafted) + 1):
                scores = self.processed(ids, found[place : place + 1])
                wanted = int(drafted[place]) if place < len(drafted) else None
                token = self.accept(scores, wanted)
                ids, done = self.append(ids, token)
                if done or wanted is None or int(token) != wanted:
                    break
                accepted += 1
            self.cache.crop(0, before + len(pending) + accepted)
        return ids

    def append(self, ids: Tensor, token: Tensor) -> tuple[Tensor, bool]:
        """The row with one token more, and whether it is at its end."""
        ids = torch.cat([ids, token.reshape(1, 1)], -1)
        if self.streamer is not None:
            self.streamer.put(token.reshape(1).cpu())
        return ids, bool(self.criteria(ids, tuple(self.scores) or None).all())

    def processed(self, ids: Tensor, logits: Float[Tensor, "batch vocab"]) -> Tensor:
        """The scores to sample from, fp32."""
        raw = logits.to(dtype=torch.float32, copy=True)
        scores = self.processor(ids, raw)
        if self.config.return_dict_in_generate and self.config.output_logits:
            self.logits.append(raw)
        if self.config.return_dict_in_generate and self.config.output_scores:
            self.scores.append(scores)
        return scores

    def pick(self, scores: Tensor) -> Tensor:
        """One token a row."""
        if self.config.do_sample:
            return torch.multinomial(torch.softmax(scores, -1), num_samples=1).squeeze(1)
        return scores.argmax(-1)

    def accept(self, scores: Tensor, drafted: int | None) -> Tensor:
        """The drafted token, with the probability that the model gives it, or another one in its place."""
        if not self.config.do_sample or drafted is None:
            return self.pick(scores)
        probabilities = torch.softmax(scores, -1)
        if float(torch.rand((), device=scores.device)) < float(probabilities[0, drafted]):
            return torch.tensor([drafted], device=scores.device)
        others = probabilities.clone()
        others[0, drafted] = 0
        return torch.multinomial(others, num_samples=1).squeeze(1)


def lookup_drafter(ngram: int = 3) -> Drafter:
    """Drafts what followed the last occurrence of the row's last tokens (prompt lookup), if anything did."""

    def draft(ids: Tensor, length: int) -> Tensor:
        for size in range(min(ngram, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            windows = ids.unfold(0, size, 1)[:-1]
            found = (windows == tail).all(-1).nonzero().flatten()
            if len(found):
                start = int(found[-1]) + size
                return ids[start : start + length]
        return ids[:0]

    return draft


def assistant_drafter(assistant: Any) -> Drafter:
    """Drafts what a smaller model of the same vocabulary says greedily; it keeps its own cache of the row."""
    state: dict[str, Any] = {}

    def draft(ids: Tensor, length: int) -> Tensor:
        held: Tensor | None = state.get("ids")
        cache: SwiftKVCache | None = state.get("cache")
        if cache is None or cache.max_length < len(ids) + length:
            state["cache"] = cache = engine.make_cache(assistant, 1, 2 * (len(ids) + length))
            held = None
        shared = 0
        if held is not None:
            most = min(len(held), len(ids) - 1)
            differs = (held[:most] != ids[:most]).nonzero()
            shared = int(differs[0]) if len(differs) else most
        cache.crop(0, min(shared, cache.lengths[0]))
        drafted: list[Tensor] = []
        logits = engine.extend(assistant, [ids[cache.lengths[0] :]], cache)
        while True:
            drafted.append(logits.argmax(-1))
            if len(drafted) == length:
                break
            logits = engine.decode(assistant, drafted[-1], cache)
        found = torch.cat(drafted)
        state["ids"] = torch.cat([ids, found[:-1]])
        return found

    return draft
