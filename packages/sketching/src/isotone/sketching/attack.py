"""Gradient leakage: inputs recovered from what a client sent, sketched or not (section 2.5).

The attacker knows the weights w, the network and R_t, and has y = R_t g of one client. It minimises
L_R(x) = |R grad_w F(w, x) - y|^2 by descending through the gradient. Labels are known, read off the last layer's bias
(R = I), searched class by class, or optimised along with x. Where R = I and the first layer is linear, x is a ratio of
gradients. All messages, and all starts of each, are attacked side by side in float64. Legend: m messages of n examples,
s numbers each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from isotone.shared.errors import InputError, check_count
from isotone.sketching.compiling import fast_jit
from isotone.sketching.models import Model

METHODS = ("l2", "cosine")
OPTIMIZERS = ("adam", "lbfgs")
Message = Callable[..., Array]
"""`message(x (n, *shape), y) -> (s,)`: what a client sends of its examples; y labels (n,) or soft ones (n, classes)."""


@dataclass(frozen=True)
class AttackConfig:
    """`method`: "l2", the paper's L_R, or "cosine", 1 minus that of the two messages. `steps` of `optimizer`: "adam" at
    `rate`, falling to a millionth of it over the second half, or "lbfgs", which has a line search. `restarts` from
    other starts, the best by its loss kept. `tv`: weight of the total variation of pictures. `bounded`: pixels lie in
    [0, 1]."""

    method: str = "l2"
    optimizer: str = "adam"
    steps: int = 1500
    rate: float = 0.05
    restarts: int = 1
    tv: float = 0.0
    bounded: bool = True

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise InputError(f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "restarts"):
            check_count(name, getattr(self, name))
        if not 0 < self.rate < float("inf") or not 0 <= self.tv < float("inf"):
            raise InputError(f"expected a finite rate above 0 and tv of at least 0, got {self.rate} and {self.tv}")


class Prior(NamedTuple):
    """What the attacker believes before it listens: `mean` of each example's input, and `weight`, a number an input, of
    the squared distance to it. For noise of variance v in the message and a normal prior of variance u it is v / u: the
    minimum is then the maximum a posteriori estimate."""

    mean: Float[Array, "m n *shape"]
    weight: Float[Array, "m n *shape"]


@dataclass(frozen=True)
class Reconstruction:
    """`x` (n, *shape), `label` (n,), the final `loss`, and the best start's `history` (steps,)."""

    x: np.ndarray
    label: np.ndarray
    loss: float
    history: np.ndarray


# --- what a client sends ------------------------------------------------------------------------------------------


def flat(tree: Any) -> Float[Array, " d"]:
    """The leaves of a tree end to end, in their own precision."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def gradient_message(model: Model, params: Any, sk: Callable[[Array], Array] | None = None) -> Message:
    """What a client of one full-batch step sends of its examples: (x, y) -> R grad_w F(w, x, y), or the gradient."""

    def message(x: Array, y: Array) -> Array:
        gradient = flat(jax.grad(lambda p: _loss(model, p, x, y))(_as_precise(params, x)))
        return gradient if sk is None else sk(gradient)

    return message


def steps_message(
    model: Model, params: Any, steps: int, rate: float, sk: Callable[[Array], Array] | None = None
) -> Message:
    """What a client of K full-batch steps sends, the steps unrolled: R (w - u^K) / (K rate), a mean gradient.

    The attacker knows K and the rate and divides by them. Raises `InputError` on fewer than 1 step.
    """
    check_count("local steps", steps)

    def message(x: Array, y: Array) -> Array:
        def step(u: Any, _: None) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - rate * g, u, jax.grad(lambda p: _loss(model, p, x, y))(u)), None

        begin = _as_precise(params, x)
        after, _ = jax.lax.scan(step, begin, None, length=steps)
        mean = flat(jax.tree.map(lambda a, b: (b - a) / (steps * rate), after, begin))
        return mean if sk is None else sk(mean)

    return message


def _as_precise(params: Any, x: Array) -> Any:
    """A gradient has the precision of the weights: float64 for an attack in it."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, x.dtype)), params)


