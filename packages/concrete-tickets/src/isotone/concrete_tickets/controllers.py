"""What holds the expected density near its target while the logits are searched, as optax transformations.

Both take the gradient g = dR/dalpha of the objective and return g + lambda * h, where h is the gradient of the
density's error. They chain with any optax transformation:

    tx = optax.chain(grad_balance(), optax.adam(0.1))
    updates, state = tx.update(g, state, logits, density=0.01)

`density` is an ordinary argument, traced under jit, so that one compile serves every density. `sizes`, a pytree like
the logits, is how many weights each logit stands for (1 if not given).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError


class ControllerState(NamedTuple):
    """`multiplier`: lambda as it was used in the newest step; `steps`: steps taken."""

    multiplier: Float[Array, ""]
    steps: Array


def grad_balance(slack: float = 1.1, ema: float = 0.01) -> optax.GradientTransformationExtraArgs:
    """GRADBALANCE: the sparsity gradient is brought to the norm of the task's, only while the density is too high.

    With p = sigmoid(alpha), desired = slack * kappa * d: err = 100 (sum p / desired - 1), h = d err / d alpha,
    lambda' = |g| / (|h| + 1e-12) if err > 0 else 0; lambda is lambda' at the first step, then its exponential
    average with weight `ema`. Nothing to tune: lambda h does not change when err is scaled, and the whole direction
    scales with R.
    """
    if not slack > 0:
        raise InputError(f"expected slack above 0, got {slack}")
    if not 0 < ema <= 1:
        raise InputError(f"expected ema in (0, 1], got {ema}")

    def update(
        updates: Any, state: ControllerState, params: Any = None, *, density: Any, sizes: Any = None, **_: Any
    ) -> tuple[Any, ControllerState]:
        error, gradient = density_error(params, slack * density, sizes)
        # where h would underflow, no density is too high
        target = jnp.where(error > 0, global_norm(updates) / (_plain_norm(jax.tree.leaves(gradient)) + 1e-12), 0.0)
        average = (1 - ema) * state.multiplier + ema * target
        multiplier = jnp.where(state.steps == 0, target, average)
        return _add(updates, multiplier, gradient), ControllerState(multiplier, state.steps + 1)

    return optax.GradientTransformationExtraArgs(_init, update)


def lagrangian(learning_rate: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    """The alternative: one multiplier, raised by `learning_rate` times the signed error at each step.

    The loss is R + lambda * err with desired = kappa * d, no slack; lambda starts at 0. The paper's rate is 0.01 of
    the logits' (a tenth of that for feature_mse).
    """
    if not learning_rate > 0:
        raise InputError(f"expected a learning_rate above 0, got {learning_rate}")

    def update(
        updates: Any, state: ControllerState, params: Any = None, *, density: Any, sizes: Any = None, **_: Any
    ) -> tuple[Any, ControllerState]:
        error, gradient = density_error(params, density, sizes)
        direction = _add(updates, state.multiplier, gradient)
        return direction, ControllerState(state.multiplier + learning_rate * error, state.steps + 1)

    return optax.GradientTransformationExtraArgs(_init, update)


def density_error(logits: Any, density: Any, sizes: Any = None) -> tuple[Float[Array, ""], Any]:
    """err = 100 (sum sigmoid(alpha) / (density * d) - 1), in percent, and h, its gradient by alpha (analytic)."""
    if logits is None:
        raise ValueError("expected the logits as params: update(updates, state, logits, density=...)")
    each, total = _sizes(logits, sizes)
    scale = 100 / (density * total)

    def slope(logit: Array, size: Any) -> Array:
        p = jax.nn.sigmoid(logit)
        return scale * size * p * (1 - p)

    return 100 * (expected_density(logits, sizes) / density - 1), jax.tree.map(slope, logits, each)


def expected_density(logits: Any, sizes: Any = None) -> Float[Array, ""]:
    """sum sigmoid(alpha) / d."""
    each, total = _sizes(logits, sizes)
    parts = jax.tree.map(lambda logit, size: jnp.sum(jax.nn.sigmoid(logit) * size), logits, each)
    return sum(jax.tree.leaves(parts)) / total


def global_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm over all leaves; where squares could under- or overflow, divided by the largest first."""
    leaves = jax.tree.leaves(tree)

    def scaled() -> Array:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
        unit = jnp.where(largest > 0, largest, 1.0)
        return unit * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / unit)) for leaf in leaves))

    plain = _plain_norm(leaves)
    return jax.lax.cond((plain > 1e-12) & (plain < 1e18), lambda: plain, scaled)


def _plain_norm(leaves: Sequence[Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))


def _init(params: Any) -> ControllerState:
    del params
    return ControllerState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def _add(updates: Any, multiplier: Array, gradient: Any) -> Any:
    return jax.tree.map(lambda g, h: g + multiplier * h, updates, gradient)


def _sizes(logits: Any, sizes: Any) -> tuple[Any, Any]:
    """How many weights each logit stands for, 1 where not given, and d."""
    if sizes is None:
        return jax.tree.map(lambda _: 1.0, logits), sum(leaf.size for leaf in jax.tree.leaves(logits))
    return sizes, sum(jnp.sum(size) for size in jax.tree.leaves(sizes))
