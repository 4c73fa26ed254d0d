"""Enumerable spaces: every state numbered, the network evaluated once as a table, exact distributions by dynamic
programming in float64.

Cost: enumeration O(states x actions); the terminal distribution O(states x actions), level by level.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment
from isotone.opgfn.rollout import Trajectories, cumulative, draw, masked_probabilities, uniforms

DEFAULT_LIMIT = 2_000_000


class StateGraph:
    """All states of an environment by levels, with tables of their children and parents.

    `states` (S, width), the source first; `levels`: the first number of each level, and S. `child` (S, actions):
    the child's number, -1 where illegal or stop; `parent`, `redo` (S, backward): the parent's number and the forward
    action that comes back. Raises `ValueError` past `limit` states.

    Rows that mean the same (isomorphic trees) are one state, which one of them stands for. Several of its actions may
    then lead to one child, and several backward actions to one parent: exact distributions and flows are those of the
    classes, for policies that treat isomorphic rows alike.
    """

    def __init__(self, env: Environment, limit: int = DEFAULT_LIMIT) -> None:
        self.env = env
        level = env.reset(1)
        states, levels, children, undone = [level], [0, 1], [], []
        while len(level):
            mask = env.forward_mask(level)
            mask[:, env.stop] = False
            source, action = mask.nonzero().T
            reached, undo = env.step(level[source], action)
            keys, number = torch.unique(env.keys(reached), return_inverse=True)
            first = torch.full((len(keys),), len(number)).scatter_reduce(
                0, number, torch.arange(len(number)), "amin", include_self=True
            )
            child = level.new_full((len(level), env.num_actions), -1)
            child[source, action] = levels[-1] + number
            back = level.new_full((len(level), env.num_actions), -1)
            back[source, action] = undo
            children.append(child)
            undone.append(back)
            level = reached[first] if len(source) else level[:0]
            if levels[-1] + len(level) > limit:
                raise ValueError(f"expected at most {limit} states to enumerate, got more")
            if len(level):
                states.append(level)
                levels.append(levels[-1] + len(level))
        self.states = torch.cat(states)
        self.levels = levels
        self.child = torch.cat(children)
        undo_table = torch.cat(undone)
        self.forward_mask = env.forward_mask(self.states)
        self.backward_mask = env.backward_mask(self.states)
        self.terminal = self.forward_mask[:, env.stop]
        self.parent = self.states.new_full((len(self.states), env.num_backward_actions), -1)
        self.redo = torch.full_like(self.parent, -1)
        source, action = (self.child >= 0).nonzero().T
        place = (self.child[source, action], undo_table[source, action])
        self.parent[place], self.redo[place] = source, action
        self.undo = undo_table
        keys, self._by_key = torch.sort(env.keys(self.states))
        self._keys = keys
        self.merged = type(env).keys is not Environment.keys
        if self.merged:
            self._by_classes()

    def _by_classes(self) -> None:
        """`parent`, `redo` and `undo` between the rows that stand for their classes, and how many actions share an
        edge: what a step says of its own row holds of another row of the class only up to the order of nodes."""
        row, back = self.backward_mask.nonzero().T
        parents, _ = self.env.backward_step(self.states[row], back)
        above = self.index(parents)
        source, action = (self.child >= 0).nonzero().T
        ahead = source * len(self) + self.child[source, action]
        behind = above * len(self) + row
        edges, forward, self._ways = torch.unique(ahead, return_inverse=True, return_counts=True)
        backward = torch.searchsorted(edges, behind).clamp(max=len(edges) - 1)
        if not torch.equal(edges[backward], behind) or len(torch.unique(backward)) != len(edges):
            raise ValueError("expected every edge of the states in both directions, got one in one")
        first = torch.full((len(edges),), self.env.num_actions).scatter_reduce(0, forward, action, "amin")
        last = torch.full((len(edges),), self.env.num_backward_actions).scatter_reduce(0, backward, back, "amin")
        self.parent[row, back], self.redo[row, back] = above, first[backward]
        self.undo[source, action] = last[forward]
        self._forward_edge = torch.full_like(self.child, -1)
        self._forward_edge[source, action] = forward
        self._backward_edge = row, back, backward

    def _log_back(self, log_pb: Float[Tensor, "S backward"]) -> Float[Tensor, "S actions"]:
        """log P_B of each forward action's edge: where several actions share one, each has its share."""
        on = self.child >= 0
        found = torch.full(self.child.shape, -torch.inf, dtype=torch.float64)
        if not self.merged:
            found[on] = log_pb[self.child[on], self.undo[on]]
            return found
        row, back, edge = self._backward_edge
        total = torch.zeros(len(self._ways), dtype=torch.float64).index_add(0, edge, log_pb[row, back].exp())
        found[on] = (total / self._ways).log()[self._forward_edge[on]]
        return found

    def __len__(self) -> int:
        return len(self.states)

    def index(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """The numbers of given states. Raises `ValueError` naming one that can not be reached."""
        keys = self.env.keys(states)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        missing = self._keys[place] != keys
        if bool(missing.any()):
            raise ValueError(f"expected a reachable state, got {states[int(missing.nonzero()[0])].tolist()}")
        return self._by_key[place]

    # --- exact distributions -------------------------------------------------------------------------------

    def terminal_distribution(self, logits: Float[Tensor, "S actions"]) -> Float[Tensor, " S"]:
        """P(x): the chance that a trajectory of the policy ends in each state, in float64 (0 where not terminal)."""
        reach, probabilities = self.visits(logits)
        return reach * probabilities[:, self.env.stop]

    def visits(self, logits: Float[Tensor, "S actions"]) -> tuple[Float[Tensor, " S"], Float[Tensor, "S actions"]]:
        """The chance to pass through each state, and the policy's probabilities, in float64."""
        probabilities = masked_probabilities(logits, self.forward_mask)
        reach = torch.zeros(len(self), dtype=torch.float64)
        reach[0] = 1.0
        for first, last in zip(self.levels, self.levels[1:], strict=False):
            child = self.child[first:last]
            flow = reach[first:last, None] * probabilities[first:last]
            on = child >= 0
            reach = reach.index_add(0, child[on], flow[on])
        return reach, probabilities

    def exact_flows(
        self, log_reward: Float[Tensor, " S"], backward_logits: Float[Tensor, "S backward"] | None = None
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, "S actions"]]:
        """log F(s) and log F(s -> s') of the one flow with rewards exp(log_reward) and P_B (uniform by default).

        Stop's edge carries log R(x). The log edge flows are the logits of the exact forward policy; log F(s_0) is
        log Z.
        """
        if backward_logits is None:
            backward_logits = torch.zeros(self.backward_mask.shape, dtype=torch.float64)
        legal = backward_logits.double().masked_fill(~self.backward_mask, -torch.inf)
        log_pb = torch.where(self.backward_mask, torch.log_softmax(legal, 1), -torch.inf)
        log_flow = torch.full((len(self),), -torch.inf, dtype=torch.float64)
        edges = torch.full(self.child.shape, -torch.inf, dtype=torch.float64)
        ends = torch.where(self.terminal, log_reward.double(), -torch.inf)
        log_back = self._log_back(log_pb)
        for first, last in reversed(list(zip(self.levels, self.levels[1:], strict=False))):
            child = self.child[first:last]
            on = child >= 0
            block = edges[first:last]
            block[on] = log_flow[child[on]] + log_back[first:last][on]
            block[:, self.env.stop] = ends[first:last]
            log_flow[first:last] = torch.logsumexp(block, 1)
        return log_flow, edges

    # --- sampling by table -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_forward(
        self,
        logits: Float[Tensor, "S actions"],
        n: int,
        *,
        epsilon: float = 0.0,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        """As `rollout.sample_forward`, from the table of all logits: a lookup a step, no network."""
        cdf = cumulative(masked_probabilities(logits, self.forward_mask, epsilon, temperature))
        length, stop = self.env.max_length, self.env.stop
        numbers = uniforms(length, n, generator, "cpu")
        # stop is given a child, the state itself, so that those done stay where they are
        child = self.child.clone()
        child[:, stop] = torch.arange(len(self))
        ids, actions, current = [], [], torch.zeros(n, dtype=torch.int64)
        done = torch.zeros(n, dtype=torch.bool)
        lengths = torch.zeros(n, dtype=torch.int64)
        for t in range(length):
            chosen = draw(cdf[current], numbers[t])
            chosen[done] = stop
            lengths += ~done
            ids.append(current)
            actions.append(chosen)
            current = child[current, chosen]
            done = done | (chosen == stop)
            if t % 4 == 3 and bool(done.all()):
                break
        longest = int(lengths.max())
        return self._trajectories(torch.stack(ids[:longest], 1), torch.stack(actions[:longest], 1), lengths)

    @torch.no_grad()
    def sample_backward(
        self,
        terminals: Int[Tensor, " B"],
        backward_logits: Float[Tensor, "S backward"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        """As `rollout.sample_backward`, of states by number."""
        scores = torch.zeros(self.backward_mask.shape) if backward_logits is None else backward_logits
        mask = self.backward_mask.clone()
        mask[0, 0] = True  # the source's row is never used; a legal entry keeps it from being NaN
        cdf = cumulative(masked_probabilities(scores, mask))
        n, length = len(terminals), self.env.max_length
        numbers = uniforms(length, n, generator, "cpu")
        current = terminals
        ids = [current]
        actions = [torch.full((n,), self.env.stop)]
        lengths = torch.ones(n, dtype=torch.int64)
        for k in range(1, length):
            going = current != 0
            if not bool(going.any()):
                break
            chosen = draw(cdf[current], numbers[k])
            actions.append(self.redo[current, chosen])
            current = torch.where(going, self.parent[current, chosen], 0)
            ids.append(current)
            lengths += going
        longest = int(lengths.max())
        back = (lengths[:, None] - 1 - torch.arange(longest)).clamp(min=0)
        walk, redone = torch.stack(ids, 1), torch.stack(actions, 1)
        return self._trajectories(walk.gather(1, back), redone.gather(1, back), lengths)

    def _trajectories(self, ids: Tensor, actions: Tensor, lengths: Tensor) -> Trajectories:
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        actions = torch.where(inside, actions, self.env.stop)
        return Trajectories(self.states[ids], actions, self.undo[ids, actions], lengths, ids)


def entropy(distribution: Float[Tensor, " S"]) -> float:
    """Entropy in nats."""
    return float(torch.special.entr(distribution).sum())


def reward_distribution(graph: StateGraph, log_reward: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """R(x) / Z over the terminal states."""
    return torch.softmax(torch.where(graph.terminal, log_reward.double(), -torch.inf), 0)


def mass_on(distribution: Float[Tensor, " S"], members: Bool[Tensor, " S"]) -> float:
    """The chance of an object in `members`."""
    return float(distribution[members].sum())
