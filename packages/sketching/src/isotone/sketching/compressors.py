"""What travels: sketches, and what one would use instead, each as one function from clients' updates to the server's.

A compressor takes the updates of m participants, flat (m, d), and gives the mean that the server can make of what they
send, with the states that clients and server keep for it. It says how many bytes that is up and down for a client.
Biased compressors keep what they did not send (error feedback). Legend: d numbers, s of a sketch, k kept, m clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError
from isotone.sketching import hashing
from isotone.sketching.sketches import Sketch
from isotone.sketching.trees import TreeSketch

FLOAT = 4


class Result(NamedTuple):
    """`update` (d,): the mean update as all may apply it; the states after the round."""

    update: Array
    clients: Any
    server: Any


@runtime_checkable
class Compressor(Protocol):
    """`d` numbers an update; `bytes_up`, `bytes_down`: of one client in one round; `scale`: what eta_g "auto" is."""

    @property
    def d(self) -> int: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...
    @property
    def scale(self) -> float: ...
    def init(self, clients: int) -> tuple[Any, Any]:
        """States of the clients, stacked, and of the server."""
        ...

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        """The round's update from `deltas` (m, d) with `weights` (m,) that sum to 1 (0: not there)."""
        ...


def mean(values: Float[Array, "m n"], weights: Float[Array, " m"]) -> Float[Array, " n"]:
    """The weighted mean; a row of weight 0 counts for nothing, also where it is not finite."""
    return jnp.sum(jnp.where(weights[:, None] > 0, weights[:, None] * values, 0.0), 0)


@dataclass(frozen=True)
class Plain:
    """FedAvg: everything, as it is."""

    d: int

    @property
    def bytes_up(self) -> int:
        return FLOAT * self.d

    @property
    def bytes_down(self) -> int:
        return FLOAT * self.d

    @property
    def scale(self) -> float:
        return 1.0

    def init(self, clients: int) -> tuple[Any, Any]:
        return (), ()

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        return Result(mean(deltas, weights), clients, server)


@dataclass(frozen=True)
class ThroughSketch:
    """What all that send R_t delta share: s float32 each way, the sketch's own scale, no states."""

    sketch: Sketch | TreeSketch

    @property
    def d(self) -> int:
        return self.sketch.d

    @property
    def bytes_up(self) -> int:
        return FLOAT * self.sketch.s

    @property
    def bytes_down(self) -> int:
        return FLOAT * self.sketch.s

    @property
    def scale(self) -> float:
        return self.sketch.eta_g

    def init(self, clients: int) -> tuple[Any, Any]:
        """No states."""
        return (), ()


@dataclass(frozen=True)
class Sketched(ThroughSketch):
    """The paper's: R_t delta up, the mean of them down, R_t^T of that applied by all (section 2.3).

    Linear, so that the server adds what it does not look into and never needs the weights; and so that a simulation may
    sketch the mean once, which is the mean of what m clients would send.
    """

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        return Result(self.sketch.desk(t, self.sketch.sk(t, mean(deltas, weights))), clients, server)


def top_k(values: Float[Array, " d"], k: int) -> Float[Array, " d"]:
    """The k largest in absolute value, the others 0."""
    _, places = jax.lax.top_k(jnp.abs(values), k)
    return jnp.zeros_like(values).at[places].set(values[places])


@dataclass(frozen=True)
class TopK:
    """Top-k with error feedback: each client sends its k largest numbers and their places, and keeps the rest.

    Down go the mean's non-zeros: at most m k of them, counted as a dense vector where that is less.
    """

    d: int
    k: int
    participants: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d:
            raise InputError(f"expected k from 1 to d = {self.d}, got {self.k}")

    @property
    def bytes_up(self) -> int:
        return 2 * FLOAT * self.k

    @property
    def bytes_down(self) -> int:
        return min(2 * FLOAT * self.k * self.participants, FLOAT * self.d)

    @property
    def scale(self) -> float:
        return 1.0

    def init(self, clients: int) -> tuple[Any, Any]:
        return jnp.zeros((clients, self.d)), ()

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        whole = clients + deltas
        sent = jax.vmap(lambda row: top_k(row, self.k))(whole)
        # who was not heard keeps everything; an update that is not finite is forgotten
        kept = jnp.where((weights > 0)[:, None], whole - sent, jnp.where(jnp.isfinite(whole), whole, clients))
        return Result(mean(sent, weights), kept, server)


