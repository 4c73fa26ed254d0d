"""Federated rounds: FedAvg where nothing is compressed, the bounds where it is, and clients that fail (section 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from isotone.shared.errors import InputError
from isotone.sketching import data, theory
from isotone.sketching.compressors import (
    QSGD,
    FetchSGD,
    Plain,
    PowerSGD,
    Sketched,
    TopK,
    compressor_of,
    mean,
    told,
    top_k,
)
from isotone.sketching.federated import FedConfig, fed_algorithm, run
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
    state, step = algorithm.init(start(), 4), jax.jit(algorithm.round)
    wanted = np.zeros(16)
    for _ in range(3):
        state, info = step(state, jax.random.key(0), dealt)
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
    """vmapped clients give what one after another do; several rounds are one scan."""
    dealt = points()
    algorithm = fed_algorithm(squares, start(), kind="countsketch", ratio=4.0, local_steps=2, batch=2, rate=0.1)
    state, key = algorithm.init(start(), 4), jax.random.key(3)
    step, local = jax.jit(algorithm.round), jax.jit(algorithm.local)
    one, _ = step(state, key, dealt)
    keys = jax.random.split(jax.random.fold_in(key, 0), 4)
    deltas = [local(state.params, jax.random.fold_in(keys[2], c), dealt, jnp.int32(c))[0]["w"] for c in range(4)]
    matrix = np.asarray(jax.jit(algorithm.compressor.sketch.blocks[0].matrix)(0))
    assert np.allclose(one.params["w"], algorithm.eta_g * matrix.T @ matrix @ np.mean(deltas, 0), atol=1e-5)
    two, _ = step(one, key, dealt)
    three, infos = jax.jit(lambda s: run(algorithm, s, key, dealt, 3))(state)
    two, _ = step(two, key, dealt)
    assert np.allclose(two.params["w"], three.params["w"], atol=1e-6) and infos.loss.shape == (3,)
    assert int(three.round) == 3


def test_who_is_not_heard_counts_for_nothing():
    dealt = points()
    broken = data.ClientData(dealt.x.at[2].set(jnp.nan), dealt.y, dealt.size)
    algorithm = fed_algorithm(squares, start(), kind="identity", local_steps=1, batch=0, rate=0.1)
    step = jax.jit(algorithm.round)
    state, info = step(algorithm.init(start(), 4), jax.random.key(0), broken)
    assert info.heard.tolist() == [True, True, False, True]
    wanted = 0.1 * np.mean([np.asarray(dealt.x[c]).mean(0) for c in (0, 1, 3)], 0)
    assert np.allclose(state.params["w"], wanted, atol=1e-6) and jnp.isfinite(info.loss)
    nobody = data.ClientData(jnp.full_like(dealt.x, jnp.inf), dealt.y, dealt.size)
    state, info = step(algorithm.init(start(), 4), jax.random.key(0), nobody)
    assert not info.heard.any() and (state.params["w"] == 0).all()


def test_participants_and_stragglers():
    dealt = points(clients=6)
    algorithm = fed_algorithm(
        squares, start(), TopK(16, 2, 3), local_steps=1, batch=0, rate=0.1, participants=3, straggle=0.5
    )
    state, key, step = algorithm.init(start(), 6), jax.random.key(0), jax.jit(algorithm.round)
    late = 0
    for _ in range(40):
        before = np.asarray(state.clients)
        state, info = step(state, key, dealt)
        assert len(set(info.taken.tolist())) == 3
        idle = [c for c in range(6) if c not in info.taken.tolist()]
        assert (np.asarray(state.clients)[idle] == before[idle]).all(), "others keep what they had"
        late += int((~np.asarray(info.heard)).sum())
    assert 35 < late < 85, "60 are expected of 120, with a deviation of 5.5: 4.5 of them"
    with pytest.raises(InputError, match="at most 2"):
        algorithm.init(start(), 2)


def test_padding_is_never_counted():
    x = jnp.asarray([[[1.0], [3.0], [100.0]], [[5.0], [5.0], [5.0]]])
    dealt = data.ClientData(x, jnp.zeros((2, 3), jnp.int32), jnp.array([2, 3]))
    algorithm = fed_algorithm(squares, {"w": jnp.zeros(1)}, kind="identity", local_steps=1, batch=0, rate=1.0)
    state, _ = jax.jit(algorithm.round)(algorithm.init({"w": jnp.zeros(1)}, 2), jax.random.key(0), dealt)
    assert float(state.params["w"][0]) == pytest.approx((2 + 5) / 2)
    sized = fed_algorithm(squares, {"w": jnp.zeros(1)}, kind="identity", local_steps=1, batch=0, rate=1.0, weigh="size")
    state, _ = jax.jit(sized.round)(sized.init({"w": jnp.zeros(1)}, 2), jax.random.key(0), dealt)
    assert float(state.params["w"][0]) == pytest.approx((2 * 2 + 3 * 5) / 5)
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = jax.jit(jax.vmap(lambda key: data.batch_of(dealt, key, 0, 4)[0]))(keys)
    assert set(np.ravel(drawn).tolist()) == {1.0, 3.0}


@pytest.mark.parametrize("kind", ["srht", "countsketch", "gaussian"])
def test_convergence_is_inside_the_bound(kind):
    """Strongly convex: the mean gap over 40 runs below the bound at every round (section 2.4); and what the bound
    is."""
    sketch = make_sketch(kind, 16, 4, 0)
    problem = theory.Problem(1.0, 0.1, sketch.alpha)
    rounds = 60

    def descend(seed):
        def step(w, t):
            delta = -problem.step * jnp.mean(QUADRATIC.gradient(w), 0)
            # a run of its own for every seed: other rounds of the same sketch
            moved = w + sketch.desk(t + 1000 * seed, sketch.sk(t + 1000 * seed, delta))
            return moved, QUADRATIC.gap(w)

        return jax.lax.scan(step, jnp.zeros(16), jnp.arange(rounds))[1]

    gaps = jax.jit(jax.vmap(descend))(jnp.arange(40)).mean(0)
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

        return float(QUADRATIC.gap(jax.jit(lambda: jax.lax.scan(move, jnp.zeros(16), jnp.arange(rounds))[0])()))

    begin = float(QUADRATIC.gap(jnp.zeros(16)))
    safe = 1 / (1 + sketch.alpha)
    assert gap_after(safe, True) < 0.05 * begin
    assert not gap_after(1.0, True) < begin
    assert gap_after(safe, False) > 0.3 * begin


@pytest.mark.parametrize("kind", ["countsketch", "srht-replace"])
def test_ordered_sums_are_the_same_without_a_scatter(kind):
    """That of a round's sketch, and that of its desk: no addition whose order a GPU leaves open."""
    pair = [fed_algorithm(squares, start(), kind=kind, ratio=2.0, ordered=o).compressor.sketch for o in (True, False)]
    assert [sketch.blocks[0].ordered for sketch in pair] == [True, False]
    x = jnp.asarray(np.random.default_rng(0).standard_normal(16), jnp.float32)
    there, plain = (lambda v, s=s: s.desk(3, s.sk(3, v)) for s in pair)
    assert np.allclose(jax.jit(there)(x), jax.jit(plain)(x), atol=1e-5)
    scatters = ["scatter" in str(jax.make_jaxpr(function)(x)) for function in (there, plain)]
    assert scatters == [False, True]


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
    sent, combine = jnp.zeros(4), jax.jit(compressor.combine)
    for t in range(12):
        found = combine(jnp.int32(t), jax.random.key(t), deltas, weights, clients, server)
        clients, sent = found.clients, sent + found.update
    # all that was given was sent, or is kept
    assert jnp.allclose(sent + mean(clients, weights), 12 * mean(deltas, weights), atol=1e-4)
    unheard = combine(jnp.int32(0), jax.random.key(0), deltas, jnp.array([1.0, 0.0]), clients, server)
    assert jnp.allclose(unheard.clients[1], clients[1] + deltas[1])
    assert compressor.bytes_up == 8 and compressor.bytes_down == 16
    # down goes one place where all send the same, and after a round in which nobody was heard as much as can be
    alike = combine(jnp.int32(0), jax.random.key(0), deltas, weights, *compressor.init(2)).server
    assert told(compressor, alike) == 8 and told(compressor, compressor.init(2)[1]) == 16


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
    sent, combine = jnp.zeros(35), jax.jit(low.combine)
    for t in range(15):
        found = combine(jnp.int32(t), jax.random.key(t), deltas, weights, clients, server)
        matrix = np.asarray(found.update[:30]).reshape(6, 5)
        assert np.linalg.matrix_rank(matrix, tol=1e-3) <= 1
        clients, server, sent = found.clients, found.server, sent + found.update
    assert jnp.allclose(sent + mean(clients, weights), 15 * mean(deltas, weights), atol=1e-3)


