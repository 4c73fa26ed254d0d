"""Fragment trajectories the slow way: an object per state, masks and steps in Python, one at a time.

What `bench` holds the batched environment to where no peer can be installed; the network is the same.
"""

from __future__ import annotations

import random

import torch

from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.policies.base import Policy


class TreeState:
    """One tree: fragments by node, edges as [parent, child, stem at the parent or None, stem at the child or None]."""

    def __init__(self) -> None:
        self.fragments: list[int] = []
        self.edges: list[list] = []

    def legal(self, env: FragmentEnv) -> list[int]:
        """The numbers of the legal actions."""
        stems, found = env.vocabulary.stems, []
        if not self.fragments:
            return list(range(env.v))
        if len(self.fragments) < env.n:
            for node, fragment in enumerate(self.fragments):
                if sum(node in edge[:2] for edge in self.edges) < len(stems[fragment]):
                    found += [node * env.v + v for v in range(env.v)]
        complete = True
        for number, edge in enumerate(self.edges):
            for end in (0, 1):
                if edge[2 + end] is None:
                    complete = False
                    node = edge[end]
                    used = {other[2 + side] for other in self.edges for side in (0, 1) if other[side] == node}
                    first = env.first_set + number * 2 * env.k + end * env.k
                    found += [first + k for k in range(len(stems[self.fragments[node]])) if k not in used]
        return [*found, env.stop] if complete else found

    def take(self, env: FragmentEnv, action: int) -> None:
        """Change the tree by an action that is not stop."""
        if action < env.first_set:
            if self.fragments:
                self.edges.append([action // env.v, len(self.fragments), None, None])
            self.fragments.append(action % env.v)
        else:
            edge, rest = divmod(action - env.first_set, 2 * env.k)
            self.edges[edge][2 + rest // env.k] = rest % env.k

    def row(self, env: FragmentEnv) -> list[int]:
        """The state as the batched environment has it."""
        rest = env.n - len(self.fragments)
        parents, upper, lower = [env.n], [env.k], [env.k]
        for parent, _, a, b in self.edges:
            parents.append(parent)
            upper.append(env.k if a is None else a)
            lower.append(env.k if b is None else b)
        if not self.fragments:
            parents, upper, lower = [], [], []
        columns = [(self.fragments, env.v), (parents, env.n), (upper, env.k), (lower, env.k)]
        return [value for column, empty in columns for value in column + [empty] * rest]


@torch.no_grad()
def sample_per_state(env: FragmentEnv, policy: Policy, n: int, source: random.Random) -> list[TreeState]:
    """n trajectories; the network sees all alive states at once, all else is done state by state."""
    states = [TreeState() for _ in range(n)]
    alive = list(states)
    while alive:
        logits = policy(torch.tensor([state.row(env) for state in alive])).logits
        going = []
        for state, row in zip(alive, logits, strict=True):
            legal = state.legal(env)
            weights = torch.softmax(row[legal].double(), 0).tolist()
            action = source.choices(legal, weights)[0]
            if action != env.stop:
                state.take(env, action)
                going.append(state)
        alive = going
    return states
