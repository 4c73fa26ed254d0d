"""The small GPT of the reproduction: pre-norm RMS, QK-norm, relu² MLP, no biases, zero-initialised projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes. `vocabulary` 256 is bytes; `dim` must be divisible by `heads`."""

    vocabulary: int = 256
    dim: int = 64
    layers: int = 2
    heads: int = 2
    context: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        if self.dim % self.heads:
            raise ValueError(f"expected dim divisible by heads, got {self.dim} and {self.heads}")


class Block(nn.Module):
    """Attention and MLP, each on the RMS norm of the residual stream; both output projections start at zero."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.dim, config.dim, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden_states: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        normed = _norm(hidden_states)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(_norm(query), _norm(key), value, is_causal=True)
        hidden_states = hidden_states + self.output(attended.transpose(1, 2).flatten(2))
        return hidden_states + self.down(F.relu(self.up(_norm(hidden_states))).square())


class GPT(nn.Module):
    """Tokens to next-token logits; learned positions; an untied head that starts at zero."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.dim)
        self.position = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocabulary"]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden_states = self.embed(tokens) + self.position(positions)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(_norm(hidden_states))

    def loss(self, windows: Int[Tensor, "batch seq_plus_one"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token, in nats."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
