"""Training, its resumption, its seeds and devices; rollouts (section 7: 2, 8, 9, 11, 14)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import TypeCheckError

from isotone.shared.errors import InputError
from isotone.transform_once import FNOConfig, MLPConfig, T1Config, T1UConfig, irreducible_error, losses, make_model
from isotone.transform_once import metrics as measured
from isotone.transform_once.problem import prepare
from isotone.transform_once.training import AXIS, TrainConfig, Trainer, fit

CONFIG = T1Config(modes=(5, 4), width=6, depth=1, sizes=(10, 8), init="kaiming", head_width=8, head_scale=0.05)
RECIPE = {"epochs": 6, "batch_size": 8, "lr": 3e-3}


def fields(samples=24, sizes=(10, 8)):
    """Random smooth waves, and what comes of them by a shift and a square."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.arange(n) / n for n in sizes), indexing="ij")
    amplitudes = rng.standard_normal((samples, 4, 1, 1))
    waves = np.stack([np.sin(2 * np.pi * x), np.cos(2 * np.pi * y), np.sin(2 * np.pi * (x + y)), np.cos(4 * np.pi * x)])
    field = (amplitudes * waves).sum(1)[..., None].astype(np.float32)
    return field, (np.roll(field, 2, 1) + 0.2 * field**2).astype(np.float32)


def state_of(model):
    # copies: a view that is held would keep a buffer from being given away
    return [np.array(leaf, copy=True) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.parametrize(
    "transform,loss",
    [
        ("dct", "relative_l2"),
        ("dft", "mse"),
        pytest.param("dct", "mse", marks=pytest.mark.slow),
        pytest.param("dft", "relative_l2", marks=pytest.mark.slow),
    ],
)
def test_loss_of_blocks_is_the_loss_of_fields(transform, loss):
    """Value and gradients, by Parseval; also on another grid than the model's own."""
    model = make_model(T1Config(**{**CONFIG.__dict__, "transform": transform, "modes": (4, 4)}))
    model.set_units(fields(6)[0] + 1, fields(6)[1] * 3 - 2)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    for sizes in ((10, 8), (15, 12)) if loss == "relative_l2" else ((15, 12),):
        x, y = fields(6, sizes)
        problem = prepare(model, x, y, loss)

        def blocks(p, problem=problem):
            return problem.loss(nnx.merge(graph, p, rest), problem.arrays)

        y = jnp.asarray(y)

        def whole(p, x=x, y=y):
            found = nnx.merge(graph, p, rest)(jnp.asarray(x))
            return losses.relative_l2(found, y) if loss == "relative_l2" else losses.mse(found, y)

        # the mean square is of the model's grid there, where coefficients are rescaled
        one, two = (jax.jit(jax.value_and_grad(f))(params) for f in (blocks, whole))
        assert np.allclose(one[0], two[0], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
            assert np.allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


def test_training_fits_and_stays_above_the_irreducible_error():
    x, y = fields()
    model = make_model(CONFIG)
    history = model.fit(x[:16], y[:16], test=(x[16:], y[16:]), epochs=60, batch_size=8, lr=1e-2, eval_every=30)
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert [epoch for epoch, *_ in history.tests] == [30, 60] and history.seconds > 0
    found = model.predict(x)
    assert np.isclose(history.tests[-1][1], measured.relative_l2(found[16:], y[16:]).mean(), rtol=1e-4)
    floor = irreducible_error(y, (5, 4))
    assert (floor > 0).all() and (measured.relative_l2(found, y) >= floor * (1 - 1e-5)).all()


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    x, y = fields()

    def run(folder, stop=None):
        model = make_model(CONFIG)

        def progress(epoch, loss):
            if epoch == stop:
                raise KeyboardInterrupt

        history = fit(model, x, y, checkpoint=folder, checkpoint_every=2, progress=progress, **RECIPE)
        return state_of(model), history.loss

    whole, losses_whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=5)
    again, losses_again = run(tmp_path / "b")
    assert losses_again == losses_whole
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    with pytest.raises(InputError, match="another's"):
        fit(make_model(CONFIG, seed=1), x, y, checkpoint=tmp_path / "b", **RECIPE)
    with pytest.raises(InputError, match="another's"):
        fit(make_model(CONFIG), x, y + 1, checkpoint=tmp_path / "b", **RECIPE)
    fresh = fit(make_model(CONFIG), x, y + 1, checkpoint=tmp_path / "b", resume=False, **RECIPE)
    assert len(fresh.loss) == 6


@pytest.mark.parametrize(
    "config",
    [CONFIG, pytest.param(FNOConfig(modes=(3, 3), width=3, depth=1, head_width=4), marks=pytest.mark.slow)],
    ids=["t1", "fno"],
)
def test_seeds_side_by_side_are_the_seeds_alone(config):
    x, y = fields()
    recipe = TrainConfig(**RECIPE)
    many = Trainer(make_model(config), x, y, recipe, seeds=[0, 2], rates=[3e-3, 1e-3])
    found = many.run(6)
    for row, (seed, rate) in enumerate([(0, 3e-3), (2, 1e-3)]):
        model = make_model(config, seed)
        history = fit(model, x, y, standardize=False, **{**RECIPE, "seed": seed, "lr": rate})
        assert np.allclose(found[row], history.loss, rtol=1e-4)
        for a, b in zip(state_of(many.models()[row]), state_of(model), strict=True):
            assert np.allclose(a, b, atol=1e-4)


def test_seeds_side_by_side_have_the_models_units():
    x, y = 300 * fields()[0] + 1000, 1e-3 * fields()[1]
    model = make_model(CONFIG)
    model.set_units(x, y)
    found = Trainer(model, x, y, TrainConfig(**RECIPE), seeds=[0]).run(6)
    assert np.allclose(found[0], fit(make_model(CONFIG), x, y, **RECIPE).loss, rtol=1e-3)


@pytest.mark.parametrize(
    "config",
    [CONFIG, pytest.param(T1UConfig(modes=(4, 4), sizes=(10, 8), exponent=1, depth=2), marks=pytest.mark.slow)],
    ids=["t1", "t1u"],
)
def test_several_devices_are_one(config):
    x, y = fields()
    one, many = make_model(config), make_model(config)
    recipe = {**RECIPE, "epochs": 2}
    alone = fit(one, x, y, **recipe)
    together = fit(many, x, y, mesh=Mesh(jax.devices()[:4], (AXIS,)), **recipe)
    assert np.allclose(alone.loss, together.loss, rtol=1e-4)
    for a, b in zip(state_of(one), state_of(many), strict=True):
        assert np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "config", [CONFIG, FNOConfig(modes=(3, 3), width=3, depth=1, head_width=4)], ids=["blocks", "fields"]
)
def test_units_do_not_matter(config):
    """a x + b in, c y + d out: the same network, and with d = 0 the same loss."""
    x, y = fields()
    plain, other = make_model(config), make_model(config)
    one = plain.fit(x, y, **RECIPE)
    two = other.fit(300 * x + 1000, 1e-3 * y, **RECIPE)
    assert np.allclose(one.loss, two.loss, rtol=1e-3)
    assert np.allclose(1e3 * other.predict(300 * x + 1000), plain.predict(x), atol=2e-3)
    moved = make_model(config)
    moved.set_units(x, y + 5)
    assert np.allclose(moved.predict(x), plain_with_units(config, x, y) + 5, atol=1e-4)


