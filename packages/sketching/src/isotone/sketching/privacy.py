"""The private mode: clipped per-example gradients, Gaussian noise, and what K T releases of it cost (section 2.6).

Adjacency: add or remove one example; how many a client has is public and stays, since its steps are divided by it.
Trust: local by default, every client noises its own steps before anything leaves it, so that sketching, averaging and
desketching are post-processing and cost nothing. Sampling is Poisson, as is accounted for. Noise comes from a key of
the client's own, never from the sketch's seed; `jax.random` is not a cryptographic source, and a seed of it has 32
bits.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import optimize, special

from isotone.shared.errors import InputError
from isotone.sketching.data import ClientData
from isotone.sketching.sketches import Sketch

ORDERS = tuple(1 + k / 10 for k in range(1, 100)) + tuple(range(11, 64)) + (80, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class PrivacyConfig:
    """`clip` C of an example's gradient; `noise` multiplier sigma: the noise on the sum has deviation sigma C; `rate`
    q of Poisson sampling; `delta`."""

    clip: float = 1.0
    noise: float = 1.0
    rate: float = 0.1
    delta: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"expected a finite {name} above 0, got {value}")
        if not 0 < self.rate <= 1:
            raise InputError(f"expected a sampling rate in (0, 1], got {self.rate}")
        if not 0 < self.delta < 1:
            raise InputError(f"expected delta in (0, 1), got {self.delta}")


# --- what a client does -------------------------------------------------------------------------------------------


def clip_by_norm(gradient: Any, clip: float) -> Any:
    """The gradient scaled down to norm `clip` where it is longer; its direction is kept."""
    leaves = jax.tree.leaves(gradient)
    # divided by the largest entry first: squares neither over- nor underflow
    largest = jnp.maximum(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves])), 1e-30)
    norm = largest * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / largest)) for leaf in leaves))
    factor = jnp.minimum(1.0, clip / norm)
    return jax.tree.map(lambda leaf: factor * leaf, gradient)


def private_gradient(
    loss_fn: Callable[..., Array], params: Any, x: Array, y: Array, there: Array, key: Array, config: PrivacyConfig
) -> Any:
    """(sum of clipped per-example gradients + sigma C xi) / (q n): Poisson sampling of the n examples that are `there`.

    The divisor is the expected batch, not the one drawn, whose size would tell of it.
    """
    return noised_gradient(loss_fn, params, x, y, there, key, config.clip, config.noise, config.rate)


def noised_gradient(
    loss_fn: Callable[..., Array], params: Any, x: Array, y: Array, there: Array, key: Array,
    clip: float, noise: Array | float, rate: float,
) -> Any:  # fmt: skip
    """`private_gradient` of numbers that may be traced."""
    sample_key, noise_key = jax.random.split(key)
    chosen = (jax.random.uniform(sample_key, there.shape) < rate) & there

    def each(one: Array, label: Array, taken: Array) -> Any:
        gradient = clip_by_norm(jax.grad(loss_fn)(params, one[None], label[None]), clip)
        return jax.tree.map(lambda leaf: jnp.where(taken, leaf, 0.0), gradient)

    total = jax.tree.map(lambda leaves: jnp.sum(leaves, 0), jax.vmap(each)(x, y, chosen))
    expected = rate * jnp.sum(there)
    return jax.tree.map(lambda leaf: leaf / expected, with_noise(total, noise_key, noise * clip))


def with_noise(tree: Any, key: Array, deviation: Array | float) -> Any:
    """The tree with normal noise of that deviation on every number; `key` is to be its owner's alone."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = jax.random.normal(key, (sum(leaf.size for leaf in leaves),))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    noised = [
        leaf + deviation * part.reshape(leaf.shape).astype(leaf.dtype)
        for leaf, part in zip(leaves, jnp.split(drawn, ends), strict=True)
    ]
    return jax.tree.unflatten(structure, noised)


