"""The model's word on trajectories: log P_F, log P_B, flows; one packed pass of the network over all their states.

Everything is recomputed with the present weights, for fresh and replayed trajectories alike. States that are visited
several times are passed once, where they can be numbered; where the space is enumerated, its table is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.losses import TrajectoryScores
from isotone.opgfn.policies.base import Policy, PolicyOutput
from isotone.opgfn.rollout import Trajectories


@dataclass(frozen=True)
class Evaluation:
    """The network's output on `rows` of states, and where each visited state stands among them.

    `position` (B, T): the row of state t of each trajectory; 0 past the end.
    """

    env: Environment
    rows: Int[Tensor, "R width"]
    position: Int[Tensor, "B T"]
    trajectories: Trajectories
    output: PolicyOutput
    forward_mask: Bool[Tensor, "R actions"]
    backward_mask: Bool[Tensor, "R backward"]
    graph: StateGraph | None = None

    def log_pf(self) -> Float[Tensor, "R actions"]:
        """log P_F of every row, -inf where illegal."""
        return torch.log_softmax(self.output.logits.masked_fill(~self.forward_mask, -torch.inf), 1)

    def log_pb(self) -> Float[Tensor, "R backward"]:
        """log P_B of every row, learned or uniform; -1e9 where illegal, and in the source."""
        if self.output.backward_logits is None:
            uniform = -self.backward_mask.sum(1, keepdim=True).clamp(min=1).to(self.output.logits.dtype).log()
            return torch.where(self.backward_mask, uniform, -1e9)
        return torch.log_softmax(self.output.backward_logits.masked_fill(~self.backward_mask, -1e9), 1)

    def scores(self, log_pf: Tensor | None = None, idempotent: bool = False) -> TrajectoryScores:
        """What the losses take, in float64: sums over long trajectories cancel. `log_pf` as `self.log_pf()`.

        `idempotent`: the probability of an action is that of all actions to isomorphic children together, and a
        backward action's that of all to isomorphic parents (section 2.6).
        """
        batch = self.trajectories
        log_pf = self.log_pf() if log_pf is None else log_pf
        if idempotent:
            forward = _orbit_sum(log_pf, self.env.orbits(self.rows), self.position, batch.actions, batch.mask)
            ends, undo = self.position[:, 1:], batch.backward_actions[:, :-1].clamp(min=0)
            back = _orbit_sum(self.log_pb(), self.env.backward_orbits(self.rows), ends, undo, batch.mask[:, 1:])
            return self._scores(forward, back)
        forward = log_pf[self.position, batch.actions]
        if self.output.backward_logits is None:
            parents = self.backward_mask.sum(1).clamp(min=1).to(forward.dtype)
            back = -parents.log()[self.position[:, 1:]]
        else:
            back = self.log_pb()[self.position[:, 1:], batch.backward_actions[:, :-1].clamp(min=0)]
        return self._scores(forward, back)

    def _scores(self, forward: Tensor, back: Tensor) -> TrajectoryScores:
        batch, mask = self.trajectories, self.trajectories.mask
        backward = torch.cat([torch.where(mask[:, 1:], back, 0.0), forward.new_zeros(len(batch), 1)], 1)
        flow = self.output.log_flow
        return TrajectoryScores(
            torch.where(mask, forward, 0.0).double(),
            backward.double(),
            batch.lengths,
            None if flow is None else flow[self.position].double(),
        )

    def log_inter(self) -> Float[Tensor, "B T"]:
        """The forward-looking head along the trajectories."""
        if self.output.log_inter is None:
            raise ValueError("expected a policy with a forward-looking head for this loss, got one without")
        return self.output.log_inter[self.position].double()


def _orbit_sum(log_p: Tensor, orbits: Tensor, position: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """log of the summed probability of the actions in the orbit of each taken one, zero where masked out."""
    rows, taken = position[mask], actions[mask]
    same = orbits[rows] == orbits[rows, taken][:, None]
    summed = torch.logsumexp(log_p[rows].masked_fill(~same, -torch.inf), 1)
    return summed.new_zeros(mask.shape).masked_scatter(mask, summed)


def evaluate(
    env: Environment,
    policy: Policy,
    batch: Trajectories,
    condition: Float[Tensor, "B c"] | None = None,
    graph: StateGraph | None = None,
    output: PolicyOutput | None = None,
) -> Evaluation:
    """One pass of the network over all states of `batch`, or over the table of `graph`: `output`, if it is there."""
    if graph is not None and condition is None:
        ids = batch.ids if batch.ids is not None else graph.index(batch.states[batch.mask])
        if batch.ids is None:
            position = torch.zeros(batch.actions.shape, dtype=torch.int64)
            position[batch.mask] = ids
        else:
            position = torch.where(batch.mask, ids, 0)
        masks = graph.forward_mask, graph.backward_mask
        found = policy(graph.states) if output is None else output
        return Evaluation(env, graph.states, position, batch, found, *masks, graph)
    mask = batch.mask
    rows = batch.states[mask]
    position = torch.zeros(mask.shape, dtype=torch.int64, device=rows.device)
    place = torch.arange(len(rows), device=rows.device)
    if condition is None and env.has_keys:
        # a state that several trajectories visit is seen by the network once
        distinct, inverse = torch.unique(env.row_keys(rows), return_inverse=True)
        rows, place = rows[torch.empty_like(distinct).scatter_(0, inverse, place)], inverse
    position[mask] = place
    given = None if condition is None else condition[:, None].expand(-1, mask.shape[1], -1)[mask]
    output = policy(rows) if given is None else policy(rows, given)
    return Evaluation(env, rows, position, batch, output, env.forward_mask(rows), env.backward_mask(rows))


def edge_flows(
    evaluation: Evaluation, policy: Policy, condition: Float[Tensor, "B c"] | None = None
) -> tuple[Float[Tensor, " states"], Float[Tensor, " states"], Float[Tensor, " B"]]:
    """For flow matching, with logits as log edge flows: logsumexp of the flows into and out of each visited state
    but the source, and the log flow of each trajectory's stop edge; in float64."""
    batch, logits = evaluation.trajectories, evaluation.output.logits.double()
    visited = batch.mask.clone()
    visited[:, 0] = False
    rows = evaluation.position[visited]
    out = torch.logsumexp(logits.masked_fill(~evaluation.forward_mask, -torch.inf), 1)
    graph = evaluation.graph
    if graph is not None:
        legal = evaluation.backward_mask[rows]
        into = logits[graph.parent[rows].clamp(min=0), graph.redo[rows].clamp(min=0)]
    else:
        legal = evaluation.backward_mask[rows]
        row, action = legal.nonzero().T
        parents, redo = evaluation.env.backward_step(evaluation.rows[rows[row]], action)
        given = None
        if condition is not None:
            owner = torch.arange(len(batch), device=rows.device)[:, None].expand_as(batch.mask)[visited]
            given = condition[owner[row]]
        output = policy(parents) if given is None else policy(parents, given)
        flows = output.logits.double().gather(1, redo[:, None]).squeeze(1)
        into = logits.new_zeros(legal.shape).index_put((row, action), flows)
    log_in = torch.logsumexp(into.masked_fill(~legal, -torch.inf), 1)
    last = evaluation.position.gather(1, (batch.lengths - 1)[:, None]).squeeze(1)
    return log_in, out[rows], logits[last, evaluation.env.stop]
