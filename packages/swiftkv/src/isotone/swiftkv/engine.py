"""Inference in plain torch: prompt tokens stop after layer l, the token to be sampled goes on (the paper's section 3).

Prefill runs the first l layers over all tokens, makes the keys and values of all later layers with one GEMM from their
output, and runs the later layers on the surviving tokens alone: the last of each prompt, and every token of decoding or
of a draft. It works on any model of the supported families; where l = L (an unconverted model, or a converted one's
teacher) nothing is skipped, which is the baseline that `bench` times.

Shapes: T packed tokens, m survivors, d hidden size, G groups of upper layers, K heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv import kernels
from isotone.swiftkv.attention import Packed, Piece, attend
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig, check_family
from isotone.swiftkv.families import SWIFT, CacheSpec, Rope, is_plain, keys_values, queries, rotate, take, window_of
from isotone.swiftkv.prompts import (
    Prompt,
    check_cache,
    check_chunk,
    check_extension,
    check_positions,
    check_tokens,
    unpad,
)


def make_cache(model: Any, batch: int, max_length: int, kv_dtype: str = "model", **scales: Tensor) -> SwiftKVCache:
    """A cache for `batch` rows of up to `max_length` tokens, in the model's dtype and on its device.

    Inside `model.teacher()` it has a slot for every layer, and what it is given to computes the base model. Raises
    `InputError` on a family that is not supported and on no room.
    """
    check_family(model.config)
    split = SwiftKVConfig.of(model.config)
    if not getattr(model.config, "swiftkv", True):
        split = SwiftKVConfig(split.num_hidden_layers, split.num_hidden_layers)
    weight = model.lm_head.weight
    return SwiftKVCache(
        model.config,
        batch,
        max_length,
        kv_dtype=kv_dtype,
        dtype=weight.dtype,
        device=weight.device,
        split=split,
        **scales,
    )


def prefill(
    model: Any,
    input_ids: Int[Tensor, "batch n"],
    cache: SwiftKVCache,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Take a prompt a row into `cache`, after what it holds already; the logits of each row's last token.

    `chunk`: at most so many tokens at a time, over all rows; a chunk that ends no prompt runs no upper layer.
    `attention_mask` (batch, n). `position_ids` (batch, n) or (1, n), if given, must be the rows' own: from the cached
    length on, one by one. Raises `InputError` on bad prompts, on wrong positions, and where the cache has no room.
    """
    prompts = unpad(input_ids, attention_mask, model.config.vocab_size)
    if len(prompts) != cache.batch:
        raise InputError(f"expected a prompt for each of the cache's {cache.batch} rows, got {len(prompts)}")
    if position_ids is not None:
        check_positions(position_ids, attention_mask, prompts, cache)
    return extend(model, prompts, cache, chunk=chunk)


@torch.no_grad()
def extend(
    model: Any,
    prompts: Sequence[Prompt],
    cache: SwiftKVCache,
    rows: Sequence[int] | None = None,
    keep: int | Sequence[int] = 1,
    chunk: int | None = None,
) -> Float[Tensor, "survivors vocab"]:
    """Append tokens to rows of the cache, however many to each, and return the logits of the survivors.

    `prompts[i]` goes to row `rows[i]` (default: i); its last `keep` tokens survive, in order, row after row. Prompts
    of any lengths, single tokens of rows that decode, and drafts to be verified go together in one call.
    """
    check_cache(model, cache)
    check_chunk(chunk)
    rows = range(len(prompts)) if rows is None else rows
    keeps = [keep] * len(prompts) if isinstance(keep, int) else list(keep)
    check_extension(model, prompts, cache, rows, keeps)
    # stacked anew by every call, so that the weights are those of now; few tokens are not worth the copy
    tokens = sum(len(prompt) for prompt in prompts)
    upper = len(cache.split.upper) > 0
    projection = KeyValueProjection(model, stacked=tokens >= STACK_FROM) if upper else None
    logits = []
    for taken in _chunks([len(prompt) for prompt in prompts], chunk):
        pieces, ids, survivors, start = [], [], [], 0
        for number, first, last in taken:
            row, prompt = rows[number], prompts[number]
            pieces.append(Piece(row, start, last - first, cache.lengths[row]))
            ids.append(prompt[first:last])
            alive = max(first, len(prompt) - keeps[number])
            if alive < last:
                survivors.append(Piece(row, start + alive - first, last - alive, cache.lengths[row] + alive - first))
            start += last - first
        found = _pass(model, torch.cat(ids), pieces, survivors, cache, projection)
        for piece in pieces:  # once they are written: a pass that failed has added nothing
            cache.lengths[piece.row] += piece.length
        if found is not None:
            logits.append(found)
    return torch.cat(logits) if logits else model.lm_head.weight.new_empty(0, model.config.vocab_size)


