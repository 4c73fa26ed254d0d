"""Sort-and-cluster: which channels of the SSM's input x share a scale (section 2, "Sort-and-cluster").

The order of the channels by magnitude is stable over tokens and samples. So each head's channels are sorted, heads
whose sorted profiles have the same shape are grouped (Ward), and in each head group the sorted channels are cut into
runs (k-means, or exact dynamic programming). One static scale for each (SSM group, head group, channel group).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Plan:
    """A new order of heads and channels, and which of them share a scale.

    `channel_index` (d,): the old channel at each new place; `head_index` (h,): the old head. `head_sizes` (G, m): heads
    in each head group; `dim_sizes` (G, m, n): channels of a head in each channel group. All int64, in the new order.
    """

    channel_index: Int[Tensor, " d"]
    head_index: Int[Tensor, " h"]
    head_sizes: Int[Tensor, "G m"]
    dim_sizes: Int[Tensor, "G m n"]

    @property
    def count(self) -> int:
        """How many scales: G m n."""
        return self.dim_sizes.numel()

    @property
    def labels(self) -> Int[Tensor, " d"]:
        """The scale's number of each channel, in the new order."""
        groups, m, n = self.dim_sizes.shape
        numbers = torch.arange(groups * m * n).reshape(groups * m, n)
        rows = [
            row.repeat_interleave(sizes).repeat(int(heads))
            for row, sizes, heads in zip(
                numbers, self.dim_sizes.reshape(-1, n), self.head_sizes.reshape(-1).tolist(), strict=True
            )
        ]
        return torch.cat(rows)

    @property
    def head_ends(self) -> Int[Tensor, "G m"]:
        """Where each head group ends within its SSM group: the cumulative sizes, int32."""
        return self.head_sizes.cumsum(-1).to(torch.int32)

    @property
    def dim_ends(self) -> Int[Tensor, "G m n"]:
        """Where each channel group ends within a head, int32."""
        return self.dim_sizes.cumsum(-1).to(torch.int32)


def sort_and_cluster(
    stats: Float[Tensor, " d"],
    head_dim: int,
    groups: int,
    head_groups: int = 4,
    dim_groups: int = 4,
    clustering: str = "kmeans",
) -> Plan:
    """The plan for channels of magnitudes `stats` (d = h p,), with p = `head_dim` and G = `groups` (section 2).

    `head_groups` (m) and `dim_groups` (n) are cut to the heads of a group and to p, with a warning. `clustering`:
    "kmeans" on the normalised profiles, or "dp", which minimises sum(channels * max^2), the energy of the int8 noise.
    Deterministic, and unchanged when the stats are scaled. Raises `InputError` on stats that are NaN, infinite or
    negative, sizes that do not divide, and m or n below 1.
    """
    _check(stats, head_dim, groups, head_groups, dim_groups, clustering)
    profiles = stats.detach().to("cpu", torch.float64).numpy().reshape(groups, -1, head_dim)
    heads = profiles.shape[1]
    m, n = min(head_groups, heads), min(dim_groups, head_dim)
    if (m, n) != (head_groups, dim_groups):
        warnings.warn(
            f"head_groups {head_groups} and dim_groups {dim_groups} are cut to {m} and {n}: there are {heads} heads in "
            f"a group and {head_dim} channels in a head",
            stacklevel=2,
        )
    order = np.argsort(profiles, axis=-1, kind="stable")
    ascending = np.take_along_axis(profiles, order, -1)
    lengths = np.linalg.norm(ascending, axis=-1, keepdims=True)
    shapes = ascending / np.where(lengths > 0, lengths, 1)
    head_index, head_sizes, dim_sizes = [], np.zeros((groups, m), np.int64), np.zeros((groups, m, n), np.int64)
    for group in range(groups):
        labels = _head_labels(shapes[group], m)
        head_index.append(np.argsort(labels, kind="stable"))
        for label in range(m):
            members = labels == label
            head_sizes[group, label] = members.sum()
            if clustering == "dp":
                sizes = optimal_runs(ascending[group, members].max(0), n)
            else:
                sizes = kmeans_runs(shapes[group, members].T, n)
            dim_sizes[group, label] = sizes
    within = np.stack(head_index)
    channels = np.take_along_axis(order, within[:, :, None], 1) + head_dim * within[:, :, None]
    first = np.arange(groups)[:, None] * heads
    return Plan(
        torch.from_numpy((channels + head_dim * first[:, :, None]).reshape(-1)),
        torch.from_numpy((within + first).reshape(-1)),
        torch.from_numpy(head_sizes),
        torch.from_numpy(dim_sizes),
    )


def _head_labels(shapes: np.ndarray, m: int) -> np.ndarray:
    """Ward's clusters of the rows of `shapes`, numbered by the first head of each."""
    heads = len(shapes)
    if m in (1, heads):
        return np.arange(heads) if m == heads else np.zeros(heads, np.int64)
    from scipy.cluster.hierarchy import cut_tree, ward

    found = cut_tree(ward(shapes), n_clusters=m)[:, 0]
    _, first, numbers = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]


def kmeans_runs(points: np.ndarray, n: int) -> np.ndarray:
    """Sizes (n,) of k-means' clusters of `points` (p, features), which ascend in every feature.

    The first centres are rows 0, p/n, 2p/n, ... Points and centres ascend together, so that each cluster is a run of
    rows; none is left empty.
    """
    rows = len(points)
    fewest = np.arange(1, n)
    centres = points[np.arange(n) * rows // n]
    seen: set[bytes] = set()
    while True:
        labels = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(-1)
        # equal rows can leave a cluster empty: every cluster keeps a row
        spare = (np.searchsorted(np.maximum.accumulate(labels), fewest) - fewest).clip(0, rows - n)
        edges = np.concatenate([[0], np.maximum.accumulate(spare) + fewest, [rows]])
        if edges.tobytes() in seen:
            return np.diff(edges)
        seen.add(edges.tobytes())
        centres = np.stack([points[start:end].mean(0) for start, end in pairwise(edges.tolist())])


def optimal_runs(maxima: np.ndarray, n: int) -> np.ndarray:
    """Sizes (n,) of the runs of `maxima` (p,), ascending, that minimise the sum over runs of length * maximum^2.

    Dynamic programming, n p^2 steps. The sum is proportional to the energy of the rounding noise at one scale a run.
    """
    rows = len(maxima)
    ends = np.arange(rows + 1)
    # cost[i, j]: of the run of rows i to j - 1
    cost = np.where(ends[None] > ends[:, None], (ends[None] - ends[:, None]) * np.r_[0.0, maxima**2][None], np.inf)
    best = cost[0]
    choices = []
    for _ in range(n - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
    edges = [rows]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    return np.diff(np.array([0, *reversed(edges)]))


def _check(stats: Tensor, head_dim: int, groups: int, head_groups: int, dim_groups: int, clustering: str) -> None:
    if min(head_dim, groups, head_groups, dim_groups) < 1:
        raise InputError(
            f"expected head_dim, groups, head_groups and dim_groups of at least 1, got "
            f"{head_dim}, {groups}, {head_groups} and {dim_groups}"
        )
    if not len(stats) or len(stats) % (head_dim * groups):
        raise InputError(
            f"expected channels in {groups} groups of heads of {head_dim} channels each, got {len(stats)} channels"
        )
    if not bool(stats.isfinite().all()) or bool((stats < 0).any()):
        raise InputError("expected channel statistics that are finite and not negative, got others")
    if clustering not in ("kmeans", "dp"):
        raise InputError(f"expected clustering to be kmeans or dp, got {clustering!r}")
