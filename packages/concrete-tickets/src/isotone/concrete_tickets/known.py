"""Problems whose best ticket is known, to test the search itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.concrete_tickets.layout import Params, masked, named_weights
from isotone.concrete_tickets.noise import host_generator
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
        masks = ticket.masks
        return sum(int(np.sum(np.asarray(mask) & np.asarray(masks[n]))) for n, mask in self.best.masks.items())

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


def orthonormal_regression(
    key: Array, d: int = 200, k: int = 20, large: float | None = 2.0, small: float = 0.3
) -> KnownProblem:
    """y = X w with orthonormal columns of X: the optimum is exactly the top k of w^2.

    `large`: k weights of that size and the others of `small`, signs at random, which a search recovers exactly; None:
    w ~ N(0, 1), where good logits saturate alike and their final order is noise: judge by `energy`. The data is one
    batch of `d` rows.
    """
    source = host_generator(key)
    if large is None:
        weights = source.standard_normal(d)
    else:
        weights = np.where(source.permutation(d) < k, large, small) * source.choice([-1, 1], d)
    design = np.linalg.qr(source.standard_normal((d, d)))[0]
    params = {"kernel": jax.device_put(weights[:, None].astype(np.float32))}
    best = Ticket.from_scores({"kernel": np.square(weights[:, None])}, None, count=k)
    data = jax.device_put((design.astype(np.float32), np.zeros(d, np.int32)))
    return KnownProblem(regression_apply, params, data, regression_error, best)


def energy(problem: KnownProblem, ticket: Ticket) -> float:
    """The ticket's sum of w^2 over the best ticket's."""
    weights = {name: np.asarray(w) for name, w in named_weights(problem.params).items()}

    def total(t: Ticket) -> float:
        return sum(float(np.sum(np.square(w) * np.asarray(t.masks[name]))) for name, w in weights.items())

    return total(ticket) / total(problem.best)


def planted_teacher(
    key: Array,
    apply_fn: ApplyFn,
    params: Params,
    density: float,
    *,
    shape: tuple[int, ...] = (32,),
    examples: int = 4096,
    boost: float = 3.0,
) -> KnownProblem:
    """A teacher inside a network: labels are the argmax of f(x; m* theta) with m* random of `density`.

    The kept weights of `params` are multiplied by `boost`, so that the subnetwork dominates; x ~ N(0, I). Searching
    with "loss" must find the FUNCTION of m*: its accuracy is that of a ticket without any training of weights.
    """
    source = host_generator(key)
    weights = named_weights(params)
    best = Ticket.from_scores({name: source.random(w.shape) for name, w in weights.items()}, density)
    # on the host, where nothing has to be compiled
    host = jax.tree.map(np.asarray, params)
    boosted = masked(host, {n: 1 + (boost - 1) * np.asarray(mask, np.float32) for n, mask in best.masks.items()})
    params = jax.device_put(boosted)
    x = jax.device_put(source.standard_normal((examples, *shape), np.float32))
    y = np.argmax(np.asarray(jax.jit(apply_fn)(best.apply(params), x)), -1).astype(np.int32)
    return KnownProblem(apply_fn, params, (x, jax.device_put(y)), "loss", best)
