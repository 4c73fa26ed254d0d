"""Sketched rounds on an engine of others: the two halves alone, and where flwr is installed on Flower itself."""

import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workers

from isotone.shared.errors import InputError
from isotone.sketching.cohort import Means, Work, make_steps, mean_of, message_size
from isotone.sketching.compressors import Plain, TopK
from isotone.sketching.data import ClientData
from isotone.sketching.federated import fed_algorithm, round_keys
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.training import RunConfig, train

CONFIG = RunConfig(clients=2, rounds=3, local_steps=2, batch=8, kind="identity", concentration=None)
KEY = jax.random.key(3)


def loss(params, x, y):
    """A user's own: least squares on a pytree of their own."""
    return jnp.mean((x @ params["slope"] + params["shift"] - y) ** 2)


def problem(clients=3, most=5):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(clients, most, 4)), jnp.float32)
    data = ClientData(x, jnp.asarray(rng.integers(0, 3, (clients, most)), jnp.int32), jnp.full(clients, most))
    return {"slope": jnp.zeros(4), "shift": jnp.zeros(())}, data


def share(data, c):
    return ClientData(*(array[c : c + 1] for array in (data.x, data.y, data.size)))


def workers_of(algorithm, params, data):
    steps = make_steps(algorithm, params, KEY)
    return [Work(steps, share(data, c), c) for c in range(len(data))]


@pytest.mark.parametrize("settings", [{"ratio": 2.0}, {"ratio": 2.0, "dtype": "int8"}, {"compressor": Plain(5)}])
def test_two_halves_are_the_round(settings):
    """Clients that hold their own weights, and a server that has none: the weights of `round`, with everybody."""
    import optax

    params, data = problem()
    algorithm = fed_algorithm(loss, params, local_steps=2, batch=2, rate=0.1, server_opt=optax.adam(0.1), **settings)
    state, round_of = algorithm.init(params, 3), jax.jit(lambda s: algorithm.round(s, KEY, data)[0])
    works, means = workers_of(algorithm, params, data), Means(message_size(algorithm.compressor))
    for _ in range(3):
        state = round_of(state)
        mean, bad = means.add({str(work.client): work.message() for work in works})
        assert not bad
        if isinstance(algorithm.compressor, RoundedSketch):
            mean = np.asarray(algorithm.compressor.down(round_keys(KEY, works[0].round)[3], jnp.asarray(mean)))
            means.history[-1] = mean
        for work in works:
            work.apply(mean)
    for work in works:
        assert work.round == 3
        for a, b in zip(jax.tree.leaves(work.params), jax.tree.leaves(state.params), strict=True):
            assert np.allclose(a, b, atol=1e-5)
    # a client that was away, and one whose engine keeps arrays alone
    late = workers_of(algorithm, params, data)[0]
    late.catch_up(means.history[:2], 0)
    kept = late.state()
    other = workers_of(algorithm, params, data)[0]
    other.restore(kept)
    other.catch_up(means.history[1:], 1)
    assert np.array_equal(other.params["slope"], works[0].params["slope"]) and other.round == 3
    for call in (
        lambda: late.catch_up(means.history, 3),
        lambda: late.apply(np.zeros(99, np.float32)),
        lambda: late.apply(np.full(means.s, np.nan, np.float32)),
        lambda: late.restore(kept[1:]),
    ):
        with pytest.raises(InputError):
            call()


def test_means_and_who_heard_them():
    means = Means(2)
    assert means.due("a") == (0, [])
    mean, bad = means.add({"b": np.float32([3, 4]), "a": np.float32([1, 2]), "c": np.float32([np.nan, 0])})
    assert mean.tolist() == [2, 3] and bad == ["c"]
    assert means.add({"a": np.zeros(3, np.float32)}) == (None, ["a"]) and len(means.history) == 1
    means.add({"a": np.float32([5, 5])})
    first, told = means.due("a")
    assert first == 0 and [list(y) for y in told] == [[2, 3], [5, 5]] and means.due("a") == (2, [])
    assert means.due("new")[0] == 0 and means.due("new") == (2, [])
    means.forget("a")
    assert len(means.due("a")[1]) == 2
    with pytest.raises(InputError, match="TopK"):
        message_size(TopK(4, 1, 2))
    largest = {name: np.float32([3e38, 0]) for name in "ab"}
    for add in (lambda: means.add(largest), lambda: mean_of(largest, 2)):
        with pytest.raises(InputError, match="sum is finite, got infinity in round 2"):
            add()
    assert len(means.history) == 2, "nothing of it is kept"


