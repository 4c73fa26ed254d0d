"""The search: exact, reproducible, the same on one device and on four, resumed as if never stopped."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import toy

from isotone.concrete_tickets import OBJECTIVES, SearchConfig, from_linen, from_nnx, grad_balance, make_model, search
from isotone.concrete_tickets.batches import epoch_order
from isotone.concrete_tickets.concrete import relaxed_mask
from isotone.concrete_tickets.known import energy, orthonormal_regression, planted_teacher
from isotone.concrete_tickets.layout import Layout, kept_count, masked
from isotone.concrete_tickets.noise import logistic_noise
from isotone.concrete_tickets.objectives import Batch, Network
from isotone.concrete_tickets.search import SearchSpec, init_state, search_step
from isotone.shared.errors import InputError

PARAMS, DATA = toy.params(), toy.data()
SMALL = SearchConfig(epochs=3, batch_size=16)
run = functools.partial(search, toy.apply, PARAMS, DATA, config=SMALL, features_fn=toy.features)


def test_exact_count_and_history():
    result = run(0.1)
    assert result.ticket.kept == kept_count(0.1, result.ticket.total)
    assert {name: len(v) for name, v in result.history.items()} == dict.fromkeys(result.history, 12)
    assert result.inverted().kept == result.ticket.kept


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "kl"])
@pytest.mark.parametrize("controller", ["grad_balance", "lagrangian"])
def test_every_objective_and_controller(objective, controller):
    if controller == "lagrangian" and objective not in ("loss", "feature_mse"):
        pytest.skip("the controllers do not see the objective: two of them are enough")
    result = run(0.2, objective, epochs=1, controller=controller)
    assert result.ticket.kept == kept_count(0.2, result.ticket.total)


def test_an_objective_and_a_controller_of_mine():
    def mine(masked, dense, batch, rng):
        return jnp.mean(jnp.abs(masked(batch.inputs) - dense(batch.inputs)))

    result = run(0.2, mine, controller=optax.chain(grad_balance(slack=1.0)))
    assert result.ticket.kept == kept_count(0.2, result.ticket.total)


def test_steps_are_the_reference():
    """Three steps in NumPy: sample, finite differences of the objective, GRADBALANCE, Adam."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        x, y = DATA[0].astype(jnp.float64)[:16], DATA[1][:16]
        config = SearchConfig(epochs=1, batch_size=16)
        layout = Layout.of(params)
        spec = SearchSpec(toy.apply, "kl", layout, config, 3)
        state, key, density = init_state(spec, 0.1), jax.random.key(3), 0.1
        balance, adam = reference.GradBalance(), reference.Adam(0.1, 1e-15)
        logits = np.full(layout.total, np.log(0.1 / 0.9))
        for number in range(3):
            noise = logistic_noise(jax.random.fold_in(key, number), logits.shape)

            def objective(a, noise=noise):
                m = layout.expand(relaxed_mask(jnp.asarray(a), noise))
                sparse = Network(toy.apply, masked(params, m), layout.names)
                return 100 * OBJECTIVES["kl"](sparse, Network(toy.apply, params, ()), Batch(x, y), key)

            g = reference.finite_difference(jax.jit(objective), logits, 1e-5)
            # the rate has fallen at int(0.88 * 1) = 0 epochs already
            logits = logits + adam.step(balance.direction(g, logits, density), 0.01)
            state, metrics = search_step(spec, params, state, Batch(x, y), key, density)
        assert np.abs(np.asarray(layout.flatten(state.logits)) - logits).max() < 1e-3 * 0.03
        assert np.isclose(float(metrics["multiplier"]), balance.multiplier, rtol=1e-3)


