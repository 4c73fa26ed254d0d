"""The search for blocks of 16 bits: the optimum where it can be enumerated, the number kept, the same for a seed."""

import itertools
import random

import pytest
import torch
from models import calibration, make

from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import forward
from isotone.quamba2.quantize import quantize
from isotone.quamba2.search import cross, evolve, mutant, search_mixed_precision
from isotone.shared.errors import InputError


def test_it_finds_the_best_set_of_a_landscape():
    gains = [random.Random(0).random() for _ in range(9)]

    def fitness(blocks):
        # pairs interact, so that taking the best blocks one by one is not enough
        return -sum(gains[b] for b in blocks) + sum(0.5 for b in blocks if b + 1 in blocks)

    best = min(map(frozenset, itertools.combinations(range(9), 4)), key=fitness)
    found = evolve(fitness, 9, 4, population=20, generations=12)
    assert fitness(found) == pytest.approx(fitness(best)) and len(found) == 4
    assert evolve(fitness, 9, 4, population=20, generations=12) == found


def test_each_generation_is_no_worse_and_no_set_is_measured_twice():
    seen, best = [], []

    def fitness(blocks):
        seen.append(blocks)
        return float(sum(b * b for b in blocks))

    evolve(fitness, 12, 5, population=10, generations=6, on_generation=lambda _, value: best.append(value))
    assert best == sorted(best, reverse=True) and len(best) == 6
    assert len(seen) == len(set(seen)) and all(len(blocks) == 5 for blocks in seen)


def test_mutants_and_crosses_keep_the_number():
    drawn = random.Random(0)
    first, second = frozenset({0, 1, 2}), frozenset({2, 3, 4})
    for _ in range(50):
        changed = mutant(first, 6, drawn)
        assert len(changed) == 3 and len(changed & first) == 2
        both = cross(first, second, 3, drawn)
        assert len(both) == 3 and both <= first | second
    assert mutant(frozenset(), 3, drawn) == frozenset() and mutant(frozenset(range(3)), 3, drawn) == frozenset(range(3))


@pytest.fixture(scope="module")
def mixed():
    model = make()
    config = QuambaConfig(a_bits="mixed", group_size=32, calib_samples=4, calib_len=17, gptq=False, embedding_bits=16)
    return model, quantize(model, calibration(), config)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_search_on_a_model(mixed, with_teacher):
    model, quantized = mixed
    teacher = (lambda tokens: forward(model, tokens)) if with_teacher else None
    found = search_mixed_precision(quantized, calibration(), 2, population=6, generations=2, teacher=teacher)
    assert found.count("W4A16") == 2 and found.count("W4A8") == 1
    assert [f"W4A{bits}" for bits in quantized.block_bits] == found
    if with_teacher:

        def divergence():
            losses = []
            for sample in calibration():
                wanted = forward(model, sample[None]).log_softmax(-1)
                got = quantized(sample[None]).logits.log_softmax(-1)
                losses.append((wanted.exp() * (wanted - got)).sum(-1).mean())
            return float(torch.stack(losses).mean())

        best = divergence()
        others = []
        for low in range(3):
            quantized.set_precision([8 if block == low else 16 for block in range(3)])
            others.append(divergence())
        assert best == pytest.approx(min(others), rel=1e-4), "of the three sets of two, the nearest to the float model"
    for count, bits in ((0, {8}), (3, {16})):
        search_mixed_precision(quantized, calibration(), count, population=2, generations=1)
        assert set(quantized.block_bits) == bits


def test_refusals(mixed):
    _, quantized = mixed
    for options, words in (
        ({"n_high": 4}, "at most the model's 3 blocks"),
        ({"n_high": -1}, "n_high"),
        ({"n_high": 1, "population": 0}, "population"),
        ({"n_high": 1, "keep": 0.0}, "keep"),
    ):
        with pytest.raises(InputError, match=words):
            search_mixed_precision(quantized, calibration(), **options)
    with pytest.raises(InputError, match="at least one calibration sample"):
        search_mixed_precision(quantized, [], 1)
    low = quantize(make(), calibration(), QuambaConfig(w_bits=8, calib_samples=2, calib_len=9))
    with pytest.raises(InputError, match="a_bits 'mixed'"):
        search_mixed_precision(low, calibration(), 1)