@pytest.fixture
def refusing():
    """The module, with names that stand in for flwr's where that is missing."""
    if importlib.util.find_spec("flwr") is not None:
        yield importlib.import_module("isotone.sketching.flower")
        return
    names = ["flwr", "flwr.client", "flwr.common", "flwr.server", "flwr.server.strategy"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda found: type(found, (), {})
    try:
        yield importlib.import_module("isotone.sketching.flower")
    finally:
        for name in [*names, "isotone.sketching.flower"]:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": 1.0}, "not private on Flower, got noise 1.0"),
        ({"epsilon": 2.0}, "got epsilon 2.0"),
        ({"straggle": 0.1}, "straggle 0.1"),
        ({"weigh": "size"}, "weigh 'size'"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_what_flower_can_not_do_is_refused(changes, words, refusing):
    """Whether it is asked for clients, for a strategy or for one client of a process."""
    config = dataclasses.replace(CONFIG, **changes)
    for ask in (refusing.clients_of, refusing.strategy_of, lambda config: refusing.Cohort(config)(0, None)):
        with pytest.raises(InputError, match=words):
            ask(config)


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="flwr is installed")
def test_without_flwr_a_sentence_says_how_to_get_it():
    with pytest.raises(InputError, match="pip install 'flwr"):
        import isotone.sketching.flower  # noqa: F401


# --- on Flower ----------------------------------------------------------------------------------------------------


@pytest.fixture
def flower():
    pytest.importorskip("flwr", reason="flwr is not installed: it pulls typer, rich and protobuf back")
    from isotone.sketching import flower

    return flower


class Proxy:
    """A client as a strategy sees it."""

    def __init__(self, cid, client):
        self.cid, self.client = cid, client


class Manager:
    def __init__(self, proxies):
        self.proxies = proxies

    def wait_for(self, count):
        assert count == len(self.proxies)

    def sample(self, num_clients, min_num_clients):
        return self.proxies[:num_clients]

    def all(self):
        return {proxy.cid: proxy for proxy in self.proxies}


@pytest.mark.slow  # runs where the peers are installed: nox -s slow
def test_the_strategy_and_its_clients(flower):
    """A run with a failure, by hand: everybody ends with the same weights."""
    from flwr.common import EvaluateRes, FitRes, parameters_to_ndarrays

    params, data = problem()
    algorithm = fed_algorithm(loss, params, ratio=2.0, local_steps=2, batch=2, rate=0.1)
    steps = make_steps(algorithm, params, KEY)

    def client(c):
        own = share(data, c)
        return flower.SketchClient(steps, own, c, lambda p: (float(p["shift"]), 0.5))

    proxies = [Proxy(str(c), client(c)) for c in range(3)]
    strategy, manager = flower.SketchedFedAvg(steps.s, 4, 3, fraction=0.67), Manager(proxies)
    start = strategy.initialize_parameters(manager)
    assert parameters_to_ndarrays(start) == []
    for number in range(1, 5):
        results = []
        asked = strategy.configure_fit(number, start, manager)
        assert len(asked) == 2
        for proxy, ins in asked:
            arrays, size, _ = proxy.client.fit(parameters_to_ndarrays(ins.parameters), ins.config)
            assert [a.shape for a in arrays] == [(steps.s,)] and size == 5
            if number == 2 and proxy.cid == "1":
                proxy.client = client(1)  # it has crashed, and a new one comes in its place
                continue
            if number == 3 and proxy.cid == "0":
                arrays = [np.full(steps.s, np.inf, np.float32)]
            parameters = flower.ndarrays_to_parameters(arrays)
            results.append((proxy, FitRes(None, parameters, size, {})))
        strategy.aggregate_fit(number, results, [])
    assert strategy.rejected == [[], [], ["0"], []]
    told = strategy.configure_evaluate(4, start, manager)
    assert strategy.configure_evaluate(3, start, manager) == []
    answers = []
    for proxy, ins in told:
        found, size, metrics = proxy.client.evaluate(parameters_to_ndarrays(ins.parameters), ins.config)
        answers.append((proxy, EvaluateRes(None, found, size, metrics)))
    value, metrics = strategy.aggregate_evaluate(4, answers, [])
    assert metrics == {"accuracy": 0.5} and strategy.accuracy == 0.5
    shifts = [proxy.client.work.params["shift"] for proxy in proxies]
    assert shifts[0] == shifts[1] == shifts[2] == pytest.approx(value)
    for bad in ({"s": 0}, {"fraction": 0.0}, {"clients": 0}):
        with pytest.raises(InputError):
            flower.SketchedFedAvg(**{"s": 3, "rounds": 1, "clients": 2, **bad})
    with pytest.raises(InputError, match="rounds"):
        flower.simulate(CONFIG, 1)


def end(means, config):
    """The weights that the means lead to, and those of plain FedAvg."""
    from isotone.sketching import flower

    steps, make = flower.clients_of(config)
    work = make(0, None).work
    work.catch_up(list(means), 0)
    return work.params


def assert_is_fedavg(means, accuracy, tmp_path):
    plain = train(dataclasses.replace(CONFIG, arm="plain"), tmp_path / "plain")
    for a, b in zip(jax.tree.leaves(end(means, CONFIG)), jax.tree.leaves(plain.params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-6
    assert accuracy == pytest.approx(plain.accuracy, abs=1e-6)


@pytest.mark.slow  # Ray takes its time to start
@pytest.mark.slow  # runs where the peers are installed: nox -s slow
def test_on_flowers_simulation(flower, tmp_path):
    pytest.importorskip("ray", reason="flwr's simulation is not installed")
    strategy = flower.simulation(CONFIG)
    assert strategy.rejected == [[]] * 3
    assert_is_fedavg(strategy.means.history, strategy.accuracy, tmp_path)


@pytest.mark.slow  # three processes
@pytest.mark.slow  # runs where the peers are installed: nox -s slow
def test_on_flower_as_processes_on_loopback(flower, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    path = tmp_path / "served.npz"
    server = spawn.Process(target=workers.flower_server, args=(CONFIG, address, path))
    clients = [spawn.Process(target=workers.flower_client, args=(CONFIG, address, c)) for c in range(2)]
    for process in (server, *clients):
        process.start()
    try:
        for process in (server, *clients):
            process.join(200)
            assert process.exitcode == 0
    finally:
        for process in (server, *clients):
            process.kill()
    with np.load(path) as served:
        # clients are given numbers by hand here, and names by Flower
        assert_is_fedavg(served["means"], float(served["accuracy"]), tmp_path)


PROJECT = """
[project]
name = "sketched"
version = "1.0.0"
description = "sketched rounds"
license = "Apache-2.0"
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "isotone"
[tool.flwr.app.components]
serverapp = "sketched:server"
clientapp = "sketched:client"
[tool.flwr.app.config]
"""
APP = """
import numpy as np
from isotone.sketching import flower
from isotone.sketching.training import RunConfig

CONFIG = RunConfig(clients=2, rounds=3, local_steps=2, batch=8, kind="identity", concentration=None)


class Told(flower.SketchedFedAvg):
    def aggregate_evaluate(self, server_round, results, failures):
        found = super().aggregate_evaluate(server_round, results, failures)
        if self.accuracy is not None:
            np.savez({path!r}, means=np.stack(self.means.history), accuracy=self.accuracy)
        return found


server = flower.server_app(Told(650, 3, 2))
client = flower.client_app(flower.Cohort(CONFIG))
"""


@pytest.mark.slow  # a SuperLink, two SuperNodes, and what they start
@pytest.mark.slow  # runs where the peers are installed: nox -s slow
def test_on_a_superlink_with_two_supernodes(flower, tmp_path):
    app, home, path = tmp_path / "app", tmp_path / "home", tmp_path / "told.npz"
    app.mkdir()
    home.mkdir()
    ports = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    link = f"127.0.0.1:{ports[0]}"
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "sketched.py").write_text(APP.format(path=str(path)))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "l"\n[superlink.l]\naddress = "{link}"\ninsecure = true\n'
    )
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{scripts}:{os.environ['PATH']}"}
    log = (tmp_path / "log").open("w")
    started = []

    def start(*words):
        started.append(subprocess.Popen(words, cwd=app, env=environment, stdout=log, stderr=log))

    try:
        start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(ports[0]))
        for number in range(2):
            node = ["--node-config", f"partition-id={number} num-partitions=2", "--port", str(ports[1 + number])]
            start("flower-supernode", "--insecure", "--superlink", link, *node)
        deadline = time.monotonic() + 250
        command = ["flwr", "run", ".", "l"]
        while (done := subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True)).returncode:
            assert "unavailable" in done.stdout + done.stderr and time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(1)
        while not path.exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        time.sleep(1)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)
        log.close()
    with np.load(path) as told:
        assert_is_fedavg(told["means"], float(told["accuracy"]), tmp_path)
