"""Small models of every family, random, in eval mode, and batches for them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import nn

VOCAB = 64


@functools.cache
def families():
    """Constructors by name; transformers is imported when the first is asked for."""
    import transformers as t

    common = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    llama = dict(intermediate_size=48, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    opt = dict(**common, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=1)
    gpt2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)
    return {
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**opt)),
        "opt-classifier": lambda: t.OPTForSequenceClassification(t.OPTConfig(**opt, num_labels=2)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common, **llama)),
        "qwen3-tied": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**common, **llama, head_dim=8, tie_word_embeddings=True)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
    }


def make(family: str = "opt", seed: int = 0) -> nn.Module:
    """A model with weights large enough that every part of it shows in the loss."""
    torch.manual_seed(seed)
    model = families()[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.15)
    return model


def batch(family: str = "opt", rows: int = 4, length: int = 8, seed: int = 1):
    """Token ids with labels; some places of a causal model's are not asked for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    if family.endswith("classifier"):
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(2, (rows,), generator=generator),
        }
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Chain(nn.Module):
    """Not a Hugging Face model: an embedding of features, like layers in a list, a head; any float type."""

    def __init__(self, width: int = 6, layers: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.enter = nn.Linear(3, width, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.LayerNorm(width, dtype=dtype), nn.Tanh())
            for _ in range(layers)
        )
        self.leave = nn.Linear(width, 1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.leave(x).squeeze(-1)


def chain(seed: int = 0, **options) -> Chain:
    torch.manual_seed(seed)
    return Chain(**options).eval()


def points(rows: int = 12, seed: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype)
    return {"x": x, "y": x.prod(1)}


def squared_error(model, batch):
    """Mean squared error and its terms."""
    error = (model(batch["x"]) - batch["y"]) ** 2
    return error.double().sum() / len(error), len(error)


def flat(model: nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def state_flat(state) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in itertools.chain(state.values())])
