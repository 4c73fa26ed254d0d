"""FLOPs counted from the config equal torch's counter; the specification's table comes out of the closed form."""

import pytest
import torch
from models import ids, make
from transformers import GPT2Config

from isotone.shared.errors import InputError
from isotone.swiftkv import convert, decode, decode_flops, extend, flops, kv_bytes, make_cache, speedup_bound
from isotone.swiftkv.accounting import layer_cost
from isotone.swiftkv.basemodel import random_llama, shape_config
from isotone.swiftkv.profiling import counted_flops, peak_bytes, prefill_once

SPLITS = [(6, 1), (5, 1), (2, 1), (2, 2), (2, 4), (3, 3)]


@pytest.mark.parametrize(
    "family, split",
    [*(("llama", split) for split in SPLITS), ("llama-bias", (2, 2)), ("qwen2", (2, 1)), ("qwen3", (2, 4))],
)
def test_prefill_equals_torch_s_counter(family, split):
    model = convert(make(family), *split)
    counted = counted_flops(lambda: prefill_once(model, ids(1, 24)))
    assert counted == flops(model.config, 24, *split, causal=False).total


@pytest.mark.parametrize(
    "family, split", [("deepseek-v2", (2, 2)), ("deepseek-v2-lora", (6, 1)), ("deepseek-v2-lora", (3, 3))]
)
def test_latent_attention_equals_torch_s_counter(family, split):
    """Prefill, drafts on both sides of what counts as few queries, and decoding; experts as loops and as groups."""
    for experts in ("eager", "grouped_mm"):
        model = convert(make(family, experts_implementation=experts), *split)
        for n, keep in ((24, 1), (24, 4), (24, 20), (1, 1)):
            counted = counted_flops(lambda: extend(model, list(ids(1, n)), make_cache(model, 1, n), keep=keep))  # noqa: B023
            assert counted == flops(model.config, n, *split, survivors=keep, causal=False).total, (experts, n, keep)
        cache = make_cache(model, 1, 16)
        extend(model, list(ids(1, 9)), cache)
        counted = counted_flops(lambda: decode(model, ids(1, 1)[0], cache))  # noqa: B023
        assert counted == decode_flops(model.config, 10, *split)


def test_batches_and_survivors_equal_torch_s_counter():
    model = convert(make(), 2, 2)
    rows = list(ids(3, 10))
    counted = counted_flops(lambda: extend(model, rows, make_cache(model, 3, 10), keep=4))
    closed = flops(model.config, 10, 2, 2, batch=3, survivors=4, causal=False)
    # four survivors of a row attend under a mask to all 10 tokens, as the closed form has it
    assert counted == closed.total


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_equals_torch_s_counter(split):
    model = convert(make(), *split)
    cache = make_cache(model, 1, 16)
    extend(model, list(ids(1, 9)), cache)
    counted = counted_flops(lambda: decode(model, ids(1, 1)[0], cache))
    assert counted == decode_flops(model.config, 10, *split)


def test_layer_of_llama_8b():
    cost = layer_cost(shape_config("llama-3.1-8b"))
    assert round(cost.total / 1e6) == 436 and round(cost.keys_values / 1e6, 1) == 16.8
    assert round(100 * cost.keys_values / cost.total, 1) == 3.8


@pytest.mark.parametrize(
    "split, bounds",
    [
        ((24, 1), (1.317, 1.319, 1.323, 1.328)),
        ((16, 1), (1.928, 1.935, 1.953, 1.978)),
        ((16, 4), (1.981, 1.983, 1.988, 1.994)),
    ],
)
def test_bounds_of_the_specification(split, bounds):
    config = shape_config("llama-3.1-8b")
    found = [round(speedup_bound(config, n, *split), 3) for n in (2048, 8192, 32768, 131072)]
    assert found == pytest.approx(list(bounds), abs=1.5e-3)


def test_kv_bytes_of_the_specification():
    config = shape_config("llama-3.1-8b")
    assert kv_bytes(config, 1) == 131_072 and kv_bytes(config, 1, 16, 1) == 131_072
    assert kv_bytes(config, 1, 16, 4) == 81_920
    assert kv_bytes(shape_config("llama-3.2-1b"), 1, 8, 1) == 32_768
    # v1's 62.5 %: 2-way sharing of half of the layers, in half the bytes
    assert kv_bytes(config, 1, 16, 2, kv_dtype="fp8") / kv_bytes(config, 1) == 0.375


def test_causal_halves_the_square():
    config = make().config
    square, half = flops(config, 100, causal=False).lower, flops(config, 100).lower
    assert square - half == 6 * 2 * 32 * 100 * 100


def test_peak_memory_is_that_of_the_tensors():
    def work():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2
        return c.sum()

    assert peak_bytes(work) in range(8000, 8017), "two of the three vectors live at once"
    base = random_llama("tiny")
    swift = convert(random_llama("tiny"), 4, 1)
    long = ids(1, 512, vocab=1024)
    assert peak_bytes(lambda: prefill_once(swift, long, chunk=64)) < peak_bytes(lambda: prefill_once(swift, long))
    assert peak_bytes(lambda: prefill_once(swift, long)) <= 1.1 * peak_bytes(lambda: prefill_once(base, long))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c: flops(c, 0), "got 0"),
        (lambda c: flops(c, 8, survivors=9), "survivors"),
        (lambda c: flops(c, -3), "got -3"),
        (lambda c: flops(c, True), "True"),
        (lambda c: decode_flops(c, 0), "context"),
        (lambda c: kv_bytes(c, 0), "tokens"),
        (lambda c: kv_bytes(c, 8, batch=0), "batch"),
        (lambda c: flops(GPT2Config(), 8), "gpt2"),
        (lambda c: kv_bytes(GPT2Config(), 8), "gpt2"),
        (lambda c: flops(c, 8, 7), "got 7"),
        (lambda c: kv_bytes(c, 8, kv_dtype="model"), "size"),
        (lambda c: kv_bytes(c, 8, kv_dtype="int3"), "int3"),
        (lambda c: shape_config("llama-9"), "llama-9"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call(make().config)
