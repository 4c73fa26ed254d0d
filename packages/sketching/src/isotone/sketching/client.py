"""A client of a run over TCP: it holds its own examples and nobody else's, and keeps the weights itself.

It comes back when the connection is lost, with the round that it has; what it sends for a round is made once, so that
sending it again changes nothing (and, in the private mode, releases nothing). How much noise there is stands in the
server's plan: who does not trust the server demands an epsilon, and sends nothing where the plan costs more.
"""

from __future__ import annotations

import hashlib
import json
import math
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared.checkpoint import CheckpointStore, atomic_write
from isotone.shared.errors import InputError, check_count
from isotone.sketching import wire
from isotone.sketching.cohort import Work
from isotone.sketching.data import ClientData, Dataset, deal, load
from isotone.sketching.exchange import read_exactly
from isotone.sketching.plan import Plan, steps_of
from isotone.sketching.privacy import epsilons
from isotone.sketching.statement import PLANNED, TRUST, own_noise_seed, privacy_statement
from isotone.sketching.weights import save_weights
from isotone.sketching.wire import HEADER, Expected, Message


@dataclass(frozen=True)
class ClientConfig:
    """`client`: its number; `clients`: how many the server must say there are (None: whatever it says). `data`:
    "digits", of which it takes its share, or an .npz of its own. `patience`: seconds without a server before it gives
    up; one that waits for others is there. `epsilon` at `delta`: the most that all rounds of the server's plan may cost
    (None: whatever it says, no noise at all included)."""

    client: int
    host: str = "127.0.0.1"
    port: int = 8765
    clients: int | None = None
    data: str = "digits"
    patience: float = 60.0
    epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_count("client", self.client, 0)
        if self.clients is not None and self.client >= self.clients:
            raise InputError(f"expected a client from 0 to {self.clients - 1}, got {self.client}")
        if not 0 < self.port < 65536:
            raise InputError(f"expected a port from 1 to 65535, got {self.port}")
        if not 0 < self.patience < float("inf"):
            raise InputError(f"expected patience in seconds above 0, got {self.patience}")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"expected a finite epsilon above 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise InputError(f"expected delta in (0, 1), got {self.delta}")


@dataclass(frozen=True, eq=False)
class Finished:
    """`params` as all clients have them; `accuracy` on the test examples that this client has; bytes at its socket;
    `reconnected`: times."""

    params: Any
    accuracy: float
    bytes_up: int
    bytes_down: int
    reconnected: int
    privacy: dict[str, Any] | None


def run_client(
    config: ClientConfig,
    folder: str | Path,
    resume: bool = True,
    *,
    advanced: Callable[[int], None] | None = None,
) -> Finished:
    """Take part until the last round; weights and client.json end up in `folder`.

    `advanced(t)` is called after each round. Raises `InputError` on data that do not fit the server's plan, on a plan
    that costs more than `config.epsilon`, on what the server refuses, on a server that is not there for `patience`
    seconds, on a folder that another client works in and, in the private mode, on a server that asks for a round again
    with other weights: a second release.
    """
    folder = Path(folder)
    source = load(config.data)
    with CheckpointStore(folder):
        finished = _Session(config, folder, source, resume, advanced).run()
        save_weights(folder / "params.safetensors", finished.params)
        said = {name: value for name, value in vars(finished).items() if name != "params"}
        atomic_write(folder / "client.json", (json.dumps({"client": config.client, **said}, indent=1) + "\n").encode())
    return finished


def check_demand(config: ClientConfig, plan: Plan) -> None:
    """Raises `InputError` where all rounds of `plan` cost more than the client's own `epsilon` at its `delta`."""
    if config.epsilon is None:
        return
    demand, privacy = f"a plan of epsilon {config.epsilon:g} or less at delta {config.delta:g}", plan.config.privacy()
    if privacy is None:
        raise InputError(f"expected {demand}, got one without noise")
    cost, _ = epsilons(privacy.rate, privacy.noise, plan.config.releases, config.delta)
    if cost > config.epsilon:
        raise InputError(f"expected {demand}, got one of {cost:.4g} in {plan.config.releases} releases")


