"""Invariant 10, products with packed weights; and what stands around them: norms and the convolution in int8."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from isotone.quamba2 import linear
from isotone.quamba2.gated_norm import add_rms_norm, conv1d_silu, gated_rms_norm
from isotone.quamba2.linear import fold_output_scales, int_matmul, matmul_w4a8, matmul_w4a16, matmul_w8a8
from isotone.quamba2.packing import (
    dequantize_groups,
    group_scales,
    pack_int4,
    quantize_groups,
    relative_scales,
    two_level,
)
from isotone.shared.errors import InputError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape, seed=0, low=-128):
    return torch.randint(low, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def weights(out, columns, group, seed=0):
    """Codes, scales and packed codes of a random weight."""
    w = normal(out, columns, seed=seed)
    scales = group_scales(w, group)
    codes = quantize_groups(w, scales)
    return codes, scales, pack_int4(codes)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.integers(1, 40),
    st.sampled_from([(128, 128), (256, 128), (64, 8), (96, 32), (40, 40)]),
    st.booleans(),
)
def test_packed_products_are_dequantised_products(seed, shape, out, sizes, with_bias):
    columns, group = sizes
    codes, scales, packed = weights(out, columns, group, seed)
    x, bias = normal(*shape, columns, seed=seed + 1), normal(out) if with_bias else None
    found = matmul_w4a16(x, packed, scales, bias)
    assert found.shape == (*shape, out)
    torch.testing.assert_close(found, F.linear(x, dequantize_groups(codes, scales), bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_packed_products_in_other_types(dtype):
    codes, scales, packed = weights(9, 128, 64)
    x = normal(3, 128).to(dtype)
    wanted = F.linear(x.double(), dequantize_groups(codes, scales.half()).double())
    found = matmul_w4a16(x, packed, scales.half())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20), st.integers(1, 300))
def test_integer_products_are_exact(seed, rows, out, columns):
    x, w = int8(rows, columns, seed=seed), int8(out, columns, seed=seed + 1)
    assert torch.equal(int_matmul(x, w).long(), x.long() @ w.long().T)


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 4096, 5000])
def test_the_largest_sums_are_exact(columns):
    """-128 times -128, as often as a float32 could just hold it, and far more often."""
    x = torch.full((3, columns), -128, dtype=torch.int8)
    x[1, ::2] = 127
    x[2] = int8(columns)
    w = torch.cat([x, int8(30, columns, seed=2)])
    found = int_matmul(x, w)
    assert found.dtype == torch.int32 and found[0, 0] == 2**14 * columns
    assert torch.equal(found.long(), x.long() @ w.long().T)


def test_blocks_of_rows_change_nothing(monkeypatch):
    codes, scales, packed = weights(50, 256, 128)
    x, q = normal(5, 256), int8(5, 256)
    relative, rows = relative_scales(codes, scales)
    whole = matmul_w4a16(x, packed, scales), int_matmul(q, q), matmul_w4a8(q, packed, relative, rows)
    monkeypatch.setattr(linear, "_BLOCK", 17 * 256)
    torch.testing.assert_close(matmul_w4a16(x, packed, scales), whole[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(int_matmul(q, q), whole[1])
    assert torch.equal(matmul_w4a8(q, packed, relative, rows), whole[2])


def reference_int8(x, levels, scale, bias, quantize):
    """Integers of 64 bits, then the epilogue in float32."""
    sums = (x.long() @ levels.long().T).to(torch.int32)
    result = sums.float() * scale
    if bias is not None:
        result = result + bias
    return result.round().clamp(-128, 127).to(torch.int8) if quantize else result


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([(128, 128), (1280, 128), (64, 8)]),
    st.booleans(),
    st.booleans(),
)
def test_w4a8_is_its_int32_reference_exactly(seed, rows, out, sizes, with_bias, quantize):
    columns, group = sizes
    codes, scales, packed = weights(out, columns, group, seed)
    relative, row_scales = relative_scales(codes, scales)
    levels, same = two_level(codes, scales)
    assert torch.equal(row_scales, same)
    x, bias = int8(rows, columns, seed=seed), normal(out, seed=seed) if with_bias else None
    scale = row_scales * 0.02
    dtype = torch.int8 if quantize else torch.float32
    found = matmul_w4a8(x, packed, relative, scale, bias, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, reference_int8(x, levels, scale, bias, quantize))
    assert torch.equal(matmul_w8a8(x, levels, scale, bias, dtype), found), "W8A8 on the same levels"


def test_segments_with_output_scales_of_their_own():
    """in_proj of Mamba2: z, x, B, C and dt in int8, a static scale each."""
    sizes, steps = [12, 12, 4, 4, 3], [0.5, 0.25, 0.125, 1.0, 2.0]
    x, w = int8(2, 3, 64), int8(35, 64, seed=1)
    scale, bias = torch.rand(35, generator=torch.Generator().manual_seed(0)) * 1e-3, normal(35)
    plain = matmul_w8a8(x, w, scale, bias)
    folded = fold_output_scales(scale, bias, steps, sizes)
    found = matmul_w8a8(x, w, *folded, torch.int8)
    wide = torch.tensor(steps).repeat_interleave(torch.tensor(sizes))
    # steps that are powers of two: dividing first or last gives the same bits
    assert torch.equal(found, (plain / wide).round().clamp(-128, 127).to(torch.int8))
    assert int(found.abs().max()) > 20
    alone, none = fold_output_scales(scale, None, torch.tensor(steps), sizes)
    assert none is None and torch.equal(alone, folded[0])
    with pytest.raises(InputError, match="35 outputs, got 5 steps"):
        fold_output_scales(scale, bias, steps, [35, 0, 0, 0, 1])
    with pytest.raises(InputError, match="got 2 steps"):
        fold_output_scales(scale, bias, steps[:2], sizes)


def test_half_precision_out():
    x, w, scale = int8(4, 64), int8(8, 64, seed=1), torch.full((8,), 1e-4)
    found = matmul_w8a8(x, w, scale, out_dtype=torch.float16)
    assert torch.equal(found, matmul_w8a8(x, w, scale).half())


def test_refusals():
    codes, scales, packed = weights(4, 64, 32)
    with pytest.raises(InputError, match="inputs of 64 columns"):
        matmul_w4a16(normal(2, 32), packed, scales)
    with pytest.raises(InputError, match="divide them"):
        matmul_w4a16(normal(2, 64), packed, torch.ones(4, 3))
    with pytest.raises(InputError, match="int8 or floating point, got torch.int32"):
        matmul_w8a8(int8(2, 64), int8(4, 64), torch.ones(4), out_dtype=torch.int32)
    with pytest.raises(InputError, match="int8 or floating point, got torch.int16"):
        matmul_w4a8(int8(2, 64), packed, scales.half(), torch.ones(4), out_dtype=torch.int16)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_gated_norm_is_hugging_face_s(groups):
    y, z, weight = normal(2, 3, 64) * 3, normal(2, 3, 64, seed=1), normal(64, seed=2)
    theirs = MambaRMSNormGated(64, 64 // groups, eps=1e-5)
    theirs.weight.data = weight
    torch.testing.assert_close(gated_rms_norm(y, z, weight, groups), theirs(y, z).detach(), rtol=1e-5, atol=1e-6)
    codes = int8(2, 3, 64)
    torch.testing.assert_close(
        gated_rms_norm(y, codes, weight, groups, z_scale=0.03), gated_rms_norm(y, codes * 0.03, weight, groups)
    )
    assert gated_rms_norm(y.half(), z.half(), weight.half(), groups).dtype == torch.float16


def test_the_groups_of_the_gated_norm_are_apart():
    """Another channel of a group changes a group's output, a channel of another group does not."""
    y, z, weight = normal(1, 16), normal(1, 16, seed=1), torch.ones(16)
    before = gated_rms_norm(y, z, weight, 4)
    y[0, 5] += 3
    changed = (gated_rms_norm(y, z, weight, 4) != before)[0]
    assert changed[4:8].all() and not changed[:4].any() and not changed[8:].any()
    with pytest.raises(InputError, match="divide 16 channels, got 3"):
        gated_rms_norm(y, z, weight, 3)
    with pytest.raises(InputError, match="z_scale"):
        gated_rms_norm(y, int8(1, 16), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("with_weight", [True, False])
def test_add_norm_and_quantise(dtype, with_weight):
    hidden, residual = normal(2, 3, 48).to(dtype), 5 * normal(2, 3, 48, seed=1)
    residual = residual.to(torch.float64 if dtype == torch.float64 else torch.float32)
    weight = normal(48, seed=2) if with_weight else None
    normed, total = add_rms_norm(hidden, residual, weight)
    assert normed.dtype == dtype and total.dtype == residual.dtype
    torch.testing.assert_close(total, hidden + residual)
    wide = total.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 if weight is None else weight)
    torch.testing.assert_close(normed.double(), wanted, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    codes, same = add_rms_norm(hidden, residual, weight, scale=torch.tensor(0.01))
    assert codes.dtype == torch.int8 and torch.equal(same, total)
    exact = (wanted / 0.01).clamp(-128, 127)
    assert ((codes - exact).abs() <= 0.5 + 1e-3).all() and (codes.abs() >= 127).any()
    alone, itself = add_rms_norm(hidden, None, weight)
    assert itself is hidden
    plain = F.rms_norm(hidden, (48,), None if weight is None else weight.to(dtype), 1e-5)
    torch.testing.assert_close(alone, plain, rtol=3e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def conv_case(length=9, width=6, k=4):
    x, w = int8(2, length, width), int8(width, k, seed=1)
    scale = torch.linspace(1e-5, 1e-3, width)
    return x, w, scale, normal(width), torch.linspace(0.005, 0.1, width)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_the_int8_convolution(length):
    """Lengths below the kernel's too: what is before the first token is zeros."""
    x, w, scale, bias, out_scale = conv_case(length)
    found, state = conv1d_silu(x, w, scale, bias, out_scale)
    assert found.dtype == state.dtype == torch.int8 and state.shape == (2, 3, 6)
    padded = F.pad(x.double().transpose(1, 2), (3, 0))
    sums = F.conv1d(padded, w.double()[:, None], groups=6).transpose(1, 2)
    wanted = F.silu(sums * scale + bias)
    exact = (wanted / out_scale).clamp(-128, 127)
    assert ((found - exact).abs() <= 0.5 + 1e-3).all() and int(found.abs().max()) > 20
    torch.testing.assert_close(conv1d_silu(x, w, scale, bias)[0].double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        conv1d_silu(x, w, scale)[0].double(), F.silu(sums * scale.double()), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(state, padded[..., -3:].transpose(1, 2).to(torch.int8))


def test_convolution_in_parts_is_one_convolution():
    x, w, scale, bias, out_scale = conv_case()
    whole, last = conv1d_silu(x, w, scale, bias, out_scale)
    pieces, state = [], None
    for start, end in ((0, 2), (2, 7), (7, 8), (8, 9)):
        y, state = conv1d_silu(x[:, start:end], w, scale, bias, out_scale, state)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(state, last)
    with pytest.raises(InputError, match="state of 3 tokens, got 2"):
        conv1d_silu(x, w, scale, bias, out_scale, last[:, :2])
