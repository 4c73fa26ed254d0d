"""The server of a run over TCP: it adds sketches and tells everybody their mean. It never has the weights.

Rounds are one log of mean messages, written through to the disk before anybody is told: a server that is killed goes on
with the round after the last of them, and a client that comes late, or comes back, is told what it missed. Messages
are idempotent by (round, client); a client that is not heard before the deadline is left out of that round; what is
torn, foreign or not finite costs its sender the connection and nobody else anything.

There is neither encryption nor authentication here: loopback unless told otherwise, or a tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared.checkpoint import CheckpointStore, atomic_write
from isotone.shared.errors import InputError, check_count
from isotone.sketching import wire
from isotone.sketching.cohort import mean_of, receive
from isotone.sketching.ledger import Ledger
from isotone.sketching.plan import Plan
from isotone.sketching.training import make_algorithm, run_keys
from isotone.sketching.wire import HEADER, Expected, Message

GREETING_SECONDS = 10.0
WRITE_SECONDS = 10.0


@dataclass(frozen=True)
class ServerConfig:
    """`deadline`: seconds that a round waits for those who take part, once somebody was heard. `wait_for`: clients
    that must be there before round 0 (None: all). `patience`: seconds without a message after which the server gives
    up. `linger`: seconds that late clients have after the last round. `catch_up`: what a late one is told, "history",
    the means of the rounds gone by, or "weights", for which alone the server keeps them."""

    host: str = "127.0.0.1"
    port: int = 0
    deadline: float = 60.0
    wait_for: int | None = None
    patience: float = 600.0
    linger: float = 5.0
    catch_up: str = "history"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"expected a port from 0 to 65535, got {self.port}")
        for name in ("deadline", "patience", "linger"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"expected {name} as seconds of at least 0, got {value}")
        if self.wait_for is not None:
            check_count("wait_for", self.wait_for, 1)
        if self.catch_up not in ("history", "weights"):
            raise InputError(f"expected catch_up to be history or weights, got {self.catch_up!r}")


@dataclass
class Report:
    """`heard`: who counted in each round, None where the record is lost; `events`: how often something was stale, a
    duplicate, declined or refused."""

    heard: list[list[int] | None] = field(default_factory=list)
    events: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stale", "duplicate", "declined", "refused"), 0)
    )
    newest: str = ""


def serve(
    plan: Plan,
    folder: str | Path,
    config: ServerConfig | None = None,
    resume: bool = True,
    *,
    ready: Callable[[int], None] | None = None,
    round_done: Callable[[int, int], None] | None = None,
) -> Report:
    """Serve `plan` to its last round. `ready(port)` is called when clients can come, `round_done(t, heard)` after each.

    Raises `InputError` where `folder` holds a run of another plan or a log that is corrupted before its end, where
    nobody sends anything for `patience` seconds, and where no update of a round is finite.
    """
    folder = Path(folder)
    with CheckpointStore(folder):
        server = _Server(plan, folder, config or ServerConfig(), resume, round_done)
        try:
            return asyncio.run(server.run(ready))
        finally:
            server.log.close()


def read_log(path: Path, plan: Plan) -> list[bytes]:
    """The mean messages of a log, a record that was torn by a kill cut off. Raises `InputError` on others."""
    data = path.read_bytes() if path.exists() else b""
    found: list[bytes] = []
    place = 0
    while place < len(data):
        try:
            length = HEADER + wire.payload_length(data[place : place + HEADER])
            wire.decode(data[place : place + length], _expected(plan, "mean", len(found)))
        except InputError as error:
            whole = HEADER + wire.value_bytes(plan.config.dtype, plan.s)
            if len(data) - place > whole:
                raise InputError(f"expected a log of rounds in {str(path)!r}, it is corrupted: {error}") from None
            break
        found.append(data[place : place + length])
        place += length
    if place < len(data):
        os.truncate(path, place)
    return found


def _expected(plan: Plan, kind: str | None, t: int | None) -> Expected:
    limit = HEADER + max(4 * plan.s, 1 << 16)
    dtype = None if kind is None else plan.config.dtype
    return Expected(kind, plan.config.seed, t, plan.compressor.d, plan.s, dtype, plan.config.clients, limit)


class _Server:
    def __init__(
        self, plan: Plan, folder: Path, config: ServerConfig, resume: bool, done: Callable[[int, int], None] | None
    ) -> None:
        self.plan, self.folder, self.config, self.done = plan, folder, config, done
        if config.wait_for is not None and config.wait_for > plan.config.clients:
            raise InputError(f"expected to wait for at most {plan.config.clients} clients, got {config.wait_for}")
        if config.catch_up == "weights" and plan.config.server != "sgd":
            raise InputError(f"expected a server optimizer without state to send weights, got {plan.config.server!r}")
        path, log = folder / "plan.json", folder / "rounds.log"
        if not resume:
            for old in (path, log, folder / "ledger.json"):
                old.unlink(missing_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != plan.text:
            raise InputError(
                f"expected a run of the same plan in {str(folder)!r}, it holds another: --fresh forgets it"
            )
        self.history = read_log(log, plan)
        self.ledger, self.report = self._said_before()
        atomic_write(path, plan.text.encode())
        self.log = log.open("ab")
        self.inbox: dict[int, Message] = {}
        self.declined: set[int] = set()
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.open = 0
        self.known: set[int] = set()
        self.finished: set[int] = set()
        self.changed = asyncio.Event()
        self.last = time.monotonic()
        self.weights = _Weights(plan, self.history) if config.catch_up == "weights" else None

    @property
    def round(self) -> int:
        return len(self.history)

    def _said_before(self) -> tuple[Ledger, Report]:
        path, config = self.folder / "ledger.json", self.plan.config
        ledger, report = Ledger(config.clients, config.arm, self.plan.compressor.d), Report()
        if self.history and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                report = Report(found["heard"][: self.round], dict(found["events"]), "")
                ledger = Ledger.from_json(found)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"expected the ledger of this run, got a torn or other file: {str(path)!r}") from None
        for t in range(len(report.heard), self.round):
            # of a round whose record is lost the log knows how many were heard: who, where it was everybody
            taken = self.plan.taken(t)
            report.heard.append(taken if wire.decode(self.history[t]).extra == len(taken) else None)
        return ledger, report

    # --- rounds ------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[int], None] | None) -> Report:
        server = await asyncio.start_server(self._connected, self.config.host, self.config.port)
        async with server:
            if ready is not None:
                ready(server.sockets[0].getsockname()[1])
            self.last = time.monotonic()
            if self.round == 0:
                wanted = self.config.wait_for or self.plan.config.clients
                await self._until(lambda: len(self.writers) >= wanted, None, f"{wanted} clients")
            while self.round < self.plan.config.rounds:
                await self._one_round()
            # whoever was cut off in the last round comes back for it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_done(), self.config.linger)
            for writer in list(self.writers.values()):
                writer.close()
        self._write()
        return self.report

    async def _one_round(self) -> None:
        t = self.round
        taken = set(self.plan.taken(t))
        opened = time.monotonic()

        def complete() -> bool:
            return taken <= set(self.inbox) | self.declined

        await self._until(complete, opened + self.config.deadline, f"an update of round {t}")
        if not self.inbox:
            raise InputError(f"expected a finite update from some client, got none in round {t}")
        heard = sorted(self.inbox)
        mean = mean_of({client: message.values for client, message in self.inbox.items()}, t)
        config, sent = self.plan.config, self.plan.down(t, mean)
        message = Message("mean", config.seed, t, 0, self.plan.compressor.d, sent, None, len(heard), config.dtype)
        data = wire.encode(message)
        self.report.heard.append(heard)
        self._write()
        self.log.write(data)
        self.log.flush()
        os.fsync(self.log.fileno())
        self.history.append(data)
        if self.weights is not None:
            self.weights.apply(t, wire.decode(data).values)
        self.inbox, self.declined = {}, set()
        told = [self._write_to(writer, data, client, t) for client, writer in self.writers.items()]
        await asyncio.gather(*told)
        self._write()
        if self.done is not None:
            self.done(t, len(heard))

    async def _until(self, done: Callable[[], bool], deadline: float | None, what: str) -> None:
        """Wait for `done()`; past the deadline, for anybody at all. Raises `InputError` past the patience."""
        while not done():
            now = time.monotonic()
            if deadline is not None and now >= deadline and self.inbox:
                return
            if now - self.last > self.config.patience:
                raise InputError(f"expected {what} within {self.config.patience:g} seconds, nothing came")
            left = self.last + self.config.patience - now + 0.01
            if deadline is not None and now < deadline:
                left = min(left, deadline - now)
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), left)

    async def _all_done(self) -> None:
        while not (self.known and self.known <= self.finished):
            self.changed.clear()
            await self.changed.wait()

    # --- connections -------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client, most = None, 4 * self.plan.config.clients + 16
        self.open += 1
        try:
            if self.open > most:
                raise InputError(f"expected at most {most} open connections, got {self.open}")
            hello = await asyncio.wait_for(self._read(reader, None), GREETING_SECONDS)
            client = await self._greet(hello, writer)
            while True:
                self._take(await self._read(reader, client), client)
                self.last = time.monotonic()
                self.changed.set()
        except InputError as error:
            self.report.events["refused"] += 1
            self.report.newest = str(error)
            with contextlib.suppress(OSError, TimeoutError):
                await self._write_to(writer, wire.encode(Message("refused", text=str(error)[:500])), None, None)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # it went away and may come back, or the run is over
        finally:
            if client is not None and self.writers.get(client) is writer:
                del self.writers[client]
            self.open -= 1
            writer.close()
            self.changed.set()

    async def _read(self, reader: asyncio.StreamReader, client: int | None) -> bytes:
        """One message, of the size that is allowed; its bytes are counted."""
        expected = _expected(self.plan, None, None)
        header = await reader.readexactly(HEADER)
        length = wire.payload_length(header, Expected(limit=HEADER + 4096) if client is None else expected)
        data = header + await reader.readexactly(length)
        if client is None:
            self.ledger.sent_aside("up", len(data))
        return data

    async def _greet(self, data: bytes, writer: asyncio.StreamWriter) -> int:
        """Tell the plan, and what the client does not have."""
        clients = self.plan.config.clients
        hello = wire.decode(data, Expected("hello", clients=clients))
        if hello.round > self.round:
            raise InputError(f"expected a client that is not ahead of round {self.round}, got one at {hello.round}")
        if (old := self.writers.get(hello.client)) is not None:
            old.close()
        now = self.round
        plan = Message("plan", self.plan.config.seed, now, hello.client, self.plan.compressor.d, text=self.plan.text)
        behind = self.history[hello.round : now]
        if behind and self.weights is not None:
            flat = self.weights.flat()
            behind = [wire.encode(Message("weights", self.plan.config.seed, now, hello.client, len(flat), flat))]
        # registered first: a round that ends while this is written is told after it, in order
        self.writers[hello.client] = writer
        self.known.add(hello.client)
        writer.write(wire.encode(plan) + b"".join(behind))
        self.ledger.sent_aside("down", len(wire.encode(plan)) + sum(map(len, behind)))
        self.last = time.monotonic()
        self.changed.set()
        await asyncio.wait_for(writer.drain(), WRITE_SECONDS)
        return hello.client

    def _take(self, data: bytes, client: int) -> None:
        """An update: kept where it is the first of this round from a client that takes part."""
        message = wire.decode(data, Expected(clients=self.plan.config.clients))
        if message.client != client:
            raise InputError(f"expected messages of client {client}, got one of client {message.client}")
        if message.kind == "hello" and message.round == self.plan.config.rounds:
            self.ledger.sent_aside("up", len(data))
            self.finished.add(client)
            return
        self.ledger.sent_up(min(message.round, self.round), client, len(data))
        events = self.report.events
        if message.round < self.round:
            events["stale"] += 1
            return
        if message.kind == "refused" and message.round == self.round:
            # its own numbers were not finite: the round does not wait for it
            events["declined"] += 1
            self.declined.add(client)
            return
        if client in self.inbox:
            events["duplicate"] += 1
            return
        try:
            message = wire.decode(data, _expected(self.plan, "sketch", self.round))
        except InputError:
            self.declined.add(client)
            raise
        if client not in self.plan.taken(self.round):
            raise InputError(f"expected an update of those who take part in round {self.round}, got client {client}")
        self.inbox[client] = message

    async def _write_to(self, writer: asyncio.StreamWriter, data: bytes, client: int | None, t: int | None) -> None:
        """Who does not read is cut off: nobody waits for it."""
        try:
            writer.write(data)
            await asyncio.wait_for(writer.drain(), WRITE_SECONDS)
            if client is not None and t is not None:
                self.ledger.sent_down(t, client, len(data))
        except (OSError, TimeoutError):
            writer.close()

    def _write(self) -> None:
        said: dict[str, Any] = {**self.ledger.to_json(), **vars(self.report)}
        atomic_write(self.folder / "ledger.json", (json.dumps(said, indent=1) + "\n").encode())


class _Weights:
    """The weights, for late clients alone: the same steps that every client takes."""

    def __init__(self, plan: Plan, history: list[bytes]) -> None:
        self.params = plan.model.init(run_keys(plan.config.seed)[0])
        self.algorithm = make_algorithm(plan.config, plan.model, self.params, None)
        self.optimizer = self.algorithm.server_opt.init(self.params)
        self._step = jax.jit(receive(self.algorithm))
        for t, data in enumerate(history):
            self.apply(t, wire.decode(data).values)

    def apply(self, t: int, mean: np.ndarray) -> None:
        self.params, self.optimizer = self._step(self.params, self.optimizer, jnp.int32(t), jnp.asarray(mean))

    def flat(self) -> np.ndarray:
        return np.asarray(self.algorithm.tree.flatten(self.params))
