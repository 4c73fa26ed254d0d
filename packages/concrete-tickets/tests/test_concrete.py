"""The relaxation and the controllers, against closed forms (section 7, invariants 2 to 4)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.extend.random import threefry_2x32

from isotone.concrete_tickets import grad_balance, lagrangian
from isotone.concrete_tickets.concrete import (
    TAU,
    check_relaxation,
    expected_mask,
    initial_logit,
    probability_above_half,
    relaxed_mask,
)
from isotone.concrete_tickets.controllers import density_error, global_norm
from isotone.concrete_tickets.noise import logistic_noise, threefry
from isotone.shared.errors import InputError

BOTH = pytest.mark.parametrize("parametrization", ["scaled", "standard"])


@BOTH
@pytest.mark.parametrize("logit", [-4.6, -1.0, 0.5])
def test_the_mean_and_the_probability_of_a_mask(parametrization, logit):
    """100,000 draws; each bound is 5 standard errors, a false alarm in about 1 of 1,700,000 (fixed seed)."""
    noise = logistic_noise(jax.random.key(1), (100_000,))
    masks = np.asarray(relaxed_mask(jnp.float32(logit), noise, TAU, parametrization), np.float64)
    mean = expected_mask(logit, TAU, parametrization)
    assert abs(masks.mean() - mean) < 5 * masks.std() / 100_000**0.5
    probability = probability_above_half(logit, TAU, parametrization)
    assert abs((masks > 0.5).mean() - probability) < 5 * (probability * (1 - probability) / 100_000) ** 0.5
    assert np.isfinite(masks).all()


def test_sparse_masks_are_not_really_sparse():
    logit = float(initial_logit(0.01))
    assert abs(expected_mask(logit) - 0.075) < 0.001
    assert abs(expected_mask(logit, parametrization="standard") - 0.020) < 0.001


def test_the_noise_is_jaxs_threefry():
    key, counters = jnp.array([7, 2**31 + 5], jnp.uint32), jnp.arange(10, dtype=jnp.uint32)
    assert np.array_equal(jnp.concatenate(threefry(key, counters)), threefry_2x32(key, counters))
    odd, rbg = logistic_noise(jax.random.key(0), (7, 3)), logistic_noise(jax.random.key(0, impl="rbg"), (8,))
    assert odd.shape == (7, 3) and len(set(odd.reshape(-1).tolist())) == 21 and np.isfinite(rbg).all()


@BOTH
def test_a_mask_is_the_equation(parametrization):
    u = np.linspace(0.01, 0.99, 25)
    noise = jnp.asarray(np.log(u) - np.log1p(-u), jnp.float32)
    ours = relaxed_mask(jnp.float32(-0.7), noise, 0.4, parametrization)
    assert np.allclose(ours, reference.relaxed_mask(-0.7, u, 0.4, parametrization), atol=1e-6)


def test_settings_are_checked():
    with pytest.raises(InputError, match="tau"):
        check_relaxation(0.0, "scaled")
    with pytest.raises(InputError, match="parametrization"):
        check_relaxation(1.0, "hard")
    for call in (lambda: grad_balance(0.0), lambda: grad_balance(1.1, 0.0), lambda: lagrangian(0.0)):
        with pytest.raises(InputError):
            call()


def test_the_sparsity_gradient_is_that_of_the_error():
    logits = jax.random.normal(jax.random.key(0), (50,))
    sizes = jnp.arange(1.0, 51.0)
    for s in (None, sizes):
        automatic = jax.grad(lambda a, s=s: density_error(a, 0.2, s)[0])(logits)
        assert np.allclose(automatic, density_error(logits, 0.2, s)[1], rtol=1e-4)


def test_grad_balance_is_the_reference_and_finds_the_ratio_of_norms():
    rng = np.random.default_rng(0)
    logits, naive, tx = rng.normal(size=40), reference.GradBalance(), grad_balance()
    state = tx.init(jnp.zeros(40))
    for _ in range(5):
        g = rng.normal(size=40)
        ours, state = tx.update(jnp.asarray(g), state, jnp.asarray(logits), density=0.1)
        assert np.allclose(ours, naive.direction(g, logits, 0.1), rtol=1e-4, atol=1e-5)
        logits = logits - 0.1 * g
    # constant norms: lambda h comes to the norm of g
    state = tx.init(jnp.zeros(40))
    g, logits = jnp.ones(40), jnp.zeros(40)
    for _ in range(3):
        direction, state = tx.update(g, state, logits, density=0.1)
    assert abs(float(jnp.linalg.norm(direction - g) / jnp.linalg.norm(g)) - 1) < 1e-4


def test_grad_balance_is_off_below_the_density():
    tx = grad_balance()
    g, logits = jnp.ones(10), jnp.full(10, -6.0)
    direction, state = tx.update(g, tx.init(logits), logits, density=0.5)
    assert float(state.multiplier) == 0 and np.array_equal(direction, g)


def test_grad_balance_scales_with_the_objective_alone():
    tx, logits = grad_balance(), jax.random.normal(jax.random.key(0), (20,))
    g = jax.random.normal(jax.random.key(1), (20,))
    one, state = tx.update(g, tx.init(logits), logits, density=0.1)
    many, _ = tx.update(1e-12 * g, tx.init(logits), logits, density=0.1)
    assert np.allclose(many / 1e-12, one, rtol=1e-4)
    # invariant 3: with err times c, h times c and lambda over c
    error, h = density_error(logits, 0.11)
    target = global_norm(g) / global_norm(h)
    assert float(error) > 0 and np.allclose(state.multiplier, target, rtol=1e-5)
    assert np.allclose(global_norm(g) / global_norm(7 * h), target / 7, rtol=1e-5)


def test_global_norm_does_not_underflow():
    assert abs(float(global_norm({"a": jnp.full(4, 1e-30)})) / 2e-30 - 1) < 1e-5
    assert float(global_norm(jnp.zeros(3))) == 0


def test_lagrangian_follows_the_signed_error():
    tx, logits = lagrangian(0.01), jnp.zeros(10)
    state = tx.init(logits)
    direction, state = tx.update(jnp.ones(10), state, logits, density=0.25)
    assert np.array_equal(direction, jnp.ones(10)) and abs(float(state.multiplier) - 1.0) < 1e-5
    direction, state = tx.update(jnp.ones(10), state, jnp.full(10, -9.0), density=0.25)
    assert float(state.multiplier) < 1.0, "below the density the multiplier falls"


def test_they_chain_with_optax_and_compile_once():
    tx = optax.chain(grad_balance(), optax.clip(1.0), optax.adam(0.1))
    compiled = 0

    @jax.jit
    def step(logits, state, density):
        nonlocal compiled
        compiled += 1
        updates, state = tx.update(jnp.ones_like(logits), state, logits, density=density)
        return optax.apply_updates(logits, updates), state

    logits = jnp.zeros(5)
    state = tx.init(logits)
    for density in (0.1, 0.2, 0.9):
        logits, state = step(logits, state, density)
    assert compiled == 1
    with pytest.raises(ValueError, match="logits"):
        grad_balance().update(jnp.ones(3), grad_balance().init(None), None, density=0.1)
