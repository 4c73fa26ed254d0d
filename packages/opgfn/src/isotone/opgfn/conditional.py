"""The conditional baselines: one network for all preferences or goals (PC-GFN, GC-GFN), and how they are encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_TINY = 1e-30


def thermometer(values: Float[Tensor, "B d"], bins: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, "B e"]:
    """Each number as `bins` numbers in [0, 1] that fill up from the left as it rises from `low` to `high`."""
    filled = (values - low) / (high - low) * bins
    steps = torch.arange(bins, device=values.device)
    return (filled[..., None] - steps).clamp(0, 1).flatten(1)


@dataclass(frozen=True)
class Preference:
    """PC-GFN: w ~ Dirichlet(1), R(x | w) = (w . u)^beta; w, and beta where it is drawn, by thermometer.

    `beta_low`: where it is given, beta is uniform in [beta_low, beta] and conditions the network too. `floor`: w . u
    is raised to it, so that log R is finite.
    """

    objectives: int
    beta: float = 1.0
    beta_low: float | None = None
    bins: int = 16
    floor: float = 1e-8

    def __post_init__(self) -> None:
        if self.objectives < 1 or not self.beta > 0 or self.bins < 1:
            got = (self.objectives, self.beta, self.bins)
            raise ValueError(f"expected at least 1 objective, beta above 0 and 1 bin, got {got}")

    @property
    def dim(self) -> int:
        """Numbers in an encoded condition."""
        return self.bins * (self.objectives + (self.beta_low is not None))

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n c"]:
        """Raw conditions: w, then beta."""
        exponential = -torch.rand(n, self.objectives, dtype=torch.float64, generator=generator).clamp(_TINY).log()
        low = self.beta if self.beta_low is None else self.beta_low
        beta = low + (self.beta - low) * torch.rand(n, 1, dtype=torch.float64, generator=generator)
        return torch.cat([exponential / exponential.sum(1, keepdim=True), beta], 1)

    def encode(self, raw: Float[Tensor, "n c"]) -> Float[Tensor, "n e"]:
        """What the network is given."""
        parts = [thermometer(raw[:, :-1], self.bins)]
        if self.beta_low is not None:
            parts.append(thermometer(raw[:, -1:], self.bins, 0.0, self.beta))
        return torch.cat(parts, 1).float()

    def log_reward(self, u: Float[Tensor, "n d"], raw: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """beta log(w . u). Raises `ValueError` on another number of objectives."""
        _check_objectives(u, self.objectives)
        return raw[:, -1] * (raw[:, :-1] * u).sum(1).clamp(min=self.floor).log()

    def relabel(self, raw: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
        """Preferences stay as they are."""
        return raw


@dataclass(frozen=True)
class Goal:
    """GC-GFN: a direction d, R(x | d) = sum(u) [cos(u, d) >= focus] cos(u, d)^gamma with gamma = ln 0.2 / ln focus.

    `hindsight`: the share of a batch whose goal becomes the direction of its own object.
    """

    objectives: int
    beta: float = 1.0
    focus: float = 0.98
    hindsight: float = 0.3
    bins: int = 16

    def __post_init__(self) -> None:
        if self.objectives < 1 or not self.beta > 0 or not 0 < self.focus < 1 or self.bins < 1:
            got = (self.objectives, self.beta, self.focus, self.bins)
            raise ValueError(f"expected at least 1 objective, beta above 0, focus in (0, 1) and 1 bin, got {got}")

    @property
    def dim(self) -> int:
        """Numbers in an encoded condition."""
        return self.bins * self.objectives

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Directions, uniform on the positive part of the sphere."""
        normal = torch.randn(n, self.objectives, dtype=torch.float64, generator=generator).abs()
        return normal / normal.norm(dim=1, keepdim=True)

    def encode(self, raw: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """What the network is given."""
        return thermometer(raw, self.bins).float()

    def log_reward(self, u: Float[Tensor, "n d"], raw: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """beta log R(x | d), at least log 1e-30 each. Raises `ValueError` on another number of objectives."""
        _check_objectives(u, self.objectives)
        cosine = (u * raw).sum(1) / u.norm(dim=1).clamp(min=_TINY)
        gamma = math.log(0.2) / math.log(self.focus)
        inside = torch.where(cosine >= self.focus, u.sum(1) * cosine.clamp(min=0) ** gamma, 0.0)
        return self.beta * inside.clamp(min=_TINY).log()

    def relabel(self, raw: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
        """Hindsight: some goals become what was reached."""
        _check_objectives(u, self.objectives)
        chosen = torch.rand(len(raw), generator=generator) < self.hindsight
        length = u.norm(dim=1, keepdim=True)
        reached = torch.where(length > 0, u / length.clamp(min=_TINY), raw)
        return torch.where(chosen[:, None].to(raw.device), reached, raw)


def _check_objectives(u: Tensor, objectives: int) -> None:
    if u.shape[1] != objectives:
        raise ValueError(f"expected {objectives} objectives as conditioned on, got {u.shape[1]}")


def conditioner_of(
    kind: str, objectives: int, beta: float, beta_low: float | None = None, floor: float = 1e-8
) -> Preference | Goal | None:
    """What conditions an objective of `kind`: a `Preference` for "pc", a `Goal` for "gc", nothing for the others."""
    if kind == "pc":
        return Preference(objectives, beta, beta_low, floor=floor)
    return Goal(objectives, beta) if kind == "gc" else None


class LogZ(nn.Module):
    """log Z: one number, or a small network of the condition."""

    def __init__(self, condition_dim: int = 0, initial: float = 0.0, hidden: int = 32) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(initial)))
        self.net: nn.Sequential | None = None
        if condition_dim:
            widths = [condition_dim, hidden, hidden, hidden]
            layers: list[nn.Module] = []
            for a, b in zip(widths, widths[1:], strict=False):
                layers += [nn.Linear(a, b), nn.LeakyReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, condition: Float[Tensor, "B c"] | None = None) -> Tensor:
        """log Z, a scalar, or (B,) under a condition."""
        if self.net is None or condition is None:
            return self.value
        return self.value + self.net(condition).squeeze(1)
