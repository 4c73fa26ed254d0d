"""Measured convergence beside the bounds of section 2.4, on problems whose constants are known.

Gradient descent through a fresh sketch a round, one full gradient each: strongly convex (a quadratic), convex (the same
with directions of no curvature), and non-convex (a sum of saturating wells). All draws of R run side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared.errors import InputError
from isotone.sketching.compiling import fast_jit
from isotone.sketching.data import quadratic
from isotone.sketching.sketches import Sketch, make_sketch
from isotone.sketching.theory import Problem, total_ratio

PROBLEMS = ("strongly convex", "convex", "non-convex")


def wells(w: Array) -> Array:
    """sum of w_i^2 / (1 + w_i^2): not convex, 2-smooth, its minimum 0."""
    return jnp.sum(w**2 / (1 + w**2))


def descend(
    gradient: Callable[[Array], Array],
    measure: Callable[[Array], Array],
    start: Array,
    sketch: Sketch,
    step: float,
    rounds: int,
    draws: int,
    fixed: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`measure` of w^0 .. w^T, and of the mean of w^0 .. w^t, (draws, T + 1) each. `fixed`: one R for all rounds."""

    def one(draw: Array) -> tuple[Array, Array]:
        def round(carry: tuple[Array, Array], t: Array) -> Any:
            w, total = carry
            number = draw if fixed else draw * rounds + t
            after = w - step * sketch.desk(number, sketch.sk(number, gradient(w)))
            total = total + w
            return (after, total), (measure(after), measure(total / (t + 1)))

        _, (each, means) = jax.lax.scan(round, (start, jnp.zeros_like(start)), jnp.arange(rounds))
        first = measure(start)[None]
        return jnp.concatenate([first, each]), jnp.concatenate([first, means])

    found = fast_jit(lambda d: jax.lax.map(one, d, batch_size=8))(jnp.arange(draws))
    return np.asarray(found[0]), np.asarray(found[1])


