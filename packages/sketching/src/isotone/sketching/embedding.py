"""How far a sketch is from an isometry, measured: 1 + alpha, and the constant of a coordinate-wise embedding.

R is an a-coordinate-wise embedding where E[g^T R^T R h] = g^T h and E[(g^T R^T R h)^2] <= (g^T h)^2 + (a / s)|g|^2|h|^2
for all fixed g and h (section 2.2). On coordinates g = e_i, h = e_j the constant is s Var(R_i . R_j); summed over i,
1 + alpha <= 1 + a d / s.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared.errors import check_count
from isotone.sketching.sketches import Sketch


@dataclass(frozen=True)
class EmbeddingEstimate:
    """Means over draws of R with their standard errors: `alpha`, theory `alpha_theory`; `a`, the largest s Var over the
    pairs that were tried, theory at most 2; `bias`, the largest |mean - g^T h| in standard errors."""

    alpha: float
    alpha_error: float
    alpha_theory: float
    a: float
    a_error: float
    bias: float
    draws: int


def measure_embedding(sketch: Sketch, draws: int, key: Array, pairs: int = 16) -> EmbeddingEstimate:
    """Draw R in `draws` rounds, apply it to random and to coordinate vectors: d up to a few thousand.

    The same vectors see every R. Raises `InputError` on fewer than 2 draws.
    """
    check_count("draws", draws, 2)
    check_count("pairs", pairs)
    first, second, third = jax.random.split(key, 3)
    d = sketch.d
    g, h = jax.random.normal(first, (pairs, d)), jax.random.normal(second, (pairs, d))
    # half of the pairs are coordinates, equal and different: what the definition is about
    places = jax.random.randint(third, (2, pairs // 2), 0, d)
    g = g.at[: pairs // 2].set(jnp.eye(d)[places[0]])
    h = h.at[: pairs // 2].set(jnp.eye(d)[jnp.where(jnp.arange(pairs // 2) % 2 == 0, places[0], places[1])])
    g, h = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (g, h))

    def one(t: Array) -> tuple[Array, Array]:
        left, right = (jax.vmap(lambda v: sketch.sk(t, v))(v) for v in (g, h))
        back = jax.vmap(lambda y: sketch.desk(t, y))(left)
        return jnp.sum(left * right, 1), jnp.sum(back**2, 1)

    drawn = jax.jit(lambda rounds: jax.lax.map(one, rounds))(jnp.arange(draws))
    products, squares = (np.asarray(part, np.float64) for part in drawn)
    gap = products - np.asarray(jnp.sum(g * h, 1), np.float64)
    spread = products.std(0, ddof=1)
    # where every draw is the same number, what is left is float32's rounding
    errors = np.maximum(spread / np.sqrt(draws), 1e-6)
    per_pair = sketch.s * (gap**2).mean(0)
    worst = int(per_pair.argmax())
    energy = squares.mean(1)
    return EmbeddingEstimate(
        float(energy.mean() - 1),
        float(energy.std(ddof=1) / np.sqrt(draws)),
        sketch.alpha,
        float(per_pair[worst]),
        float(sketch.s * (gap[:, worst] ** 2).std(ddof=1) / np.sqrt(draws)),
        float(np.abs(gap.mean(0) / errors).max()),
        draws,
    )
