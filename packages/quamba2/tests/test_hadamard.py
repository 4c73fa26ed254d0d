"""Invariant 2: H H^T = I, and the fast transform is the product with H, for every width there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.quamba2.hadamard import (
    hadamard_matrix,
    hadamard_quantize,
    hadamard_transform,
    largest_block,
    supports,
)
from isotone.shared.errors import InputError

WIDTHS = [1, 2, 8, 64, 128, 512, 2048, 12, 24, 96, 768, 1536, 40, 80, 1280, 2560]


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", WIDTHS)
def test_the_matrix_is_orthonormal_and_of_one_size(n):
    H = hadamard_matrix(n, torch.float64)
    assert (H @ H.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-6
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5))


@pytest.mark.parametrize("n", WIDTHS)
def test_the_transform_is_the_dense_product(n):
    x, H = rows(3, n), hadamard_matrix(n, torch.float64)
    torch.testing.assert_close(hadamard_transform(x), x @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x, transpose=True), x @ H.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x.float()), (x @ H).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [4096, 5120, 6144, 8192, 10240])
def test_wide_transforms_undo_themselves_and_keep_products(n):
    x, y = rows(2, n)
    turned = hadamard_transform(x)
    torch.testing.assert_close(hadamard_transform(turned, transpose=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned @ hadamard_transform(y), x @ y, rtol=1e-12, atol=1e-10)
    # the transform of a unit vector is a row of H
    unit = torch.zeros(1, n, dtype=torch.float64)
    unit[0, n - 3] = 1
    torch.testing.assert_close(hadamard_transform(unit).abs(), torch.full((1, n), n**-0.5, dtype=torch.float64))


def test_sylvester_s_is_symmetric_and_paley_s_is_not():
    for n in (2, 64, 256):
        H = hadamard_matrix(n)
        assert torch.equal(H, H.T)
    x = rows(4, 12)
    for n in (12, 24, 40, 80):
        H = hadamard_matrix(n)
        assert not torch.equal(H, H.T)
    assert (hadamard_transform(x) - hadamard_transform(x, transpose=True)).abs().max() > 0.1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.booleans(), st.sampled_from([(), (1,), (2, 3), (0,)]))
def test_any_rows_and_either_side_of_a_weight(n, transpose, shape):
    """(x H) (W H)^T = x W^T: fused and online rotations cancel."""
    x, W = rows(*shape, n, seed=1), rows(5, n, seed=2)
    turned = hadamard_transform(x, transpose)
    assert turned.shape == x.shape
    torch.testing.assert_close(turned @ hadamard_transform(W, transpose).T, x @ W.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = rows(3, 1536, dtype=dtype)
    wanted = (x.double() @ hadamard_matrix(1536, torch.float64)).to(dtype)
    found = hadamard_transform(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_an_outlier_is_spread():
    x = rows(1, 4096, dtype=torch.float32)
    x[0, 17] = 1000
    assert hadamard_transform(x).abs().max() < 1000 / 64 + 6


def test_columns_and_slices_are_read_where_they_are():
    wide = rows(64, 2 * 48)
    for x in (wide[:, :48], wide.T[:, :32], wide[::2, 48:]):
        torch.testing.assert_close(
            hadamard_transform(x), x @ hadamard_matrix(x.shape[-1], torch.float64), rtol=0, atol=1e-12
        )


def test_the_fallback_of_blocks():
    assert (largest_block(84), largest_block(36), largest_block(7 * 64), largest_block(768)) == (12, 12, 64, 768)
    x = rows(2, 84)
    H = hadamard_matrix(84, torch.float64, block_diagonal=True)
    assert (H @ H.T - torch.eye(84, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(H[:12, 12:], torch.zeros(12, 72, dtype=torch.float64))
    for transpose in (False, True):
        found = hadamard_transform(x, transpose, block_diagonal=True)
        torch.testing.assert_close(found, x @ (H.T if transpose else H), rtol=0, atol=1e-12)
    whole = rows(2, 768)
    assert torch.equal(hadamard_transform(whole, block_diagonal=True), hadamard_transform(whole))


def test_refusals_name_the_width():
    assert [n for n in range(65) if supports(n)] == [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64]
    for n in (0, 20, 84, 100, 36):
        with pytest.raises(InputError, match=f"got {n}$"):
            hadamard_matrix(n)
    with pytest.raises(InputError, match="12 \\* 2\\^k or 40 \\* 2\\^k .* got 20$"):
        hadamard_transform(rows(2, 20))
    with pytest.raises(InputError, match="even width .* got 85"):
        hadamard_transform(rows(2, 85), block_diagonal=True)


@pytest.mark.parametrize("n", [8, 64, 1536])
def test_transform_and_quantiser(n):
    x = rows(5, n, dtype=torch.float32)
    wanted = torch.round((x.double() @ hadamard_matrix(n, torch.float64)) / 0.01).clamp(-128, 127)
    found = hadamard_quantize(x, torch.tensor(0.01))
    assert found.dtype == torch.int8
    assert (found - wanted).abs().max() <= 1 and (found != wanted).float().mean() < 0.01
    assert (found.abs() >= 127).any(), "something is clamped"
