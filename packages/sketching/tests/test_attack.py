"""The attack against what it inverts (section 7: 11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotone.shared.errors import InputError
from isotone.sketching import attack, recovery
from isotone.sketching.attack import AttackConfig
from isotone.sketching.data import digits
from isotone.sketching.models import make_model
from isotone.sketching.sketches import make_sketch

SOURCE = digits()
MODEL = make_model("mlp", (8, 8, 1), 10, 16)


PARAMS = MODEL.init(jax.random.key(0))
slope = jax.jit(jax.grad(MODEL.loss))


@functools.cache
def message_of(s=None):
    """The message of a gradient, or of its sketch of s numbers."""
    params = PARAMS
    sketch = None if s is None else make_sketch("srht", sum(leaf.size for leaf in jax.tree.leaves(params)), s)
    message = attack.gradient_message(MODEL, params, None if sketch is None else lambda v: sketch.sk(0, v))
    return jax.jit(message)


def examples(*chosen):
    return jnp.asarray(SOURCE.test_x[list(chosen)], jnp.float64), jnp.asarray(SOURCE.test_y[list(chosen)])


@pytest.mark.parametrize("s,method", [(None, "l2"), (100, "l2"), (100, "cosine")])
def test_the_loss_is_zero_at_the_truth_and_its_gradient_right(s, method):
    """L_R(x_true) = 0 with gradient 0; elsewhere the gradient through the gradient is the finite difference's."""
    with jax.enable_x64(True):
        message = message_of(s)
        x, y = examples(0)
        target = message(x, y)
        both = jax.jit(jax.value_and_grad(lambda x: attack.distance(method, message(x, y), target)))
        value, gradient = both(x)
        assert abs(float(value)) < 1e-15 and np.abs(gradient).max() < 1e-13
        rng = np.random.default_rng(0)
        at, way = np.asarray(x) + 0.1 * rng.standard_normal(x.shape), rng.standard_normal(x.shape)
        h = 1e-5
        wanted = (float(both(at + h * way)[0]) - float(both(at - h * way)[0])) / (2 * h)
        assert abs(float(np.vdot(both(at)[1], way)) - wanted) < 1e-6 * abs(wanted)


def test_inputs_break_out_of_sketches_that_are_larger():
    """64 pixels: 128 numbers give them away to rounding, 64 do not, and nothing was left in float64."""
    errors = {}
    for s in (128, 64):
        with jax.enable_x64(True):
            message = message_of(s)
            x, y = examples(0, 1)
            targets = jnp.stack([message(x[i : i + 1], y[i : i + 1]) for i in range(2)])
        config = AttackConfig(steps=600, restarts=2, bounded=False)
        found = attack.invert_many(
            message, targets, (8, 8, 1), jax.random.split(jax.random.key(0), 2), labels=y[:, None], config=config
        )
        errors[s] = float(np.median([recovery.mse(one.x[0], SOURCE.test_x[i]) for i, one in enumerate(found)]))
        assert found[0].history.shape == (601,) and found[0].loss < found[0].history[0]
    assert errors[128] < 1e-10 and 1e-5 < errors[64] < 0.05
    assert not jax.config.jax_enable_x64 and jnp.ones(1).dtype == jnp.float32


@pytest.mark.slow  # its program compiles long
def test_a_line_search_finds_it_too():
    with jax.enable_x64(True):
        message = message_of()
        x, y = examples(2)
        target = message(x, y)
    config = AttackConfig(optimizer="lbfgs", steps=100)
    found = attack.invert(message, target, (8, 8, 1), jax.random.key(0), labels=y, config=config)
    assert recovery.mse(found.x, SOURCE.test_x[2:3]) < 1e-10


