"""A round in two halves, for any engine that carries arrays: what a client sends and what it makes of the mean.

`Work` is one client: weights, examples, and the means that it has heard. `Means` is the server: it adds what it does
not look into, and knows which client has heard which means. Neither knows how messages travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.shared.errors import InputError
from isotone.sketching.compressors import Compressor, Plain, Sketched
from isotone.sketching.data import ClientData
from isotone.sketching.federated import FedAlgorithm, round_keys
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.training import RunConfig


@dataclass(frozen=True, eq=False)
class Steps:
    """The two functions of a client, compiled once: `send(params, t, x, y, size, client) -> (s,)` and
    `receive(params, optimizer, t, y) -> (params, optimizer)`. `params`: the first weights."""

    params: Any
    algorithm: FedAlgorithm
    send: Callable[..., Array]
    receive: Callable[..., tuple[Any, Any]]

    @property
    def s(self) -> int:
        """Numbers in a message."""
        return message_size(self.algorithm.compressor)


def message_size(compressor: Compressor) -> int:
    """Numbers that a client sends. Raises `InputError` where what is sent is not linear in the update."""
    if isinstance(compressor, Plain):
        return compressor.d
    if isinstance(compressor, Sketched | RoundedSketch):
        return compressor.sketch.s
    raise InputError(f"expected updates that can be added unseen, got {type(compressor).__name__}")


def check_carried(config: RunConfig) -> None:
    """Raises `InputError` on what is drawn or weighed in a simulation alone: stragglers, which are real elsewhere, and
    clients that count by size, which a server that sees sketches does not know."""
    if config.straggle:
        raise InputError(f"expected no drawn stragglers over a network, got straggle {config.straggle}")
    if config.weigh != "equal":
        raise InputError(f"expected clients of equal weight over a network, got weigh {config.weigh!r}")


def check_flower(config: RunConfig) -> None:
    """Raises `InputError` on what a run on Flower can not do: also the private mode, whose clients need noise of their
    own and a note of what they have answered, and numbers of fewer bits, since Flower carries NumPy's arrays."""
    check_carried(config)
    if config.private:
        noise = f"epsilon {config.epsilon}" if config.noise is None else f"noise {config.noise}"
        raise InputError(f"expected a run that is not private on Flower, got {noise}: `client` keeps a seed of its own")
    if config.dtype != "float32":
        raise InputError(f"expected numbers of float32 on Flower, got {config.dtype}")


def make_steps(algorithm: FedAlgorithm, params: Any, key: Array) -> Steps:
    """The halves of `algorithm.round(state, key, data)`: with them all clients together do what it does. (Rounded
    numbers are rounded by the client's number here, and there by its place among those who take part.)

    `params`: the weights that everybody begins with; `key`: that of the rounds. Raises `InputError` on a compressor
    that is not linear.
    """
    update = algorithm.local_update or algorithm.local
    message_size(algorithm.compressor)

    def send(params: Any, t: Array, x: Array, y: Array, size: Array, client: Array) -> Array:
        own = jax.random.fold_in(round_keys(key, t)[2], client)
        delta, _ = update(params, own, ClientData(x, y, size), jnp.int32(0))
        flat, compressor = algorithm.tree.flatten(delta), algorithm.compressor
        if isinstance(compressor, RoundedSketch):
            return compressor.up(t, round_keys(key, t)[3], client, flat)
        return compressor.sketch.sk(t, flat) if isinstance(compressor, Sketched) else flat

    return Steps(params, algorithm, jax.jit(send), jax.jit(receive(algorithm)))


def receive(algorithm: FedAlgorithm) -> Callable[..., tuple[Any, Any]]:
    """`(params, optimizer, t, y) -> (params, optimizer)`: the last line of the listing in section 2.3, with the
    server's optimizer run by every client alike."""

    def step(params: Any, optimizer: Any, t: Array, y: Array) -> tuple[Any, Any]:
        compressor = algorithm.compressor
        flat = compressor.sketch.desk(t, y) if isinstance(compressor, Sketched | RoundedSketch) else y
        update = algorithm.tree.unflatten(algorithm.eta_g * flat)
        moved, optimizer = algorithm.server_opt.update(jax.tree.map(jnp.negative, update), optimizer, params)
        return optax.apply_updates(params, moved), optimizer

    return step


