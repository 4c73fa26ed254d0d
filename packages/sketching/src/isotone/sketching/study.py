"""Arms of a comparison: what travels, at which rate, for as many bytes as the others.

Every arm trains from the same weights on the same clients, with as many local steps, until the same number of bytes has
gone up and down. Its rate is the one of a grid, the same for all, with the best accuracy on a validation split of other
seeds; accuracies are of the test split. All seeds and rates of an arm run side by side in one compiled scan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.sketching import federated
from isotone.sketching.compiling import fast_jit
from isotone.sketching.compressors import QSGD, Compressor, FetchSGD, Plain, PowerSGD, Sketched, TopK
from isotone.sketching.data import ClientData, Dataset, batch_of, deal
from isotone.sketching.federated import fed_algorithm
from isotone.sketching.models import Model, make_model
from isotone.sketching.sketches import make_sketch


@dataclass(frozen=True)
class Setting:
    """`clients`, dealt by a Dirichlet draw of `concentration`; `local_steps` K on `batch`; `plain_rounds` of FedAvg,
    whose bytes every arm may send; `ratio` of the compressed arms; `looks` at the accuracy on the way; `rates` to
    choose from; `valid`: examples that are kept from the clients to choose by."""

    model: str = "mlp"
    hidden: int = 32
    clients: int = 20
    concentration: float = 0.5
    local_steps: int = 5
    batch: int = 32
    plain_rounds: int = 60
    ratio: float = 10.0
    looks: int = 20
    rates: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    valid: int = 300


def compressors(params: Any, setting: Setting) -> dict[str, Compressor]:
    """The arms by name: FedAvg, the sketches, and what one would use instead, at about `ratio` times fewer bytes up."""
    leaves = jax.tree.leaves(params)
    d, ratio = sum(leaf.size for leaf in leaves), setting.ratio
    # at least `ratio` times fewer: rounded down
    s = max(1, int(d / ratio))
    found: dict[str, Compressor] = {"fedavg": Plain(d)}
    for kind in ("srht", "countsketch-blocks", "countsketch", "sparse", "gaussian", "rand-k"):
        found[kind] = Sketched(make_sketch(kind, d, max(4, s - s % 4) if kind == "sparse" else s))
    # an index and a value each
    k = max(1, s // 2)
    found["top-k"] = TopK(d, k, setting.clients)
    # five rows of s columns and a tenth as many heavy hitters: half the bytes of the weights. With a fifth of the
    # columns, as many bytes as the others, its error grows without end or, with 4 heavy hitters, it learns little
    found["fetchsgd"] = FetchSGD(d, max(1, s // 10), s)
    found["powersgd"] = PowerSGD(tuple(leaf.shape for leaf in leaves), 1)
    found["qsgd"] = QSGD(d, 1)
    return found


def rounds_for(compressor: Compressor, total: int) -> int:
    """How many rounds of one client `total` bytes, up and down, are enough for."""
    return max(1, total // (compressor.bytes_up + compressor.bytes_down))


Dealt = tuple[Array, Array, Array]
"""`ClientData`'s x, y and size, with a leading axis of seeds."""


def dealt(source: Dataset, setting: Setting, seeds: Sequence[int]) -> Dealt:
    """The training part, without the validation split, dealt to the clients once for each seed."""
    x, y = source.x[: -setting.valid], source.y[: -setting.valid]
    each = [deal(x, y, setting.clients, setting.concentration, seed) for seed in seeds]
    most = max(one.y.shape[1] for one in each)

    def grown(leaf: Array) -> np.ndarray:
        # what is past a client's size is never counted
        width = [(0, 0), (0, most - leaf.shape[1]), *((0, 0) for _ in leaf.shape[2:])]
        return np.pad(np.asarray(leaf), width, mode="wrap")

    return (
        jnp.asarray(np.stack([grown(one.x) for one in each])),
        jnp.asarray(np.stack([grown(one.y) for one in each])),
        jnp.asarray(np.stack([np.asarray(one.size) for one in each])),
    )


def local_sgd(model: Model, setting: Setting, rate: Array | float) -> Callable[..., Any]:
    """K steps of SGD at a rate that may be traced, for `fed_algorithm(local_update=...)`."""

    def update(weights: Any, key: Array, data: ClientData, client: Array) -> tuple[Any, Array]:
        def step(carry: Any, number: Array) -> tuple[Any, Array]:
            x, y = batch_of(data, jax.random.fold_in(key, number), client, setting.batch)
            loss, gradient = jax.value_and_grad(model.loss)(carry, x, y)
            return jax.tree.map(lambda p, g: p - rate * g, carry, gradient), loss

        after, losses = jax.lax.scan(step, weights, jnp.arange(setting.local_steps))
        return jax.tree.map(jnp.subtract, after, weights), losses[0]

    return update


