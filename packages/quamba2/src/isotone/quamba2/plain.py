"""A Mamba2 of parameters alone, named as Hugging Face's are, without its code.

Everything here computes a float model by `forward`, which needs the parameters. So a small model is trained, and a
large one counted on the meta device, without loading a library that takes longer than either.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class PlainConfig:
    """The entries of a Hugging Face Mamba2Config that are read here, with its defaults."""

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    vocab_size: int
    tie_word_embeddings: bool = False
    expand: int = 2
    conv_kernel: int = 4
    chunk_size: int = 256
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    model_type: str = "mamba2"

    def hugging_face(self) -> Any:
        """The Mamba2Config of these entries."""
        from transformers import Mamba2Config

        entries = asdict(self)
        del entries["model_type"]
        return Mamba2Config(**entries)


class PlainMamba2(nn.Module):
    """Parameters of the sizes in `config`, drawn as a Mamba2 starts: dt from 0.001 to 0.1, A from -1 to -16, D = 1."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.1)
        self.backbone.layers = nn.ModuleList(_layer(config) for _ in range(config.num_hidden_layers))
        self.backbone.norm_f = _Norm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class _Mixer(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        inner, heads = config.expand * config.hidden_size, config.num_heads
        wide = inner + 2 * config.n_groups * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, inner + wide + heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(wide, wide, config.conv_kernel, groups=wide, bias=config.use_conv_bias)
        step = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_log = nn.Parameter(_log_rates(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = _Norm(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.num_hidden_layers)


def _log_rates(heads: int) -> Tensor:
    return torch.log(1 + 15 * torch.rand(heads))


def _layer(config: PlainConfig) -> nn.Module:
    layer = nn.Module()
    layer.norm = _Norm(config.hidden_size)
    layer.mixer = _Mixer(config)
    return layer
