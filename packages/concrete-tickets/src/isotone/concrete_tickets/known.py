"""Problems whose best ticket is known, to test the search itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from isotone.concrete_tickets.layout import Params, default_kernels, masked, named_weights
from isotone.concrete_tickets.objectives import ApplyFn, Batch, Network
from isotone.concrete_tickets.ticket import Ticket


@dataclass(frozen=True, eq=False)
class KnownProblem:
    """`apply_fn`, `params`, `data` and `objective` as `search` takes them, and the `best` ticket."""

    apply_fn: ApplyFn
    params: Params
    data: tuple[Array, Array]
    objective: Any
    best: Ticket

    def recovered(self, ticket: Ticket) -> int:
        """How many of the best ticket's weights `ticket` keeps."""
        return sum(int(jnp.sum(mask & ticket.masks[name])) for name, mask in self.best.masks.items())

    def jaccard(self, ticket: Ticket) -> float:
        """|both| / |either|."""
        both = self.recovered(ticket)
        return both / (self.best.kept + ticket.kept - both)


def regression_apply(params: Params, inputs: Array) -> Array:
    """Linear regression, y = X w."""
    return inputs @ params["kernel"]


def regression_error(masked: Network, dense: Network, batch: Batch, rng: Array) -> Array:
    """sum (1 - m_i)^2 w_i^2, where X has orthonormal columns: |X (m w) - X w|^2."""
    return jnp.sum(jnp.square(masked(batch.inputs) - dense(batch.inputs)))


def orthonormal_regression(key: Array, d: int = 200, k: int = 20, large: float | None = 2.0, small: float = 0.3):
    """y = X w with orthonormal columns of X: the optimum is exactly the top k of w^2.

    `large`: k weights of that size and the others of `small`, signs at random, which a search recovers exactly; None:
    w ~ N(0, 1), where good logits saturate alike and their final order is noise: judge by `energy`. The data is one
    batch of `d` rows.
    """
    order_key, sign_key, design_key = jax.random.split(key, 3)
    if large is None:
        weights = jax.random.normal(sign_key, (d,))
    else:
        sizes = jnp.where(jax.random.permutation(order_key, d) < k, large, small)
        weights = sizes * jnp.where(jax.random.bernoulli(sign_key, 0.5, (d,)), 1.0, -1.0)
    design = jnp.linalg.qr(jax.random.normal(design_key, (d, d)))[0]
    params = {"kernel": weights[:, None]}
    best = Ticket.from_scores({"kernel": jnp.square(params["kernel"])}, None, count=k)
    return KnownProblem(regression_apply, params, (design, jnp.zeros(d, jnp.int32)), regression_error, best)


def energy(problem: KnownProblem, ticket: Ticket) -> float:
    """The ticket's sum of w^2 over the best ticket's."""
    weights = named_weights(problem.params)

    def total(t: Ticket) -> float:
        return sum(float(jnp.sum(jnp.square(w) * t.masks[name])) for name, w in weights.items())

    return total(ticket) / total(problem.best)


def planted_teacher(
    key: Array,
    apply_fn: ApplyFn,
    params: Params,
    density: float,
    *,
    inputs: int = 32,
    examples: int = 4096,
    boost: float = 3.0,
) -> KnownProblem:
    """A teacher inside a network: labels are the argmax of f(x; m* theta) with m* random of `density`.

    The kept weights of `params` are multiplied by `boost`, so that the subnetwork dominates; x ~ N(0, I). Searching
    with "loss" must find the FUNCTION of m*: its accuracy is that of a ticket without any training of weights.
    """
    mask_key, data_key = jax.random.split(key)
    weights = named_weights(params, default_kernels)
    keys = jax.random.split(mask_key, len(weights))
    noise = {n: jax.random.uniform(k, w.shape) for k, (n, w) in zip(keys, weights.items(), strict=True)}
    best = Ticket.from_scores(noise, density)
    params = masked(params, {name: 1 + (boost - 1) * mask.astype(jnp.float32) for name, mask in best.masks.items()})
    x = jax.random.normal(data_key, (examples, inputs))
    y = jnp.argmax(apply_fn(best.apply(params), x), -1).astype(jnp.int32)
    return KnownProblem(apply_fn, params, (x, y), "loss", best)