@dataclass(frozen=True)
class FetchSGD:
    """FetchSGD (Rothchild et al. 2020): CountSketches of `rows` x `columns` up; momentum and error live in the
    sketch on
    the server, which sends down the k heaviest coordinates, each estimated by the median of its rows.

    The sketch is the same in every round, since error and momentum are kept in it.
    """

    d: int
    k: int
    columns: int
    rows: int = 5
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d or self.columns < 1 or self.rows < 1:
            got = (self.k, self.columns, self.rows)
            raise InputError(f"expected k from 1 to d = {self.d}, 1 column and 1 row, got {got}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"expected momentum in [0, 1), got {self.momentum}")

    @property
    def bytes_up(self) -> int:
        return FLOAT * self.rows * self.columns

    @property
    def bytes_down(self) -> int:
        return 2 * FLOAT * self.k

    @property
    def scale(self) -> float:
        # a momentum of rho sums a gradient 1 / (1 - rho) times
        return 1 - self.momentum

    def _hash(self) -> tuple[Array, Array]:
        index = jnp.arange(self.d, dtype=jnp.uint32)
        each = [
            (
                hashing.below(hashing.stream(self.seed, 0, 64 + 2 * row), index, self.columns),
                hashing.signs(hashing.stream(self.seed, 0, 65 + 2 * row), index),
            )
            for row in range(self.rows)
        ]
        return jnp.stack([places for places, _ in each]), jnp.stack([sign for _, sign in each])

    def sketch(self, x: Float[Array, " d"]) -> Float[Array, "rows columns"]:
        """`rows` CountSketches of x."""
        places, sign = self._hash()
        return jax.vmap(lambda p, s: jnp.zeros(self.columns).at[p].add(s * x))(places, sign)

    def estimate(self, table: Float[Array, "rows columns"]) -> Float[Array, " d"]:
        """Every coordinate: the median of what its rows say."""
        places, sign = self._hash()
        return jnp.median(jax.vmap(lambda t, p, s: s * t[p])(table, places, sign), 0)

    def init(self, clients: int) -> tuple[Any, Any]:
        return (), (jnp.zeros((self.rows, self.columns)), jnp.zeros((self.rows, self.columns)))

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        momentum, error = server
        sent = jax.vmap(self.sketch)(deltas)
        momentum = self.momentum * momentum + mean(sent.reshape(len(deltas), -1), weights).reshape(momentum.shape)
        error = error + momentum
        update = top_k(self.estimate(error), self.k)
        error = error - self.sketch(update)
        # what was sent down has no momentum left in its cells
        touched = self.sketch((update != 0).astype(jnp.float32)) != 0
        return Result(update, clients, (jnp.where(touched, 0.0, momentum), error))


@dataclass(frozen=True)
class PowerSGD:
    """PowerSGD (Vogels et al. 2019): each matrix by one warm-started power iteration of `rank`, with error feedback;
    leaves
    of one dimension as they are. Two messages a round up and two down.

    `shapes`: of the leaves, in the order of the flat vector.
    """

    shapes: tuple[tuple[int, ...], ...]
    rank: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"expected a rank of at least 1, got {self.rank}")

    @property
    def d(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def _matrices(self) -> list[tuple[int, int] | None]:
        """(rows, columns) of each leaf that is worth it, None where it is sent whole."""
        found: list[tuple[int, int] | None] = []
        for shape in self.shapes:
            n, m = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
            found.append((n, m) if self.rank * (n + m) < n * m else None)
        return found

    @property
    def bytes_up(self) -> int:
        pairs = zip(self.shapes, self._matrices(), strict=True)
        return FLOAT * sum(self.rank * sum(m) if m is not None else math.prod(shape) for shape, m in pairs)

    @property
    def bytes_down(self) -> int:
        return self.bytes_up

    @property
    def scale(self) -> float:
        return 1.0

    def init(self, clients: int) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(self.seed), len(self.shapes))
        start = [
            None if shape is None else jax.random.normal(key, (shape[1], self.rank))
            for key, shape in zip(keys, self._matrices(), strict=True)
        ]
        return jnp.zeros((clients, self.d)), start

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        whole = clients + deltas
        updates: list[Array] = []
        after: list[Array | None] = []
        place = 0
        for shape, matrix, start in zip(self.shapes, self._matrices(), server, strict=True):
            size = math.prod(shape)
            part = whole[:, place : place + size]
            place += size
            if matrix is None:
                updates.append(mean(part, weights))
                after.append(None)
                continue
            stacked = part.reshape(-1, *matrix)
            left = mean((stacked @ start).reshape(len(part), -1), weights).reshape(matrix[0], self.rank)
            left, _ = jnp.linalg.qr(left + 1e-12)
            right = mean((jnp.swapaxes(stacked, 1, 2) @ left).reshape(len(part), -1), weights)
            right = right.reshape(matrix[1], self.rank)
            updates.append((left @ right.T).reshape(-1))
            after.append(right)
        update = jnp.concatenate(updates)
        heard = (weights > 0)[:, None]
        kept = jnp.where(heard, whole - update, jnp.where(jnp.isfinite(whole), whole, clients))
        return Result(update, kept, after)


@dataclass(frozen=True)
class QSGD:
    """QSGD (Alistarh et al. 2017): each number to one of `levels` signed fractions of the vector's norm, at random and
    unbiased; ceil(log2(2 levels + 1)) bits each and the norm, packed. Down goes the mean, quantised again."""

    d: int
    levels: int = 1

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise InputError(f"expected at least 1 level, got {self.levels}")

    @property
    def bits(self) -> int:
        """Of one number."""
        return math.ceil(math.log2(2 * self.levels + 1))

    @property
    def bytes_up(self) -> int:
        return math.ceil(self.bits * self.d / 8) + FLOAT

    @property
    def bytes_down(self) -> int:
        return self.bytes_up

    @property
    def scale(self) -> float:
        """1 / (1 + alpha) with alpha = min(d / levels^2, sqrt(d) / levels), up and down."""
        alpha = min(self.d / self.levels**2, math.sqrt(self.d) / self.levels)
        return 1 / (1 + alpha)

    def quantize(self, key: Array, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """An unbiased x of few values."""
        norm = jnp.linalg.norm(x)
        place = jnp.abs(x) / jnp.where(norm > 0, norm, 1.0) * self.levels
        low = jnp.floor(place)
        up = jax.random.uniform(key, x.shape) < place - low
        return norm * jnp.sign(x) * (low + up) / self.levels

    def init(self, clients: int) -> tuple[Any, Any]:
        return (), ()

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        keys = jax.random.split(key, len(deltas) + 1)
        sent = jax.vmap(self.quantize)(keys[1:], deltas)
        return Result(self.quantize(keys[0], mean(sent, weights)), clients, server)