def test_scan_is_the_python_loop():
    result, key = run(0.1, key=jax.random.key(5)), jax.random.key(5)
    layout = Layout.of(PARAMS)
    spec = SearchSpec(toy.apply, "kl", layout, SMALL, 4, toy.features)
    step = jax.jit(functools.partial(search_step, spec))
    state = init_state(spec, 0.1)
    for epoch in range(3):
        for index in epoch_order(key, epoch, 64, 16):
            state, _ = step(PARAMS, state, Batch(DATA[0][index], DATA[1][index]), key, jnp.float32(0.1))
    assert all(jnp.array_equal(state.logits[n], a) for n, a in result.logits.items())


def test_same_key_same_ticket_and_densities_side_by_side():
    alone = [run(d, key=jax.random.key(s)) for d in (0.1, 0.3) for s in (0, 1)]
    together = run([0.1, 0.3], key=jnp.stack([jax.random.key(0), jax.random.key(1)]))
    assert len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one.ticket.kept == other.ticket.kept
        for name in one.logits:
            assert jnp.allclose(one.logits[name], other.logits[name], atol=1e-3)
    assert not jnp.array_equal(alone[0].logits["l0/kernel"], alone[1].logits["l0/kernel"])
    again = run(0.1, key=jax.random.key(0))
    assert all(jnp.array_equal(again.logits[n], alone[0].logits[n]) for n in again.logits)
    with_dense = run([0.1, 1.0])
    assert with_dense[1].ticket.density == 1 and with_dense[0].ticket.density < 0.2


@pytest.mark.parametrize("objective", ["kl", "delta_loss", "grad_match", "grad_norm", "feature_mse"])
def test_four_devices_are_one(objective):
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((4,), ("data",))
    one = run(0.1, objective, epochs=2)
    four = run(0.1, objective, epochs=2, mesh=mesh)
    for name in one.history:
        assert np.allclose(one.history[name], four.history[name], rtol=1e-3, atol=1e-5), name
    assert np.allclose(one.history["objective"][:2], four.history["objective"][:2], rtol=1e-5, atol=1e-6)
    assert all(jnp.allclose(one.logits[n], four.logits[n], atol=2e-3) for n in one.logits)
    with pytest.raises(InputError, match="mesh"):
        run(0.1, batch_size=18, mesh=mesh)


def test_batch_statistics_and_several_searches_on_four_devices():
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((4,), ("data",))
    images = jax.random.normal(jax.random.key(0), (32, 8, 8, 1))
    data = images, jnp.arange(32) % 10
    one, four = (make_model("lenet", (8, 8, 1), 10, axis_name=axis) for axis in (None, "data"))
    params = one.init(jax.random.key(1))
    config = SearchConfig(epochs=1, batch_size=16)
    a = search(one.apply, params, data, [0.1, 0.2], config=config)
    b = search(four.apply, params, data, [0.1, 0.2], config=config, mesh=mesh)
    for x, y in zip(a, b, strict=True):
        assert np.allclose(x.history["objective"], y.history["objective"], rtol=1e-4)


def test_cached_dense_outputs_change_nothing():
    plain = run(0.1, objective="kl", epochs=2)
    cached = run(0.1, objective="kl", epochs=2, cache_dense="batches")
    assert cached.ticket.kept == plain.ticket.kept
    # the first batch is the same in both, so is the first step
    config = SearchConfig(epochs=2, batch_size=64)
    plain, cached = (run(0.1, config=dataclasses.replace(config, cache_dense=c)) for c in ("none", "batches"))
    assert np.allclose(plain.history["objective"], cached.history["objective"], rtol=1e-4)


