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
from flax import linen, nnx
from jax.sharding import PartitionSpec

from isotone.concrete_tickets import (
    OBJECTIVES,
    SearchConfig,
    from_linen,
    from_nnx,
    grad_balance,
    lagrangian,
    search,
)
from isotone.concrete_tickets.batches import check_spread, epoch_order
from isotone.concrete_tickets.concrete import relaxed_mask
from isotone.concrete_tickets.known import energy, orthonormal_regression, planted_teacher
from isotone.concrete_tickets.layout import Layout, kept_count, masked
from isotone.concrete_tickets.models import BatchStatNorm
from isotone.concrete_tickets.noise import logistic_noise
from isotone.concrete_tickets.objectives import Batch, Network
from isotone.concrete_tickets.search import SearchSpec, init_state, search_step
from isotone.shared.errors import InputError

PARAMS, DATA = toy.params(), toy.data()
SMALL = SearchConfig(epochs=3, batch_size=16)
CACHES = ["none", "batches", "examples"]
run = functools.partial(search, toy.apply, PARAMS, DATA, config=SMALL, features_fn=toy.features)


def run_on(params, density, **settings):
    return search(toy.apply, params, DATA, density, config=SMALL, features_fn=toy.features, **settings)


def test_exact_count_and_history():
    result = run(0.1)
    assert result.ticket.kept == kept_count(0.1, result.ticket.total)
    assert {name: len(v) for name, v in result.history.items()} == dict.fromkeys(result.history, 12)
    assert result.inverted().kept == result.ticket.kept


FORMS = [(name, "grad_balance") for name in OBJECTIVES] + [("loss", "lagrangian"), ("feature_mse", "lagrangian")]


def first_steps(forms, mesh):
    """The first step's metrics and direction (Adam's first moment) of every form, in one program."""
    layout = Layout.of(PARAMS)

    def steps(x, y):
        found = {}
        for objective, controller in forms:
            config = dataclasses.replace(SMALL, controller=controller)
            spec = SearchSpec(toy.apply, objective, layout, config, 4, toy.features, mesh=mesh)
            index = spec.share(jnp.arange(16))
            batch = Batch(x[index], y[index])
            state, metrics = search_step(spec, PARAMS, init_state(spec, 0.2), batch, jax.random.key(3), 0.2)
            found[objective, controller] = metrics, layout.flatten(state.optimizer[1][0].mu)
        return found

    if mesh is not None:
        steps = jax.shard_map(steps, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return jax.jit(steps)(*DATA)


@pytest.mark.parametrize("forms", [FORMS[:1] + FORMS[-1:], pytest.param(FORMS[1:-1], marks=pytest.mark.slow)])
def test_every_objective_and_controller_on_one_device_and_on_four(forms):
    one = first_steps(forms, None)
    for form, (metrics, direction) in one.items():
        assert float(metrics["gradient"]) > 0 and bool(jnp.isfinite(direction).all()), form
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    four = first_steps(forms, jax.make_mesh((4,), ("data",)))
    for form, (metrics, direction) in one.items():
        for name, value in metrics.items():
            assert np.allclose(value, four[form][0][name], rtol=1e-5, atol=1e-6), (form, name)
        scale = float(jnp.abs(direction).max())
        assert np.allclose(direction, four[form][1], atol=1e-4 * scale), form


def test_the_lagrangian_ends_at_the_exact_count():
    result = run(0.2, "loss", controller="lagrangian")
    assert result.ticket.kept == kept_count(0.2, result.ticket.total)
    assert result.history["multiplier"][0] != result.history["multiplier"][-1]


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
        step = jax.jit(functools.partial(search_step, spec))
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
            state, metrics = step(params, state, Batch(x, y), key, density)
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
    assert all(np.array_equal(state.logits[n], a) for n, a in result.logits.items())


def test_same_key_same_ticket_and_densities_side_by_side():
    alone = [run(d, key=jax.random.key(s)) for d in (0.1, 0.3) for s in (0, 1)]
    together = run([0.1, 0.3], key=jnp.stack([jax.random.key(0), jax.random.key(1)]))
    assert len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one.ticket.kept == other.ticket.kept
        for name in one.logits:
            assert np.allclose(one.logits[name], other.logits[name], atol=1e-3)
    assert not np.array_equal(alone[0].logits["l0/kernel"], alone[1].logits["l0/kernel"])
    again = run(0.1, key=jax.random.key(0))
    assert all(np.array_equal(again.logits[n], alone[0].logits[n]) for n in again.logits)
    with_dense = run([0.1, 1.0])
    assert with_dense[1].ticket.density == 1 and with_dense[0].ticket.density < 0.2


def test_four_devices_find_what_one_does():
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((4,), ("data",))
    one, four = run(0.1), run(0.1, mesh=mesh)
    for name in one.history:
        assert np.allclose(one.history[name], four.history[name], rtol=1e-3, atol=1e-5), name
    assert all(np.allclose(one.logits[n], four.logits[n], atol=2e-3) for n in one.logits)
    with pytest.raises(InputError, match="mesh"):
        run(0.1, batch_size=18, mesh=mesh)
    # fewer than two examples a device, and no whole number of them
    check_spread(toy.apply, PARAMS, DATA[0][:6], None, mesh)


class Normalised(nnx.Module):
    """Two layers with batch statistics between them, over `axis_name`."""

    def __init__(self, axis_name):
        self.a, self.b = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))
        self.norm = BatchStatNorm(8, axis_name=axis_name)

    def __call__(self, x):
        return self.b(nnx.relu(self.norm(self.a(x))))


