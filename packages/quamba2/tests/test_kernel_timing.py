"""The timings time equal answers, and say so when they are not."""

import pytest
import torch

from isotone.quamba2 import kernel_timing


@pytest.mark.parametrize(
    "work",
    [
        lambda: kernel_timing.fwht(96, 4, rounds=6),
        lambda: kernel_timing.packed_linear(64, 256, 4, rounds=6),
        lambda: kernel_timing.packed_linear(64, 256, 4, bits=8, rounds=6),
        lambda: kernel_timing.chunked_scan(40, 2, rounds=6),
        lambda: kernel_timing.int8_scan(20, 1, 4, 2, device="cpu", rounds=6),
        lambda: kernel_timing.int8_step(1, 4, 2, device="cpu", rounds=6),
    ],
)
def test_each_has_a_ratio_with_its_interval(work):
    timing = work()
    assert 0 < timing.low <= timing.ratio <= timing.high and timing.rounds == 6


def test_other_answers_are_not_timed():
    with pytest.raises(AssertionError, match="alike to 0.01"):
        kernel_timing._timed(lambda: torch.ones(2), lambda: torch.zeros(2) + 2, 1e-2, "cpu", 6)