def own_share(source: Dataset, plan: Plan, client: int) -> ClientData:
    """The client's examples as `ClientData` of one client: its part of the digits as the plan deals them, or all of its
    own file's. Raises `InputError` where they are of another shape, or have labels that the plan does not."""
    config = plan.config
    if source.x.shape[1:] != plan.shape or source.classes > plan.classes:
        got = f"{source.x.shape[1:]} of {source.classes}"
        raise InputError(f"expected examples of shape {plan.shape} of {plan.classes} classes, got {got}")
    if source.name != "digits":
        return ClientData(jnp.asarray(source.x)[None], jnp.asarray(source.y)[None], jnp.asarray([len(source.y)]))
    dealt = deal(source.x, source.y, config.clients, config.concentration, config.seed)
    size = int(dealt.size[client])
    return ClientData(dealt.x[client : client + 1, :size], dealt.y[client : client + 1, :size], jnp.asarray([size]))


class _Session:
    def __init__(
        self,
        config: ClientConfig,
        folder: Path,
        source: Dataset,
        resume: bool,
        advanced: Callable[[int], None] | None,
    ) -> None:
        self.config, self.folder, self.source, self.resume = config, folder, source, resume
        self.advanced = advanced
        self.releases: Releases | None = None
        self.plan: Plan | None = None
        self.up = self.down = self.connections = 0
        self.sent: tuple[int, bytes] | None = None
        self.last = time.monotonic()

    @property
    def round(self) -> int:
        """The round that the weights are for."""
        return 0 if self.plan is None else self.work.round

    def run(self) -> Finished:
        wait = 0.05
        while True:
            try:
                with socket.create_connection((self.config.host, self.config.port), self.config.patience) as line:
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.connections += 1
                    self._talk(line)
                break
            except OSError as error:
                if time.monotonic() - self.last > self.config.patience:
                    where = f"{self.config.host}:{self.config.port}"
                    raise InputError(
                        f"expected a server at {where} within {self.config.patience:g} seconds, got {error}"
                    ) from None
                time.sleep(wait)
                wait = min(1.0, 1.5 * wait)
        assert self.plan is not None
        test = jnp.asarray(self.source.test_x), jnp.asarray(self.source.test_y)
        accuracy = float(self.plan.model.accuracy(self.work.params, *test))
        privacy, config = self.plan.config.privacy(), self.plan.config
        part = sum(self.config.client in self.plan.taken(t) for t in range(config.rounds))
        trust = PLANNED if self.config.epsilon is None else TRUST
        statement = None if privacy is None else privacy_statement(privacy, config.local_steps, part, trust)
        return Finished(self.work.params, accuracy, self.up, self.down, self.connections - 1, statement)

    def _talk(self, line: socket.socket) -> None:
        """From the greeting to the last round. Raises `OSError` where the line breaks."""
        self._write(line, wire.encode(Message("hello", round=self.round, client=self.config.client)))
        greeting = self._read(line, Expected("plan", limit=HEADER + (1 << 16)))
        self._begin(Plan.parse(greeting.text))
        # it may wait for others as long as it wants: what ends the waiting is the line's end
        line.settimeout(None)
        _keep_alive(line, self.config.patience)
        try:
            self._rounds(line, greeting.round)
        finally:
            self.last = time.monotonic()

    def _rounds(self, line: socket.socket, now: int) -> None:
        """All that are left, of a server at round `now`."""
        assert self.plan is not None
        while self.round < self.plan.config.rounds:
            # what is there already comes first: who is behind catches up before it computes
            behind = self.round < now or bool(select.select([line], [], [], 0)[0])
            if not behind and self.config.client in self.plan.taken(self.round):
                self._write(line, self._update(self.round))
            self._hear(line)
        self._write(line, wire.encode(Message("hello", round=self.round, client=self.config.client)))

    def _hear(self, line: socket.socket) -> None:
        """The next mean, or the weights."""
        plan = self.plan
        assert plan is not None
        d = plan.compressor.d
        limit = HEADER + 4 * max(d, plan.s) + 4096
        found = self._read(line, Expected(seed=plan.config.seed, d=d, limit=limit))
        if found.kind == "mean" and found.round < self.round:
            return  # told twice
        if found.kind == "mean" and (found.round, found.s) == (self.round, plan.s):
            self.work.apply(found.values)
        elif found.kind == "weights" and found.s == d and self.round <= found.round <= plan.config.rounds:
            tree = self.work.steps.algorithm.tree
            self.work.params = tree.unflatten(jnp.asarray(found.values))
            self.work.round = found.round
        else:
            raise InputError(f"expected the mean of round {self.round}, got {found.kind} of round {found.round}")
        if self.advanced is not None:
            self.advanced(self.round - 1)

    def _begin(self, plan: Plan) -> None:
        if self.plan is not None:
            if plan != self.plan:
                raise InputError("expected the plan that this run began with, the server has another")
            return
        clients = plan.config.clients
        if self.config.clients not in (None, clients) or self.config.client >= clients:
            asked = f"{self.config.client} of {self.config.clients or 'any'}"
            raise InputError(f"expected a client of the server's {clients}, got {asked}")
        check_demand(self.config, plan)
        data = own_share(self.source, plan, self.config.client)
        secret = None
        if plan.config.private:
            self.releases = Releases(self.folder / "releases.json", plan, self.resume)
            secret = own_noise_seed(self.folder, self.releases.begun)
        self.work = Work(steps_of(plan, secret), data, self.config.client)
        self.plan = plan

    def _update(self, t: int) -> bytes:
        """The message of round t, made once. One that is not finite is declined, in a word of its own."""
        if self.sent is not None and self.sent[0] == t:
            return self.sent[1]
        assert self.plan is not None
        if self.releases is not None:
            self.releases.add(t, self.work.params)
        values = self.work.message()
        seed, d = self.plan.config.seed, self.plan.compressor.d
        if np.isfinite(values).all():
            made = Message("sketch", seed, t, self.config.client, d, values, dtype=self.plan.config.dtype)
        else:
            made = Message("refused", seed, t, self.config.client, d, text="an update that is not finite")
        self.sent = (t, wire.encode(made))
        return self.sent[1]

    def _write(self, line: socket.socket, data: bytes) -> None:
        line.sendall(data)
        self.up += len(data)

    def _read(self, line: socket.socket, expected: Expected) -> Message:
        header = read_exactly(line, HEADER)
        length = wire.payload_length(header, expected) if header else 0
        body = read_exactly(line, length)
        if not header or len(body) < length:
            raise ConnectionError("the server closed the connection")
        self.down += HEADER + length
        if (found := wire.decode(header + body)).kind == "refused":
            raise InputError(f"expected a place in the run, the server refused: {found.text}")
        return wire.decode(header + body, expected)


