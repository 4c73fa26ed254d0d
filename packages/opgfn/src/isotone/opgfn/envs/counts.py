"""Objects that are filled slot by slot or letter by letter, in any order: bags and network cells (section 2.6)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment


class Bag(Environment):
    """Multisets of exactly `size` letters; action k adds letter k, backward action k takes one away.

    u is 0.01, 10 where some letter occurs at least 7 times, and 30 for modes: for each letter, a quarter of the
    ways to fill the other places, drawn by `numpy.random.default_rng(seed)`.
    """

    FREQUENT = 7

    def __init__(self, letters: int = 7, size: int = 13, seed: int = 0) -> None:
        if letters < 1 or size < 1:
            raise ValueError(f"expected letters and size of at least 1, got {letters} and {size}")
        self.letters, self.size, self.seed = letters, size, seed
        self.cardinalities = (size + 1,) * letters
        self.num_actions = letters + 1
        self.num_backward_actions = letters
        self.max_length = size + 1
        self.modes = self._modes(seed)

    def _modes(self, seed: int) -> Int[Tensor, "modes letters"]:
        generator = np.random.default_rng(seed)
        rest = self.size - self.FREQUENT
        if rest < 0:
            return torch.zeros(0, self.letters, dtype=torch.int64)
        fillers = np.array(
            [
                np.bincount(choice, minlength=self.letters)
                for choice in itertools.combinations_with_replacement(range(self.letters), rest)
            ],
            dtype=np.int64,
        ).reshape(-1, self.letters)
        modes = []
        for letter in range(self.letters):
            chosen = generator.choice(len(fillers), size=max(1, len(fillers) // 4), replace=False)
            bags = fillers[chosen]
            bags[:, letter] += self.FREQUENT
            modes.append(bags)
        return torch.from_numpy(np.unique(np.concatenate(modes), axis=0))

    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        return torch.zeros(n, self.letters, dtype=torch.int64, device=device)

    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        full = (states.sum(1) >= self.size)[:, None]
        return torch.cat([~full.expand(-1, self.letters), full], 1)

    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        return states > 0

    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        letter = torch.arange(self.letters, device=states.device)
        return states + (letter == actions[:, None]), torch.where(actions == self.stop, -1, actions)

    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        letter = torch.arange(self.letters, device=states.device)
        return states - (letter == actions[:, None]).to(states.dtype), actions

    def objective(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B 1"]:
        """u(x), in float64."""
        modes = torch.isin(self.keys(states), self.keys(self.modes.to(states.device)))
        frequent = (states >= self.FREQUENT).any(1)
        levels = torch.tensor([0.01, 10.0, 30.0], dtype=torch.float64, device=states.device)
        return levels[torch.where(modes, 2, frequent.long())][:, None]


class NasCell(Environment):
    """Cells of `slots` edges with one of `operations` each, filled in any order (NATS-Bench's topology: 6 and 5).

    A synthetic stand-in for its tables: accuracy = seeded sum of unary and pairwise terms, scaled into [0, 1] over
    all cells (`truth`, the 200-epoch accuracy), and the same with noise (`objective`, the 12-epoch proxy). Action
    slot * operations + op fills a slot; backward action `slot` empties it.
    """

    def __init__(self, slots: int = 6, operations: int = 5, seed: int = 0, noise: float = 0.12) -> None:
        if slots < 1 or operations < 2:
            raise ValueError(f"expected at least 1 slot and 2 operations, got {slots} and {operations}")
        self.slots, self.operations, self.seed, self.noise = slots, operations, seed, noise
        self.cardinalities = (operations + 1,) * slots
        self.num_actions = slots * operations + 1
        self.num_backward_actions = slots
        self.max_length = slots + 1
        self.num_states = (operations + 1) ** slots
        self.truth_table, self.proxy_table = self._tables(seed, noise)

    def _tables(self, seed: int, noise: float) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng(seed)
        cells = np.indices((self.operations,) * self.slots).reshape(self.slots, -1)
        total = np.zeros(cells.shape[1])
        for slot in range(self.slots):
            total += generator.normal(size=self.operations)[cells[slot]]
        for a, b in itertools.combinations(range(self.slots), 2):
            total += 0.7 * generator.normal(size=(self.operations, self.operations))[cells[a], cells[b]]
        truth = (total - total.min()) / np.ptp(total)
        proxy = truth + noise * generator.normal(size=len(truth))
        return torch.from_numpy(truth), torch.from_numpy(proxy)

    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        return torch.full((n, self.slots), self.operations, dtype=torch.int64, device=device)

    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        empty = states == self.operations
        fill = empty.repeat_interleave(self.operations, 1)
        return torch.cat([fill, ~empty.any(1, keepdim=True)], 1)

    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        return states < self.operations

    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        slot = torch.arange(self.slots, device=states.device)
        chosen = torch.where(actions == self.stop, -1, actions // self.operations)
        return torch.where(slot == chosen[:, None], (actions % self.operations)[:, None], states), chosen

    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        slot = torch.arange(self.slots, device=states.device)
        operation = states.gather(1, actions[:, None]).squeeze(1)
        parents = torch.where(slot == actions[:, None], self.operations, states)
        return parents, actions * self.operations + operation

    def _row(self, states: Tensor) -> Tensor:
        if bool((states >= self.operations).any()):
            raise ValueError("expected full cells, got one with an empty slot")
        places = self.operations ** torch.arange(self.slots - 1, -1, -1, device=states.device)
        return (states * places).sum(1)

    def objective(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B 1"]:
        """The noisy proxy of full cells."""
        return self.proxy_table.to(states.device)[self._row(states)][:, None]

    def truth(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B 1"]:
        """The value that the proxy stands for."""
        return self.truth_table.to(states.device)[self._row(states)][:, None]
