"""FLOPs and bytes, counted from a config: equal to what torch's counter counts, and to what the cache allocates.

A product of (m, k) and (k, n) counts 2 m k n. Symbols: L layers, l of them with keys and values of their own, g layers
a group, d hidden size, H * e query width, K * e key width, f MLP width, V vocabulary, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isotone.shared.errors import InputError
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import CacheSpec, head_dim, is_latent
from isotone.swiftkv.quantize import Codec


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one token in one layer: `query`, `keys_values` and `output` projections, `mlp`; and `attention` for
    each key that it attends to."""

    query: int
    keys_values: int
    output: int
    mlp: int
    attention: int

    @property
    def rest(self) -> int:
        """All but keys, values and attention: what a surviving token pays in an upper layer."""
        return self.query + self.output + self.mlp

    @property
    def total(self) -> int:
        """A of the paper's accounting: everything but attention."""
        return self.rest + self.keys_values


@dataclass(frozen=True)
class Flops:
    """FLOPs of a prefill by part; `total` is their sum."""

    lower: int
    keys_values: int
    upper: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.lower + self.keys_values + self.upper + self.logits


def layer_cost(config: Any) -> LayerCost:
    """The cost of a layer of grouped-query attention with a gated MLP. Raises `InputError` for MLA's layers, which are
    not alike."""
    if is_latent(config):
        raise InputError("expected grouped-query attention for FLOPs, got multi-head latent attention")
    d, size = config.hidden_size, head_dim(config)
    heads, kept = config.num_attention_heads * size, config.num_key_value_heads * size
    return LayerCost(
        query=2 * d * heads,
        keys_values=2 * 2 * d * kept,
        output=2 * heads * d,
        mlp=6 * d * config.intermediate_size,
        attention=4 * heads,
    )


def flops(
    config: Any,
    n: int,
    num_key_value_layers: int | None = None,
    key_value_group_size: int = 1,
    *,
    batch: int = 1,
    causal: bool = True,
    survivors: int = 1,
) -> Flops:
    """FLOPs of the prefill of `batch` prompts of `n` tokens, `survivors` of each going on through the upper layers.

    l = None is the base model: all tokens through all layers, logits for the survivors. `causal`: a token attends to
    half of the prompt on average, as the paper counts (L * 2 H e n^2); False: the whole square, as torch's counter
    counts a causal attention. Raises `InputError` on l or g that do not fit, or n < survivors.
    """
    layers = config.num_hidden_layers
    split = SwiftKVConfig(
        layers, layers if num_key_value_layers is None else num_key_value_layers, key_value_group_size
    )
    if survivors < 1 or n < survivors or batch < 1:
        raise InputError(f"expected 1 to n={n} survivors and a batch of at least 1, got {survivors} and {batch}")
    cost = layer_cost(config)
    square = cost.attention * n * n
    lower = split.num_key_value_layers * (n * cost.total + (square // 2 if causal else square))
    upper = len(split.upper) * survivors * (cost.rest + cost.attention * n)
    fill = len(split.owners) * n * cost.keys_values
    return Flops(
        batch * lower, batch * fill, batch * upper, batch * survivors * 2 * config.hidden_size * config.vocab_size
    )


def decode_flops(
    config: Any, context: int, num_key_value_layers: int | None = None, key_value_group_size: int = 1
) -> int:
    """FLOPs of one more token with `context` tokens in the cache, the new one included."""
    layers = config.num_hidden_layers
    split = SwiftKVConfig(
        layers, layers if num_key_value_layers is None else num_key_value_layers, key_value_group_size
    )
    cost = layer_cost(config)
    kept = split.num_key_value_layers + len(split.owners)
    return (
        layers * (cost.rest + cost.attention * context)
        + kept * cost.keys_values
        + 2 * config.hidden_size * config.vocab_size
    )


def speedup_bound(config: Any, n: int, num_key_value_layers: int, key_value_group_size: int = 1) -> float:
    """Base FLOPs over swift FLOPs of one prompt of `n` tokens: what prefill can gain where compute is the limit."""
    return flops(config, n).total / flops(config, n, num_key_value_layers, key_value_group_size).total


def kv_bytes(
    config: Any,
    tokens: int,
    num_key_value_layers: int | None = None,
    key_value_group_size: int = 1,
    *,
    batch: int = 1,
    kv_dtype: str = "bf16",
) -> int:
    """Bytes of a cache of `batch` rows of `tokens` tokens: (l + (L - l) / g) slots, scales included; exact.

    l = None: every layer's. `kv_dtype` as SwiftKVCache takes it, but "model", which says no size.
    """
    import torch

    if kv_dtype == "model":
        raise InputError("expected a kv_dtype with a size, such as bf16, got 'model'")
    layers = config.num_hidden_layers
    split = SwiftKVConfig(
        layers, layers if num_key_value_layers is None else num_key_value_layers, key_value_group_size
    )
    spec = CacheSpec.of(config)
    widths = (spec.key_dim, spec.value_dim)
    vector = sum(Codec(kv_dtype, width, torch.bfloat16).bytes for width in widths)
    return split.slots * batch * tokens * spec.heads * vector
