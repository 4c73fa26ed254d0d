"""The plain forms of clustering, GPTQ and the Hadamard transform: what the fast ones are held to, and timed beside.

Written from the equations, a step at a time, in Python's own loops where the definition has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Plan = tuple[list[int], list[list[int]], list[list[list[int]]]]


def sort_and_cluster(stats: Sequence[float], head_dim: int, groups: int, m: int, n: int) -> Plan:
    """Channel order, heads in each cluster (G, m) and channels in each run (G, m, n) of `clustering.sort_and_cluster`.

    Clusters are numbered by their first head. For profiles without ties.
    """
    heads = len(stats) // head_dim // groups
    order: list[int] = []
    head_sizes, dim_sizes = [], []
    for group in range(groups):
        rows = []
        for head in range(heads):
            first = (group * heads + head) * head_dim
            channels = sorted(range(first, first + head_dim), key=lambda channel: stats[channel])
            length = math.sqrt(sum(stats[c] ** 2 for c in channels)) or 1.0
            rows.append((channels, [stats[c] / length for c in channels]))
        clusters = ward([profile for _, profile in rows], m)
        head_sizes.append([len(members) for members in clusters])
        dim_sizes.append([lloyd([rows[h][1] for h in members], n) for members in clusters])
        order += [channel for members in clusters for h in members for channel in rows[h][0]]
    return order, head_sizes, dim_sizes


def ward(points: Sequence[Sequence[float]], count: int) -> list[list[int]]:
    """Merge the two clusters whose union adds least to the squared distances from centres, until `count` are left."""
    clusters = [[i] for i in range(len(points))]
    centres = [list(point) for point in points]
    while len(clusters) > count:
        best, pair = math.inf, (0, 1)
        for i in range(len(clusters)):
            for j in range(i + 1, len(clusters)):
                a, b = len(clusters[i]), len(clusters[j])
                cost = a * b / (a + b) * sum((u - v) ** 2 for u, v in zip(centres[i], centres[j], strict=True))
                if cost < best:
                    best, pair = cost, (i, j)
        i, j = pair
        a, b = len(clusters[i]), len(clusters[j])
        centres[i] = [(a * u + b * v) / (a + b) for u, v in zip(centres[i], centres[j], strict=True)]
        clusters[i] = sorted(clusters[i] + clusters[j])
        del clusters[j], centres[j]
    return sorted(clusters)


def lloyd(profiles: Sequence[Sequence[float]], n: int) -> list[int]:
    """Sizes of k-means' clusters of channels, each a point of its sorted magnitudes in the heads `profiles`."""
    points = list(zip(*profiles, strict=True))
    centres = [points[i * len(points) // n] for i in range(n)]
    labels: list[int] = []
    while True:
        found = [
            min(range(n), key=lambda k: sum((u - v) ** 2 for u, v in zip(point, centres[k], strict=True)))
            for point in points
        ]
        if found == labels:
            return [labels.count(k) for k in range(n)]
        labels = found
        for k in range(n):
            members = [point for point, label in zip(points, labels, strict=True) if label == k]
            if members:
                centres[k] = tuple(sum(column) / len(members) for column in zip(*members, strict=True))


def gptq(
    weight: Float[Tensor, "out columns"], hessian: Float[Tensor, "columns columns"], group: int, dampening: float = 0.01
) -> Float[Tensor, "out columns"]:
    """The dequantised weight in float64, a column at a time with the whole inverse: the inverse of H without the
    columns that are done is its Schur complement."""
    h = hessian.double()
    inverse = torch.linalg.inv(h + dampening * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device))
    left, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    scale = left[:, 0]
    for j in range(weight.shape[1]):
        if j % group == 0:
            scale = (2 * left[:, j : j + group].abs().amax(1) / 15).clamp_min(1e-6).half().double()
        found[:, j] = (torch.round(left[:, j] / scale) + 8).clamp(0, 15).sub(8) * scale
        error = (left[:, j] - found[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def butterflies(x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """x H for n = 2^k, by sums and differences of pairs, one level of the recursion at a time."""
    y, n = x.clone(), x.shape[-1]
    half = 1
    while half < n:
        for start in range(0, n, 2 * half):
            a = y[:, start : start + half].clone()
            b = y[:, start + half : start + 2 * half].clone()
            y[:, start : start + half] = a + b
            y[:, start + half : start + 2 * half] = a - b
        half *= 2
    return y / math.sqrt(n)
