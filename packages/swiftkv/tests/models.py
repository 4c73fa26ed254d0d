"""Small models of every family, with weights large enough that a wrong mask or position shows."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
LAYERS = 6
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation="sdpa",
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MLA: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    rope_parameters=ROPE,
)
FAMILIES: dict[str, Any] = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**{**COMMON, **k})),
    "llama-bias": lambda **k: LlamaForCausalLM(LlamaConfig(**{**COMMON, "attention_bias": True, **k})),
    "llama3-rope": lambda **k: LlamaForCausalLM(LlamaConfig(**{**COMMON, "rope_parameters": LLAMA3, **k})),
    "mistral-window": lambda **k: MistralForCausalLM(MistralConfig(**{**COMMON, "sliding_window": 7, **k})),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**{**COMMON, **k})),
    "qwen2-window": lambda **k: Qwen2ForCausalLM(
        Qwen2Config(**{**COMMON, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, **k})
    ),
    "qwen3": lambda **k: Qwen3ForCausalLM(Qwen3Config(**{**COMMON, "head_dim": 16, **k})),
    "deepseek-v2": lambda **k: DeepseekV2ForCausalLM(DeepseekV2Config(**{**COMMON, **MLA, "q_lora_rank": None, **k})),
    "deepseek-v2-lora": lambda **k: DeepseekV2ForCausalLM(
        DeepseekV2Config(**{**COMMON, **MLA, "q_lora_rank": 12, **k})
    ),
}


def make(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model of `family` in eval mode; biases and norms are random too. A copy: it may be changed."""
    torch.manual_seed(seed)
    return copy.deepcopy(_made(family, seed, json.dumps(changes)))


@functools.cache
def _made(family: str, seed: int, changes: str) -> Any:
    model = FAMILIES[family](**json.loads(changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(batch: int, n: int, seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids (batch, n)."""
    return torch.randint(vocab, (batch, n), generator=torch.Generator().manual_seed(seed))
