"""Dominance: who is dominated within a set, the sorting of a set into fronts, and an archive of what never was.

x dominates x' iff u(x) >= u(x') in every objective and > in some (section 2.1). All objectives are maximised.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.checks import check_objectives

_CHUNK_ELEMENTS = 2**25


def dominance_matrix(u: Float[Tensor, "n d"]) -> Bool[Tensor, "n n"]:
    """`[i, j]` says whether x_i dominates x_j. O(n^2 d) time, O(n^2) memory."""
    check_objectives(u)
    return _dominates(u, u)


def non_dominated_mask(u: Float[Tensor, "*_"], valid: Bool[Tensor, " n"] | None = None) -> Bool[Tensor, " n"]:
    """Which of n objects no other dominates (q_i of section 2.2 b); equal vectors do not dominate each other.

    `valid`: objects that are flagged invalid are dominated by every valid one; where none is valid, none is
    dominated. One objective is a comparison with the maximum, two are sorted, O(n log n), more are compared
    pair by pair in chunks, O(n^2 d). Raises `ValueError` on NaN, infinity, or another shape.
    """
    check_objectives(u)
    if valid is not None and not bool(valid.all()):
        if not bool(valid.any()):
            return torch.ones_like(valid)
        mask = torch.zeros_like(valid)
        mask[valid] = non_dominated_mask(u[valid])
        return mask
    n, d = u.shape
    if n == 0:
        return torch.zeros(0, dtype=torch.bool, device=u.device)
    if d == 1:
        return u[:, 0] == u[:, 0].max()
    if d == 2:
        return _non_dominated_2d(u)
    return _non_dominated_chunks(u)


def nd_rank(u: Float[Tensor, "n d"], valid: Bool[Tensor, " n"] | None = None) -> Int[Tensor, " n"]:
    """Rank of non-dominated sorting: 0 for the front, 1 for the front of the rest, and so on.

    Invalid objects come last, all in one rank. O(fronts) calls of `non_dominated_mask`.
    """
    check_objectives(u)
    rank = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
    left = torch.arange(len(u), device=u.device)
    if valid is not None:
        left = left[valid]
    current = 0
    while len(left):
        front = non_dominated_mask(u[left])
        rank[left[front]] = current
        left = left[~front]
        current += 1
    rank[rank < 0] = current
    return rank


def _dominates(better: Tensor, worse: Tensor) -> Tensor:
    no_worse = torch.ones(len(better), len(worse), dtype=torch.bool, device=better.device)
    above = torch.zeros_like(no_worse)
    for k in range(better.shape[1]):  # objective by objective: an (n, n, d) array would not stay in the cache
        mine, theirs = better[:, k, None], worse[None, :, k]
        no_worse &= mine >= theirs
        above |= mine > theirs
    return no_worse & above


def _non_dominated_2d(u: Tensor) -> Tensor:
    """By u_0 descending, then u_1 descending: a point stands iff its u_1 is above all of larger u_0 and is the
    largest of its own u_0."""
    order = torch.argsort(u[:, 1], descending=True, stable=True)
    order = order[torch.argsort(u[order, 0], descending=True, stable=True)]
    first, second = u[order, 0], u[order, 1]
    starts = torch.ones(len(u), dtype=torch.bool, device=u.device)
    starts[1:] = first[1:] != first[:-1]
    group = starts.cumsum(0) - 1
    top = second[starts]  # the largest u_1 of each distinct u_0
    above = torch.cummax(top, 0).values
    best_before = torch.cat([above.new_full((1,), -torch.inf), above[:-1]])
    keep = (second == top[group]) & (second > best_before[group])
    mask = torch.empty_like(keep)
    mask[order] = keep
    return mask


def _non_dominated_chunks(u: Tensor) -> Tensor:
    # what dominates a point has a larger sum: sorted, most points fall to the first chunk of the best sums
    order = torch.argsort(u.sum(1), descending=True)
    ranked = u[order]
    alive = torch.ones(len(u), dtype=torch.bool, device=u.device)
    front = ranked[: min(64, len(u))]
    alive &= ~_dominates(front, ranked).any(0)
    left = alive.nonzero().squeeze(1)
    rows = max(1, _CHUNK_ELEMENTS // max(1, len(left)))
    candidates = ranked[left]
    beaten = torch.zeros(len(left), dtype=torch.bool, device=u.device)
    for start in range(0, len(left), rows):
        beaten |= _dominates(candidates[start : start + rows], candidates).any(0)
    alive[left[beaten]] = False
    mask = torch.empty_like(alive)
    mask[order] = alive
    return mask


class ParetoArchive:
    """What no object seen so far dominates, with its payload row; one objective keeps the best `capacity`.

    `add` takes u (n, d) and integer payloads (n, w). A payload enters once. With more than one objective the
    archive holds the non-dominated set; past `capacity` it keeps the members whose nearest neighbour, in ranks of
    the objectives, is farthest, ends first, so that the front stays covered. With one it is a top-k list.
    """

    def __init__(self, capacity: int = 1000) -> None:
        if capacity < 1:
            raise ValueError(f"expected capacity to be at least 1, got {capacity}")
        self.capacity = capacity
        self.u: np.ndarray | None = None
        self.payload: np.ndarray | None = None

    def __len__(self) -> int:
        return 0 if self.u is None else len(self.u)

    def add(self, u: np.ndarray, payload: np.ndarray) -> None:
        """Take in n objects. Raises `ValueError` on NaN, infinity, or rows that do not fit those held."""
        u, payload = np.asarray(u, dtype=np.float64), np.asarray(payload)
        check_objectives(u)
        if len(u) != len(payload):
            raise ValueError(f"expected as many payloads as objectives, got {len(payload)} and {len(u)}")
        if len(u) == 0:
            return
        if self.u is not None and self.payload is not None:
            if u.shape[1] != self.u.shape[1]:
                raise ValueError(f"expected {self.u.shape[1]} objectives as held, got {u.shape[1]}")
            u, payload = np.concatenate([self.u, u]), np.concatenate([self.payload, payload])
        _, first = np.unique(payload, axis=0, return_index=True)
        first.sort()
        u, payload = u[first], payload[first]
        if u.shape[1] == 1:
            keep = np.argsort(-u[:, 0], kind="stable")[: self.capacity]
        else:
            keep = non_dominated_mask(torch.from_numpy(u)).nonzero().squeeze(1).numpy()
            if len(keep) > self.capacity:
                keep = keep[_spread(u[keep], self.capacity)]
        self.u, self.payload = u[keep], payload[keep]


def _spread(u: np.ndarray, k: int) -> np.ndarray:
    """Indices of k points chosen farthest first, starting from the best of each objective.

    Distances are between ranks, an objective at a time: what is kept depends on the order alone.
    """
    points = np.stack([np.unique(column, return_inverse=True)[1] for column in u.T], 1).astype(np.float64)
    chosen = list(dict.fromkeys(np.argmax(points, axis=0).tolist()))[:k]
    distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in chosen], axis=0)
    while len(chosen) < k:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distance[chosen] = -1.0
    return np.sort(np.array(chosen))