def test_batch_statistics_and_several_searches_on_four_devices():
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((4,), ("data",))
    (one, params), (four, _) = (from_nnx(Normalised(axis)) for axis in (None, "data"))
    config = SearchConfig(epochs=1, batch_size=16)
    a = search(one, params, DATA, [0.1, 0.2], config=config)
    b = search(four, params, DATA, [0.1, 0.2], config=config, mesh=mesh)
    for x, y in zip(a, b, strict=True):
        assert np.allclose(x.history["objective"], y.history["objective"], rtol=1e-4)
    # several densities and several keys: those of each alone
    keys = jax.random.split(jax.random.key(5), 2)
    many = search(four, params, DATA, [0.1, 0.2], config=config, mesh=mesh, key=keys)
    alone = [search(one, params, DATA, d, config=config, key=k) for d in (0.1, 0.2) for k in keys]
    for x, y in zip(many, alone, strict=True):
        assert np.allclose(x.history["objective"], y.history["objective"], rtol=1e-4)
    with pytest.raises(InputError, match="batches"):
        search(one, params, DATA, 0.1, config=config, cache_dense="examples")


def test_cached_dense_outputs_change_nothing():
    """With one batch an epoch the batches are the same however the dense logits are kept."""
    config = SearchConfig(epochs=2, batch_size=64)
    kept = {cache: run(0.1, config=dataclasses.replace(config, cache_dense=cache)) for cache in CACHES}
    for cache in CACHES[1:]:
        assert np.allclose(kept["none"].history["objective"], kept[cache].history["objective"], rtol=1e-4), cache
    # of examples: also where batches change
    several = run(0.1, cache_dense="examples")
    assert np.allclose(several.history["objective"], run(0.1).history["objective"], rtol=1e-3)


def test_seeds_search_weights_of_their_own():
    params, other = PARAMS, toy.params(4)
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), params, other)
    keys = jax.random.split(jax.random.key(1), 2)
    together = run_on(stacked, [0.1, 0.3], key=keys, params_per_key=True)
    assert len(together) == 4
    for i, (own, density) in enumerate([(params, 0.1), (other, 0.1), (params, 0.3), (other, 0.3)]):
        alone = run_on(own, density, key=keys[i % 2])
        assert alone.ticket.kept == together[i].ticket.kept
        assert all(np.allclose(alone.logits[n], a, atol=1e-3) for n, a in together[i].logits.items())
    with pytest.raises(InputError, match="leading axis of 3"):
        run_on(stacked, 0.1, key=jax.random.split(jax.random.key(1), 3), params_per_key=True)
    with pytest.raises(InputError, match="a key or an array"):
        run(0.1, key=keys.reshape(1, 2))


