"""Invariants 4, 9 and 10: what quantisers promise, scales of groups of zeros, and that packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.quamba2.packing import (
    dequantize,
    dequantize_groups,
    embedding_rows,
    expand_levels,
    group_scales,
    pack_int4,
    quantize_embedding,
    quantize_groups,
    quantize_symmetric,
    relative_scales,
    symmetric_scale,
    two_level,
    unpack_int4,
)
from isotone.shared.errors import InputError

seeds = st.integers(0, 2**31 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(seeds, st.lists(st.integers(0, 3), max_size=2), st.integers(0, 5))
def test_packing_is_a_bijection(seed, shape, words):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (*shape, 8 * words), generator=generator, dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32 and packed.shape == (*shape, words)
    assert torch.equal(unpack_int4(packed), codes)
    # every int32 is some eight codes
    words_of = torch.randint(-(2**31), 2**31, (*shape, words), generator=generator, dtype=torch.int64)
    assert torch.equal(pack_int4(unpack_int4(words_of.to(torch.int32))), words_of.to(torch.int32))


def test_the_first_code_is_in_the_lowest_bits():
    codes = torch.arange(1, 9, dtype=torch.uint8)[None]
    assert pack_int4(codes).item() == 0x87654321 - 2**32
    # of a slice and of columns that are not neighbours too
    wide = torch.randint(16, (4, 16, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part in (wide[..., 0], wide[:, 8:, 1], wide.permute(2, 0, 1)[1]):
        shifted = sum(part.reshape(4, -1, 8)[..., i].long() << (4 * i) for i in range(8))
        assert torch.equal(pack_int4(part).long() & 0xFFFFFFFF, shifted)
        assert torch.equal(unpack_int4(pack_int4(part)), part)


@settings(max_examples=80, deadline=None)
@given(seeds, st.sampled_from([4, 8]), st.floats(1e-4, 1e4))
def test_rounding_is_off_by_half_a_step_at_most(seed, bits, size):
    top = 2 ** (bits - 1) - 1
    v = (normal(64, seed=seed) * size).double()
    scale = symmetric_scale(v.abs().max(), bits).double()
    codes = quantize_symmetric(v, scale, bits)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= top
    back = codes.double() * scale
    assert ((back - v).abs() <= scale / 2 * (1 + 1e-6)).all()
    assert torch.equal(quantize_symmetric(back, scale, bits), codes), "idempotent"
    assert torch.equal(quantize_symmetric(-v, scale, bits), -codes)
    assert torch.equal(quantize_symmetric(torch.zeros_like(v), scale, bits), torch.zeros_like(codes))
    torch.testing.assert_close(dequantize(codes, scale.float()).double(), back)


def test_halves_go_to_even_and_what_is_beyond_is_clamped():
    v = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 200.0, -200.0])
    assert quantize_symmetric(v, 1.0).tolist() == [0, 2, 2, 0, -2, -2, 127, -128]
    assert quantize_symmetric(v, 1.0, 4).tolist() == [0, 2, 2, 0, -2, -2, 7, -8]
    assert quantize_symmetric(-v, 1.0).tolist() == [0, -2, -2, 0, 2, 2, -128, 127], "but for -128, -q(v)"


def test_scales_have_floors():
    assert symmetric_scale(torch.tensor(0.0), 4).item() == pytest.approx(1e-5 / 7)
    assert symmetric_scale(torch.tensor(0.0), 8).item() == pytest.approx(1e-6)
    assert quantize_symmetric(torch.zeros(3), torch.zeros(())).tolist() == [0, 0, 0]
    assert quantize_symmetric(torch.tensor([5e-6]), 0.0).item() == 5
    assert symmetric_scale(torch.tensor([12.7, 2.54]), 8).tolist() == pytest.approx([0.1, 0.02])


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([8, 32, 128]), st.integers(1, 3), st.integers(1, 4))
def test_groups(seed, group, groups, rows):
    w = normal(rows, group * groups, seed=seed) * torch.exp(3 * normal(rows, 1, seed=seed + 1))
    scales = group_scales(w, group)
    assert scales.shape == (rows, groups)
    torch.testing.assert_close(scales, 2 * w.abs().unflatten(1, (groups, group)).amax(-1) / 15)
    codes = quantize_groups(w, scales)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 15
    back = dequantize_groups(codes, scales)
    wide = scales.repeat_interleave(group, 1)
    # 15 steps reach from -8 to 7: the largest weight of a group, at 7.5 steps, is off by half a step
    assert ((back - w).abs() <= wide / 2 * (1 + 1e-5)).all()
    assert torch.equal(quantize_groups(back, scales), codes)


def test_a_group_of_zeros_gives_no_nan():
    w = normal(2, 256)
    w[0, :128] = 0
    w[1] = 0
    scales = group_scales(w)
    codes = quantize_groups(w, scales)
    assert scales[0, 0].item() == scales[1, 1].item() == pytest.approx(1e-6)
    assert (codes[0, :128] == 8).all() and (codes[1] == 8).all()
    assert torch.equal(dequantize_groups(codes, scales)[1], torch.zeros(256))
    levels, rows = two_level(codes, scales)
    assert rows.isfinite().all() and (levels[1] == 0).all()
    half = group_scales(w, dtype=torch.float16)
    assert half.dtype == torch.float16 and (half > 0).all() and dequantize_groups(codes, half).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.booleans())
def test_the_second_level_is_close_to_the_first(seed, half):
    w = normal(5, 256, seed=seed) * torch.exp(normal(5, 2, seed=seed + 1)).repeat_interleave(128, 1)
    scales = group_scales(w, dtype=torch.float16 if half else torch.float32)
    codes = quantize_groups(w, scales)
    levels, rows = two_level(codes, scales)
    assert levels.dtype == torch.int8 and rows.shape == (5,)
    first = dequantize_groups(codes, scales)
    assert (first.abs().amax(1) / 127 - rows).abs().max() < 1e-6
    # half a step of rounding, and float16's 2^-11 of at most 127 steps
    assert ((levels * rows[:, None] - first).abs() <= rows[:, None] * (0.5 + 127 * 2**-11)).all()
    relative, same = relative_scales(codes, scales)
    assert relative.dtype == torch.float16 and torch.equal(same, rows)
    assert torch.equal(expand_levels(codes, relative), levels)


def test_a_group_of_middle_codes_with_a_large_scale_stays_finite():
    codes = torch.full((1, 16), 8, dtype=torch.uint8)
    codes[0, 0] = 9
    levels, rows = two_level(codes, torch.tensor([[1e-3, 1e4]]))
    assert levels[0].tolist() == [127] + [0] * 15 and rows.item() == pytest.approx(1e-3 / 127)


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_row_by_row(bits):
    weight = normal(11, 32) * torch.exp(normal(11, 1, seed=2))
    weight[3] = 0
    weight[4, 5] = -9  # a negative peak, which the sign must not hide
    codes, scales = quantize_embedding(weight, bits)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.int32)
    assert codes.nbytes == 11 * 32 * bits // 8
    ids = torch.tensor([[4, 3, 0], [10, 4, 1]])
    found = embedding_rows(ids, codes, scales)
    assert found.shape == (2, 3, 32)
    assert ((found - weight[ids]).abs() <= scales[ids][..., None] / 2 * (1 + 1e-5)).all()
    assert found[0, 0, 5] == pytest.approx(-9) and (found[0, 1] == 0).all()


def test_refusals():
    codes, v = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 16)
    for bits in (2, 5, 16):
        with pytest.raises(InputError, match=f"4 or 8, got {bits}"):
            quantize_symmetric(v, 1.0, bits)
    with pytest.raises(InputError, match="multiple of 8 codes to pack, got 5"):
        pack_int4(codes[:, :5])
    with pytest.raises(InputError, match="0 to 15 to pack, got 16"):
        pack_int4(codes + 16)
    with pytest.raises(InputError, match="divides 16 inputs, got 5"):
        group_scales(v, 5)
    with pytest.raises(InputError, match="finite, got NaN"):
        group_scales(v + torch.nan, 8)
    with pytest.raises(InputError, match="finite and not negative"):
        symmetric_scale(torch.tensor(torch.inf), 8)
    with pytest.raises(InputError, match="finite and not negative"):
        symmetric_scale(torch.tensor([1.0, -1.0]), 8)
    for scales in (torch.ones(2, 3), torch.ones(2, 0)):
        with pytest.raises(InputError, match="group scales that divide"):
            quantize_groups(v, scales)
        with pytest.raises(InputError, match="group scales that divide"):
            relative_scales(codes, scales)
    with pytest.raises(InputError, match="broadcasts over"):
        quantize_symmetric(v, torch.ones(3))
    with pytest.raises(InputError, match="broadcasts over"):
        dequantize(torch.zeros(2, 16, dtype=torch.int8), torch.ones(1, 2, 1))
    with pytest.raises(InputError, match="finite"):
        quantize_embedding(v + torch.nan, 8)
