"""What is stored: bytes to the last one, one storage a group, and errors of fewer bits within their bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, ids, make
from test_engine import close, full, ragged, shaken

from isotone.shared.errors import InputError
from isotone.swiftkv import SwiftKVCache, SwiftKVConfig, cached_logits, convert, extend, kv_bytes, make_cache
from isotone.swiftkv.quantize import FP8_MAX, Codec

DTYPES = ["fp32", "fp16", "bf16", "fp8", "int8", "int4"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek-v2"])
def test_bytes_are_the_formula_s(family):
    config = make(family).config
    for kv_dtype in DTYPES:
        for split in ((6, 1), (2, 1), (2, 2), (2, 4)):
            cache = SwiftKVCache(config, 3, 17, kv_dtype=kv_dtype, split=SwiftKVConfig(6, *split))
            assert cache.bytes == kv_bytes(config, 17, *split, batch=3, kv_dtype=kv_dtype), (kv_dtype, split)


def test_bytes_of_a_llama_by_hand():
    config = make().config
    kept, group, heads, size = 2, 4, 2, 8
    slots = kept + (6 - kept) // group
    cache = SwiftKVCache(config, 5, 100, kv_dtype="bf16", split=SwiftKVConfig(6, kept, group))
    assert cache.bytes == 2 * slots * heads * size * 100 * 5 * 2
    whole = SwiftKVCache(config, 5, 100, kv_dtype="bf16", split=SwiftKVConfig(6, 6))
    assert cache.bytes * 6 == whole.bytes * slots
    int8 = SwiftKVCache(config, 5, 100, kv_dtype="int8", split=SwiftKVConfig(6, kept, group))
    assert int8.bytes == 2 * slots * heads * (size + 4) * 100 * 5


@pytest.mark.parametrize("group", [1, 2, 4])
def test_layers_of_a_group_share_one_storage(group):
    cache = SwiftKVCache(make().config, 2, 8, split=SwiftKVConfig(6, 2, group))
    places = [cache.key_storage(layer).data_ptr() for layer in range(6)]
    assert len(set(places)) == 2 + 4 // group
    assert all(places[j] == places[2 + (j - 2) // group * group] for j in range(2, 6))


def vectors(width):
    element = st.floats(-1000, 1000, width=32)
    return st.lists(st.lists(element, min_size=width, max_size=width), min_size=1, max_size=5).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(vectors(8))
def test_int8_is_off_by_half_a_scale(states):
    codec = Codec("int8", 8, torch.float32)
    codes, scale = codec.encode(states)
    assert codes.dtype == torch.int8
    error = (codec.decode([codes, scale], torch.float32) - states).abs()
    assert (error <= scale / 2 * (1 + 1e-4) + 1e-6).all()


@settings(deadline=None, max_examples=60)
@given(vectors(64))
def test_int4_is_off_by_about_half_a_step(states):
    codec = Codec("int4", 64, torch.float32)
    planes = codec.encode(states)
    assert planes[0].shape[-1] == 32 and planes[1].shape[-1] == 2
    error = (codec.decode(planes, torch.float32) - states).abs().unflatten(-1, (2, 32))
    # half a step, and what fp16 rounds off the step (15 times) and the lowest number
    step, low = planes[1].float(), planes[2].float()
    assert (error <= (step * (0.5 + 16 * 2**-10) + low.abs() * 2**-10 + 1e-4).unsqueeze(-1)).all()


def test_int4_saturates_beyond_half_precision():
    """A number out of fp16's range costs its own group its accuracy, and nobody a NaN."""
    codec = Codec("int4", 64, torch.float32)
    states = torch.linspace(-1, 1, 64).repeat(3, 1)
    states[0, 3], states[1, 3], states[2, 40] = 1e5, -1e5, 3e6
    found = codec.decode(codec.encode(states), torch.float32)
    assert found.isfinite().all()
    assert float(found[0, 3]) == pytest.approx(1e5, rel=1e-2) and float(found[1, 3]) == pytest.approx(-65504, rel=1e-2)
    assert (found[:2, 32:] - states[:2, 32:]).abs().max() < 0.05 and (found[2, :32] - states[2, :32]).abs().max() < 0.05


