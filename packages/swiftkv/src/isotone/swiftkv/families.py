"""What differs between the model families: which projections make queries, keys and values, and RoPE.

Shapes: T tokens (any leading dimensions), H query heads, K key-value heads, e head size, G groups.
Grouped-query attention (Llama, Mistral, Qwen2, Qwen3): a cached token is K keys and K values of e numbers. Multi-head
latent attention (DeepSeek-V2): it is one latent c_kv and one rotary key, kept together as one key of r + p numbers; the
value is the latent, so that nothing is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SWIFT = "_swiftkv"

QUERY_MODULES = ("q_proj", "q_norm", "q_a_proj", "q_a_layernorm", "q_b_proj")
KEY_VALUE_MODULES = ("k_proj", "k_norm", "v_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")

# MLA: with few queries a row the latents are attended to directly, with many they are expanded to keys and values first
FEW_QUERIES = 16

Rope = tuple[Tensor, Tensor] | Tensor


@dataclass(frozen=True)
class CacheSpec:
    """What one token leaves in one slot: `heads` keys of `key_dim` and as many values of `value_dim` numbers."""

    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: Any) -> CacheSpec:
        """The spec of a Hugging Face config."""
        if is_latent(config):
            return cls(1, config.kv_lora_rank + config.qk_rope_head_dim, 0)
        return cls(config.num_key_value_heads, head_dim(config), head_dim(config))


def is_latent(config: Any) -> bool:
    """Whether attention is multi-head latent attention."""
    return getattr(config, "kv_lora_rank", None) is not None


def head_dim(config: Any) -> int:
    """The size of a head (not of MLA, which has three)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of `layer`, in tokens, or None where it sees everything before it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return window


def present(attention: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those of the projections `names` that this attention module has."""
    return [name for name in names if isinstance(getattr(attention, name, None), nn.Module)]


def queries(attention: Any, states: Tensor, suffix: str = "") -> Tensor:
    """Queries of `states` (..., d) before RoPE, (..., H, e)."""

    def module(name: str) -> Any:
        return getattr(attention, name + suffix)

    if hasattr(attention, "kv_lora_rank"):
        if attention.q_lora_rank is None:
            projected = module("q_proj")(states)
        else:
            projected = module("q_b_proj")(module("q_a_layernorm")(module("q_a_proj")(states)))
        return projected.unflatten(-1, (-1, attention.qk_head_dim))
    heads = module("q_proj")(states).unflatten(-1, (-1, attention.head_dim))
    return module("q_norm")(heads) if hasattr(attention, "q_norm" + suffix) else heads


def keys_values(attention: Any, states: Tensor, suffix: str = "") -> tuple[Tensor, Tensor]:
    """Keys (..., K, key_dim) before RoPE and values (..., K, value_dim) of `states` (..., d)."""

    def module(name: str) -> Any:
        return getattr(attention, name + suffix)

    if hasattr(attention, "kv_lora_rank"):
        compressed = module("kv_a_proj_with_mqa")(states)
        latent, rotary = compressed.split([attention.kv_lora_rank, attention.qk_rope_head_dim], -1)
        key = torch.cat([module("kv_a_layernorm")(latent), rotary], -1).unsqueeze(-2)
        return key, key[..., :0]
    shape = (-1, attention.head_dim)
    key = module("k_proj")(states).unflatten(-1, shape)
    if hasattr(attention, "k_norm" + suffix):
        key = module("k_norm")(key)
    return key, module("v_proj")(states).unflatten(-1, shape)


def rotate(states: Tensor, rope: Rope) -> Tensor:
    """RoPE on `states` (..., heads, e), `rope` as the model's own rotary module gives it for the same tokens.

    Of MLA, the last numbers of each head are rotated, in neighbouring pairs (a complex product); else all, in halves.
    """
    if isinstance(rope, tuple):
        cos, sin = (part.unsqueeze(-2) for part in rope)
        first, second = states.chunk(2, -1)
        return states * cos + torch.cat((-second, first), -1) * sin
    still, turned = states.split([states.shape[-1] - 2 * rope.shape[-1], 2 * rope.shape[-1]], -1)
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * rope.unsqueeze(-2)).flatten(-2).type_as(states)
    return torch.cat((still, turned), -1)


def take(rope: Rope, index: Tensor) -> Rope:
    """The rotations of some of the tokens, `index` into the first dimension."""
    return (rope[0][index], rope[1][index]) if isinstance(rope, tuple) else rope[index]


def expand_latent(attention: Any, key: Tensor, up: Any) -> tuple[Tensor, Tensor]:
    """Keys (b, H, n, qk_head_dim) and values (b, H, n, v_head_dim) of every head, of cached `key` (b, 1, n, r + p).

    `up` is the slot owner's kv_b_proj.
    """
    latent, rotary = key.split([attention.kv_lora_rank, attention.qk_rope_head_dim], -1)
    heads = up(latent.squeeze(1)).unflatten(-1, (-1, attention.qk_nope_head_dim + attention.v_head_dim)).transpose(1, 2)
    still, value = heads.split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
    return torch.cat([still, rotary.expand(-1, still.shape[1], -1, -1)], -1), value


def absorb_query(attention: Any, query: Tensor, up: Any) -> Tensor:
    """Queries (..., H, qk_head_dim) as queries of the latent itself, (..., H, r + p): W_UK folded into them."""
    still, turned = query.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
    weight = _up_weight(attention, up)[:, : attention.qk_nope_head_dim]
    return torch.cat([torch.einsum("...hi,hir->...hr", still, weight), turned], -1)


def release_output(attention: Any, output: Tensor, up: Any) -> Tensor:
    """Mean latents (..., H, r) as mean values (..., H, v_head_dim): W_UV applied after attention."""
    weight = _up_weight(attention, up)[:, attention.qk_nope_head_dim :]
    return torch.einsum("...hr,hvr->...hv", output, weight)


def is_plain(module: Any) -> bool:
    """Whether a projection is a linear layer and no more, so that its weight may be used in its place: no adapter
    around it, no hook on it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return type(module) is nn.Linear and not hooked


def _up_weight(attention: Any, up: Any) -> Tensor:
    return up.weight.unflatten(0, (-1, attention.qk_nope_head_dim + attention.v_head_dim))
