"""The optax form gives the torch optimizer's updates on the same gradients, compiled, in both storage orders."""

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from isotone.normuon import Muon, NorMuon

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
jax_form = pytest.importorskip("isotone.normuon.jax")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHAPES = {"tall": (9, 6), "wide": (6, 9), "experts": (3, 5, 4), "conv": (6, 3, 3, 3)}
CASES = [
    {},
    {"scale": "original", "axis": "column"},
    {"scale": "spectral", "axis": "auto", "nesterov": False},
    {"scale": "match_rms_adamw", "orthogonalize": "ns5", "cautious": True},
    {"scale": None, "orthogonalize": "svd", "weight_decay": 0.0},
    {"beta2": None, "scale": "original"},
]


def numbers(seed):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def run_torch(options, steps=6):
    options = dict(options)
    kind = Muon if options.pop("beta2", 0.95) is None else NorMuon
    parameters = {name: Parameter(torch.tensor(value)) for name, value in numbers(0).items()}
    optimizer = kind(list(parameters.values()), lr=1e-2, **options)
    for step in range(steps):
        for name, gradient in numbers(step + 1).items():
            parameters[name].grad = torch.tensor(gradient)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def run_optax(options, transposed, steps=6):
    def stored(tree):
        order = {2: (1, 0), 3: (0, 2, 1), 4: (2, 3, 1, 0)}  # flax: (in, out), (batch, in, out), (kh, kw, in, out)
        return {k: jnp.array(v.transpose(order[v.ndim]) if transposed else v) for k, v in tree.items()}

    transform = jax_form.normuon(1e-2, matrices=lambda path, leaf: True, transposed=transposed, **options)
    params = stored(numbers(0))
    state = transform.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, stored(numbers(number + 1)))
    back = {2: (1, 0), 3: (0, 2, 1), 4: (3, 2, 0, 1)}
    return {k: np.asarray(v).transpose(back[v.ndim]) if transposed else np.asarray(v) for k, v in params.items()}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_updates_equal_torch(options):
    expected = run_torch(options)
    for transposed in (False, True) if options in CASES[:2] else (True,):
        got = run_optax(options, transposed)
        for name in expected:
            assert np.abs(got[name] - expected[name]).max() < 5e-5, (name, transposed)


def test_muon_equals_optax_contrib():
    """With beta2 off, the direction is optax.contrib.muon's at the same coefficients."""
    params = {"w": jnp.array(numbers(0)["wide"])}
    ours = jax_form.scale_by_normuon(beta2=None, scale=None, orthogonalize="ns5", nesterov=False, transposed=False)
    theirs = optax.contrib.scale_by_muon(
        beta=0.95, nesterov=False, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(0, 1)}
    )
    states = [ours.init(params), theirs.init(params)]
    for seed in range(5):
        gradients = {"w": jnp.array(numbers(seed)["wide"])}
        (mine, states[0]), (other, states[1]) = (
            transform.update(gradients, state, params) for transform, state in zip((ours, theirs), states, strict=True)
        )
        # optax's eps and bias correction only scale what Newton-Schulz normalises
        assert jnp.abs(mine["w"] - other["w"]).max() < 1e-4


def test_embeddings_and_vectors_take_adamw():
    params = {"embedding": jnp.ones((9, 4)), "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    transform = jax_form.normuon(1e-3, adamw={"learning_rate": 0.5})
    updates, _ = transform.update(gradients, transform.init(params), params)
    assert jnp.allclose(updates["embedding"], -0.5) and jnp.allclose(updates["dense"]["bias"], -0.5)
    rms = jnp.sqrt(jnp.mean((updates["dense"]["kernel"] + 1e-4) ** 2))  # the decay of 1e-3 * 0.1 apart
    assert abs(rms / 2e-4 - 1) < 1e-4


def test_dead_neurons_and_zero_gradients():
    params = {"w": jnp.ones((4, 6))}
    transform = jax_form.scale_by_normuon()
    updates, state = transform.update({"w": jnp.zeros((4, 6))}, transform.init(params))
    assert not updates["w"].any()
    gradient = jnp.array(numbers(0)["wide"]).T[:6].at[:, 2].set(0)  # (in, out): a column is a neuron
    updates, _ = transform.update({"w": gradient}, transform.init({"w": gradient}))
    assert jnp.isfinite(updates["w"]).all() and not updates["w"][:, 2].any() and updates["w"][:, 1].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": "huge"}, "scale"),
        ({"axis": "depth"}, "axis"),
        ({"momentum": 1.0}, "1.0"),
        ({"eps": 0.0}, "eps"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"weight_decay": -1.0}, "-1.0"),
        ({"adamw": {"betas": 1}}, "betas"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError, match=words):
        jax_form.normuon(1e-3, **settings)
    with pytest.raises(ValueError, match="2 dimensions"):
        jax_form.scale_by_normuon().init({"b": jnp.ones(3)})
