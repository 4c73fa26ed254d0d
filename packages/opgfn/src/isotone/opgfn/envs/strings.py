"""Strings over a finite alphabet, grown at either end or at the right end alone (section 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment


class StringEnv(Environment):
    """Strings of up to `length` tokens; a state holds them left-aligned, `len(alphabet)` meaning empty.

    `grow`: "both" (prepend or append) or "right" (append). `min_length`: the shortest string that may stop,
    `length` itself by default, the fixed-length case. Action c appends token c, action len(alphabet) + c prepends
    it; backward action 0 drops the last token, 1 the first. Where both would give the same string (all its tokens
    equal), only the first way of each pair is legal, so that an edge is one action.
    """

    def __init__(
        self, alphabet: Sequence[str], length: int, *, grow: str = "both", min_length: int | None = None
    ) -> None:
        if len(alphabet) < 1 or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"expected distinct letters, got {list(alphabet)}")
        if length < 1:
            raise ValueError(f"expected a length of at least 1, got {length}")
        if grow not in ("both", "right"):
            raise ValueError(f"expected grow to be both or right, got {grow!r}")
        shortest = length if min_length is None else min_length
        if not 0 <= shortest <= length:
            raise ValueError(f"expected min_length from 0 to {length}, got {shortest}")
        self.alphabet, self.length, self.grow, self.min_length = tuple(alphabet), length, grow, shortest
        self.letters = len(self.alphabet)
        self.ends = 2 if grow == "both" else 1
        self.cardinalities = (self.letters + 1,) * length
        self.num_actions = self.ends * self.letters + 1
        self.num_backward_actions = self.ends
        self.max_length = length + 1
        self.num_states = sum(self.letters**k for k in range(length + 1))

    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        return torch.full((n, self.length), self.letters, dtype=torch.int64, device=device)

    def sizes(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """The number of tokens of each string."""
        return (states < self.letters).sum(1)

    def _uniform(self, states: Tensor) -> Tensor:
        return ((states == states[:, :1]) | (states == self.letters)).all(1)

    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        size = self.sizes(states)
        room = (size < self.length)[:, None]
        stop = (size >= self.min_length)[:, None]
        grow = room.expand(-1, self.letters)
        if self.ends == 1:
            return torch.cat([grow, stop], 1)
        same = self._uniform(states)[:, None]
        letter = torch.arange(self.letters, device=states.device)
        again = same & ((states[:, :1] == letter) | (states[:, :1] == self.letters))
        return torch.cat([grow, grow & ~again, stop], 1)

    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        some = (self.sizes(states) > 0)[:, None]
        if self.ends == 1:
            return some
        return torch.cat([some, some & ~self._uniform(states)[:, None]], 1)

    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        size = self.sizes(states)[:, None]
        place = torch.arange(self.length, device=states.device)
        letter = (actions % self.letters)[:, None]
        appended = torch.where(place == size, letter, states)
        prepended = torch.cat([letter, states[:, :-1]], 1)
        stop, left = (actions == self.stop)[:, None], (actions >= self.letters)[:, None]
        children = torch.where(stop, states, torch.where(left, prepended, appended))
        return children, torch.where(stop[:, 0], -1, left[:, 0].long())

    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        last = (self.sizes(states) - 1)[:, None]
        place = torch.arange(self.length, device=states.device)
        shorter = torch.where(place == last, self.letters, states)
        empty = torch.full_like(states[:, :1], self.letters)
        shifted = torch.cat([states[:, 1:], empty], 1)
        first = actions == 1
        dropped = torch.where(first, states[:, 0], states.gather(1, last.clamp(min=0)).squeeze(1))
        parents = torch.where(first[:, None], shifted, shorter)
        return parents, dropped + self.letters * first

    def objects(self, states: Int[Tensor, "B width"]) -> list[str]:
        """The strings."""
        letters = (*self.alphabet, "")
        return ["".join(letters[i] for i in row) for row in states.tolist()]

    def encode(self, strings: Sequence[str]) -> Int[Tensor, "B width"]:
        """States of strings of one-character letters. Raises `ValueError` on a letter or a length not in here."""
        number = {letter: i for i, letter in enumerate(self.alphabet)}
        rows = []
        for text in strings:
            unknown = [c for c in text if c not in number]
            if unknown or len(text) > self.length:
                raise ValueError(f"expected at most {self.length} letters of {''.join(self.alphabet)}, got {text!r}")
            rows.append([number[c] for c in text] + [self.letters] * (self.length - len(text)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)
