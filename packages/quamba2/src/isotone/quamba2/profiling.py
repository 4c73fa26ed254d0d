"""Time to the first token, time per token, and bytes, of one model on one device (section 9)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from isotone.quamba2.report import report
from isotone.shared.errors import check_count


@dataclass(frozen=True)
class Profile:
    """`ttft`: seconds from a prompt of `prompt` tokens to the first new one; `tpot`: seconds a token after it, both
    medians of `rounds`. `weight_bytes` as saved, `float16_bytes` unquantised; `state_bytes` of all sequences."""

    batch: int
    prompt: int
    rounds: int
    ttft: float
    tpot: float
    weight_bytes: int
    float16_bytes: int
    state_bytes: int


@torch.no_grad()
def profile(model: Any, batch: int = 1, prompt: int = 1024, rounds: int = 20, warm_up: int = 3) -> Profile:
    """Time `model`, a `QuambaForCausalLM`, where it is. Raises `InputError` on counts below 1."""
    for name, value in (("batch", batch), ("prompt", prompt), ("rounds", rounds)):
        check_count(name, value)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.arch.vocab, (batch, prompt), generator=generator).to(model.device)
    cache = model.new_cache()

    def prefill() -> None:
        nonlocal cache
        cache = model.new_cache()
        model(ids, cache, last_only=True)

    ttft = _median(prefill, rounds, warm_up, model.device)
    tpot = _median(lambda: model(ids[:, :1], cache, last_only=True), rounds, warm_up, model.device)
    found = report(model)
    return Profile(batch, prompt, rounds, ttft, tpot, found.total_bytes, found.float16_bytes, cache.bytes)


def _median(work: Callable[[], Any], rounds: int, warm_up: int, device: torch.device) -> float:
    times = []
    for number in range(warm_up + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - start)
    return median(times)
