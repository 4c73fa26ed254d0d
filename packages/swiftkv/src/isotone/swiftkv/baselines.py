"""What one would do instead at the same prefill cost: drop the upper layers, or let them reuse the layer below's cache.

Both are measured as they are and, with the same data, steps and KL as SwiftKV, distilled. Neither is a published
method whole: early-exit models train their exits with the language model (here the model is given, and only the exit is
trained); cross-layer sharing (CLA, YOCO) is trained from scratch with its keys and values (here the layer's own,
frozen, are reused, and the upper layers' queries are trained, as SwiftKV trains them). SwiftKV's squared error of
hidden states has no counterpart where layers are missing: neither baseline has it.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.convert import thin
from isotone.swiftkv.data import Batch, Batches
from isotone.swiftkv.distill import DistillConfig, autocast, lower_half
from isotone.swiftkv.families import (
    QUERY_MODULES,
    SWIFT,
    expand_latent,
    is_latent,
    keys_values,
    present,
    queries,
    rotate,
    window_of,
)
from isotone.swiftkv.losses import tiled_kl
from isotone.swiftkv.modeling import attention_outputs


class EarlyExit(nn.Module):
    """The layers from l on dropped: h_l, a residual MLP (0 at first), a d x d map (the identity at first), its own
    norm, the model's lm_head. The MLP is as wide as it takes to have at least as many weights as SwiftKV trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.host = [model]  # not a submodule: its weights are not this arm's
        d = model.config.hidden_size
        where = model.lm_head.weight.device
        own = sum(p.numel() for name, p in model.named_parameters() if SWIFT in name)
        width = max(1, math.ceil((own - d * d - d) / (2 * d)))
        self.up = nn.Linear(d, width, bias=False, device=where)
        self.down = nn.Linear(width, d, bias=False, device=where)
        self.map = nn.Linear(d, d, bias=False, device=where)
        self.weight = nn.Parameter(model.model.norm.weight.detach().clone())
        self.eps = model.model.norm.variance_epsilon
        with torch.no_grad():
            # the seed is its own, so that an arm is the same alone and after others
            self.up.weight.copy_(torch.randn(width, d, generator=torch.Generator().manual_seed(0)) / d**0.5)
            self.down.weight.zero_()
            self.map.weight.copy_(torch.eye(d))

    def final(self, batch: Batch) -> Float[Tensor, "batch n d"]:
        """What lm_head is given."""
        with torch.no_grad():
            hidden = lower_half(self.host[0], batch)[0]
        unit = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        hidden = self.map(hidden + self.down(F.silu(self.up(unit))))
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (b, n, V) of token ids (b, n)."""
        return self.host[0].lm_head(self.final(Batch(ids)))


class CopiedKeyValues(nn.Module):
    """The layers from l on attend to the keys and values of layer l - 1 (as training-free sharing does); their queries
    are their own, and are what is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.host = [model]
        layers = model.model.layers
        self.queries = nn.ModuleDict()
        self.attentions: list[Any] = []
        for number in SwiftKVConfig.of(model.config).upper:
            attention = thin(layers[number].self_attn)
            for name in present(attention, QUERY_MODULES):
                # the base's weights may be shared and frozen: copies, in fp32, are what is trained
                module = copy.deepcopy(getattr(attention, name)).float().requires_grad_(True)
                setattr(attention, name, module)
                self.queries[f"{number} {name}"] = module
            self.attentions.append([attention])

    def final(self, batch: Batch) -> Float[Tensor, "batch n d"]:
        """What lm_head is given."""
        model = self.host[0]
        inner, kept = model.model, SwiftKVConfig.of(model.config).num_key_value_layers
        with torch.no_grad():
            hidden, masks, rope, positions = lower_half(model, batch, kept - 1)
            below = inner.layers[kept - 1]
            attention = below.self_attn
            keys, values = keys_values(attention, below.input_layernorm(hidden))
            keys, values = rotate(keys, rope).transpose(1, 2), values.transpose(1, 2)
            if is_latent(model.config):
                keys, values = expand_latent(attention, keys, attention.kv_b_proj)
            hidden = below(hidden, attention_mask=masks[kept - 1], position_ids=positions, position_embeddings=rope)
        for number, (attention,) in zip(SwiftKVConfig.of(model.config).upper, self.attentions, strict=True):
            layer = inner.layers[number]
            query = rotate(queries(attention, layer.input_layernorm(hidden)), rope).transpose(1, 2)
            window = window_of(model.config, number)
            hidden = hidden + attention.o_proj(attention_outputs(attention, query, keys, values, masks[number], window))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return inner.norm(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (b, n, V) of token ids (b, n)."""
        return self.host[0].lm_head(self.final(Batch(ids)))


def train_baseline(arm: Any, data: Batches, settings: DistillConfig) -> list[float]:
    """Distil a baseline with the KL of `settings`, its steps, rate and schedule; returns the losses."""
    model = arm.host[0]
    parameters = list(arm.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    head = model.lm_head.weight.detach()
    losses = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.rate(step)
        batch = data(step).to(head.device)
        with torch.no_grad(), model.teacher(), autocast(model, settings.compute_dtype):
            target = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.to(head.dtype)
        with autocast(model, settings.compute_dtype):
            final = arm.final(batch).to(head.dtype)
        loss = tiled_kl(final.flatten(0, 1), target.flatten(0, 1), head, settings.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
