"""The balance conditions of GFlowNets, with a reward or with an order in its place (section 2.3).

Legend: B trajectories, T the longest number of actions, the last action of each being stop (its log P_B is 0).
A trajectory of n actions visits s_0 ... s_{n-1} = x and then the sink; entry t of `log_flow` is log F(s_t).
Everything past a trajectory's length is ignored.

Trajectory balance ties the learned reward to the policy, so that L_OP on `log_reward_tb` is a loss by itself. The
others fit flows on the edges between states, and L_OP on the flow predicted into the sink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.distributed import mean_count
from isotone.opgfn.order import order_preserving_loss, random_pairs

__all__ = [
    "FLSubTB",
    "TrajectoryScores",
    "backward_kl",
    "db_loss",
    "fm_loss",
    "log_reward_tb",
    "op_db_loss",
    "op_fm_loss",
    "op_subtb_loss",
    "op_tb_loss",
    "order_preserving_loss",
    "subtb_loss",
    "tb_loss",
]

Order = Callable[[Tensor, Tensor], Tensor]
"""L_OP: predicted log-rewards (m,) and the indices (m,) of the trajectories they belong to, to a scalar."""


@dataclass(frozen=True)
class TrajectoryScores:
    """What the model says along B trajectories: log P_F and log P_B of each action, log F of the state it leaves."""

    log_pf: Float[Tensor, "B T"]
    log_pb: Float[Tensor, "*_"]
    lengths: Int[Tensor, " B"]
    log_flow: Float[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        if self.log_pf.shape != self.log_pb.shape:
            raise ValueError(f"expected log_pf and log_pb alike, got {self.log_pf.shape} and {self.log_pb.shape}")

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """Which entries are actions."""
        steps = torch.arange(self.log_pf.shape[1], device=self.log_pf.device)
        return steps < self.lengths[:, None]

    def flows(self) -> Float[Tensor, "B T"]:
        """log F, zero past the end. Raises `ValueError` where the policy has no flow head."""
        if self.log_flow is None:
            raise ValueError("expected a policy with state flows for this loss, got one without")
        return torch.where(self.mask, self.log_flow, 0.0)

    def ratio(self) -> Float[Tensor, "B T"]:
        """log P_F - log P_B of each action, zero past the end."""
        return torch.where(self.mask, self.log_pf - self.log_pb, 0.0)


# --- trajectory balance -------------------------------------------------------------------------------------


def log_reward_tb(scores: TrajectoryScores, log_z: Tensor) -> Float[Tensor, " B"]:
    """log R-hat(tau) = log Z + sum log P_F - sum log P_B (section 2.1)."""
    return log_z + scores.ratio().sum(1)


def tb_loss(scores: TrajectoryScores, log_z: Tensor, log_reward: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Mean squared trajectory-balance residual against a reward."""
    return (log_reward_tb(scores, log_z) - log_reward).square().mean()


def op_tb_loss(scores: TrajectoryScores, log_z: Tensor, order: Order) -> Float[Tensor, ""]:
    """L_OP of the learned trajectory reward; log Z gets no gradient, since softmax does not see it."""
    r = log_reward_tb(scores, log_z)
    return order(r, torch.arange(len(r), device=r.device))


# --- detailed balance ---------------------------------------------------------------------------------------


def _edge_residuals(scores: TrajectoryScores) -> tuple[Tensor, Tensor]:
    """log F(s) + log P_F - log F(s') - log P_B of the edges between states, and which entries those are."""
    flow = scores.flows()
    edges = scores.mask[:, 1:]  # action t is an edge between states iff there is an action t + 1
    residual = flow[:, :-1] + scores.ratio()[:, :-1] - flow[:, 1:]
    return torch.where(edges, residual, 0.0), edges


def _terminal_flow(scores: TrajectoryScores) -> Tensor:
    """log F(x) + log P_F(stop | x): the flow predicted into the sink."""
    last = (scores.lengths - 1)[:, None]
    return (scores.flows() + scores.ratio()).gather(1, last).squeeze(1)


