"""What the theorems promise: step sizes, bounds on the way, rounds and numbers sent (section 2.4).

With E|R^T R v|^2 = (1 + alpha)|v|^2 and one full-gradient step a round, eta = 1 / ((1 + alpha) L) loses at least
|grad f|^2 / (2 (1 + alpha) L) in expectation: every bound of gradient descent holds with L replaced by (1 + alpha) L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Problem:
    """f is `smoothness`-smooth and, where it is above 0, `strong_convexity`-strongly convex; `alpha` of the sketch."""

    smoothness: float
    strong_convexity: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.smoothness) and self.smoothness > 0):
            raise InputError(f"expected a finite smoothness above 0, got {self.smoothness}")
        if not 0 <= self.strong_convexity <= self.smoothness:
            raise InputError(f"expected strong convexity from 0 to {self.smoothness}, got {self.strong_convexity}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"expected a finite alpha of at least 0, got {self.alpha}")

    @property
    def step(self) -> float:
        """eta = 1 / ((1 + alpha) L), strongly convex and non-convex."""
        return 1 / ((1 + self.alpha) * self.smoothness)

    @property
    def convex_step(self) -> float:
        """eta = 1 / (2 (1 + alpha) L)."""
        return self.step / 2

    def strongly_convex_bound(self, gap: float, rounds: int) -> float:
        """E[f(w^T) - f*] <= (1 - mu / ((1 + alpha) L))^T (f(w^0) - f*)."""
        return (1 - self.strong_convexity * self.step) ** rounds * gap

    def convex_bound(self, squared_distance: float, rounds: int) -> float:
        """E f(mean of w^0 .. w^{T-1}) - f* <= 2 (1 + alpha) L |w^0 - w*|^2 / T, at `convex_step`."""
        return 2 * (1 + self.alpha) * self.smoothness * squared_distance / max(1, rounds)

    def nonconvex_bound(self, gap: float, rounds: int) -> float:
        """min_t E|grad f(w^t)|^2 <= 2 (1 + alpha) L (f(w^0) - f*) / T, at `step`."""
        return 2 * (1 + self.alpha) * self.smoothness * gap / max(1, rounds)

    # of K local steps the constants below are recalled, not derived, and are not to be quoted as the paper's

    def local_step(self, local_steps: int) -> float:
        """eta_l of K local steps: 1 / (8 (1 + alpha) L K), the shape of the paper's condition [recalled]."""
        if local_steps < 1:
            raise InputError(f"expected at least 1 local step, got {local_steps}")
        return 1 / (8 * (1 + self.alpha) * self.smoothness * local_steps)

    def local_strongly_convex_bound(
        self, squared_distance: float, rounds: int, local_steps: int, heterogeneity: float
    ) -> float:
        """(L / 2) |w^0 - w*|^2 exp(-mu eta_l T) + eta_l^2 L^2 K^3 sigma^2 / mu, sigma^2 the mean of |grad f_c(w*)|^2
        [recalled up to a constant of the second term, here 1], at `local_step`."""
        step, mu = self.local_step(local_steps), self.strong_convexity
        drift = step**2 * self.smoothness**2 * local_steps**3 * heterogeneity / mu
        return self.smoothness / 2 * squared_distance * math.exp(-mu * step * rounds) + drift

    def local_convex_bound(self, squared_distance: float, rounds: int, local_steps: int, heterogeneity: float) -> float:
        """E f(mean of w^0 .. w^{T-1}) - f* <= 4 |w^0 - w*|^2 / (eta_l K T) + 32 eta_l^2 L K^2 sigma^2 [recalled], at
        `local_step`."""
        step = self.local_step(local_steps)
        drift = 32 * step**2 * self.smoothness * local_steps**2 * heterogeneity
        return 4 * squared_distance / (step * local_steps * max(1, rounds)) + drift


def rounds_needed(problem: Problem, gap: float, target: float) -> int:
    """Rounds until the strongly convex bound is at most `target`."""
    if not 0 < target < gap < math.inf:
        raise InputError(f"expected a target between 0 and the gap {gap}, got {target}")
    if problem.strong_convexity == 0:
        raise InputError("expected strong convexity above 0 for a linear rate, got 0")
    left = 1 - problem.strong_convexity * problem.step
    # nothing is left of f = L |w - w*|^2 / 2 after one step of gradient descent
    return 1 if left <= 0 else math.ceil(math.log(gap / target) / -math.log(left))


def convex_rounds_needed(problem: Problem, squared_distance: float, target: float) -> int:
    """Rounds until the convex bound is at most `target`."""
    if not (0 < target < math.inf and 0 < squared_distance < math.inf):
        raise InputError(f"expected a target and a distance above 0, got {target} and {squared_distance}")
    return math.ceil(problem.convex_bound(squared_distance, 1) / target)


def total_ratio(d: int, s: int, alpha: float) -> float:
    """Numbers sent until the same bound, over those of gradient descent: (1 + alpha) s / d, below 2 for s <= d.

    The theory makes rounds cheap; it does not promise fewer numbers in all.
    """
    return (1 + alpha) * s / d
