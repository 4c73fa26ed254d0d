"""sk and desk: R x and R^T y for a random R of s rows, fresh in every round, made from (seed, round) alone.

E[R^T R] = I for every kind, so that desk(sk(x)) is an unbiased x; its second moment, (1 + alpha)|x|^2, is what the step
pays for it. Legend: d numbers in, s numbers out, t the round. Nothing is stored but (kind, d, s, seed): a `Sketch` is a
frozen dataclass of Python numbers, and `sk`, `desk` are pure functions under jit and vmap, with t traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from isotone.shared.errors import InputError
from isotone.sketching import blocks, hashing
from isotone.sketching.hadamard import fwht, next_size

KINDS = (
    *("srht", "srht-replace", "countsketch-blocks", "countsketch", "sparse", "gaussian", "ams", "rand-k", "identity"),
)
_SIGNS, _ROWS, _DENSE = 1, 2, 3
_TILE = 1 << 22
"""Entries of a dense R that are drawn at a time: it is never whole in memory."""


@dataclass(frozen=True)
class Sketch:
    """A family R_t in R^{s x d}.

    `kind`: "srht" (rows without replacement, the default: R R^T is exactly (d'/s) I, d' = `hadamard.next_size(d)`),
    "srht-replace", "countsketch" (one +-1 a column), "countsketch-blocks" (the same with less variance and the fastest:
    see `blocks`), "sparse" (`q` of them a column, one in each of q blocks of rows), "gaussian", "ams" (dense +-1),
    "rand-k" (coordinates, scaled by d/s: a baseline), "identity".

    `ordered`: "countsketch", "sparse" and what "srht-replace" gives back add numbers that meet in an order that is
    always the same, for a sort; on a GPU, where otherwise whichever comes first is added first, it makes runs
    repeatable bit for bit. All other kinds are.

    Raises `InputError` on an unknown kind, s below 1, s above d' for rows without replacement (above d for "rand-k"),
    q that does not divide s, and an identity with s other than d.
    """

    kind: str
    d: int
    s: int
    seed: int = 0
    q: int = 4
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected a sketch of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("d", "s", "q"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise InputError(f"expected {name} to be a whole number from 1 to 2^31 - 1, got {value!r}")
        most = {"srht": self.padded, "rand-k": self.d}.get(self.kind)
        if most is not None and self.s > most:
            raise InputError(f"expected s to be at most {most} rows without replacement for {self.kind}, got {self.s}")
        if self.kind == "sparse" and self.s % self.q:
            raise InputError(f"expected q to divide s = {self.s} for sparse, got {self.q}")
        if self.kind == "identity" and self.s != self.d:
            raise InputError(f"expected s = d = {self.d} for identity, got {self.s}")

    @property
    def padded(self) -> int:
        """d', the width that the Hadamard transform works on: d and zeros up to the next size that it has."""
        return next_size(self.d)

    @property
    def alpha(self) -> float:
        """1 + alpha = E|R^T R x|^2 / |x|^2, exact for every x (section 2.2): the variance factor of the step.

        For the transforms it is that of x padded to d' and cut to d again, which keeps part of the noise out; of blocks
        it is the largest over x, less than d / s^2 too much for any.
        """
        d, s = self.d, self.s
        if self.kind == "identity":
            return 0.0
        if self.kind == "gaussian":
            return (d + 1) / s
        if self.kind == "rand-k":
            return d / s - 1
        if self.kind == "srht":
            # the noise off the diagonal is spread evenly over the other d' - 1 coordinates
            return 0.0 if d == 1 else (d - 1) / (self.padded - 1) * (self.padded / s - 1)
        if self.kind == "countsketch-blocks":
            # what the numbers of the last block, which is the shortest, meet
            count, width = blocks.shape(d, s)
            return (count - 1) * width / s
        return (d - 1) / s

    @property
    def eta_g(self) -> float:
        """1 / (1 + alpha): what a global step is multiplied by, so that a rate tuned without sketches carries over."""
        return 1 / (1 + self.alpha)

    def sk(self, t: Array | int, x: Float[Array, " d"]) -> Float[Array, " s"]:
        """R_t x."""
        if x.shape != (self.d,):
            raise InputError(f"expected {self.d} numbers to sketch, got shape {x.shape}")
        if self.kind == "identity":
            return x
        if self.kind.startswith("srht"):
            turned = fwht(jnp.pad(x, (0, self.padded - self.d)) * self._signs(t, self.padded, x.dtype))
            return turned[self._rows(t)] / math.sqrt(self.s)
        if self.kind == "rand-k":
            return x[self._rows(t)] * math.sqrt(self.d / self.s)
        if self.kind == "countsketch-blocks":
            return blocks.sk(self.seed, t, x, self.s)
        if self.kind in ("countsketch", "sparse"):
            add = _add_in_order if self.ordered else _add
            parts = [add(rows, values * x, self.s) for rows, values in self._columns(t, x.dtype)]
            return sum(parts[1:], parts[0])
        return self._tiles(t, x, across=False)

    def desk(self, t: Array | int, y: Float[Array, " s"]) -> Float[Array, " d"]:
        """R_t^T y."""
        if y.shape != (self.s,):
            raise InputError(f"expected {self.s} numbers to desketch, got shape {y.shape}")
        if self.kind == "identity":
            return y
        if self.kind.startswith("srht"):
            add = _add_in_order if self.ordered and self.kind == "srht-replace" else _add
            spread = add(self._rows(t), y / math.sqrt(self.s), self.padded)
            return (fwht(spread, transpose=True) * self._signs(t, self.padded, y.dtype))[: self.d]
        if self.kind == "rand-k":
            return jnp.zeros(self.d, y.dtype).at[self._rows(t)].set(y * math.sqrt(self.d / self.s))
        if self.kind == "countsketch-blocks":
            return blocks.desk(self.seed, t, y, self.d)
        if self.kind in ("countsketch", "sparse"):
            parts = [values * y[rows] for rows, values in self._columns(t, y.dtype)]
            return sum(parts[1:], parts[0])
        return self._tiles(t, y, across=True)

    def matrix(self, t: Array | int) -> Float[Array, "s d"]:
        """R_t itself: s d numbers, for tests and small d."""
        return jax.vmap(lambda column: self.sk(t, column), out_axes=1)(jnp.eye(self.d))

    def spectral_norm(self, t: Array | int) -> Array:
        """|R_t|_2, exact but for the dense kinds: 30 power iterations from below there.

        What an attacker of noise that is added after sketching divides by (section 2.6).
        """
        if self.kind in ("identity", "rand-k"):
            return jnp.asarray(math.sqrt(self.d / self.s))
        if self.kind == "srht" and self.padded == self.d:
            return jnp.asarray(math.sqrt(self.d / self.s))
        if self.kind.startswith("countsketch"):
            # one entry a column: R R^T is diagonal, the numbers of coordinates in each row
            blocked = self.kind == "countsketch-blocks"
            rows = blocks.rows(self.seed, t, self.d, self.s)[0] if blocked else self._columns(t, jnp.float32)[0][0]
            return jnp.sqrt(jnp.max(_add(rows, jnp.ones(self.d), self.s)))

        def step(_: Any, vector: Array) -> Array:
            image = self.desk(t, self.sk(t, vector))
            return image / jnp.linalg.norm(image)

        start = hashing.normals(hashing.stream(0, 0, 0), jnp.arange(self.d, dtype=jnp.uint32))
        vector = jax.lax.fori_loop(0, 30, step, start / jnp.linalg.norm(start))
        return jnp.linalg.norm(self.sk(t, vector))

    # --- what R is made of ---------------------------------------------------------------------------------

    def _signs(self, t: Array | int, n: int, dtype: DTypeLike, purpose: int = _SIGNS) -> Array:
        return hashing.signs(hashing.stream(self.seed, t, purpose), jnp.arange(n, dtype=jnp.uint32), dtype)

    def _rows(self, t: Array | int) -> Int[Array, " s"]:
        """Which rows of the transform, or coordinates, are kept."""
        key, index = hashing.stream(self.seed, t, _ROWS), jnp.arange(self.s, dtype=jnp.uint32)
        if self.kind == "srht-replace":
            return hashing.below(key, index, self.padded)
        return hashing.permuted(key, index, self.padded if self.kind == "srht" else self.d)

    def _columns(self, t: Array | int, dtype: DTypeLike) -> list[tuple[Array, Array]]:
        """For each block of rows, the row of every column's entry, and the entry."""
        blocks = self.q if self.kind == "sparse" else 1
        size, index = self.s // blocks, jnp.arange(self.d, dtype=jnp.uint32)
        found = []
        for block in range(blocks):
            rows = hashing.below(hashing.stream(self.seed, t, 16 + 2 * block), index, size) + block * size
            values = hashing.signs(hashing.stream(self.seed, t, 17 + 2 * block), index, dtype)
            found.append((rows, values if blocks == 1 else values / math.sqrt(blocks)))
        return found

    def _tiles(self, t: Array | int, vector: Array, across: bool) -> Array:
        """A dense R times `vector`, or with `across` R^T times it, some rows of R at a time."""
        key = hashing.stream(self.seed, t, _DENSE)
        rows = max(1, min(self.s, _TILE // self.d))
        steps = -(-self.s // rows)
        column = jnp.arange(self.d, dtype=jnp.uint32)

        def tile(number: Array) -> Array:
            row = number * rows + jnp.arange(rows)
            # a key for each row and a counter for each column: no index beyond 32 bits
            own = jax.vmap(lambda r: jnp.stack([hashing.mix(key[0] + r), hashing.mix(key[1] ^ r)]))(
                row.astype(jnp.uint32)
            )
            draw = hashing.normals if self.kind == "gaussian" else hashing.signs
            entries = jax.vmap(lambda k: draw(k, column))(own) / math.sqrt(self.s)
            return jnp.where((row < self.s)[:, None], entries, 0).astype(vector.dtype)

        if across:
            padded = jnp.pad(vector, (0, steps * rows - self.s)).reshape(steps, rows)

            def add(number: Array, total: Array) -> Array:
                return total + padded[number] @ tile(number)

            return jax.lax.fori_loop(0, steps, add, jnp.zeros(self.d, vector.dtype))
        return jax.lax.map(lambda number: tile(number) @ vector, jnp.arange(steps)).reshape(-1)[: self.s]


def _add(rows: Int[Array, " n"], values: Float[Array, " n"], s: int) -> Float[Array, " s"]:
    """The sum of each row's values."""
    return jnp.zeros(s, values.dtype).at[rows].add(values)


def _add_in_order(rows: Int[Array, " n"], values: Float[Array, " n"], s: int) -> Float[Array, " s"]:
    """The same with no scatter: sorted by rows, then sums over stretches of one row by a tree, always the same."""
    order = jnp.argsort(rows, stable=True)
    rows, values = rows[order], values[order]

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return right[0], jnp.where(left[0] == right[0], left[1], 0) + right[1]

    _, sums = jax.lax.associative_scan(join, (rows, values))
    ends = jnp.searchsorted(rows, jnp.arange(s), side="right")
    present = (ends > 0) & (rows[ends - 1] == jnp.arange(s))
    return jnp.where(present, sums[ends - 1], 0)


def on_gpu() -> bool:
    """Whether JAX computes on a GPU here, where `ordered` makes a difference."""
    config: Any = jax.config
    where = config.jax_default_device
    return (jax.default_backend() if where is None else getattr(where, "platform", where)) in ("gpu", "cuda", "rocm")


def make_sketch(
    kind: str,
    d: int,
    s: int | None = None,
    seed: int = 0,
    *,
    ratio: float | None = None,
    q: int = 4,
    ordered: bool = False,
) -> Sketch:
    """A sketch of d numbers into s, or into max(1, round(d / `ratio`)) of them; identity keeps all.

    Raises `InputError` where neither or both of s and ratio are given, and as `Sketch`.
    """
    if kind == "identity":
        return Sketch(kind, d, d, seed, q, ordered)
    if (s is None) == (ratio is None):
        raise InputError(f"expected s or ratio, got {'neither' if s is None else 'both'}")
    if s is None:
        assert ratio is not None
        if not ratio >= 1:
            raise InputError(f"expected a ratio of at least 1, got {ratio}")
        s = max(1, round(d / ratio))
        s = max(q, s - s % q) if kind == "sparse" else s
    return Sketch(kind, d, s, seed, q, ordered)


def variance(sketch: Sketch, g: Float[Array, " d"], h: Float[Array, " d"]) -> Array:
    """Var(g^T R^T R h), exact (section 2.2); of the transforms where d is a size of theirs.

    The coordinate-wise embedding constant of the theory is what bounds it: (a / s)|g|^2 |h|^2 with a = 2.
    """
    both = jnp.sum(g * g) * jnp.sum(h * h) + jnp.sum(g * h) ** 2
    each = 2 * jnp.sum(g * g * h * h)
    d, s = sketch.padded if sketch.kind.startswith("srht") else sketch.d, sketch.s
    if sketch.kind == "identity":
        return jnp.zeros(())
    if sketch.kind == "gaussian":
        return both / s
    if sketch.kind == "rand-k":
        # coordinates without replacement: the variance of a finite population's mean
        products = g * h
        return (
            sketch.d
            * (sketch.d - s)
            / s
            / max(1, sketch.d - 1)
            * (jnp.sum(products**2) - jnp.sum(products) ** 2 / sketch.d)
        )
    if sketch.kind == "countsketch-blocks":
        # pairs within a block never meet
        count, width = blocks.shape(d, s)
        inside = [jnp.pad(v, (0, count * width - d)).reshape(count, width) for v in (g * g, h * h, g * h)]
        own_g, own_h, own = (jnp.sum(part, 1) for part in inside)
        return (both - jnp.sum(own_g * own_h) - jnp.sum(own**2)) / s
    shrunk = (d - s) / (d - 1) if sketch.kind == "srht" and d > 1 else 1.0
    return shrunk * (both - each) / s
