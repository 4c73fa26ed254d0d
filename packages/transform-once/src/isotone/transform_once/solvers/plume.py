"""A buoyant plume in a closed box with free slip: Boussinesq vorticity and a passive density with a source at the foot.

w_t + u . grad w = nu Lap w + B rho_x, rho_t + u . grad rho = kappa Lap rho + q, u = (psi_y, -psi_x), -Lap psi = w.
The density is a series of cosines (no flux through the walls), vorticity and stream function are series of sines (no
normal flow, no stress), on cell centres: what a DCT represents without a kink. Derivatives are matrices; products are
dealiased by the 2/3 rule; Crank-Nicolson for diffusion, Adams-Bashforth 2 for the rest.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError, check_count
from isotone.transform_once.transforms import cosine_matrix


@dataclass(frozen=True)
class PlumeConfig:
    """The box is 1 wide and height / width tall. `viscosity`, `diffusivity`, `buoyancy` B; `interval` of time between
    frames; `cfl`: dt over the cell's width, at a speed of about 1."""

    height: int = 128
    width: int = 64
    viscosity: float = 1e-3
    diffusivity: float = 1e-3
    buoyancy: float = 1.0
    interval: float = 0.1
    cfl: float = 0.15

    def __post_init__(self) -> None:
        check_count("height", self.height, 8)
        check_count("width", self.width, 8)
        for name in ("viscosity", "diffusivity", "interval", "cfl"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"expected a finite {name} above 0, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Time steps a frame."""
        return max(1, math.ceil(self.interval * self.width / self.cfl - 1e-9))


class Axis(NamedTuple):
    """Matrices of one axis: `cos`, `sin` transforms (modes, N), `dcos` (cosine series to its derivative), `dsin`."""

    cos: np.ndarray
    sin: np.ndarray
    dcos: np.ndarray
    dsin: np.ndarray
    cos_waves: np.ndarray
    sin_waves: np.ndarray


@functools.cache
def axis(size: int, length: float) -> Axis:
    """Of `size` cell centres on [0, length], modes of 2/3 and above dropped from derivatives."""
    cos = cosine_matrix(size, size)
    k, n = np.arange(1, size + 1)[:, None], np.arange(size)[None]
    sin = np.sin(np.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    sin[-1] /= math.sqrt(2)
    waves = np.pi * np.arange(size + 1) / length
    kept = np.arange(1, size) < 2 * size / 3
    slope = waves[1:size] * kept
    dcos = sin[:-1].T @ (-slope[:, None] * cos[1:])
    dsin = cos[1:].T @ (slope[:, None] * sin[:-1])
    return Axis(cos, sin, dcos, dsin, waves[:size], waves[1:])


def simulate(
    density: Float[Array, "H W"],
    vorticity: Float[Array, "H W"],
    source: Float[Array, "H W"],
    config: PlumeConfig,
    frames: int,
) -> tuple[Float[Array, "frames H W"], Float[Array, "frames H W"]]:
    """Density and vorticity at `frames` times, `interval` apart. Axis 0 is y, upwards."""
    check_count("frames", frames)
    shape = (config.height, config.width)
    if any(field.shape != shape for field in (density, vorticity, source)):
        raise InputError(f"expected fields of shape {shape}, got {density.shape}, {vorticity.shape}, {source.shape}")
    return _simulate(config, frames, density, vorticity, source)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _simulate(config: PlumeConfig, frames: int, density: Array, vorticity: Array, source: Array) -> tuple[Array, Array]:
    dtype, dt = density.dtype, config.interval / config.steps
    y, x = axis(config.height, config.height / config.width), axis(config.width, 1.0)
    matrix = functools.partial(jnp.asarray, dtype=dtype)
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def transform(left: np.ndarray, field: Array, right: np.ndarray) -> Array:
        """left (., H) field (H, W) right^T."""
        return exact(exact(matrix(left), field), matrix(right).T)

    cos_square = matrix(y.cos_waves[:, None] ** 2 + x.cos_waves[None] ** 2)
    sin_square = matrix(y.sin_waves[:, None] ** 2 + x.sin_waves[None] ** 2)
    cos_mask = matrix(_low(config.height, 0)[:, None] & _low(config.width, 0)[None])
    sin_mask = matrix(_low(config.height, 1)[:, None] & _low(config.width, 1)[None])

    def rates(rho: Array, omega: Array) -> tuple[Array, Array]:
        """Right-hand sides without diffusion, as coefficients; rho and omega are coefficients."""
        r = transform(y.cos.T, rho, x.cos.T)
        w = transform(y.sin.T, omega, x.sin.T)
        psi = transform(y.sin.T, omega / sin_square, x.sin.T)
        u, v = exact(matrix(y.dsin), psi), -exact(psi, matrix(x.dsin).T)
        rx, ry = exact(r, matrix(x.dcos).T), exact(matrix(y.dcos), r)
        wx, wy = exact(w, matrix(x.dsin).T), exact(matrix(y.dsin), w)
        move_rho = transform(y.cos, source - u * rx - v * ry, x.cos) * cos_mask
        move_omega = transform(y.sin, config.buoyancy * rx - u * wx - v * wy, x.sin) * sin_mask
        return move_rho, move_omega

    def diffuse(field: Array, push: Array, rate: float, square: Array) -> Array:
        half = dt * rate * square / 2
        return ((1 - half) * field + dt * push) / (1 + half)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        rho, omega, (rho_before, omega_before) = carry
        rho_now, omega_now = rates(rho, omega)
        after = (
            diffuse(rho, 1.5 * rho_now - 0.5 * rho_before, config.diffusivity, cos_square),
            diffuse(omega, 1.5 * omega_now - 0.5 * omega_before, config.viscosity, sin_square),
        )
        return (*after, (rho_now, omega_now)), None

    def frame(carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
        carry, _ = jax.lax.scan(step, carry, None, length=config.steps)
        return carry, (transform(y.cos.T, carry[0], x.cos.T), transform(y.sin.T, carry[1], x.sin.T))

    rho, omega = transform(y.cos, density, x.cos) * cos_mask, transform(y.sin, vorticity, x.sin) * sin_mask
    _, found = jax.lax.scan(frame, (rho, omega, rates(rho, omega)), None, length=frames)
    return found


def _low(size: int, first: int) -> np.ndarray:
    """Which modes the 2/3 rule keeps; `first`: the wavenumber of the first."""
    return np.arange(first, size + first) < 2 * size / 3


def plume(seed: int, samples: int, frames: int = 60, config: PlumeConfig | None = None) -> np.ndarray:
    """Densities of plumes whose source has a random place and strength, (samples, frames, height, width, 1), float32.

    The box starts at rest and empty but for a faint disturbance, the first frame one interval later. Raises
    `InputError` where a solution is not finite (cfl too large).
    """
    check_count("samples", samples)
    config = config or PlumeConfig()
    rng = np.random.default_rng(seed)
    ratio = config.height / config.width
    y = ((np.arange(config.height) + 0.5) / config.height * ratio)[:, None]
    x = ((np.arange(config.width) + 0.5) / config.width)[None]
    found = []
    for _ in range(samples):
        place, radius, strength = rng.uniform(0.3, 0.7), rng.uniform(0.05, 0.1), rng.uniform(1.0, 2.0)
        source = strength * np.exp(-((x - place) ** 2 + (y - 0.15) ** 2) / radius**2)
        # a plume that starts symmetric stays so: a faint tilt decides which way it bends
        tilt = 0.5 * rng.standard_normal() * np.sin(2 * np.pi * x) * np.sin(np.pi * y / ratio)
        empty, swirl, feed = (jnp.asarray(part, jnp.float32) for part in (np.zeros_like(source), tilt, source))
        density, _ = simulate(empty, swirl, feed, config, frames)
        found.append(np.asarray(density))
    stacked = np.stack(found)[..., None]
    if not np.isfinite(stacked).all():
        raise InputError(f"expected a stable plume, got NaN or infinity: lower cfl from {config.cfl}")
    return stacked