def _loss(model: Model, params: Any, x: Array, y: Array) -> Array:
    """Mean cross-entropy; y (n,) whole numbers, or (n, classes) soft labels."""
    logits = model.apply(params, x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
    return jnp.mean(optax.softmax_cross_entropy(logits, y))


# --- what is made of it -------------------------------------------------------------------------------------------


def invert(
    message: Message,
    target: Float[Array, " s"],
    shape: tuple[int, ...],
    key: Array,
    *,
    labels: Int[Array, " n"] | None = None,
    batch: int = 1,
    classes: int = 10,
    config: AttackConfig | None = None,
    prior: Prior | None = None,
) -> Reconstruction:
    """Inputs (n, *shape) whose message is nearest to `target`, in float64 whatever the caller's precision.

    `labels`: known ones; None: soft labels of `batch` examples are optimised along with x (DLG). Raises `InputError` on
    a target that is not finite.
    """
    with jax.enable_x64(True):
        many = None if labels is None else jnp.asarray(labels)[None]
        targets, keys = jnp.asarray(target)[None], jnp.asarray(key)[None]
        believed = None if prior is None else Prior(*(jnp.asarray(part)[None] for part in prior))
    return invert_many(
        *(message, targets, shape, keys), labels=many, batch=batch, classes=classes, config=config, prior=believed
    )[0]


def invert_many(
    message: Message,
    targets: Float[Array, "m s"],
    shape: tuple[int, ...],
    keys: Array,
    *,
    labels: Int[Array, "m n"] | None = None,
    batch: int = 1,
    classes: int = 10,
    config: AttackConfig | None = None,
    prior: Prior | None = None,
    context: Any = None,
) -> list[Reconstruction]:
    """`invert` of m messages by one compiled program: `keys` (m,), `labels` and `prior` with a leading axis m.

    `context`: a tree with a leading axis m, what differs between the messages (weights, R's round): where it is given,
    `message` gets it as its third argument.
    """
    config = config or AttackConfig()
    if not bool(jnp.isfinite(targets).all()):
        raise InputError("expected a finite message to invert, got NaN or infinity")
    n = batch if labels is None else labels.shape[1]
    with jax.enable_x64(True):
        wide = jnp.asarray(targets, jnp.float64)
        believed = None if prior is None else Prior(*(jnp.asarray(part, jnp.float64) for part in prior))
        begin = _begin(keys, (config.restarts, n, *shape), classes if labels is None else 0, believed)
        given = (wide, begin, labels, believed, context)
        program = _program(message, config, (n, *shape), classes, tuple(None if part is None else 0 for part in given))
        x, soft, losses = program(*given)
        x, soft, losses = np.asarray(x), np.asarray(soft), np.asarray(losses)
    found = []
    for number, (inputs, each) in enumerate(zip(x, losses, strict=True)):
        # a start that ran away does not count
        best = int(np.where(np.isfinite(each[:, -1]), each[:, -1], np.inf).argmin())
        label = np.asarray(labels[number]) if labels is not None else soft[number, best].argmax(-1)
        found.append(Reconstruction(inputs[best], label, float(each[best, -1]), each[best]))
    return found


def invert_by_search(
    message: Message,
    target: Float[Array, " s"],
    shape: tuple[int, ...],
    key: Array,
    classes: int,
    config: AttackConfig | None = None,
) -> Reconstruction:
    """One input of unknown label, sketched or not: every class tried, the one whose loss ends lowest kept."""
    with jax.enable_x64(True):
        targets = jnp.repeat(jnp.asarray(target)[None], classes, 0)
        labels, keys = jnp.arange(classes, dtype=jnp.int32)[:, None], jax.random.split(key, classes)
    found = invert_many(message, targets, shape, keys, labels=labels, classes=classes, config=config)
    return min(found, key=lambda one: one.loss)


def _begin(keys: Array, shape: tuple[int, ...], classes: int, prior: Prior | None) -> tuple[np.ndarray, np.ndarray]:
    """Where all starts of all messages begin: inputs (m, restarts, n, *shape), in [0, 1] or about the prior's mean, and
    logits of soft labels (m, restarts, n, classes). Drawn outside of the program, which is then sooner compiled."""
    rngs = [np.random.default_rng(words.ravel()) for words in np.asarray(jax.random.key_data(keys))]
    if prior is None:
        x = np.stack([rng.uniform(size=shape) for rng in rngs])
    else:
        x = np.stack(
            [np.asarray(mean) + 0.1 * rng.standard_normal(shape) for mean, rng in zip(prior.mean, rngs, strict=True)]
        )
    return x, np.stack([0.1 * rng.standard_normal((*shape[:2], classes)) for rng in rngs])


@functools.lru_cache(maxsize=64)
def _program(
    message: Message, config: AttackConfig, shape: tuple[int, ...], classes: int, axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """All starts of all messages: (targets, begins, labels, priors, contexts) -> x, soft labels, losses (m, restarts,
    steps + 1). `axes`: 0 or None of each argument, which is None itself there."""
    second = config.steps // 2
    falling = optax.exponential_decay(config.rate, max(1, config.steps - second), 1e-6, transition_begin=second)
    tx: Any = optax.adam(falling) if config.optimizer == "adam" else optax.lbfgs()

    def whole(
        target: Array, begin: tuple[Array, Array], labels: Array | None, prior: Prior | None, context: Any
    ) -> tuple[Array, Array, Array]:
        def value(variables: tuple[Array, Array]) -> Array:
            x, z = variables
            label = jax.nn.softmax(z) if labels is None else labels
            sent = message(x, label) if context is None else message(x, label, context)
            loss = distance(config.method, sent, target) + config.tv * variation(x)
            return loss if prior is None else loss + jnp.sum(prior.weight * jnp.square(x - prior.mean))

        slope = jax.value_and_grad(value)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            now, state = carry
            loss, gradient = slope(now)
            updates, state = tx.update(gradient, state, now, value=loss, grad=gradient, value_fn=value)
            now = optax.apply_updates(now, updates)
            # a line search knows nothing of bounds: its answer is cut at the end
            bounded = config.bounded and config.optimizer == "adam"
            return ((jnp.clip(now[0], 0.0, 1.0) if bounded else now[0], now[1]), state), loss

        def start(x: Array, z: Array) -> tuple[Array, Array, Array]:
            (now, _), losses = jax.lax.scan(step, ((x, z), tx.init((x, z))), None, length=config.steps)
            x = jnp.clip(now[0], 0.0, 1.0) if config.bounded else now[0]
            return x, jax.nn.softmax(now[1]), jnp.append(losses, value((x, now[1])))

        return jax.vmap(start)(*begin)

    return fast_jit(jax.vmap(whole, axes))


def distance(method: str, sent: Float[Array, " s"], target: Float[Array, " s"]) -> Float[Array, ""]:
    """|sent - target|^2, or 1 minus the cosine between them."""
    if method == "l2":
        return jnp.sum(jnp.square(sent - target))
    return 1 - jnp.vdot(sent, target) / jnp.maximum(jnp.linalg.norm(sent) * jnp.linalg.norm(target), 1e-30)


def variation(x: Float[Array, "n ..."]) -> Float[Array, ""]:
    """Anisotropic total variation of pictures (n, height, width, channels); 0 of what is no picture."""
    if x.ndim != 4:
        return jnp.zeros((), x.dtype)
    return jnp.mean(jnp.abs(jnp.diff(x, axis=1))) + jnp.mean(jnp.abs(jnp.diff(x, axis=2)))


# --- without descent ----------------------------------------------------------------------------------------------


def linear_inputs(
    weight_gradient: Float[Array, "inputs units"], bias_gradient: Float[Array, " units"]
) -> Float[np.ndarray, " inputs"]:
    """x = (dL/dW_i) / (dL/db_i) of one example through a linear first layer: exact, no optimisation (R = I).

    The unit of the largest |dL/db_i| is taken. Raises `InputError` where all of them are 0.
    """
    unit = int(jnp.argmax(jnp.abs(bias_gradient)))
    if float(bias_gradient[unit]) == 0:
        raise InputError("expected a bias gradient that is not 0, got zeros")
    return np.asarray(weight_gradient[:, unit] / bias_gradient[unit])


def label_of_gradient(bias_gradient: Float[Array, " classes"]) -> int:
    """The label of one example from the last layer's bias gradient, softmax(z) - onehot: its only negative entry (iDLG;
    R = I). Raises `InputError` where there is not exactly one, as of several labels."""
    negative = np.flatnonzero(np.asarray(bias_gradient) < 0)
    if len(negative) != 1:
        raise InputError(f"expected one negative entry in the bias gradient of one example, got {len(negative)}")
    return int(negative[0])