def test_resumed_search_is_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = run(0.1, checkpoint=tmp_path / "whole", checkpoint_every=1)
    module = sys.modules["isotone.concrete_tickets.search"]  # the name is the function's

    inner, calls = module._run, []

    def killed(*args):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return inner(*args)  # its text is taken, it is not run
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(module, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(0.1, checkpoint=tmp_path / "killed", checkpoint_every=1)
    resumed = run(0.1, checkpoint=tmp_path / "killed", checkpoint_every=1)
    assert len(calls) == 4, "epochs 2 and 3 alone are run after the kill"
    assert all(np.array_equal(whole.logits[n], resumed.logits[n]) for n in whole.logits)
    assert all(np.array_equal(whole.history[n], resumed.history[n]) for n in whole.history)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="other jax version"):
        patch.setattr(jax, "__version__", "0.0")
        run(0.1, checkpoint=tmp_path / "killed")
    with pytest.raises(InputError, match="other epochs"):
        run(0.1, epochs=6, checkpoint=tmp_path / "killed")
    with pytest.raises(InputError, match="weights, data"):
        run(0.2, checkpoint=tmp_path / "killed")
    fresh = run(0.2, checkpoint=tmp_path / "killed", resume=False)
    assert fresh.ticket.kept == kept_count(0.2, fresh.ticket.total)


def tempered(temperature):
    def objective(masked, dense, batch, rng):
        return masked.mean(jnp.sum((masked(batch.inputs) - dense(batch.inputs)) ** 2, -1) / temperature)

    return objective


def test_checkpoints_tell_functions_of_one_name_apart(tmp_path):
    """Objectives from one factory, networks that differ in a number, controllers of one's own."""
    shared = {"density": 0.1, "epochs": 1, "batch_size": 16, "controller": lagrangian(0.1), "checkpoint": tmp_path}
    again = functools.partial(search, data=DATA, **shared)
    double = {"apply_fn": lambda params, x: 2 * toy.apply(params, x), "params": PARAMS}
    plain = {"apply_fn": toy.apply, "params": PARAMS}
    again(**plain, objective=tempered(1.0))
    again(**plain, objective=tempered(1.0))
    changed = ((plain, tempered(8.0), {}), (double, tempered(1.0), {}))
    for network, objective, more in (*changed, (plain, tempered(1.0), {"controller": lagrangian(0.5)})):
        with pytest.raises(InputError, match="other network, objective or controller"):
            again(**network, objective=objective, **more)


def test_what_is_known_before_the_search_is_refused_before_it(monkeypatch):
    module = sys.modules["isotone.concrete_tickets.search"]
    monkeypatch.setattr(module, "_run", lambda *args: pytest.fail("searched"))
    with pytest.raises(InputError, match="epochs, batch_size.*got epoch"):
        run(0.1, epoch=1)
    with pytest.raises(InputError, match="keeps a group of 3 weights, got room for 2"):
        run(0.02, structure="input")
    with pytest.raises(InputError, match=r"scalar, got shape \(16, 3\)"):
        search(toy.apply, PARAMS, DATA, 0.1, lambda m, d, b, r: m(b.inputs), epochs=1, batch_size=16)
    with pytest.raises(InputError, match="scalar, got NoneType"):
        search(toy.apply, PARAMS, DATA, 0.1, lambda m, d, b, r: None, epochs=1, batch_size=16)
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    go = functools.partial(search, density=0.1, epochs=1, batch_size=16, mesh=jax.make_mesh((4,), ("data",)))
    with pytest.raises(InputError, match="one number on a mesh"):
        go(toy.apply, PARAMS, DATA, objective=lambda m, d, b, r: jnp.mean(jnp.abs(m(b.inputs) - d(b.inputs))))
    with pytest.raises(InputError, match=r"labels from 0 to 2, got 0 to 7"):
        go(toy.apply, PARAMS, (DATA[0], np.where(np.arange(len(DATA[1])) == 0, 7, 0)))
    with pytest.raises(InputError, match="batch statistics over the mesh"):
        go(lambda params, x: toy.apply(params, x - x.mean(0)), PARAMS, DATA)


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

        gradients.append(jax.jit(jax.grad(value))(jax.tree.map(lambda v: jnp.full(v.shape, -2.0), drawn)))
    assert np.allclose(gradients[0]["l0/kernel"][:, order], gradients[1]["l0/kernel"], atol=1e-6)
    assert np.allclose(gradients[0]["l1/kernel"][order], gradients[1]["l1/kernel"], atol=1e-6)
    assert np.allclose(gradients[0]["l2/kernel"], gradients[1]["l2/kernel"], atol=1e-6)


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
    assert np.array_equal(jnp.argmax(toy.apply(problem.best.apply(problem.params), x), -1), y)
    assert problem.jaccard(problem.best) == 1
    found = search(toy.apply, problem.params, problem.data, 0.2, problem.objective, epochs=60, batch_size=128)
    right = jnp.mean(jnp.argmax(toy.apply(found.ticket.apply(problem.params), x), -1) == y)
    wrong = found.ticket.shuffle_layers(jax.random.key(1))
    chance = jnp.mean(jnp.argmax(toy.apply(wrong.apply(problem.params), x), -1) == y)
    assert right > 0.7 and right > chance + 0.1


