"""Rounds over TCP: what the simulation gives, whatever clients, connections and the server's own life do meanwhile."""

import dataclasses
import functools
import json
import os
import socket
import time

import jax
import numpy as np
import pytest
import workers
from safetensors.numpy import load_file

from isotone.shared.checkpoint import CheckpointStore
from isotone.shared.errors import InputError
from isotone.sketching import wire
from isotone.sketching.client import ClientConfig
from isotone.sketching.ledger import Ledger
from isotone.sketching.plan import Plan, steps_of
from isotone.sketching.server import ServerConfig, read_log, serve
from isotone.sketching.training import RunConfig, train
from isotone.sketching.wire import HEADER, Message

CONFIG = RunConfig(clients=4, rounds=5, local_steps=2, batch=8, ratio=8.0, concentration=None)
PLAN = Plan(CONFIG, (8, 8, 1), 10)
QUICK = {"deadline": 20.0, "patience": 30.0, "linger": 2.0}


@functools.cache
def simulated(config):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return train(config, Path(folder)).params


def assert_same(finished, config):
    """Bit for bit among the clients, to 1e-5 of the simulation."""
    leaves = [jax.tree.leaves(one.params) for one in finished]
    for other in leaves[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(leaves[0], other, strict=True))
    for a, b in zip(leaves[0], jax.tree.leaves(simulated(config)), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"participants": 2, "server": "momentum", "server_rate": 0.3}, {"dtype": "int8"}]
)
def test_a_run_over_tcp_is_the_simulation(changes, tmp_path):
    """Weights, and bytes: those of both ends are the same, and those of the formula with the headers."""
    config = dataclasses.replace(CONFIG, **changes)
    plan = Plan(config, (8, 8, 1), 10)
    running, port = workers.server(plan, tmp_path / "server", **QUICK)
    clients = [workers.client(c, port, tmp_path, clients=4) for c in range(4)]
    finished = [task.result() for task in clients]
    report = running.result()
    assert_same(finished, config)
    assert report.heard == [plan.taken(t) for t in range(5)] and not any(report.events.values())
    said = json.loads((tmp_path / "server" / "ledger.json").read_text())
    ledger = Ledger.from_json(said)
    size = HEADER + (4 + plan.s if config.dtype == "int8" else 4 * plan.s)
    for t in range(5):
        assert [ledger.up.get((t, c), 0) for c in range(4)] == [size * (c in plan.taken(t)) for c in range(4)]
        assert [ledger.down[t, c] for c in range(4)] == [size] * 4, "everybody is told"
    assert sum(one.bytes_up for one in finished) == ledger.total[0] + ledger.other["up"]
    assert sum(one.bytes_down for one in finished) == ledger.total[1] + ledger.other["down"]
    with CheckpointStore(tmp_path / "client-3"), pytest.raises(InputError, match="process"):
        workers.client(3, port, tmp_path).result()
    weights = load_file(tmp_path / "client-3" / "params.safetensors")
    assert np.array_equal(weights["w"], finished[0].params["w"]) and 0.1 < finished[0].accuracy < 1


def test_bad_company_changes_nothing(tmp_path):
    """Garbage, a web browser, too long a message, somebody else's update, NaN, a broken line: four clients end as
    ever."""
    running, port = workers.server(PLAN, tmp_path / "server", wait_for=3, **QUICK)
    for data in (b"GET / HTTP/1.1\r\n\r\n" + bytes(100), os.urandom(200), wire.encode(Message("mean", values=ones()))):
        line = workers.Line(port)
        line.say(data)
        assert line.hear().kind == "refused" and line.hear() is None
    long = bytearray(wire.encode(Message("hello")))
    long[-16:-12] = (1 << 30).to_bytes(4, "little")
    line = workers.Line(port)
    line.say(bytes(long))
    assert "at most" in line.hear().text
    outside = workers.Line(port)
    assert "client from 0 to 3" in outside.hello(4).text
    ahead = workers.Line(port)
    assert "ahead" in ahead.hello(0, have=3).text
    half = workers.Line(port)
    half.hello(1)
    half.say(update(1)[:100])
    half.close()
    spoof = workers.Line(port)
    spoof.hello(0)
    spoof.say(update(1))
    assert "client 0" in spoof.hear().text
    clients = [workers.client(c, port, tmp_path) for c in range(4)]
    finished = [task.result() for task in clients]
    report = running.result()
    assert_same(finished, CONFIG)
    assert report.events["refused"] == 7 and report.heard == [[0, 1, 2, 3]] * 5


