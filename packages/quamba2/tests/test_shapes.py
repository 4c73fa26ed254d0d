"""Bytes counted without weights against real models and caches, and models of random weights."""

import pytest
import torch
from models import calibration, make

from isotone.quamba2 import claims, shapes, speed
from isotone.quamba2.architecture import Architecture
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.quantize import quantize
from isotone.quamba2.report import float16_bytes
from isotone.shared.errors import InputError


def test_bytes_are_those_of_real_models():
    model = make(hidden_size=128, num_heads=8, head_dim=32, expand=2, n_groups=2)
    config = QuambaConfig(gptq=False, calib_samples=1, calib_len=9)
    made = quantize(model, calibration(1, 9), config)
    assert shapes.quantized_weight_bytes(model.config, config) == sum(v.nbytes for v in made.tensors().values())
    plain = shapes.PlainConfig(128, 3, 8, 32, 8, 2, 61)
    own = 2 * sum(p.numel() for p in model.parameters())
    assert shapes.float16_weight_bytes(plain) == own == float16_bytes(made.arch)
    assert shapes.float16_weight_bytes(plain, True) == own - 2 * 61 * 128
    cache = made.new_cache()
    made(torch.tensor([[1, 2, 3]]), cache)
    assert shapes.quantized_state_bytes(plain, config) == cache.bytes
    assert shapes.float16_state_bytes(plain) == 2 * cache.bytes


def test_memory_of_the_released_shapes():
    found = shapes.memory("8b")
    assert found["weights"] >= 3.8 and found["states"] == 2 and found["weights"] == found["untied"]
    assert found["weights"] > found["sum 1"] > found["sum 128"] > 2
    small = shapes.memory("2.7b")
    # the head is quantised apart from the embedding, which the float model ties
    assert small["untied"] >= 3.8 > small["weights"]
    arch = Architecture.of(shapes.shape("8b"))
    assert arch.inner == 8192 and shapes.float16_state_bytes(shapes.shape("8b")) == pytest.approx(122e6, rel=0.02)
    assert [one.held for one in claims.memory("2.7b", small)] == [False, None, True, None, None]
    with pytest.raises(InputError, match="got '9b'"):
        shapes.shape("9b")


@pytest.mark.parametrize("mode", shapes.MODES)
def test_random_models_compute(mode):
    model = shapes.random_model(shapes.shape("tiny"), shapes.options(mode))
    cache = model.new_cache()
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(ids, cache).logits
    assert logits.isfinite().all() and 1e-3 < logits.std() < 1e3 and model(ids[:, :1], cache).logits.isfinite().all()
    assert torch.equal(shapes.random_model(shapes.shape("tiny"), shapes.options(mode))(ids).logits, logits)


def test_speeds_are_measured_on_a_tiny_shape():
    found = speed.ratios("tiny", "cpu", prompt=16, batch=4) | speed.scan_ratio("tiny", "cpu", 2, 32)
    assert set(found) == set(claims.SPEED) and found["torchao"] is None
    assert all(value is None or value > 0 for value in found.values()) and found["tpot"] and found["batch"]
    with pytest.raises(InputError, match="expected a GPU"):
        speed.ratios("8b", "cpu")
    rows = claims.speed("tiny", {"tpot": 3.0, "prefill": 1.0})
    assert [one.held for one in rows[:4]] == [True, None, None, False]
