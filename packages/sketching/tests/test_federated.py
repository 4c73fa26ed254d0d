"""Federated rounds: FedAvg where nothing is compressed, the bounds where it is, and clients that fail (section 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from isotone.shared.errors import InputError
from isotone.sketching import data, theory
from isotone.sketching.compressors import QSGD, FetchSGD, Plain, PowerSGD, Sketched, TopK, mean, top_k
from isotone.sketching.federated import FedConfig, fed_algorithm
from isotone.sketching.models import make_model
from isotone.sketching.sketches import make_sketch
from isotone.sketching.transform import sketch_compress, sketched
from isotone.sketching.trees import tree_sketch

QUADRATIC = data.quadratic(d=16, clients=4, spread=0.5)


def squares(params, x, y):
    """|w - x|^2 / 2, mean over the batch: a client's minimum is the mean of its examples."""
    return jnp.mean(jnp.sum((params["w"] - x) ** 2, -1)) / 2


def points(clients=4, most=3, d=16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((clients, most, d)), jnp.float32)
    return data.ClientData(x, jnp.zeros((clients, most), jnp.int32), jnp.full(clients, most))


def start(d=16):
    return {"w": jnp.zeros(d)}


@pytest.mark.parametrize("kind", ["plain", "identity"])
@pytest.mark.parametrize("steps", [1, 3])
def test_identity_is_fedavg(kind, steps):
    dealt = points()
    compressor = Plain(16) if kind == "plain" else None
    algorithm = fed_algorithm(squares, start(), compressor, kind="identity", local_steps=steps, batch=0, rate=0.1)
    state = algorithm.init(start(), 4)
    wanted = np.zeros(16)
    for _ in range(3):
        state, info = algorithm.round(state, jax.random.key(0), dealt)
        gradients = [lambda u, c=c: u - np.asarray(dealt.x[c]).mean(0) for c in range(4)]
        wanted = reference.fed_avg(wanted, gradients, steps, 0.1)
        assert np.allclose(state.params["w"], wanted, atol=1e-5)
    assert int(state.round) == 3 and info.heard.all()


def test_one_client_and_one_step_is_sgd():
    dealt = points(clients=1)
    algorithm = fed_algorithm(squares, start(), kind="identity", local_steps=1, batch=0, rate=0.2)
    state, _ = algorithm.round(algorithm.init(start(), 1), jax.random.key(0), dealt)
    assert np.allclose(state.params["w"], 0.2 * np.asarray(dealt.x[0]).mean(0), atol=1e-6)


def test_a_round_is_the_loop_over_clients():
    """vmapped clients, jitted or not, give what one after another do."""
    dealt = points()
    algorithm = fed_algorithm(squares, start(), ratio=4.0, local_steps=2, batch=2, rate=0.1)
    state, key = algorithm.init(start(), 4), jax.random.key(3)
    one, _ = algorithm.round(state, key, dealt)
    two, _ = jax.jit(algorithm.round)(state, key, dealt)
    assert np.allclose(one.params["w"], two.params["w"], atol=1e-6)
    keys = jax.random.split(jax.random.fold_in(key, 0), 4)
    deltas = [
        algorithm.local(state.params, jax.random.fold_in(keys[2], c), dealt, jnp.int32(c))[0]["w"] for c in range(4)
    ]
    sketch = algorithm.compressor.sketch
    wanted = algorithm.eta_g * sketch.desk(0, sum(sketch.sk(0, delta) for delta in deltas) / 4)
    assert np.allclose(one.params["w"], wanted, atol=1e-5)


def test_who_is_not_heard_counts_for_nothing():
    dealt = points()
    broken = data.ClientData(dealt.x.at[2].set(jnp.nan), dealt.y, dealt.size)
    algorithm = fed_algorithm(squares, start(), kind="identity", local_steps=1, batch=0, rate=0.1)
    state, info = algorithm.round(algorithm.init(start(), 4), jax.random.key(0), broken)
    assert info.heard.tolist() == [True, True, False, True]
    wanted = 0.1 * np.mean([np.asarray(dealt.x[c]).mean(0) for c in (0, 1, 3)], 0)
    assert np.allclose(state.params["w"], wanted, atol=1e-6) and jnp.isfinite(info.loss)
    nobody = data.ClientData(jnp.full_like(dealt.x, jnp.inf), dealt.y, dealt.size)
    state, info = algorithm.round(algorithm.init(start(), 4), jax.random.key(0), nobody)
    assert not info.heard.any() and (state.params["w"] == 0).all()


