"""sk and desk: unbiased, with the variance of the table, linear, adjoint, the same everywhere (section 7, 1 to 8)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.shared.errors import InputError
from isotone.sketching import hashing
from isotone.sketching.hadamard import fwht, next_power
from isotone.sketching.sketches import KINDS, Sketch, make_sketch, variance
from isotone.sketching.trees import block_seed, tree_sketch

RANDOM = [kind for kind in KINDS if kind != "identity"]
DRAWS = 4000


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def sketch_of(kind, d=64, s=16, seed=3):
    return make_sketch(kind, d, None if kind == "identity" else s, seed)


@pytest.mark.parametrize("bits", range(0, 12))
def test_transform_is_the_matrix_s(bits):
    x = normal(2, 1 << bits)
    wanted = np.stack([reference.fwht(row) for row in np.asarray(x)])
    if bits <= 7:
        assert np.allclose(wanted, np.asarray(x) @ reference.hadamard(1 << bits))
    for block in (1, 3, 5, 8):
        assert np.allclose(fwht(x, block), wanted, rtol=1e-4, atol=1e-4)
    assert np.allclose(fwht(fwht(x)), (1 << bits) * np.asarray(x), rtol=1e-4, atol=1e-3)


def test_transform_refuses_other_lengths():
    for d in (0, 3, 12):
        with pytest.raises(ValueError, match="power of two"):
            fwht(jnp.zeros(d))
    assert [next_power(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("d", [64, 50])
def test_unbiased_with_the_variance_of_the_table(kind, d):
    """Means within 5 standard errors in every coordinate (false alarm below 1e-4 over the test), moments within 8 %."""
    sketch = sketch_of(kind, d)
    x = normal(d)
    images = jax.jit(jax.vmap(lambda t: sketch.desk(t, sketch.sk(t, x))))(jnp.arange(DRAWS))
    error = images.std(0) / math.sqrt(DRAWS)
    assert (jnp.abs(images.mean(0) - x) <= 5 * error + 1e-6).all()
    moment = float(jnp.mean(jnp.sum(images**2, 1)) / jnp.sum(x**2))
    assert moment == pytest.approx(1 + sketch.alpha, rel=0.08)
    assert sketch.eta_g == pytest.approx(1 / (1 + sketch.alpha))


@pytest.mark.parametrize("kind", RANDOM)
def test_variance_of_products(kind):
    """Var(g^T R^T R h) within 12 % (the deviation of a variance over 4,000 draws is about 3 %), and below the theory's
    (2 / s)|g|^2 |h|^2 but for the coordinates of rand-k."""
    sketch = sketch_of(kind)
    g, h = normal(64, seed=1), normal(64, seed=2)
    products = jax.jit(jax.vmap(lambda t: jnp.vdot(sketch.sk(t, g), sketch.sk(t, h))))(jnp.arange(DRAWS))
    exact = float(variance(sketch, g, h))
    assert float(products.var()) == pytest.approx(exact, rel=0.12)
    if kind != "rand-k":
        assert exact <= 2 / 16 * float(jnp.sum(g**2) * jnp.sum(h**2))
    assert float(variance(make_sketch("identity", 64), g, h)) == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(d=st.integers(1, 40), seed=st.integers(0, 2**40), t=st.integers(0, 2**20))
def test_linear_and_adjoint(kind, d, seed, t):
    s = d if kind == "identity" else max(4, d // 2 // 4 * 4)
    if kind == "rand-k":
        s = min(s, d)
    if kind == "srht":
        s = min(s, next_power(d))
    sketch = Sketch(kind, d, s, seed)
    # small whole numbers: sums are exact whatever their order
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.integers(-8, 9, d), jnp.float32) for _ in range(2))
    v = normal(s, seed=seed % 2**32)
    assert np.allclose(sketch.sk(t, x) + sketch.sk(t, y), sketch.sk(t, x + y), atol=1e-4)
    left, right = float(jnp.vdot(sketch.sk(t, x), v)), float(jnp.vdot(x, sketch.desk(t, v)))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_seed_and_round_alone(kind):
    sketch, x = sketch_of(kind), normal(64)
    wanted = sketch.sk(7, x)
    assert jnp.allclose(jax.jit(sketch.sk)(jnp.int32(7), x), wanted, atol=1e-6)
    batch = jax.vmap(sketch.sk, (None, 0))(7, jnp.stack([x, 2 * x]))
    assert jnp.allclose(batch[0], wanted, atol=1e-5) and jnp.allclose(batch[1], 2 * wanted, atol=1e-5)
    assert jnp.allclose(sketch.matrix(7) @ x, wanted, atol=1e-4)
    if kind != "identity":
        assert not jnp.allclose(sketch.sk(8, x), wanted)
        assert not jnp.allclose(Sketch(kind, 64, 16, 4).sk(7, x), wanted)


def test_without_replacement_the_rows_are_orthogonal():
    for d, s in ((64, 16), (64, 64), (48, 20)):
        sketch = make_sketch("srht", d, s, 5)
        if d == sketch.padded:
            matrix = np.asarray(sketch.matrix(3), np.float64)
            assert np.allclose(matrix @ matrix.T, d / s * np.eye(s), atol=1e-5)
            twice = matrix.T @ matrix @ matrix.T @ matrix
            assert np.allclose(twice, d / s * matrix.T @ matrix, atol=1e-4)
        assert len(set(np.asarray(sketch._rows(3)).tolist())) == s


@pytest.mark.parametrize("kind", ["srht", "countsketch", "gaussian", "identity", "rand-k"])
def test_spectral_norm(kind):
    sketch = sketch_of(kind)
    exact = np.linalg.norm(np.asarray(sketch.matrix(2)), 2)
    assert float(sketch.spectral_norm(2)) == pytest.approx(exact, rel=1e-2 if kind == "gaussian" else 1e-5)
    assert float(sketch.spectral_norm(2)) <= exact * (1 + 1e-4)


def test_one_entry_a_column():
    matrix = np.asarray(make_sketch("countsketch", 64, 16).matrix(0))
    assert ((matrix != 0).sum(0) == 1).all() and set(np.abs(matrix[matrix != 0])) == {1.0}
    sparse = np.asarray(make_sketch("sparse", 64, 16, q=4).matrix(0))
    assert ((sparse.reshape(4, 4, 64) != 0).sum(1) == 1).all()
    assert np.allclose(np.linalg.norm(sparse, axis=0), 1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000])
def test_permutations_are_permutations(n):
    key = hashing.stream(1, 2, 3)
    images = np.asarray(hashing.permuted(key, jnp.arange(n, dtype=jnp.uint32), n))
    assert sorted(images.tolist()) == list(range(n))
    if n > 50:
        other = np.asarray(hashing.permuted(hashing.stream(1, 3, 3), jnp.arange(n, dtype=jnp.uint32), n))
        assert (images != np.arange(n)).mean() > 0.9 and (images != other).mean() > 0.9


def test_words_are_uniform():
    """Chi-squared over 16 bins of 20,000 draws, false alarm 1e-4 (44.3 of 15 degrees)."""
    index = jnp.arange(20_000, dtype=jnp.uint32)
    for n in (16, 10):
        drawn = np.asarray(hashing.below(hashing.stream(0, 5, 1), index, n))
        counts = np.bincount(drawn, minlength=n)
        assert counts.sum() == 20_000 and ((counts - 20_000 / n) ** 2 / (20_000 / n)).sum() < 44.3
    drawn = np.asarray(hashing.normals(hashing.stream(0, 6, 1), index))
    assert abs(drawn.mean()) < 5 / math.sqrt(20_000) and abs(drawn.std() - 1) < 0.03
    assert abs(np.asarray(hashing.signs(hashing.stream(0, 7, 1), index)).mean()) < 5 / math.sqrt(20_000)
    with_high = hashing.below(hashing.stream(0, 5, 1), index, 2**31 - 1)
    assert int(with_high.min()) >= 0 and int(with_high.max()) > 2**30


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("fourier", 8, 4), "fourier"),
        (("srht", 8, 0), "got 0"),
        (("srht", 8, 9), "at most 8"),
        (("rand-k", 8, 9), "at most 8"),
        (("sparse", 8, 6), "divide"),
        (("identity", 8, 4), "s = d"),
        (("srht", 8, 2.0), "whole number"),
    ],
)
def test_sketches_that_are_none(arguments, words):
    with pytest.raises((InputError, TypeError), match=words):
        Sketch(*arguments)


def test_ratios():
    assert make_sketch("srht", 100, ratio=10.0).s == 10 and make_sketch("srht", 3, ratio=10.0).s == 1
    assert make_sketch("sparse", 100, ratio=10.0).s == 8 and make_sketch("identity", 5).s == 5
    for options in ({}, {"s": 3, "ratio": 2.0}, {"ratio": 0.5}):
        with pytest.raises(InputError):
            make_sketch("srht", 10, **options)
    with pytest.raises(InputError, match="got shape"):
        make_sketch("srht", 10, 4).sk(0, jnp.zeros(9))
    with pytest.raises(InputError, match="got shape"):
        make_sketch("srht", 10, 4).desk(0, jnp.zeros(5))


TREE = {"a": jnp.ones((3, 4)), "b": {"w": jnp.zeros(5, jnp.bfloat16), "c": jnp.full((2,), 2.0)}}


@pytest.mark.parametrize("per_leaf", [False, True])
def test_trees(per_leaf):
    sketch = tree_sketch(TREE, ratio=2.0, seed=1, per_leaf=per_leaf)
    assert sketch.d == 19 and len(sketch.blocks) == (3 if per_leaf else 1)
    back = sketch.unflatten(sketch.flatten(TREE))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    assert all(
        (a == b).all() and a.dtype == b.dtype for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True)
    )
    x, v = normal(19), normal(sketch.s, seed=1)
    assert float(jnp.vdot(sketch.sk(4, x), v)) == pytest.approx(float(jnp.vdot(x, sketch.desk(4, v))), rel=1e-4)
    if per_leaf:
        assert len({block.seed for block in sketch.blocks}) == 3 and block_seed(1, 0) == 1
        assert sketch.alpha == max(block.alpha for block in sketch.blocks)
    for other in ({"a": jnp.ones((3, 4))}, {**TREE, "a": jnp.ones((4, 3))}):
        with pytest.raises(InputError, match="expected a tree"):
            sketch.flatten(other)
    for call in (lambda: sketch.sk(0, x[:-1]), lambda: sketch.desk(0, v[:-1])):
        with pytest.raises(InputError, match="got shape"):
            call()


def test_trees_that_can_not_be_sketched():
    for tree, words in (({}, "leaves"), ({"a": jnp.arange(3)}, "floating"), ({"a": "x"}, "floating")):
        with pytest.raises(InputError, match=words):
            tree_sketch(tree)
    with pytest.raises(InputError, match="got s"):
        tree_sketch(TREE, s=3, per_leaf=True)