@functools.partial(fast_jit, static_argnums=(0, 1, 2, 3))
def _curves(
    model: Model,
    setting: Setting,
    compressor: Compressor,
    chunk: int,
    data: Dealt,
    params: Any,
    test: tuple[Array, Array],
    rates: Array,
    seeds: Array,
) -> tuple[Array, Array]:
    """Accuracies on `test` and losses at each look, (seeds, rates, looks); `data` and `params` lead with seeds."""

    def one(rate: Array, seed: Array, own: Dealt, params: Any) -> tuple[Array, Array]:
        key, mine = jax.random.key(seed), ClientData(*own)
        algorithm = fed_algorithm(model.loss, params, compressor, local_update=local_sgd(model, setting, rate))

        def look(state: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            state, infos = federated.run(algorithm, state, key, mine, chunk)
            return state, (model.accuracy(state.params, *test), jnp.mean(infos.loss))

        _, found = jax.lax.scan(look, algorithm.init(params, len(mine)), length=setting.looks)
        return found

    many = jax.vmap(one, (0, None, None, None))
    return jax.vmap(many, (None, 0, 0, 0))(rates, seeds, data, params)


def starts(model: Model, seeds: Sequence[int]) -> Any:
    """The weights that every arm of a seed begins with, with a leading axis of seeds."""
    each = [model.init(jax.random.fold_in(jax.random.key(seed), 0)) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)


def compare(
    source: Dataset, setting: Setting, arm: str, seeds: Sequence[int], tuning_seeds: Sequence[int] = (100, 101)
) -> dict[str, Any]:
    """One arm: its rate by validation on `tuning_seeds`, then its curves on `seeds` (JSON).

    `bytes`: of one client, up and down, at each look; `accuracy`: (seeds, looks) on the test split; `rate`, and the
    validation accuracy of each rate.
    """
    model = make_model(setting.model, source.x.shape[1:], source.classes, setting.hidden)
    compressor = compressors(model.init(jax.random.key(0)), setting)[arm]
    plain = Plain(compressor.d)
    total = setting.plain_rounds * (plain.bytes_up + plain.bytes_down)
    chunk = max(1, rounds_for(compressor, total) // setting.looks)

    def curves(split: tuple[np.ndarray, np.ndarray], rates: Sequence[float], seeds: Sequence[int]) -> list[np.ndarray]:
        data, params = dealt(source, setting, seeds), starts(model, seeds)
        test, numbers = (jnp.asarray(split[0]), jnp.asarray(split[1])), jnp.asarray(list(seeds))
        given = (data, params, test, jnp.asarray(rates, jnp.float32), numbers)
        return [np.asarray(part) for part in _curves(model, setting, compressor, chunk, *given)]

    best, scores = 0, np.zeros(0)
    if len(setting.rates) > 1:
        valid = (source.x[-setting.valid :], source.y[-setting.valid :])
        tuned, _ = curves(valid, setting.rates, tuning_seeds)
        # the mean over the tuning seeds at the last look; weights that ran away to NaN have the accuracy of chance
        scores = tuned[:, :, -1].mean(0)
        best = int(scores.argmax())
    found, losses = curves((source.test_x, source.test_y), setting.rates[best : best + 1], seeds)
    each = compressor.bytes_up + compressor.bytes_down
    return {
        "arm": arm,
        "clients": setting.clients,
        "rate": float(setting.rates[best]),
        "scores": dict(zip(map(str, setting.rates), scores.tolist(), strict=False)),
        "bytes_up": compressor.bytes_up,
        "bytes_down": compressor.bytes_down,
        "rounds": chunk * setting.looks,
        "bytes": [each * chunk * (look + 1) for look in range(setting.looks)],
        "accuracy": (100.0 * found[:, 0].astype(float)).tolist(),
        "loss": losses[:, 0].tolist(),
    }


def bytes_to(row: Mapping[str, Any], accuracy: float) -> float | None:
    """Bytes of one client until the mean accuracy over the seeds is `accuracy` %, None where it never was."""
    means = np.mean(row["accuracy"], 0)
    reached = np.flatnonzero(means >= accuracy)
    return float(row["bytes"][int(reached[0])]) if reached.size else None
