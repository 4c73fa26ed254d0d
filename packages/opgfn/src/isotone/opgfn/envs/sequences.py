"""Objectives of strings, all offline: n-grams, DNA aptamers, and a table like TFBind8's (section 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isotone.opgfn.envs.strings import StringEnv

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_PAIRS = {("A", "T"), ("T", "A"), ("C", "G"), ("G", "C")}
DNA_OBJECTIVES = ("gc", "pairs", "melting", "length")


class NGrams(StringEnv):
    """Strings of up to `length` letters; u_j is the count of the j-th n-gram (overlaps count) over the most that fit.

    Section 2.6: alphabet of amino acids, grown at the right end.
    """

    def __init__(self, ngrams: Sequence[str] = ("AC", "CV"), length: int = 18, alphabet: str = AMINO_ACIDS) -> None:
        super().__init__(alphabet, length, grow="right", min_length=1)
        for ngram in ngrams:
            if not ngram or len(ngram) > length or not set(ngram) <= set(alphabet):
                raise ValueError(f"expected n-grams of at most {length} letters of {alphabet}, got {ngram!r}")
        if not ngrams:
            raise ValueError("expected at least one n-gram, got none")
        self.objectives = tuple(ngrams)
        self.num_states = None

    def objective(self, strings: Sequence[str]) -> np.ndarray:
        """(n, n-grams), each in [0, 1]."""
        most = np.array([count_ngram(_densest(ngram, self.length), ngram) for ngram in self.objectives])
        counts = [[count_ngram(text, ngram) for ngram in self.objectives] for text in strings]
        return np.array(counts, dtype=np.float64).reshape(len(strings), len(most)) / most


def count_ngram(text: str, ngram: str) -> int:
    """How often `ngram` stands in `text`, overlaps included."""
    return sum(text.startswith(ngram, i) for i in range(len(text) - len(ngram) + 1))


def _densest(ngram: str, length: int) -> str:
    """The string of `length` with the most copies: each overlaps the one before as far as the n-gram allows."""
    period = next(p for p in range(1, len(ngram) + 1) if ngram.startswith(ngram[p:]))
    return (ngram[:period] * (length // period + 2))[:length]


class DNA(StringEnv):
    """Strings over ACGT of `min_length` to `length`, grown at the right end; objectives of `DNA_OBJECTIVES`, in [0, 1].

    gc: share of G and C, 1 in the window [0.4, 0.6] and falling to 0 at both ends. pairs: Nussinov's most base
    pairs over length / 2. melting: Wallace's 2 (A + T) + 4 (G + C) degrees over the most for the length. length:
    1 - size / length, shorter is better. They stand in for the energies of a licensed program.
    """

    def __init__(
        self, objectives: Sequence[str] = ("pairs", "length"), length: int = 30, min_length: int = 1, loop: int = 3
    ) -> None:
        super().__init__("ACGT", length, grow="right", min_length=min_length)
        unknown = [name for name in objectives if name not in DNA_OBJECTIVES]
        if unknown or not objectives:
            raise ValueError(
                f"expected objectives of {', '.join(DNA_OBJECTIVES)}, got {', '.join(objectives) or 'none'}"
            )
        if loop < 0:
            raise ValueError(f"expected a loop of at least 0, got {loop}")
        self.objectives, self.loop = tuple(objectives), loop
        self.num_states = None

    def objective(self, strings: Sequence[str]) -> np.ndarray:
        """(n, objectives)."""
        rows = []
        for text in strings:
            gc = sum(letter in "GC" for letter in text)
            share, size = gc / max(1, len(text)), len(text)
            values = {
                "gc": min(1.0, share / 0.4, (1 - share) / 0.4),
                "pairs": 2 * max_base_pairs(text, self.loop) / self.length if "pairs" in self.objectives else 0.0,
                "melting": (2 * (size - gc) + 4 * gc) / (4 * self.length),
                "length": 1 - size / self.length,
            }
            rows.append([values[name] for name in self.objectives])
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(self.objectives))


def max_base_pairs(sequence: str, loop: int = 3) -> int:
    """Nussinov's most non-crossing Watson-Crick pairs with at least `loop` bases between partners, O(n^3)."""
    n = len(sequence)
    best = np.zeros((n + 2, n + 1), dtype=np.int64)  # best[i, j] of sequence[i:j]
    for span in range(loop + 2, n + 1):
        for i in range(n - span + 1):
            j = i + span
            found = best[i + 1, j]
            for k in range(i + loop + 1, j):
                if (sequence[i], sequence[k]) in _PAIRS:
                    found = max(found, 1 + best[i + 1, k] + best[k + 1, j])
            best[i, j] = found
    return int(best[0, n])


class BindingTable(StringEnv):
    """DNA strings of 8 with a made-up affinity: the sigmoid of a seeded position weight matrix and couplings of
    neighbours, scaled into [0, 1] over all 65,536 (a stand-in for TFBind8, which is not at hand).

    `modes`: the strings that no neighbour by one letter beats and that are in the best 0.5 %.
    """

    TOP = 0.005

    def __init__(self, length: int = 8, seed: int = 0) -> None:
        super().__init__("ACGT", length)
        self.seed = seed
        generator = np.random.default_rng(seed)
        codes = np.indices((4,) * length).reshape(length, -1)
        weights, couplings = generator.normal(size=(length, 4)), 0.8 * generator.normal(size=(length - 1, 4, 4))
        score = sum(weights[i][codes[i]] for i in range(length))
        score = score + sum(couplings[i][codes[i], codes[i + 1]] for i in range(length - 1))
        affinity = 1 / (1 + np.exp(-(score - score.mean()) / score.std()))
        self.table = (affinity - affinity.min()) / np.ptp(affinity)
        grid = self.table.reshape((4,) * length)
        peak = np.ones_like(grid, dtype=bool)
        for axis in range(length):
            peak &= grid == grid.max(axis, keepdims=True)
        threshold = np.sort(self.table)[-max(1, int(self.TOP * len(self.table)))]
        places = np.flatnonzero(peak.ravel() & (self.table >= threshold))
        self.modes = frozenset("".join("ACGT"[c] for c in codes[:, place]) for place in places)

    def objective(self, strings: Sequence[str]) -> np.ndarray:
        """(n, 1)."""
        places = 4 ** np.arange(self.length - 1, -1, -1)
        codes = np.array([["ACGT".index(letter) for letter in text] for text in strings]).reshape(-1, self.length)
        return self.table[codes @ places][:, None]