def test_participants_and_stragglers():
    dealt = points(clients=6)
    algorithm = fed_algorithm(
        squares, start(), TopK(16, 2, 3), local_steps=1, batch=0, rate=0.1, participants=3, straggle=0.5
    )
    state, key = algorithm.init(start(), 6), jax.random.key(0)
    late = 0
    for _ in range(40):
        before = state.clients
        state, info = algorithm.round(state, key, dealt)
        assert len(set(info.taken.tolist())) == 3
        idle = [c for c in range(6) if c not in info.taken.tolist()]
        assert (state.clients[jnp.array(idle)] == before[jnp.array(idle)]).all(), "others keep what they had"
        late += int((~info.heard).sum())
    assert 35 < late < 85, "60 are expected of 120, with a deviation of 5.5"
    with pytest.raises(InputError, match="at most 2"):
        algorithm.init(start(), 2)


def test_padding_is_never_counted():
    x = jnp.asarray([[[1.0], [3.0], [100.0]], [[5.0], [5.0], [5.0]]])
    dealt = data.ClientData(x, jnp.zeros((2, 3), jnp.int32), jnp.array([2, 3]))
    algorithm = fed_algorithm(squares, {"w": jnp.zeros(1)}, kind="identity", local_steps=1, batch=0, rate=1.0)
    state, _ = algorithm.round(algorithm.init({"w": jnp.zeros(1)}, 2), jax.random.key(0), dealt)
    assert float(state.params["w"][0]) == pytest.approx((2 + 5) / 2)
    sized = fed_algorithm(squares, {"w": jnp.zeros(1)}, kind="identity", local_steps=1, batch=0, rate=1.0, weigh="size")
    state, _ = sized.round(sized.init({"w": jnp.zeros(1)}, 2), jax.random.key(0), dealt)
    assert float(state.params["w"][0]) == pytest.approx((2 * 2 + 3 * 5) / 5)
    drawn = {float(data.batch_of(dealt, jax.random.key(k), 0, 4)[0].max()) for k in range(20)}
    assert drawn <= {1.0, 3.0}


@pytest.mark.parametrize("kind", ["srht", "countsketch", "gaussian"])
def test_convergence_is_inside_the_bound(kind):
    """Strongly convex: the mean gap over 40 runs below the bound at every round (section 2.4); and what the bound
    is."""
    sketch = make_sketch(kind, 16, 4, 0)
    problem = theory.Problem(1.0, 0.1, sketch.alpha)
    rounds = 60

    def run(seed):
        def step(w, t):
            delta = -problem.step * jnp.mean(QUADRATIC.gradient(w), 0)
            # a run of its own for every seed: other rounds of the same sketch
            moved = w + sketch.desk(t + 1000 * seed, sketch.sk(t + 1000 * seed, delta))
            return moved, QUADRATIC.gap(w)

        return jax.lax.scan(step, jnp.zeros(16), jnp.arange(rounds))[1]

    gaps = jax.jit(jax.vmap(run))(jnp.arange(40)).mean(0)
    bound = np.array([problem.strongly_convex_bound(float(gaps[0]), t) for t in range(rounds)])
    assert (np.asarray(gaps) <= bound * 1.02).all() and gaps[-1] < 0.9 * gaps[0]


def test_a_step_that_is_not_shrunk_diverges_and_a_fixed_sketch_stalls():
    """The two pitfalls of section 2.4, which `eta_g` and fresh rounds are for."""
    sketch = make_sketch("countsketch", 16, 2, 0)

    def gap_after(step, fresh, rounds=400):
        def move(w, t):
            r = t if fresh else 0
            delta = -step * jnp.mean(QUADRATIC.gradient(w), 0)
            return w + sketch.desk(r, sketch.sk(r, delta)), None

        return float(QUADRATIC.gap(jax.lax.scan(move, jnp.zeros(16), jnp.arange(rounds))[0]))

    begin = float(QUADRATIC.gap(jnp.zeros(16)))
    safe = 1 / (1 + sketch.alpha)
    assert gap_after(safe, True) < 0.05 * begin
    assert not gap_after(1.0, True) < begin
    assert gap_after(safe, False) > 0.3 * begin


def test_theory():
    problem = theory.Problem(2.0, 0.5, 3.0)
    assert problem.step == pytest.approx(1 / 8) and problem.convex_step == pytest.approx(1 / 16)
    assert problem.local_step(5) == pytest.approx(1 / (8 * 4 * 2 * 5))
    assert problem.strongly_convex_bound(1.0, 1) == pytest.approx(1 - 0.5 / 8)
    assert problem.convex_bound(3.0, 6) == pytest.approx(2 * 4 * 2 * 3 / 6)
    assert problem.nonconvex_bound(3.0, 6) == pytest.approx(2 * 4 * 2 * 3 / 6)
    rounds = theory.rounds_needed(problem, 1.0, 1e-3)
    assert problem.strongly_convex_bound(1.0, rounds) <= 1e-3 < problem.strongly_convex_bound(1.0, rounds - 1)
    sketch = make_sketch("countsketch", 1000, 100)
    assert theory.total_ratio(1000, 100, sketch.alpha) == pytest.approx((100 + 999) / 1000)
    for call in (
        lambda: theory.Problem(0.0),
        lambda: theory.Problem(1.0, 2.0),
        lambda: theory.Problem(1.0, 0.1, -1.0),
        lambda: problem.local_step(0),
        lambda: theory.rounds_needed(problem, 1.0, 2.0),
        lambda: theory.rounds_needed(theory.Problem(1.0), 1.0, 0.5),
    ):
        with pytest.raises(InputError):
            call()


