"""The solvers (section 7: 10, 12), the choice of modes, metrics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from isotone.shared.errors import InputError
from isotone.transform_once import energy_spectrum, irreducible_error, metrics, select_modes
from isotone.transform_once.solvers import Joukowski, gaussian_field, joukowski, navier_stokes, plume, solve_vorticity
from isotone.transform_once.solvers.navier_stokes import velocity, waves
from isotone.transform_once.solvers.plume import PlumeConfig, axis, simulate


def smooth(size, dtype=np.float64):
    x = np.arange(size) / size * 2 * np.pi
    return (np.sin(x)[:, None] * np.cos(2 * x)[None] + 0.5 * np.cos(x + 1)[:, None] + np.sin(x)[None])[None].astype(
        dtype
    )


def test_taylor_green_decays_as_it_should():
    """w = 2 k cos kx cos ky exp(-2 nu k^2 t): the nonlinear term vanishes."""
    with jax.enable_x64(True):
        k, viscosity = 4 * np.pi, 1e-2
        x = np.arange(32) / 32
        w = jnp.asarray(2 * k * np.cos(k * x)[:, None] * np.cos(k * x)[None])[None]
        found = solve_vorticity(w, viscosity, 0.5, 1e-3, forced=False)[0, 0]
        assert np.abs(found - w[0] * math.exp(-2 * viscosity * k * k * 0.5)).max() < 1e-5 * 2 * k


def test_steps_are_the_equation():
    """Against explicit Euler with full FFTs at a step so small that both are the solution to 1e-4."""
    with jax.enable_x64(True):
        w = smooth(16)
        wanted = reference.advect(w[0], 1e-2, 1e-4, 2000)
        found = solve_vorticity(jnp.asarray(w), 1e-2, 0.2, 1e-3, forced=False)[0, 0]
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_second_order_in_time():
    with jax.enable_x64(True):
        w = jnp.asarray(smooth(16))
        exact, *found = (solve_vorticity(w, 1e-2, 0.4, dt)[0, 0] for dt in (1e-3, 0.04, 0.02, 0.01))
        gaps = [float(jnp.abs(f - exact).max()) for f in found]
        orders = [math.log2(a / b) for a, b in zip(gaps, gaps[1:], strict=False)]
        assert all(1.7 < order < 2.4 for order in orders), orders


def test_mean_energy_enstrophy_and_mask():
    with jax.enable_x64(True):
        w0 = gaussian_field(jax.random.key(0), 3, 24).astype(jnp.float64)
        frames = solve_vorticity(w0, 1e-3, 4.0, 0.01, frames=8, forced=False)
        assert np.abs(np.asarray(w0).mean((1, 2))).max() < 1e-6 and np.abs(frames.mean((2, 3))).max() < 1e-6
        u, v = velocity(frames)
        for quantity in (frames**2, u**2 + v**2):
            means = np.asarray(quantity.mean((2, 3)))
            assert (np.diff(means, axis=1) <= 1e-9 * means[:, :-1]).all()
        spectrum = np.abs(np.fft.rfft2(np.asarray(frames)))
        assert spectrum[..., ~waves(24).mask].max() < 1e-12 * spectrum.max() * 24
        # the forcing too has mean 0
        assert np.abs(solve_vorticity(w0, 1e-3, 1.0, 0.01).mean((2, 3))).max() < 1e-6


def test_gaussian_field_has_its_covariance():
    """The variance a point is the sum of the shape's squares, 400 fields of 16 x 16, 5 standard errors."""
    found = np.asarray(gaussian_field(jax.random.key(1), 400, 16))
    k = np.fft.fftfreq(16, 1 / 16)
    square = 4 * np.pi**2 * (k[:, None] ** 2 + k[None] ** 2)
    each = 2 * 7.0**3 * (square + 49) ** -2.5
    each[0, 0] = 0
    per_field = (found**2).mean((1, 2))
    assert abs(per_field.mean() - each.sum()) < 5 * per_field.std() / math.sqrt(400)


def test_navier_stokes_subsamples_and_batches():
    first, last = navier_stokes(jax.random.key(0), 3, 8, t_final=0.2, solve_size=16, frames=2, batch=2)
    assert first.shape == (3, 8, 8, 1) and last.shape == (3, 2, 8, 8, 1) and first.dtype == np.float32
    again = navier_stokes(jax.random.key(0), 2, 16, t_final=0.2, frames=2, batch=2)
    assert np.allclose(last[:2], again[1][:, :, ::2, ::2], atol=1e-6)


# --- airfoils ----------------------------------------------------------------------------------------------------


AIRFOILS = [Joukowski(), Joukowski(0.08, 0.0, 0.1), Joukowski(0.1, 0.05, 0.15, 1.3), Joukowski(0.04, 0.1, -0.1, 0.5)]


