"""Sort-and-cluster: permutations, sizes, the same answer every time, and scikit-learn's k-means as the reference."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from isotone.quamba2.clustering import kmeans_runs, optimal_runs, sort_and_cluster
from isotone.shared.errors import InputError


def stats(groups=2, heads=6, head_dim=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).lognormal(size=groups * heads * head_dim)).float()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["kmeans", "dp"]),
    st.booleans(),
)
def test_plans_are_permutations_within_heads_and_groups(groups, heads, head_dim, m, n, clustering, ties):
    values = stats(groups, heads, head_dim, seed=heads)
    values = values.round() if ties else values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = sort_and_cluster(values, head_dim, groups, m, n, clustering)
        again = sort_and_cluster(values * 2.0**9, head_dim, groups, m, n, clustering)
    width, total = values.numel(), groups * heads
    assert torch.equal(plan.channel_index.sort().values, torch.arange(width))
    assert torch.equal(plan.channel_index // head_dim, plan.head_index.repeat_interleave(head_dim))
    assert torch.equal(plan.head_index // heads, torch.arange(total) // heads)
    assert (plan.head_sizes.sum(-1) == heads).all() and (plan.dim_sizes.sum(-1) == head_dim).all()
    assert (plan.head_sizes > 0).all() and (plan.dim_sizes > 0).all()
    assert (plan.head_ends[:, -1] == heads).all() and (plan.dim_ends[..., -1] == head_dim).all()
    per_head = plan.labels.reshape(total, head_dim)
    assert (per_head.diff(dim=-1) >= 0).all() and plan.labels.unique().numel() == plan.count
    assert (values[plan.channel_index].reshape(total, head_dim).diff(dim=-1) >= 0).all()
    for name in ("channel_index", "head_index", "head_sizes", "dim_sizes"):
        assert torch.equal(getattr(plan, name), getattr(again, name)), "a global scale of the stats changes nothing"


def test_heads_of_the_same_shape_are_grouped():
    profiles = np.sort(np.random.default_rng(1).lognormal(size=(4, 32)), axis=-1)
    kinds = np.array([2, 0, 1, 3, 0, 2, 1, 3])
    rng = np.random.default_rng(2)
    values = [rng.permutation(profiles[kind]) * rng.lognormal() for kind in kinds]
    plan = sort_and_cluster(torch.from_numpy(np.concatenate(values)).float(), 32, 1)
    assert plan.head_sizes.tolist() == [[2, 2, 2, 2]]
    assert plan.head_index.tolist() == [0, 5, 1, 4, 2, 6, 3, 7], "clusters by their first head, heads in their order"


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_scikit_learn_s(seed):
    points = np.sort(np.random.default_rng(seed).lognormal(size=(5, 64)), axis=-1).T
    start = points[np.arange(4) * 64 // 4]
    found = KMeans(4, init=start, n_init=1, tol=0, max_iter=1000, algorithm="lloyd").fit_predict(points)
    assert (np.diff(found) >= 0).all() and np.bincount(found).tolist() == kmeans_runs(points, 4).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_is_the_best_of_all_partitions(seed):
    maxima = np.sort(np.random.default_rng(seed).lognormal(size=11))

    def cost(sizes):
        ends = np.cumsum(sizes)
        return sum(size * maxima[end - 1] ** 2 for size, end in zip(sizes, ends, strict=True))

    every = [np.diff([0, *cuts, 11]) for cuts in itertools.combinations(range(1, 11), 2)]
    found = optimal_runs(maxima, 3)
    assert found.sum() == 11 and cost(found) == pytest.approx(min(map(cost, every)))
    assert cost(found) <= cost(kmeans_runs(maxima[:, None], 3))


def group_scales(values, plan):
    """The largest magnitude of each channel's group, in the old order."""
    largest = torch.zeros(plan.count).scatter_reduce(0, plan.labels, values[plan.channel_index], "amax")
    return torch.empty_like(values).scatter(0, plan.channel_index, largest[plan.labels])


def test_scales_never_exceed_the_tensor_s_and_reach_both_ends():
    """Invariant 5."""
    values = stats()
    for m, n in ((1, 1), (2, 3), (4, 4), (6, 16)):
        scales = group_scales(values, sort_and_cluster(values, 16, 2, m, n))
        assert (scales <= values.max()).all() and (scales >= values).all()
    assert torch.equal(scales, values), "m = h/G and n = p: a scale a channel"
    one = sort_and_cluster(values, 16, 1, 1, 1)
    assert one.count == 1 and torch.equal(group_scales(values, one), values.max().expand_as(values))


def test_fewer_heads_than_groups_is_said():
    with pytest.warns(UserWarning, match="cut to 2 and 3"):
        plan = sort_and_cluster(stats(1, 2, 3), 3, 1)
    assert plan.dim_sizes.shape == (1, 2, 3)


@pytest.mark.parametrize(
    "values, sizes, words",
    [
        (torch.full((8,), float("nan")), (4, 1), "finite"),
        (-torch.ones(8), (4, 1), "not negative"),
        (torch.ones(9), (4, 1), "9 channels"),
        (torch.ones(0), (4, 1), "0 channels"),
        (torch.ones(8), (4, 2, 0), "at least 1"),
        (torch.ones(8), (4, 2, 2, 2, "random"), "random"),
    ],
)
def test_refusals(values, sizes, words):
    with pytest.raises(InputError, match=words):
        sort_and_cluster(values, *sizes)
