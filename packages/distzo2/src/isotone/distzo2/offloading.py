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
from isotone.distzo2.timing import busy, record
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
Batch = tuple[int, int]
"""Rows and tokens a row."""
LONG, SHORT, BOUND = (8, 2048), (1, 2048), (1, 128)
"""What hides the transfers under compute, what may not, and what cannot."""


def random_opt(shape: str, dtype: torch.dtype, length: int, where: str = "cpu") -> Any:
    """A random causal OPT of a shape of `SHAPES`, made on the device `where`, in eval mode."""
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
        # the host would take minutes to draw thirteen billion weights, and to sum their bits
        with torch.device(where):
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def engine_of(shape: str, length: int, where: str, **options: Any) -> ZOEngine:
    """An engine on a random OPT, fp16 on a GPU; `options` of its config."""
    model = random_opt(shape, torch.float16 if where == "cuda" else torch.float32, length, where)
    return ZOEngine(model, ZOConfig(lr=1e-7, **options), device=where)


def timed(
    engine: ZOEngine, batch: Batch, where: str, rounds: int = _STEPS, immediate: bool = False
) -> dict[str, float]:
    """Steps on random tokens of `batch` rows and length: median, fastest and slowest `seconds`, `tokens` a second, and
    of a GPU the bytes allocated at most (`peak`) and in use by whatever has the device (`used`).

    `immediate`: the update is applied at the end of its step.
    """
    rows, length = batch
    model: Any = engine.model
    ids = torch.randint(model.config.vocab_size, batch, generator=torch.Generator().manual_seed(0)).to(where)
    if where == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(min(_WARM, rounds) + rounds):
        start = time.perf_counter()
        engine.step({"input_ids": ids, "labels": ids})  # ends in a loss on the host: the device is done
        if immediate:
            engine.flush()
            engine.link.finish()
        times.append(time.perf_counter() - start)
    kept = times[min(_WARM, rounds) :]
    found = {"seconds": statistics.median(kept), "fastest": min(kept), "slowest": max(kept), "peak": 0.0, "used": 0.0}
    found["tokens"] = rows * length / found["seconds"]
    if where == "cuda":  # pragma: no cover - needs a GPU
        free, total = torch.cuda.mem_get_info()
        found |= {"peak": float(torch.cuda.max_memory_allocated()), "used": float(total - free)}
    return found


def line_rate(elements: int, dtype: torch.dtype, where: str, rounds: int = _STEPS) -> float:
    """Bytes a second of one copy after another from pinned host memory to the device; on a CPU, of a plain copy."""
    source = torch.zeros(elements, dtype=dtype)
    if where == "cuda":  # pragma: no cover - needs a GPU
        source = source.pin_memory()
    target = torch.empty_like(source, device=where)

    def once() -> float:
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if where == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return source.numel() * source.element_size() / statistics.median(once() for _ in range(rounds))


def offloaded(
    shape: str, where: str, long: Batch = LONG, short: Batch = SHORT, bound: Batch = BOUND, rounds: int = _STEPS
) -> dict[str, Any]:
    """One engine that offloads, timed on a long and a short batch, and on one that the link alone holds up (`bound`);
    then the short one updated at once, and moved in turn.

    `lanes`: seconds that each worked in a `bound` step; `bytes`: uploaded in it; `line_rate`: of the link alone.
    """
    engine = engine_of(shape, max(long[1], short[1], bound[1]), where, offload="cpu")
    found: dict[str, Any] = {"long": timed(engine, long, where, rounds), "short": timed(engine, short, where, rounds)}
    found["bound"] = timed(engine, bound, where, rounds)
    before = engine.link.bytes["upload"]
    ids = torch.zeros(bound, dtype=torch.long)
    found["spans"] = record(engine, {"input_ids": ids, "labels": ids})
    found["bytes"] = engine.link.bytes["upload"] - before
    found["lanes"] = busy(found["spans"])
    largest = max((flat for buckets in engine.pipeline.rest for flat in buckets), key=len)
    found["line_rate"] = line_rate(len(largest), largest.dtype, where, rounds)
    found["immediate"] = timed(engine, short, where, rounds, immediate=True)
    engine.link.overlap = False
    found["in turn"] = timed(engine, short, where, rounds)
    engine.link.finish()
    del engine
    _free(where)
    return found


LEFT_OUT: dict[str, dict[str, Any]] = {
    "naive": {"pin_memory": False, "overlap": False},
    "tensors": {"flat_buckets": False},
}
"""ZO2-style moving, in turn from pageable memory; and a copy for each tensor (section 2.12)."""


def left_out(shape: str, where: str, short: Batch = SHORT, rounds: int = _STEPS) -> dict[str, dict[str, float]]:
    """The short batch with a part of the method left out, each by an engine of its own."""
    found = {}
    for name, options in LEFT_OUT.items():
        engine = engine_of(shape, short[1], where, offload="cpu", **options)
        # in turn is several times as slow: fewer of them
        found[name] = timed(engine, short, where, max(2, rounds // 4) if name == "naive" else rounds)
        engine.link.finish()
        del engine
        _free(where)
    return found


def resident(
    shape: str, where: str, long: Batch = LONG, short: Batch = SHORT, rounds: int = _STEPS
) -> dict[str, dict[str, float]]:
    """The same model and batches, all of it on the device."""
    engine = engine_of(shape, max(long[1], short[1]), where, offload="none")
    found = {name: timed(engine, batch, where, rounds) for name, batch in (("long", long), ("short", short))}
    del engine
    _free(where)
    return found


def beside_resident(shape: str, rows: int, length: int, where: str, rounds: int = _STEPS) -> dict[str, float]:
    """Seconds a step of the same model, resident and offloaded."""
    found = {}
    for name, offload in (("resident", "none"), ("offloaded", "cpu")):
        engine = engine_of(shape, length, where, offload=offload)
        found[name] = timed(engine, (rows, length), where, rounds)["seconds"]
        engine.link.finish()
        del engine
        _free(where)
    return found


def _free(where: str) -> None:
    # engine, model and hooks hold one another: the next arm must not begin beside them
    gc.collect()
    if where == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.empty_cache()


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
