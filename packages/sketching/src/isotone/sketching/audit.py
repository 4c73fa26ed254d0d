"""A leakage audit: what an attacker makes of a client's message, plain, sketched, and private (sections 2.5, 2.6).

The attacker knows the weights, the network, R_t and the labels, and descends on the distance of messages with restarts,
in float64. Of the private mode it also knows the clipping and sigma, is told that one example alone was drawn, and has
a prior, the mean and variance of each pixel of each class: it looks for the maximum a posteriori input from ten starts,
of messages whose noise it has made white. One message is attacked, one of the releases that an epsilon is of.

"The attack fails" where none of three can be told at 5 %: that its error is below the error of guessing the class's
mean, that it identifies examples more often than that guess does, nor that the true example is the likeliest of the
pool more often than one in as many. Identification is among all examples of the pool. Nobody learns the class from the
message here, so that the guess is right more often than 1 in as many.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from scipy import special

from isotone.shared.errors import InputError, check_count
from isotone.sketching import attack, privacy, recovery
from isotone.sketching.attack import AttackConfig, Prior
from isotone.sketching.compiling import fast_jit
from isotone.sketching.models import Model
from isotone.sketching.privacy import PrivacyConfig
from isotone.sketching.sketches import Sketch, make_sketch

_LEVEL = 0.05
_ATTACK = 0x61747461
_LEAST_VARIANCE = 1e-4
"""Of a pixel under the prior: one that never changed among the attacker's examples may change yet."""


@dataclass(frozen=True)
class Leak:
    """One setting over several messages: `s` numbers of `d` (None: the whole vector), `batch` examples, `local_steps`,
    `noise` multiplier (None: not private).

    Over examples: mean `mse`, `psnr` (dB) and `ssim`, `median` of the errors, `guess`, the mean error of the class's
    mean; `gap`, mse - guess, with its standard error `gap_error`, and `p_below`, how likely so low a gap is where the
    attack is as good as the guess. `found` of `tried` identified among `pool`, with the exact 95 % interval `low` to
    `high` of the rate, `chance`, and `p_found`, how likely as many are by chance; `by_likelihood`: in how many private
    messages the true example is the pool's most likely one, a test that needs no reconstruction and has the chance
    1 / pool; `p_likelihood`, how likely as many are by that chance. `psnrs`, `medians`: of each network (seed).
    """

    s: int | None
    d: int
    batch: int
    local_steps: int
    noise: float | None
    mse: float
    median: float
    psnr: float
    ssim: float
    guess: float
    gap: float
    gap_error: float
    p_below: float
    found: int
    tried: int
    pool: int
    low: float
    high: float
    chance: float
    p_found: float
    psnrs: tuple[float, ...]
    medians: tuple[float, ...]
    by_likelihood: int | None = None
    p_likelihood: float = 1.0

    @property
    def failed(self) -> bool:
        """Whether the attack failed: see the module."""
        return min(self.p_below, self.p_found, self.p_likelihood) > _LEVEL


@dataclass(frozen=True)
class AuditConfig:
    """`sizes` of sketches of `kind` (None: the gradient), `batches` and `local_steps` (at `rate`), every combination,
    `messages` of each, attacked by `attack`; `noises`: multipliers of the private mode with `clip`, for which the
    vector goes through a sketch of each of `private_sizes`, and `private_messages` are attacked by `private_attack`."""

    sizes: tuple[int | None, ...] = (None, 1024, 256, 128, 64, 32)
    batches: tuple[int, ...] = (1, 8)
    local_steps: tuple[int, ...] = (1, 5)
    messages: int = 5
    kind: str = "srht"
    rate: float = 0.1
    attack: AttackConfig = AttackConfig(restarts=2)
    noises: tuple[float, ...] = ()
    clip: float = 1.0
    private_sizes: tuple[int | None, ...] = (None,)
    private_messages: int = 30
    private_attack: AttackConfig = AttackConfig(steps=200, restarts=10)

    def __post_init__(self) -> None:
        for name in ("messages", "private_messages"):
            check_count(name, getattr(self, name))
        for name in ("batches", "local_steps"):
            for value in getattr(self, name):
                check_count(name, value)
        for value in self.noises:
            PrivacyConfig(self.clip, value)
        if not 0 < self.rate < float("inf"):
            raise InputError(f"expected a finite rate above 0, got {self.rate}")


