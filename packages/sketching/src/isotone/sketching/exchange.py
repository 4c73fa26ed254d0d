"""One round of any compressor as messages that really cross a socket on loopback, counted where they arrive.

The formulas `bytes_up` and `bytes_down` are held to it, and the update that the messages give to `combine`'s.
"""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError, check_count
from isotone.sketching import wire
from isotone.sketching.compressors import (
    QSGD,
    Compressor,
    FetchSGD,
    Plain,
    PowerSGD,
    Sketched,
    ThroughSketch,
    TopK,
    told,
    top_k,
)
from isotone.sketching.integer import IntegerSketch, mask
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.wire import HEADER, Message


class Loopback:
    """A TCP connection to oneself on 127.0.0.1: `send(data)` gives what came out at its other end.

    `received`: bytes counted there.
    """

    def __enter__(self) -> Loopback:
        self.received = 0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._near = socket.create_connection(listener.getsockname(), timeout=30)
            self._far, _ = listener.accept()
        self._arrived: queue.Queue[bytes] = queue.Queue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._near.close()
        self._thread.join()
        self._far.close()

    def send(self, data: bytes) -> bytes:
        """The same bytes, after a way through the kernel."""
        self._near.sendall(data)
        return self._arrived.get(timeout=60)

    def _listen(self) -> None:
        while header := read_exactly(self._far, HEADER):
            body = read_exactly(self._far, wire.payload_length(header))
            self.received += len(header) + len(body)
            self._arrived.put(header + body)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, or b"" where the other side has closed before the first. Raises `ConnectionError` in between."""
    parts: list[bytes] = []
    left = count
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            if left == count:
                return b""
            raise ConnectionError(f"expected {count} bytes, the connection ended after {count - left}")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@dataclass
class Counted:
    """Bytes of one round: of the numbers themselves (`up`, `down`, a list of clients each), and of `headers`."""

    up: list[int]
    down: list[int]
    headers: int = 0


@dataclass
class Channel:
    """Where a round's messages go through: every one is encoded, sent, read, checked and decoded."""

    line: Loopback
    clients: int
    seed: int
    round: int
    d: int
    counted: Counted = field(init=False)

    def __post_init__(self) -> None:
        self.counted = Counted([0] * self.clients, [0] * self.clients)

    def up(self, client: int, kind: str, values: Any, **more: Any) -> Message:
        """A message from a client, as the server reads it."""
        return self._through(self.counted.up, client, kind, values, more)

    def down(self, client: int, kind: str, values: Any, **more: Any) -> Message:
        """A message from the server, as a client reads it."""
        return self._through(self.counted.down, client, kind, values, more)

    def _through(self, counts: list[int], client: int, kind: str, values: Any, more: dict[str, Any]) -> Message:
        numbers = np.asarray(values, np.uint32 if more.get("dtype") == "uint32" else np.float32).reshape(-1)
        sent = Message(kind, self.seed, self.round, client, self.d, numbers, **more)
        data = self.line.send(wire.encode(sent))
        counts[client] += len(data) - HEADER
        self.counted.headers += HEADER
        wanted = wire.Expected(kind, self.seed, self.round, self.d, len(numbers), sent.dtype, self.clients)
        return wire.decode(data, wanted)

    def mean(self, kind: str, rows: Any, **more: Any) -> np.ndarray:
        """Every client's row up, their mean as the server makes it of what it read."""
        read = [self.up(c, kind, row, **more).numbers for c, row in enumerate(rows)]
        return np.asarray(np.mean(read, 0, dtype=np.float32))

    def all(self, kind: str, values: Any, **more: Any) -> Message:
        """The same to all clients; what the last of them read."""
        return [self.down(c, kind, values, **more) for c in range(self.clients)][-1]


def exchange(
    compressor: Compressor, channel: Channel, key: Array, deltas: Float[Array, "m d"], clients: Any, server: Any
) -> np.ndarray:
    """The round's update (d,), as a client has it that knows nothing but what the messages say."""
    for kind, send in _ROUNDS.items():
        if isinstance(compressor, kind):
            return np.asarray(send(compressor, channel, key, deltas, clients, server), np.float32)
    raise InputError(f"expected a compressor with messages, got {type(compressor).__name__}")


