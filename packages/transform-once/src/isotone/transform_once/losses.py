"""Losses in the frequency domain and on fields: by Parseval the same numbers (section 2.5).

Of a truncated model the loss splits: |Y^ - Y|^2 = |Y^_{<m} - Y_{<m}|^2 + sum of |Y_k|^2 outside the block, and the
second term, the irreducible one, belongs to the data. Both are counted, so that a value here is the field's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Inexact

from isotone.shared.errors import InputError

LOSSES = ("relative_l2", "mse")


def check_loss(name: str) -> str:
    """`name`, or `InputError`."""
    if name not in LOSSES:
        raise InputError(f"expected a loss of {', '.join(LOSSES)}, got {name!r}")
    return name


def relative_l2(predicted: Float[Array, "B ..."], target: Float[Array, "B ..."]) -> Float[Array, ""]:
    """Mean over samples of |y^ - y| / |y|, over all points and channels; infinite for a target that is 0 everywhere.

    Raises `InputError` on fields of two shapes."""
    _check_shapes(predicted, target)
    axes = tuple(range(1, target.ndim))
    return jnp.mean(_root(jnp.sum((predicted - target) ** 2, axes)) / _root(jnp.sum(target**2, axes)))


def relative_l2_freq(
    predicted: Inexact[Array, "B ..."],
    target: Inexact[Array, "B ..."],
    outside: Float[Array, " B"],
    weights: np.ndarray | None = None,
    norm: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """`relative_l2` of the fields, from blocks of modes and the squared norm of the target `outside` its block.

    `weights`: how often each mode counts (`Transform.weights`), shape of the block; None: once. `norm`: the squared
    norm of the whole target, where the blocks are of fields that were shifted. Raises `InputError` on blocks of two
    shapes.
    """
    error = squared_error(predicted, target, weights)
    whole = squared_error(0 * target, target, weights) + outside if norm is None else norm
    return jnp.mean(_root(error + outside) / _root(whole))


def mse(predicted: Float[Array, "B ..."], target: Float[Array, "B ..."]) -> Float[Array, ""]:
    """Mean squared error over samples, points and channels. Raises `InputError` on fields of two shapes."""
    _check_shapes(predicted, target)
    return jnp.mean((predicted - target) ** 2)


def mse_freq(
    predicted: Inexact[Array, "B ..."],
    target: Inexact[Array, "B ..."],
    outside: Float[Array, " B"],
    points: int,
    weights: np.ndarray | None = None,
) -> Float[Array, ""]:
    """`mse` of the fields from blocks of modes; `points` of the grid times channels."""
    return jnp.mean(squared_error(predicted, target, weights) + outside) / points


def squared_error(
    predicted: Inexact[Array, "B ..."], target: Inexact[Array, "B ..."], weights: np.ndarray | None = None
) -> Float[Array, " B"]:
    """|difference|^2 of each sample's block, in float32 or wider."""
    _check_shapes(predicted, target)
    gap = jnp.abs(predicted - target)
    gap = gap.astype(jnp.promote_types(gap.dtype, jnp.float32)) ** 2
    if weights is not None:
        gap = gap * jnp.asarray(weights, gap.dtype)[None, ..., None]
    return jnp.sum(gap, tuple(range(1, gap.ndim)))


def _check_shapes(predicted: Array, target: Array) -> None:
    if predicted.shape != target.shape or jnp.iscomplexobj(predicted) != jnp.iscomplexobj(target):
        one, two = (f"{each.shape} {each.dtype}" for each in (predicted, target))
        raise InputError(f"expected predictions and targets of one shape and domain, got {one} and {two}")


def _root(x: Array) -> Array:
    """A square root whose gradient at 0 is 0."""
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))