# --- what else travels ------------------------------------------------------------------------------------------


def test_top_k_with_error_feedback_loses_nothing():
    x = jnp.array([3.0, -5.0, 0.5, 1.0])
    assert top_k(x, 2).tolist() == [3.0, -5.0, 0.0, 0.0]
    compressor = TopK(4, 1, 2)
    clients, server = compressor.init(2)
    deltas = jnp.stack([x, 2 * x])
    weights = jnp.array([0.5, 0.5])
    sent = jnp.zeros(4)
    for t in range(12):
        found = compressor.combine(jnp.int32(t), jax.random.key(t), deltas, weights, clients, server)
        clients, sent = found.clients, sent + found.update
    # all that was given was sent, or is kept
    assert jnp.allclose(sent + mean(clients, weights), 12 * mean(deltas, weights), atol=1e-4)
    unheard = compressor.combine(jnp.int32(0), jax.random.key(0), deltas, jnp.array([1.0, 0.0]), clients, server)
    assert jnp.allclose(unheard.clients[1], clients[1] + deltas[1])
    assert compressor.bytes_up == 8 and compressor.bytes_down == 16


def test_powersgd_of_full_rank_is_exact_and_loses_nothing():
    shapes = ((6, 5), (5,))
    rng = np.random.default_rng(0)
    deltas = jnp.asarray(rng.standard_normal((3, 35)), jnp.float32)
    weights = jnp.full(3, 1 / 3)
    exact = PowerSGD(shapes, rank=5)
    assert exact.d == 35 and exact.bytes_up == 4 * 35, "a rank that saves nothing sends all"
    low = PowerSGD(shapes, rank=1)
    assert low.bytes_up == 4 * (11 + 5)
    clients, server = low.init(3)
    sent = jnp.zeros(35)
    for t in range(15):
        found = low.combine(jnp.int32(t), jax.random.key(t), deltas, weights, clients, server)
        matrix = np.asarray(found.update[:30]).reshape(6, 5)
        assert np.linalg.matrix_rank(matrix, tol=1e-3) <= 1
        clients, server, sent = found.clients, found.server, sent + found.update
    assert jnp.allclose(sent + mean(clients, weights), 15 * mean(deltas, weights), atol=1e-3)


def test_qsgd_is_unbiased_and_of_few_values():
    compressor = QSGD(8, levels=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(8), jnp.float32)
    drawn = jax.vmap(lambda k: compressor.quantize(k, x))(jax.random.split(jax.random.key(0), 4000))
    assert (jnp.abs(drawn.mean(0) - x) < 5 * drawn.std(0) / 4000**0.5 + 1e-6).all()
    values = np.unique(np.round(np.abs(np.asarray(drawn)) / float(jnp.linalg.norm(x)), 5))
    assert set(values.tolist()) <= {0.0, 0.5, 1.0}
    assert compressor.bits == 3 and compressor.bytes_up == 3 + 4
    moment = float(jnp.mean(jnp.sum(drawn**2, 1)) / jnp.sum(x**2))
    assert 1 < moment <= 1 / compressor.scale + 0.05
    assert (compressor.quantize(jax.random.key(0), jnp.zeros(8)) == 0).all()