def private_local(
    loss_fn: Callable[..., Array],
    config: PrivacyConfig,
    local_steps: int,
    rate: float | Array,
    seed: int | Array,
    *,
    clients: int = 1,
    noise: Array | None = None,
) -> Callable[..., Any]:
    """K private steps of one client, for `fed_algorithm(local_update=...)`.

    `seed`: of the clients' own noise; a client's key is made of it and its number, and must be known to it alone.
    `clients`: above 1, the central variant: each adds the sqrt(clients)-th part of the noise, and only the sum, as
    secure aggregation makes it, is as noisy as `config` says (K = 1 alone, weighed by size). `noise`: a traced
    multiplier in place of the config's.
    """
    multiplier = (config.noise if noise is None else noise) / math.sqrt(clients)

    def update(params: Any, key: Array, data: ClientData, client: Array) -> tuple[Any, Array]:
        own = _own_key(seed, client, key)
        there = jnp.arange(data.y.shape[1]) < data.size[client]
        x, y = data.x[client], data.y[client]

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            key = jax.random.fold_in(own, number)
            gradient = noised_gradient(loss_fn, carry, x, y, there, key, config.clip, multiplier, config.rate)
            return jax.tree.map(lambda p, g: p - rate * g, carry, gradient), None

        after, _ = jax.lax.scan(step, params, jnp.arange(local_steps))
        # a loss on the client's data would be a release of its own
        return jax.tree.map(jnp.subtract, after, params), jnp.zeros(())

    return update


def private_client(
    local_update: Callable[..., Any], clip: float, noise: float | Array, clients: int, seed: int | Array
) -> Callable[..., Any]:
    """Client-level privacy of any `local_update`: its whole difference clipped to `clip`, and noise on it.

    Adjacency: add or remove one client, one release a round. Each of the `clients` in a round adds the sqrt(clients)-th
    part of the noise: the sum, which is all that secure aggregation shows, has deviation noise * clip.
    """

    def update(params: Any, key: Array, data: ClientData, client: Array) -> tuple[Any, Array]:
        delta, _ = local_update(params, key, data, client)
        own = _own_key(seed, client, key)
        return with_noise(clip_by_norm(delta, clip), own, noise * clip / math.sqrt(clients)), jnp.zeros(())

    return update


def _own_key(seed: int | Array, client: Array, key: Array) -> Array:
    """A client's own key of a round: of the seed it alone knows; the round's public key only tells rounds apart."""
    own = jax.random.fold_in(jax.random.key(seed), client)
    # all of the public key: two rounds of equal noise would show the difference of their updates
    for word in jax.random.key_data(key).reshape(-1):
        own = jax.random.fold_in(own, word)
    return own


def sketch_noise(noise: float, d: int, s: int) -> float:
    """sigma_s of noise added after a sketch whose R R^T is (d/s) I, with which it has the distribution of noise sigma
    before it: s normals in place of d (section 2.6)."""
    return noise * math.sqrt(d / s)


def sketch_sensitivity(sketch: Sketch, t: int) -> float:
    """|R_t|_2, by which noise after the sketch must grow to be as private as noise before it (R is public).

    Never from below: rows of a transform are a part of an orthogonal matrix; the largest bucket of CountSketch is
    exact; the others are taken from the matrix itself, s d numbers.
    """
    if sketch.kind in ("identity", "srht", "rand-k", "countsketch", "countsketch-blocks"):
        if sketch.kind == "srht":
            return math.sqrt(sketch.padded / sketch.s)
        return float(sketch.spectral_norm(t))
    return float(np.linalg.norm(np.asarray(sketch.matrix(t), np.float64), 2))


# --- what it costs ------------------------------------------------------------------------------------------------


def gaussian_delta(epsilon: float, sigma: float, sensitivity: float = 1.0) -> float:
    """The exact delta of one Gaussian release (the analytic Gaussian mechanism)."""
    ratio = sensitivity / sigma
    first = special.ndtr(ratio / 2 - epsilon / ratio)
    return float(first - math.exp(epsilon + special.log_ndtr(-ratio / 2 - epsilon / ratio)))


def gaussian_epsilon(delta: float, sigma: float, sensitivity: float = 1.0) -> float:
    """The epsilon of one Gaussian release at `delta`: `gaussian_delta` inverted."""
    _check(sigma, delta)
    if gaussian_delta(0.0, sigma, sensitivity) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, sigma, sensitivity) > delta:
        high *= 2
    return float(optimize.brentq(lambda e: gaussian_delta(e, sigma, sensitivity) - delta, 0.0, high, xtol=1e-12))


