"""Measured convergence beside the bounds of section 2.4, on problems whose constants are known.

Gradient descent through a fresh sketch a round, one full gradient each: strongly convex (a quadratic), convex (the same
with directions of no curvature), logistic regression, and non-convex (a sum of saturating wells). The convex ones also
as federated rounds of unlike clients and several local steps, beside bounds whose constants are recalled. All draws of
R run side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared.errors import InputError
from isotone.sketching.compiling import fast_jit
from isotone.sketching.compressors import Sketched
from isotone.sketching.data import ClientData, quadratic
from isotone.sketching.federated import fed_algorithm
from isotone.sketching.sketches import Sketch, make_sketch
from isotone.sketching.theory import Problem, total_ratio

CONVEX = ("strongly convex", "convex", "logistic")
PROBLEMS = (*CONVEX, "non-convex")
RECALLED = {
    "strongly convex": "recalled, the constant of sigma^2 taken as 1",
    "convex": "recalled",
    "logistic": "recalled",
}
"""What is known of the bounds of several local steps."""


def wells(w: Array) -> Array:
    """sum of w_i^2 / (1 + w_i^2): not convex, 2-smooth, its minimum 0."""
    return jnp.sum(w**2 / (1 + w**2))


@dataclass(frozen=True)
class Known:
    """A convex problem whose constants are known: `loss(w, x, y)`, the mean over examples, of `data`; `best` w* of the
    clients' mean and its value `least`; `heterogeneity` sigma^2, the clients' mean of |grad f_c(w*)|^2."""

    loss: Callable[[Array, Array, Array], Array]
    data: ClientData
    best: Array
    least: float
    smoothness: float
    strong_convexity: float
    heterogeneity: float

    def value(self, w: Array) -> Array:
        """f(w), the mean over the clients."""
        return jnp.mean(jax.vmap(lambda x, y: self.loss(w, x, y))(self.data.x, self.data.y))

    def gap(self, w: Array) -> Array:
        """f(w) - f*."""
        return self.value(w) - self.least


@functools.lru_cache(maxsize=8)
def known(problem: str, clients: int, d: int = 128, condition: float = 10.0, examples: int = 1000) -> Known:
    """One of `CONVEX` over `clients`: a quadratic with eigenvalues from 1 / `condition` to 1 and a minimum for each
    client, half of the eigenvalues 0 where it is only convex; or logistic regression of `examples`, not separable,
    whose features have another mean at each client."""
    if problem == "logistic":
        return _logistic(clients, d, examples)
    made = quadratic(d, clients, condition, 0.0 if clients == 1 else 1.0)
    matrix, centres = np.asarray(made.matrix, np.float64), np.asarray(made.centres, np.float64)
    if problem == "convex":
        values, basis = np.linalg.eigh(matrix)
        matrix = basis * np.where(np.arange(d) < d // 2, 0.0, values) @ basis.T
    off = centres - centres.mean(0)
    curvature = jnp.asarray(matrix, jnp.float32)

    def loss(w: Array, x: Array, y: Array) -> Array:
        return jnp.mean(jax.vmap(lambda c: (w - c) @ curvature @ (w - c))(x)) / 2

    return Known(
        loss,
        ClientData(made.centres[:, None], jnp.zeros((clients, 1), jnp.int32), jnp.ones(clients, jnp.int32)),
        jnp.asarray(centres.mean(0), jnp.float32),
        least=float(np.mean(np.sum(off @ matrix * off, 1))) / 2,
        smoothness=1.0,
        strong_convexity=1 / condition if problem == "strongly convex" else 0.0,
        heterogeneity=float(np.mean(np.sum((off @ matrix) ** 2, 1))),
    )


def _logistic(clients: int, d: int, examples: int) -> Known:
    """log(1 + e^{-y a w}), y = +-1 at random with the odds of a hidden w; w* by Newton's method in float64."""
    rng, each = np.random.default_rng(0), examples // clients
    a = rng.standard_normal((clients, each, d)) + (0.5 * rng.standard_normal((clients, 1, d)) if clients > 1 else 0.0)
    a /= np.sqrt(d)
    odds = 1 / (1 + np.exp(-2 * a @ rng.standard_normal(d)))
    y = np.where(rng.uniform(size=odds.shape) < odds, 1, -1)
    signed, best = (y[..., None] * a).reshape(-1, d), np.zeros(d)
    for _ in range(50):
        wrong = 1 / (1 + np.exp(signed @ best))
        curvature = (signed * (wrong * (1 - wrong))[:, None]).T @ signed
        best = best + np.linalg.solve(curvature, signed.T @ wrong)
    least = float(np.mean(np.logaddexp(0, -signed @ best)))
    # f_c'' is at most a quarter of the mean of a a^T
    smoothness = max(float(np.linalg.eigvalsh(c.T @ c / each)[-1]) for c in a) / 4
    wrong = (1 / (1 + np.exp(signed @ best))).reshape(clients, each)
    own = -np.einsum("ce,ced->cd", wrong, y[..., None] * a) / each

    def loss(w: Array, x: Array, y: Array) -> Array:
        return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))

    data = ClientData(
        *(jnp.asarray(a, jnp.float32), jnp.asarray(y, jnp.int32), jnp.full(clients, each, jnp.int32)),
    )
    heterogeneity = float(np.mean(np.sum(own**2, 1)))
    return Known(loss, data, jnp.asarray(best, jnp.float32), least, smoothness, 0.0, heterogeneity)


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
        bound = [theory.nonconvex_bound(float(wells(start)), t) for t in range(rounds + 1)]
        value, error = _mean(each, draws)
        # the bound of T is of the least of w^0 .. w^{T-1}
        value = np.minimum.accumulate(np.concatenate([value[:1], value[:-1]]))
    else:
        own, start = known(problem, 1, d, condition), jnp.zeros(d)
        theory = Problem(own.smoothness, own.strong_convexity, alpha)
        strongly = problem == "strongly convex"
        step = theory.step if strongly else theory.convex_step
        each, means = descend(jax.grad(own.value), own.gap, start, sketch, step, rounds, draws)
        value, error = _mean(each if strongly else means, draws)
        if strongly:
            bound = [theory.strongly_convex_bound(float(own.gap(start)), t) for t in range(rounds + 1)]
        else:
            away = float(jnp.sum((start - own.best) ** 2))
            bound = [theory.convex_bound(away, t) for t in range(rounds + 1)]
    return _row(problem, sketch, draws, value, error, bound, 1, 1)


