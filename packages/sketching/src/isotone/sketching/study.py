"""Arms of a comparison: what travels, at which rate, for as many bytes as the others.

Every arm trains from the same weights on the same clients, with as many local steps, for as long as a whole round fits
into the same number of bytes up and down, headers of messages counted. Its rate is the one with the best accuracy on a
validation split of other seeds: of a grid, the same for all, and of what lies beyond while the best lies at an end of
it; accuracies are of the test split. All seeds and rates of an arm run side by side in one compiled scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.shared.errors import InputError, check_count
from isotone.sketching.compiling import fast_jit
from isotone.sketching.compressors import FLOAT, Compressor, compressor_of
from isotone.sketching.data import ClientData, Dataset, deal
from isotone.sketching.federated import fed_algorithm
from isotone.sketching.models import MODELS, Model, make_model
from isotone.sketching.training import run_keys
from isotone.sketching.wire import HEADER

BEYOND = 6
"""Rates that are tried past the ends of a grid, at most: twice, or half, the last."""


@dataclass(frozen=True)
class Setting:
    """`clients`, dealt by a Dirichlet draw of `concentration` (None: evenly); `local_steps` K on `batch` (0: all);
    `plain_rounds` of FedAvg, whose bytes every arm may send; `ratio`: how many times fewer a round of the compressed
    arms sends; `looks` at the accuracy on the way; `rates` to choose from; `valid`: examples that are kept from the
    clients to choose by. Raises `InputError` on what can not be meant."""

    model: str = "mlp"
    hidden: int = 32
    clients: int = 20
    concentration: float | None = 0.5
    local_steps: int = 5
    batch: int = 32
    plain_rounds: int = 60
    ratio: float = 10.0
    looks: int = 40
    rates: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    valid: int = 300

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InputError(f"expected a model of {', '.join(MODELS)}, got {self.model!r}")
        for name in ("hidden", "clients", "local_steps", "plain_rounds", "looks", "valid"):
            check_count(name, getattr(self, name), 1)
        check_count("batch", self.batch, 0)
        if self.concentration is not None and not 0 < self.concentration < math.inf:
            raise InputError(f"expected a finite concentration above 0, or none, got {self.concentration}")
        if not 1 <= self.ratio < math.inf:
            raise InputError(f"expected a finite ratio of at least 1, got {self.ratio}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise InputError(f"expected finite rates above 0, one or more, got {list(self.rates)}")


KINDS = ("srht", "countsketch-blocks", "countsketch", "sparse", "gaussian", "rand-k")
OTHERS = {"top-k": "topk", "fetchsgd": "fetchsgd", "powersgd": "powersgd", "qsgd": "qsgd"}


def compressors(params: Any, setting: Setting) -> dict[str, Compressor]:
    """The arms by name: FedAvg, the sketches, and what one would use instead (`compressors.compressor_of`)."""
    make = functools.partial(compressor_of, params=params, participants=setting.clients)
    plain = make("plain")
    # a round with its headers is `ratio` times cheaper, where there is room for anything beside them
    room = (FLOAT * plain.d + HEADER) / setting.ratio - HEADER
    make = functools.partial(make, ratio=FLOAT * plain.d / max(room, FLOAT))
    return {
        "fedavg": plain,
        **{kind: make("sketch", kind=kind) for kind in KINDS},
        **{name: make(arm) for name, arm in OTHERS.items()},
    }


def round_bytes(compressor: Compressor) -> tuple[int, int]:
    """Bytes up and down of one client in one round, at most, with the headers of its messages."""
    headers = HEADER * compressor.messages
    return compressor.bytes_up + headers, compressor.bytes_down + headers


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


@functools.partial(fast_jit, static_argnums=(0, 1, 2))
def _curves(
    model: Model,
    setting: Setting,
    compressor: Compressor,
    given: Array,
    data: Dealt,
    params: Any,
    test: tuple[Array, Array],
    rates: Array,
    seeds: Array,
) -> tuple[Array, ...]:
    """Accuracies on `test` and losses at each look, bytes left there of those `given` by then, and rounds until then,
    (seeds, rates, looks); `data` and `params` lead with seeds."""
    up, most = round_bytes(compressor)[0], sum(round_bytes(compressor))

    def one(rate: Array, seed: Array, own: Dealt, params: Any) -> tuple[Array, ...]:
        (_, key), mine = run_keys(seed), ClientData(*own)
        algorithm = fed_algorithm(
            *(model.loss, params, compressor),
            client_opt=optax.sgd(rate),
            local_steps=setting.local_steps,
            batch=setting.batch,
        )

        def round(carry: Any) -> Any:
            state, left, rounds, loss = carry
            state, info = algorithm.round(state, key, mine)
            down = info.down + HEADER * compressor.messages
            return state, left - up - down, rounds + 1, loss + info.loss

        def look(carry: Any, more: Array) -> tuple[Any, tuple[Array, ...]]:
            state, left, before = carry
            begin = state, left + more, before, jnp.zeros(())
            state, left, rounds, loss = jax.lax.while_loop(lambda c: c[1] >= most, round, begin)
            seen = model.accuracy(state.params, *test), loss / jnp.maximum(rounds - before, 1), left, rounds
            return (state, left, rounds), seen

        nothing = jnp.zeros((), jnp.int32)
        _, found = jax.lax.scan(look, (algorithm.init(params, len(mine)), nothing, nothing), given)
        return found

    many = jax.vmap(one, (0, None, None, None))
    return jax.vmap(many, (None, 0, 0, 0))(rates, seeds, data, params)


def starts(model: Model, seeds: Sequence[int]) -> Any:
    """The weights that every arm of a seed begins with, with a leading axis of seeds."""
    each = [model.init(run_keys(seed)[0]) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)


def choose(rates: Sequence[float], score: Callable[[Sequence[float]], Sequence[float]]) -> dict[float, float]:
    """The scores of all `rates`, and of further ones while the best is the largest or smallest of those tried."""
    found = dict(zip(rates, score(rates), strict=True))
    for _ in range(BEYOND):
        best = best_of(found)
        if best == max(found):
            beyond = 2 * best
        elif best == min(found):
            beyond = best / 2
        else:
            break
        found[beyond] = score((beyond,))[0]
    return found


def best_of(scores: Mapping[float, float]) -> float:
    """The rate of the highest score, the first of equal ones."""
    return max(scores, key=lambda rate: scores[rate])


def compare(
    source: Dataset, setting: Setting, arm: str, seeds: Sequence[int], tuning_seeds: Sequence[int] = (100, 101)
) -> dict[str, Any]:
    """One arm: its rate by validation on `tuning_seeds`, then its curves on `seeds` (JSON).

    `bytes`: of one client, up and down, at each look, the mean over the seeds; `accuracy`, `loss`: (seeds, looks), on
    the test split and of training; `rate`, the validation accuracy of each that was tried, and whether it lies at an
    `end` of them; `bytes_up`, `bytes_down` of a round with headers. Raises `InputError` where not one round fits.
    """
    model = make_model(setting.model, source.x.shape[1:], source.classes, setting.hidden)
    arms = compressors(model.init(jax.random.key(0)), setting)
    compressor, (up, most) = arms[arm], round_bytes(arms[arm])
    total = setting.plain_rounds * sum(round_bytes(arms["fedavg"]))
    rounds = total // (up + most)
    if rounds < 1:
        raise InputError(f"expected at least the {up + most} bytes of a round of {arm}, got {total}")
    looks = min(setting.looks, rounds)
    given = np.array([(look + 1) * total // looks for look in range(looks)])

    def curves(split: tuple[np.ndarray, np.ndarray], rates: Sequence[float], seeds: Sequence[int]) -> list[np.ndarray]:
        data, params = dealt(source, setting, seeds), starts(model, seeds)
        test, numbers = (jnp.asarray(split[0]), jnp.asarray(split[1])), jnp.asarray(list(seeds))
        each = (data, params, test, jnp.asarray(rates, jnp.float32), numbers)
        more = jnp.asarray(np.diff(given, prepend=0), jnp.int32)
        return [np.asarray(part) for part in _curves(model, setting, compressor, more, *each)]

    scores: dict[float, float] = dict.fromkeys(setting.rates, 0.0)
    if len(setting.rates) > 1:
        valid = (source.x[-setting.valid :], source.y[-setting.valid :])
        # the mean over the tuning seeds at the last look
        scores = choose(setting.rates, lambda rates: curves(valid, rates, tuning_seeds)[0][:, :, -1].mean(0).tolist())
    rate = best_of(scores)
    accuracy, losses, left, done = (part[:, 0] for part in curves((source.test_x, source.test_y), (rate,), seeds))
    spent = given - left.astype(np.int64)
    return {
        "arm": arm,
        "clients": setting.clients,
        "rate": float(rate),
        "scores": {str(tried): score for tried, score in sorted(scores.items())} if len(scores) > 1 else {},
        "end": len(scores) > 1 and rate in (min(scores), max(scores)),
        "bytes_up": up,
        "bytes_down": round(float((spent[:, -1] / done[:, -1]).mean())) - up,
        "rounds": round(float(done[:, -1].mean())),
        "bytes": spent.mean(0).tolist(),
        "accuracy": (100.0 * accuracy.astype(float)).tolist(),
        "loss": losses.tolist(),
    }


def bytes_to(row: Mapping[str, Any], accuracy: float) -> list[float | None]:
    """Bytes of one client until each seed's accuracy is `accuracy` %, on the line between two looks; None where it
    never was."""
    found: list[float | None] = []
    for curve in row["accuracy"]:
        reached = np.flatnonzero(np.asarray(curve) >= accuracy)
        if not reached.size:
            found.append(None)
            continue
        at = int(reached[0])
        span = slice(max(0, at - 1), at + 1)
        found.append(float(np.interp(accuracy, curve[span], row["bytes"][span])))
    return found