@pytest.mark.parametrize("foil", AIRFOILS)
def test_lift_is_that_of_the_pressure(foil):
    """Kutta and Joukowski: the pressure integrated around the body is rho U Gamma across the stream, no drag; the
    velocity integrated around it is -Gamma (the circulation turns clockwise)."""
    turn = np.exp(1j * np.linspace(0, 2 * np.pi, 100_001))
    zeta, real = foil.centre + foil.radius * (1 + 1e-9) * turn, foil.outline.real
    points = (zeta + 1 / zeta - (real.max() + real.min()) / 2) / foil.chord
    flow = foil.velocity(points)
    pressure = 1 - abs(flow) ** 2 / foil.speed**2
    pressure[~np.isfinite(pressure)] = 0
    flow[~np.isfinite(flow)] = 0
    force = 0.5 * foil.speed**2 * np.sum((pressure[1:] + pressure[:-1]) / 2 * 1j * np.diff(points))
    force *= np.exp(-1j * foil.angle)
    assert abs(force.imag - foil.lift) < 1e-3 * max(foil.lift, 0.1) and abs(force.real) < 1e-3
    around = np.sum(((np.conj(flow[1:]) + np.conj(flow[:-1])) / 2 * np.diff(points)).real)
    assert abs(around + foil.circulation) < 1e-3


def test_symmetric_foil_at_rest_has_no_lift():
    assert Joukowski(0.1, 0.0, 0.0).lift == 0
    _, flow = Joukowski(0.1, 0.0, 0.0).raster(32)
    assert np.allclose(flow[..., 1], flow[::-1, :, 1]) and np.allclose(flow[..., 2], -flow[::-1, :, 2])


def test_fields_obey_bernoulli_and_have_no_divergence():
    foil, size = Joukowski(0.1, 0.05, 0.1, 1.2), 128
    inputs, outputs = foil.raster(size)
    body = inputs[..., 2] > 0
    pressure, u, v = (outputs[..., c] for c in range(3))
    assert np.abs(pressure - (1 - (u**2 + v**2) / 1.2**2))[~body].max() < 1e-12
    assert (outputs[body] == 0).all() and (inputs[body][:, :2] == 0).all()
    assert np.allclose(inputs[~body][:, 0], 1.2 * math.cos(0.1))
    divergence = (u[1:-1, 2:] - u[1:-1, :-2] + v[2:, 1:-1] - v[:-2, 1:-1]) / (4 / size)
    curl = (v[1:-1, 2:] - v[1:-1, :-2] - u[2:, 1:-1] + u[:-2, 1:-1]) / (4 / size)
    far = np.abs(np.add.outer(1j * np.linspace(-1, 1, size), np.linspace(-1, 1, size)))[1:-1, 1:-1] > 0.8
    assert np.abs(divergence[far]).max() < 2e-3 and np.abs(curl[far]).max() < 2e-3
    # far away the stream is undisturbed but for the circulation's 1 / r
    assert abs(u[0, 0] - 1.2 * math.cos(0.1)) < 0.3
    assert 0.005 < body.mean() < 0.04


def test_random_foils():
    inputs, outputs = joukowski(3, 4, 32)
    assert inputs.shape == outputs.shape == (4, 32, 32, 3) and np.isfinite(outputs).all()
    assert np.array_equal(joukowski(3, 4, 32)[1], outputs) and not np.array_equal(joukowski(4, 4, 32)[1], outputs)


# --- plume -------------------------------------------------------------------------------------------------------


SMALL = PlumeConfig(height=16, width=8, interval=0.05)


def test_derivative_matrices():
    line = axis(24, 2.0)
    x = (np.arange(24) + 0.5) / 12
    for k in (1, 3, 7):
        wave = np.pi * k / 2
        assert np.abs(line.dcos @ np.cos(wave * x) + wave * np.sin(wave * x)).max() < 1e-11
        assert np.abs(line.dsin @ np.sin(wave * x) - wave * np.cos(wave * x)).max() < 1e-11
    for matrix in (line.cos, line.sin):
        assert np.abs(matrix @ matrix.T - np.eye(24)).max() < 1e-13


def test_a_single_vortex_decays_and_the_density_is_kept():
    """sin sin vorticity is steady but for viscosity; without source the density's mean stays, its square falls."""
    with jax.enable_x64(True):
        config = PlumeConfig(height=16, width=16, viscosity=0.02, buoyancy=0.0, interval=0.1)
        x = (np.arange(16) + 0.5) / 16
        omega = np.sin(np.pi * x)[:, None] * np.sin(np.pi * x)[None]
        rho = 1 + 0.3 * np.cos(np.pi * x)[:, None] * np.cos(2 * np.pi * x)[None]
        densities, found = simulate(*(jnp.asarray(f) for f in (rho, omega, 0 * rho)), config, 3)
        wanted = omega * math.exp(-0.02 * 2 * np.pi**2 * 0.3)
        assert np.abs(found[-1] - wanted).max() < 1e-5
        assert np.allclose(densities.mean((1, 2)), 1, atol=1e-10)
        squares = [float((rho**2).mean()), *np.asarray((densities**2).mean((1, 2)))]
        assert (np.diff(squares) < 0).all()


