"""The trainer: orders alone, every objective, replay, memo, saving, resuming."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from isotone.opgfn.config import OBJECTIVES, TrainConfig
from isotone.opgfn.envs import Bag, HyperGrid, MOOGrid, StringEnv
from isotone.opgfn.exact import StateGraph, mass_on
from isotone.opgfn.gflownet import GFlowNet, default_policy
from isotone.opgfn.memo import Memo
from isotone.opgfn.pareto import non_dominated_mask
from isotone.opgfn.policies import MLPPolicy, SetPolicy
from isotone.opgfn.replay import ReplayBuffer, ReplayConfig
from isotone.shared.errors import InputError

PRT = ReplayConfig("prioritized", offline=16)


def weights(gfn: GFlowNet) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in gfn.policy.parameters()])


def test_a_small_front_is_found_by_order_alone() -> None:
    env = MOOGrid(("branin", "currin"), side=12)
    gfn = GFlowNet(env, config=TrainConfig(lr=1e-2, batch_size=64))
    front = non_dominated_mask(env.objective(gfn.graph.states))
    before = mass_on(gfn.terminal_distribution(), front)
    gfn.fit(steps=150)
    after = mass_on(gfn.terminal_distribution(), front)
    assert after > 0.7 > 3 * before
    found = gfn.candidates(200)
    assert len(found.states) == len(torch.unique(found.states, dim=0))
    ranks = non_dominated_mask(env.objective(found.states)).long()
    assert (ranks.diff() <= 0).all(), "non-dominated ones come first"


@pytest.mark.parametrize("transform", ["cube", "rank"])
def test_training_sees_the_order_only(transform: str) -> None:
    """The whole run, replay included, is the same bit for bit for u, u^3 and rank(u), and for any R_0."""

    def run(function) -> torch.Tensor:
        env = HyperGrid(2, 8, r0=0.1)
        return weights(GFlowNet(env, config=TrainConfig(batch_size=16), replay=PRT).fit(function, steps=15))

    plain = HyperGrid(2, 8, r0=0.1).objective
    table = {round(float(v), 9): i for i, v in enumerate(torch.unique(plain(StateGraph(HyperGrid(2, 8)).states)))}
    other = {
        "cube": lambda states: plain(states) ** 3,
        "rank": lambda states: [table[round(float(v), 9)] for v in plain(states)],
    }[transform]
    assert torch.equal(run(plain), run(other))
    assert torch.equal(run(plain), run(HyperGrid(2, 8, r0=0.001).objective))
    assert not torch.equal(run(plain), run(lambda states: -plain(states)))


def test_comparisons_without_values_train_the_same() -> None:
    env = MOOGrid(("branin", "currin"), side=8)

    def better(states: torch.Tensor) -> np.ndarray:
        u = env.objective(states).numpy()
        return (u[:, None] >= u[None]).all(2) & (u[:, None] > u[None]).any(2)

    config = TrainConfig(batch_size=32, label="pareto")
    by_order = GFlowNet(env, config=config).fit(order_fn=better, steps=20)
    by_value = GFlowNet(env, config=config).fit(steps=20)
    assert torch.equal(weights(by_order), weights(by_value))
    assert by_order.memo is None
    with pytest.raises(ValueError, match="order_fn alone"):
        GFlowNet(env, objective="tb").fit(order_fn=better)
    with pytest.raises(ValueError, match=r"\(32, 32\), got \(2, 2\)"):
        GFlowNet(env, config=config).fit(order_fn=lambda states: np.zeros((2, 2)), steps=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("table", [True, False])
def test_every_objective_trains(objective: str, table: bool) -> None:
    env = MOOGrid(("branin", "currin"), side=6)
    config = TrainConfig(objective=objective, batch_size=16, lr=3e-3, lr_log_z=1e-2)
    if table and config.kind in ("pc", "gc"):
        with pytest.raises(ValueError, match="no table"):
            GFlowNet(env, config=config, table=True)
        return
    gfn = GFlowNet(env, config=config, replay=ReplayConfig("uniform", warmup=20), table=table)
    start = weights(gfn).clone()
    gfn.fit(steps=6)
    assert len(gfn.history) == 6 and all(np.isfinite(gfn.history))
    assert not torch.equal(weights(gfn), start)
    drawn = gfn.sample(9, temperature=0.7, seed=1)
    assert drawn.states.shape == (9, 2) and drawn.log_reward.isfinite().all()
    assert (gfn.log_z.value == 0).item() is (config.kind == "op" or config.family not in ("tb",))


def test_table_and_steps_train_alike() -> None:
    env = HyperGrid(2, 6)
    config = TrainConfig(batch_size=32, objective="op-subtb", lambda_kl=0.1)
    runs = [GFlowNet(env, config=config, replay=PRT, table=table).fit(steps=5) for table in (True, False)]
    # the scale of all flows is a gauge, with no gradient but rounding, which Adam blows up: it is not compared
    states = runs[0].graph.states
    ours, theirs = (run.policy(states) for run in runs)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert torch.allclose(ours.backward_logits, theirs.backward_logits, atol=1e-5)
    assert torch.allclose(ours.log_flow.diff(), theirs.log_flow.diff(), atol=1e-5)
    assert runs[0].history == pytest.approx(runs[1].history, abs=1e-5)


@pytest.mark.parametrize("label", ["all-pairs", "pareto", "buffer", "rank", "bce", "pair-balanced"])
def test_every_label_trains(label: str) -> None:
    env = MOOGrid(("branin", "currin"), side=6)
    gfn = GFlowNet(env, config=TrainConfig(label=label, batch_size=32, lr=1e-2)).fit(steps=40)
    front = non_dominated_mask(env.objective(gfn.graph.states))
    uniform = GFlowNet(env, config=TrainConfig(seed=0))
    assert mass_on(gfn.terminal_distribution(), front) > mass_on(uniform.terminal_distribution(), front)


def test_pc_gfn_follows_its_preference() -> None:
    """Conditioned on one objective alone, what is drawn is better at it than when conditioned on the other."""
    env = MOOGrid(("branin", "currin"), side=8)
    gfn = GFlowNet(env, config=TrainConfig(objective="pc-tb", beta=8.0, lr=5e-3, batch_size=64)).fit(steps=150)
    means = []
    for w in ([1.0, 0.0], [0.0, 1.0]):
        raw = torch.tensor([[*w, 8.0]], dtype=torch.float64).repeat(256, 1)
        means.append(env.objective(gfn.sample(256, condition=raw, seed=0).states).mean(0))
    assert means[0][0] > means[1][0] and means[1][1] > means[0][1]


def test_ema_updates_and_augmentation() -> None:
    env = HyperGrid(2, 6)
    config = TrainConfig(batch_size=16, ema=0.95, updates=3, lambda_kl=0.1, lr_half_life=10, weight_decay=1e-4)
    gfn = GFlowNet(env, config=config, replay=ReplayConfig("prioritized", offline=8, augment=2)).fit(steps=4)
    assert gfn.optimizer.state_dict()["state"][0]["step"] == 4 * (3 + 2)
    slow = torch.cat([p.detach().flatten() for p in gfn.sampling_policy.parameters()])
    fresh = weights(GFlowNet(env, config=config))
    assert 0 < (slow - fresh).norm() < (weights(gfn) - fresh).norm()


def test_memo_asks_once_for_each_object() -> None:
    asked = []

    def objective(objects: list[str]) -> list[float]:
        asked.extend(objects)
        return [float(len(text)) for text in objects]

    env = StringEnv("ab", 3)
    gfn = GFlowNet(env, config=TrainConfig(batch_size=64)).fit(objective, steps=5)
    assert len(asked) == len(set(asked)) == gfn.memo.evaluations <= 8
    assert gfn.memo.reuse > 0.9
    states, u, valid = gfn.memo.seen()
    assert env.objects(torch.from_numpy(states)) == asked and u[:, 0].tolist() == [3.0] * len(u) and valid.all()


def test_invalid_objects_are_never_evaluated_and_never_win() -> None:
    class Picky(HyperGrid):
        def valid(self, states):
            return states.sum(1) % 2 == 0

    env = Picky(2, 4)
    seen = []

    def objective(states):
        seen.append(states)
        return env.objective(states)

    gfn = GFlowNet(env, config=TrainConfig(batch_size=64, lr=1e-2)).fit(objective, steps=100)
    assert (torch.cat(seen).sum(1) % 2 == 0).all()
    odd = gfn.graph.states.sum(1) % 2 == 1
    assert mass_on(gfn.terminal_distribution(), odd) < 0.05
    assert (gfn.buffer.archive.payload.sum(1) % 2 == 0).all()
    all_bad = Memo(env, objective)(torch.tensor([[0, 1]]))
    assert not all_bad[1].any()
    tb = GFlowNet(env, config=TrainConfig(objective="tb", batch_size=32)).fit(objective, steps=2)
    assert np.isfinite(tb.history).all()


# --- replay -------------------------------------------------------------------------------------------------


def test_buffer_keeps_the_newest_distinct_objects() -> None:
    buffer = ReplayBuffer(ReplayConfig(capacity=5), 1)
    for start in range(0, 8, 2):
        rows = torch.arange(start, start + 2)[:, None]
        buffer.push(rows, rows.double())
        buffer.push(rows, rows.double())
    assert len(buffer) == 5 and sorted(buffer.states[:5, 0]) == [3, 4, 5, 6, 7]
    buffer.push(torch.tensor([[0]]), torch.tensor([[0.0]]))  # forgotten before, so new again
    assert 0 in buffer.states[:5, 0]


def test_prioritised_draws_are_half_from_the_best_tenth() -> None:
    config = ReplayConfig("prioritized", rest="below")
    buffer = ReplayBuffer(config, 1)
    rows = torch.arange(100)[:, None]
    buffer.push(rows, rows.double())
    drawn = buffer.prioritized(2000, torch.Generator().manual_seed(0))[:, 0]
    assert (drawn[:1000] >= 90).all() and (drawn[1000:] < 90).all()
    assert len(torch.unique(drawn)) == 100
    everything = ReplayBuffer(dataclasses.replace(config, rest="all"), 1)
    everything.push(rows, rows.double())
    assert (everything.prioritized(2000, torch.Generator().manual_seed(0))[1000:] >= 90).any()
    tied = ReplayBuffer(config, 1)
    tied.push(rows, torch.ones(100, 1, dtype=torch.float64))
    assert len(tied.top()) == 100 and len(tied.prioritized(4, torch.Generator())) == 4


def test_uniform_draws_take_their_share_from_the_archive() -> None:
    buffer = ReplayBuffer(ReplayConfig("uniform", pareto_fraction=0.5), 1)
    rows = torch.arange(50)[:, None]
    front = torch.stack([rows[:, 0].double(), torch.zeros(50).double()], 1)
    buffer.push(rows, front)
    drawn = buffer.uniform(40, torch.Generator().manual_seed(0))[:, 0]
    assert (drawn[20:] == 49).all() and len(torch.unique(drawn[:20])) > 5
    assert buffer.top().tolist() == [49]


# --- saving and resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["op-tb", "pc-tb", "op-fl-subtb", "reinforce"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(objective: str, tmp_path) -> None:
    env = MOOGrid(("branin", "currin"), side=6)
    config = TrainConfig(objective=objective, batch_size=16, ema=0.9, lr_half_life=20)
    replay = ReplayConfig("prioritized", offline=8, capacity=25)

    def make() -> GFlowNet:
        return GFlowNet(env, config=config, replay=replay)

    whole = make().fit(steps=14)
    make().fit(steps=9, folder=tmp_path, checkpoint_every=4)
    resumed = make().fit(steps=14, folder=tmp_path, checkpoint_every=4)
    assert torch.equal(weights(whole), weights(resumed)) and whole.history == resumed.history
    assert torch.equal(whole.sample(5).states, resumed.sample(5).states)
    assert whole.memo.evaluations == resumed.memo.evaluations and whole.memo.lookups == resumed.memo.lookups
    other = dataclasses.replace(config, lr=0.5)
    with pytest.raises(InputError, match="lr 0.001, got 0.5"):
        GFlowNet(env, config=other, replay=replay).fit(steps=14, folder=tmp_path)
    elsewhere = MOOGrid(("branin", "beale"), side=6)
    with pytest.raises(InputError, match="branin.*beale"):
        GFlowNet(elsewhere, config=config, replay=replay).fit(steps=14, folder=tmp_path)
    fresh = GFlowNet(env, config=other, replay=replay).fit(steps=2, folder=tmp_path, resume=False)
    assert len(fresh.history) == 2


def test_order_runs_resume_too(tmp_path) -> None:
    env = HyperGrid(2, 5)

    def better(states):
        u = env.objective(states)[:, 0]
        return u[:, None] > u[None]

    config = TrainConfig(batch_size=8)
    make = lambda: GFlowNet(env, config=config, replay=ReplayConfig("uniform", warmup=8))  # noqa: E731
    whole = make().fit(order_fn=better, steps=8)
    make().fit(order_fn=better, steps=5, folder=tmp_path, checkpoint_every=3)
    assert torch.equal(weights(make().fit(order_fn=better, steps=8, folder=tmp_path)), weights(whole))


def test_save_and_load(tmp_path) -> None:
    env = Bag(3, 4)
    gfn = GFlowNet(env, SetPolicy(env, (16, 16)), config=TrainConfig(batch_size=8, ema=0.5)).fit(steps=3)
    gfn.save(tmp_path / "model", {"note": 1})
    again = GFlowNet.load(tmp_path / "model", env, SetPolicy(env, (16, 16)))
    assert torch.equal(weights(gfn), weights(again)) and again.step == 3 and again.get_params() == gfn.get_params()
    assert torch.equal(gfn.sample(6, seed=0).states, again.sample(6, seed=0).states)
    with pytest.raises(InputError, match="weights of this environment"):
        GFlowNet.load(tmp_path / "model", env, SetPolicy(env, (8, 16)))
    with pytest.raises(InputError, match="config.json"):
        GFlowNet.load(tmp_path, env)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="saved GFlowNet"):
        GFlowNet.load(tmp_path / "model", env)


def test_sampling_aside_does_not_disturb_training() -> None:
    env = HyperGrid(2, 5)
    config = TrainConfig(batch_size=8)
    plain = GFlowNet(env, config=config).fit(steps=6)
    watched = GFlowNet(env, config=config)
    seen = []
    watched.fit(steps=6, callbacks=[lambda g, step, loss: seen.append(g.sample(3, seed=step).states)])
    assert torch.equal(weights(plain), weights(watched)) and len(seen) == 6


def test_default_policies_have_the_heads_that_the_loss_needs() -> None:
    env = HyperGrid(2, 4)
    out = default_policy(env, TrainConfig(objective="op-fl-subtb", lambda_kl=0.1))(env.reset(2))
    assert out.backward_logits.shape == (2, 2) and out.log_flow.shape == out.log_inter.shape == (2,)
    bare = default_policy(env, TrainConfig())(env.reset(2))
    assert bare.backward_logits is None and bare.log_flow is None
    clipped = MLPPolicy(env, (8,), logit_clip=0.01, backward=True)(env.reset(1))
    assert clipped.logits.abs().max() <= 0.01 and clipped.backward_logits.abs().max() <= 0.01
    with pytest.raises(ValueError, match=r"\(0,\)"):
        MLPPolicy(env, (0,))
    with pytest.raises(ValueError, match="condition of 3"):
        MLPPolicy(env, (8,), condition_dim=3)(env.reset(1))


def test_another_objective_is_asked_anew() -> None:
    env = MOOGrid(("branin", "currin"), side=6)
    gfn = GFlowNet(env, config=TrainConfig(batch_size=16), replay=ReplayConfig("uniform", warmup=8))
    gfn.fit(steps=3)
    first = gfn.memo
    gfn.fit(steps=6)
    assert gfn.memo is first, "the same objective goes on"

    def one(states: torch.Tensor) -> torch.Tensor:
        return -states.double().sum(1)

    gfn.fit(one, steps=9)
    states, u, _ = gfn.memo.seen()
    assert gfn.memo is not first and u.shape[1] == 1 and np.array_equal(u[:, 0], -states.sum(1).astype(float))
    assert gfn.buffer.u.shape[1] == 1 and gfn.buffer.archive.u.max() <= 0
    gfn.fit(steps=10)
    assert gfn.memo.objective is one, "none given: the one before"


def test_an_order_after_values_is_what_is_trained_on() -> None:
    env = HyperGrid(2, 5)
    asked = []

    def better(states: torch.Tensor) -> np.ndarray:
        asked.append(len(states))
        return np.zeros((len(states), len(states)), bool)

    gfn = GFlowNet(env, config=TrainConfig(batch_size=8)).fit(steps=2)
    gfn.fit(order_fn=better, steps=4)
    assert asked == [8, 8] and gfn.memo is None
    gfn.fit(steps=5)
    assert gfn.memo is not None and gfn.buffer.u.shape[1] == 1
    for replay in (PRT, ReplayConfig("uniform", augment=1), ReplayConfig("uniform", pareto_fraction=0.5)):
        with pytest.raises(ValueError, match="without values"):
            GFlowNet(env, replay=replay).fit(order_fn=better, steps=1)
    with pytest.raises(ValueError, match="booleans"):
        GFlowNet(env, config=TrainConfig(batch_size=8)).fit(order_fn=lambda s: np.full((8, 8), np.nan), steps=1)


def test_measured_values_are_observed() -> None:
    env = StringEnv("ab", 3)
    gfn = GFlowNet(env, config=TrainConfig(batch_size=8), replay=ReplayConfig("offline"), table=False)
    states = gfn.sample(40, seed=0).states
    values = [[float(text.count("a")), 1.0] for text in env.objects(states)]
    u = gfn.observe(states, values=values)
    assert u.tolist() == values and gfn.memo.evaluations == len(torch.unique(states, dim=0))
    gfn.fit(steps=2)
    for bad, words in (([1.0], "for 40 objects"), ([[float("nan")] * 2] * 40, "nan"), ([["x"] * 2] * 40, "numbers")):
        with pytest.raises(ValueError, match=words):
            gfn.observe(states, values=bad)
    with pytest.raises(ValueError, match="got both"):
        gfn.observe(states, lambda xs: xs, values=values)


def test_candidates_ask_for_nothing_unless_they_may() -> None:
    env = MOOGrid(("branin", "currin"), side=12)
    gfn = GFlowNet(env, config=TrainConfig(batch_size=8)).fit(steps=2)
    before = gfn.memo.evaluations
    found = gfn.candidates(100, evaluate=False)
    assert gfn.memo.evaluations == before
    known = [gfn.memo.has(key) for key in env.identities(found.states)]
    assert any(known) and not all(known) and known == sorted(known, reverse=True), "what is known comes first"
    gfn.candidates(100)
    assert gfn.memo.evaluations > before


@pytest.mark.parametrize("label", ["pareto", "buffer", "rank"])
def test_a_full_archive_sees_the_order_only(label: str) -> None:
    """Also where the archive has to leave members out: the run is the same for u and for increasing maps of it."""

    def run(function) -> torch.Tensor:
        env = MOOGrid(("branin", "currin"), side=12)
        replay = ReplayConfig("uniform", warmup=16, pareto_fraction=0.5, archive=5)
        gfn = GFlowNet(env, config=TrainConfig(batch_size=16, label=label), replay=replay).fit(function, steps=25)
        assert len(gfn.buffer.archive) == 5
        return weights(gfn)

    plain = MOOGrid(("branin", "currin"), side=12).objective
    assert torch.equal(run(plain), run(lambda states: plain(states) ** 3))
    assert torch.equal(run(plain), run(lambda states: torch.exp(5 * plain(states))))


def test_a_first_batch_without_a_valid_object() -> None:
    class Late(HyperGrid):
        def valid(self, states):
            return states.sum(1) > 3

    env = Late(2, 6)
    gfn = GFlowNet(env, config=TrainConfig(batch_size=8), replay=ReplayConfig("uniform", warmup=8))
    bad, good = torch.zeros(3, 2, dtype=torch.int64), torch.full((2, 2), 4)
    two = lambda states: torch.stack([states[:, 0].double(), states[:, 1].double()], 1)  # noqa: E731
    gfn.observe(bad, two)
    gfn.observe(good, two)
    assert gfn.buffer.u.shape[1] == 2 and gfn.buffer.valid[:2].tolist() == [False, True]
    gfn.fit(two, steps=4)


@pytest.mark.parametrize("objective", ["op-db", "op-fm", "op-subtb", "op-fl-subtb"])
def test_what_is_learned_of_an_object_is_its_own(objective: str) -> None:
    """But for trajectory balance it does not depend on the way there, at any weights."""
    env = HyperGrid(2, 6)
    gfn = GFlowNet(env, objective=objective, config=TrainConfig(batch_size=16)).fit(steps=2)
    drawn = gfn.sample(400, seed=0)
    keys = env.row_keys(drawn.states)
    for key in keys.unique():
        mine = drawn.log_reward[keys == key]
        assert (mine.max() - mine.min()) < 1e-9
    assert len(keys.unique()) > 10


def test_an_order_sees_only_objects_and_says_who_is_better() -> None:
    class Odd(HyperGrid):
        def valid(self, states: torch.Tensor) -> torch.Tensor:
            return states.sum(1) % 2 == 0

    seen: list[torch.Tensor] = []

    def above(objects: torch.Tensor) -> torch.Tensor:
        seen.append(objects)
        total = objects.sum(1)
        return total[:, None] > total[None]

    GFlowNet(Odd(2, 6), objective="op-tb").fit(order_fn=above, steps=2)
    assert bool((torch.cat(seen).sum(1) % 2 == 0).all())
    with pytest.raises(ValueError, match="> and not >="):
        GFlowNet(HyperGrid(2, 6), objective="op-tb").fit(
            order_fn=lambda o: o.sum(1)[:, None] >= o.sum(1)[None], steps=1
        )
