"""The fast kernels beside their definitions: the transform, CountSketch in blocks, and sums in a fixed order."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from isotone.sketching import bench, blocks, hashing
from isotone.sketching.hadamard import fwht
from isotone.sketching.sketches import Sketch, make_sketch, variance


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("bits", [0, 1, 4, 5, 6, 9])
def test_transform_is_the_dense_matrix(bits):
    """Whole numbers: every sum is exact."""
    x = np.random.default_rng(bits).integers(-8, 9, (3, 1 << bits)).astype(np.float32)
    assert np.array_equal(jax.jit(fwht)(x), x @ reference.hadamard(1 << bits))


@pytest.mark.parametrize("d", [12, 20, 28, 36, 24, 72, 160])
def test_transform_of_other_sizes(d):
    """+-1, rows that are orthogonal, and the transpose: exactly."""
    matrix = np.asarray(jax.jit(fwht)(jnp.eye(d))).T
    assert set(np.unique(matrix)) == {-1, 1}
    assert np.array_equal(matrix @ matrix.T, d * np.eye(d))
    assert np.array_equal(np.asarray(jax.jit(lambda v: fwht(v, transpose=True))(jnp.eye(d))).T, matrix.T)


def test_transform_error_grows_like_the_logarithm():
    """Relative to |H x| the error in float32 stays below log2(d) roundings."""
    for bits in (8, 16):
        x = normal(1 << bits)
        back = np.asarray(jax.jit(lambda v: fwht(fwht(v)))(x), np.float64) / (1 << bits)
        assert np.linalg.norm(back - np.asarray(x)) < 2 * bits * 2**-24 * np.linalg.norm(x)


def test_transform_is_differentiated_twice():
    """Its own transpose, under vmap too: what attacks on sketches need."""
    x = normal(2, 64)
    energy = jax.jit(jax.grad(lambda v: jnp.sum(jax.vmap(fwht)(v) ** 4)))
    hessian = jax.jvp(energy, (x,), (x,))[1]
    assert np.allclose(hessian, 3 * energy(x), rtol=1e-4)


# one block, unequal blocks, more than a word of signs, s above d
SHAPES = [(64, 16), (50, 16), (700, 10), (12, 30), (33, 33)]


@pytest.mark.parametrize(("d", "s"), SHAPES)
def test_blocks_are_what_they_say(d, s):
    sketch, x, y = make_sketch("countsketch-blocks", d, s, 5), normal(d), normal(s, seed=1)
    rows, signs = (np.asarray(part) for part in jax.jit(lambda t: blocks.rows(5, t, d, s))(3))
    matrix = np.zeros((s, d))
    matrix[rows, np.arange(d)] = signs
    assert np.allclose(jax.jit(sketch.sk)(jnp.int32(3), x), matrix @ np.asarray(x), atol=1e-4)
    assert np.allclose(jax.jit(sketch.desk)(jnp.int32(3), y), matrix.T @ np.asarray(y), atol=1e-6)
    count, width = blocks.shape(d, s)
    assert (count - 1) * width < d <= count * width and width <= s
    for number in range(count):
        own = rows[number * width : (number + 1) * width]
        assert len(set(own.tolist())) == len(own), "those of one block never meet"
    if d % s == 0:
        assert np.array_equal(matrix @ matrix.T, d / s * np.eye(s))
    norm = np.linalg.norm(matrix, 2)
    assert float(jax.jit(sketch.spectral_norm)(3)) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("d", "s"), [(64, 16), (50, 16)])
def test_second_moments_of_blocks(d, s):
    """Means over 4,000 draws within 4.5 standard errors of the docstring's: false alarm below 1e-4 in all."""
    sketch, draws = make_sketch("countsketch-blocks", d, s, 1), 4000
    g, h = normal(d, seed=2), jnp.sin(jnp.arange(d) / 3.0)

    @jax.jit
    @jax.vmap
    def drawn(t):
        left, right = sketch.sk(t, g), sketch.sk(t, h)
        return jnp.vdot(left, right), jnp.sum(sketch.desk(t, right) ** 2)

    products, moments = (np.asarray(part, np.float64) for part in drawn(jnp.arange(draws)))

    def off(values, wanted):
        return abs(values.mean() - wanted) / (values.std() / draws**0.5)

    mean = float(jnp.vdot(g, h))
    assert off(products, mean) < 4.5
    assert off((products - mean) ** 2, float(variance(sketch, g, h))) < 4.5
    count, width = blocks.shape(d, s)
    sizes = np.minimum(width, d - width * (np.arange(d) // width))
    exact = float(jnp.sum(h**2) + jnp.sum(h**2 * (d - sizes)) / s)
    assert off(moments, exact) < 4.5
    bound = (1 + sketch.alpha) * float(jnp.sum(h**2))
    assert exact <= bound * (1 + 1e-6) and bound - exact <= d / s**2 * float(jnp.sum(h**2))
    assert sketch.alpha <= make_sketch("countsketch", d, s).alpha
    assert variance(sketch, g, h) <= variance(make_sketch("countsketch", d, s), g, h)


def test_blocks_are_differentiated():
    """As attacks on sketches do: the gradient of |R x - y|^2 is 2 R^T (R x - y)."""
    sketch, x, y = make_sketch("countsketch-blocks", 700, 10, 5), normal(700), normal(10, seed=1)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum((sketch.sk(2, v) - y) ** 2)))(x)
    wanted = jax.jit(lambda v: 2 * sketch.desk(2, sketch.sk(2, v) - y))(x)
    assert np.allclose(gradient, wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["countsketch", "sparse"])
