"""A/B timing on a machine that is not quiet: interleaved, the ratio taken pair by pair, with its spread."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
# a sample is longer than the slices in which a busy system hands out a core: a shorter one would mostly escape
# being interrupted, and a longer one it is compared with would not
MIN_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Timing:
    """`ratio` is the peer's time over ours (> 1: ours is faster), with its 95 % interval `low` to `high`."""

    ratio: float
    low: float
    high: float
    ours_seconds: float
    peer_seconds: float
    rounds: int


def compare(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    rounds: int = 20,
    warmup: int = 5,
    device: str = "cpu",
) -> Timing:
    """Time `ours` against `peer`, a pair a round, in random order within the pair.

    Both halves of a pair last about as long, the quicker one being called more often, so that the machine's
    noise falls on both alike: whatever its shape, a pair's ratio is then as often above the true one as below
    it. The ratio is the median over the pairs; the interval misses the true ratio in at most 5 % of
    comparisons. `device` "cuda" waits for the GPU's work to end; JAX results are waited for in any case. At
    least 6 rounds, below which there is no such interval.
    """
    our_calls, peer_calls = _calls_per_sample((ours, peer), rounds, warmup, device)
    order = random.Random(0)
    pairs = []
    with _no_collector():
        for _ in range(rounds):
            if order.random() < 0.5:
                our_seconds = _sample(ours, our_calls, device)
                peer_seconds = _sample(peer, peer_calls, device)
            else:
                peer_seconds = _sample(peer, peer_calls, device)
                our_seconds = _sample(ours, our_calls, device)
            pairs.append((our_seconds, peer_seconds))
    ratios = [peer_seconds / our_seconds for our_seconds, peer_seconds in pairs]
    low, high = median_interval(ratios)
    ours_seconds, peer_seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Timing(statistics.median(ratios), low, high, ours_seconds, peer_seconds, rounds)


def measure(
    function: Callable[[], Any], *, rounds: int = 20, warmup: int = 5, device: str = "cpu"
) -> tuple[float, float]:
    """The median seconds of a call, and its spread: half the width of the median's 95 % interval."""
    (calls,) = _calls_per_sample((function,), rounds, warmup, device)
    with _no_collector():
        samples = [_sample(function, calls, device) for _ in range(rounds)]
    low, high = median_interval(samples)
    return statistics.median(samples), (high - low) / 2


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the distribution's median between them with probability 0.95 or more.

    The number of values below the median is binomial(n, 1/2), whatever the distribution.
    """
    n = len(values)
    if n < 6:
        raise ValueError(f"expected at least 6 rounds for a 95 % interval, got {n}")
    tail, rank = 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= (1 - CONFIDENCE) / 2:
        rank += 1
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]


def _calls_per_sample(functions: Sequence[Callable[[], Any]], rounds: int, warmup: int, device: str) -> list[int]:
    """For each function, after warming it up, the calls that make samples of one length."""
    if rounds < 6:
        raise ValueError(f"expected at least 6 rounds for a 95 % interval, got {rounds}")
    if warmup < 1:
        raise ValueError(f"expected at least 1 warm-up call, got {warmup}")
    # the quickest of the warm-up calls is the one that was not interrupted, nor compiled on the way
    quickest = [min(_sample(function, 1, device) for _ in range(warmup)) for function in functions]
    length = max(MIN_SAMPLE_SECONDS, *quickest)
    return [max(1, round(length / max(seconds, 1e-8))) for seconds in quickest]


def _sample(function: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds a call, of `calls` calls in a row."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    cuda = torch.cuda if device == "cuda" and torch is not None else None
    if cuda:
        cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        result = function()
        if jax is not None:
            jax.block_until_ready(result)
    if cuda:
        cuda.synchronize()
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection between two readings of the clock."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
