"""Fewer bits and whole numbers: rounding is unbiased, bytes are those of the wire, masks cancel and hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotone.shared.errors import InputError
from isotone.sketching import wire
from isotone.sketching.compressors import Sketched
from isotone.sketching.data import ClientData
from isotone.sketching.federated import fed_algorithm
from isotone.sketching.integer import IntegerCode, IntegerSketch, mask
from isotone.sketching.rounding import RoundedSketch, payload, round_to
from isotone.sketching.sketches import make_sketch
from isotone.sketching.transform import sketch_compress

DRAWS = 4000


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def seeds_of(clients, seed=0):
    """A seed for every pair."""
    rng = np.random.default_rng(seed)
    shared = {(a, b): rng.bytes(32) for a in range(clients) for b in range(a)}
    return [{b: shared[max(a, b), min(a, b)] for b in range(clients) if b != a} for a in range(clients)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_is_unbiased(dtype):
    """Means of 4,000 draws within 5 standard errors in all of 64 numbers: a right rounding fails in 1 of 25,000. The
    nearest value would be off by more."""
    y = normal(64) * jnp.exp(normal(64, seed=1))
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: round_to(dtype, k, y)))(keys), np.float64)
    error = drawn.std(0) / DRAWS**0.5
    assert (np.abs(drawn.mean(0) - np.asarray(y)) <= 5 * error + 1e-6 * np.abs(y)).all()
    width = np.abs(y) * 2**-7 if dtype == "bfloat16" else np.abs(y).max() / 127
    assert (np.abs(drawn - np.asarray(y)) <= width * (1 + 1e-5)).all()
    assert (drawn.std(0) <= width / 2 * 1.1).all() and (drawn.std(0) > 0).sum() > 50
    if dtype == "int8":
        nearest = np.rint(y / width) * width
        assert (np.abs(nearest - y) > 5 * error + 1e-6).mean() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_wire_carries_what_was_rounded(dtype):
    """Nothing more is lost on it, and its bytes are those that are counted."""
    for y in (normal(37), jnp.zeros(5), 1e-30 * normal(4), 1e30 * normal(4)):
        rounded = np.asarray(jax.jit(lambda k, v: round_to(dtype, k, v))(jax.random.key(1), y))
        data = wire.encode(wire.Message("sketch", d=100, values=rounded, dtype=dtype))
        assert np.allclose(wire.decode(data).values, rounded, rtol=3e-7, atol=0)
        assert len(data) == wire.HEADER + payload(dtype, len(y))
    broken = round_to(dtype, jax.random.key(0), jnp.array([1.0, jnp.nan, jnp.inf]))
    assert not jnp.isfinite(broken[1:]).any()


def test_dtypes_that_are_none():
    sketch = make_sketch("srht", 16, 4)
    calls = (
        lambda: RoundedSketch(sketch, "float16"),
        lambda: round_to("int4", jax.random.key(0), jnp.ones(2)),
        lambda: sketch_compress(dtype="int4"),
    )
    for call in calls:
        with pytest.raises(InputError, match="bfloat16, int8"):
            call()


def test_rounded_sketches_are_unbiased():
    """The update over keys is that of the sketch itself, whatever the weights; stragglers count for nothing."""
    sketch, deltas = make_sketch("srht", 32, 16), normal(3, 32)
    weights = jnp.array([0.5, 0.0, 0.5])
    deltas = deltas.at[1].set(jnp.nan)
    wanted = Sketched(sketch).combine(jnp.int32(2), jax.random.key(0), deltas, weights, (), ()).update
    arm = RoundedSketch(sketch, "int8")
    run = jax.jit(jax.vmap(lambda k: arm.combine(jnp.int32(2), k, deltas, weights, (), ()).update))
    drawn = np.asarray(run(jax.random.split(jax.random.key(1), DRAWS)), np.float64)
    assert (np.abs(drawn.mean(0) - np.asarray(wanted)) <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-6).all()
    assert drawn.std(0).min() > 0 and (arm.bytes_up, arm.bytes_down, arm.scale) == (20, 20, sketch.eta_g)


def squares(params, x, y):
    return jnp.mean(jnp.sum((params["w"] - x) ** 2, -1)) / 2


@pytest.mark.parametrize("make", [lambda s: RoundedSketch(s, "int8"), lambda s: IntegerSketch(s, IntegerCode(50.0, 4))])
def test_rounds_with_fewer_bits_converge(make):
    """To within 1 % of where float32 comes, on a quadratic; nothing is clipped."""
    x = normal(4, 3, 16)
    data = ClientData(x, jnp.zeros((4, 3), jnp.int32), jnp.full(4, 3))
    start, sketch = {"w": jnp.zeros(16)}, make_sketch("srht", 16, 8)
    ends = []
    for compressor in (Sketched(sketch), make(sketch)):
        algorithm = fed_algorithm(squares, start, compressor, local_steps=1, batch=0, rate=0.5)
        state = algorithm.init(start, 4)
        step = jax.jit(lambda s, a=algorithm: a.round(s, jax.random.key(0), data)[0])
        for _ in range(60):
            state = step(state)
        ends.append(state)
    best = np.asarray(x).mean((0, 1))
    assert np.linalg.norm(ends[1].params["w"] - best) < np.linalg.norm(ends[0].params["w"] - best) + 1e-2
    if isinstance(algorithm.compressor, IntegerSketch):
        assert int(ends[1].server) == 0 and algorithm.compressor.bytes_up == 32


def test_the_option_of_the_algorithm_and_of_the_transform():
    start = {"w": jnp.zeros(160)}
    algorithm = fed_algorithm(squares, start, ratio=10.0, dtype="bfloat16")
    assert isinstance(algorithm.compressor, RoundedSketch) and algorithm.compressor.bytes_up == 32
    with pytest.raises(InputError, match="compressor"):
        fed_algorithm(squares, start, Sketched(algorithm.tree), dtype="int8")
    code = IntegerSketch(algorithm.tree, IntegerCode(1.0, 4))
    with pytest.raises(InputError, match="weigh"):
        fed_algorithm(squares, start, code, weigh="size")
    with pytest.raises(InputError, match="at most 4"):
        code.init(5)
    x = {"w": normal(160)}
    plain, rounded = (sketch_compress(s=16, dtype=dtype) for dtype in ("float32", "int8"))
    one, two = (jax.jit(tx.update)(x, tx.init(x))[0]["w"] for tx in (plain, rounded))
    assert 0 < jnp.linalg.norm(one - two) < 0.05 * jnp.linalg.norm(one)


# --- whole numbers ------------------------------------------------------------------------------------------------


def test_sums_wrap_and_decode_exactly():
    """Of 1,000 clients at the very bound: the sum of the quantised numbers, to the last step."""
    code = IntegerCode(2.0, 1000)
    assert code.limit * 1000 < 2**31 and code.step == 2.0 / code.limit
    y = jnp.clip(normal(1000, 8), -2, 2).at[:, 0].set(2.0).at[:, 1].set(-2.0)
    words, clipped = jax.jit(jax.vmap(code.encode))(jax.random.split(jax.random.key(0), 1000), y)
    assert int(clipped.sum()) == 0
    steps = np.asarray(words).view(np.int32).astype(np.int64)
    total = np.asarray(words).sum(0, dtype=np.uint32)
    assert np.array_equal(total.view(np.int32), steps.sum(0)) and steps.sum(0)[0] == 1000 * code.limit
    assert np.allclose(code.decode(jnp.asarray(total)), steps.sum(0) * code.step, rtol=1e-6)
    assert np.abs(steps * code.step - np.asarray(y, np.float64)).max() <= code.step * (1 + 1e-3)


def test_quantised_numbers_are_unbiased():
    code = IntegerCode(1.0, 2**29)
    assert code.limit == 3
    y = jnp.linspace(-1, 1, 23)
    drawn = jax.jit(jax.vmap(lambda k: code.decode(code.encode(k, y).words)))(
        jax.random.split(jax.random.key(2), DRAWS)
    )
    drawn = np.asarray(drawn, np.float64)
    assert (np.abs(drawn.mean(0) - np.asarray(y)) <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-6).all()


def test_out_of_range_is_clipped_and_counted_or_refused():
    code, y = IntegerCode(1.0, 10), jnp.array([0.5, 1.5, -7.0, jnp.nan, jnp.inf, 1.0])
    words, clipped = code.encode(jax.random.key(0), y)
    assert int(clipped) == 4
    assert np.allclose(code.decode(words), [0.5, 1, -1, 0, 1, 1], atol=code.step)
    with pytest.raises(InputError, match="got 4 beyond"):
        code.encode_strictly(jax.random.key(0), y)
    assert code.encode_strictly(jax.random.key(0), y[:1]).shape == (1,)
    for bound, clients in ((0.0, 1), (float("nan"), 1), (1.0, 0), (1.0, 2**31)):
        with pytest.raises(InputError):
            IntegerCode(bound, clients)
    arm = IntegerSketch(make_sketch("identity", 6), code)
    found = arm.combine(jnp.int32(0), jax.random.key(0), jnp.stack([y, y]), jnp.array([1.0, 0.0]), (), jnp.int32(3))
    assert int(found.server) == 7 and jnp.isfinite(found.update).all()


def test_masks_cancel_and_one_alone_is_uniform():
    """The server's sum is the unmasked one bit for bit; a masked sketch of zeros has uniform bytes, chi-squared of 255
    degrees below 367: false alarm 5e-6 for each of the four."""
    clients, s, t = 5, 20_000, 7
    code, seeds = IntegerCode(1.0, clients), seeds_of(clients)
    y = jnp.clip(normal(clients, s) / 4, -1, 1).at[0].set(0)
    words = np.stack([code.encode_strictly(jax.random.key(c), row) for c, row in enumerate(y)])
    masked = np.stack([row + mask(seeds[c], c, t, s) for c, row in enumerate(words)])
    assert np.array_equal(masked.sum(0, dtype=np.uint32), words.sum(0, dtype=np.uint32))
    for byte in range(4):
        counts = np.bincount((masked[0] >> (8 * byte)) & 255, minlength=256)
        assert ((counts - s / 256) ** 2 / (s / 256)).sum() < 367
    assert abs(np.corrcoef(masked[1].astype(float), words[1].view(np.int32))[0, 1]) < 5 / s**0.5
    assert not np.array_equal(mask(seeds[0], 0, t, 8), mask(seeds[0], 0, t + 1, 8)), "another mask in every round"
    # one that never sends: the others give away the seeds they share with it
    left = masked[[0, 1, 2, 4]].sum(0, dtype=np.uint32) + mask(seeds[3], 3, t, s)
    assert np.array_equal(left, words[[0, 1, 2, 4]].sum(0, dtype=np.uint32))


def test_masks_that_hide_nothing_are_refused():
    for seeds in ({0: bytes(32)}, {1: bytes(15)}):
        with pytest.raises(InputError, match="seeds of 16 bytes"):
            mask(seeds, 0, 0, 4)
