"""sk and desk: unbiased, with the variance of the table, linear, adjoint, the same everywhere (section 7, 1 to 8).

Every kind is compiled once for each of two sizes: `Drawn.at` gives, for a batch of rounds, R_t of some vectors and
R_t^T of all unit vectors, in float64. Statistical bounds are standard errors: at 4.5 of them a right sketch fails in 1
of 100,000 checks, at 6, where thousands of entries are looked at, in 1 of 100,000 tests.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh, PartitionSpec

from isotone.shared.errors import InputError
from isotone.sketching import hashing
from isotone.sketching.data import quadratic
from isotone.sketching.embedding import measure_embedding
from isotone.sketching.hadamard import fwht, next_size
from isotone.sketching.sketches import KINDS, Sketch, make_sketch, variance
from isotone.sketching.trees import block_seed, tree_sketch

DRAWS, CHUNK = 2000, 250
# at 64 into 16 all scales are powers of two; 50 is padded, and 12 rows are no power of two
SIZES = {64: 16, 50: 12}
CASES = [(kind, d) for kind in KINDS for d in SIZES if d == 64 or kind not in ("sparse", "ams", "identity")]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def whole_numbers(count, d, seed=1):
    """Small ones: their sums are exact whatever the order."""
    return np.random.default_rng(seed).integers(-8, 9, (count, d)).astype(float)


class Drawn:
    """A sketch, and what it makes of the rounds that are asked for."""

    def __init__(self, kind, d, s, seed=3):
        self.sketch = make_sketch(kind, d, s, seed)
        self.kind, self.d, self.s = kind, d, self.sketch.s

        def both(t, rows):
            images = jax.vmap(lambda row: self.sketch.sk(t, row))(rows)
            return images, jax.vmap(lambda row: self.sketch.desk(t, row))(jnp.eye(self.s))

        self._both = jax.jit(lambda rounds, rows: jax.lax.map(lambda t: both(t, rows), rounds))

    def at(self, rounds, x=None):
        """R_t (rounds, s, d), R_t^T (rounds, d, s), and R_t of the four rows of `x` (rounds, 4, s)."""
        rows = np.concatenate([np.eye(self.d), np.zeros((4, self.d)) if x is None else x])
        chunk = np.resize(np.asarray(rounds), CHUNK)
        with jax.enable_x64(True):
            images, back = self._both(jnp.asarray(chunk, jnp.int32), jnp.asarray(rows, jnp.float64))
        images, back = (np.asarray(part)[: len(rounds)] for part in (images, back))
        return np.swapaxes(images[:, : self.d], 1, 2), np.swapaxes(back, 1, 2), images[:, self.d :]

    @functools.cached_property
    def matrices(self):
        """R_0 .. R_{DRAWS - 1}."""
        return np.concatenate([self.at(np.arange(t, t + CHUNK))[0] for t in range(0, DRAWS, CHUNK)])


@functools.cache
def drawn_of(kind, d):
    return Drawn(kind, d, d if kind == "identity" else SIZES[d])


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def drawn(request):
    return drawn_of(*request.param)


def test_unbiased(drawn):
    """The mean of R^T R is I, every entry within 6 standard errors."""
    products = np.einsum("tsi,tsj->tij", drawn.matrices[:1000], drawn.matrices[:1000])
    mean, error = products.mean(0), products.std(0) / math.sqrt(len(products))
    assert (np.abs(mean - np.eye(drawn.d)) <= 6 * error + 1e-12).all()
    if drawn.kind not in ("identity", "rand-k"):
        assert error.max() > 0, "another R in every round"


def test_moment_and_variance_of_the_table(drawn):
    """1 + alpha of a dense and of a sparse vector, and Var(g^T R^T R h), within 4.5 standard errors, which are below
    3 % and 8 %; and no variance above the theory's (2 / s)|g|^2 |h|^2 but that of coordinates, rand-k."""
    g, h = (np.asarray(normal(drawn.d, seed=seed), np.float64) for seed in (1, 2))
    few = np.where(np.arange(drawn.d) < 2, g, 0.0)
    for x in (g, few):
        back = np.einsum("tsi,ts->ti", drawn.matrices, drawn.matrices @ x)
        moments = (back**2).sum(1) / (x @ x)
        error = moments.std() / math.sqrt(DRAWS)
        assert abs(moments.mean() - (1 + drawn.sketch.alpha)) <= 4.5 * error + 1e-5
        assert error < 0.03 * (1 + drawn.sketch.alpha) or x is few
    assert drawn.sketch.eta_g == pytest.approx(1 / (1 + drawn.sketch.alpha))
    if drawn.kind == "srht" and drawn.d != drawn.sketch.padded:
        return  # the formula is for powers of two
    exact = float(variance(drawn.sketch, jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)))
    products = ((drawn.matrices @ g) * (drawn.matrices @ h)).sum(1)
    squares = (products - products.mean()) ** 2
    error = squares.std() / math.sqrt(DRAWS)
    assert abs(squares.mean() - exact) <= 4.5 * error + 1e-9 and error <= 0.08 * exact + 1e-9
    if drawn.kind != "rand-k":
        assert exact <= 2 / drawn.s * (g @ g) * (h @ h)


