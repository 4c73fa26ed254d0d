"""What travels: sketches, and what one would use instead, each as one function from clients' updates to the server's.

A compressor takes the updates of m participants, flat (m, d), and gives the mean that the server can make of what they
send, with the states that clients and server keep for it. It says how many bytes that is up and down for a client.
Biased compressors keep what they did not send (error feedback). Legend: d numbers, s of a sketch, k kept, m clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError
from isotone.sketching import hashing, wire
from isotone.sketching.sketches import Sketch
from isotone.sketching.trees import TreeSketch, tree_sketch

FLOAT = 4


class Result(NamedTuple):
    """`update` (d,): the mean update as all may apply it; the states after the round."""

    update: Array
    clients: Any
    server: Any


@runtime_checkable
class Compressor(Protocol):
    """`d` numbers an update; `bytes_up`, `bytes_down`: of one client in one round, at most, in so many `messages` each
    way; `scale`: what eta_g "auto" is."""

    @property
    def d(self) -> int: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...
    @property
    def messages(self) -> int: ...
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

    messages = 1
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
    """What all that send R_t delta share: s float32 each way, the sketch's own scale, no states. `one_way`: down goes
    R_t^T of the mean, d float32, for whom the way down is no narrow one."""

    messages = 1
    sketch: Sketch | TreeSketch
    one_way: bool = field(default=False, kw_only=True)

    @property
    def d(self) -> int:
        return self.sketch.d

    @property
    def bytes_up(self) -> int:
        return FLOAT * self.sketch.s

    @property
    def bytes_down(self) -> int:
        return FLOAT * (self.d if self.one_way else self.sketch.s)

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

    Down go the mean's non-zeros, or all of it where that is less; the server's state is how many they were, `told` the
    bytes of so many, and `bytes_down` those of m k.
    """

    messages = 1
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

    def told(self, server: Array) -> Array:
        """Bytes down of the round that left this state; a round in which nobody was heard counts as `bytes_down`."""
        sent = jnp.minimum(2 * FLOAT * server, FLOAT * self.d)
        return jnp.where(server > 0, sent, self.bytes_down)

    def init(self, clients: int) -> tuple[Any, Any]:
        return jnp.zeros((clients, self.d)), jnp.zeros((), jnp.int32)

    def combine(self, t: Array, key: Array, deltas: Array, weights: Array, clients: Any, server: Any) -> Result:
        whole = clients + deltas
        sent = jax.vmap(lambda row: top_k(row, self.k))(whole)
        # who was not heard keeps everything; an update that is not finite is forgotten
        kept = jnp.where((weights > 0)[:, None], whole - sent, jnp.where(jnp.isfinite(whole), whole, clients))
        update = mean(sent, weights)
        return Result(update, kept, jnp.sum(update != 0, dtype=jnp.int32))


def told(compressor: Compressor, server: Any) -> Array | int:
    """Bytes down of one client in the round that left the server's state `server`."""
    return compressor.told(server) if isinstance(compressor, TopK) else compressor.bytes_down


@dataclass(frozen=True)
class FetchSGD:
    """FetchSGD (Rothchild et al. 2020): CountSketches of `rows` x `columns` up; momentum and error live in the sketch
    on the server, which sends down the k heaviest coordinates, each estimated by the median of its rows.

    The sketch is the same in every round, since error and momentum are kept in it.
    """

    messages = 1
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
        # what was sent down has no momentum left in its cells: counted without signs, which would cancel
        there, (places, _) = (update != 0).astype(jnp.float32), self._hash()
        touched = jax.vmap(lambda p: jnp.zeros(self.columns).at[p].add(there))(places) > 0
        return Result(update, clients, (jnp.where(touched, 0.0, momentum), error))


