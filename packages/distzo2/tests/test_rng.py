"""The generator beside Random123's vectors, plain integers, the exact formula and the normal distribution."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from isotone.distzo2 import native, rng
from isotone.distzo2.kernels import fill
from isotone.distzo2.layout import Segment
from isotone.distzo2.rng import PhiloxNoise, TorchNoise
from isotone.shared.errors import InputError


def tensors(*words):
    return tuple(torch.tensor([word]) for word in words)


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_vectors_of_random123(counter, key, expected):
    assert tuple(int(word) for word in rng.philox(tensors(*counter), key)) == expected
    assert tuple(reference.philox(counter, key)) == expected


def test_normals_are_those_of_the_formula():
    z = rng.normal(123, 7, 0, 4000)
    exact = torch.tensor([reference.normal(123, 7, i) for i in range(4000)], dtype=torch.float64)
    # cosines near zero lose relative digits, not absolute ones
    assert float((z.double() - exact).abs().max()) < 2e-6
    assert float(((z.double() - exact) / exact.abs().clamp_min(0.1)).abs().max()) < 3e-6


@pytest.mark.parametrize("start", [0, 1, 4, 1022, (1 << 34) + 3])
def test_any_slice_alone_is_the_slice_of_the_whole(start):
    whole = rng.normal(5, 2, start - start % 4, 512)
    assert torch.equal(rng.normal(5, 2, start + 5, 300), whole[start % 4 + 5 : start % 4 + 305])


def test_distribution():
    z = rng.normal(1, 0, 0, 1 << 20).double()
    n = len(z)
    # five standard errors each: a false alarm in 1 of 400,000 runs of another seed
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    ordered = z.sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((cdf - steps).abs().max()) < 2.5 / math.sqrt(n)  # Kolmogorov: exceeded with probability 7e-6
    # neighbours, lanes, parameters and seeds have nothing to do with each other
    for other in (z.roll(1), z.roll(2), rng.normal(1, 1, 0, n).double(), rng.normal(2, 0, 0, n).double()):
        assert abs(float((z * other).mean())) < 5 / math.sqrt(n)


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("count", [1, 63, 64, 70001])
def test_compiled_normals_have_the_same_bits(count):
    segment = Segment(3, 8, 0, count, True)
    eager = PhiloxNoise().fill(99, segment, torch.device("cpu"), torch.float32)
    assert torch.equal(fill(segment, 99, PhiloxNoise(), torch.device("cpu"), torch.float32), eager)


def test_step_seeds_are_a_function_of_run_and_step():
    seeds = [rng.step_seed(0, step) for step in range(2000)]
    assert len(set(seeds)) > 1990 and all(0 <= seed < rng.SEEDS for seed in seeds)
    assert abs(sum(seeds) / len(seeds) / rng.SEEDS - 0.5) < 5 / math.sqrt(12 * 2000)
    assert rng.step_seed(0, 3) == seeds[3] != rng.step_seed(1, 3) and rng.step_seed(0, 3, 1) != seeds[3]


def test_torch_mode_draws_as_the_reference_does():
    sizes, dtypes = [5, 40, 3], [torch.float32, torch.float64, torch.float32]
    noise = TorchNoise(sizes, dtypes, torch.device("cpu"))
    torch.manual_seed(17)
    expected = [torch.normal(0.0, 1.0, (n,), dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
    for number in (2, 0, 1):  # in any order
        segment = Segment(number, 0, 0, sizes[number], True)
        assert torch.equal(noise.fill(17, segment, torch.device("cpu"), dtypes[number]), expected[number])
    with pytest.raises(InputError, match="slice"):
        noise.fill(17, Segment(1, 4, 0, 8, True), torch.device("cpu"), torch.float64)


def test_rounding_noise_is_uniform_and_another_stream():
    u = rng.uniform(1, 0, 0, 1 << 18).double()
    assert 0 < float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * len(u))
    z = rng.normal(1, 0, 0, 1 << 18).double()
    assert abs(float(((u - 0.5) * z).mean())) < 5 * math.sqrt(1 / 12 / len(u))