@torch.no_grad()
def decode(model: Any, tokens: Int[Tensor, " batch"], cache: SwiftKVCache) -> Float[Tensor, "batch vocab"]:
    """One more token for every row of the cache: all L layers, the upper ones' keys and values again from h_l."""
    check_cache(model, cache)
    # on a GPU looking at the ids would wait for the last step; its embedding checks them
    check_tokens(tokens, cache, model.config.vocab_size if tokens.device.type == "cpu" else None)
    positions = torch.tensor(cache.lengths, device=cache.device)
    limit = max(cache.lengths) + 1
    even = min(cache.lengths) + 1 == limit
    logits = decode_step(model, tokens, positions, cache, limit, even)
    cache.lengths = [length + 1 for length in cache.lengths]
    return logits


def decode_step(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    cache: SwiftKVCache,
    limit: int,
    even: bool = False,
    projection: KeyValueProjection | None = None,
) -> Tensor:
    """The tensor part of `decode`, which `torch.compile` and CUDA graphs take whole: nothing here reads a value back.

    `tokens` and `positions` (batch,); `limit`: cached tokens looked at, the cache's whole length when compiled;
    `projection`: the upper layers' projections where they are stacked already; default: their modules, one by one.
    """
    rows = torch.arange(cache.batch, device=tokens.device)
    packed = Packed(rows, positions, None, limit, even)
    hidden, rope = _lower(model, tokens, packed, cache)
    if len(cache.split.upper):
        projection = projection or KeyValueProjection(model, stacked=False)
        _write_upper(model, hidden, rope, packed, cache, projection)
        hidden = _upper(model, hidden, rope, packed, cache)
    return model.lm_head(model.model.norm(hidden))


def _chunks(lengths: list[int], chunk: int | None) -> list[list[tuple[int, int, int]]]:
    """For each pass, (prompt, first token, last token + 1), with at most `chunk` tokens in all."""
    if chunk is None:
        return [[(number, 0, length) for number, length in enumerate(lengths)]]
    passes: list[list[tuple[int, int, int]]] = [[]]
    room = chunk
    for number, length in enumerate(lengths):
        first = 0
        while first < length:
            if room == 0:
                passes.append([])
                room = chunk
            last = min(length, first + room)
            passes[-1].append((number, first, last))
            room -= last - first
            first = last
    return passes


def _pass(
    model: Any,
    ids: Tensor,
    pieces: list[Piece],
    survivors: list[Piece],
    cache: SwiftKVCache,
    projection: KeyValueProjection | None,
) -> Tensor | None:
    """One chunk: the lower half on all its tokens, then the upper half on the survivors, if there are any."""
    device = cache.device
    positions = [torch.arange(p.past, p.past + p.length, device=device) for p in pieces]
    rows = [torch.full((p.length,), p.row, device=device) for p in pieces]
    limit = max(p.past + p.length for p in pieces)
    packed = Packed(torch.cat(rows), torch.cat(positions), tuple(pieces), limit)
    hidden, rope = _lower(model, ids.to(device), packed, cache)
    if projection is not None:
        _write_upper(model, hidden, rope, packed, cache, projection)
    if not survivors:
        return None
    kept = torch.cat([torch.arange(p.start, p.start + p.length, device=device) for p in survivors])
    starts = [0]
    for piece in survivors:
        starts.append(starts[-1] + piece.length)
    moved = tuple(Piece(p.row, s, p.length, p.past) for p, s in zip(survivors, starts, strict=False))
    chosen = Packed(packed.rows[kept], packed.positions[kept], moved, limit)
    hidden = hidden[kept]
    if projection is not None:
        hidden = _upper(model, hidden, take(rope, kept), chosen, cache)
    return model.lm_head(model.model.norm(hidden))


def _rope(model: Any, hidden: Tensor, positions: Tensor) -> Rope:
    rope = model.model.rotary_emb(hidden.unsqueeze(0), positions.unsqueeze(0))
    return (rope[0].squeeze(0), rope[1].squeeze(0)) if isinstance(rope, tuple) else rope.squeeze(0)


def _lower(model: Any, ids: Tensor, packed: Packed, cache: SwiftKVCache) -> tuple[Tensor, Rope]:
    """The first l layers on all tokens (T,): their output (T, d), and the tokens' rotations."""
    hidden = model.model.embed_tokens(ids)
    rope = _rope(model, hidden, packed.positions)
    for number in range(cache.split.num_key_value_layers):
        layer = model.model.layers[number]
        attention = layer.self_attn
        states = layer.input_layernorm(hidden)
        keys, values = keys_values(attention, states)
        cache.write(number, packed.rows, packed.positions, rotate(keys, rope), values)
        query = rotate(queries(attention, states), rope)
        up = getattr(attention, "kv_b_proj", None)
        attended = attend(attention, query, cache, number, packed, window_of(model.config, number), up)
        hidden = _finish(layer, hidden, attended)
    return hidden, rope


