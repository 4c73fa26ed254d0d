"""Sketched rounds on Flower: a strategy that averages s numbers, and a client that keeps the weights.

What Flower carries as `Parameters` is sketches up and means of sketches down; the strategy never has the weights. A
client that was not asked for some rounds is told all means since. Importing this needs flwr, which is not among the
dependencies: it asks for older typer and protobuf than the rest.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from isotone.shared.errors import InputError, check_count
from isotone.sketching.cohort import Means, Steps, Work, check_flower, make_steps
from isotone.sketching.data import ClientData
from isotone.sketching.training import RunConfig, prepare

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # nothing is told to anybody unless the user wants it
try:
    from flwr.client import Client, ClientApp, NumPyClient, start_client
    from flwr.common import (
        ArrayRecord,
        EvaluateIns,
        FitIns,
        Parameters,
        ndarrays_to_parameters,
        parameters_to_ndarrays,
    )
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig, start_server
    from flwr.server.strategy import Strategy
except ImportError:
    raise InputError("expected flwr, it is not installed: pip install 'flwr[simulation]==1.42.0'") from None

STATE = "isotone.sketching"  # pragma: no cover - needs flwr, as all below


class SketchedFedAvg(Strategy):  # pragma: no cover - needs flwr
    """Averages sketches (section 2.3). `s`: numbers in a message; `rounds` in all; `clients` to wait for.

    `fraction` of them takes part in a round. In the last round everybody is told what it missed, and asked for its
    accuracy. `means.history`: what was broadcast; `accuracy`: the clients' mean at the end; `finished`: when each round
    was.
    """

    def __init__(self, s: int, rounds: int, clients: int, fraction: float = 1.0) -> None:
        for name, value in (("s", s), ("rounds", rounds), ("clients", clients)):
            check_count(name, value, 1)
        if not 0 < fraction <= 1:
            raise InputError(f"expected a fraction in (0, 1], got {fraction}")
        self.rounds, self.clients, self.fraction = rounds, clients, fraction
        self.means = Means(s)
        self.rejected: list[list[str]] = []
        self.finished: list[float] = []
        self.accuracy: float | None = None
        self._asked: set[str] = set()

    def initialize_parameters(self, client_manager: Any) -> Parameters:
        """No weights: everybody begins with the same, and there is no mean yet."""
        return ndarrays_to_parameters([])

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        """To each of those who take part: the means that it has not heard."""
        client_manager.wait_for(self.clients)
        count = max(1, round(self.fraction * self.clients))
        chosen = client_manager.sample(num_clients=count, min_num_clients=self.clients)
        self._asked = {proxy.cid for proxy in chosen}
        return [(proxy, FitIns(*self._told(proxy.cid))) for proxy in chosen]

    def _told(self, cid: str) -> tuple[Parameters, dict[str, Any]]:
        first, means = self.means.due(cid)
        return ndarrays_to_parameters(means), {"first": first, "round": len(self.means.history)}

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[Any, dict[str, Any]]:
        """The mean of the sketches that are finite; who failed is told everything next time."""
        messages = {}
        for proxy, result in results:
            arrays = parameters_to_ndarrays(result.parameters)
            messages[proxy.cid] = np.asarray(arrays[0], np.float32) if len(arrays) == 1 else np.zeros(0, np.float32)
        for cid in self._asked - set(messages):
            self.means.forget(cid)
        mean, bad = self.means.add(messages)
        self.rejected.append(bad)
        self.finished.append(time.perf_counter())
        if mean is None:
            return None, {"heard": 0}
        return ndarrays_to_parameters([mean]), {"heard": len(messages) - len(bad)}

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        """Everybody, after the last round."""
        if server_round < self.rounds:
            return []
        everybody = client_manager.all().values()
        return [(proxy, EvaluateIns(*self._told(proxy.cid))) for proxy in everybody]

    def aggregate_evaluate(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[Any, dict]:
        """The clients' accuracy, each by its examples."""
        total = sum(result.num_examples for _, result in results)
        if not total:
            return None, {}
        right = sum(result.num_examples * float(result.metrics["accuracy"]) for _, result in results)
        loss = sum(result.num_examples * result.loss for _, result in results) / total
        self.accuracy = right / total
        return loss, {"accuracy": self.accuracy}

    def evaluate(self, server_round: int, parameters: Parameters) -> None:
        """Nothing: there are no weights here."""
        return None