def test_flax_networks_of_both_kinds():
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

    model = Nnx(nnx.Rngs(0))
    from_nnx(model)
    assert not model.drop.deterministic and not model.norm.use_running_average, "the user's module stays as it is"
    module = Linen()
    for apply_fn, params in (
        from_linen(module, module.init(jax.random.key(0), DATA[0]), train=True),
        from_nnx(Nnx(nnx.Rngs(0))),
    ):
        result = search(apply_fn, params, DATA, 0.25, config=SMALL)
        assert result.ticket.kept == kept_count(0.25, result.ticket.total)
        assert all("kernel" in name and "orm" not in name for name in result.ticket.masks)
        assert apply_fn(result.ticket.apply(params), DATA[0]).shape == (64, 3)
    plain, params = from_linen(linen.Dense(3), linen.Dense(3).init(jax.random.key(0), DATA[0]))
    assert plain(params, DATA[0]).shape == (64, 3), "no collection but params"


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


@pytest.mark.parametrize("structure", ["output", "2:4"])
def test_the_inverted_ticket_has_the_structure(structure):
    # a leaf of 8 x 5
    result = run(None if ":" in structure else 0.5, structure=structure, where=lambda name, _: name == "l1/kernel")
    inverted = result.inverted()
    assert 0 < inverted.kept <= result.ticket.kept
    for mask in map(np.asarray, inverted.masks.values()):
        if structure == "output":
            assert (mask.all(0) | ~mask.any(0)).all()
        else:
            assert (mask.T.reshape(-1, 4).sum(1) == 2).all()


def test_cached_logits_stand_for_their_own_inputs_alone():
    def shifted(masked, dense, batch, rng):
        return jnp.mean((masked(batch.inputs + 1) - dense(batch.inputs + 1)) ** 2)

    found = [run(0.3, objective=shifted, epochs=1, cache_dense=how).history["objective"] for how in CACHES[::2]]
    np.testing.assert_array_equal(*found)


def test_densities_of_numpy_and_data_of_lists():
    plain = run([0.1, 0.2], epochs=1)
    arrays = run(np.array([0.1, 0.2]), epochs=1)
    lists = search(toy.apply, PARAMS, [part.tolist() for part in map(np.asarray, DATA)], 0.1, config=SMALL, epochs=1)
    assert [r.ticket.kept for r in plain] == [r.ticket.kept for r in arrays]
    assert lists.ticket.kept == plain[0].ticket.kept == run(np.float32(0.1), epochs=1).ticket.kept
    with pytest.raises(InputError, match="expected epochs to be a whole number of at least 1, got 0"):
        run(0.1, epochs=0)
    with pytest.raises(InputError, match="expected a density, got none"):
        run([])
    with pytest.raises(InputError, match="got True"):
        kept_count(True, 10)
