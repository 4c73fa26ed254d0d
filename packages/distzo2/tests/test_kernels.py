"""The fused pass: against the plain formula, and its forms against each other, bit for bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from isotone.distzo2 import kernels, native, rng, triton_kernels
from isotone.distzo2.kernels import Update, advance, round_to
from isotone.distzo2.layout import Segment
from isotone.distzo2.rng import PhiloxNoise

SEGMENTS = [Segment(0, 0, 0, 37, True), Segment(4, 16, 40, 300, False)]
UPDATE = Update((11, 12), (0.25, -0.125), 0.01)


def buffers(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    weights = torch.randn(344).to(dtype).to(device)
    return weights, torch.zeros_like(weights), torch.zeros_like(weights)


def run(noise, dtype=torch.float32, device="cpu", update=UPDATE, stochastic=False):
    weights, plus, minus = buffers(dtype, device)
    advance(weights, SEGMENTS, noise, update, seed=13, eps=0.5, plus=plus, minus=minus, stochastic=stochastic)
    return weights, plus, minus


def eager(monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(native, "takes", lambda *tensors: False)
        patch.setattr(triton_kernels, "takes", lambda *tensors: False)
        return run(PhiloxNoise(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula(dtype):
    before, *_ = buffers(dtype)
    after, plus, minus = run(PhiloxNoise(), dtype)
    for s in SEGMENTS:
        here = slice(s.start, s.start + s.length)
        w = before[here].double()
        z = [rng.normal(seed, s.parameter, s.first, s.length).double() for seed in (11, 12, 13)]
        wanted = w - (0.25 * z[0] - 0.125 * z[1] + (0.01 if s.decays else 0.0) * w)
        torch.testing.assert_close(after[here].double(), wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(plus[here].double(), wanted + 0.5 * z[2], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(minus[here].double(), wanted - 0.5 * z[2], atol=1e-6, rtol=1e-6)
    gap = slice(37, 40)
    assert torch.equal(after[gap], before[gap]) and not plus[gap].any()


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("update", [None, UPDATE, Update((11,), (0.1,), 0.0)])
def test_c_has_the_bits_of_the_eager_form(update, monkeypatch):
    assert all(map(torch.equal, run(PhiloxNoise(), update=update), eager(monkeypatch, update=update)))


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_threads_and_single_signs_change_nothing(monkeypatch):
    long = [Segment(2, 0, 0, 1 << 20, True)]
    torch.manual_seed(0)
    start = torch.randn(1 << 20)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weights, plus, minus = start.clone(), torch.empty_like(start), torch.empty_like(start)
        advance(weights, long, PhiloxNoise(), UPDATE, seed=13, eps=0.5, plus=plus, minus=minus)
        found.append((weights, plus, minus))
    assert all(map(torch.equal, *found))
    alone = torch.empty_like(start)
    advance(found[0][0], long, PhiloxNoise(), seed=13, eps=0.5, minus=alone)
    assert torch.equal(alone, found[0][2])


def test_chunks_change_nothing(monkeypatch):
    whole = eager(monkeypatch)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    assert all(map(torch.equal, whole, eager(monkeypatch)))


TRITON = """
import json, torch, test_kernels
from isotone.distzo2 import native, triton_kernels
from isotone.distzo2.rng import PhiloxNoise
native.takes = lambda *tensors: False
found = {}
for name in ("float32", "bfloat16", "float16"):
    assert triton_kernels.takes(torch.zeros(1, dtype=getattr(torch, name)))
    for case, update in (("update", test_kernels.UPDATE), ("none", None)):
        parts = test_kernels.run(PhiloxNoise(), getattr(torch, name), update=update)
        found[name + case] = [part.double().tolist() for part in parts]
print(json.dumps(found))
"""


@pytest.mark.skipif(not triton_kernels.HAVE_TRITON, reason="no triton on this platform")
def test_triton_has_the_bits_of_the_eager_form(monkeypatch):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, parts in json.loads(done.stdout).items():
        dtype = getattr(torch, name.removesuffix("update").removesuffix("none"))
        wanted = eager(monkeypatch, dtype=dtype, update=UPDATE if name.endswith("update") else None)
        for whole, part in zip(wanted, parts, strict=True):
            if dtype == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds to the nearest
                unit = torch.finfo(dtype).eps * torch.stack(wanted).double().abs().amax(0)
                off = (whole.double() - torch.tensor(part, dtype=torch.float64)).abs()
                assert bool((off <= 2 * unit).all()), name
            else:
                assert whole.double().tolist() == part, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_has_the_bits_of_the_cpu(dtype, monkeypatch):  # pragma: no cover - needs a GPU
    wanted = eager(monkeypatch, dtype=dtype)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, run(PhiloxNoise(), dtype, "cuda"), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500), 1e-6 * torch.randn(200), torch.tensor([0.0, 1.0, -2.0])])
    draws = torch.rand(2000, len(values))
    rounded = torch.stack([round_to(values, dtype, u).float() for u in draws])
    nearest = values.to(dtype).float()
    step = (rounded.amax(0) - rounded.amin(0)).double()
    assert bool(((rounded.amin(0) <= values) & (values <= rounded.amax(0))).logical_or(step == 0).all())
    exact = nearest == values
    assert torch.equal(rounded[:, exact], values[exact].expand(2000, -1))
    # the mean of Bernoulli steps: five standard errors, 700 numbers, false alarm 4e-4
    off = (rounded.double().mean(0) - values.double()).abs()
    exponent = values.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor().double()
    assert bool((off <= 5 * 0.5 * torch.finfo(dtype).eps * 2**exponent / math.sqrt(2000)).all())


def test_stochastic_rounding_keeps_updates_that_rounding_swallows():
    weights = torch.full((4096,), 0.02).to(torch.bfloat16)
    small = [Segment(0, 0, 0, 4096, True)]
    lost, kept = weights.clone(), weights.clone()
    for seed in range(40):
        update = Update((seed,), (1e-6,), 1e-4)  # a step of 2e-6 where the next number is 1.2e-4 away
        advance(lost, small, PhiloxNoise(), update)
        advance(kept, small, PhiloxNoise(), update, stochastic=True)
    assert torch.equal(lost, weights)
    assert kernels.lost_updates(weights, lost) == 1.0 > kernels.lost_updates(weights, kept)
    wanted = 0.02 * (1 - 1e-4) ** 40
    assert abs(float(kept.double().mean() - weights.double().mean()) - (wanted - 0.02)) < 2e-5