def test_qsgd_is_unbiased_and_of_few_values():
    compressor = QSGD(8, levels=2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(8), jnp.float32)
    keys, quantize = jax.random.split(jax.random.key(0), 4000), jax.jit(compressor.quantize)
    drawn, x = np.asarray(jax.jit(jax.vmap(lambda k: compressor.quantize(k, x)))(keys)), np.asarray(x)
    assert (np.abs(drawn.mean(0) - x) < 5 * drawn.std(0) / 4000**0.5 + 1e-6).all()
    values = np.unique(np.round(np.abs(drawn) / np.linalg.norm(x), 5))
    assert set(values.tolist()) <= {0.0, 0.5, 1.0}
    assert compressor.bytes_up == 3 + 4 and compressor.messages == 1
    moment = float(np.mean(np.sum(drawn**2, 1)) / np.sum(x**2))
    assert 1 < moment <= 1 / compressor.scale + 0.05
    assert not np.asarray(quantize(jax.random.key(0), jnp.zeros(8))).any()
    # each bucket by its own norm: what is small beside a large one is not lost
    apart = QSGD(6, 1, 4)
    found = np.asarray(apart.quantize(jax.random.key(1), jnp.array([300.0, 0.0, 0.0, 400.0, 0.0, -1.0])))
    assert found[5] == -1 and set(np.abs(found[:4])) <= {0.0, 500.0}
    assert apart.bytes_up == 2 + 4 + 8 and apart.messages == 2 and apart.scale == 1 / 3