def db_loss(scores: TrajectoryScores, log_reward: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Mean squared detailed-balance residual over all edges, the terminal ones against the reward."""
    residual, edges = _edge_residuals(scores)
    terminal = _terminal_flow(scores) - log_reward
    return (residual.square().sum() + terminal.square().sum()) / mean_count(edges.sum() + len(terminal))


def op_db_loss(scores: TrajectoryScores, order: Order, lambda_op: float = 0.1) -> Float[Tensor, ""]:
    """Mean squared residual of the edges between states + lambda_OP L_OP of the terminal flow."""
    residual, edges = _edge_residuals(scores)
    terminal = _terminal_flow(scores)
    balance = residual.square().sum() / mean_count(edges.sum())
    return balance + lambda_op * order(terminal, torch.arange(len(terminal), device=terminal.device))


# --- flow matching ------------------------------------------------------------------------------------------


def _flow_residuals(log_in: Tensor, log_out: Tensor) -> Tensor:
    if log_in.shape != log_out.shape:
        raise ValueError(f"expected in-flow and out-flow of the same states, got {log_in.shape} and {log_out.shape}")
    return log_in - log_out


def fm_loss(
    log_in: Float[Tensor, " states"],
    log_out: Float[Tensor, "*_"],
    terminal: Float[Tensor, " B"],
    log_reward: Float[Tensor, " B"],
) -> Float[Tensor, ""]:
    """Mean squared flow-matching residual of interior states, and of the terminal edges against the reward.

    `log_in`, `log_out`: logsumexp of the log edge flows into and out of each interior state.
    """
    residual, end = _flow_residuals(log_in, log_out), terminal - log_reward
    return (residual.square().sum() + end.square().sum()) / mean_count(residual.new_tensor(len(residual) + len(end)))


def op_fm_loss(
    log_in: Float[Tensor, " states"],
    log_out: Float[Tensor, "*_"],
    terminal: Float[Tensor, " B"],
    order: Order,
    lambda_op: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean squared residual of interior states + lambda_OP L_OP of the log terminal edge flows."""
    residual = _flow_residuals(log_in, log_out)
    balance = residual.square().sum() / mean_count(residual.new_tensor(len(residual)))
    return balance + lambda_op * order(terminal, torch.arange(len(terminal), device=terminal.device))


# --- subtrajectory balance ----------------------------------------------------------------------------------


def _potential(scores: TrajectoryScores, flow: Tensor) -> tuple[Tensor, Tensor]:
    """A_t = log F(s_t) - C_t with C_t = sum_{<t} (log P_F - log P_B), and C of the whole trajectory.

    The residual of the subtrajectory from s_m to s_n is A_m - A_n: every one is a difference of two numbers.
    """
    cumulative = scores.ratio().cumsum(1)
    before = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], 1)
    return flow - before, cumulative[:, -1]


def subtb_loss(scores: TrajectoryScores, log_reward: Float[Tensor, " B"], lam: float = 0.9) -> Float[Tensor, ""]:
    """SubTB(lambda): squared residuals of all subtrajectories, those into the sink against the reward.

    Each trajectory's subtrajectories are weighted by lam^length, normalised over the trajectory.
    """
    _check_lambda(lam)
    start, total = _potential(scores, scores.flows())
    end = log_reward - total
    # nodes 0 .. n-1 are states and n is the sink, which stands at index `length`
    nodes = torch.cat([start, torch.zeros_like(end[:, None])], 1)
    nodes = nodes.scatter(1, scores.lengths[:, None], end[:, None])
    steps = torch.arange(nodes.shape[1], device=nodes.device)
    gap = (steps[None, :] - steps[:, None]).clamp(min=0)
    inside = (gap > 0)[None] & (steps <= scores.lengths[:, None])[:, None, :]
    weights = torch.where(inside, float(lam) ** gap.to(nodes.dtype), 0.0)
    residual = nodes[:, :, None] - nodes[:, None, :]
    return ((weights * residual.square()).sum((1, 2)) / weights.sum((1, 2))).mean()