def classical_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """sensitivity sqrt(2 ln(1.25 / delta)) / epsilon, proved for epsilon below 1."""
    if not 0 < epsilon < 1:
        raise InputError(f"expected epsilon in (0, 1) for the classical bound, got {epsilon}")
    _check(1.0, delta)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def advanced_composition(epsilon: float, delta: float, releases: int, slack: float) -> tuple[float, float]:
    """(epsilon', delta') of k releases: eps sqrt(2 k ln(1 / slack)) + k eps (e^eps - 1), and k delta + slack."""
    if releases < 1 or not 0 < slack < 1:
        raise InputError(f"expected 1 release or more and a slack in (0, 1), got {releases} and {slack}")
    total = epsilon * math.sqrt(2 * releases * math.log(1 / slack)) + releases * epsilon * math.expm1(epsilon)
    return total, releases * delta + slack


def subsampled_rdp(rate: float, noise: float, order: float | int) -> float:
    """Renyi divergence of `order` of one Poisson-subsampled Gaussian release (Mironov, Talwar and Zhang 2019).

    Whole orders by their binomial sum, others by the series of erfc terms; rate 1 gives order / (2 sigma^2).
    """
    if rate == 1:
        return order / (2 * noise**2)
    if float(order).is_integer():
        k = np.arange(int(order) + 1)
        terms = (
            special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
            + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * noise**2)
        )  # fmt: skip
        return float(special.logsumexp(terms)) / (order - 1)
    return _fractional(rate, noise, order) / (order - 1)


def _fractional(rate: float, noise: float, order: float) -> float:
    """log E of a fractional order: both series, in blocks that double, until their terms vanish."""
    turn = noise**2 * math.log(1 / rate - 1) + 0.5
    total, sign, start, size = -math.inf, 1.0, 0, 256
    while start < 1 << 22:
        i = np.arange(start, start + size)
        j = order - i
        # the generalised binomial coefficient, whose sign turns with each i past the order
        coefficient = special.gammaln(order + 1) - special.gammaln(i + 1) - special.gammaln(j + 1)
        low = coefficient + i * math.log(rate) + j * math.log1p(-rate) + (i * i - i) / (2 * noise**2)
        low += _log_half_erfc((i - turn) / (math.sqrt(2) * noise))
        high = coefficient + j * math.log(rate) + i * math.log1p(-rate) + (j * j - j) / (2 * noise**2)
        high += _log_half_erfc((turn - j) / (math.sqrt(2) * noise))
        signs = special.gammasgn(j + 1)
        logs, weights = np.concatenate([[total], low, high]), np.concatenate([[sign], signs, signs])
        total, sign = special.logsumexp(logs, b=weights, return_sign=True)
        start, size = start + size, 2 * size
        # terms alternate beyond the order: what is left out is below the last one
        if start > order + 1 and max(low[-1], high[-1]) < total - 30:
            break
    return float(total) if sign > 0 else math.inf


def _log_half_erfc(x: np.ndarray) -> np.ndarray:
    return special.log_ndtr(-x * math.sqrt(2))


def theorem_sigma(
    epsilon: float, delta: float, rate: float, local_steps: int, rounds: int, sensitivity: float = 1.0
) -> float:
    """The noise multiplier of the theorem's shape (section 2.6): amplification by subsampling of each step, advanced
    composition over K T steps, parallel composition over the clients, whose data are disjoint.

    Half of delta is the composition's slack; each step has the classical Gaussian's sigma at the epsilon and delta that
    are left to it. The constants are not the paper's, which are not known: compare with `calibrate`.
    """
    if not (math.isfinite(epsilon) and epsilon > 0) or local_steps < 1 or rounds < 1:
        raise InputError(f"expected a finite epsilon above 0 and steps of 1 or more, got {epsilon}")
    _check(1.0, delta)
    if not 0 < rate <= 1:
        raise InputError(f"expected a sampling rate in (0, 1], got {rate}")
    steps, slack = local_steps * rounds, delta / 2
    # beyond 700 e^eps overflows, and a step is as good as without noise
    low, high = 0.0, min(epsilon, 700.0)
    for _ in range(200):
        middle = (low + high) / 2
        if advanced_composition(middle, 0.0, steps, slack)[0] <= epsilon:
            low = middle
        else:
            high = middle
    # a step that sees a share q of the data: eps' = ln(1 + q (e^eps - 1)), delta' = q delta
    own = math.log1p(math.expm1(low) / rate)
    share = min(0.5, delta / 2 / steps / rate)
    # the classical sigma is proved below 1; a larger epsilon is served by it too
    return classical_sigma(min(own, 0.999), share, sensitivity)