def test_sums_in_order_are_the_sums(kind):
    """Whole numbers give the same bits; others the same up to the order, with rows that nothing falls into."""
    for d, s in ((200, 16), (5, 40)):
        one, two = (jax.jit(Sketch(kind, d, s, 3, ordered=ordered).sk) for ordered in (False, True))
        x = normal(d)
        whole = jnp.round(4 * x)
        assert np.allclose(two(1, x), one(1, x), atol=1e-5)
        assert np.array_equal(two(1, whole), one(1, whole))
        assert "scatter" not in two.lower(1, x).as_text()


def test_every_index_has_signs_of_its_own():
    """Over 2,000 rounds each of 64 indices, and each product of two neighbours, is fair to 5 standard errors: a right
    hash fails in 1 of 10,000."""
    index = jnp.arange(64, dtype=jnp.uint32)
    drawn = np.asarray(jax.jit(jax.vmap(lambda t: hashing.signs(hashing.stream(7, t, 3), index)))(jnp.arange(2000)))
    assert np.abs(drawn.mean(0)).max() < 5 / 2000**0.5
    assert np.abs((drawn[:, 1:] * drawn[:, :-1]).mean(0)).max() < 5 / 2000**0.5


def test_the_kernels_and_the_ledger_in_the_bench():
    """The rows at tiny sizes, in a process of one core where one core is asked for."""
    rows = bench.transform_rows(6, "cpu", 6) + bench.kind_rows(9, "cuda", 6) + bench.ledger_rows()
    rows += bench.peer_rows(10, "cpu", 6, ("countsketch",))
    if importlib.util.find_spec("flwr") is None:
        assert bench.flower_rows(2) == []
    ids = [
        "fwht",
        "fwht-numpy",
        "fwht-core",
        "blocks-scatter",
        "blocks-gather",
        "blocks-desk-copy",
        "bytes-ledger",
        "textbook-scipy",
    ]
    assert [row.id for row in rows] == ids
    assert all(row.ours_value > 0 and row.peer_value > 0 for row in rows)
    assert rows[-2].ratio == 1 and rows[-2].held


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 24, 36, 512, 700])
def test_permutations_are_uniform(n):
    """A permutation in every round; the image of each index fair over 2,000 rounds, chi-squared within 5.5 deviations
    of its degrees."""
    index, rounds = jnp.arange(n, dtype=jnp.uint32), 2000
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda t: hashing.permuted(hashing.stream(1, t, 2), index, n)))(jnp.arange(rounds))
    )
    assert np.array_equal(np.sort(drawn, 1), np.tile(np.arange(n), (rounds, 1)))
    if 2 < n <= 36:
        for column in drawn.T:
            counts = np.bincount(column, minlength=n)
            assert ((counts - rounds / n) ** 2 / (rounds / n)).sum() < n - 1 + 5.5 * (2 * n - 2) ** 0.5
