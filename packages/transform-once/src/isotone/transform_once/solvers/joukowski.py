"""Potential flow about Joukowski airfoils: exact, so that what a model says can be checked against identities.

A circle about c = -mu_x + i mu_y through 1 goes by z = zeta + 1 / zeta to an airfoil; the flow about the circle with
the Kutta circulation Gamma = 4 pi U R sin(alpha + beta), sin beta = mu_y / R, leaves the trailing edge smoothly.
Scaled to chord 1 and centred. In the fluid c_p = 1 - |u|^2 / U^2 (Bernoulli) and the lift is rho U Gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from isotone.shared.errors import InputError, check_count

CLIP = 3.0
"""Speeds beyond so many U, which only the cusp's neighbourhood has, are scaled back."""


@dataclass(frozen=True)
class Joukowski:
    """One airfoil in one stream: circle's centre (-mu_x, mu_y), angle of attack in radians, speed U."""

    mu_x: float = 0.1
    mu_y: float = 0.05
    angle: float = 0.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.mu_x, self.mu_y, self.angle, self.speed)):
            raise InputError(f"expected finite numbers for an airfoil, got {self}")
        if not 0 < self.mu_x < 1 or not self.speed > 0 or abs(self.angle) >= math.pi / 2:
            raise InputError(f"expected mu_x in (0, 1), a speed above 0 and an angle below pi / 2, got {self}")

    @property
    def centre(self) -> complex:
        """Of the circle."""
        return complex(-self.mu_x, self.mu_y)

    @property
    def radius(self) -> float:
        """Of the circle, through 1."""
        return abs(1 - self.centre)

    @property
    def beta(self) -> float:
        """Angle of the trailing edge as the centre sees it."""
        return math.asin(self.mu_y / self.radius)

    @property
    def outline(self) -> np.ndarray:
        """Points of the airfoil in the unscaled plane."""
        zeta = self.centre + self.radius * np.exp(1j * np.linspace(0, 2 * np.pi, 2001))
        return zeta + 1 / zeta

    @property
    def chord(self) -> float:
        """Of the unscaled airfoil, about 4."""
        real = self.outline.real
        return float(real.max() - real.min())

    @property
    def circulation(self) -> float:
        """Gamma of the airfoil of chord 1."""
        return 4 * math.pi * self.speed * self.radius * math.sin(self.angle + self.beta) / self.chord

    @property
    def lift(self) -> float:
        """rho U Gamma at rho = 1, per unit span."""
        return self.speed * self.circulation

    def to_plane(self, points: np.ndarray) -> np.ndarray:
        """Scaled points x + i y to the unscaled plane."""
        real = self.outline.real
        return points * self.chord + (real.max() + real.min()) / 2

    def on_circle(self, points: np.ndarray) -> np.ndarray:
        """zeta of unscaled points: of the two, the one farther from the circle's centre."""
        root = np.sqrt(points.astype(complex) ** 2 - 4)
        one, two = (points + root) / 2, (points - root) / 2
        return np.where(abs(one - self.centre) >= abs(two - self.centre), one, two)

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Whether scaled points lie in the airfoil."""
        return abs(self.on_circle(self.to_plane(points)) - self.centre) <= self.radius

    def velocity(self, points: np.ndarray) -> np.ndarray:
        """u + i v at scaled points outside."""
        zeta = self.on_circle(self.to_plane(points))
        away = zeta - self.centre
        gamma = 4 * math.pi * self.speed * self.radius * math.sin(self.angle + self.beta)
        turn = np.exp(1j * self.angle)
        with np.errstate(divide="ignore", invalid="ignore"):
            flow = self.speed * (1 / turn - self.radius**2 * turn / away**2) + 1j * gamma / (2 * np.pi * away)
            return np.conj(flow / (1 - 1 / zeta**2))

    def raster(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (u_inf, v_inf, mask) and outputs (c_p, u, v) on the cell centres of [-1, 1]^2, (size, size, 3) each.

        Axis 0 is y, axis 1 is x. The mask is 1 in the body and within one spacing of the trailing edge; everything else
        is 0 there.
        """
        line = (np.arange(size) + 0.5) * 2 / size - 1
        points = line[None] + 1j * line[:, None]
        real = self.outline.real
        tail = (2 - (real.max() + real.min()) / 2) / self.chord
        body = self.inside(points) | (abs(points - tail) <= 2 / size)
        flow = np.where(body, 0, self.velocity(np.where(body, 10.0, points)))
        fast = abs(flow) / (CLIP * self.speed)
        flow = np.where(fast > 1, flow / np.maximum(fast, 1), flow)
        pressure = np.where(body, 0, 1 - abs(flow) ** 2 / self.speed**2)
        stream = self.speed * np.exp(1j * self.angle) * ~body
        inputs = np.stack([stream.real, stream.imag, body.astype(float)], -1)
        return inputs, np.stack([pressure, flow.real, flow.imag], -1)


def joukowski(seed: int, samples: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Random airfoils: mu_x in [0.04, 0.12], mu_y in [0, 0.1], angle in [-10, 10] degrees, speed in [0.5, 1.5].

    (u_inf, v_inf, mask) and (c_p, u, v), each (samples, size, size, 3), float32.
    """
    check_count("samples", samples)
    check_count("size", size, 8)
    rng = np.random.default_rng(seed)
    pairs = [
        Joukowski(
            rng.uniform(0.04, 0.12), rng.uniform(0, 0.1), math.radians(rng.uniform(-10, 10)), rng.uniform(0.5, 1.5)
        ).raster(size)
        for _ in range(samples)
    ]
    inputs, outputs = (np.stack(each).astype(np.float32) for each in zip(*pairs, strict=True))
    return inputs, outputs