def test_plumes_rise():
    found = plume(0, 2, 40, SMALL)
    assert found.shape == (2, 40, 16, 8, 1) and found.dtype == np.float32
    heights = (found[..., 0].sum(3) * np.arange(16)).sum(2) / found[..., 0].sum((2, 3))
    assert (heights[:, -1] > heights[:, 0] + 0.5).all()
    # what the source gives is all there
    mass = found[..., 0].mean((2, 3))
    assert np.allclose(np.diff(mass, axis=1), (mass[:, 1] - mass[:, 0])[:, None], rtol=1e-2)


# --- modes and metrics -------------------------------------------------------------------------------------------


def test_irreducible_error_falls_to_nothing():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((4, 9, 7, 2))
    errors = [irreducible_error(y, (m, min(m, 7))) for m in range(1, 10)]
    assert all((a >= b).all() for a, b in zip(errors, errors[1:], strict=False)) and np.abs(errors[-1]).max() < 1e-7
    # the best that any field of those modes can do
    low = y.copy()
    from scipy import fft

    spectrum = fft.dctn(low, axes=(1, 2), norm="ortho")
    spectrum[:, 3:], spectrum[:, :, 3:] = 0, 0
    low = fft.idctn(spectrum, axes=(1, 2), norm="ortho")
    assert np.allclose(irreducible_error(y, 3), metrics.relative_l2(low, y))


def test_selected_modes():
    x, y = np.meshgrid((np.arange(16) + 0.5) / 16, (np.arange(12) + 0.5) / 12, indexing="ij")
    field = (np.cos(2 * np.pi * x) + 0.1 * np.cos(5 * np.pi * y))[None, ..., None]
    assert select_modes(field, 0.2) == (3, 3)
    assert select_modes(field, 0.01) == (6, 6)
    assert select_modes(field, 0.01, per_axis=True) == (3, 6)
    assert select_modes(field, energy=0.98, per_axis=True) == (3, 1)
    shares = energy_spectrum(field)
    assert np.isclose(shares[0][2], 1 / 1.01) and np.isclose(shares[1][5], 0.01 / 1.01)
    for modes in (select_modes(field, 0.05), select_modes(field, 0.3)):
        assert irreducible_error(field, modes).mean() <= 0.3


def test_metrics_by_hand():
    truth, guess = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 3.0], [3.0, 4.0]])
    assert np.allclose(metrics.relative_l2(guess, truth), [1 / math.sqrt(5), 1 / math.sqrt(34)])
    assert np.allclose(metrics.mse(guess, truth), 0.5) and np.allclose(metrics.mae(guess, truth), 0.5)
    assert np.allclose(metrics.mape(guess, truth), [1 / 3, 1 / 8])
    assert np.allclose(metrics.smape(guess, truth), [0.2, 1 / 9])
    assert np.allclose(metrics.psnr(guess, truth), 10 * np.log10([1 / 0.5, 4 / 0.5]))
    assert metrics.mae_at(guess, truth, (1, 2)) == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: select_modes(np.ones((1, 4, 1))), "neither"),
        (lambda: select_modes(np.ones((1, 4, 1)), 2.0), "2"),
        (lambda: select_modes(np.zeros((1, 4, 1)), 0.1), "0 everywhere"),
        (lambda: irreducible_error(np.ones((1, 4, 1)), 5), "5"),
        (lambda: irreducible_error(np.ones((1, 4)), 1), "shape"),
        (lambda: irreducible_error(np.ones((1, 4, 1)) * np.nan, 1), "NaN"),
        (lambda: irreducible_error(np.ones((1, 4, 1), int), 1), "int"),
        (lambda: metrics.relative_l2(np.ones((1, 2)), np.zeros((1, 2))), "norm 0"),
        (lambda: metrics.mse(np.ones((1, 2)), np.ones((1, 3))), "shape"),
        (lambda: metrics.mae_at(np.ones((1, 2)), np.ones((1, 2)), (3,)), "3"),
        (lambda: Joukowski(mu_x=-1.0), "mu_x"),
        (lambda: Joukowski(angle=math.nan), "finite"),
        (lambda: joukowski(0, 0), "samples"),
        (lambda: PlumeConfig(viscosity=-1.0), "-1"),
        (lambda: plume(0, 1, 30, PlumeConfig(height=8, width=8, cfl=200.0, interval=20.0)), "lower cfl"),
        (lambda: navier_stokes(jax.random.key(0), 1, 8, solve_size=12), "multiple"),
        (lambda: navier_stokes(jax.random.key(0), 1, 8, dt=-1.0), "-1"),
        (lambda: navier_stokes(jax.random.key(0), 1, 16, 1e-6, 4000.0, dt=40.0, batch=1), "lower dt"),
        (lambda: solve_vorticity(jnp.ones((1, 3, 3)), 1e-3, 1.0, 0.1), "3"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()
