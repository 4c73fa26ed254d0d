"""Attention of packed tokens on the cache: prompts of different lengths without padding, few queries on many keys.

T packed tokens belong to pieces, each a run of new tokens of one row. SDPA's own `is_causal` aligns queries with the
first keys, which is wrong where a row has a past: there the mask is by position, key <= query (the paper's engine does
the same by rebuilding its metadata for the second half).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.families import FEW_QUERIES, absorb_query, expand_latent, is_plain, release_output


@dataclass(frozen=True)
class Piece:
    """`length` new tokens of row `row`, the packed tokens `start` to `start + length`, after `past` earlier ones."""

    row: int
    start: int
    length: int
    past: int


@dataclass(frozen=True)
class Packed:
    """T packed tokens: `rows` and `positions` (T,) of each, and the pieces they form.

    `pieces` None: one token for every row of the cache, in order; what a row holds is then known by `positions` alone,
    so that nothing depends on numbers in Python but `limit`, the number of cached tokens looked at.
    """

    rows: Tensor
    positions: Tensor
    pieces: tuple[Piece, ...] | None
    limit: int
    even: bool = False
    """Whether every row holds exactly `limit` tokens, the new one included."""


def attend(
    attention: Any, query: Tensor, cache: SwiftKVCache, layer: int, packed: Packed, window: int | None, up: Any = None
) -> Tensor:
    """Attention of `query` (T, H, e) to the cached tokens of each one's row up to its own position: (T, H * e).

    `up`: MLA's kv_b_proj of the slot's owner.
    """
    pieces = packed.pieces
    if pieces is None:
        keys, values = cache.read(layer, packed.limit)
        mask = None
        if not packed.even or (window is not None and window < packed.limit):
            mask = _visible(packed.positions[:, None], packed.limit, window)
        out = _one_shape(attention, query.unsqueeze(2), keys, values, mask, False, up)
        return out.squeeze(2).flatten(1)
    first = pieces[0]
    alike = all(piece.length == first.length and piece.past == first.past for piece in pieces)
    if alike and [piece.row for piece in pieces] == list(range(cache.batch)):
        batched = query.unflatten(0, (len(pieces), first.length)).transpose(1, 2)
        out = _rows(attention, batched, cache, layer, slice(None), first, window, up)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
    outs = []
    for piece in pieces:
        part = query[piece.start : piece.start + piece.length].transpose(0, 1).unsqueeze(0)
        outs.append(_rows(attention, part, cache, layer, slice(piece.row, piece.row + 1), piece, window, up))
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs]).flatten(1)


def _rows(
    attention: Any,
    query: Tensor,
    cache: SwiftKVCache,
    layer: int,
    rows: slice,
    piece: Piece,
    window: int | None,
    up: Any,
) -> Tensor:
    """Attention of rows that have the same past and the same number of new tokens."""
    length = piece.past + piece.length
    keys, values = cache.read(layer, length, rows)
    windowed = window is not None and window < length
    if piece.length == 1 and not windowed:
        return _one_shape(attention, query, keys, values, None, False, up)
    if piece.past == 0 and not windowed:
        return _one_shape(attention, query, keys, values, None, True, up)
    positions = torch.arange(piece.past, length, device=query.device)
    mask = _visible(positions[None, :], length, window)
    return _one_shape(attention, query, keys, values, mask, False, up)


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Which of the `length` keys the queries at `positions` (b, q) see: (b, q, length)."""
    keys = torch.arange(length, device=positions.device)
    visible = keys <= positions[..., None]
    if window is not None:
        visible = visible & (keys > positions[..., None] - window)
    return visible


def _one_shape(
    attention: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, up: Any
) -> Tensor:
    """Attention of (b, H, q, e) queries to (b, K, n, ·) cached keys and values; MLA's are made of its latents here.

    `mask` (b or 1, q, n), True where visible.
    """
    if not hasattr(attention, "kv_lora_rank"):
        return dot_product(query, keys, values, attention.scaling, mask, causal)
    if query.shape[2] > FEW_QUERIES or causal or not is_plain(up):
        keys, values = expand_latent(attention, keys, up)
        return dot_product(query, keys, values, attention.scaling, mask, causal)
    absorbed = absorb_query(attention, query.transpose(1, 2), up).transpose(1, 2)
    out = dot_product(absorbed, keys, keys[..., : attention.kv_lora_rank], attention.scaling, mask, causal)
    return release_output(attention, out.transpose(1, 2), up).transpose(1, 2)


def dot_product(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T scale) v with grouped heads: (b, H, q, e), (b, K, n, e), (b, K, n, v) to (b, H, q, v).

    With a mask, or one query, the H / K heads that share a key become further queries of it, so that no key is
    repeated in memory. SDPA accumulates in fp32.
    """
    heads, kept = query.shape[1], key.shape[1]
    if heads == kept or causal:
        bias = None if mask is None else mask.unsqueeze(1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=heads != kept
        )
    share, length = heads // kept, query.shape[2]
    folded = query.unflatten(1, (kept, share)).flatten(2, 3)
    bias = None if mask is None else mask.repeat(1, share, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
    return out.unflatten(2, (share, length)).flatten(1, 2)