def ones(value=1.0):
    return np.full(PLAN.s, value, np.float32)


def update(client, t=0, value=1.0, **changes):
    return wire.encode(Message("sketch", CONFIG.seed, t, client, PLAN.compressor.d, ones(value), **changes))


def test_messages_are_idempotent_and_stragglers_are_left_out(tmp_path):
    """Four bare lines in place of clients: what the server sends down is the mean of who was heard, once each."""
    running, port = workers.server(PLAN, tmp_path, deadline=0.5, patience=20.0, linger=0.1)
    lines = [workers.Line(port) for _ in range(4)]
    for number, line in enumerate(lines):
        plan = line.hello(number)
        assert Plan.parse(plan.text) == PLAN and plan.round == 0
    lines[0].say(update(0, value=1.0) + update(0, value=1.0) + update(0, value=9.0))
    lines[1].say(update(1, value=3.0))
    lines[2].say(wire.encode(Message("refused", CONFIG.seed, 0, 2, PLAN.compressor.d, text="not finite")))
    # 3 is late: the round ends at its deadline without it
    found = [line.hear() for line in lines]
    assert all(m.round == 0 and m.extra == 2 and (m.values == 2.0).all() for m in found)
    # what comes late, or again, counts for no round
    lines[3].say(update(3, 0, value=50.0))
    lines[1].say(update(1, 0, value=50.0))
    for number, line in enumerate(lines[:3]):
        line.say(update(number, 1, value=float(number)))
    # NaN that is sealed well: the sender is cut off, the round does not wait for it
    nan = bytearray(update(3, 1))
    nan[HEADER : HEADER + 4] = np.float32("nan").tobytes()
    lines[3].say(seal(bytes(nan)))
    assert [line.hear().values[0] for line in lines[:3]] == [1.0] * 3
    refusal = lines[3].hear()
    refusal = refusal if refusal.kind == "refused" else lines[3].hear()
    assert "NaN" in refusal.text
    # a client that comes back takes its own place, and hears what it has missed in order
    back = workers.Line(port)
    assert back.hello(3, have=1).round == 2 and back.hear().round == 1
    again = workers.Line(port)
    assert again.hello(0, have=0).round == 2 and [again.hear().round for _ in range(2)] == [0, 1]
    assert lines[0].hear() is None, "its older line is closed"
    for t in (2, 3, 4):
        for number, line in enumerate([again, lines[1], lines[2], back]):
            line.say(update(number, t))
        assert [line.hear().round for line in (again, lines[1], lines[2], back)] == [t] * 4
    report = running.result()
    assert report.heard == [[0, 1], [0, 1, 2], *[[0, 1, 2, 3]] * 3]
    assert report.events == {"stale": 2, "duplicate": 2, "declined": 1, "refused": 1}
    # without the ledger the log tells of the rounds in which everybody was heard
    (tmp_path / "ledger.json").unlink()
    running, _ = workers.server(PLAN, tmp_path, linger=0.1)
    assert running.result().heard == [None, None, *[[0, 1, 2, 3]] * 3]


def seal(data):
    import struct
    import zlib

    front = data[: HEADER - 12] + bytes(12)
    return data[: HEADER - 12] + struct.pack("<I8x", zlib.crc32(data[HEADER:], zlib.crc32(front))) + data[HEADER:]


@pytest.mark.parametrize("catch_up", ["history", "weights"])
def test_who_comes_late_ends_with_the_same_weights(catch_up, tmp_path):
    """Rounds 0 and 1 are over when the fourth client comes."""
    late = []

    def after(t, heard):
        if t == 1:
            late.append(workers.client(3, port, tmp_path))

    options = {**QUICK, "deadline": 0.05, "wait_for": 3, "catch_up": catch_up}
    running, port = workers.server(PLAN, tmp_path / "server", round_done=after, **options)
    clients = [workers.client(c, port, tmp_path) for c in range(3)]
    finished = [task.result() for task in clients] + [late[0].result()]
    report = running.result()
    first = jax.tree.leaves(finished[0].params)
    for one in finished[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(first, jax.tree.leaves(one.params), strict=True))
    assert all(3 not in heard for heard in report.heard[:2])