def _upper(model: Any, hidden: Tensor, rope: Rope, packed: Packed, cache: SwiftKVCache) -> Tensor:
    """The layers from l on, on the survivors (m, d), which attend to what `_write_upper` left."""
    for number in cache.split.upper:
        layer = model.model.layers[number]
        attention = layer.self_attn
        query = rotate(queries(attention, layer.input_layernorm(hidden), SWIFT), rope)
        owner = model.model.layers[cache.split.owner(number)].self_attn
        up = getattr(owner, "kv_b_proj" + SWIFT, None)
        attended = attend(attention, query, cache, number, packed, window_of(model.config, number), up)
        hidden = _finish(layer, hidden, attended)
    return hidden


def _finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _write_upper(
    model: Any, hidden: Tensor, rope: Rope, packed: Packed, cache: SwiftKVCache, projection: KeyValueProjection
) -> None:
    """Keys and values of every group of upper layers from h_l (T, d): one GEMM, one pass over the cache."""
    projected = projection(model.model.norm_swiftkv(hidden))
    slots = slice(cache.split.num_key_value_layers, cache.split.slots)
    if kernels.can_write(projected, rope, cache, projection.norms or projection.key_norm):
        assert isinstance(rope, tuple)  # pragma: no cover - GPU
        kernels.rope_write(projected, rope, cache, slots, packed.rows, packed.positions)  # pragma: no cover - GPU
        return  # pragma: no cover - GPU
    keys, values = projection.split(projected)
    rotated = rotate(keys.flatten(1, 2), rope).view_as(keys)
    cache.write(slots, packed.rows, packed.positions, rotated, values)


STACK_FROM = 64  # tokens from which one GEMM of stacked weights is worth the copy that stacking is


class KeyValueProjection:
    """The key and value projections of all groups: d to G * K * key_dim + G * K * value_dim numbers.

    `stacked`: as one matrix, a copy of the weights as they are now, unless a projection is more than a plain linear
    layer (an adapter around it, a hook on it); such ones, and those not stacked, are called one after another.
    """

    def __init__(self, model: Any, stacked: bool) -> None:
        split = SwiftKVConfig.of(model.config)
        owners = [model.model.layers[number].self_attn for number in split.owners]
        self.spec = CacheSpec.of(model.config)
        self.groups = len(owners)
        self.latent = hasattr(owners[0], "kv_lora_rank")
        self.key_norm: Tensor | None = None
        self.eps = 0.0
        if self.latent:
            linears = [owner.kv_a_proj_with_mqa_swiftkv for owner in owners]
            norms = [owner.kv_a_layernorm_swiftkv for owner in owners]
        else:
            linears = [o.k_proj_swiftkv for o in owners] + [o.v_proj_swiftkv for o in owners]
            norms = [o.k_norm_swiftkv for o in owners if hasattr(o, "k_norm_swiftkv")]
        self.linears = linears
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if stacked and all(is_plain(linear) for linear in linears):
            self.weight = torch.cat([linear.weight.detach() for linear in linears])
            self.bias = torch.cat([x.bias.detach() for x in linears]) if linears[0].bias is not None else None
        self.norms: list[Any] | None = None
        if any(norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__ for norm in norms):
            self.norms = norms  # more than their weights
        elif norms:
            self.key_norm = torch.stack([norm.weight.detach() for norm in norms])
            self.eps = norms[0].variance_epsilon

    def __call__(self, states: Tensor) -> Tensor:
        """All groups' keys, then (but for MLA) all their values, of normed `states` (T, d)."""
        if self.weight is not None:
            return F.linear(states, self.weight, self.bias)
        return torch.cat([linear(states) for linear in self.linears], -1)

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """`projected` (T, G * K * (key_dim + value_dim)) as keys (T, G, K, key_dim) and values (T, G, K, value_dim)."""
        spec = self.spec
        keys, values = projected.split([self.groups * spec.heads * d for d in (spec.key_dim, spec.value_dim)], -1)
        keys = keys.unflatten(-1, (self.groups, spec.heads, spec.key_dim))
        values = values.reshape(*values.shape[:-1], self.groups, spec.heads, spec.value_dim)
        if self.norms is not None:
            width = self.norms[0].weight.shape[0]
            parts = zip(self.norms, keys.unbind(1), strict=True)
            keys = torch.stack([torch.cat([norm(k[..., :width]), k[..., width:]], -1) for norm, k in parts], 1)
        if self.key_norm is not None:
            width = self.key_norm.shape[-1]
            normed = _rms(keys[..., :width], self.key_norm.unsqueeze(1), self.eps)
            keys = torch.cat([normed, keys[..., width:]], -1) if self.latent else normed
        return keys, values


def _rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    numbers = states.float()
    numbers = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + eps)
    return weight * numbers.to(states.dtype)
