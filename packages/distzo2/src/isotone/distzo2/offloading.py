"""Full sizes: random OPTs of the paper's shapes offloaded beside resident, and its recipe on a user's checkpoint."""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from isotone.distzo2.config import ZOConfig
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.loading import load_model
from isotone.distzo2.texts import corpus_of
from isotone.distzo2.training import train
from isotone.shared.errors import InputError

SHAPES = {
    "tiny": (2, 2, 32, 64),
    "opt-1.3b": (24, 32, 2048, 8192),
    "opt-6.7b": (32, 32, 4096, 16384),
    "opt-13b": (40, 40, 5120, 20480),
}
"""Layers, heads, hidden and feed-forward width (section 6 b)."""
_WARM, _STEPS = 5, 20


def random_opt(shape: str, dtype: torch.dtype, length: int) -> Any:
    """A random causal OPT of a shape of `SHAPES`, on the CPU, in eval mode."""
    from transformers import OPTConfig, OPTForCausalLM

    if shape not in SHAPES:
        raise InputError(f"expected a shape of {', '.join(SHAPES)}, got {shape!r}")
    layers, heads, hidden, ffn = SHAPES[shape]
    config = OPTConfig(
        vocab_size=50272 if shape != "tiny" else 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def offloaded(
    shape: str, rows: int, length: int, where: str, offload: str = "cpu", overlap: bool = True, rounds: int = _STEPS
) -> dict[str, float]:
    """Seconds a step and bytes allocated at most on the device (0 on a CPU), of a random model."""
    dtype = torch.float16 if where == "cuda" else torch.float32
    model = random_opt(shape, dtype, length)
    if offload == "none":
        model = model.to(where)
    config = ZOConfig(lr=1e-7, offload=offload, overlap=overlap)
    engine = ZOEngine(model, config, device=where)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {name: ids.to(where) for name in ("input_ids", "labels")}
    if where == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(min(_WARM, rounds) + rounds):
        start = time.perf_counter()
        engine.step(batch)  # ends in a loss on the host: the device is done
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
    engine.link.finish()
    # engine, model and hooks hold one another: the next arm must not begin beside them
    del engine, model
    gc.collect()
    if where == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.empty_cache()
    return {"seconds": statistics.median(times[min(_WARM, rounds) :]), "peak": float(peak)}


def beside_resident(shape: str, rows: int, length: int, where: str, rounds: int = _STEPS) -> dict[str, float]:
    """Seconds a step of the same model, resident and offloaded."""
    return {
        name: offloaded(shape, rows, length, where, offload, rounds=rounds)["seconds"]
        for name, offload in (("resident", "none"), ("offloaded", "cpu"))
    }


def finetune(
    model: Path,
    text: Path,
    lr: float,
    seed: int,
    where: str,
    out: Path,
    steps: int = 20_000,
    rows: int = 16,
    length: int = 256,
    words: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The recipe of section 6 (c): constant rate, eps 1e-3, on lines of text and label, by label `words` where
    the model is causal; accuracy in % held out."""
    made = load_model(model)
    corpus = corpus_of(text, model, made, rows, length, seed, words)
    if not corpus.classes:
        raise InputError(f"expected lines of text and label in {str(text)!r}, got others")
    config = ZOConfig(lr=lr, seed=seed, offload="cpu")
    engine = ZOEngine(made, config, objective=corpus.objective, device=where)
    folder = out / f"paper-{lr:g}-{seed}"
    history = train(engine, corpus.train, steps, folder=folder, data_id=corpus.data_id)
    found = corpus.judge(made, engine.run, where)
    return {"accuracy": found["accuracy"], "losses": history.losses}