def test_fetchsgd_finds_what_is_heavy():
    """A vector of five large numbers among a thousand: they come first, at their values."""
    d = 1000
    x = jnp.zeros(d).at[jnp.array([3, 70, 400, 650, 999])].set(jnp.array([9.0, -8.0, 7.0, -6.0, 5.0]))
    x = x + 0.01 * jnp.asarray(np.random.default_rng(0).standard_normal(d), jnp.float32)
    compressor = FetchSGD(d, k=5, columns=200, rows=5, momentum=0.0)
    heavy, states = [3, 70, 400, 650, 999], compressor.init(1)

    @jax.jit
    def all_of(x):
        found = compressor.combine(jnp.int32(0), jax.random.key(0), x[None], jnp.ones(1), *states)
        estimate = compressor.estimate(compressor.sketch(x))
        return top_k(estimate, 5), top_k(x, 5), found.update, compressor.estimate(found.server[1])

    estimated, exact, update, left = (np.asarray(part) for part in all_of(x))
    assert np.allclose(estimated, exact, atol=0.3)
    assert np.flatnonzero(update).tolist() == heavy
    assert np.abs(left[heavy]).max() < 0.5, "what was sent is gone from the error"
    assert compressor.bytes_up == 4 * 1000 and compressor.bytes_down == 40


def test_what_was_sent_down_has_no_momentum_left():
    """Both coordinates are in the one cell that there is, of opposite signs that would cancel."""
    compressor = FetchSGD(2, k=2, columns=1, rows=1, seed=next(s for s in range(64) if _opposite(s)))
    state, combine = compressor.init(1), jax.jit(compressor.combine)
    found = combine(jnp.int32(0), jax.random.key(0), jnp.array([[1.0, 3.0]]), jnp.ones(1), *state)
    assert np.abs(found.update).min() > 0 and not np.asarray(found.server[0]).any()


def _opposite(seed):
    return float(jnp.prod(FetchSGD(2, 1, 1, 1, seed=seed)._hash()[1])) == -1