def measured(problem: str, kind: str, s: int, draws: int = 20, d: int = 128, condition: float = 10.0) -> dict[str, Any]:
    """One curve beside its bound (JSON): `value` (mean over draws), `error` (its standard error), `bound`, by round.

    The rounds are 20 (1 + alpha), as many as gradient descent's 20 are worth. Raises `InputError` on another problem.
    """
    if problem not in PROBLEMS:
        raise InputError(f"expected a problem of {', '.join(PROBLEMS)}, got {problem!r}")
    sketch = make_sketch(kind, d, s)
    alpha = sketch.alpha
    rounds = round_up(20 * (1 + alpha))
    if problem == "non-convex":
        theory = Problem(2.0, 0.0, alpha)
        start = jnp.asarray(np.random.default_rng(0).standard_normal(d), jnp.float32)
        slope = jax.grad(wells)
        each, _ = descend(slope, lambda w: jnp.sum(slope(w) ** 2), start, sketch, theory.step, rounds, draws)
        value = np.minimum.accumulate(each.mean(0))
        bound = [theory.nonconvex_bound(float(wells(start)), t) for t in range(rounds + 1)]
        spread = each.std(0, ddof=1) / np.sqrt(draws)
    else:
        made = quadratic(d, 1, condition, 0.0)
        matrix = made.matrix
        if problem == "convex":
            values, basis = jnp.linalg.eigh(matrix)
            # half of the directions are flat
            matrix = basis * jnp.where(jnp.arange(d) < d // 2, 0.0, values) @ basis.T
        start, gap = jnp.zeros(d), functools.partial(_gap, matrix, made.best)
        slope = functools.partial(_slope, matrix, made.best)
        theory = Problem(1.0, 1 / condition if problem == "strongly convex" else 0.0, alpha)
        step = theory.step if problem == "strongly convex" else theory.convex_step
        each, means = descend(slope, gap, start, sketch, step, rounds, draws)
        first = float(gap(start))
        if problem == "strongly convex":
            bound = [theory.strongly_convex_bound(first, t) for t in range(rounds + 1)]
        else:
            each, away = means, float(jnp.sum((start - made.best) ** 2))
            bound = [theory.convex_bound(away, t) for t in range(rounds + 1)]
        value, spread = each.mean(0), each.std(0, ddof=1) / np.sqrt(draws)
    return {
        "problem": problem,
        "kind": kind,
        "s": s,
        "alpha": alpha,
        "draws": draws,
        "value": value.tolist(),
        "error": spread.tolist(),
        "bound": bound,
        # from the first round on: before it there is no bound but the start itself
        "inside": bool(np.all(value[1:] <= np.asarray(bound)[1:])),
    }


def numbers_sent(kind: str, s: int, draws: int = 20, d: int = 128, condition: float = 10.0) -> dict[str, Any]:
    """Numbers sent on the strongly convex problem over those of 20 rounds of gradient descent (JSON).

    `equal`: until the mean over draws is as good as gradient descent's after its 20 rounds; `error`: half the distance
    of the figures for the mean plus and minus its standard error; `guaranteed`: until it is as good as the bound of
    those 20 rounds; `promised`: (1 + alpha) s / d, at most (s + d - 1) / d. Nothing is sent further than 40 (1 + alpha)
    rounds: `equal` is None where that is not enough.
    """
    sketch, made = make_sketch(kind, d, s), quadratic(d, 1, condition, 0.0)
    slope = functools.partial(_slope, made.matrix, made.best)
    gap = functools.partial(_gap, made.matrix, made.best)
    start, own, plain = jnp.zeros(d), Problem(1.0, 1 / condition, sketch.alpha), Problem(1.0, 1 / condition)
    identity = make_sketch("identity", d)
    theirs, _ = descend(slope, gap, start, identity, plain.step, 20, 1)
    rounds = round_up(40 * (1 + sketch.alpha))
    each, _ = descend(slope, gap, start, sketch, own.step, rounds, draws)
    mean, spread = each.mean(0), each.std(0, ddof=1) / np.sqrt(draws)

    def sent(curve: np.ndarray, target: float) -> float | None:
        reached = np.flatnonzero(curve <= target)
        return float(reached[0] * s / (20 * d)) if reached.size else None

    target = float(theirs[0, -1])
    early, late = sent(mean - spread, target), sent(mean + spread, target)
    return {
        "kind": kind,
        "s": s,
        "equal": sent(mean, target),
        "error": None if early is None or late is None else (late - early) / 2,
        "guaranteed": sent(mean, plain.strongly_convex_bound(float(gap(start)), 20)),
        "promised": total_ratio(d, s, sketch.alpha),
        "most": (s + d - 1) / d,
    }


def ablations(kind: str = "countsketch", d: int = 128, s: int = 16) -> dict[str, float]:
    """What goes wrong: one R for all rounds stalls (f after over before, 2,000 rounds); a step of 1 / L diverges (|w|
    after 50 rounds)."""
    made, sketch = quadratic(d, 1, 10.0, 0.0), make_sketch(kind, d, s)
    slope = functools.partial(_slope, made.matrix, made.best)
    gap = functools.partial(_gap, made.matrix, made.best)
    start = jnp.zeros(d)
    stalled, _ = descend(slope, gap, start, sketch, 1 / (1 + sketch.alpha), 2000, 1, fixed=True)
    wild, _ = descend(slope, jnp.linalg.norm, start, sketch, 1.0, 50, 1)
    return {"fixed": float(stalled[0, -1] / stalled[0, 0]), "large": float(wild[0, -1])}


def round_up(value: float) -> int:
    """The next whole number."""
    return int(np.ceil(value))


def _gap(matrix: Array, best: Array, w: Array) -> Array:
    return (w - best) @ matrix @ (w - best) / 2


def _slope(matrix: Array, best: Array, w: Array) -> Array:
    return matrix @ (w - best)