def test_fetchsgd_finds_what_is_heavy():
    """A vector of five large numbers among a thousand: they come first, at their values."""
    d = 1000
    x = jnp.zeros(d).at[jnp.array([3, 70, 400, 650, 999])].set(jnp.array([9.0, -8.0, 7.0, -6.0, 5.0]))
    x = x + 0.01 * jnp.asarray(np.random.default_rng(0).standard_normal(d), jnp.float32)
    compressor = FetchSGD(d, k=5, columns=200, rows=5, momentum=0.0)
    estimate = compressor.estimate(compressor.sketch(x))
    assert jnp.allclose(top_k(estimate, 5), top_k(x, 5), atol=0.3)
    found = compressor.combine(jnp.int32(0), jax.random.key(0), x[None], jnp.ones(1), *compressor.init(1))
    assert set(jnp.flatnonzero(found.update).tolist()) == {3, 70, 400, 650, 999}
    # what was sent is gone from the error
    left = compressor.estimate(found.server[1])
    assert float(jnp.abs(left[jnp.array([3, 70, 400, 650, 999])]).max()) < 0.5
    assert compressor.bytes_up == 4 * 1000 and compressor.bytes_down == 40


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(4, 5, 1),
        lambda: FetchSGD(4, 0, 3),
        lambda: FetchSGD(4, 1, 3, momentum=1.0),
        lambda: PowerSGD(((2, 2),), 0),
        lambda: QSGD(4, 0),
        lambda: FedConfig(local_steps=0),
        lambda: FedConfig(rate=float("nan")),
        lambda: FedConfig(straggle=1.0),
        lambda: FedConfig(participants=0),
        lambda: FedConfig(eta_g="large"),
        lambda: FedConfig(weigh="age"),
        lambda: fed_algorithm(squares, start(), Plain(3)),
    ],
)
def test_settings_that_mean_nothing(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("make", [lambda p: Sketched(tree_sketch(p, ratio=4.0)), lambda p: TopK(200, 20, 4)])
def test_digits_are_learned_through_a_channel(make):
    digits = data.digits()
    dealt = data.deal(digits.x[:400], digits.y[:400], 4, None)
    model = make_model("linear", (8, 8, 1), 10)
    params = model.init(jax.random.key(0))
    params = {"w": params["w"][:, :], "b": params["b"]}
    flat = sum(leaf.size for leaf in jax.tree.leaves(params))
    compressor = make(params) if flat == 200 else Sketched(tree_sketch(params, ratio=4.0))
    algorithm = fed_algorithm(model.loss, params, compressor, local_steps=5, batch=32, rate=0.5)
    state, step = algorithm.init(params, 4), jax.jit(algorithm.round)
    before = float(model.accuracy(params, digits.test_x, digits.test_y))
    for _ in range(60):
        state, _ = step(state, jax.random.key(1), dealt)
    assert float(model.accuracy(state.params, digits.test_x, digits.test_y)) > max(0.7, before + 0.3)


# --- optax ------------------------------------------------------------------------------------------------------


def test_a_sketched_optimizer_is_the_round_in_one_process():
    params = {"w": jnp.arange(8.0)}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(8), jnp.float32)}
    tx = sketched(optax.sgd(0.5), kind="countsketch", s=4, seed=2)
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(gradient, state, params)
        sketch = make_sketch("countsketch", 8, 4, 2)
        wanted = -0.5 * sketch.eta_g * sketch.desk(t, sketch.sk(t, gradient["w"]))
        assert jnp.allclose(updates["w"], wanted, atol=1e-6)
    plain = sketch_compress("identity")
    assert jnp.allclose(plain.update(gradient, plain.init(params))[0]["w"], gradient["w"])
    unbiased = sketch_compress(s=4, scale=1.0)
    assert not jnp.allclose(unbiased.update(gradient, unbiased.init(params))[0]["w"], gradient["w"])
    with pytest.raises(InputError, match="floating"):
        tx.init({"w": jnp.arange(3)})


def test_dealing():
    digits = data.digits()
    even = data.deal(digits.x, digits.y, 10, None)
    assert int(even.size.sum()) == 1297 and int(even.size.max() - even.size.min()) <= 1
    skewed = data.deal(digits.x, digits.y, 20, 0.1, seed=1)
    assert int(skewed.size.sum()) == 1297 and int(skewed.size.min()) >= 1
    shares = [np.bincount(np.asarray(skewed.y[c, : int(skewed.size[c])]), minlength=10) for c in range(20)]
    assert np.mean([share.max() / share.sum() for share in shares]) > 0.4, "clients have few classes"
    for clients, concentration in ((0, None), (2000, None), (5, 0.0)):
        with pytest.raises(InputError):
            data.deal(digits.x, digits.y, clients, concentration)


def test_data_of_ones_own(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, x=np.random.rand(20, 3), y=np.arange(20) % 4)
    found = data.load(str(path))
    assert len(found.x) == 16 and len(found.test_x) == 4 and found.classes == 4
    for arrays in (
        {"x": np.ones((20, 3))},
        {"x": np.full((20, 3), np.nan), "y": np.zeros(20, int)},
        {"x": np.ones((20, 3)), "y": np.zeros(20)},
        {"x": np.ones((20, 3)), "y": np.zeros(19, int)},
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError):
            data.load(str(path))
    path.write_bytes(b"torn")
    for source in (str(path), "nothing.npz", "mnist"):
        with pytest.raises(InputError):
            data.load(source)
    with pytest.raises(InputError, match="condition"):
        data.quadratic(condition=0.5)