@dataclass
class Accountant:
    """Releases of a Poisson-subsampled Gaussian, composed by Renyi divergence; `epsilon(delta)` of all of them.

    `pld_epsilon`: by dp-accounting's privacy loss distributions, which are tighter, where that is installed.
    """

    rate: float
    noise: float
    releases: int = 0
    ledger: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        PrivacyConfig(noise=self.noise, rate=self.rate)

    def spend(self, releases: int, what: str = "local steps") -> None:
        """Count more releases; K local steps are K."""
        if releases < 0:
            raise InputError(f"expected at least 0 releases, got {releases}")
        self.releases += releases
        self.ledger.append((what, releases))

    def epsilon(self, delta: float, orders: Sequence[float | int] = ORDERS) -> float:
        """By Renyi divergence, converted as in Canonne, Kamath and Steinke (2020), the best of `orders`."""
        _check(self.noise, delta)
        if not self.releases:
            return 0.0
        found = []
        for order in orders:
            rdp = self.releases * subsampled_rdp(self.rate, self.noise, order)
            found.append(rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
        return max(0.0, min(found))

    def pld_epsilon(self, delta: float) -> float:
        """By privacy loss distributions. Raises `InputError` where dp-accounting is not installed."""
        _check(self.noise, delta)
        try:
            import dp_accounting
            from dp_accounting.pld import PLDAccountant
        except ImportError:
            raise InputError(
                "expected dp-accounting for privacy loss distributions (pip install dp-accounting)"
            ) from None
        accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        event: Any = dp_accounting.GaussianDpEvent(self.noise)
        if self.rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(self.rate, event)
        accountant.compose(event, self.releases)
        return float(accountant.get_epsilon(delta))


def epsilons(rate: float, noise: float, releases: int, delta: float) -> tuple[float, float | None]:
    """What `releases` cost at `delta`: by Renyi divergence, and by privacy loss distributions, None where dp-accounting
    is not installed."""
    accountant = Accountant(rate, noise, releases)
    loose = accountant.epsilon(delta)
    if not releases:
        return loose, 0.0
    if importlib.util.find_spec("dp_accounting") is None:
        return loose, None
    return loose, accountant.pld_epsilon(delta)


def calibrate(epsilon: float, delta: float, rate: float, releases: int) -> float:
    """The smallest noise multiplier, to 1e-4, whose `releases` cost at most `epsilon` at `delta` (Renyi).

    Raises `InputError` on epsilon not above 0, no release, or a delta outside (0, 1).
    """
    if not (math.isfinite(epsilon) and epsilon > 0) or releases < 1:
        raise InputError(f"expected a finite epsilon above 0 and 1 release or more, got {epsilon} and {releases}")
    _check(1.0, delta)

    def cost(noise: float) -> float:
        return Accountant(rate, noise, releases).epsilon(delta)

    high = 1.0
    while cost(high) > epsilon:
        high *= 2
        if high > 2**30:
            raise InputError(f"expected an epsilon that noise can reach, got {epsilon} for {releases} releases")
    low = high / 2
    while low > 1e-3 and cost(low) <= epsilon:
        low, high = low / 2, low
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high


def _check(sigma: float, delta: float) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"expected a finite sigma above 0, got {sigma}")
    if not 0 < delta < 1:
        raise InputError(f"expected delta in (0, 1), got {delta}")
