"""Tasks that need no download: a keyword to spot, a Markov chain of known entropy, and windows of a user's own text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError, check_count

KEYWORD_VOCAB = 64
_FIRST_PLAIN, _DRAWS, _WORDS = 8, 4, 3
Batch = dict[str, Tensor]


def keyword_batch(rows: int, seed: int, length: int = 16) -> Batch:
    """Texts of which the class is told by a few words: ZO-learnable (section 5).

    Tokens are uniform in [8, 64); then, four times, a random place is overwritten by 2 + 3 y + U{0, 1, 2}, y the class
    of {0, 1}. Returns input_ids (rows, length), attention_mask of ones and labels (rows,).
    """
    for name, value in (("rows", rows), ("length", length)):
        check_count(name, value)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    labels = draw(0, 2, rows)
    ids = draw(_FIRST_PLAIN, KEYWORD_VOCAB, rows, length)
    for _ in range(_DRAWS):
        place = draw(0, length, rows, 1)
        ids.scatter_(1, place, 2 + _WORDS * labels[:, None] + draw(0, _WORDS, rows, 1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class ZipfMarkov:
    """A Markov chain over `vocab` tokens; next-token logits are -log(rank) under a permutation a state (section 5).

    Its entropy rate is the floor of any model's loss.
    """

    vocab: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("vocab", self.vocab, 2)
        check_count("seed", self.seed, 0)

    @property
    def transitions(self) -> Float[Tensor, "vocab vocab"]:
        """P(next | now), fp64."""
        generator = torch.Generator().manual_seed(self.seed)
        ranks = torch.stack([torch.randperm(self.vocab, generator=generator) for _ in range(self.vocab)]) + 1
        weights = 1.0 / ranks.double()
        return weights / weights.sum(1, keepdim=True)

    @property
    def stationary(self) -> Float[Tensor, " vocab"]:
        """The distribution that the chain keeps, from its linear equations, fp64."""
        system = self.transitions.T - torch.eye(self.vocab, dtype=torch.float64)
        system[-1] = 1.0
        right = torch.zeros(self.vocab, dtype=torch.float64)
        right[-1] = 1.0
        return torch.linalg.solve(system, right)

    @property
    def entropy_rate(self) -> float:
        """Nats a token: sum_i pi_i H(P_i), exact."""
        p = self.transitions
        return float(-(self.stationary[:, None] * p * p.log()).sum())

    def batch(self, rows: int, length: int, seed: int) -> Batch:
        """Texts that begin in the stationary distribution: input_ids and labels (rows, length)."""
        for name, value in (("rows", rows), ("length", length)):
            check_count(name, value, 2)
        generator = torch.Generator().manual_seed(seed)
        rows_of = self.transitions
        tokens = [torch.multinomial(self.stationary, rows, replacement=True, generator=generator)]
        for _ in range(length - 1):
            tokens.append(torch.multinomial(rows_of[tokens[-1]], 1, generator=generator).flatten())
        ids = torch.stack(tokens, 1)
        return {"input_ids": ids, "labels": ids.clone()}


class Windows:
    """Windows of a text as a function of the step: a resumed run sees what the killed one would have seen.

    `ids` (n,): the text's tokens. Raises `InputError` where they do not fill a window.
    """

    def __init__(self, ids: Int[Tensor, " n"], length: int, rows: int, seed: int) -> None:
        check_count("length", length, 2)
        check_count("rows", rows)
        if len(ids) < length:
            raise InputError(f"expected a text of at least {length} tokens, got {len(ids)}")
        self.ids, self.length, self.rows, self.seed = ids, length, rows, seed

    def __call__(self, step: int) -> Batch:
        """The batch of a step: input_ids and labels (rows, length)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        starts = torch.randint(len(self.ids) - self.length + 1, (self.rows, 1), generator=generator)
        ids = self.ids[starts + torch.arange(self.length)]
        return {"input_ids": ids, "labels": ids.clone()}
