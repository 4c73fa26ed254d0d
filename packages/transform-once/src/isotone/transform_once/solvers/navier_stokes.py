"""Vorticity of an incompressible fluid on the unit torus, as the FNO authors' data has it (section 5).

w_t + u . grad w = nu Lap w + f, u = (psi_y, -psi_x), -Lap psi = w, f = 0.1 (sin 2 pi (x + y) + cos 2 pi (x + y)).
Pseudo-spectral: 2/3 dealiasing, Crank-Nicolson for the viscosity, Adams-Bashforth 2 for the rest (order 2 in dt). The
originals took explicit steps of 1e-4 at 256^2 and kept every fourth point.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError, check_count

TAU, ALPHA = 7.0, 2.5


class Waves(NamedTuple):
    """Wavenumbers of the real FFT on an N x N grid of the unit torus: `x`, `y` (2 pi k), `square`, and the 2/3
    `mask`."""

    x: np.ndarray
    y: np.ndarray
    square: np.ndarray
    mask: np.ndarray


@functools.cache
def waves(size: int) -> Waves:
    """Of the first axis x and the second, halved, y."""
    kx, ky = np.fft.fftfreq(size, 1 / size)[:, None], np.fft.rfftfreq(size, 1 / size)[None]
    mask = (np.abs(kx) < size / 3) & (np.abs(ky) < size / 3)
    x, y = 2 * np.pi * kx + 0 * ky, 2 * np.pi * ky + 0 * kx
    if size % 2 == 0:
        # a first derivative of the Nyquist mode is not real
        x, y = np.where(np.abs(kx) == size // 2, 0, x), np.where(ky == size // 2, 0, y)
    return Waves(x, y, 4 * np.pi**2 * (kx**2 + ky**2), mask)


def gaussian_field(key: Array, samples: int, size: int) -> Float[Array, "n N N"]:
    """w0 ~ N(0, 7^{3/2} (-Lap + 49)^{-2.5}) with mean 0: white noise in Fourier space, shaped."""
    k = np.fft.fftfreq(size, 1 / size)
    square = 4 * np.pi**2 * (k[:, None] ** 2 + k[None] ** 2)
    sigma = TAU ** ((2 * ALPHA - 2) / 2)
    shape = size**2 * math.sqrt(2) * sigma * (square + TAU**2) ** (-ALPHA / 2)
    shape[0, 0] = 0
    real, imag = jax.random.normal(key, (2, samples, size, size))
    return jnp.fft.ifft2(jax.lax.complex(real, imag) * jnp.asarray(shape, real.dtype)).real


@functools.partial(jax.jit, static_argnums=1)
def _drawn(keys: Array, size: int) -> Array:
    return jax.vmap(lambda key: gaussian_field(key, 1, size)[0])(keys)


def forcing(size: int) -> np.ndarray:
    """f on the grid (i / N, j / N)."""
    x = np.arange(size) / size
    phase = 2 * np.pi * (x[:, None] + x[None])
    return 0.1 * (np.sin(phase) + np.cos(phase))


def velocity(vorticity: Float[Array, "... N N"]) -> tuple[Float[Array, "... N N"], Float[Array, "... N N"]]:
    """(u, v) = (psi_y, -psi_x)."""
    size = vorticity.shape[-1]
    u, v, _, _ = _physical(jnp.fft.rfft2(vorticity), size)
    return u, v


def _physical(spectrum: Array, size: int) -> tuple[Array, Array, Array, Array]:
    """u, v, w_x, w_y on the grid."""
    wave, dtype = waves(size), spectrum.real.dtype
    x, y = jnp.asarray(wave.x, dtype), jnp.asarray(wave.y, dtype)
    psi = spectrum / jnp.asarray(np.where(wave.square > 0, wave.square, np.inf), dtype)
    parts = jnp.stack([1j * y * psi, -1j * x * psi, 1j * x * spectrum, 1j * y * spectrum])
    u, v, wx, wy = jnp.fft.irfft2(parts, s=(size, size))
    return u, v, wx, wy


def solve_vorticity(
    w0: Float[Array, "n N N"], viscosity: float, t_final: float, dt: float, frames: int = 1, forced: bool = True
) -> Float[Array, "n frames N N"]:
    """The vorticity at `frames` equally spaced times up to `t_final`.

    Raises `InputError` on a grid that is not square, a step that is not above 0 and at most the time between frames.
    """
    _check(viscosity, t_final, dt, frames)
    if dt > t_final / frames:
        raise InputError(f"expected a dt of at most the time between frames, {t_final / frames:g}, got {dt}")
    if w0.ndim != 3 or w0.shape[1] != w0.shape[2] or w0.shape[1] < 4:
        raise InputError(f"expected fields (n, N, N) with N of 4 or more, got shape {w0.shape}")
    steps = max(1, math.ceil(t_final / frames / dt - 1e-9))
    numbers = (jnp.asarray(value, w0.dtype) for value in (viscosity, t_final / frames / steps))
    return _solve(w0, *numbers, steps, frames, forced)


def _check(viscosity: float, t_final: float, dt: float, frames: int) -> None:
    check_count("frames", frames)
    for name, value in (("viscosity", viscosity), ("t_final", t_final), ("dt", dt)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"expected a finite {name} above 0, got {value}")


@functools.partial(jax.jit, static_argnames=("steps", "frames", "forced"))
def _solve(w0: Array, viscosity: Array, dt: Array, steps: int, frames: int, forced: bool) -> Array:
    size, dtype = w0.shape[-1], w0.dtype
    wave = waves(size)
    mask, square = jnp.asarray(wave.mask), jnp.asarray(wave.square, dtype)
    push = jnp.fft.rfft2(jnp.asarray(forcing(size), dtype)) if forced else jnp.zeros(())
    implicit, explicit = 1 + dt * viscosity * square / 2, 1 - dt * viscosity * square / 2

    def nonlinear(spectrum: Array) -> Array:
        u, v, wx, wy = _physical(spectrum, size)
        return -jnp.fft.rfft2(u * wx + v * wy) * mask

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        spectrum, before = carry
        now = nonlinear(spectrum)
        spectrum = (explicit * spectrum + dt * (1.5 * now - 0.5 * before + push)) / implicit
        return (spectrum, now), None

    def frame(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        carry, _ = jax.lax.scan(step, carry, None, length=steps)
        return carry, jnp.fft.irfft2(carry[0], s=(size, size))

    spectrum = jnp.fft.rfft2(w0) * mask
    # the first step is an Euler step: its error of dt^2 is made once
    _, found = jax.lax.scan(frame, (spectrum, nonlinear(spectrum)), None, length=frames)
    return jnp.moveaxis(found, 0, 1)


def navier_stokes(
    key: Array,
    samples: int,
    size: int = 64,
    viscosity: float = 1e-3,
    t_final: float = 10.0,
    *,
    dt: float = 0.02,
    solve_size: int | None = None,
    frames: int = 1,
    batch: int = 50,
) -> tuple[np.ndarray, np.ndarray]:
    """Vorticity at 0 (samples, size, size, 1) and at `frames` times (samples, frames, size, size, 1), float32.

    `solve_size`: the grid to solve on, a multiple of `size`, of which every so many-th point is kept. Raises
    `InputError` as `solve_vorticity`, and where the solution is not finite (dt too large).
    """
    check_count("samples", samples)
    check_count("size", size, 4)
    _check(viscosity, t_final, dt, frames)
    solve_size = solve_size or size
    if solve_size % size:
        raise InputError(f"expected solve_size to be a multiple of {size}, got {solve_size}")
    every = solve_size // size
    first, last = [], []
    keys = jax.random.split(key, samples)
    for start in range(0, samples, batch):
        # noise by sample: the same fields whatever the batch is
        w0 = _drawn(keys[start : start + batch], solve_size)
        found = solve_vorticity(w0, viscosity, t_final, dt, frames)
        first.append(np.asarray(w0[:, ::every, ::every]))
        last.append(np.asarray(found[:, :, ::every, ::every]))
    begun, ended = np.concatenate(first), np.concatenate(last)
    if not np.isfinite(ended).all():
        raise InputError(f"expected a stable solution, got NaN or infinity: lower dt from {dt}")
    return begun[..., None], ended[..., None]