def test_resumed_search_is_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(0.1, epochs=5, checkpoint=tmp_path / "whole", checkpoint_every=2)
    module = sys.modules["isotone.concrete_tickets.search"]  # the name is the function's

    inner, calls = module._run, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(module, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(0.1, epochs=5, checkpoint=tmp_path / "killed", checkpoint_every=2)
    resumed = run(0.1, epochs=5, checkpoint=tmp_path / "killed", checkpoint_every=2)
    assert len(calls) == 4, "epochs 2 to 5 alone are run after the kill"
    assert all(jnp.array_equal(whole.logits[n], resumed.logits[n]) for n in whole.logits)
    assert all(np.array_equal(whole.history[n], resumed.history[n]) for n in whole.history)
    with pytest.raises(InputError, match="other epochs"):
        run(0.1, epochs=6, checkpoint=tmp_path / "killed")
    with pytest.raises(InputError, match="weights, data"):
        run(0.2, epochs=5, checkpoint=tmp_path / "killed")
    fresh = run(0.2, epochs=5, checkpoint=tmp_path / "killed", resume=False)
    assert fresh.ticket.kept == kept_count(0.2, fresh.ticket.total)


def test_structured_searches():
    params = toy.params(sizes=(8, 8, 8, 4))
    data = jax.random.normal(jax.random.key(0), (32, 8)), jnp.arange(32) % 4
    go = functools.partial(search, toy.apply, params, data, epochs=2, batch_size=16)
    two_four = go(None, structure="2:4").ticket
    assert all((np.asarray(m).reshape(-1, 4, m.shape[1]).sum(1) == 2).all() for m in two_four.masks.values())
    channels = go(0.5, structure="output")
    assert all(set(np.asarray(m).mean(0)) <= {0.0, 1.0} for m in channels.ticket.masks.values())
    assert channels.ticket.density <= 0.5
    with pytest.raises(InputError, match="0.5"):
        go(0.3, structure="2:4")
    with pytest.raises(InputError, match="density"):
        go(None)


def test_permuting_hidden_units_permutes_the_ticket():
    """Invariant 8: units, noise and logits permuted together, step by step."""
    order = np.array([3, 1, 4, 0, 2, 7, 5, 6])
    permuted = jax.tree.map(lambda x: x, PARAMS)
    permuted["l0"] = {"kernel": PARAMS["l0"]["kernel"][:, order], "bias": PARAMS["l0"]["bias"][order]}
    permuted["l1"] = {"kernel": PARAMS["l1"]["kernel"][order], "bias": PARAMS["l1"]["bias"]}
    layout, (x, y) = Layout.of(PARAMS), DATA
    noise = layout.expand(logistic_noise(jax.random.key(0), (layout.total,)))
    moved = {**noise, "l0/kernel": noise["l0/kernel"][:, order], "l1/kernel": noise["l1/kernel"][order]}
    gradients = []
    for params, drawn in ((PARAMS, noise), (permuted, moved)):

        def value(a, params=params, drawn=drawn):
            sparse = Network(toy.apply, masked(params, {n: relaxed_mask(a[n], drawn[n]) for n in drawn}), layout.names)
            return OBJECTIVES["kl"](sparse, Network(toy.apply, params, ()), Batch(x, y), jax.random.key(0))

        gradients.append(jax.grad(value)(jax.tree.map(lambda v: jnp.full(v.shape, -2.0), drawn)))
    assert jnp.allclose(gradients[0]["l0/kernel"][:, order], gradients[1]["l0/kernel"], atol=1e-6)
    assert jnp.allclose(gradients[0]["l1/kernel"][order], gradients[1]["l1/kernel"], atol=1e-6)
    assert jnp.allclose(gradients[0]["l2/kernel"], gradients[1]["l2/kernel"], atol=1e-6)


def test_known_optimum_is_found():
    """Invariant 6: exactly the large weights where they are separated; most of the energy where they are not."""
    settings = dict(epochs=1500, batch_size=200)
    for seed in range(3):
        problem = orthonormal_regression(jax.random.key(seed))
        found = search(problem.apply_fn, problem.params, problem.data, 0.1, problem.objective, **settings)
        assert problem.recovered(found.ticket) == problem.best.kept == 20
    problem = orthonormal_regression(jax.random.key(7), large=None)
    for ranking in ("last", "averaged"):
        found = search(
            problem.apply_fn, problem.params, problem.data, 0.1, problem.objective, ranking=ranking, **settings
        )
        assert energy(problem, found.ticket) > 0.85, ranking


def test_planted_teacher_is_a_problem_with_an_answer():
    params = toy.params(sizes=(32, 24, 12, 4))
    problem = planted_teacher(jax.random.key(0), toy.apply, params, 0.2, examples=256)
    x, y = problem.data
    assert jnp.array_equal(jnp.argmax(toy.apply(problem.best.apply(problem.params), x), -1), y)
    assert problem.jaccard(problem.best) == 1
    found = search(toy.apply, problem.params, problem.data, 0.2, problem.objective, epochs=60, batch_size=128)
    right = jnp.mean(jnp.argmax(toy.apply(found.ticket.apply(problem.params), x), -1) == y)
    wrong = found.ticket.shuffle_layers(jax.random.key(1))
    chance = jnp.mean(jnp.argmax(toy.apply(wrong.apply(problem.params), x), -1) == y)
    assert right > 0.7 and right > chance + 0.1


def test_flax_networks_of_both_kinds():
    from flax import linen, nnx

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
            return linen.Dense(3)(linen.relu(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))

    module = Linen()
    for apply_fn, params in (
        from_linen(module, module.init(jax.random.key(0), DATA[0]), train=True),
        from_linen(linen.Dense(3), linen.Dense(3).init(jax.random.key(0), DATA[0])),
        from_nnx(Nnx(nnx.Rngs(0))),
    ):
        result = search(apply_fn, params, DATA, 0.25, config=SMALL)
        assert result.ticket.kept == kept_count(0.25, result.ticket.total)
        assert all("kernel" in name and "orm" not in name for name in result.ticket.masks)
        assert toy.apply is not apply_fn and apply_fn(result.ticket.apply(params), DATA[0]).shape == (64, 3)


@pytest.mark.parametrize(
    ("density", "settings", "words"),
    [
        (0.0, {}, "density"),
        (1.5, {}, "1.5"),
        (float("nan"), {}, "nan"),
        (0.001, {}, "keeps a weight"),
        (0.1, {"objective": "entropy"}, "entropy"),
        (0.1, {"where": lambda name, leaf: False}, "may be pruned"),
        (0.1, {"epochs": 0}, "epochs"),
        (0.1, {"lr": float("nan")}, "lr"),
        (0.1, {"tau": -1.0}, "tau"),
        (0.1, {"decay_at": 2.0}, "decay_at"),
        (0.1, {"ranking": "first"}, "ranking"),
        (0.1, {"controller": "pid"}, "pid"),
        (0.1, {"structure": "block"}, "block"),
        (0.1, {"batch_size": 65}, "batch_size"),
        (0.1, {"objective": "feature_mse", "features_fn": None}, "features_fn"),
        (0.1, {"objective": lambda m, d, b, r: jnp.nan * jnp.sum(m(b.inputs))}, "batch 0 of epoch 0"),
        (0.1, {"objective": lambda m, d, b, r: jnp.sum(d(b.inputs))}, "depends on the mask"),
    ],
)
def test_refusals(density, settings, words):
    with pytest.raises(InputError, match=words):
        run(density, **settings)


def test_data_that_does_not_fit():
    x, y = DATA
    bad = [
        ((x, y[:3]), "as many labels"),
        ((x.at[0, 0].set(jnp.nan), y), "NaN"),
        ((x, y + 5), "labels from 0 to 2"),
        ((x, y.astype(float)), "whole numbers"),
        (x, r"\(inputs, labels\)"),
    ]
    for data, words in bad:
        with pytest.raises(InputError, match=words):
            search(toy.apply, PARAMS, data, 0.1, config=SMALL)
    with pytest.raises(InputError, match="logits"):
        search(lambda p, x: toy.apply(p, x).sum(-1), PARAMS, DATA, 0.1, config=SMALL)