def test_a_server_that_ends_goes_on_where_it_was(tmp_path):
    """It is stopped after round 1 without a word, and started again at the same port: the clients come back."""

    class Gone(Exception):
        pass

    def after(t, heard):
        if t == 1:
            raise Gone

    running, port = workers.server(PLAN, tmp_path / "server", round_done=after, **QUICK)
    clients = [workers.client(c, port, tmp_path) for c in range(4)]
    with pytest.raises(Gone):
        running.result()
    log = tmp_path / "server" / "rounds.log"
    whole, size = log.read_bytes(), HEADER + 4 * PLAN.s
    assert len(whole) == 2 * size
    said = Ledger.parse((tmp_path / "server" / "ledger.json").read_text())
    assert said.round_bytes(1) == (4 * size, 4 * size), "also of what the last round told"
    # a third round that was being written
    log.write_bytes(whole + whole[:50])
    running, _ = workers.server(PLAN, tmp_path / "server", port=port, **QUICK)
    finished = [task.result() for task in clients]
    report = running.result()
    assert_same(finished, CONFIG)
    assert report.heard == [[0, 1, 2, 3]] * 5 and all(one.reconnected >= 1 for one in finished)
    # all is over: whoever comes now is told everything
    running, _ = workers.server(PLAN, tmp_path / "server", port=port, **QUICK)
    again = workers.client(2, port, tmp_path).result()
    running.result()
    assert_same([finished[0], again], CONFIG)
    other = Plan(dataclasses.replace(CONFIG, rate=0.1), (8, 8, 1), 10)
    with pytest.raises(InputError, match="another"):
        serve(other, tmp_path / "server", ServerConfig(**QUICK))
    log.write_bytes(whole[:HEADER] + b"\1" + whole[HEADER + 1 :] + whole)
    with pytest.raises(InputError, match="corrupted"):
        read_log(log, PLAN)


def test_a_client_of_ones_own_examples(tmp_path):
    """Arrays of one's own in the private mode, which is not asked twice for one round with other weights."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        x = rng.normal(size=(40, 3))
        np.savez(tmp_path / f"{name}.npz", x=x, y=(x[:, 0] > 0).astype(int))
    np.savez(tmp_path / "wide.npz", x=rng.normal(size=(40, 4)), y=np.arange(40) % 2)
    config = dataclasses.replace(CONFIG, clients=2, rounds=2, arm="plain", noise=1.0, sampling=0.5, rate=0.1)
    plan = Plan(config, (3,), 2)
    running, port = workers.server(plan, tmp_path / "server", **QUICK)
    with pytest.raises(InputError, match="shape"):
        workers.client(0, port, tmp_path, data=str(tmp_path / "wide.npz")).result()
    with pytest.raises(InputError, match="server's 2"):
        workers.client(0, port, tmp_path, clients=3).result()
    names = enumerate("ab")
    clients = [workers.client(c, port, tmp_path, data=str(tmp_path / f"{name}.npz")) for c, name in names]
    finished = [task.result() for task in clients]
    running.result()
    assert finished[0].privacy["releases"] == 2 * 2 and finished[0].privacy["epsilon_rdp"] > 0
    assert "server's plan" in finished[0].privacy["trust"], "no epsilon was demanded"
    assert all(np.array_equal(finished[0].params[k], finished[1].params[k]) for k in "wb")
    # the server begins anew, with a history that is not the old one: no second release
    running, port = workers.server(plan, tmp_path / "server", resume=False, wait_for=2, **QUICK)
    again = workers.client(0, port, tmp_path, data=str(tmp_path / "a.npz"))
    line = workers.Line(port)
    line.hello(1)
    line.say(wire.encode(Message("sketch", config.seed, 0, 1, 8, np.full(8, 0.7, np.float32))))
    with pytest.raises(InputError, match="round 1 was answered for"):
        again.result()
    line.say(wire.encode(Message("sketch", config.seed, 1, 1, 8, np.ones(8, np.float32))))
    line.say(wire.encode(Message("hello", round=2, client=1)))
    line.close()


def test_a_server_that_waits_is_there(tmp_path):
    """It tells nothing for longer than the client's patience, twice: the line stays. Then it is gone, and the patience
    begins."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        task = workers.client(0, listener.getsockname()[1], tmp_path, patience=0.8)
        for told in (0, 2):
            line = workers.Line(listener.accept()[0])
            hello = line.hear()
            assert (hello.kind, hello.round) == ("hello", told)
            line.say(wire.encode(Message("plan", CONFIG.seed, told, text=PLAN.text)))
            for t in range(told, told + 2):
                time.sleep(1.3)
                assert task.is_alive()
                line.say(wire.encode(Message("mean", CONFIG.seed, t, d=PLAN.compressor.d, values=ones(0.0), extra=4)))
            time.sleep(1.3)
            assert task.is_alive()
            line.socket.shutdown(socket.SHUT_WR)
            while line.hear() is not None:
                pass
            line.close()
    began = time.monotonic()
    with pytest.raises(InputError, match=r"within 0\.8 seconds"):
        task.result()
    assert time.monotonic() - began > 0.5


