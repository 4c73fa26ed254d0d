"""Models to try things on: random Llamas of given shapes, and a small one trained on real text or on recall."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from isotone.shared.errors import InputError
from isotone.swiftkv.data import RECALL_VOCAB, recall_task
from isotone.swiftkv.losses import IGNORED

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=176, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
    ),
    "256x16": dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=2
    ),
    "512x16": dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2
    ),
    "llama-100m": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama-3.1-8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}


def shape_config(name: str, **changes: Any) -> LlamaConfig:
    """The config of a shape of `SHAPES`. Raises `InputError` on another name."""
    if name not in SHAPES:
        raise InputError(f"expected a shape of {', '.join(SHAPES)}, got {name!r}")
    values: dict[str, Any] = {"vocab_size": 1024, "max_position_embeddings": 131072, **SHAPES[name], **changes}
    values |= {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "sdpa"}
    return LlamaConfig(**values)


def random_llama(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **changes: Any
) -> LlamaForCausalLM:
    """A Llama of a shape with random weights, in eval mode: enough for speed, memory, FLOPs and exactness."""
    torch.manual_seed(seed)
    config = shape_config(name, **changes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def train_base(
    model: Any,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    *,
    cosine: bool = True,
    until: float | None = None,
    compute_dtype: str = "model",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Train every weight by cross-entropy in place; returns the steps taken.

    AdamW (0.9, 0.99), decay 0.1, clip 1, 50 steps of warm-up; then `cosine` to 5 % of `lr`, or constant.
    `batches(step)`: ids and labels (b, n), -100 where nothing is asked. `until`: stop where the loss, averaged over
    some ten steps, is below it. `compute_dtype` "bf16": the forward passes in autocast. Raises `InputError` on a loss
    that is not finite.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    device = model.lm_head.weight.device
    average, taken = math.inf, 0
    for step in range(steps):
        rise = min(1.0, (step + 1) / 50)
        fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
        ids, labels = batches(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype == "bf16"):
            loss = model(input_ids=ids.to(device), labels=labels.to(device), use_cache=False).loss
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"expected a finite loss, got {value} at step {step} with lr {lr}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1, value)
        taken = step + 1
        average = value if math.isinf(average) else 0.9 * average + 0.1 * value
        if until is not None and average < until:
            break
    model.eval()
    return taken


def train_recall(
    model: Any,
    *,
    batch: int = 16,
    pairs: int = 16,
    queries: int = 12,
    copying: int = 2500,
    recalling: int = 250,
    lr: float = 3e-3,
    seed: int = 0,
    compute_dtype: str = "model",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Teach `model` key-value recall in place; returns the steps taken.

    First runs of 6 to 39 random symbols, each said twice, until it copies (at most `copying` steps): that makes heads
    that find what followed a symbol before, which recall alone makes only after far more steps. Then `recalling` steps
    of the task, with runs every fourth.
    """

    def runs(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        length = int(torch.randint(6, 40, (1,), generator=generator))
        once = torch.rand(batch, RECALL_VOCAB, generator=generator).argsort(-1)[:, :length]
        ids = torch.cat([once, once], 1)
        labels = ids.clone()
        labels[:, : length + 1] = IGNORED
        return ids, labels

    def task(step: int) -> tuple[Tensor, Tensor]:
        if step % 4 == 0:
            return runs(copying + step)
        generator = torch.Generator().manual_seed(1_000_003 * seed + copying + step)
        return recall_task(batch, pairs, generator, queries)

    options: dict[str, Any] = dict(compute_dtype=compute_dtype, on_step=on_step)
    taken = train_base(model, runs, copying, lr, cosine=False, until=1.0, **options)
    return taken + train_base(model, task, recalling, lr, **options)