def test_linear_and_adjoint(drawn):
    """<sk(x), y> = <x, desk(y)> to 1e-12; sk of sums, of whole numbers bit for bit where no scale is rounded."""
    rounds = [0, 1, 7, 2**20, 2**31 - 1]
    x, y = whole_numbers(2, drawn.d)
    matrices, back, images = drawn.at(rounds, np.stack([x, y, x + y, 3 * x - 2 * y]))
    assert np.abs(matrices - np.swapaxes(back, 1, 2)).max() < 1e-12
    v = np.random.default_rng(0).standard_normal((len(rounds), drawn.s))
    left, right = np.einsum("ts,ts->t", images[:, 0], v), np.einsum("d,tds,ts->t", x, back, v)
    assert np.allclose(left, right, rtol=1e-12, atol=1e-12)
    exact = drawn.d == 64 and drawn.kind != "gaussian"
    for found, wanted in (
        (images[:, 2], images[:, 0] + images[:, 1]),
        (images[:, 3], 3 * images[:, 0] - 2 * images[:, 1]),
        (images[:, 0], matrices @ x),
    ):
        assert np.array_equal(found, wanted) if exact else np.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_rounds_are_others(drawn):
    """Of different t, and each always the same whatever else is in the batch."""
    first, again = drawn.at([5, 6, 9])[0], drawn.at([9, 5])[0]
    assert np.array_equal(first[0], again[1]) and np.array_equal(first[2], again[0])
    if drawn.kind == "identity":
        return
    assert not np.allclose(first[0], first[1])
    if drawn.kind != "rand-k":
        # no entry has a sign or a place of its own
        mean, error = drawn.matrices.mean(0), drawn.matrices.std(0) / math.sqrt(DRAWS)
        assert (np.abs(mean) <= 6 * error).all()
    # rounds next to each other are no more alike than others: the correlation of entries, 6 standard errors
    flat = drawn.matrices[:1001].reshape(1001, -1)
    alike = (flat[1:] * flat[:-1]).sum(1) / np.maximum((flat[1:] ** 2).sum(1), 1e-12)
    expected = flat.mean(0) @ flat.mean(0) / (flat**2).sum(1).mean()
    assert abs(alike.mean() - expected) < 6 * alike.std() / math.sqrt(1000) + 0.01