def measured_locally(
    problem: str, kind: str, s: int, draws: int = 20, d: int = 128, local_steps: int = 5, clients: int = 10,
    worth: int = 100,
) -> dict[str, Any]:  # fmt: skip
    """As `measured`, of federated rounds: K full-gradient steps of each of the unlike `clients` at the theorem's eta_l,
    eta_g = 1, beside the recalled bounds; `worth` (1 + alpha) rounds. Raises `InputError` on a problem not convex."""
    if problem not in CONVEX:
        raise InputError(f"expected a problem of {', '.join(CONVEX)}, got {problem!r}")
    sketch, own = make_sketch(kind, d, s), known(problem, clients, d)
    theory, start = Problem(own.smoothness, own.strong_convexity, sketch.alpha), jnp.zeros(d)
    rounds = round_up(worth * (1 + sketch.alpha))
    algorithm = fed_algorithm(
        *(own.loss, start, Sketched(sketch)),
        eta_g=1.0,
        local_steps=local_steps,
        batch=0,
        rate=theory.local_step(local_steps),
    )
    begin, key = algorithm.init(start, clients), jax.random.key(0)

    def one(draw: Array, data: ClientData) -> tuple[Array, Array]:
        def round(carry: Any, t: Array) -> Any:
            state, total = carry
            total = total + state.params
            state, _ = algorithm.round(state, key, data)
            return (state, total), (own.gap(state.params), own.gap(total / (t + 1)))

        # rounds of its own for each draw: other R of the same sketch
        state = begin._replace(round=draw * rounds)
        return jax.lax.scan(round, (state, jnp.zeros_like(start)), jnp.arange(rounds))[1]

    arrays = own.data.x, own.data.y, own.data.size
    program = fast_jit(lambda draws, arrays: jax.lax.map(lambda t: one(t, ClientData(*arrays)), draws, batch_size=8))
    found = program(jnp.arange(draws), arrays)
    strongly = problem == "strongly convex"
    first = np.full((draws, 1), float(own.gap(start)))
    value, error = _mean(np.concatenate([first, np.asarray(found[0 if strongly else 1])], 1), draws)
    away, bound_of = float(jnp.sum((start - own.best) ** 2)), theory.local_convex_bound
    if strongly:
        bound_of = theory.local_strongly_convex_bound
    bound = [bound_of(away, t, local_steps, own.heterogeneity) for t in range(rounds + 1)]
    return _row(problem, sketch, draws, value, error, bound, local_steps, clients)


def _mean(each: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Over the draws, with its standard error."""
    return each.mean(0), each.std(0, ddof=1) / np.sqrt(draws)


def _row(
    problem: str, sketch: Sketch, draws: int, value: np.ndarray, error: np.ndarray, bound: list[float],
    local_steps: int, clients: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "problem": problem,
        "kind": sketch.kind,
        "s": sketch.s,
        "alpha": sketch.alpha,
        "draws": draws,
        "local_steps": local_steps,
        "clients": clients,
        "source": RECALLED[problem] if local_steps > 1 else "derived",
        "value": value.tolist(),
        "error": error.tolist(),
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
