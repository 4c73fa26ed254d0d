"""What a mask is searched for: the pruning objectives R, to be minimised over the mask at frozen weights.

Every objective has the form `objective(masked, dense, batch, rng) -> scalar`, where `masked` and `dense` are the
network with and without the mask: called on inputs they give logits (n, classes). Yours can be any such function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from isotone.concrete_tickets.layout import Params, leaf_name
from isotone.shared.errors import InputError

ApplyFn = Callable[[Params, Any], Array]
"""`apply_fn(params, inputs) -> logits`, (n, classes); a pure function."""
FeaturesFn = Callable[[Params, Any], tuple[Array, tuple[Array, ...]]]
"""`features_fn(params, inputs) -> (logits, outputs of every ReLU)`."""


class Batch(NamedTuple):
    """`inputs` as the network takes them, n first; `labels` (n,) integers."""

    inputs: Any
    labels: Array


@dataclass(frozen=True, eq=False)
class Network:
    """The network at given weights, which is what an objective sees.

    `names`: the leaves whose gradient `weight_gradient` gives. `axis_name`: the mesh axis the batch is spread over;
    means over the batch then run over all of it. `cached`: logits that are known already, of the inputs `known`.
    """

    apply_fn: ApplyFn
    params: Params
    names: tuple[str, ...]
    features_fn: FeaturesFn | None = None
    axis_name: str | None = None
    cached: Array | None = None
    known: Any = None

    def __call__(self, inputs: Any) -> Array:
        if self.cached is not None and inputs is self.known:
            return self.cached
        return self.apply_fn(self.params, inputs)

    def features(self, inputs: Any) -> tuple[Array, tuple[Array, ...]]:
        """Logits and the ReLU outputs. Raises `InputError` where the search was given no `features_fn`."""
        if self.features_fn is None:
            raise InputError("expected features_fn(params, inputs) -> (logits, relu outputs) for feature_mse, got None")
        return self.features_fn(self.params, inputs)

    def mean(self, values: Array) -> Float[Array, ""]:
        """The mean over the whole batch, whatever number of devices it is spread over."""
        mean = jnp.mean(values)
        return mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)

    def cross_entropy(self, batch: Batch, params: Params | None = None) -> Float[Array, ""]:
        """CE of the batch, in nats an example."""
        logits = self(batch.inputs) if params is None else self.apply_fn(params, batch.inputs)
        return self.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

    def weight_gradient(self, batch: Batch) -> dict[str, Array]:
        """dCE/dw at these weights w, for each named leaf; differentiable once more."""
        gradient = jax.grad(lambda params: self.cross_entropy(batch, params))(self.params)
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
        return {name: leaves[name] for name in self.names}


Objective = Callable[[Network, Network, Batch, Array], Array]
"""`objective(masked, dense, batch, rng) -> scalar`, a function to minimise over the mask."""


def task_loss(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """CE(z_s, y), nats an example."""
    return masked.cross_entropy(batch)


def reverse_kl(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """KL(Q || P) of the sparse outputs Q from the dense P, nats an example (CTS-KL)."""
    log_q, log_p = _log_softmax(masked, batch), jax.lax.stop_gradient(_log_softmax(dense, batch))
    return masked.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1))


def forward_kl(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """KL(P || Q), nats an example."""
    log_q, log_p = _log_softmax(masked, batch), jax.lax.stop_gradient(_log_softmax(dense, batch))
    return masked.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def delta_loss(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """|CE_s / CE_d - 1|."""
    return jnp.abs(masked.cross_entropy(batch) / jax.lax.stop_gradient(dense.cross_entropy(batch)) - 1)


def feature_mse(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """MSE of every ReLU output and of the softmax, each example's vector standardised; mean over the layers."""

    def layers(network: Network) -> list[Array]:
        logits, features = network.features(batch.inputs)
        flat = [feature.reshape(feature.shape[0], -1) for feature in (*features, jax.nn.softmax(logits))]
        return [_standardised(layer, axis=1) for layer in flat]

    pairs = zip(layers(masked), jax.lax.stop_gradient(layers(dense)), strict=True)
    return jnp.mean(jnp.stack([masked.mean(jnp.mean(jnp.square(a - b), 1)) for a, b in pairs]))


