"""Gradient leakage: inputs recovered from what a client sent, sketched or not (section 2.5).

The attacker knows the weights w, the network and R_t, and has y = R_t g of one client. It minimises
L_R(x) = |R grad_w F(w, x) - y|^2 by descending through the gradient. Labels are known, searched class by class, or
optimised along with x. Where R = I and the first layer is linear, x is a ratio of gradients (`linear_inputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from isotone.shared.errors import InputError, check_count
from isotone.sketching.models import Model

METHODS = ("l2", "cosine")


@dataclass(frozen=True)
class AttackConfig:
    """`method`: "l2", the paper's L_R, or "cosine" (of the two messages). `steps` of Adam at `rate`, falling to a tenth
    over the second half; `restarts` from other starts, the best by its loss kept; `tv`: weight of the total variation
    of pictures; `prior`: "uniform" starts in [0, 1], "normal", or a mean picture given to `invert`."""

    method: str = "l2"
    steps: int = 1500
    rate: float = 0.05
    restarts: int = 1
    tv: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"expected method to be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("steps", "restarts"):
            check_count(name, getattr(self, name))
        if not 0 < self.rate < float("inf") or not 0 <= self.tv < float("inf"):
            raise InputError(f"expected a rate above 0 and tv of at least 0, got {self.rate} and {self.tv}")


@dataclass(frozen=True)
class Reconstruction:
    """`x` (n, *shape), `label` (n,), the final `loss`, and its `history` (steps,)."""

    x: np.ndarray
    label: np.ndarray
    loss: float
    history: np.ndarray


def gradient_message(
    model: Model, params: Any, flatten: Callable[[Any], Array], sk: Callable[[Array], Array] | None = None
) -> Callable[[Array, Array], Array]:
    """What a client of one full-batch step sends of its examples: (x, y) -> R grad_w F(w, x, y), or the gradient."""

    def message(x: Array, y: Array) -> Array:
        flat = flatten(jax.grad(lambda p: _loss(model, p, x, y))(params))
        return flat if sk is None else sk(flat)

    return message


def steps_message(
    model: Model,
    params: Any,
    flatten: Callable[[Any], Array],
    sk: Callable[[Array], Array] | None,
    steps: int,
    rate: float,
) -> Callable[[Array, Array], Array]:
    """What a client of K full-batch steps sends, the steps unrolled: -R (u^K - w) / (K rate), a mean gradient."""

    def message(x: Array, y: Array) -> Array:
        def step(u: Any, _: None) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - rate * g, u, jax.grad(lambda p: _loss(model, p, x, y))(u)), None

        after, _ = jax.lax.scan(step, params, None, length=steps)
        flat = flatten(jax.tree.map(lambda a, b: (b - a) / (steps * rate), after, params))
        return flat if sk is None else sk(flat)

    return message


def _loss(model: Model, params: Any, x: Array, y: Array) -> Array:
    """Mean cross-entropy; y (n,) whole numbers, or (n, classes) soft labels."""
    logits = model.apply(params, x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
    return jnp.mean(optax.softmax_cross_entropy(logits, y))


def invert(
    message: Callable[[Array, Array], Array],
    target: Float[Array, " s"],
    shape: tuple[int, ...],
    key: Array,
    *,
    labels: Int[Array, " n"] | None = None,
    batch: int = 1,
    classes: int = 10,
    config: AttackConfig | None = None,
    start: Float[Array, ...] | None = None,
) -> Reconstruction:
    """Inputs (n, *shape) whose message is nearest to `target`.

    `labels`: known ones; None: soft labels are optimised along with x (DLG). `start`: a picture to begin all restarts
    near (a prior); else noise. Raises `InputError` on a target that is not finite.
    """
    config = config or AttackConfig()
    if not bool(jnp.isfinite(target).all()):
        raise InputError("expected a finite message to invert, got NaN or infinity")
    n = batch if labels is None else len(labels)
    keys = jax.random.split(key, config.restarts)
    x, y, losses = _invert_all(message, config, (n, *shape), classes, target, keys, labels, start)
    best = int(jnp.nanargmin(losses[:, -1]))
    label = labels if labels is not None else jnp.argmax(y[best], -1)
    return Reconstruction(np.asarray(x[best]), np.asarray(label), float(losses[best, -1]), np.asarray(losses[best]))


def invert_by_search(
    message: Callable[[Array, Array], Array],
    target: Float[Array, " s"],
    shape: tuple[int, ...],
    key: Array,
    classes: int,
    config: AttackConfig | None = None,
) -> Reconstruction:
    """One input of unknown label: every class tried, the one whose loss ends lowest kept."""
    found = [
        invert(message, target, shape, jax.random.fold_in(key, c), labels=jnp.array([c]), config=config)
        for c in range(classes)
    ]
    return min(found, key=lambda one: one.loss)


def _invert_all(message, config, shape, classes, target, keys, labels, start):
    """All restarts side by side: x, soft labels, losses (restarts, steps)."""

    def distance(x: Array, y: Array) -> Array:
        found = message(x, y)
        if config.method == "cosine":
            scale = jnp.linalg.norm(found) * jnp.linalg.norm(target)
            value = 1 - jnp.vdot(found, target) / jnp.maximum(scale, 1e-30)
        else:
            value = jnp.sum(jnp.square(found - target))
        return value + config.tv * _variation(x)

    def label_of(z: Array) -> Array:
        return jax.nn.softmax(z) if labels is None else labels

    rate = optax.piecewise_constant_schedule(config.rate, {config.steps // 2: 0.3, 3 * config.steps // 4: 0.3})
    tx = optax.adam(rate)

    def one(key: Array) -> tuple[Array, Array, Array]:
        first, second = jax.random.split(key)
        x = jax.random.uniform(first, shape) if start is None else start + 0.1 * jax.random.normal(first, shape)
        variables = (x, 0.1 * jax.random.normal(second, (shape[0], classes)))

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            now, state = carry
            value, gradient = jax.value_and_grad(lambda v: distance(v[0], label_of(v[1])))(now)
            updates, state = tx.update(gradient, state)
            now = optax.apply_updates(now, updates)
            if config.clip:
                now = (jnp.clip(now[0], 0.0, 1.0), now[1])
            return (now, state), value

        (found, _), losses = jax.lax.scan(step, (variables, tx.init(variables)), None, length=config.steps)
        return found[0], label_of(found[1]) if labels is None else found[1], losses

    return jax.jit(jax.vmap(one))(keys)


def _variation(x: Array) -> Array:
    """Anisotropic total variation of pictures (n, height, width, channels); 0 of what is no picture."""
    if x.ndim != 4:
        return jnp.zeros(())
    return jnp.mean(jnp.abs(jnp.diff(x, axis=1))) + jnp.mean(jnp.abs(jnp.diff(x, axis=2)))


def linear_inputs(weight_gradient: Float[Array, "inputs units"], bias_gradient: Float[Array, " units"]) -> np.ndarray:
    """x = (dL/dW_i) / (dL/db_i) of one example through a linear first layer: exact, no optimisation (R = I).

    The unit of the largest |dL/db_i| is taken. Raises `InputError` where all of them are 0.
    """
    unit = int(jnp.argmax(jnp.abs(bias_gradient)))
    if float(bias_gradient[unit]) == 0:
        raise InputError("expected a bias gradient that is not 0, got zeros")
    return np.asarray(weight_gradient[:, unit] / bias_gradient[unit])


# --- how much was recovered ---------------------------------------------------------------------------------------


def matched(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`found` (n, ...) in the order that is nearest to `truth`: a batch has none of its own."""
    from scipy.optimize import linear_sum_assignment

    a, b = found.reshape(len(found), -1), truth.reshape(len(truth), -1)
    cost = ((b[:, None] - a[None]) ** 2).mean(-1)
    return found[linear_sum_assignment(cost)[1]]


def mse(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error."""
    return float(np.mean((np.asarray(found, np.float64) - truth) ** 2))


def psnr(found: np.ndarray, truth: np.ndarray, peak: float = 1.0) -> float:
    """10 log10(peak^2 / MSE), dB, at most 100."""
    return float(min(100.0, 10 * np.log10(peak**2 / max(mse(found, truth), 1e-30))))


def ssim(found: np.ndarray, truth: np.ndarray, peak: float = 1.0) -> float:
    """Structural similarity of two whole pictures (one window): 1 where they are equal."""
    a, b = np.asarray(found, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    first, second = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    means = (2 * a.mean() * b.mean() + first) / (a.mean() ** 2 + b.mean() ** 2 + first)
    return float(means * (2 * covariance + second) / (a.var() + b.var() + second))


def identified(found: np.ndarray, pool: np.ndarray, truth: int) -> bool:
    """Whether `found` is nearer to entry `truth` of `pool` (n, ...) than to any other."""
    distance = ((pool.reshape(len(pool), -1) - found.reshape(1, -1)) ** 2).sum(1)
    return int(distance.argmin()) == truth