@dataclass
class AuditReport:
    """`leaks`, and `pictures` by sheet: rows of them by name, the truth first."""

    leaks: list[Leak] = field(default_factory=list)
    pictures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def to_json(self) -> list[dict[str, Any]]:
        """A row for each setting."""
        return [{**dataclasses.asdict(leak), "failed": leak.failed} for leak in self.leaks]


def audit(
    model: Model,
    params: Any,
    x: Float[np.ndarray, "n ..."],
    y: Int[np.ndarray, " n"],
    config: AuditConfig | None = None,
    *,
    known: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> AuditReport:
    """What leaks from messages made of random examples of the pool (x, y) by a network of weights `params`.

    `known`: the attacker's own examples (x, y), of which its prior and the guess are made; else the pool itself.
    Raises `InputError` on a pool smaller than a batch, classes that the attacker has no example of, weights or inputs
    that are not finite, and sizes that the sketch refuses.
    """
    return audit_networks(model, [params], x, y, config, known=known, seeds=(seed,))


def audit_networks(
    model: Model,
    networks: Sequence[Any],
    x: Float[np.ndarray, "n ..."],
    y: Int[np.ndarray, " n"],
    config: AuditConfig | None = None,
    *,
    known: tuple[np.ndarray, np.ndarray] | None = None,
    seeds: Sequence[int] = (0,),
) -> AuditReport:
    """`audit` of several weights of one network, a seed each: as many messages of every one, counted together."""
    config = config or AuditConfig()
    if len(x) != len(y) or len(x) < max(config.batches, default=1):
        least = max(config.batches, default=1)
        raise InputError(f"expected {least} examples or more with their labels, got {len(x)} and {len(y)}")
    own = (x, y) if known is None else known
    if missing := set(np.unique(y).tolist()) - set(np.unique(own[1]).tolist()):
        raise InputError(f"expected an example of every class for the prior, got none of {min(missing)}")
    leaves = [leaf for params in networks for leaf in jax.tree.leaves(params)]
    if not all(np.isfinite(leaf).all() for leaf in (*leaves, x, own[0])):
        raise InputError("expected finite weights and examples to audit, got NaN or infinity")
    pool = _Pool(model, list(networks), x, y, *_class_moments(*own), seeds)
    report = AuditReport()
    for batch in config.batches:
        for steps in config.local_steps:
            for s in config.sizes:
                leak, truth, seen = _plain(pool, config, batch, steps, s)
                report.leaks.append(leak)
                if steps == min(config.local_steps):
                    shown = report.pictures.setdefault(f"batch {batch}", {})
                    shown["truth"], shown["all" if s is None else f"s = {s}"] = truth, seen
    for s in config.private_sizes if config.noises else ():
        for leak, rows in _private(pool, config, s):
            report.leaks.append(leak)
            report.pictures.setdefault("private", {}).update(rows)
    return report


# --- one setting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """The victims' examples, and what the attacker knows of their classes: `means`, `variances` by label."""

    model: Model
    networks: list[Any]
    x: np.ndarray
    y: np.ndarray
    means: Mapping[int, np.ndarray]
    variances: Mapping[int, np.ndarray]
    seeds: Sequence[int]

    @property
    def d(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.networks[0]))

    def of(self, table: Mapping[int, np.ndarray], indices: np.ndarray) -> np.ndarray:
        """`table`'s entries for the labels of the examples (m, n): (m, n, *shape)."""
        return np.stack([[table[int(self.y[i])] for i in row] for row in indices])

    def draw(self, messages: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples (m, batch) of `messages` messages for every network, and the network of each (m,)."""
        rngs = [np.random.default_rng([seed, batch]) for seed in self.seeds]
        rows = [[rng.choice(len(self.x), batch, replace=False) for _ in range(messages)] for rng in rngs]
        return np.concatenate(rows), np.repeat(np.arange(len(self.networks)), messages)

    def guess_rate(self) -> float:
        """How often guessing the class's mean identifies an example; at least 1 in as many."""
        right = sum(recovery.identified(self.means[int(label)], self.x, i) for i, label in enumerate(self.y))
        return max(right, 1) / len(self.x)


def _class_moments(x: np.ndarray, y: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Mean and variance of each pixel by class."""
    labels = np.unique(y)
    means = {int(c): x[y == c].astype(np.float64).mean(0) for c in labels}
    return means, {int(c): np.maximum(x[y == c].astype(np.float64).var(0), _LEAST_VARIANCE) for c in labels}


def _context(pool: _Pool, which: np.ndarray) -> Any:
    """The weights of each message's network, and the round of its R."""
    weights = jax.tree.map(lambda *leaves: np.stack([leaves[i] for i in which]).astype(np.float64), *pool.networks)
    return jax.device_put(weights), jnp.arange(len(which))


def _plain(
    pool: _Pool, config: AuditConfig, batch: int, steps: int, s: int | None
) -> tuple[Leak, np.ndarray, np.ndarray]:
    """The leak, and pictures of the first message's examples or of the first messages."""
    with jax.enable_x64(True):
        chosen, which = pool.draw(config.messages, batch)
        sketch = None if s is None else make_sketch(config.kind, pool.d, s, int(pool.seeds[0]))

        def message(x: Array, y: Array, context: Any) -> Array:
            params, t = context
            sk = None if sketch is None else (lambda vector: sketch.sk(t, vector))
            if steps == 1:
                return attack.gradient_message(pool.model, params, sk)(x, y)
            return attack.steps_message(pool.model, params, steps, config.rate, sk)(x, y)

        x, y = jnp.asarray(pool.x[chosen], jnp.float64), jnp.asarray(pool.y[chosen])
        context = _context(pool, which)
        found = attack.invert_many(
            *(
                message,
                fast_jit(jax.vmap(message))(x, y, context),
                pool.x.shape[1:],
                _keys(pool, config.messages, batch),
            ),
            labels=y,
            classes=pool.model.classes,
            config=config.attack,
            context=context,
        )
    seen = np.stack([recovery.matched(one.x, pool.x[row]) for one, row in zip(found, chosen, strict=True)])
    leak = _judged(pool, chosen, seen, s, steps, None)
    first = chosen[0] if batch > 1 else chosen[:, 0]
    return leak, pool.x[first], seen[0] if batch > 1 else seen[:, 0]


def _private(pool: _Pool, config: AuditConfig, s: int | None) -> Iterator[tuple[Leak, dict[str, np.ndarray]]]:
    """One example clipped and noised, R after it, at each noise; the attacker's estimate is the likeliest input under
    its prior, of the message times the inverse root of R R^T, whose noise is white. One program serves all of them."""
    sketch = None if s is None else make_sketch(config.kind, pool.d, s, int(pool.seeds[0]))

    def through(vector: Array, t: Array, root: Array | None) -> Array:
        return vector if sketch is None or root is None else root @ sketch.sk(t, vector)

    def message(x: Array, y: Array, context: Any) -> Array:
        params, t, root = context
        gradient = attack.gradient_message(pool.model, params)(x, y)
        return through(privacy.clip_by_norm(gradient, config.clip), t, root)

    def noise_of(key: Array, own: Any) -> Array:
        # the clients' own, of keys that the attacker does not have
        return through(jax.random.normal(jax.random.fold_in(key, 1), (pool.d,)), *own[1:])

    chosen, which = pool.draw(config.private_messages, 1)
    means, variances = pool.of(pool.means, chosen), pool.of(pool.variances, chosen)
    with jax.enable_x64(True):
        x, y = jnp.asarray(pool.x[chosen], jnp.float64), jnp.asarray(pool.y[chosen])
        (weights, rounds), keys = _context(pool, which), _keys(pool, config.private_messages, 1)
        context = weights, rounds, None if sketch is None else inverse_roots(sketch, rounds)
        clear, added = fast_jit(
            lambda x, y, keys, own: (jax.vmap(message)(x, y, own), config.clip * jax.vmap(noise_of)(keys, own))
        )(x, y, keys, context)
        likeliest = _likeliest(pool, message)
        for noise in config.noises:
            targets = clear + noise * added
            found = attack.invert_many(
                *(message, targets, pool.x.shape[1:], keys),
                labels=y,
                classes=pool.model.classes,
                config=config.private_attack,
                prior=Prior(jnp.asarray(means), jnp.asarray((noise * config.clip) ** 2 / variances)),
                context=context,
            )
            hits = int((np.asarray(likeliest(targets, context)) == chosen[:, 0]).sum())
            seen = np.stack([one.x for one in found])
            name = f"noise {noise:.3g}" + ("" if s is None else f", s = {s}")
            rows = {"truth": pool.x[chosen[:, 0]], "class mean": means[:, 0], name: seen[:, 0]}
            yield _judged(pool, chosen, seen, s, 1, noise, hits), rows


def _likeliest(pool: _Pool, message: attack.Message) -> Any:
    """(targets, contexts) -> the pool's example whose message is nearest to each target, (m,)."""
    candidates = jnp.asarray(pool.x[:, None], jnp.float64), jnp.asarray(pool.y[:, None])

    def one(pair: Any) -> Array:
        target, own = pair
        sent = jax.vmap(lambda x, y: message(x, y, own))(*candidates)
        return jnp.argmin(jnp.sum(jnp.square(sent - target), 1))

    return fast_jit(lambda targets, contexts: jax.lax.map(one, (targets, contexts)))


def inverse_roots(sketch: Sketch, rounds: Int[Array, " m"]) -> Float[Array, "m s s"]:
    """(R_t R_t^T)^{-1/2} of each round, 0 where R_t R_t^T is: the covariance of R_t xi for white xi is R_t R_t^T, a
    multiple of the identity for SRHT without replacement only where nothing is padded."""

    def root(t: Array) -> Array:
        gram = jax.vmap(lambda row: sketch.sk(t, sketch.desk(t, row)))(jnp.eye(sketch.s))
        values, basis = jnp.linalg.eigh((gram + gram.T) / 2)
        there = values > 1e-9 * values[-1]
        return (basis * jnp.where(there, 1 / jnp.sqrt(jnp.where(there, values, 1.0)), 0.0)) @ basis.T

    return fast_jit(lambda rounds: jax.lax.map(root, rounds))(rounds)


def _keys(pool: _Pool, messages: int, batch: int) -> Array:
    """Of the attacker's starts and the clients' noise: their own branch of each seed's key, weights are of others."""
    own = [jax.random.fold_in(jax.random.key(seed), _ATTACK) for seed in pool.seeds]
    return jnp.concatenate([jax.random.split(jax.random.fold_in(key, batch), messages) for key in own])


def _judged(
    pool: _Pool, chosen: np.ndarray, seen: np.ndarray, s: int | None, steps: int, noise: float | None,
    by_likelihood: int | None = None,
) -> Leak:  # fmt: skip
    indices, found = chosen.reshape(-1), seen.reshape(-1, *pool.x.shape[1:])
    truth, guess = pool.x[indices], [pool.means[int(pool.y[i])] for i in indices]
    errors = np.array([recovery.mse(a, b) for a, b in zip(found, truth, strict=True)])
    guessed = np.array([recovery.mse(a, b) for a, b in zip(guess, truth, strict=True)])
    gap = errors - guessed
    hits = sum(recovery.identified(one, pool.x, int(i)) for one, i in zip(found, indices, strict=True))
    low, high = recovery.interval(hits, len(indices))
    chance = pool.guess_rate()
    error = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.inf
    # one message, or no difference at all, is no evidence
    below = float(special.stdtr(len(gap) - 1, gap.mean() / error)) if 0 < error < math.inf else 1.0
    psnrs = np.array([recovery.psnr(a, b) for a, b in zip(found, truth, strict=True)])
    networks = len(pool.networks)
    return Leak(
        *(s, pool.d, chosen.shape[1], steps, noise),
        mse=float(errors.mean()),
        median=float(np.median(errors)),
        psnr=float(psnrs.mean()),
        ssim=float(np.mean([recovery.ssim(a, b) for a, b in zip(found, truth, strict=True)])),
        guess=float(guessed.mean()),
        gap=float(gap.mean()),
        gap_error=error if math.isfinite(error) else 0.0,
        p_below=below,
        found=hits,
        tried=len(indices),
        pool=len(pool.x),
        low=low,
        high=high,
        chance=chance,
        p_found=recovery.at_least(hits, len(indices), chance),
        psnrs=tuple(psnrs.reshape(networks, -1).mean(1).tolist()),
        medians=tuple(np.median(errors.reshape(networks, -1), 1).tolist()),
        by_likelihood=by_likelihood,
        p_likelihood=1.0 if by_likelihood is None else recovery.at_least(by_likelihood, len(indices), 1 / len(pool.x)),
    )
