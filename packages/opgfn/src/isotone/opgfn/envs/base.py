"""What an environment is: rows of integers, and what may be done to them, for a whole batch at once.

A state is a row of `width` integers, a batch of states an integer tensor (B, width); there is no object per state.
Actions are numbered 0 .. num_actions - 1 and `stop`, always the last one, ends a trajectory: the state it stops in
is the terminal object x. Where objects have a fixed size, stop is the only legal action of a full state, so that
every environment has the same edge into the sink. Every action but stop makes a trajectory one longer, so states
come in levels.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Environment(ABC):
    """A directed acyclic graph of states with masks in both directions.

    `cardinalities`: column k of a state holds integers from 0 to cardinalities[k] - 1. `max_length`: the most
    actions of a trajectory, stop included. `num_states` is the size of the state space where it is small enough
    to be enumerated, else None.
    """

    cardinalities: tuple[int, ...]
    num_actions: int
    num_backward_actions: int
    max_length: int
    num_states: int | None = None

    @property
    def width(self) -> int:
        """Integers in a state."""
        return len(self.cardinalities)

    @property
    def stop(self) -> int:
        """The action that ends a trajectory."""
        return self.num_actions - 1

    @abstractmethod
    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        """n copies of the source state s_0."""

    @abstractmethod
    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        """Which actions are legal."""

    @abstractmethod
    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        """Which backward actions are legal; none in the source state. The uniform P_B is over these."""

    @abstractmethod
    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        """The children, and the backward action that undoes each step (-1 for stop, which leaves the state)."""

    @abstractmethod
    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        """The parents under backward actions, and the forward action that redoes each step."""

    def is_done(self, actions: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Whether the action ended its trajectory."""
        return actions == self.stop

    def is_source(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, " B"]:
        """Whether the state has no parent."""
        return (states == self.reset(1, states.device)).all(1)

    # --- what a network sees ---------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Length of the multi-hot features."""
        return sum(self.cardinalities)

    def tokens(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B width"]:
        """The positions of the ones in each state's one-hot features: column k's value past all columns before."""
        return states + _offsets(self.cardinalities, states.device)

    def features(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B tokens"]:
        """One-hot features of every column, side by side."""
        zeros = torch.zeros(len(states), self.num_tokens, device=states.device)
        return zeros.scatter(1, self.tokens(states), 1.0)

    # --- identity and meaning --------------------------------------------------------------------------

    @property
    def has_keys(self) -> bool:
        """Whether 63 bits suffice to number every row of `cardinalities`."""
        return math.prod(self.cardinalities) <= 2**63

    def keys(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """One integer a state, equal for states that mean the same. Raises `ValueError` as `row_keys`."""
        return self.row_keys(states)

    def row_keys(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """One integer a row, equal for equal rows only. Raises `ValueError` where 63 bits do not suffice."""
        if not self.has_keys:
            raise ValueError(f"expected a state space below 2**63 rows, got {math.prod(self.cardinalities)}")
        places = [math.prod(self.cardinalities[:k]) for k in range(self.width)]
        return (states * torch.tensor(places, device=states.device)).sum(1)

    def orbits(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B actions"]:
        """A number for each action, equal where two actions of a state lead to the same child up to isomorphism."""
        return torch.arange(self.num_actions, device=states.device).expand(len(states), -1)

    def backward_orbits(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B backward"]:
        """The same for backward actions and parents."""
        return torch.arange(self.num_backward_actions, device=states.device).expand(len(states), -1)

    def valid(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, " B"]:
        """Whether a terminal object means anything (a molecule may not); invalid ones lose to every valid one."""
        return torch.ones(len(states), dtype=torch.bool, device=states.device)

    def objects(self, states: Int[Tensor, "B width"]) -> Any:
        """The terminal objects as an objective function takes them: here the states themselves."""
        return states

    def identities(self, states: Int[Tensor, "B width"]) -> list[bytes]:
        """What makes two terminal objects one to an objective, as bytes: here the row itself."""
        return [row.tobytes() for row in np.ascontiguousarray(states.cpu().numpy())]

    def check_actions(self, states: Tensor, actions: Tensor) -> None:
        """Raise `ValueError` naming the first illegal action."""
        legal = self.forward_mask(states).gather(1, actions[:, None]).squeeze(1)
        if not bool(legal.all()):
            row = int((~legal).nonzero()[0])
            raise ValueError(f"expected a legal action, got {int(actions[row])} in state {states[row].tolist()}")


@functools.lru_cache
def _offsets(cardinalities: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *cardinalities[:-1]), device=device).cumsum(0)


def check_no_dead_end(mask: Bool[Tensor, "B actions"], states: Int[Tensor, "B width"]) -> None:
    """Raise `ValueError` where a state has no legal action: its trajectory could never end."""
    stuck = ~mask.any(1)
    if bool(stuck.any()):
        state = states[int(stuck.nonzero()[0])].tolist()
        raise ValueError(f"expected a legal action in every state, found none in {state}: a dead end")