class Work:
    """What one client holds: the weights, the optimizer's state, how many rounds are in them, and its own examples,
    padded to a power of two so that clients of about as many share a compile."""

    def __init__(self, steps: Steps, data: ClientData, client: int) -> None:
        self.steps, self.client, self.round = steps, client, 0
        self.params = steps.params
        self.optimizer = steps.algorithm.server_opt.init(self.params)
        most = 1 << (data.y.shape[1] - 1).bit_length()
        places = np.resize(np.arange(data.y.shape[1]), most)
        self._own = data.x[:, places], data.y[:, places], data.size

    def message(self) -> np.ndarray:
        """What goes up in this round (s,): R_t of the difference that K local steps make."""
        return np.asarray(self.steps.send(self.params, jnp.int32(self.round), *self._own, jnp.int32(self.client)))

    def apply(self, y: np.ndarray) -> None:
        """w^{t+1} from this round's mean (s,). Raises `InputError` on another size, and on NaN."""
        if y.shape != (self.steps.s,) or not np.isfinite(y).all():
            raise InputError(f"expected a mean of {self.steps.s} finite numbers in round {self.round}, got others")
        moved = self.steps.receive(self.params, self.optimizer, jnp.int32(self.round), jnp.asarray(y))
        self.params, self.optimizer = moved
        self.round += 1

    def catch_up(self, means: Sequence[np.ndarray], first: int) -> None:
        """Apply the means of rounds `first`, `first` + 1, ...; those that are known already are passed over.

        Raises `InputError` where one is missing in between.
        """
        if first > self.round:
            raise InputError(f"expected the mean of round {self.round} first, got that of {first}")
        for y in means[self.round - first :]:
            self.apply(np.asarray(y, np.float32))

    def state(self) -> list[np.ndarray]:
        """Weights, optimizer and round as plain arrays, for engines that keep no objects."""
        return [*map(np.asarray, jax.tree.leaves((self.params, self.optimizer))), np.asarray(self.round)]

    def restore(self, arrays: Sequence[np.ndarray]) -> None:
        """What `state` gave. Raises `InputError` on other shapes."""
        leaves, tree = jax.tree.flatten((self.params, self.optimizer))
        if [np.shape(a) for a in arrays] != [*(leaf.shape for leaf in leaves), ()]:
            raise InputError("expected the state of a client of this run, got other shapes")
        kept = [jnp.asarray(a, leaf.dtype) for a, leaf in zip(arrays, leaves, strict=False)]
        self.params, self.optimizer = jax.tree.unflatten(tree, kept)
        self.round = int(arrays[-1])


def mean_of(messages: Mapping[Any, np.ndarray], t: int) -> np.ndarray:
    """The mean (s,) of round t's messages, added in the order of their names: who was first changes nothing. Raises
    `InputError` where their sum is not finite."""
    with np.errstate(over="ignore"):
        total = np.sum([messages[name] for name in sorted(messages)], 0, dtype=np.float32)
    if not np.isfinite(total).all():
        raise InputError(f"expected updates whose sum is finite, got infinity in round {t}")
    return np.asarray(total / np.float32(len(messages)), np.float32)


@dataclass
class Means:
    """The server's half: the means of all rounds of `s` numbers, and up to where each client was told of them."""

    s: int
    history: list[np.ndarray] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)

    def due(self, client: str) -> tuple[int, list[np.ndarray]]:
        """The first round that a client was not told of, and the means from there on; it counts as told."""
        first = self.told.get(client, 0)
        self.told[client] = len(self.history)
        return first, self.history[first:]

    def forget(self, client: str) -> None:
        """A client that failed, and may be a new one under its old name: it is told everything again."""
        self.told.pop(client, None)

    def add(self, messages: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, list[str]]:
        """The round's mean, kept, and who was not counted: those of another size or with numbers that are not finite.

        None, and nothing kept, where nobody is left. Raises `InputError` as `mean_of`.
        """
        good = {name: m for name, m in messages.items() if m.shape == (self.s,) and np.isfinite(m).all()}
        bad = sorted(set(messages) - set(good))
        if not good:
            return None, bad
        mean = mean_of(good, len(self.history))
        self.history.append(mean)
        return mean, bad