def plain_with_units(config, x, y):
    model = make_model(config)
    model.set_units(x, y)
    return model.predict(x)


def test_a_constant_channel_and_fields_as_they_are():
    x, y = fields(8)
    model = make_model(CONFIG)
    model.fit(x, 0 * y + 2, batch_size=4, epochs=1)
    assert model.out_scale[...] == 1 and model.out_shift[...] == 2
    raw = make_model(CONFIG)
    raw.fit(x, y, batch_size=4, epochs=1, standardize=False)
    assert raw.in_scale[...] == 1 and raw.in_shift[...] == 0


def test_a_model_outlives_what_goes_wrong_with_its_training():
    x, y = fields()
    model = make_model(CONFIG)
    before = model.predict(x)

    def stop(epoch, loss):
        if epoch == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        model.fit(x, y, progress=stop, **RECIPE)
    assert np.array_equal(model.predict(x), before)
    trainer = Trainer(model, x, y, TrainConfig(**RECIPE))
    trainer.run(1)
    first = trainer.models()[0]
    kept = first.predict(x)
    trainer.run(1)
    assert np.array_equal(model.predict(x), before) and np.array_equal(first.predict(x), kept)
    assert not np.array_equal(trainer.models()[0].predict(x), kept)


def test_losses_refuse_two_shapes_and_two_domains():
    y = jnp.ones((3, 4, 4, 1))
    for other in (jnp.ones((3, 1, 1, 1)), y.astype(jnp.complex64)):
        with pytest.raises((InputError, TypeCheckError)):
            losses.relative_l2(other, y)
    with pytest.raises(InputError, match="one shape"):
        losses.relative_l2_freq(y, y[:, :2], jnp.zeros(3))


def test_eager_steps_are_the_scan():
    """One epoch by hand: the same order, gradients of each batch, AdamW's update."""
    import optax

    x, y = fields(16)
    model = make_model(CONFIG)
    recipe = TrainConfig(epochs=1, batch_size=8, lr=3e-3, schedule="constant")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    problem = prepare(model, x, y)
    order = np.random.default_rng((0, 0)).permutation(16).reshape(2, 8)
    adam = optax.adamw(3e-3, weight_decay=1e-4)
    state = jax.jit(adam.init)(params)
    gradient_of = jax.jit(jax.grad(lambda p, batch: problem.loss(nnx.merge(graph, p, rest), batch)))
    update = jax.jit(adam.update)
    for rows in order:
        gradient = gradient_of(params, {name: array[rows] for name, array in problem.arrays.items()})
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    trainer = Trainer(model, x, y, recipe)
    trainer.run(1)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(trainer.loop.params), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_rates_of_the_schedules():
    share = jnp.asarray([0.0, 0.199, 0.2, 0.4, 0.6, 0.8, 0.999])
    assert np.allclose(TrainConfig().rate(share), [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625])
    assert np.allclose(TrainConfig(schedule="cosine").rate(share[:1]), 1)
    assert float(TrainConfig(schedule="cosine").rate(jnp.ones(()))) < 1e-6
    assert TrainConfig(schedule="constant").rate(share[3]) == 1


