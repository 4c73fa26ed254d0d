"""Choosing l: how early the input of a layer is near enough to those of the layers after it.

Two views of a model that is not converted yet: the cosine similarity between the inputs of its layers, and, for every
l, the KL to the base of what conversion without training would give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv.config import FAMILIES
from isotone.swiftkv.families import expand_latent, keys_values, queries, rotate, window_of
from isotone.swiftkv.modeling import attention_outputs, layer_masks
from isotone.swiftkv.prompts import check_batch


@dataclass(frozen=True)
class Suggestion:
    """`similarity[i][j]`: mean cosine of the inputs of layers i and j. `kl[l - 1]`: nats a token lost at conversion for
    l = 1 to L - 1. `knee`: the l after which a further layer buys least; `num_key_value_layers`: the one to take."""

    similarity: list[list[float]]
    kl: list[float]
    knee: int
    num_key_value_layers: int


@torch.no_grad()
def suggest_l(model: Any, data: Sequence[Tensor]) -> Suggestion:
    """A suggestion from `data`, batches (b, n) of token ids (ten are enough).

    The suggested l is the knee of the KL, and at least half of the layers, or three quarters of a Qwen's or of a model
    with fewer than 7e9 weights, where the authors' recipes lie. Raises `InputError` without data, on a family that is
    not supported, a model of a single layer and weights that give no finite logits.
    """
    if str(model.config.model_type) not in FAMILIES:
        raise InputError(
            f"expected a model of type {', '.join(FAMILIES)}, not converted, got {model.config.model_type!r}"
        )
    layers = model.config.num_hidden_layers
    if not len(data) or layers < 2:
        raise InputError(f"expected batches of token ids and 2 layers or more, got {len(data)} and {layers}")
    for ids in data:
        check_batch(ids, model.config.vocab_size)
        if not ids.numel():
            raise InputError(f"expected batches of token ids that are not empty, got shape {tuple(ids.shape)}")
    training = model.training
    try:
        return _measured(model.eval(), data, layers)
    finally:
        model.train(training)


def _measured(model: Any, data: Sequence[Tensor], layers: int) -> Suggestion:
    similar = torch.zeros(layers, layers, dtype=torch.float64)
    lost = torch.zeros(layers - 1, dtype=torch.float64)
    tokens = 0
    for ids in data:
        inputs, masks, rope, positions = _inputs(model, ids)
        unit = torch.stack([F.normalize(states.float(), dim=-1).flatten(0, 1) for states in inputs[:-1]])
        similar += torch.einsum("itd,jtd->ij", unit, unit).double().cpu()
        base = F.log_softmax(model.lm_head(model.model.norm(inputs[-1])).float(), -1)
        for kept in range(1, layers):
            logits = _converted(model, inputs[kept], kept, masks, rope)
            lost[kept - 1] += float(F.kl_div(F.log_softmax(logits.float(), -1), base, log_target=True, reduction="sum"))
        tokens += ids.numel()
    if not bool(lost.isfinite().all()):
        raise InputError("expected finite logits of the model, got NaN or infinity: are its weights whole?")
    losses = (lost / tokens).clamp_min(0).tolist()
    knee = knee_of(losses)
    least = math.ceil(layers * _share(model))
    return Suggestion((similar / tokens).tolist(), losses, knee, min(layers - 1, max(knee, least)))


def _share(model: Any) -> float:
    """The least share of the layers to keep: the authors' recipes take a half at 8B and above, three quarters of Qwen's
    and of smaller models."""
    small = sum(parameter.numel() for parameter in model.parameters()) < 7e9
    return 0.75 if small or model.config.model_type.startswith("qwen") else 0.5


def knee_of(losses: Sequence[float]) -> int:
    """The l (1 for the first) at which a falling curve is farthest below the line between its ends."""
    if len(losses) < 3 or losses[0] <= losses[-1]:
        return 1
    first, last, steps = losses[0], losses[-1], len(losses) - 1
    below = [(first + (last - first) * i / steps) - value for i, value in enumerate(losses)]
    return 1 + below.index(max(below))


def _inputs(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Any], Any, Tensor]:
    """The input of every layer and the last one's output, (b, n, d) each."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    masks = layer_masks(model.config, hidden, None, None, positions)
    rope = inner.rotary_emb(hidden, position_ids=positions)
    states = [hidden]
    for layer, mask in zip(inner.layers, masks, strict=True):
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        states.append(hidden)
    return states, masks, rope, positions


def _converted(model: Any, hidden: Tensor, kept: int, masks: list[Any], rope: Any) -> Tensor:
    """The logits that conversion at l = `kept` would give without training, from h_l."""
    layers = model.model.layers
    states = layers[kept].input_layernorm(hidden)
    for number in range(kept, len(layers)):
        layer = layers[number]
        attention = layer.self_attn
        keys, values = keys_values(attention, states)
        keys, values = rotate(keys, rope).transpose(1, 2), values.transpose(1, 2)
        if hasattr(attention, "kv_lora_rank"):
            keys, values = expand_latent(attention, keys, attention.kv_b_proj)
        query = rotate(queries(attention, layer.input_layernorm(hidden)), rope).transpose(1, 2)
        attended = attention_outputs(attention, query, keys, values, masks[number], window_of(model.config, number))
        hidden = hidden + attention.o_proj(attended)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))