def _plain(compressor: Plain, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    return channel.all("mean", channel.mean("plain", deltas)).values


def _back(compressor: ThroughSketch, channel: Channel, y: Any, **more: Any) -> Any:
    """The update of the mean sketch `y`, desketched by the clients, or by the server where the way is one."""
    desk = jax.jit(lambda y: compressor.sketch.desk(channel.round, y))
    if compressor.one_way:
        return channel.all("mean", desk(jnp.asarray(y))).values
    return desk(jnp.asarray(channel.all("mean", y, **more).values))


def _sketched(compressor: Sketched, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    sketch, t = compressor.sketch, channel.round
    y = channel.mean("sketch", jax.jit(jax.vmap(lambda x: sketch.sk(t, x)))(deltas))
    return _back(compressor, channel, y)


def _rounded(compressor: RoundedSketch, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    t, dtype, numbers = jnp.int32(channel.round), compressor.dtype, jnp.arange(len(deltas))
    sent = jax.jit(jax.vmap(lambda client, delta: compressor.up(t, key, client, delta)))(numbers, deltas)
    down = compressor.down(key, jnp.asarray(channel.mean("sketch", sent, dtype=dtype)))
    return _back(compressor, channel, down, dtype=dtype)


def _masked(compressor: IntegerSketch, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    """Words under masks of seeds that every pair shares: all that the server reads, and adds."""
    t, count, sketch = channel.round, len(deltas), compressor.sketch
    pairs = {(a, b): os.urandom(16) for a in range(count) for b in range(a + 1, count)}
    total = np.zeros(sketch.s, np.uint32)
    for client, (own, delta) in enumerate(zip(jax.random.split(key, count), deltas, strict=True)):
        seeds = {other: pairs[min(client, other), max(client, other)] for other in range(count) if other != client}
        words = np.asarray(compressor.code.encode(own, sketch.sk(t, delta)).words)
        total += channel.up(client, "sketch", words + mask(seeds, client, t, sketch.s), dtype="uint32").values
    return _back(compressor, channel, compressor.code.decode(jnp.asarray(total)) / count)


def _sparse_of(message: Message) -> np.ndarray:
    whole = np.zeros(message.d, np.float32)
    if message.places is None:
        return message.values
    whole[message.places] = message.values
    return whole


def _top_k(compressor: TopK, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    total = np.zeros(compressor.d, np.float32)
    for client, row in enumerate(clients + deltas):
        _, places = jax.lax.top_k(jnp.abs(row), compressor.k)
        where = np.asarray(places, np.uint32)
        total += _sparse_of(channel.up(client, "sparse", row[places], places=where))
    update = total / channel.clients
    where = np.flatnonzero(update).astype(np.uint32)
    # places cost as much as values: beyond half of d the vector is sent as it is
    if 2 * len(where) >= compressor.d:
        return channel.all("mean", update).values
    return _sparse_of(channel.all("sparse", update[where], places=where))


def _fetch(compressor: FetchSGD, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    momentum, error = server
    tables = channel.mean("table", [compressor.sketch(delta) for delta in deltas])
    error = error + compressor.momentum * momentum + tables.reshape(momentum.shape)
    update = top_k(compressor.estimate(error), compressor.k)
    _, places = jax.lax.top_k(jnp.abs(update), compressor.k)
    return _sparse_of(channel.all("sparse", update[places], places=np.asarray(places, np.uint32)))


def _power(compressor: PowerSGD, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    """Left factors and what is sent whole up; their mean down; right factors up; their mean down."""
    whole = clients + deltas
    matrices, rank = compressor._matrices(), compressor.rank
    ends = np.cumsum([math.prod(shape) for shape in compressor.shapes])[:-1]
    parts = [np.split(np.asarray(row), ends) for row in whole]

    def rows_of(part: int) -> list[np.ndarray]:
        shape = matrices[part]
        return [row[part] if shape is None else row[part].reshape(shape) for row in parts]

    every = range(len(matrices))
    first = [[r if m is None else r @ server[i] for r in rows_of(i)] for i, m in enumerate(matrices)]
    sizes = [np.size(leaf[0]) for leaf in first]
    flat = channel.mean("factors", [np.concatenate([first[i][c].ravel() for i in every]) for c in range(len(whole))])
    down = np.split(channel.all("factors", flat).values, np.cumsum(sizes)[:-1])
    lefts = {
        i: np.asarray(jnp.linalg.qr(jnp.asarray(down[i].reshape(m[0], rank)) + 1e-12)[0])
        for i, m in enumerate(matrices)
        if m is not None
    }
    if not lefts:
        return np.concatenate(down)
    seconds = [np.concatenate([(rows_of(i)[c].T @ q).ravel() for i, q in lefts.items()]) for c in range(len(whole))]
    told = channel.all("factors", channel.mean("factors", seconds)).values
    widths = [m[1] * rank for m in matrices if m is not None]
    rights = dict(zip(lefts, np.split(told, np.cumsum(widths)[:-1]), strict=True))
    update = [(lefts[i] @ rights[i].reshape(-1, rank).T).ravel() if i in lefts else down[i] for i in every]
    return np.concatenate(update)


def _quantized(compressor: QSGD, channel: Channel, key: Array, deltas: Array, clients: Any, server: Any) -> Any:
    """Steps, with the norm as their scale where there is one bucket, else after a message of the norms."""
    keys, levels = jax.random.split(key, len(deltas) + 1), compressor.levels

    def through(send: Callable[..., Message], k: Array, row: Any) -> np.ndarray:
        row = jnp.asarray(row)
        norms = np.asarray(compressor.norms(row), np.float32)
        own = np.asarray(compressor.spread(jnp.asarray(np.where(norms > 0, norms, 1.0))))
        steps = np.rint(np.asarray(compressor.quantize(k, row)) / own * levels).astype(np.float32)
        more = {"extra": levels, "dtype": "bits"}
        if compressor.buckets == 1:
            return send("quantized", steps, scale=float(norms[0]), **more).numbers
        told = compressor.spread(jnp.asarray(send("factors", norms).values))
        return np.asarray(told) * send("quantized", steps, scale=1.0, **more).numbers

    read = [through(partial(channel.up, client), keys[1 + client], delta) for client, delta in enumerate(deltas)]
    return through(channel.all, keys[0], np.mean(read, 0, dtype=np.float32))


_ROUNDS: dict[type, Callable[..., Any]] = {
    Plain: _plain,
    Sketched: _sketched,
    RoundedSketch: _rounded,
    IntegerSketch: _masked,
    TopK: _top_k,
    FetchSGD: _fetch,
    PowerSGD: _power,
    QSGD: _quantized,
}


@dataclass(frozen=True)
class Measured:
    """Bytes of a client in a round, without headers: `up` and `down` counted at the socket, `formula_up` and
    `formula_down` of the compressor. `headers`: of all messages of a client. `error`: the largest difference between
    the update that travelled and `combine`'s, relative to its norm."""

    up: int
    down: int
    formula_up: int
    formula_down: int
    headers: int
    error: float


def measure_bytes(compressor: Compressor, clients: int = 2, seed: int = 0, round: int = 3) -> Measured:
    """One round of `clients` over loopback sockets. Raises `InputError` where clients send different amounts, or more
    or less arrives than was sent."""
    check_count("clients", clients, 1)
    keys = jax.random.split(jax.random.key(seed), 2)
    deltas = jax.random.normal(keys[0], (clients, compressor.d))
    own, server = compressor.init(clients)
    t = jnp.asarray(round, jnp.int32)
    combined = jax.jit(compressor.combine)(t, keys[1], deltas, jnp.full(clients, 1 / clients), own, server)
    wanted = combined.update
    with Loopback() as line:
        channel = Channel(line, clients, seed, round, compressor.d)
        update = exchange(compressor, channel, keys[1], deltas, own, server)
        received = line.received
    counted = channel.counted
    if len(set(counted.up)) > 1 or received != sum(counted.up) + sum(counted.down) + counted.headers:
        raise InputError(f"expected {sum(counted.up) + sum(counted.down)} bytes at the socket, got {received}")
    error = float(np.abs(update - np.asarray(wanted)).max() / max(float(jnp.linalg.norm(wanted)), 1e-30))
    return Measured(
        *(counted.up[0], counted.down[0], compressor.bytes_up, int(told(compressor, combined.server))),
        *(counted.headers // clients, error),
    )