def _keep_alive(line: socket.socket, patience: float) -> None:
    """Asks a silent peer now and then whether it is there, so that the line of a host that is gone breaks after about
    `patience` seconds."""
    every = min(max(1, round(patience / 4)), 32767)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):
        # Linux has the first, macOS the second
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), every)


class Releases:
    """For which weights each round was answered, written down before the answer leaves: no round is answered for two.

    The noise of a round is the same however often it is asked for; with other weights it would be a second release
    under the same noise, and their difference would have none. Raises `InputError` on a file of another plan.
    """

    def __init__(self, path: Path, plan: Plan, resume: bool) -> None:
        self.path = path
        self.plan = hashlib.sha256(plan.text.encode()).hexdigest()
        self.rounds: dict[str, str] = {}
        self.begun = resume and path.exists()
        if self.begun:
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                self.rounds, other = dict(said["rounds"]), said["plan"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"expected the releases of this client, got a torn or other file: {str(path)!r}"
                ) from None
            if other != self.plan:
                raise InputError(
                    f"expected releases of the same plan in {str(path)!r}, it holds another's: use --fresh"
                )

    def add(self, t: int, params: Any) -> None:
        """Note that round t is answered for `params`. Raises `InputError` where it was for others."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        if self.rounds.setdefault(str(t), digest.hexdigest()) != digest.hexdigest():
            raise InputError(f"expected the weights that round {t} was answered for, the server tells of others")
        content = json.dumps({"plan": self.plan, "rounds": self.rounds})
        atomic_write(self.path, content.encode())
