"""Tokens to train and measure on: windows of a text, packed conversations, and key-value recall.

A batch is a function of the data, the seed and the step alone, so that a run that was killed goes on as it would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv.losses import IGNORED


@dataclass(frozen=True)
class Batch:
    """`input_ids` (b, n). `labels` (b, n), -100 where a token is not asked for; None: every token is.
    `position_ids` (b, n), starting anew in each packed example; None: 0 to n - 1."""

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.input_ids.shape)
        if len(shape) != 2:
            raise InputError(f"expected token ids of shape (batch, n), got {shape}")
        for name, part, shapes in (
            ("labels", self.labels, (shape,)),
            ("position_ids", self.position_ids, (shape, (1, shape[1]))),
        ):
            if part is not None and tuple(part.shape) not in shapes:
                raise InputError(f"expected {name} of shape {shape}, as input_ids, got {tuple(part.shape)}")

    def to(self, device: str | torch.device) -> Batch:
        """The batch on `device`."""
        parts = (self.input_ids, self.labels, self.position_ids)
        return Batch(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


Batches = Callable[[int], Batch]


def fingerprint(*parts: Tensor | str | int | float | None) -> str:
    """The SHA-256 of tensors (type, shape and bytes) and settings: what a checkpoint says its run was made of."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            whole = part.detach().cpu().contiguous()
            digest.update(f"{whole.dtype} {tuple(whole.shape)};".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Windows:
    """Random windows of `context` tokens of a text, `batch` a step. Raises `InputError` on a text shorter than one."""

    tokens: Tensor
    context: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or len(self.tokens) < self.context or self.context < 2:
            raise InputError(
                f"expected a text of at least the context's {self.context} tokens (2 or more), got {len(self.tokens)}"
            )
        if self.batch < 1:
            raise InputError(f"expected a batch of at least 1, got {self.batch}")

    @property
    def data_id(self) -> str:
        """The SHA-256 of tokens, context, batch and seed, by which `distill` knows its own checkpoints."""
        return fingerprint(self.tokens, self.context, self.batch, self.seed)

    def __call__(self, step: int) -> Batch:
        """The batch of `step`."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        starts = torch.randint(len(self.tokens) - self.context + 1, (self.batch,), generator=generator)
        return Batch(self.tokens[starts[:, None] + torch.arange(self.context)].long())


class Bytes:
    """A vocabulary of the distinct bytes of a text, in order: 65 of them for tiny Shakespeare."""

    def __init__(self, text: bytes) -> None:
        if not text:
            raise InputError("expected a text of at least one byte, got none")
        self.symbols = bytes(sorted(set(text)))
        self._index = torch.full((256,), -1)
        self._index[list(self.symbols)] = torch.arange(len(self.symbols))

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: bytes) -> Int[Tensor, " n"]:
        """Token ids of `text`. Raises `InputError` on a byte that the vocabulary lacks."""
        ids = (
            self._index[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()] if text else torch.empty(0).long()
        )
        if len(ids) and int(ids.min()) < 0:
            raise InputError(f"expected bytes of the vocabulary, got {text[int(ids.argmin())]!r}")
        return ids

    def decode(self, ids: Tensor) -> bytes:
        """The bytes of token ids."""
        return bytes(self.symbols[int(i)] for i in ids)


def pack(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    length: int,
    fuse_positions_prob: float = 0.0,
    seed: int = 0,
) -> list[Batch]:
    """(ids, labels) examples one after another into rows of `length` tokens, positions from 0 in each example.

    With `fuse_positions_prob` a row counts its positions through instead, so that long positions are seen (the authors'
    long-context recipe uses 0.1). An example longer than a row is cut, and left out where nothing that is asked for is
    left of it; a row's end is padded with labels of -100. Raises `InputError` on no example, an empty one, one whose
    labels are not as long, and where nothing is asked for in any.
    """
    if not examples or length < 2 or not 0 <= fuse_positions_prob <= 1:
        raise InputError(
            f"expected examples, rows of 2 tokens or more and a probability, got {len(examples)}, {length}"
        )
    chance = torch.Generator().manual_seed(seed)
    rows: list[Batch] = []
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []

    def close() -> None:
        empty = length - len(ids)
        fused = bool(torch.rand((), generator=chance) < fuse_positions_prob)
        places = list(range(length)) if fused else positions + list(range(empty))
        rows.append(
            Batch(torch.tensor([ids + [0] * empty]), torch.tensor([labels + [IGNORED] * empty]), torch.tensor([places]))
        )
        ids.clear()
        labels.clear()
        positions.clear()

    for number, (words, wanted) in enumerate(examples):
        if len(words) == 0 or len(words) != len(wanted):
            raise InputError(
                f"expected as many labels as ids, and some, in example {number}: {len(wanted)}, {len(words)}"
            )
        words, wanted = words[:length], wanted[:length]
        if all(label == IGNORED for label in wanted[1:]):
            continue
        if len(ids) + len(words) > length:
            close()
        ids += words
        # nobody predicts an example's first token from the one before it
        labels += [IGNORED, *wanted[1:]]
        positions += range(len(words))
    if not ids:
        raise InputError(
            f"expected an example with a label within rows of {length} tokens, got none of {len(examples)}"
        )
    close()
    return rows


# Key-value recall: P pairs (key, value), fillers between them, then a key again; the answer is its value. A model needs
# exact attention from the last token to one pair, which an average over short text does not show.

KEYS, VALUES, FILLERS = 64, 64, 32
RECALL_VOCAB = KEYS + VALUES + FILLERS
FILLER_PROB = 0.3


def recall_task(
    batch: int, pairs: int, generator: torch.Generator, queries: int = 1
) -> tuple[Int[Tensor, "batch n"], Int[Tensor, "batch n"]]:
    """`batch` recall sequences, padded at the right, and labels: the values asked for, -100 elsewhere.

    Keys are drawn without replacement, values with; after a pair stands a filler with probability 0.3. `queries` of
    the keys are asked one after another, in random order (1 in the test). Ids: keys, then values, then fillers.
    """
    if not 1 <= pairs <= KEYS or not 1 <= queries <= pairs:
        raise InputError(f"expected 1 to {KEYS} pairs and at most as many queries, got {pairs} and {queries}")
    keys = torch.rand(batch, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    fillers = KEYS + VALUES + torch.randint(FILLERS, (batch, pairs), generator=generator)
    filled = torch.rand(batch, pairs, generator=generator) < FILLER_PROB
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)[:, :queries]
    # every symbol with its place in the row; places of absent fillers are left out
    widths = 2 + filled.long()
    starts = widths.cumsum(1) - widths
    end = widths.sum(1)
    length = int(end.max()) + 2 * queries
    ids = torch.zeros(batch, length, dtype=torch.long)
    labels = torch.full((batch, length), IGNORED)
    ids.scatter_(1, starts, keys)
    ids.scatter_(1, starts + 1, values)
    rows, columns = filled.nonzero(as_tuple=True)
    ids[rows, starts[rows, columns] + 2] = fillers[rows, columns]
    places = end[:, None] + 2 * torch.arange(queries)
    answers = values.gather(1, order)
    ids.scatter_(1, places, keys.gather(1, order))
    ids.scatter_(1, places + 1, answers)
    labels.scatter_(1, places + 1, answers)
    return ids, labels
