"""Tiny models with random weights, made once and copied."""

import copy
import functools
import json

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

VOCAB = 61
SIZES = {
    "mamba2": dict(hidden_size=64, num_heads=12, head_dim=16, expand=3, n_groups=3, state_size=8, chunk_size=8),
    "mamba": dict(hidden_size=32, expand=2, state_size=8, use_mambapy=False),
}


def make(kind="mamba2", seed=0, **changes):
    """A model of `kind` in eval mode, every weight random, with outliers among the channels of x, B and C.

    A copy: it may be changed.
    """
    return copy.deepcopy(_made(kind, seed, json.dumps(changes)))


@functools.cache
def _made(kind, seed, changes):
    torch.manual_seed(seed)
    sizes = {**SIZES[kind], "vocab_size": VOCAB, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1}
    sizes |= {"eos_token_id": 2, **json.loads(changes)}
    config = Mamba2Config(**sizes) if kind == "mamba2" else MambaConfig(**sizes)
    model = (Mamba2ForCausalLM if kind == "mamba2" else MambaForCausalLM)(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, 0.3)
        for layer in model.backbone.layers:
            mixer = layer.mixer
            for norm in (layer.norm, getattr(mixer, "norm", None), model.backbone.norm_f):
                if norm is not None:
                    norm.weight.normal_(1, 0.2)
            mixer.in_proj.weight.normal_(0, config.hidden_size**-0.5)
            inner = mixer.conv1d.weight.shape[0]
            mixer.conv1d.weight.normal_(0, 0.5).mul_(torch.randn(inner, 1, 1).exp())
            mixer.out_proj.weight.normal_(0, 0.1)
            mixer.D.normal_(1, 0.3)
            mixer.A_log.add_(torch.rand_like(mixer.A_log))
            for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv1d.bias):
                if bias is not None:
                    bias.normal_(0, 0.3)
    return model


def ids(batch=2, length=19, seed=1):
    """Random token ids (batch, length)."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration(samples=4, length=17, seed=5):
    """Rows of token ids, one a sample."""
    return list(ids(samples, length, seed))