def test_its_shape(drawn):
    """One entry a column, or q; rows that are orthogonal where they are drawn without replacement."""
    matrices, kind, s = drawn.matrices[:50], drawn.kind, drawn.s
    if kind in ("countsketch", "sparse"):
        blocks = 4 if kind == "sparse" else 1
        per_block = (matrices.reshape(50, blocks, s // blocks, drawn.d) != 0).sum(2)
        assert (per_block == 1).all() and np.allclose(np.linalg.norm(matrices, axis=1), 1)
        assert np.allclose(np.unique(np.abs(matrices)), [0, 1 / math.sqrt(blocks)])
        assert 0.4 < (matrices[matrices != 0] > 0).mean() < 0.6
    elif kind == "srht" and drawn.d == drawn.sketch.padded:
        # R R^T = (d / s) I, and R^T R applied twice is d / s times itself
        assert np.allclose(matrices @ np.swapaxes(matrices, 1, 2), drawn.d / s * np.eye(s), atol=1e-12)
        twice = np.swapaxes(matrices, 1, 2) @ matrices
        assert np.allclose(twice @ twice, drawn.d / s * twice, atol=1e-11)
    elif kind == "rand-k":
        assert ((matrices != 0).sum(2) == 1).all() and ((matrices != 0).sum(1) <= 1).all()
    elif kind == "identity":
        assert np.array_equal(matrices, np.broadcast_to(np.eye(drawn.d), matrices.shape))


def test_a_step_descends(drawn):
    """E f(w - eta R^T R grad) <= f(w) - |grad|^2 / (2 (1 + alpha) L) at eta = 1 / ((1 + alpha) L) on a quadratic, 4.5
    standard errors; a step of 2 / L, which gradient descent bears just so, goes up where alpha is above 0."""
    problem = quadratic(drawn.d, 1, 10.0, 0.0)
    matrix, w = np.asarray(problem.matrix, np.float64), np.asarray(normal(drawn.d, seed=4), np.float64)
    slope, value, alpha = matrix @ w, w @ matrix @ w / 2, drawn.sketch.alpha
    back = np.einsum("tsi,ts->ti", drawn.matrices, drawn.matrices @ slope)

    def after(step):
        moved = w - step * back
        found = np.einsum("ti,ti->t", moved @ matrix, moved) / 2
        return found.mean(), found.std() / math.sqrt(len(found))

    mean, error = after(1 / (1 + alpha))
    assert mean <= value - slope @ slope / (2 * (1 + alpha)) + 4.5 * error + 1e-9
    if alpha > 1:
        mean, error = after(2.0)
        assert mean > value + 4.5 * error


def test_one_round_is_flat_and_many_are_not(drawn):
    """With one R all that comes back lies in the s dimensions of its rows; a few rounds fill the space."""
    x = np.random.default_rng(0).standard_normal((4, drawn.d))
    count = -(-4 * drawn.d // drawn.s)
    matrices, back, images = drawn.at(np.arange(count), x)
    there = np.linalg.matrix_rank(matrices[0])
    assert there <= drawn.s
    came = np.einsum("tds,tms->tmd", back, images)
    # the rows of R_0 and what came back through it span no more than the rows alone
    assert np.linalg.matrix_rank(np.concatenate([matrices[0], came[0]])) == there
    assert np.linalg.matrix_rank(came.reshape(-1, drawn.d)) == drawn.d or drawn.kind in ("identity", "rand-k")


@pytest.mark.parametrize(
    "kind,d",
    [("srht", 64), ("countsketch", 50), ("gaussian", 64), ("identity", 64), ("rand-k", 50)],
)
def test_spectral_norm(kind, d):
    """|R_t|_2: exact, or from below by power iterations."""
    drawn = drawn_of(kind, d)
    exact = np.linalg.norm(drawn.matrices[2], 2)
    found = float(jax.jit(drawn.sketch.spectral_norm)(jnp.int32(2)))
    assert found == pytest.approx(exact, rel=2e-2 if kind == "gaussian" else 1e-5)
    assert found <= exact * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["srht", "countsketch", "gaussian"])
def test_alike_alone_in_batches_and_on_several_devices(kind):
    """A Python loop, a scan over rounds, and vmap inside of shard_map over two devices: one R of (seed, t)."""
    sketch, x = make_sketch(kind, 64, 16, 3), normal(4, 64)
    rounds = jnp.arange(7, 11)
    loop = np.einsum("tsi,ti->ts", drawn_of(kind, 64).at(rounds)[0], np.asarray(x, np.float64))
    for t, row, wanted in zip(rounds, x, loop, strict=True):
        assert np.allclose(_sk(sketch, t, row), wanted, atol=1e-5)
    mesh, split = Mesh(np.array(jax.devices()[:2]), ("clients",)), PartitionSpec("clients")
    assert len(jax.devices()) > 1
    each = jax.vmap(sketch.sk)
    spread = jax.shard_map(each, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    assert np.allclose(jax.jit(spread)(rounds, x), loop, atol=1e-5)


_sk = jax.jit(lambda sketch, t, x: sketch.sk(t, x), static_argnums=0)


@pytest.mark.parametrize("kind", ["countsketch", "gaussian"])
def test_another_seed_is_another_sketch(kind):
    """Also one that differs beyond 32 bits."""
    x = normal(64)
    images = [_sk(Sketch(kind, 64, 16, seed), 7, x) for seed in (3, 4, 3 + 2**32)]
    assert not any(np.allclose(images[a], images[b], atol=0.1) for a, b in ((0, 1), (0, 2), (1, 2)))
    matrix = jax.jit(Sketch(kind, 64, 16, 3).matrix)(7)
    assert np.allclose(matrix, drawn_of(kind, 64).at([7])[0][0], atol=1e-6)


@pytest.mark.parametrize("kind", ["identity", "countsketch", "gaussian"])
def test_embeddings_are_the_theorys(kind):
    """Random and coordinate vectors: 1 + alpha within 4 standard errors of 2,000 draws, the constant at most 2."""
    found = measure_embedding(make_sketch(kind, 32, 8), 2000, jax.random.key(0))
    assert abs(found.alpha - found.alpha_theory) <= 4 * found.alpha_error + 1e-6
    assert found.a - 4 * found.a_error <= 2 and found.bias < 4.5


# --- the transform -----------------------------------------------------------------------------------------------


def test_transform_is_the_matrix_s():
    """The butterflies and the definition, whatever the blocks; twice is d times. Float32 loses a few parts in 10^7."""
    sizes, blocks = (0, 1, 2, 5, 7, 11), (1, 3, 5, 8)
    xs = [normal(2, 1 << bits) for bits in sizes]
    every = jax.jit(lambda xs: [[*(fwht(x, block_bits=block) for block in blocks), fwht(fwht(x))] for x in xs])
    for bits, x, (*found, twice) in zip(sizes, xs, every(xs), strict=True):
        wanted = np.stack([reference.fwht(row) for row in np.asarray(x)])
        if bits <= 7:
            assert np.allclose(wanted, np.asarray(x, np.float64) @ reference.hadamard(1 << bits))
        scale = np.abs(wanted).max()
        assert all(np.abs(one - wanted).max() < 1e-6 * scale for one in found)
        assert np.abs(np.asarray(twice) - (1 << bits) * np.asarray(x)).max() < 1e-6 * (1 << bits) * np.abs(x).max()


def test_transform_refuses_other_lengths():
    for d in (0, 3, 6, 11, 44):
        with pytest.raises(ValueError, match="to transform"):
            fwht(jnp.zeros(d))
    assert [next_size(n) for n in (1, 2, 3, 9, 32, 33, 64, 65, 81, 97, 1_050_010)] == [
        *(1, 2, 4, 12, 32, 36, 64, 72, 96, 112, 9 << 17),
    ]
    assert max(next_size(n) / n for n in range(32, 5000)) < 1.2


# --- what R is made of -------------------------------------------------------------------------------------------


def test_permutations_are_permutations():
    sizes = (1, 2, 7, 12, 650, 1000, 9 << 7)

    def all_of(t):
        index = [jnp.arange(n, dtype=jnp.uint32) for n in sizes]
        return [hashing.permuted(hashing.stream(1, t, 3), i, n) for i, n in zip(index, sizes, strict=True)]

    compiled = jax.jit(all_of)
    for n, images, others in zip(sizes, compiled(2), compiled(3), strict=True):
        images, others = np.asarray(images), np.asarray(others)
        assert sorted(images.tolist()) == list(range(n))
        if n > 50:
            assert (images != np.arange(n)).mean() > 0.9 and (images != others).mean() > 0.9


def test_words_are_uniform():
    """Chi-squared over 16 and 10 bins of 20,000 draws, false alarm 1e-4 (44.3 of 15 degrees); means, 5 standard
    errors."""
    index = jnp.arange(20_000, dtype=jnp.uint32)

    @jax.jit
    def draw(t):
        bins = [hashing.below(hashing.stream(0, t, 1), index, n) for n in (16, 10, 2**31 - 1)]
        return bins, hashing.normals(hashing.stream(0, t + 1, 1), index), hashing.signs(hashing.stream(0, t, 2), index)

    (sixteen, ten, large), normals, signs = jax.tree.map(np.asarray, draw(5))
    for n, found in ((16, sixteen), (10, ten)):
        counts = np.bincount(found, minlength=n)
        assert len(counts) == n and ((counts - 20_000 / n) ** 2 / (20_000 / n)).sum() < 44.3
    assert large.min() >= 0 and abs(large.mean() / 2**30 - 1) < 5 / math.sqrt(3 * 20_000)
    assert abs(normals.mean()) < 5 / math.sqrt(20_000) and abs(normals.std() - 1) < 5 / math.sqrt(2 * 20_000)
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 5 / math.sqrt(20_000)


def test_words_are_independent_over_rounds():
    """Of each of the first 64 indices over 4,000 rounds: every bit is as often 1 as 0, and no two indices share any
    (6 standard errors of the 70,000 means). What coordinate 1 gets in one round says nothing of the next."""
    index = jnp.arange(64, dtype=jnp.uint32)
    for purpose in (1, 16):
        draw = jax.jit(jax.vmap(lambda t, p=purpose: hashing.words(hashing.stream(3, t, p), index)))
        bits = np.unpackbits(np.asarray(draw(jnp.arange(4000))).view(np.uint8), axis=1).reshape(4000, 64, 32)
        signs = 2.0 * bits - 1
        error = 6 / math.sqrt(4000)
        assert np.abs(signs.mean(0)).max() < error
        alike = np.einsum("tib,tjb->bij", signs, signs, optimize=True) / 4000 - np.eye(64)
        assert np.abs(alike).max() < error
        assert np.abs((signs[1:] * signs[:-1]).mean(0)).max() < error, "nor of this round's neighbour"


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("fourier", 8, 4), "fourier"),
        (("srht", 8, 0), "got 0"),
        (("srht", 8, -3), "got -3"),
        (("srht", 8, 9), "at most 8"),
        (("srht", 5, 9), "at most 8"),
        (("rand-k", 8, 9), "at most 8"),
        (("sparse", 8, 6), "divide"),
        (("sparse", 8, 6, 0, 0), "q to be"),
        (("identity", 8, 4), "s = d"),
        (("srht", 0, 1), "d to be"),
        (("srht", 2**31, 1), "d to be"),
    ],
)
def test_sketches_that_are_none(arguments, words):
    with pytest.raises(InputError, match=words):
        Sketch(*arguments)


