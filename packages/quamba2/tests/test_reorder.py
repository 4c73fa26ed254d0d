"""Invariants 1 and 8: a plan changes no output, of Hugging Face's own forward pass too; one across groups does."""

from dataclasses import replace

import pytest
import torch
from models import ids, make

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.clustering import Plan
from isotone.quamba2.forward import forward, scan_heads
from isotone.quamba2.reorder import permute, reorder
from isotone.shared.errors import InputError


def random_plan(arch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = arch.heads // arch.groups
    heads = torch.cat([g * size + torch.randperm(size, generator=generator) for g in range(arch.groups)])
    within = torch.stack([torch.randperm(arch.head_dim, generator=generator) for _ in range(arch.heads)])
    sizes = torch.full((arch.groups, 1), size)
    channels = (heads[:, None] * arch.head_dim + within).reshape(-1)
    return Plan(channels, heads, sizes, torch.full((arch.groups, 1, 1), arch.head_dim))


@pytest.mark.parametrize("kind, changes", [("mamba2", {}), ("mamba2", {"use_bias": True}), ("mamba", {})])
def test_outputs_are_unchanged(kind, changes):
    model = make(kind, **changes)
    arch = Architecture.of(model.config)
    plans = [random_plan(arch, seed) for seed in range(arch.layers)]
    with torch.no_grad():
        before = model(ids()).logits
        after = reorder(model, plans)(ids()).logits
    assert before.abs().max() > 1 and not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    exact = make(kind, **changes).double()
    wanted = forward(exact, ids())
    torch.testing.assert_close(forward(reorder(exact, plans), ids()), wanted, rtol=0, atol=1e-10)


def test_d_with_a_number_a_channel():
    model = make().double()
    arch = Architecture.of(model.config)
    for layer in model.backbone.layers:
        layer.mixer.D = torch.nn.Parameter(torch.randn(arch.inner, dtype=torch.float64))
    wanted = forward(model, ids())
    plans = [random_plan(arch, seed) for seed in range(3)]
    torch.testing.assert_close(forward(reorder(model, plans), ids()), wanted, rtol=0, atol=1e-10)


def across_groups(arch):
    heads = torch.arange(arch.heads).roll(1)
    channels = (heads[:, None] * arch.head_dim + torch.arange(arch.head_dim)).reshape(-1)
    return replace(random_plan(arch), head_index=heads, channel_index=channels)


def test_a_head_in_another_group_changes_the_output_and_is_refused():
    model = make()
    arch = Architecture.of(model.config)
    before = forward(model, ids())
    bad = across_groups(arch)
    with pytest.raises(InputError, match="stay in their SSM group, got head 11 in group 0"):
        reorder(model, [random_plan(arch), random_plan(arch), bad])
    assert torch.equal(forward(model, ids()), before), "refused before any weight changed"
    permute(model.backbone.layers[0].mixer, arch, bad)
    assert (forward(model, ids()) - before).abs().max() > 1e-2


def test_other_plans_are_refused():
    model = make()
    arch = Architecture.of(model.config)
    good = random_plan(arch)
    moved = good.channel_index.clone()
    moved[[0, arch.head_dim]] = moved[[arch.head_dim, 0]]
    for bad, words in (
        (replace(good, channel_index=moved), "stay in their head"),
        (replace(good, channel_index=good.channel_index * 0), "permutation of 192 channels"),
        (replace(good, head_index=good.head_index * 0), "permutation of 12 heads"),
    ):
        with pytest.raises(InputError, match=words):
            reorder(model, [bad] * 3)
    with pytest.raises(InputError, match="each of 3 layers, got 1"):
        reorder(model, [good])


def test_the_scan_keeps_the_order_of_its_channels():
    """Invariant 8."""
    arch = Architecture.of(make().config)
    torch.manual_seed(0)
    x, dt = torch.randn(2, 11, arch.inner).double(), torch.rand(2, 11, arch.heads).double()
    B, C = torch.randn(2, 2, 11, arch.groups * arch.state).double()
    A, D = -torch.rand(arch.heads).double(), torch.randn(arch.heads).double()
    plan = random_plan(arch, 3)
    y, state = scan_heads(arch, x, dt, A, B, C, D, None)
    to, heads = plan.channel_index, plan.head_index
    moved, last = scan_heads(arch, x[..., to], dt[..., heads], A[heads], B, C, D[heads], None)
    torch.testing.assert_close(moved, y[..., to], rtol=0, atol=1e-12)
    torch.testing.assert_close(last.flatten(1, 2), state.flatten(1, 2)[:, to], rtol=0, atol=1e-12)