def op_subtb_loss(
    scores: TrajectoryScores, order: Order, lambda_op: float = 0.1, lam: float = 0.9
) -> Float[Tensor, ""]:
    """sum_k w_k (mean squared residual of the non-terminal subtrajectories of length k + lambda_OP L_OP of the
    terminal log-rewards that those of length k predict), with w_k = (1 - lam) lam^(k-1) / (1 - lam^L).

    A length at which fewer than two trajectories end says nothing of order, and its L_OP is left out.
    """
    _check_lambda(lam)
    flow = scores.flows()
    start, total = _potential(scores, flow)
    mask, longest = scores.mask, int(scores.lengths.max())
    weights = _length_weights(longest, lam, start)
    loss = start.new_zeros(())
    for k in range(1, longest + 1):
        inside = mask[:, k:]
        if inside.shape[1]:
            residual = torch.where(inside, start[:, : start.shape[1] - k] - start[:, k:], 0.0)
            loss = loss + weights[k - 1] * residual.square().sum() / inside.sum().clamp(min=1)
        members = (scores.lengths >= k).nonzero().squeeze(1)
        if len(members) >= 2:
            first = (scores.lengths[members] - k)[:, None]
            predicted = start[members].gather(1, first).squeeze(1) + total[members]
            loss = loss + lambda_op * weights[k - 1] * order(predicted, members)
    return loss


def _length_weights(longest: int, lam: float, like: Tensor) -> Tensor:
    powers = float(lam) ** torch.arange(longest, device=like.device, dtype=like.dtype)
    return powers / powers.sum()


def _check_lambda(lam: float) -> None:
    if not 0 < lam <= 1:
        raise ValueError(f"expected lam above 0 and at most 1, got {lam}")


@dataclass(frozen=True)
class FLSubTB:
    """Forward-looking SubTB: log F(s) = log F~(s) + log R-inter(s), where R-inter is a learned reward of partial
    objects, fitted by L_OP to the order of the differences u(s') - u(s) along subtrajectories (section 2.3).

    `max_length`: the longest subtrajectory; 1 is forward-looking detailed balance.
    """

    lam: float = 0.9
    lambda_op: float = 0.1
    max_length: int | None = None
    label: str = "pairwise"

    def __call__(
        self,
        scores: TrajectoryScores,
        log_inter: Float[Tensor, "B T"],
        u: Float[Tensor, "B T d"],
        order: Order,
        known: Bool[Tensor, "B T"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """`scores.log_flow` is log F~, `log_inter` log R-inter, `u` the objectives of the visited states.

        `known`: states whose partial object has objectives; the others give no differences. `order`: the L_OP of
        terminal rewards.
        """
        _check_lambda(self.lam)
        mask = scores.mask
        known = mask if known is None else mask & known
        start, total = _potential(scores, scores.flows() + torch.where(mask, log_inter, 0.0))
        longest = int(scores.lengths.max())
        if self.max_length is not None:
            longest = min(longest, self.max_length)
        weights = _length_weights(longest, self.lam, start)
        loss = start.new_zeros(())
        for k in range(1, longest + 1):
            inside = mask[:, k:]
            width = start.shape[1] - k
            if width > 0:
                residual = torch.where(inside, start[:, :width] - start[:, k:], 0.0)
                loss = loss + weights[k - 1] * residual.square().sum() / inside.sum().clamp(min=1)
                both = known[:, :width] & known[:, k:]
                rise, gain = (log_inter[:, k:] - log_inter[:, :width])[both], (u[:, k:] - u[:, :width])[both]
                loss = loss + self.lambda_op * weights[k - 1] * self._differences(rise, gain, generator)
            members = (scores.lengths >= k).nonzero().squeeze(1)
            if len(members) >= 2:
                first = (scores.lengths[members] - k)[:, None]
                predicted = start[members].gather(1, first).squeeze(1) + total[members]
                loss = loss + self.lambda_op * weights[k - 1] * order(predicted, members)
        return loss

    def _differences(self, rise: Tensor, gain: Tensor, generator: torch.Generator | None) -> Tensor:
        if len(rise) < 2:
            return rise.new_zeros(())
        if self.label == "pairwise":
            return order_preserving_loss(rise, gain, pairs=random_pairs(len(rise), generator, rise.device))
        return order_preserving_loss(rise, gain, mode=self.label, generator=generator)


# --- the backward policy ------------------------------------------------------------------------------------


def backward_kl(log_pb: Float[Tensor, "states actions"], legal: Bool[Tensor, "states actions"]) -> Float[Tensor, ""]:
    """E_s KL(uniform over the parents of s || P_B(. | s)); log P_B is clamped at -50, where it is illegal unused."""
    count = legal.sum(1)
    interior = count > 0
    log_pb, legal, count = log_pb[interior], legal[interior], count[interior]
    cross = -torch.where(legal, log_pb.clamp(min=-50.0), 0.0).sum(1) / count
    return (cross - count.to(log_pb.dtype).log()).sum() / mean_count(interior.sum())
