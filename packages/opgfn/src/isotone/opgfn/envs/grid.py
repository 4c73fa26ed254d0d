"""Grids: walk up from the origin along any axis, stop anywhere (section 2.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment


class Grid(Environment):
    """States {0 .. side - 1}^dim; action k is +1 on axis k, backward action k is -1.

    `boundary_stop`: a state with a coordinate at side - 1 can only stop (the official variant, in which cells with
    two such coordinates can not be reached); by default every cell is terminal.
    """

    def __init__(self, dim: int, side: int, *, boundary_stop: bool = False) -> None:
        if dim < 1 or side < 2:
            raise ValueError(f"expected dim of at least 1 and side of at least 2, got {dim} and {side}")
        self.dim, self.side, self.boundary_stop = dim, side, boundary_stop
        self.cardinalities = (side,) * dim
        self.num_actions = dim + 1
        self.num_backward_actions = dim
        self.max_length = (1 + dim * (side - 2) + 1 if boundary_stop else dim * (side - 1)) + 1
        inner = side - 1
        self.num_states = inner**dim + dim * inner ** (dim - 1) if boundary_stop else side**dim

    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        return torch.zeros(n, self.dim, dtype=torch.int64, device=device)

    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        below = states < self.side - 1
        if self.boundary_stop:
            below = below.all(1, keepdim=True).expand_as(states)
        return torch.cat([below, below.new_ones(len(states), 1)], 1)

    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        above = states > 0
        if self.boundary_stop:
            # a parent must not have been at the boundary itself
            edge = states == self.side - 1
            above = above & (~edge.any(1, keepdim=True) | edge)
        return above

    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        axis = torch.arange(self.dim, device=states.device)
        return states + (axis == actions[:, None]), torch.where(actions == self.stop, -1, actions)

    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        axis = torch.arange(self.dim, device=states.device)
        return states - (axis == actions[:, None]).to(states.dtype), actions


class HyperGrid(Grid):
    """The grid with a peak in each corner: u(x) = R_0 + 1/2 prod [|x_k - 1/2| > 1/4] + 2 prod [0.3 < |x_k - 1/2| < 0.4]
    with x_k = s_k / (side - 1)."""

    def __init__(self, dim: int = 2, side: int = 32, r0: float = 0.1) -> None:
        super().__init__(dim, side)
        if not (math.isfinite(r0) and r0 >= 0):
            raise ValueError(f"expected a finite r0 of at least 0, got {r0}")
        self.r0 = r0

    def objective(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B 1"]:
        """u(x), in float64."""
        x = (states.double() / (self.side - 1) - 0.5).abs()
        u = self.r0 + 0.5 * (x > 0.25).all(1) + 2.0 * ((x > 0.3) & (x < 0.4)).all(1)
        return u[:, None]

    def mode_of(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """The corner (0 .. 2^dim - 1) whose peak the state is on, -1 elsewhere."""
        x = states.double() / (self.side - 1) - 0.5
        on = ((x.abs() > 0.3) & (x.abs() < 0.4)).all(1)
        corner = ((x > 0) * 2 ** torch.arange(self.dim, device=states.device)).sum(1)
        return torch.where(on, corner, -1)


def branin(x: Tensor, y: Tensor) -> Tensor:
    """Of x, y in [-1, 1], scaled into [0, 1] and turned over: larger is better."""
    a, b = 15 * (x / 2 + 0.5) - 5, 15 * (y / 2 + 0.5)
    bowl = (b - 5.1 * a**2 / (4 * math.pi**2) + 5 * a / math.pi - 6) ** 2
    return 1 - (bowl + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(a) + 10) / 308.13


def currin(x: Tensor, y: Tensor) -> Tensor:
    """Currin's exponential of x, y in [-1, 1], scaled into [0, 1]; its limit at y = -1 is taken."""
    c, d = x / 2 + 0.5, y / 2 + 0.5
    rise = 1 - torch.exp(-1 / (2 * d.clamp(min=1e-12)))
    return rise * (2300 * c**3 + 1900 * c**2 + 2092 * c + 60) / (100 * c**3 + 500 * c**2 + 4 * c + 20) / 13.77


def shubert(x: Tensor, y: Tensor) -> Tensor:
    """Shubert's function of -1.5 x, -1.5 y, scaled."""

    def s(t: Tensor) -> Tensor:
        return sum((i * torch.cos((i + 1) * t + i) for i in range(1, 6)), torch.zeros_like(t))

    return (s(-1.5 * x) * s(-1.5 * y) + 186.8) / 397


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Beale's function, scaled."""
    terms = (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
    return terms / 38.8


def sphere(x: Tensor, y: Tensor) -> Tensor:
    """(x^2 + y^2) / 2."""
    return (x**2 + y**2) / 2


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{"branin": branin, "currin": currin, "shubert": shubert, "beale": beale, "sphere": sphere}
}


class MOOGrid(Grid):
    """The two-dimensional grid over [-1, 1]^2 with two to five objectives by name."""

    def __init__(
        self, objectives: Sequence[str] = ("branin", "currin"), side: int = 32, *, boundary_stop: bool = False
    ) -> None:
        super().__init__(2, side, boundary_stop=boundary_stop)
        unknown = [name for name in objectives if name not in OBJECTIVES]
        if unknown or not objectives:
            raise ValueError(
                f"expected objectives of {', '.join(OBJECTIVES)}, got {unknown[0] if unknown else 'none'!r}"
            )
        self.objectives = tuple(objectives)

    def objective(self, states: Int[Tensor, "B width"]) -> Float[Tensor, "B d"]:
        """u(x), in float64."""
        x, y = (2 * states.double() / (self.side - 1) - 1).T
        return torch.stack([OBJECTIVES[name](x, y) for name in self.objectives], 1)
