"""Invariant 9: GPTQ equals rounding where there is nothing to make up for, and is no worse where there is."""

import pytest
import torch

from isotone.quamba2.gptq import GPTQ
from isotone.quamba2.weights import check_group, int8_by_rows, round_to_nearest
from isotone.shared.errors import InputError


def inputs(rows=512, columns=64, seed=0):
    """Correlated inputs, as a layer's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ (mix + 0.5 * torch.eye(columns))


def weight(seed=1, out=24, columns=64):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def loss(hessian, wanted, got):
    error = (wanted - got).double()
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("group", [16, 32, 64])
def test_with_uncorrelated_inputs_it_rounds_to_nearest(group):
    gptq = GPTQ(64)
    gptq.add(torch.eye(64) * 8)
    found, wanted = gptq.quantize(weight(), group), round_to_nearest(weight(), group)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)


def test_the_hessian_is_the_mean_of_all_inputs():
    gptq, x = GPTQ(64), inputs()
    for part in (x[:100], x[100:101], x[101:].reshape(3, -1, 64)):
        gptq.add(part)
    torch.testing.assert_close(gptq.hessian, 2 / 512 * x.T @ x, rtol=1e-4, atol=1e-5)


def test_it_loses_less_than_rounding():
    """On each of twenty draws here; the bound asked for is on their average."""
    ratios = []
    for seed in range(20):
        gptq, w = GPTQ(64), weight(seed + 40)
        gptq.add(inputs(seed=seed))
        found, rounded = gptq.quantize(w, 32), round_to_nearest(w, 32)
        ratios.append(loss(gptq.hessian, w, found.dequantize()) / loss(gptq.hessian, w, rounded.dequantize()))
    assert sum(ratios) / 20 < 0.7


def naive(w, hessian, group, dampening=0.01):
    """A column at a time with the whole inverse, from the equations: the rest of H^-1 is its Schur complement."""
    h = hessian.double()
    inverse = torch.linalg.inv(h + dampening * h.diagonal().mean() * torch.eye(len(h)))
    left, found = w.double().clone(), torch.empty_like(w, dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % group == 0:
            scale = (2 * left[:, j : j + group].abs().amax(1) / 15).half().double()
        found[:, j] = (torch.round(left[:, j] / scale) + 8).clamp(0, 15).sub(8) * scale
        error = (left[:, j] - found[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def test_it_is_the_column_by_column_algorithm():
    gptq = GPTQ(64)
    gptq.add(inputs())
    found, wanted = gptq.quantize(weight(), 32).dequantize().double(), naive(weight(), gptq.hessian, 32)
    # sums in another order may round a number to the neighbour's code
    assert ((found - wanted).abs() > 1e-6).float().mean() < 0.01
    assert loss(gptq.hessian, weight(), found) == pytest.approx(loss(gptq.hessian, weight(), wanted), rel=0.02)


def test_dead_columns_and_groups_of_zeros():
    x = inputs()
    x[:, [3, 40]] = 0
    gptq, w = GPTQ(64), weight()
    w[:, 32:] = 0
    gptq.add(x)
    found = gptq.quantize(w, 16).dequantize()
    assert found.isfinite().all() and (found[:, [3, 40]] == 0).all()
    assert round_to_nearest(torch.zeros(3, 32), 16).dequantize().eq(0).all()
    few = GPTQ(64)
    few.add(inputs(rows=5))
    assert few.quantize(w, 16).dequantize().isfinite().all(), "fewer inputs than columns"


def test_int8_of_segments_is_within_half_a_scale():
    w = weight(out=30) * torch.tensor([1.0] * 10 + [100.0] * 20)[:, None]
    found = int8_by_rows(w, [10, 20])
    assert found.scales.unique().numel() == 2
    assert ((found.dequantize() - w).abs() <= found.scales[:, None] * 0.5001).all()
    grouped = round_to_nearest(weight(), 32)
    steps = grouped.scales.float().repeat_interleave(32, 1)
    # the largest magnitude lies at 7.5 steps, which the level 7 or -8 ends at
    assert ((grouped.dequantize() - weight()).abs() <= steps * 0.51).all()
    second = grouped.int8().dequantize()
    assert ((second - grouped.dequantize()).abs() <= grouped.int8().scales[:, None] * 0.6).all()


def test_refusals():
    with pytest.raises(InputError, match="got none"):
        GPTQ(8).quantize(torch.ones(2, 8), 8)
    with pytest.raises(InputError, match="NaN"):
        GPTQ(8).add(torch.full((2, 8), float("nan")))
    with pytest.raises(InputError, match="divide the 96 inputs of out_proj"):
        check_group(96, 128, "out_proj")
