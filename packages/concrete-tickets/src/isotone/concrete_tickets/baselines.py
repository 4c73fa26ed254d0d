"""Tickets without a search: scores at given weights, once or in rounds.

All take the same weights and give a `Ticket` with the exact count, so that they differ in nothing but the choice.
SNIP, GraSP and SynFlow are here as their papers define them, not as they are sometimes copied: SynFlow's signs come
back, GraSP's Hessian product is signed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.concrete_tickets.layout import (
    Layout,
    Params,
    Where,
    default_kernels,
    kept_count,
    leaf_name,
    masked,
    named_weights,
    top_k,
)
from isotone.concrete_tickets.noise import host_generator
from isotone.concrete_tickets.objectives import ApplyFn, Batch, FeaturesFn, Network, Objective, resolve_objective
from isotone.concrete_tickets.ticket import Ticket
from isotone.shared.errors import InputError

GRASP_TEMPERATURE = 200.0


def balanced_batch(data: tuple[Any, Any], per_class: int = 10, seed: int = 0) -> Batch:
    """`per_class` examples of each class, drawn at random: the batch of SNIP's and GraSP's papers."""
    inputs, labels = data[0], np.asarray(data[1])
    source = np.random.default_rng(seed)
    picked = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise InputError(f"expected at least {per_class} examples of class {label}, got {len(members)}")
        picked.append(source.choice(members, per_class, replace=False))
    index = np.concatenate(picked)
    return Batch(np.asarray(inputs)[index], labels[index].astype(np.int32))


def magnitude(params: Params, density: float, where: Where = default_kernels) -> Ticket:
    """The largest |theta| over all layers together."""
    return Ticket.from_scores({n: np.abs(np.asarray(w)) for n, w in named_weights(params, where).items()}, density)


def random_ticket(
    params: Params,
    density: float,
    key: Array,
    layer_densities: dict[str, float] | None = None,
    where: Where = default_kernels,
) -> Ticket:
    """Weights at random over all layers together, or at given densities of the layers (`density` is then unused)."""
    weights = named_weights(params, where)
    scores = _random_scores(weights, key)
    if layer_densities is None:
        return Ticket.from_scores(scores, density)
    if missing := set(weights) - set(layer_densities):
        raise InputError(f"expected a density for every layer, got none for {', '.join(sorted(missing))}")
    for name in weights:
        if not 0 <= layer_densities[name] <= 1:
            raise InputError(f"expected a density in [0, 1] of {name}, got {layer_densities[name]}")
    counts = {name: round(layer_densities[name] * w.size) for name, w in weights.items()}
    return _by_layer(scores, counts).warn_collapse()


def erk_counts(params: Params, density: float, where: Where = default_kernels) -> dict[str, int]:
    """How many weights of each layer Erdős-Rényi-Kernel keeps, floor(density * d) in all.

    A layer's density is proportional to (sum of its dimensions) / (their product); where that is above 1 the layer is
    whole, and the rest goes to the others. What rounding leaves is given to the largest remainders.
    """
    weights = named_weights(params, where)
    total = kept_count(density, sum(w.size for w in weights.values()))
    full: set[str] = set()
    while True:
        rest = total - sum(weights[n].size for n in full)
        sums = {n: float(sum(w.shape)) for n, w in weights.items() if n not in full}
        scale = rest / sum(sums.values()) if sums else 0.0
        over = {n for n, s in sums.items() if scale * s > weights[n].size}
        if not over:
            break
        full |= over
    exact = {n: float(w.size) if n in full else scale * sums[n] for n, w in weights.items()}
    counts = {n: int(value) for n, value in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def erk(params: Params, density: float, key: Array, where: Where = default_kernels) -> Ticket:
    """Random in each layer, at the Erdős-Rényi-Kernel densities."""
    scores = _random_scores(named_weights(params, where), key)
    return _by_layer(scores, erk_counts(params, density, where)).warn_collapse()


def snip(
    apply_fn: ApplyFn, params: Params, batch: Batch, density: float, rounds: int = 1, where: Where = default_kernels
) -> Ticket:
    """SNIP: |theta * dL/dtheta| on one batch. With `rounds`, pruned a little more at each, scores taken again."""
    return _iterate("snip", apply_fn, params, batch, density, rounds, where)


def grasp(
    apply_fn: ApplyFn, params: Params, batch: Batch, density: float, rounds: int = 1, where: Where = default_kernels
) -> Ticket:
    """GraSP: prune the largest -theta * (H g), logits divided by 200: what harms the gradient flow least."""
    return _iterate("grasp", apply_fn, params, batch, density, rounds, where)


def synflow(
    linear_fn: ApplyFn,
    params: Params,
    inputs: Any,
    density: float,
    rounds: int = 100,
    where: Where = default_kernels,
) -> Ticket:
    """SynFlow: theta * dR/dtheta of R = sum of the outputs of the |theta| network on all-ones inputs, in `rounds`
    of exponentially falling density. No data: `inputs` only says the shape (one example is enough).

    `linear_fn`: the network without normalisation over the batch, which would hide R.
    """
    ones = np.ones((1, *inputs.shape[1:]), np.float32)
    return _iterate("synflow", linear_fn, params, Batch(ones, jnp.zeros(1, jnp.int32)), density, rounds, where)


def saliency(
    apply_fn: ApplyFn,
    params: Params,
    batch: Batch,
    density: float,
    objective: str | Objective = "loss",
    rounds: int = 1,
    where: Where = default_kernels,
    features_fn: FeaturesFn | None = None,
) -> Ticket:
    """|m dR/dm| of any objective at m = 1/2 on what is still there, once or in rounds.

    Not at m = 1, where the KL and every other distance to the dense network has no gradient.
    """
    resolve_objective(objective)
    return _iterate("saliency", apply_fn, params, batch, density, rounds, where, objective, features_fn)


def scores(kind: str, apply_fn: ApplyFn, params: Params, batch: Batch, where: Where = default_kernels) -> Any:
    """The scores of "snip", "grasp" or "synflow" by leaf, before any pruning: high is kept."""
    layout = Layout.of(params, where)
    return layout.expand(_scores(kind, apply_fn, layout, None, None, params, jnp.ones(layout.total), batch))


def _iterate(kind, apply_fn, params, batch, density, rounds, where, objective=None, features_fn=None) -> Ticket:
    if rounds < 1:
        raise InputError(f"expected rounds to be at least 1, got {rounds}")
    layout, batch = Layout.of(params, where), Batch(*batch)
    count = kept_count(density, layout.total)
    mask = np.ones(layout.total, bool)
    for number in range(1, rounds + 1):
        kept = count if number == rounds else max(count, round(layout.total * density ** (number / rounds)))
        share = mask.astype(np.float32)
        value = np.asarray(_scores(kind, apply_fn, layout, objective, features_fn, params, share, batch))
        if not np.isfinite(value).all():
            raise InputError(f"expected finite scores, got NaN or infinity in round {number} of {kind}")
        mask = top_k(np.where(mask, value, -np.inf), kept)
    return Ticket._of(layout, mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _scores(kind, apply_fn, layout, objective, features_fn, params, mask, batch) -> Array:
    """Scores (d,) of the network at mask * theta."""
    weights = masked(params, layout.expand(mask))
    make = functools.partial(Network, apply_fn, names=layout.names, features_fn=features_fn)
    if kind == "synflow":
        absolute = jax.tree.map(jnp.abs, weights)

        def log_flow(params):  # the log has the same ranking as R and does not overflow in deep networks
            return jnp.log(jnp.sum(apply_fn(params, batch.inputs)) + 1e-38)

        gradient = jax.grad(log_flow)(absolute)
        return layout.flatten(named_only(absolute, layout)) * layout.flatten(named_only(gradient, layout))
    if kind == "snip":
        gradient = make(weights).weight_gradient(batch)
        return jnp.abs(layout.flatten(named_only(weights, layout)) * layout.flatten(gradient))
    if kind == "grasp":
        flat = layout.flatten(named_only(weights, layout))

        def gradient_of(flat):
            def loss(flat):
                params = _replaced(weights, layout.expand(flat))
                logits = apply_fn(params, batch.inputs) / GRASP_TEMPERATURE
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

            return jax.grad(loss)(flat)

        gradient = gradient_of(flat)
        # the network is that of the kept weights: g lives on them alone
        product = jax.jvp(gradient_of, (flat,), (gradient * mask,))[1]
        return flat * product
    function, _ = resolve_objective(objective)

    def value(m):
        sparse = make(masked(params, layout.expand(m)))
        return function(sparse, make(params), batch, jax.random.key(0))

    half = 0.5 * mask
    return jnp.abs(half * jax.grad(value)(half))


def named_only(params: Params, layout: Layout) -> dict[str, Array]:
    """The leaves of `layout` by name."""
    wanted = set(layout.names)
    return named_weights(params, lambda name, _: name in wanted)


def _replaced(params: Params, leaves: dict[str, Array]) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(leaf_name(path), leaf), params)


def _random_scores(weights: dict[str, Any], key: Array) -> dict[str, np.ndarray]:
    source = host_generator(key)
    return {name: source.random(w.shape, np.float32) for name, w in weights.items()}


def _by_layer(scores: dict[str, np.ndarray], counts: dict[str, int]) -> Ticket:
    flat = {name: top_k(value.reshape(-1), counts[name]) for name, value in scores.items()}
    return Ticket({name: jax.device_put(flat[name].reshape(value.shape)) for name, value in scores.items()})
