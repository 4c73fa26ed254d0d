"""NorMuon for optax, with the torch optimizer's conventions: on the same gradients it gives the same updates.

`scale_by_normuon` is the direction alone, to be chained; `normuon` is the whole optimizer with AdamW for what is
not a hidden matrix. Needs the extra `jax`. flax stores a Dense kernel as (in, out), the transpose of a torch
weight: with `transposed` (the default) a column of the array is a neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from isotone.normuon.layout import AXES
from isotone.normuon.normalize import check_scale, shape_factor
from isotone.normuon.orthogonalize import check_method, coefficients

ADAMW = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-10, "weight_decay": 0.0}
MATRIX, OTHER = "matrix", "adamw"
Method = str | Callable[[Array], Array]


class NorMuonState(NamedTuple):
    """`momentum` as the gradients; `second_moment`: one float32 number a neuron, () where there is none."""

    momentum: PyTree
    second_moment: PyTree


def scale_by_normuon(
    momentum: float = 0.95,
    beta2: float | None = 0.95,
    nesterov: bool = True,
    eps: float = 1e-8,
    scale: str | None = "rms",
    axis: str = "row",
    orthogonalize: Method = "polar_express",
    ns_steps: int = 5,
    ns_dtype: Any = None,
    transposed: bool = True,
) -> optax.GradientTransformation:
    """Algorithm 1 of arXiv 2510.05491 up to the learning rate, on leaves of two dimensions or more.

    `beta2` None is Muon. `transposed`: the last two dimensions are (in, out), as in flax; else (out, in), as in
    torch. Three dimensions are a batch of matrices; four or more a convolution, flattened to a matrix with the
    output channels kept. `ns_dtype` None: float32 on a CPU, bfloat16 elsewhere. The other settings are
    `isotone.normuon.NorMuon`'s. Raises `ValueError` on settings out of range and on leaves of fewer dimensions.
    """
    check_scale(scale)
    check_method(orthogonalize, ns_steps)
    if axis not in AXES:
        raise ValueError(f"expected axis to be one of {', '.join(AXES)}, got {axis!r}")
    if not all(0 <= beta < 1 for beta in (momentum, beta2 or 0.0)):
        raise ValueError(f"expected momentum and beta2 in [0, 1), got {momentum} and {beta2}")
    if not eps > 0:
        raise ValueError(f"expected eps above 0, got {eps}")

    def init(params: PyTree) -> NorMuonState:
        def moment(leaf: Array) -> Array:
            rows = _matrices(leaf, transposed)
            if beta2 is None:
                return jnp.zeros(())
            return jnp.zeros_like(rows[..., :1] if _row(rows, axis) else rows[..., :1, :], dtype=jnp.float32)

        return NorMuonState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(moment, params))

    def update(gradients: PyTree, state: NorMuonState, params: PyTree | None = None) -> tuple[PyTree, NorMuonState]:
        del params
        averages = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, gradients)
        directions = averages
        if nesterov:
            directions = jax.tree.map(lambda m, g: (1 - momentum) * g + momentum * m, averages, gradients)

        def direction(leaf: Array, second: Array) -> tuple[Array, Array]:
            matrices = _matrices(leaf, transposed)
            orthogonal = _polar(matrices, orthogonalize, ns_steps, ns_dtype)
            normalised = orthogonal
            if beta2 is not None:
                along = -1 if _row(matrices, axis) else -2
                second = beta2 * second + (1 - beta2) * jnp.mean(orthogonal**2, along, keepdims=True)
                inverse = jnp.where(second > 0, 1 / (jnp.sqrt(second) + eps), 0)
                normalised = orthogonal * inverse
            after = jnp.sum(normalised**2, (-2, -1), keepdims=True)
            before = 1.0 if scale == "rms" else jnp.sum(orthogonal**2, (-2, -1), keepdims=True)
            factor: Any = shape_factor(scale, *matrices.shape[-2:])
            if scale == "rms" or beta2 is not None:
                factor = jnp.where(after > 0, factor * jnp.sqrt(before / jnp.maximum(after, 1e-30)), 0)
            return _restore(factor * normalised, leaf, transposed).astype(leaf.dtype), second

        pairs = jax.tree.map(direction, directions, state.second_moment)
        updates, seconds = jax.tree.transpose(jax.tree.structure(directions), jax.tree.structure((0, 0)), pairs)
        return updates, NorMuonState(averages, seconds)

    return optax.GradientTransformation(init, update)


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.1,
    cautious: bool = False,
    adamw: Mapping[str, Any] | None = None,
    matrices: Callable[[str, Array], bool] | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """NorMuon for hidden matrices, AdamW for all other leaves.

    `weight_decay` is decoupled, with the base rate; `cautious` decays only where update and weight agree in sign.
    `adamw`: settings of `optax.adamw`. `matrices(path, leaf)` says which leaves are hidden matrices (default:
    two dimensions or more, and no "embed" or "head" in the path). `settings`: of `scale_by_normuon`. Raises
    `ValueError` on a negative weight decay and on unknown `adamw` settings.
    """
    if not weight_decay >= 0:
        raise ValueError(f"expected a weight_decay of at least 0, got {weight_decay}")
    unknown = set(adamw or {}) - {*ADAMW, "eps_root", "mu_dtype", "mask", "nesterov"}
    if unknown:
        raise ValueError(f"expected settings of optax.adamw, got {sorted(unknown)[0]!r}")
    chosen = matrices or is_hidden_matrix

    def labels(params: PyTree) -> PyTree:
        def label(path: Any, leaf: Array) -> str:
            return MATRIX if chosen(jax.tree_util.keystr(path), leaf) else OTHER

        return jax.tree_util.tree_map_with_path(label, params)

    decay = _cautious_decay(weight_decay) if cautious else optax.add_decayed_weights(weight_decay)
    hidden = optax.chain(scale_by_normuon(**settings), decay, optax.scale_by_learning_rate(learning_rate))
    return optax.partition({MATRIX: hidden, OTHER: optax.adamw(**{**ADAMW, **(adamw or {})})}, labels)


def is_hidden_matrix(path: str, leaf: Array) -> bool:
    """Two dimensions or more, and neither an embedding nor an output head by its name."""
    return leaf.ndim >= 2 and not any(word in path.lower() for word in ("embed", "head"))


def _cautious_decay(rate: float) -> optax.GradientTransformation:
    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("expected params in update, since weights decay")
        return jax.tree.map(lambda u, w: u + rate * w * (u * w > 0), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _matrices(leaf: Array, transposed: bool) -> Float[Array, "... out in"]:
    if leaf.ndim < 2:
        raise ValueError(f"expected leaves of 2 dimensions or more, got shape {leaf.shape}")
    if leaf.ndim > 3:
        leaf = leaf.reshape(-1, leaf.shape[-1]) if transposed else leaf.reshape(leaf.shape[0], -1)
    return leaf.mT if transposed else leaf


def _restore(matrices: Array, leaf: Array, transposed: bool) -> Array:
    return (matrices.mT if transposed else matrices).reshape(leaf.shape)


def _row(matrices: Array, axis: str) -> bool:
    return axis == "row" or (axis == "auto" and matrices.shape[-2] >= matrices.shape[-1])


def _polar(x: Array, method: Method, steps: int, dtype: Any) -> Array:
    """Section 2.4, in float32 outside."""
    if callable(method):
        return method(x).astype(jnp.float32)
    single = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if method == "svd":
        left, singular, right = jnp.linalg.svd(single, full_matrices=False)
        alive = singular > singular[..., :1] * max(x.shape[-2:]) * jnp.finfo(single.dtype).eps
        return (left * alive[..., None, :]) @ right
    tall = x.shape[-2] > x.shape[-1]
    safety, eps = (1.02, 1e-6) if method == "polar_express" else (1.0, 1e-7)
    x = (single.mT if tall else single).astype(dtype or (single.dtype if _on_cpu() else jnp.bfloat16))
    x = x / (safety * jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    with jax.default_matmul_precision("highest"):
        for a, b, c in coefficients(method, steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).astype(single.dtype)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
