"""What all sides of a run over the network share: the plan, and the pure functions of a round that it stands for.

The server sends the plan to whoever greets it. Seeds are in it, and so everybody makes the same sketches, the same
first weights and the same draw of participants, and nothing but sketches and their means travels (section 2.3).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.shared.errors import InputError
from isotone.sketching.compressors import Compressor, Plain, Sketched
from isotone.sketching.data import ClientData
from isotone.sketching.federated import FedAlgorithm
from isotone.sketching.models import Model, make_model
from isotone.sketching.training import RunConfig, make_algorithm, make_compressor, round_keys, run_keys

LINEAR_ARMS = ("sketch", "plain", "rand-k")


@dataclass(frozen=True)
class Plan:
    """`config` of the run; `shape` and `classes` of everybody's data. `config.data` and the dealing are the clients'
    own affair.

    Raises `InputError` where what travels can not be added by a server that knows nothing of it, where stragglers are
    to be drawn (here they are real) and where clients are to be weighed.
    """

    config: RunConfig
    shape: tuple[int, ...]
    classes: int

    def __post_init__(self) -> None:
        if self.config.arm not in LINEAR_ARMS:
            raise InputError(f"expected an arm of {', '.join(LINEAR_ARMS)} for a server, got {self.config.arm!r}")
        if self.config.straggle:
            raise InputError(f"expected no drawn stragglers over a network, got straggle {self.config.straggle}")
        if self.config.weigh != "equal":
            raise InputError(f"expected clients of equal weight over a network, got weigh {self.config.weigh!r}")
        if self.classes < 2 or not self.shape or min(self.shape) < 1:
            raise InputError(f"expected 2 classes or more and a shape, got {self.classes} and {self.shape}")
        self.compressor  # noqa: B018 - its own checks

    @cached_property
    def model(self) -> Model:
        return make_model(self.config.model, self.shape, self.classes, self.config.hidden)

    @cached_property
    def outline(self) -> Any:
        """Shapes and types of the weights: all that a server has of them."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    @cached_property
    def compressor(self) -> Compressor:
        return make_compressor(self.config, self.outline)

    @property
    def s(self) -> int:
        """Numbers in a message."""
        return self.compressor.sketch.s if isinstance(self.compressor, Sketched) else self.compressor.d

    def taken(self, t: int) -> list[int]:
        """Who takes part in round t: what `FedAlgorithm.round` draws."""
        clients, m = self.config.clients, self.config.participants or self.config.clients
        return list(range(clients)) if m == clients else _drawn(self.config.seed, clients, m, t)

    @property
    def text(self) -> str:
        """As it travels."""
        config = dataclasses.asdict(self.config)
        return json.dumps({"config": config, "shape": list(self.shape), "classes": self.classes}, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """What `text` was. Raises `InputError` on anything else."""
        try:
            found = json.loads(text)
            shape = tuple(int(n) for n in found["shape"])
            return cls(RunConfig(**found["config"]), shape, int(found["classes"]))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise InputError("expected a plan, got other text") from None


@functools.lru_cache(maxsize=1 << 16)
def _drawn(seed: int, clients: int, m: int, t: int) -> list[int]:
    chosen = round_keys(run_keys(seed)[1], t)[0]
    return sorted(jax.random.choice(chosen, clients, (m,), replace=False).tolist())


@dataclass(frozen=True, eq=False)
class Steps:
    """The two functions of a client, compiled once for a plan: `send(params, t, x, y, size, client) -> (s,)` and
    `receive(params, optimizer, t, y) -> (params, optimizer)`."""

    params: Any
    algorithm: FedAlgorithm
    send: Callable[..., Array]
    receive: Callable[..., tuple[Any, Any]]


@functools.lru_cache(maxsize=8)
def steps_of(plan: Plan, noise_seed: int = 0) -> Steps:
    """First weights and compiled steps; `noise_seed`: of the private mode's noise."""
    start, rounds = run_keys(plan.config.seed)
    params = plan.model.init(start)
    algorithm = make_algorithm(plan.config, plan.model, params, plan.config.privacy(), noise_seed)
    update = algorithm.local_update or algorithm.local

    def send(params: Any, t: Array, x: Array, y: Array, size: Array, client: Array) -> Array:
        key = jax.random.fold_in(round_keys(rounds, t)[2], client)
        delta, _ = update(params, key, ClientData(x, y, size), jnp.int32(0))
        return sketch_of(algorithm, t, algorithm.tree.flatten(delta))

    return Steps(params, algorithm, jax.jit(send), jax.jit(receive(algorithm)))


class Work:
    """What one client holds: the weights, the optimizer's state and its own examples, padded to a power of two so that
    clients of about as many share a compile."""

    def __init__(self, plan: Plan, data: ClientData, client: int, noise_seed: int = 0) -> None:
        self.client = client
        self._steps = steps_of(plan, noise_seed)
        self.params, self.algorithm = self._steps.params, self._steps.algorithm
        self.optimizer = self.algorithm.server_opt.init(self.params)
        most = 1 << (data.y.shape[1] - 1).bit_length()
        places = np.resize(np.arange(data.y.shape[1]), most)
        self._own = data.x[:, places], data.y[:, places], data.size

    def message(self, t: int) -> np.ndarray:
        """What goes up in round t (s,): R_t of the difference that K local steps make."""
        return np.asarray(self._steps.send(self.params, jnp.int32(t), *self._own, jnp.int32(self.client)))

    def apply(self, t: int, y: np.ndarray) -> None:
        """w^{t+1} from the mean that came down."""
        moved = self._steps.receive(self.params, self.optimizer, jnp.int32(t), jnp.asarray(y))
        self.params, self.optimizer = moved


def sketch_of(algorithm: FedAlgorithm, t: Array, flat: Array) -> Array:
    """R_t x, or x where nothing is compressed."""
    compressor = algorithm.compressor
    return flat if isinstance(compressor, Plain) else compressor.sketch.sk(t, flat)  # type: ignore[attr-defined]


def receive(algorithm: FedAlgorithm) -> Callable[..., tuple[Any, Any]]:
    """`(params, optimizer, t, y) -> (params, optimizer)`: the last line of the listing, with the server's optimizer
    run by every client alike."""

    def step(params: Any, optimizer: Any, t: Array, y: Array) -> tuple[Any, Any]:
        compressor = algorithm.compressor
        flat = y if isinstance(compressor, Plain) else compressor.sketch.desk(t, y)  # type: ignore[attr-defined]
        update = algorithm.tree.unflatten(algorithm.eta_g * flat)
        moved, optimizer = algorithm.server_opt.update(jax.tree.map(jnp.negative, update), optimizer, params)
        return optax.apply_updates(params, moved), optimizer

    return step