def test_by_cosine_and_smoothness():
    """The cosine alone knows the input; a large weight of the total variation makes it flat."""
    with jax.enable_x64(True):
        message = message_of()
        x, y = examples(1)
        target = message(x, y)
    found = {
        tv: attack.invert(
            *(message, target, (8, 8, 1), jax.random.key(0)),
            labels=y,
            config=AttackConfig("cosine", steps=400, tv=tv),
        )
        for tv in (0.0, 10.0)
    }
    assert recovery.mse(found[0.0].x, SOURCE.test_x[1:2]) < 1e-4
    assert (
        float(attack.variation(jnp.asarray(found[10.0].x)))
        < 0.05
        < float(attack.variation(jnp.asarray(SOURCE.test_x[1:2])))
    )


def test_local_steps_of_one_are_a_gradient():
    with jax.enable_x64(True):
        params, message = PARAMS, message_of()
        x, y = examples(0, 1)
        one = jax.jit(attack.steps_message(MODEL, params, 1, 0.1))(x, y)
        assert np.allclose(one, message(x, y), atol=1e-12)
        # by hand
        u = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        for _ in range(3):
            u = jax.tree.map(lambda p, g: p - 0.1 * g, u, slope(u, x, y))
        wanted = (attack.flat(params) - attack.flat(u)) / 0.3
        assert np.allclose(jax.jit(attack.steps_message(MODEL, params, 3, 0.1))(x, y), wanted, atol=1e-12)


def test_labels_are_found_with_the_input():
    """Soft ones along with it, one class after another through a sketch, and from the last layer at once."""
    with jax.enable_x64(True):
        message = message_of()
        small = message_of(200)
        x, y = examples(3)
        targets = message(x, y), small(x, y)
        gradient = slope(PARAMS, x, y)
    config = AttackConfig(steps=500, restarts=2)
    found = attack.invert(message, targets[0], (8, 8, 1), jax.random.key(1), config=config)
    assert found.label.tolist() == y.tolist()
    found = attack.invert_by_search(small, targets[1], (8, 8, 1), jax.random.key(1), 10, AttackConfig(steps=300))
    assert found.label.tolist() == y.tolist() and recovery.psnr(found.x, SOURCE.test_x[3:4]) > 30
    assert attack.label_of_gradient(gradient["2"]["b"]) == int(y[0])
    with pytest.raises(InputError, match="got 2"):
        attack.label_of_gradient(jnp.array([-1.0, -1.0, 2.0]))


def test_a_linear_layer_tells_its_input_at_once():
    gradient = slope(PARAMS, jnp.asarray(SOURCE.test_x[:1]), jnp.asarray(SOURCE.test_y[:1]))
    found = attack.linear_inputs(gradient["1"]["w"], gradient["1"]["b"])
    assert np.allclose(found.reshape(8, 8), SOURCE.test_x[0, ..., 0], atol=1e-4)
    with pytest.raises(InputError, match="not 0"):
        attack.linear_inputs(jnp.ones((3, 2)), jnp.zeros(2))


def test_a_prior_draws_to_itself():
    """With a weight that is above everything the estimate is the prior's mean; with none, what the message says."""
    with jax.enable_x64(True):
        message = message_of()
        x, y = examples(0)
        target = message(x, y)
    mean, config = np.full((1, 8, 8, 1), 0.25), AttackConfig(steps=300)
    for weight, wanted in ((1e3, mean), (0.0, SOURCE.test_x[:1])):
        prior = attack.Prior(mean, np.full_like(mean, weight))
        found = attack.invert(message, target, (8, 8, 1), jax.random.key(0), labels=y, config=config, prior=prior)
        assert recovery.mse(found.x, wanted) < 1e-3


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: AttackConfig(method="l7"), "l7"),
        (lambda: AttackConfig(optimizer="sgd"), "sgd"),
        (lambda: AttackConfig(steps=0), "steps"),
        (lambda: AttackConfig(restarts=0), "restarts"),
        (lambda: AttackConfig(rate=-1.0), "-1"),
        (lambda: AttackConfig(tv=float("nan")), "nan"),
        (lambda: attack.steps_message(MODEL, {}, 0, 0.1), "local steps"),
        (lambda: attack.invert(lambda x, y: x, jnp.full(10, jnp.nan), (8, 8, 1), jax.random.key(0)), "finite message"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()
