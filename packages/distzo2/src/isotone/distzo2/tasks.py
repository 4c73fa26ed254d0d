"""The keyword task on a small OPT: what is trained, by which method, and how good it gets (section 6 a)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from isotone.distzo2.baselines import ReferenceMeZO
from isotone.distzo2.config import ZOConfig
from isotone.distzo2.data import KEYWORD_VOCAB, keyword_batch
from isotone.distzo2.distributed import to_device
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.objective import model_loss
from isotone.distzo2.rng import step_seed

HELD_OUT_SEED = 1 << 40
TUNING_TEXTS_SEED = 1 << 41
"""Of the texts by which a learning rate is chosen: others than those that are reported."""


@dataclass(frozen=True)
class KeywordTask:
    """The sizes of section 6 (a): 20,352 parameters at the defaults."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    ffn: int = 64
    length: int = 16
    rows: int = 32
    held_out: int = 2048
    positions: int = 32


def keyword_model(task: KeywordTask, seed: int) -> Any:
    """A random OPT classifier of the task, in eval mode."""
    from transformers import OPTConfig, OPTForSequenceClassification

    torch.manual_seed(seed)
    classes: dict[str, Any] = {"num_labels": 2}  # a base class's field, of which the type says nothing
    config = OPTConfig(
        vocab_size=KEYWORD_VOCAB,
        hidden_size=task.hidden,
        word_embed_proj_dim=task.hidden,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        ffn_dim=task.ffn,
        max_position_embeddings=max(task.positions, task.length),
        pad_token_id=1,
        **classes,
    )
    return OPTForSequenceClassification(config).eval()


def batch_of(task: KeywordTask, seed: int, step: int) -> dict[str, torch.Tensor]:
    """The training batch of a step of the run `seed`."""
    return keyword_batch(task.rows, 1_000_003 * (seed + 1) + step, task.length)


@torch.no_grad()
def score(model: Any, task: KeywordTask) -> dict[str, float]:
    """Loss (nats) and accuracy (%) on texts that no run trains on, and the loss on others to choose a rate by."""
    tuning = keyword_batch(task.held_out, TUNING_TEXTS_SEED, task.length)
    return {
        **_judged(model, keyword_batch(task.held_out, HELD_OUT_SEED, task.length)),
        "tuning_loss": _judged(model, tuning)["loss"],
    }


def _judged(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    batch = to_device(batch, next(model.parameters()).device)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits.double(), batch["labels"])
    return {"loss": float(loss), "accuracy": 100 * float((logits.argmax(1) == batch["labels"]).double().mean())}


def zeroth_order(task: KeywordTask, lr: float, steps: int, seed: int, where: str) -> dict[str, Any]:
    """The engine in memory for `steps` steps, on the device `where`."""
    model = keyword_model(task, seed)
    engine = ZOEngine(model, ZOConfig(lr=lr, seed=seed), device=where)
    start = time.perf_counter()
    found = [engine.step(batch_of(task, seed, step)) for step in range(steps)]
    engine.flush()
    seconds = time.perf_counter() - start
    return {**score(model, task), "losses": [s.loss for s in found], "seconds": seconds, "steps": steps}


def reference(task: KeywordTask, lr: float, steps: int, seed: int, where: str) -> dict[str, Any]:
    """MeZO in the reference's order of passes, with the directions of torch's generator, for `steps` steps."""
    model = keyword_model(task, seed).to(where)
    method = ReferenceMeZO(model.named_parameters(), lr=lr)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        batch = to_device(batch_of(task, seed, step), where)

        def loss(batch: dict[str, Any] = batch) -> float:
            return float(model_loss(model, batch)[0])

        losses.append(method.step(loss, step_seed(seed, step)))
    return {**score(model, task), "losses": losses, "seconds": time.perf_counter() - start, "steps": steps}


def first_order(task: KeywordTask, lr: float, seconds: float, seed: int, where: str, lora: int = 0) -> dict[str, Any]:
    """AdamW on all parameters, or on LoRA factors of rank `lora` and the head, for as many `seconds`."""
    model = keyword_model(task, seed).to(where)
    if lora:
        import peft

        places = ["q_proj", "v_proj", "fc1", "fc2"]
        config = peft.LoraConfig(task_type="SEQ_CLS", r=lora, lora_alpha=2 * lora, target_modules=places)
        model = peft.get_peft_model(model, config).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model_loss(model, to_device(batch_of(task, seed, len(losses)), where))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {**score(model, task), "losses": losses, "seconds": time.perf_counter() - start, "steps": len(losses)}


def best_rate(rates: tuple[float, ...], run: Callable[[float], dict[str, Any]]) -> float:
    """The rate with the lowest loss on the tuning texts, of one run each."""
    losses = {rate: run(rate)["tuning_loss"] for rate in rates}
    return min((rate for rate in rates if losses[rate] == losses[rate]), key=lambda rate: losses[rate])