def test_ratios():
    assert make_sketch("srht", 100, ratio=10.0).s == 10 and make_sketch("srht", 3, ratio=10.0).s == 1
    assert make_sketch("sparse", 100, ratio=10.0).s == 8 and make_sketch("identity", 5).s == 5
    for options in ({}, {"s": 3, "ratio": 2.0}, {"ratio": 0.5}, {"ratio": math.nan}):
        with pytest.raises(InputError):
            make_sketch("srht", 10, **options)
    with pytest.raises(InputError, match="got shape"):
        make_sketch("srht", 10, 4).sk(0, jnp.zeros(9))
    with pytest.raises(InputError, match="got shape"):
        make_sketch("srht", 10, 4).desk(0, jnp.zeros(5))


# --- trees -------------------------------------------------------------------------------------------------------

TREE = {"a": jnp.ones((3, 4)), "b": {"w": jnp.zeros(5, jnp.bfloat16), "c": jnp.full((2,), 2.0)}}


@pytest.mark.parametrize("per_leaf", [False, True])
def test_trees(per_leaf):
    sketch = tree_sketch(TREE, "countsketch", ratio=2.0, seed=1, per_leaf=per_leaf)
    assert sketch.d == 19 and len(sketch.blocks) == (3 if per_leaf else 1)
    back = sketch.unflatten(sketch.flatten(TREE))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    x, v = normal(19), normal(sketch.s, seed=1)
    images, spread = jax.jit(lambda t: (sketch.sk(t, x), sketch.desk(t, v)))(4)
    assert float(jnp.vdot(images, v)) == pytest.approx(float(jnp.vdot(x, spread)), rel=1e-4)
    assert sketch.alpha == max(block.alpha for block in sketch.blocks) and sketch.eta_g == 1 / (1 + sketch.alpha)
    if per_leaf:
        assert len({block.seed for block in sketch.blocks}) == 3 and block_seed(1, 0) == 1
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