# --- rollouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_rollout_in_frequency_domain_is_that_of_fields(order):
    """K = 10, two context frames of white noise, a standardised model; the field loop is written out."""
    config = T1Config(modes=(5, 4), in_channels=2, width=6, depth=1, sizes=(10, 8), head_scale=0.05, head_width=8)
    model = make_model(config)
    frames = np.random.default_rng(0).standard_normal((4, 2, 10, 8, 1)).astype(np.float32)
    model.set_units(np.concatenate([frames[:, 0], frames[:, 1]], -1) * 3 + 2, frames[:, 0] * 2 - 1)
    window, wanted = [frames[:, 0], frames[:, 1]], []
    for _ in range(10):
        found = model.predict(np.concatenate(window, -1))
        after = [found, window[-1] + found, 2 * window[-1] - window[-2] + found][order]
        window = [window[1], after]
        wanted.append(after)
    wanted = np.stack(wanted, 1)
    for domain in ("frequency", "physical", "auto"):
        found = model.rollout(frames, 10, order, domain)
        assert found.shape == (4, 10, 10, 8, 1)
        assert np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


def test_rollout_of_a_model_of_fields():
    model = make_model(FNOConfig(modes=(3, 3), width=3, depth=1, head_width=4))
    x, _ = fields(2)
    found = model.rollout(x[:, None], 2)
    assert np.allclose(found[:, 1], model.predict(model.predict(x)), atol=1e-5)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda m, x: m.rollout(x[:, None], 0), "steps"),
        (lambda m, x: m.rollout(x[:, None], 2, order=3), "3"),
        (lambda m, x: m.rollout(x[:, None], 2, order=2), "two context frames"),
        (lambda m, x: m.rollout(x, 2), "5 axes"),
        (lambda m, x: m.rollout(np.stack([x, x], 1), 2), "2 frames"),
        (lambda m, x: m.rollout(x[:, None], 2, domain="wavelet"), "wavelet"),
        (lambda m, x: m.rollout(x[:, None] * np.nan, 2), "finite"),
        (lambda m, x: m.fit(x, x, epochs=0), "epochs"),
        (lambda m, x: m.fit(x, x, epoch=1), "epoch"),
        (lambda m, x: m.fit(x, x, batch_size=99), "99"),
        (lambda m, x: m.fit(x, x[:2], batch_size=2), "as many targets"),
        (lambda m, x: m.fit(x, x * np.inf, batch_size=2), "finite targets"),
        (lambda m, x: m.fit(x, 0 * x, batch_size=2), "not 0 everywhere"),
        (lambda m, x: m.fit(x, np.concatenate([x, x], -1), batch_size=2), "targets of shape"),
        (lambda m, x: m.fit(x, x, batch_size=2, lr=-1.0), "-1"),
        (lambda m, x: m.fit(x, x, batch_size=2, loss="l7"), "l7"),
        (lambda m, x: m.fit(x, x, batch_size=2, schedule="up"), "up"),
        (lambda m, x: m.fit(x, x, batch_size=3, mesh=Mesh(jax.devices()[:2], (AXIS,))), "divide"),
        (lambda m, x: m.fit(x, x, batch_size=2, mesh=Mesh(jax.devices()[:2], ("model",))), "model"),
        (lambda m, x: m.fit(x, x, batch_size=2, epochs=3, lr=1e38), "lower lr"),
        (lambda m, x: m.fit(x, x, batch_size=2, test=(x, x[:1])), "test targets"),
        (lambda m, x: m.fit(x, x, batch_size=2, test=(x, np.inf * x)), "finite test targets"),
        (lambda m, x: Trainer(m, x, x, TrainConfig(batch_size=2), seeds=[0, 1], rates=[0.1]), "2 seeds"),
    ],
)
def test_refusals(call, words):
    x, _ = fields(6)
    model = make_model(CONFIG)
    before = state_of(model)
    with pytest.raises(InputError, match=words):
        call(model, x)
    assert all(np.array_equal(a, b) for a, b in zip(before, state_of(model), strict=True))
    if "lower" in words:
        assert np.isfinite(model.predict(x)).all()


def test_frequency_rollout_needs_a_direct_model():
    model = make_model(T1Config(**{**CONFIG.__dict__, "padding": 2}))
    x, _ = fields(2)
    with pytest.raises(InputError, match="domain physical"):
        model.rollout(x[:, None], 1, domain="frequency")
    assert model.rollout(x[:, None], 1).shape == (2, 1, 10, 8, 1)


def test_a_plain_network_trains_on_the_same_spectrum():
    x, y = fields()
    history = make_model(MLPConfig(modes=(5, 4), sizes=(10, 8), width=32, depth=3)).fit(x, y, **RECIPE)
    assert history.loss[-1] < history.loss[0]
