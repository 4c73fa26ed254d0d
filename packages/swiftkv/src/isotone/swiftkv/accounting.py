"""FLOPs and bytes, counted from a config: equal to what torch's counter counts, and to what the cache allocates.

A product of (m, k) and (k, n) counts 2 m k n. Symbols: L layers, l of them with keys and values of their own, g layers
a group, d hidden size, H * e query width, K * e key width, f MLP width, V vocabulary, n tokens. Of MLA: r the latent's
size, p that of the rotary key, c that of a head's still key, v that of its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isotone.shared.errors import InputError, check_count
from isotone.swiftkv.config import SwiftKVConfig, check_family
from isotone.swiftkv.families import FEW_QUERIES, CacheSpec, head_dim, is_latent
from isotone.swiftkv.quantize import Codec


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one token in one layer: `query`, `keys_values` and `output` projections, `mlp`; and `attention` for
    each key that it attends to.

    MLA keeps latents in the cache. With many queries a row they are made into keys and values again, `expand` for each
    cached token; with few, queries and outputs are taken to the latents instead, `absorb` for each query, and attend to
    them at `latent_attention` for each key. Grouped-query attention has none of the three.
    """

    query: int
    keys_values: int
    output: int
    mlp: int
    attention: int
    expand: int = 0
    absorb: int = 0
    latent_attention: int | None = None

    @property
    def rest(self) -> int:
        """All but keys, values and attention: what a surviving token pays in an upper layer."""
        return self.query + self.output + self.mlp

    @property
    def total(self) -> int:
        """A of the paper's accounting: everything but attention; MLA's keys and values included."""
        return self.rest + self.keys_values + self.expand

    def attend(self, queries: int, keys: int) -> int:
        """FLOPs of `queries` tokens of one row attending to `keys` cached ones, the whole rectangle."""
        if self.latent_attention is None:
            return queries * keys * self.attention
        if queries > FEW_QUERIES or (queries == keys and queries > 1):
            return keys * self.expand + queries * keys * self.attention
        return queries * (self.absorb + keys * self.latent_attention)


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


def layer_cost(config: Any, layer: int = 0) -> LayerCost:
    """The cost of `layer`. Only DeepSeek-V2's layers differ: the first ones have a dense MLP, the others experts.

    Raises `InputError` on a family that is not supported.
    """
    check_family(config)
    d, heads = config.hidden_size, config.num_attention_heads
    if not is_latent(config):
        size = head_dim(config)
        return LayerCost(
            query=2 * d * heads * size,
            keys_values=2 * 2 * d * config.num_key_value_heads * size,
            output=2 * heads * size * d,
            mlp=6 * d * config.intermediate_size,
            attention=4 * heads * size,
        )
    latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    still, value = config.qk_nope_head_dim, config.v_head_dim
    wide, rank = heads * (still + rotary), config.q_lora_rank
    return LayerCost(
        query=2 * d * wide if rank is None else 2 * d * rank + 2 * rank * wide,
        keys_values=2 * d * (latent + rotary),
        output=2 * heads * value * d,
        mlp=_expert_mlp(config, layer),
        attention=2 * heads * (still + rotary + value),
        expand=2 * latent * heads * (still + value),
        absorb=2 * latent * heads * (still + value),
        latent_attention=2 * heads * (latent + rotary + latent),
    )


def _expert_mlp(config: Any, layer: int) -> int:
    """DeepSeek-V2's MLP: dense in the first layers, else the router, the experts it chooses and the shared ones."""
    d = config.hidden_size
    if layer < config.first_k_dense_replace:
        return 6 * d * config.intermediate_size
    active = config.num_experts_per_tok + config.n_shared_experts
    return 2 * d * config.n_routed_experts + 6 * d * config.moe_intermediate_size * active


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
    for name, value in (("n", n), ("batch", batch), ("survivors", survivors)):
        check_count(name, value)
    check_family(config)
    layers = config.num_hidden_layers
    split = SwiftKVConfig(
        layers, layers if num_key_value_layers is None else num_key_value_layers, key_value_group_size
    )
    if n < survivors:
        raise InputError(f"expected 1 to n={n} survivors, got {survivors}")
    costs = [layer_cost(config, layer) for layer in range(layers)]
    lower = fill = upper = 0
    for layer in range(split.num_key_value_layers):
        cost = costs[layer]
        square = cost.attention * n * n
        attended = (square // 2 if causal else square) + n * cost.expand if n > 1 else cost.attend(1, 1)
        lower += n * (cost.rest + cost.keys_values) + attended
    for layer in split.owners:
        fill += n * costs[layer].keys_values
    for layer in split.upper:
        upper += survivors * costs[layer].rest + costs[layer].attend(survivors, n)
    logits = survivors * 2 * config.hidden_size * config.vocab_size
    return Flops(batch * lower, batch * fill, batch * upper, batch * logits)


def decode_flops(
    config: Any, context: int, num_key_value_layers: int | None = None, key_value_group_size: int = 1
) -> int:
    """FLOPs of one more token with `context` tokens in the cache, the new one included.

    Raises `InputError` on l or g that do not fit, and a context below 1.
    """
    check_count("context", context)
    check_family(config)
    layers = config.num_hidden_layers
    split = SwiftKVConfig(
        layers, layers if num_key_value_layers is None else num_key_value_layers, key_value_group_size
    )
    costs = [layer_cost(config, layer) for layer in range(layers)]
    filled = sum(costs[layer].keys_values for layer in (*range(split.num_key_value_layers), *split.owners))
    each = sum(cost.rest + cost.attend(1, context) for cost in costs)
    return each + filled + 2 * config.hidden_size * config.vocab_size


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

    check_count("tokens", tokens)
    check_count("batch", batch)
    check_family(config)
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
