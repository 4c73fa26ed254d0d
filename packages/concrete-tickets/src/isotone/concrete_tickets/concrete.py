"""The binary Concrete relaxation of a mask: m = sigmoid((l + a) / tau) with logistic noise l, 0 < m < 1.

Two parametrisations of the location a by the logit alpha:

- "scaled" (the authors'): a = tau * alpha, so m = sigmoid(alpha + l / tau) and P(m > 1/2) = sigmoid(tau * alpha).
- "standard": a = alpha, so m = sigmoid((alpha + l) / tau) and P(m > 1/2) = sigmoid(alpha).

Either way the density that the controller holds is sum sigmoid(alpha) / d. E[m] is above it where masks are sparse:
at alpha = logit(0.01) it is 0.075 (scaled) or 0.020 (standard), which is why a search ends in an exact top-k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError

TAU = 2 / 3
PARAMETRIZATIONS = ("scaled", "standard")


def check_relaxation(tau: float, parametrization: str) -> None:
    """Raise `InputError` on a temperature that is not above 0, or an unknown parametrisation."""
    if not 0 < tau < float("inf"):
        raise InputError(f"expected a temperature tau above 0, got {tau}")
    if parametrization not in PARAMETRIZATIONS:
        raise InputError(f"expected parametrization to be scaled or standard, got {parametrization!r}")


def relaxed_mask(
    logits: Float[Array, ...], noise: Float[Array, ...], tau: float = TAU, parametrization: str = "scaled"
) -> Float[Array, ...]:
    """A relaxed mask for `noise` of the logits' shape, elementwise."""
    if parametrization == "scaled":
        return jax.nn.sigmoid(logits + noise / tau)
    return jax.nn.sigmoid((logits + noise) / tau)


def initial_logit(density: Float[Array, ...] | float) -> Float[Array, ...]:
    """alpha = logit(kappa), where sum sigmoid(alpha) / d is kappa."""
    return jax.scipy.special.logit(jnp.asarray(density, jnp.float32))


def expected_mask(logit: float, tau: float = TAU, parametrization: str = "scaled") -> float:
    """E[m] for one logit by numeric quadrature over u (float64); how dense the relaxed masks really are."""
    check_relaxation(tau, parametrization)
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    # u = (1 + sin(pi v / 2)) / 2 bunches the nodes at both ends, where l grows without bound
    u = (1 + np.sin(np.pi * nodes / 2)) / 2
    noise = np.log(u) - np.log1p(-u)
    argument = logit + noise / tau if parametrization == "scaled" else (logit + noise) / tau
    return float(np.sum(weights * np.pi / 4 * np.cos(np.pi * nodes / 2) / (1 + np.exp(-argument))))


def probability_above_half(logit: float, tau: float = TAU, parametrization: str = "scaled") -> float:
    """P(m > 1/2): sigmoid(tau * alpha) (scaled) or sigmoid(alpha) (standard)."""
    check_relaxation(tau, parametrization)
    return float(1 / (1 + np.exp(-(tau * logit if parametrization == "scaled" else logit))))