class SketchClient(NumPyClient):  # pragma: no cover - needs flwr
    """One client of `SketchedFedAvg`: `steps` from `make_steps`, on a loss and weights of the user's own, and `data` of
    one client. `record`: where Flower keeps a virtual client's state between rounds.

    `score(params) -> (loss, accuracy)` on what this client tests on.
    """

    def __init__(
        self,
        steps: Steps,
        data: ClientData,
        client: int,
        score: Callable[[Any], tuple[float, float]] | None = None,
        record: Any = None,
    ) -> None:
        self.work, self.size = Work(steps, data, client), int(data.size[0])
        self.score, self.record = score, record
        if record is not None and STATE in record.array_records:
            self.work.restore(record.array_records[STATE].to_numpy_ndarrays())

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict]:
        """Catch up, and send the sketch of this round's local steps."""
        self._hear(parameters, config)
        return [self.work.message()], self.size, {}

    def evaluate(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[float, int, dict]:
        """Catch up, and say how good the weights are."""
        self._hear(parameters, config)
        loss, accuracy = self.score(self.work.params) if self.score else (0.0, 0.0)
        return loss, self.size, {"accuracy": accuracy}

    def _hear(self, parameters: list[np.ndarray], config: dict[str, Any]) -> None:
        self.work.catch_up(parameters, int(config["first"]))
        if self.work.round != int(config["round"]):
            raise InputError(f"expected to be at round {config['round']}, got to {self.work.round}")
        if self.record is not None:
            self.record.array_records[STATE] = ArrayRecord(self.work.state())


def server_app(strategy: SketchedFedAvg) -> ServerApp:  # pragma: no cover - needs flwr
    """For `flwr.simulation.run_simulation`, or the `serverapp` of a Flower app on a SuperLink."""

    def components(context: Any) -> ServerAppComponents:
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=strategy.rounds))

    return ServerApp(server_fn=components)


def client_app(make: Callable[[int, Any], SketchClient]) -> ClientApp:  # pragma: no cover - needs flwr
    """`make(number, record)`: the client of a partition (a SuperNode's `partition-id`); called for every message, as
    Flower does. The `clientapp` of a Flower app is a plain assignment of it."""

    return ClientApp(client_fn=_Numbered(make))


class _Numbered:  # pragma: no cover - needs flwr
    """What Flower calls for a client: a class of a module, which travels to Ray's processes by its name."""

    def __init__(self, make: Callable[[int, Any], SketchClient]) -> None:
        self.make = make

    def __call__(self, context: Any) -> Client:
        return self.make(int(context.node_config["partition-id"]), context.state).to_client()


def serve(strategy: SketchedFedAvg, address: str = "127.0.0.1:8080") -> None:  # pragma: no cover - needs flwr
    """The strategy as a process of its own, to its last round. (Loopback unless another address is asked for.)"""
    start_server(server_address=address, config=ServerConfig(num_rounds=strategy.rounds), strategy=strategy)


def join(client: SketchClient, address: str = "127.0.0.1:8080") -> None:  # pragma: no cover - needs flwr
    """A client as a process of its own, until the server is through."""
    start_client(server_address=address, client=client.to_client(), insecure=True)


def clients_of(config: RunConfig) -> tuple[Steps, Callable[[int, Any], SketchClient]]:  # pragma: no cover - needs flwr
    """The steps of `config`, and its clients by number, each with its own share of the data. Raises `InputError` as
    `check_flower`."""
    check_flower(config)
    setup = prepare(config)
    steps = make_steps(setup.algorithm, setup.params, setup.key)
    test = jnp.asarray(setup.dataset.test_x), jnp.asarray(setup.dataset.test_y)

    def score(params: Any) -> tuple[float, float]:
        return float(setup.model.loss(params, *test)), float(setup.model.accuracy(params, *test))

    def make(number: int, record: Any = None) -> SketchClient:
        size = int(setup.data.size[number])
        mine = slice(number, number + 1)
        own = ClientData(setup.data.x[mine, :size], setup.data.y[mine, :size], setup.data.size[mine])
        return SketchClient(steps, own, number, score, record)

    return steps, make


class Cohort:  # pragma: no cover - needs flwr
    """The clients of a config by number, made once in each process that asks for one: neither compiled functions nor
    keys travel between processes."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __call__(self, number: int, record: Any) -> SketchClient:
        """The client `number`, its state from `record`."""
        if self.config not in _CLIENTS:
            _CLIENTS[self.config] = clients_of(self.config)[1]
        return _CLIENTS[self.config](number, record)


_CLIENTS: dict[RunConfig, Callable[[int, Any], SketchClient]] = {}


def strategy_of(config: RunConfig) -> SketchedFedAvg:  # pragma: no cover - needs flwr
    """The strategy for the rounds and clients of `config`."""
    fraction = (config.participants or config.clients) / config.clients
    return SketchedFedAvg(clients_of(config)[0].s, config.rounds, config.clients, fraction)


def simulation(config: RunConfig, cpus: float = 1.0) -> SketchedFedAvg:  # pragma: no cover - needs flwr
    """`config` by Flower's simulation runtime (Ray), `cpus` for each virtual client; the strategy afterwards."""
    from flwr.simulation import run_simulation

    strategy = strategy_of(config)
    resources = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}
    run_simulation(server_app(strategy), client_app(Cohort(config)), config.clients, backend_config=resources)
    return strategy


def simulate(config: RunConfig, rounds: int) -> float:  # pragma: no cover - needs flwr
    """Seconds per round of Flower's simulation, its start and the first round's compiling left out.

    Raises `InputError` on fewer than 2 rounds, and `RuntimeError` where a round had no updates.
    """
    check_count("rounds", rounds, 2)
    strategy = simulation(dataclasses.replace(config, rounds=rounds))
    if len(strategy.means.history) < rounds:
        raise RuntimeError(f"expected updates in {rounds} rounds, got them in {len(strategy.means.history)}")
    finished = strategy.finished
    return (finished[-1] - finished[0]) / (rounds - 1)