def test_silent_connections_are_counted(tmp_path):
    """None of them says who it is: past 4 a client and 16 the next one is refused, until one goes."""
    running, port = workers.server(PLAN, tmp_path, patience=2.0)
    silent = [workers.Line(port) for _ in range(4 * 4 + 16)]
    refused = workers.Line(port).hear()
    assert refused.kind == "refused" and "at most 32 open connections, got 33" in refused.text
    silent.pop().close()
    deadline = time.monotonic() + 20
    while (found := workers.Line(port).hello(0)) is None or found.kind == "refused":
        assert time.monotonic() < deadline
    assert found.kind == "plan"
    with pytest.raises(InputError, match="4 clients"):
        running.result()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "without noise"), ({"noise": 0.5}, "at delta 0.001, got one of"), ({"noise": 4.0}, None)],
)
def test_a_client_demands_an_epsilon(changes, words, tmp_path):
    """A server whose plan has less noise, or none, is told nothing but who greets it."""
    config = dataclasses.replace(CONFIG, clients=1, rounds=1, sampling=0.1, **changes)
    patience = 30.0 if words is None else 1.0
    running, port = workers.server(Plan(config, (8, 8, 1), 10), tmp_path / "server", patience=patience, linger=2.0)
    task = workers.client(0, port, tmp_path, epsilon=0.5, delta=1e-3)
    if words is None:
        assert "not trusted" in task.result().privacy["trust"]
        assert running.result().heard == [[0]]
        return
    with pytest.raises(InputError, match=words):
        task.result()
    with pytest.raises(InputError, match="nothing came"):
        running.result()
    assert not (tmp_path / "client-0" / "releases.json").exists() and not (tmp_path / "server" / "ledger.json").exists()


def test_nobody_comes(tmp_path):
    with pytest.raises(InputError, match="4 clients within 0.1 seconds"):
        serve(PLAN, tmp_path, ServerConfig(patience=0.1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(InputError, match="expected a server at 127.0.0.1"):
        workers.client(0, port, tmp_path, patience=0.1).result()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan(dataclasses.replace(CONFIG, arm="topk"), (8, 8, 1), 10),
        lambda: Plan(dataclasses.replace(CONFIG, straggle=0.1), (8, 8, 1), 10),
        lambda: Plan(dataclasses.replace(CONFIG, weigh="size"), (8, 8, 1), 10),
        lambda: Plan(CONFIG, (8, 8, 1), 1),
        lambda: Plan(dataclasses.replace(CONFIG, size=1000), (8, 8, 1), 10),
        lambda: Plan.parse("{}"),
        lambda: Plan.parse(PLAN.text[:-4]),
        lambda: Plan.parse(PLAN.text.replace('"rounds"', '"turns"')),
        lambda: ServerConfig(port=70000),
        lambda: ServerConfig(deadline=-1.0),
        lambda: ServerConfig(patience=float("nan")),
        lambda: ServerConfig(wait_for=0),
        lambda: ServerConfig(catch_up="gossip"),
        lambda: ClientConfig(-1),
        lambda: ClientConfig(3, clients=3),
        lambda: ClientConfig(0, port=0),
        lambda: ClientConfig(0, patience=0.0),
        lambda: ClientConfig(0, epsilon=0.0),
        lambda: ClientConfig(0, epsilon=float("nan")),
        lambda: ClientConfig(0, delta=1.0),
        lambda: steps_of(Plan(dataclasses.replace(CONFIG, noise=1.0), (8, 8, 1), 10)),
    ],
)
def test_settings_that_mean_nothing(make):
    with pytest.raises(InputError):
        make()


def test_settings_of_a_server_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="at most 4"):
        serve(PLAN, tmp_path / "1", ServerConfig(wait_for=5))
    other = Plan(dataclasses.replace(CONFIG, server="adam"), (8, 8, 1), 10)
    with pytest.raises(InputError, match="without state"):
        serve(other, tmp_path / "2", ServerConfig(catch_up="weights"))
