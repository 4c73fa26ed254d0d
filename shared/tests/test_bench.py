"""The interval covers what it says it covers, and a known ratio is found on a machine that is not quiet."""

from __future__ import annotations

import collections
import gc
import itertools
import math
import sys
import types

import numpy as np
import pytest

from isotone.shared import bench
from isotone.shared.bench import Timing, compare, measure, median_interval

ATTEMPTS = 3


@pytest.mark.parametrize("n", [6, 7, 10, 20, 51])
def test_interval_covers_the_median(n: int) -> None:
    """The exact coverage, from the binomial: at least 95 %, and less if either end moved in by one."""
    low, high = median_interval(range(n))
    assert low == n - 1 - high

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n

    assert coverage(low + 1) >= 0.95 > coverage(low + 2)


def test_interval_covers_the_median_of_a_skewed_noise() -> None:
    """4,000 samples of 20 log-normal draws (median 1).

    At a true coverage of 95.9 % the count has a standard deviation of 0.32 %: the bound of 94.5 % is more than
    four of them away, a false alarm in fewer than 1 of 50,000 seeds; this seed is fixed.
    """
    draws = np.random.default_rng(0).lognormal(0, 1, (4000, 20))
    covered = sum(low <= 1 <= high for low, high in map(median_interval, draws.tolist()))
    assert covered / 4000 > 0.945


def kernels(*calls: int):
    """For each entry the same work that many times, so that the ratio of two of them is known by construction.

    All work on the same memory: a second matrix of the same values may lie elsewhere in a page, and a product
    of it take more than a percent longer or shorter, which a quiet machine's interval would rightly show.
    """
    matrix = np.random.default_rng(0).standard_normal((200, 200))
    product = np.empty_like(matrix)

    def work(times: int):
        def call() -> None:
            for _ in range(times):
                np.matmul(matrix, matrix, out=product)

        return call

    return [work(times) for times in calls]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_known_ratio_is_found(times: int) -> None:
    """One attempt misses the true ratio in at most 5 % of runs, so three in a row in 1 of 8,000 at most."""
    ours, peer = kernels(4, 4 * times)
    found = []
    for _ in range(ATTEMPTS):
        found.append(compare(ours, peer, rounds=30, warmup=3))
        if found[-1].low <= times <= found[-1].high:
            break
    else:
        pytest.fail(f"expected {times} inside one of {found}")
    assert found[-1].low <= found[-1].ratio <= found[-1].high


class Clock:
    """A clock that the workloads move themselves, with a drift: the machine slows down as the test goes on."""

    def __init__(self, drift: float) -> None:
        self.now, self.drift = 0.0, drift

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float):
        def call() -> None:
            self.now += seconds * (1 + self.drift * self.now)

        return call


def test_drift_of_the_machine_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its end the machine is some times slower; separate medians would still be fair, blocks would not."""
    clock = Clock(drift=0.05)
    monkeypatch.setattr(bench, "time", clock)
    timing = compare(clock.work(0.5), clock.work(1.0), rounds=20)
    assert clock.work(1.0) and timing.low <= 2 <= timing.high and timing.high < 2.2
    assert timing.peer_seconds > 2 and timing.rounds == 20


def test_both_orders_occur_and_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(drift=0)
    monkeypatch.setattr(bench, "time", clock)
    calls: list[str] = []
    fast, slow = clock.work(1e-5), clock.work(3e-5)
    timing = compare(lambda: (calls.append("a"), fast()), lambda: (calls.append("b"), slow()), rounds=20, warmup=2)
    assert timing.ratio == pytest.approx(3) and timing.ours_seconds == pytest.approx(1e-5)
    counted, order = collections.Counter(calls[4:]), calls[4:]
    seconds = counted["a"] * 1e-5 / 20, counted["b"] * 3e-5 / 20
    assert seconds == pytest.approx((bench.MIN_SAMPLE_SECONDS,) * 2, rel=0.01), "samples of one length"
    orders = set()
    while order:
        pair, order = order[: sum(counted.values()) // 20], order[sum(counted.values()) // 20 :]
        orders.add("".join(name for name, _ in itertools.groupby(pair)))
    assert orders == {"ab", "ba"}


def test_measure() -> None:
    seconds, spread = measure(kernels(4)[0], rounds=12)
    assert 0 < seconds < 1 and 0 <= spread < 1


def test_results_of_jax_and_cuda_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    jax = types.SimpleNamespace(block_until_ready=said.append)
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=lambda: said.append("cuda")))
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "torch", torch)
    bench._sample(lambda: "result", 2, "cuda")
    assert said == ["cuda", "result", "result", "cuda"]
    said.clear()
    bench._sample(lambda: "result", 1, "cpu")
    assert said == ["result"]


def test_garbage_collection_is_put_back() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), bench._no_collector():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


def test_too_few_rounds_are_refused() -> None:
    for call in (lambda: compare(int, int, rounds=5), lambda: measure(int, rounds=1), lambda: median_interval([1.0])):
        with pytest.raises(ValueError, match="at least 6 rounds"):
            call()
    with pytest.raises(ValueError, match="warm-up"):
        compare(int, int, warmup=0)
    assert isinstance(compare(int, int, rounds=6, warmup=1), Timing)