@dataclass(frozen=True)
class PowerSGD:
    """PowerSGD (Vogels et al. 2019): each matrix by one warm-started power iteration of `rank`, with error feedback;
    leaves of one dimension as they are. Two messages a round up and two down where there is a matrix.

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
    def messages(self) -> int:
        return 2 if any(self._matrices()) else 1

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
    """QSGD (Alistarh et al. 2017): each number to one of `levels` signed fractions of its bucket's norm, at random and
    unbiased; ceil(log2(2 levels + 1)) bits each, packed, and a norm for each `bucket` of numbers (of several, in a
    message of their own). Down goes the mean, quantised again."""

    d: int
    levels: int = 1
    bucket: int = 128

    def __post_init__(self) -> None:
        if self.levels < 1 or self.bucket < 1:
            raise InputError(f"expected 1 level or more and buckets of 1 or more, got {self.levels} and {self.bucket}")

    @property
    def width(self) -> int:
        """Numbers of a whole bucket."""
        return min(self.bucket, self.d)

    @property
    def buckets(self) -> int:
        return -(-self.d // self.width)

    @property
    def messages(self) -> int:
        return 1 if self.buckets == 1 else 2

    @property
    def bytes_up(self) -> int:
        return wire.value_bytes("bits", self.d, self.levels) + (FLOAT * self.buckets if self.buckets > 1 else 0)

    @property
    def bytes_down(self) -> int:
        return self.bytes_up

    @property
    def scale(self) -> float:
        """1 / (1 + alpha) with alpha = min(b / levels^2, sqrt(b) / levels) for buckets of b."""
        alpha = min(self.width / self.levels**2, math.sqrt(self.width) / self.levels)
        return 1 / (1 + alpha)

    def norms(self, x: Float[Array, " d"]) -> Float[Array, " buckets"]:
        """Of each bucket."""
        padded = jnp.pad(x, (0, self.buckets * self.width - self.d))
        return jnp.linalg.norm(padded.reshape(self.buckets, self.width), axis=1)

    def spread(self, norms: Float[Array, " buckets"]) -> Float[Array, " d"]:
        """Its bucket's norm for each number."""
        return jnp.repeat(norms, self.width)[: self.d]

    def quantize(self, key: Array, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """An unbiased x of few values."""
        norm = self.spread(self.norms(x))
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


def compressor_of(
    arm: str,
    params: Any,
    *,
    ratio: float = 10.0,
    size: int | None = None,
    kind: str = "srht",
    participants: int = 1,
    seed: int = 0,
    per_leaf: bool = False,
    ordered: bool | None = None,
) -> Compressor:
    """The `arm` ("plain", "sketch", "rand-k", "topk", "fetchsgd", "powersgd", "qsgd") for weights like `params`: at
    least `ratio` times fewer bytes up than they have, as near as it comes, or of `size` (s, k, columns, rank, levels).

    FetchSGD alone sends more: five rows of d / ratio columns, with a tenth as many heavy hitters. Raises `InputError`
    on another arm and as the arms do.
    """
    leaves = jax.tree.leaves(params)
    d = sum(int(leaf.size) for leaf in leaves)
    fewer = max(1, int(d / ratio)) if size is None else size
    if arm == "plain":
        return Plain(d)
    if arm in ("sketch", "rand-k"):
        kind = "rand-k" if arm == "rand-k" else kind
        if fewer > d:
            raise InputError(f"expected s of at most d = {d}, got {fewer}")
        if per_leaf and size is None:
            return Sketched(tree_sketch(params, kind, ratio=ratio, seed=seed, per_leaf=True, ordered=ordered))
        s = max(4, fewer - fewer % 4) if kind == "sparse" and size is None else fewer
        return Sketched(tree_sketch(params, kind, s=s, seed=seed, per_leaf=per_leaf, ordered=ordered))
    if arm == "topk":
        # a place and a value for each number kept
        return TopK(d, max(1, int(d / (2 * ratio))) if size is None else size, participants)
    if arm == "fetchsgd":
        return FetchSGD(d, min(d, max(1, fewer // 10)), fewer, seed=seed)
    if arm == "powersgd":
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        if size is not None:
            return PowerSGD(shapes, size, seed)
        ranks = [PowerSGD(shapes, rank, seed) for rank in range(1, 65)]
        fitting = [c for c in ranks if c.bytes_up * ratio <= FLOAT * d]
        return max(fitting, key=lambda c: c.rank) if fitting else ranks[0]
    if arm == "qsgd":
        # of 32 bits over the ratio, those of a number's share of its bucket's norm are not left
        bits = max(2, math.floor(8 * FLOAT * (1 / ratio - 1 / QSGD(d).width)))
        return QSGD(d, (2**bits - 1) // 2 if size is None else size)
    raise InputError(f"expected an arm of plain, sketch, rand-k, topk, fetchsgd, powersgd, qsgd, got {arm!r}")