def test_local_steps_by_another_optimizer():
    """Three steps of Adam, its moments new in every round, as optax makes them by hand."""
    dealt, tx = points(clients=1), optax.adam(0.1)
    algorithm = fed_algorithm(squares, start(), kind="identity", local_steps=3, batch=0, client_opt=tx)
    state, step = algorithm.init(start(), 1), jax.jit(algorithm.round)
    wanted, centre = jnp.zeros(16), np.asarray(dealt.x[0]).mean(0)
    for _ in range(2):
        state, _ = step(state, jax.random.key(0), dealt)
        moments = tx.init(wanted)
        for _ in range(3):
            update, moments = tx.update(wanted - centre, moments)
            wanted = wanted + update
        assert np.allclose(state.params["w"], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(4, 5, 1),
        lambda: FetchSGD(4, 0, 3),
        lambda: FetchSGD(4, 1, 3, momentum=1.0),
        lambda: PowerSGD(((2, 2),), 0),
        lambda: QSGD(4, 0),
        lambda: QSGD(4, 1, 0),
        lambda: compressor_of("pigeons", start()),
        lambda: FedConfig(local_steps=0),
        lambda: FedConfig(rate=float("nan")),
        lambda: FedConfig(straggle=1.0),
        lambda: FedConfig(participants=0),
        lambda: FedConfig(eta_g="large"),
        lambda: FedConfig(weigh="age"),
        lambda: fed_algorithm(squares, start(), Plain(3)),
        lambda: fed_algorithm(squares, start(), Plain(16), one_way=True),
    ],
)
def test_settings_that_mean_nothing(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize(
    "make",
    [lambda params: Sketched(tree_sketch(params, "countsketch", ratio=4.0)), lambda params: TopK(650, 65, 4)],
    ids=["sketch", "top-k"],
)
def test_digits_are_learned_through_a_channel(make):
    digits = data.digits()
    dealt = data.deal(digits.x[:400], digits.y[:400], 4, None)
    model = make_model("linear", (8, 8, 1), 10)
    params = model.init(jax.random.key(0))
    algorithm = fed_algorithm(model.loss, params, make(params), local_steps=5, batch=32, rate=0.5)
    state = algorithm.init(params, 4)
    after, infos = jax.jit(lambda s: run(algorithm, s, jax.random.key(1), dealt, 60))(state)
    before, found = (float(model.accuracy(p, digits.test_x, digits.test_y)) for p in (params, after.params))
    assert found > max(0.7, before + 0.3) and infos.loss[-1] < infos.loss[0]


# --- optax ------------------------------------------------------------------------------------------------------


def test_a_sketched_optimizer_is_the_round_in_one_process():
    params = {"w": jnp.arange(8.0)}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(8), jnp.float32)}
    tx = sketched(optax.sgd(0.5), kind="countsketch", s=4, seed=2)
    state = tx.init(params)
    sketch, update = make_sketch("countsketch", 8, 4, 2), jax.jit(tx.update)
    matrix = jax.jit(sketch.matrix)
    for t in range(3):
        updates, state = update(gradient, state, params)
        wanted = -0.5 * sketch.eta_g * matrix(t).T @ matrix(t) @ gradient["w"]
        assert np.allclose(updates["w"], wanted, atol=1e-5)
    plain = sketch_compress("identity")
    assert jnp.allclose(plain.update(gradient, plain.init(params))[0]["w"], gradient["w"])
    unbiased = sketch_compress("countsketch", s=4, seed=2, scale=1.0)
    found, _ = jax.jit(unbiased.update)(gradient, unbiased.init(params))
    assert np.allclose(found["w"], matrix(0).T @ matrix(0) @ gradient["w"], atol=1e-5)
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
        {"x": np.float32(1), "y": np.zeros(20, int)},
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError):
            data.load(str(path))
    for content in (b"", b"torn"):
        path.write_bytes(content)
        with pytest.raises(InputError):
            data.load(str(path))
    with path.open("wb") as file:
        np.save(file, np.ones((20, 3)))
    for source in (str(path), "nothing.npz", "mnist"):
        with pytest.raises(InputError):
            data.load(source)
    with pytest.raises(InputError, match="condition"):
        data.quadratic(condition=0.5)
