"""Order-preserving losses: a learned reward fitted to comparisons alone (section 2.2).

The GFlowNet itself defines a log-reward r = log R-hat for each terminal object. A label distribution says which
objects of a batch are better, and the loss is the cross-entropy of softmax(r) with it. It is unchanged by r + c
and by any strictly increasing map of the objectives. Cost: O(B) for pairs, O(B^2 d) for Pareto labels.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.checks import check_log_rewards, check_objectives, check_same_device
from isotone.opgfn.pareto import nd_rank, non_dominated_mask

LABELS = ("pairwise", "all-pairs", "pareto", "buffer", "rank", "bce", "pair-balanced")
_PAIRS = ("pairwise", "all-pairs", "pair-balanced")
_BALANCED_PAIRS = 64


def order_preserving_loss(
    log_r: Float[Tensor, "*_"],
    u: Float[Tensor, "*_"] | None = None,
    *,
    mode: str = "pairwise",
    better: Bool[Tensor, "*_"] | None = None,
    pairs: Int[Tensor, "*_"] | None = None,
    reference: Float[Tensor, "m d"] | None = None,
    valid: Bool[Tensor, " batch"] | None = None,
    tie_tol: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """L_OP of predicted log-rewards `log_r` (batch,) against the order of `u` (batch, d) or (batch,), maximised, or
    against `better` (batch, batch).

    `mode`: "pairwise" (one random partner each, or `pairs` (2, m)), "all-pairs", "pareto" (the batch's non-dominated
    members), "buffer" (those that nothing in `reference` dominates either), "rank" (softmax over the ranks of
    non-dominated sorting of batch and `reference`), "bce" (each object's own logistic loss), "pair-balanced"
    (64 random unequal and 64 random equal pairs). `better[i, j]` says that object i is preferred to j, where
    there are comparisons and no values: then `u` is None. `valid`: invalid objects lose to every valid one.
    `tie_tol`: of pairs, values this close count as equal; above 0 it gives up the invariance to increasing maps.

    Raises `ValueError` on a batch below 2, NaN, infinity, another shape, devices that differ, an unknown mode.
    """
    if mode not in LABELS:
        raise ValueError(f"expected mode to be one of {', '.join(LABELS)}, got {mode!r}")
    if (u is None) == (better is None):
        raise ValueError(
            "expected either objectives u or the matrix better, got " + ("both" if better is not None else "none")
        )
    check_same_device(log_r=log_r, u=u, better=better, reference=reference, valid=valid)
    if u is not None:
        u = u[:, None] if u.ndim == 1 else u
        check_objectives(u)
    rows = len(u if u is not None else better)  # type: ignore[arg-type]
    check_log_rewards(log_r, rows)
    if not 0 <= tie_tol < math.inf or (tie_tol and mode not in _PAIRS):
        raise ValueError(f"expected a finite tie_tol of at least 0, and 0 but for pairs, got {tie_tol} for {mode!r}")
    if valid is not None and tuple(valid.shape) != (rows,):
        raise ValueError(f"expected a flag valid for each of {rows} objects, got shape {tuple(valid.shape)}")
    if reference is not None and u is not None and (reference.ndim != 2 or reference.shape[1] != u.shape[1]):
        raise ValueError(f"expected a reference of {u.shape[1]} objectives, got shape {tuple(reference.shape)}")
    if better is not None and better.dtype != torch.bool:
        raise ValueError(f"expected booleans in better, got {better.dtype}")
    if better is not None and bool(better.diagonal().any()):
        raise ValueError("expected better to say > and not >=, got objects better than themselves")
    if pairs is not None and (pairs.is_floating_point() or pairs.dtype == torch.bool):
        raise ValueError(f"expected pairs of whole numbers, got {pairs.dtype}")
    if mode in _PAIRS:
        return _pair_loss(log_r, u, better, mode, pairs, valid, tie_tol, generator)
    if mode == "rank":
        return cross_entropy(log_r, rank_label(_needs_values(u, mode), reference, valid))
    if mode == "buffer":
        flags = buffer_label(_needs_values(u, mode), reference, valid)
    else:
        flags = pareto_label(u, better, valid)
    if mode == "bce":
        return F.binary_cross_entropy_with_logits(log_r, flags.to(log_r.dtype))
    if bool(flags.all()):
        warnings.warn("all objects of the batch are tied: the target is uniform", stacklevel=2)
    return cross_entropy(log_r, flags)


def cross_entropy(log_r: Float[Tensor, " batch"], label: Tensor) -> Float[Tensor, ""]:
    """-sum_i p_i log softmax(r)_i with p = label / sum(label): KL(p || softmax(r)) up to p's entropy."""
    weights = label.to(log_r.dtype)
    return -(weights / weights.sum() * torch.log_softmax(log_r, 0)).sum()


def pareto_label(
    u: Float[Tensor, "batch d"] | None,
    better: Bool[Tensor, "batch batch"] | None = None,
    valid: Bool[Tensor, " batch"] | None = None,
) -> Bool[Tensor, " batch"]:
    """q_i: no object of the batch is better than object i (equation of section 2.2 b; equal ones all count)."""
    if better is None:
        assert u is not None
        return non_dominated_mask(u, valid)
    beaten = _with_invalid(better, valid).any(0)
    # preferences may run in a circle, in which nothing stands: then nothing is said
    return ~beaten if not bool(beaten.all()) else torch.ones_like(beaten)


def buffer_label(
    u: Float[Tensor, "batch d"],
    reference: Float[Tensor, "m d"] | None,
    valid: Bool[Tensor, " batch"] | None = None,
) -> Bool[Tensor, " batch"]:
    """Members of the batch that neither the batch nor `reference` dominates; where none is, the batch's own front."""
    own = non_dominated_mask(u, valid)
    if reference is None or len(reference) == 0:
        return own
    both = torch.cat([u, reference.to(u)])
    everyone = None if valid is None else torch.cat([valid, valid.new_ones(len(reference))])
    joint = non_dominated_mask(both, everyone)[: len(u)]
    return joint if bool(joint.any()) else own


def rank_label(
    u: Float[Tensor, "batch d"],
    reference: Float[Tensor, "m d"] | None = None,
    valid: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """softmax(-rank) over the batch, ranks of non-dominated sorting of batch and `reference` (global order)."""
    both, everyone = u, valid
    if reference is not None and len(reference):
        both = torch.cat([u, reference.to(u)])
        everyone = None if valid is None else torch.cat([valid, valid.new_ones(len(reference))])
    rank = nd_rank(both, everyone)[: len(u)]
    return torch.softmax(-rank.to(torch.float64), 0)


def random_pairs(
    n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Int[Tensor, "2 n"]:
    """Each object with its image under a random permutation (section 2.2 a)."""
    partner = torch.randperm(n, generator=generator, device="cpu" if generator is None else generator.device)
    return torch.stack([torch.arange(n, device=partner.device), partner]).to(device)


def pair_targets(
    u: Float[Tensor, "batch d"] | None,
    better: Bool[Tensor, "batch batch"] | None,
    pairs: Int[Tensor, "2 pairs"],
    valid: Bool[Tensor, " batch"] | None = None,
    tie_tol: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """y: 1 where the first of a pair is better, 0 where the second is, 1/2 where neither (tied or incomparable)."""
    left, right = pairs
    if better is not None:
        matrix = _with_invalid(better, valid)
        wins, losses = matrix[left, right], matrix[right, left]
    else:
        assert u is not None
        above, below = u[left] - tie_tol > u[right], u[right] - tie_tol > u[left]
        wins, losses = above.any(1) & ~below.any(1), below.any(1) & ~above.any(1)
        if valid is not None:
            first, second = valid[left], valid[right]
            both = first & second
            wins, losses = (wins & both) | (first & ~second), (losses & both) | (second & ~first)
    return 0.5 + 0.5 * wins.double() - 0.5 * losses.double()


def _pair_loss(
    log_r: Tensor,
    u: Tensor | None,
    better: Tensor | None,
    mode: str,
    pairs: Tensor | None,
    valid: Tensor | None,
    tie_tol: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean of BCE-with-logits(r_i - r_j, y_ij): Bradley-Terry, the batch form of two objects."""
    n = len(log_r)
    if pairs is not None:
        if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.shape[1] == 0:
            raise ValueError(f"expected pairs of shape (2, pairs), got {tuple(pairs.shape)}")
        if int(pairs.min()) < 0 or int(pairs.max()) >= n:
            raise ValueError(
                f"expected pairs of indices from 0 to {n - 1}, got {int(pairs.min())} to {int(pairs.max())}"
            )
    elif mode == "pairwise":
        pairs = random_pairs(n, generator, log_r.device)
    else:
        pairs = torch.triu_indices(n, n, 1, device=log_r.device)
    targets = pair_targets(u, better, pairs, valid, tie_tol)
    if mode == "pair-balanced":
        # each kind is drawn with replacement, so that the batch says as much of ties as of order
        drawn = []
        for kind in (targets != 0.5, targets == 0.5):
            found = kind.nonzero().squeeze(1)
            if len(found):
                device = "cpu" if generator is None else generator.device
                pick = torch.randint(len(found), (_BALANCED_PAIRS,), generator=generator, device=device)
                drawn.append(found[pick.to(found.device)])
        chosen = torch.cat(drawn)
        pairs, targets = pairs[:, chosen], targets[chosen]
    return F.binary_cross_entropy_with_logits(log_r[pairs[0]] - log_r[pairs[1]], targets.to(log_r.dtype))


def _with_invalid(better: Tensor, valid: Tensor | None) -> Tensor:
    if better.ndim != 2 or better.shape[0] != better.shape[1]:
        raise ValueError(f"expected better of shape (batch, batch), got {tuple(better.shape)}")
    if valid is None:
        return better
    return (better & valid[:, None] & valid[None, :]) | (valid[:, None] & ~valid[None, :])


def _needs_values(u: Tensor | None, mode: str) -> Tensor:
    if u is None:
        raise ValueError(
            f"expected objectives for mode {mode!r}, got comparisons: use pairwise, all-pairs, pareto or bce"
        )
    return u