@settings(deadline=None, max_examples=40)
@given(vectors(8), st.floats(0.01, 100.0))
def test_fp8_saturates_and_keeps_three_bits(states, scale):
    codec = Codec("fp8", 8, torch.float32)
    found = codec.decode(codec.encode(states * 100, scale), torch.float32, scale)
    wanted = (states * 100).clamp(-FP8_MAX * scale, FP8_MAX * scale)
    assert found.isfinite().all()
    assert ((found - wanted).abs() <= wanted.abs() / 16 + scale * 2**-10 + 1e-6).all()


@pytest.mark.parametrize(
    "kv_dtype, bound", [("fp32", 1e-5), ("bf16", 0.05), ("int8", 0.05), ("fp8", 0.3), ("int4", 0.6)]
)
@pytest.mark.parametrize("family", ["llama", "deepseek-v2"])
def test_logits_with_fewer_bits(family, kv_dtype, bound):
    model = shaken(convert(make(family, initializer_range=0.1), 2, 2))
    rows = ragged([9, 14])
    wanted = full(model, rows)
    found = extend(model, rows, make_cache(model, 2, 14, kv_dtype))
    relative = float((found - wanted).norm() / wanted.norm())
    assert relative <= bound
    assert kv_dtype == "fp32" or relative > 1e-7, "the codec was used"


def test_attention_output_is_bounded_by_the_error_of_keys_and_values():
    """|out - out'| <= max |v - v'| + 2 max|v| (e^{2 d} - 1), d the largest change of a score."""
    from isotone.swiftkv.attention import dot_product

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, n, 8, generator=generator) for n in (1, 50, 50))
    codec = Codec("int8", 8, torch.float32)
    near_key, near_value = (codec.decode(codec.encode(x), torch.float32) for x in (key, value))
    exact = dot_product(query, key, value, 8**-0.5)
    found = dot_product(query, near_key, near_value, 8**-0.5)
    change = ((query @ (near_key - key).transpose(-1, -2)) * 8**-0.5).abs().max()
    bound = (near_value - value).abs().max() + 2 * value.abs().max() * (torch.exp(2 * change) - 1)
    assert (found - exact).abs().max() <= bound < 1


def test_fixed_scales_of_fp8():
    model = shaken(convert(make(initializer_range=0.1), 2, 2))
    rows = ragged([12])
    wanted = full(model, rows)
    scales = {"key_scale": torch.full((4,), 0.05), "value_scale": torch.full((4,), 0.05)}
    found = extend(model, rows, make_cache(model, 1, 12, "fp8", **scales))
    assert float((found - wanted).norm() / wanted.norm()) < 0.3
    crushed = extend(model, rows, make_cache(model, 1, 12, "fp8", key_scale=torch.full((4,), 1e-4)))
    assert crushed.isfinite().all() and (crushed - wanted).norm() > (found - wanted).norm()


def test_crop_and_reset_let_a_row_be_written_again():
    model = shaken(convert(make(), 2, 1))
    cache = make_cache(model, 1, 12)
    first, second = ragged([8, 5])
    extend(model, [first], cache)
    cache.crop(0, 3)
    found = extend(model, [second], cache)
    close(found, full(model, [torch.cat([first[:3], second])]))
    cache.reset()
    close(extend(model, [second], cache), full(model, [second]))


def test_odd_heads_have_no_int4():
    with pytest.raises(InputError, match="even"):
        Codec("int4", 7, torch.float32)


def test_every_family_has_a_cache():
    for family in FAMILIES:
        model = make(family)
        assert make_cache(model, 1, 4).split.slots == 6
        assert ids(1, 2).shape == (1, 2)


def test_cached_logits_are_the_student_s():
    model = shaken(convert(make(initializer_range=0.1), 2, 2))
    tokens = ids(3, 11)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    close(cached_logits(model, "fp32")(tokens), wanted)
    assert not torch.allclose(cached_logits(model, "int4")(tokens), wanted, atol=1e-3)


def test_fp16_saturates():
    codec = Codec("fp16", 2, torch.float32)
    found = codec.decode(codec.encode(torch.tensor([[1e6, -1e6]])), torch.float32)
    assert found.tolist() == [[65504.0, -65504.0]]