def grad_match(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """MSE of the two weight gradients, each layer's standardised; mean over the layers. Second order in the mask."""
    target = jax.lax.stop_gradient(dense.weight_gradient(batch))
    found = masked.weight_gradient(batch)
    layers = [
        jnp.mean(jnp.square(_standardised(_unit(found[name])) - _standardised(_unit(target[name]))))
        for name in masked.names
    ]
    return jnp.mean(jnp.stack(layers))


def grad_norm(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """-|dCE_s / dw|, the gradient flow to be kept (as GraSP). Second order in the mask."""
    gradient = masked.weight_gradient(batch)
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in gradient.values()])))
    unit = jnp.where(largest > 0, largest, 1.0)
    squares = sum(jnp.sum(jnp.square(g / unit)) for g in gradient.values())
    return -unit * jnp.sqrt(squares + 1e-30)


def logit_mse(masked: Network, dense: Network, batch: Batch, rng: Array) -> Float[Array, ""]:
    """MSE of the logits (beyond the paper)."""
    difference = masked(batch.inputs) - jax.lax.stop_gradient(dense(batch.inputs))
    return masked.mean(jnp.mean(jnp.square(difference), -1))


def tempered_kl(temperature: float) -> Objective:
    """KL(Q || P) of logits divided by `temperature`, times its square (beyond the paper)."""
    if not temperature > 0:
        raise InputError(f"expected a temperature above 0, got {temperature}")

    def objective(masked: Network, dense: Network, batch: Batch, rng: Array) -> Array:
        log_q = _log_softmax(masked, batch, temperature)
        log_p = jax.lax.stop_gradient(_log_softmax(dense, batch, temperature))
        return temperature**2 * masked.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1))

    return objective


OBJECTIVES: Mapping[str, Objective] = {
    "kl": reverse_kl,
    "kl_forward": forward_kl,
    "loss": task_loss,
    "delta_loss": delta_loss,
    "feature_mse": feature_mse,
    "grad_match": grad_match,
    "grad_norm": grad_norm,
    "logit_mse": logit_mse,
}
"""By name, the paper's six (KL in both directions) and `logit_mse`."""

SCALES: Mapping[str, float] = {"delta_loss": 10_000.0, "grad_norm": 1.0}
"""What the search multiplies an objective by, as the authors do: 100 where not named here. GRADBALANCE and Adam do
not see it; the Lagrangian's multiplier is measured in it."""
DEFAULT_SCALE = 100.0


def resolve_objective(objective: str | Objective) -> tuple[Objective, float]:
    """The function and its scale; a function of yours has scale 1. `InputError` lists the names."""
    if not isinstance(objective, str):
        return objective, 1.0
    if objective not in OBJECTIVES:
        raise InputError(f"expected objective to be one of {', '.join(OBJECTIVES)} or a function, got {objective!r}")
    return OBJECTIVES[objective], SCALES.get(objective, DEFAULT_SCALE)


def _log_softmax(network: Network, batch: Batch, temperature: float = 1.0) -> Array:
    return jax.nn.log_softmax(network(batch.inputs) / temperature)


def _standardised(values: Array, axis: int | None = None) -> Array:
    """(values - mean) / std; all zeros where they are all equal. The small term keeps the derivative finite there."""
    centred = values - jnp.mean(values, axis=axis, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(jnp.square(centred), axis=axis, keepdims=True) + 1e-18)


def _unit(gradient: Array) -> Array:
    """Divided by its largest entry: what follows does not depend on the scale, and squares do not underflow."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(gradient)))
    return gradient / jnp.where(largest > 0, largest, 1.0)
