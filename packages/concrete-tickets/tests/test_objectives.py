"""Objectives against the equations and finite differences (invariants 5 and 7)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toy

from isotone.concrete_tickets import OBJECTIVES, tempered_kl
from isotone.concrete_tickets.concrete import relaxed_mask
from isotone.concrete_tickets.layout import Layout, masked
from isotone.concrete_tickets.objectives import Batch, Network, resolve_objective
from isotone.shared.errors import InputError


def setting(dtype=jnp.float32):
    params = jax.tree.map(lambda x: x.astype(dtype), toy.params(1))
    x, y = toy.data(12)
    layout = Layout.of(params)
    make = functools.partial(Network, toy.apply, names=layout.names, features_fn=toy.features)
    return params, layout, make, Batch(x.astype(dtype), y)


def value(name, logits, noise, dtype=jnp.float32):
    params, layout, make, batch = setting(dtype)
    objective, _ = resolve_objective(name)
    sparse = make(masked(params, layout.expand(relaxed_mask(logits, noise))))
    return objective(sparse, make(params), batch, jax.random.key(0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_finite_differences(name):
    with jax.enable_x64(True):
        _, layout, _, _ = setting(jnp.float64)
        rng = np.random.default_rng(3)
        logits, noise = rng.normal(size=layout.total), rng.logistic(size=layout.total)
        function = jax.jit(lambda a: value(name, a, jnp.asarray(noise), jnp.float64))
        automatic = np.asarray(jax.grad(function)(jnp.asarray(logits)))
        numeric = reference.finite_difference(lambda a: function(jnp.asarray(a)), logits, 1e-5)
        assert np.linalg.norm(automatic) > 0
        assert np.linalg.norm(automatic - numeric) / np.linalg.norm(numeric) < 1e-6


def test_the_dense_end_and_the_empty_end():
    _, layout, make, batch = setting()
    noise = jnp.zeros(layout.total)
    names = ("kl", "kl_forward", "delta_loss", "feature_mse", "grad_match", "logit_mse")
    dense = jax.jit(lambda logits: {name: value(name, logits, noise) for name in names})
    for name, found in dense(jnp.full(layout.total, 60.0)).items():
        assert abs(float(found)) < 1e-6, name
    params, *_ = setting()
    empty = masked(params, layout.expand(relaxed_mask(jnp.full(layout.total, -200.0), noise)))
    assert all(float(jnp.abs(empty[f"l{i}"]["kernel"]).max()) == 0 for i in range(3))


def test_values_are_the_equations():
    params, layout, make, batch = setting()
    sparse_params = masked(params, {n: jnp.full(s, 0.3) for n, s in zip(layout.names, layout.shapes, strict=True)})
    sparse, dense, rng = make(sparse_params), make(params), jax.random.key(0)
    q, p = (reference.softmax(net(batch.inputs)) for net in (sparse, dense))
    call = jax.jit(lambda: {name: function(sparse, dense, batch, rng) for name, function in OBJECTIVES.items()})()
    call = {name: float(found) for name, found in call.items()}
    assert np.isclose(call["kl"], reference.kl(q, p), rtol=1e-4) and call["kl"] > 0
    assert np.isclose(call["kl_forward"], reference.kl(p, q), rtol=1e-4) and call["kl_forward"] > 0
    assert not np.isclose(call["kl"], call["kl_forward"], rtol=1e-2)
    sparse_ce, dense_ce = (reference.cross_entropy(net(batch.inputs), batch.labels) for net in (sparse, dense))
    assert np.isclose(call["loss"], sparse_ce, rtol=1e-4)
    assert np.isclose(call["delta_loss"], abs(sparse_ce / dense_ce - 1), rtol=1e-3)
    gradients = jax.jit(lambda: [net.weight_gradient(batch) for net in (sparse, dense)])()
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients[0].values()))
    assert np.isclose(call["grad_norm"], -norm, rtol=1e-4)
    pairs = [
        (reference.standardise(a), reference.standardise(b)) for a, b in zip(*map(dict.values, gradients), strict=True)
    ]
    assert np.isclose(call["grad_match"], np.mean([np.mean((a - b) ** 2) for a, b in pairs]), rtol=1e-3)
    layers = []
    for net in (sparse, dense):
        logits, features = net.features(batch.inputs)
        parts = [*features, reference.softmax(logits)]
        layers.append([np.stack([reference.standardise(row) for row in np.asarray(part)]) for part in parts])
    expected = np.mean([np.mean((a - b) ** 2) for a, b in zip(*layers, strict=True)])
    assert np.isclose(call["feature_mse"], expected, rtol=1e-3)
    assert np.isclose(float(tempered_kl(1.0)(sparse, dense, batch, rng)), call["kl"], rtol=1e-5)


def test_two_classes_have_a_closed_form():
    z, w = jnp.array([[0.3, -0.2]]), jnp.array([[1.0, 0.1]])
    nets = [Network(lambda p, x: p, logits, ()) for logits in (z, w)]
    q, p = reference.softmax(z)[0, 0], reference.softmax(w)[0, 0]
    expected = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert np.isclose(float(OBJECTIVES["kl"](*nets, Batch(z, jnp.zeros(1, int)), jax.random.key(0))), expected)


def test_refusals():
    with pytest.raises(InputError, match="kl, kl_forward, loss"):
        resolve_objective("klx")
    with pytest.raises(InputError, match="temperature"):
        tempered_kl(0.0)
    with pytest.raises(InputError, match="features_fn"):
        Network(toy.apply, toy.params(), ()).features(toy.data()[0])
