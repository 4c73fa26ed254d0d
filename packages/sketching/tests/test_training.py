"""A whole run: its arms, its files, what it refuses, and that it goes on where it was stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from isotone.shared.errors import InputError
from isotone.sketching import sketches, training
from isotone.sketching.ledger import Ledger
from isotone.sketching.models import make_model
from isotone.sketching.training import RunConfig, make_compressor, prepare, train
from isotone.sketching.weights import load_weights, save_weights

SMALL = RunConfig(clients=4, rounds=4, local_steps=2, batch=8, ratio=8.0)
LINEAR = {"w": jax.numpy.zeros((64, 10)), "b": jax.numpy.zeros(10)}


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("params.safetensors", "history.json", "ledger.json")}


class Stop(Exception):
    """A run that ends between two chunks."""


def stopped(config, folder, after, **options):
    """Train until `after` chunks are saved."""
    chunks = []

    def advanced(rounds, loss):
        chunks.append(rounds)
        if len(chunks) == after:
            raise Stop

    with pytest.raises(Stop):
        train(config, folder, advanced=advanced, **options)


@pytest.mark.parametrize("changes", [{"server": "adam", "server_rate": 0.01}, {"noise": 1.0, "sampling": 0.05}])
def test_a_stopped_run_ends_as_the_whole_one(changes, tmp_path):
    """Momentum of the server, error feedback, noise and history come back bit for bit; the last chunk is a short
    one."""
    config = dataclasses.replace(SMALL, rounds=5, participants=3, straggle=0.2, arm="topk", **changes)
    options = {"every": 2, "noise_seed": 3 if config.private else None}
    whole = train(config, tmp_path / "whole", **options)
    stopped(config, tmp_path / "stopped", 2, **options)
    assert not (tmp_path / "stopped" / "params.safetensors").exists()
    resumed = train(config, tmp_path / "stopped", **options)
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")
    assert resumed.history == whole.history and len(whole.history) == 5
    # what is finished is not done again, and a fresh start forgets what was there
    before = files(tmp_path / "stopped")
    train(config, tmp_path / "stopped", advanced=lambda *_: pytest.fail("nothing is left to do"), **options)
    assert files(tmp_path / "stopped") == before
    calls = []
    train(config, tmp_path / "stopped", False, advanced=lambda n, _: calls.append(n), **options)
    assert calls == [2, 2, 1] and files(tmp_path / "stopped") == before


def test_the_ledger_of_top_k_has_what_was_told(tmp_path):
    """Down go the places of the update that are not zero, a place and a number each, or all numbers."""
    config = dataclasses.replace(SMALL, rounds=1, arm="topk", size=3)
    trained = train(config, tmp_path, every=1)
    start = make_model("linear", (8, 8, 1), 10).init(training.run_keys(config.seed)[0])
    moved = sum(int((a != b).sum()) for a, b in zip(trained.params.values(), start.values(), strict=True))
    assert 3 <= moved <= 3 * config.clients
    assert trained.ledger.round_bytes(0) == (24 * config.clients, 8 * moved * config.clients)


def test_what_a_run_writes(tmp_path):
    config = dataclasses.replace(SMALL, participants=3, straggle=0.3, rounds=6)
    trained = train(config, tmp_path, every=3)
    s = prepare(config).algorithm.compressor.sketch.s
    assert s == round(650 / 8)
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    assert [row["accuracy"] is None for row in history] == [True, True, False] * 2
    assert history[-1]["accuracy"] == pytest.approx(trained.accuracy) and all(row["loss"] > 0 for row in history)
    assert any(row["late"] for row in history), "18 draws at 0.3"
    for row in history:
        assert len(row["heard"]) + len(row["late"]) == 3 and not row["rejected"]
        assert row["bytes_up"] == 4 * s * len(row["heard"]) and row["bytes_down"] == 4 * s * 4
    said = json.loads((tmp_path / "ledger.json").read_text())
    assert said["privacy"] is None and said["bytes_up"] == sum(row["bytes_up"] for row in history)
    assert Ledger.from_json(said).total == trained.ledger.total
    assert set(load_file(tmp_path / "params.safetensors")) == {"w", "b"}
    back = load_weights(tmp_path / "params.safetensors", LINEAR)
    assert all(np.array_equal(back[name], trained.params[name]) for name in "wb")


def test_a_private_run_says_what_it_costs(tmp_path):
    config = dataclasses.replace(SMALL, noise=2.0, sampling=0.25, clip=0.5, delta=1e-4, participants=2, rounds=3)
    train(config, tmp_path, every=3)
    said = json.loads((tmp_path / "ledger.json").read_text())["privacy"]
    history = json.loads((tmp_path / "history.json").read_text())["rounds"]
    taken = [client for row in history for client in row["heard"]]
    assert said["rounds"] == max(taken.count(client) for client in range(4)) and said["releases"] == 2 * said["rounds"]
    assert said["noise_multiplier"] == 2.0 and said["clip"] == 0.5 and said["delta"] == 1e-4
    assert 0.1 < said["epsilon_rdp"] < 5 and "one example" in said["adjacency"] and "Poisson" in said["sampling"]
    assert "number of examples is public" in said["adjacency"], "steps are divided by it"
    if said["epsilon_pld"] is not None:
        assert said["epsilon_pld"] <= said["epsilon_rdp"] * 1.001, "losses' distributions are tighter"
    assert all(row["loss"] is None for row in history), "a loss would be a release"
    key = tmp_path / "noise.key"
    assert key.stat().st_mode & 0o077 == 0
    # the noise is its own: the same settings with another key end elsewhere, with this key here
    first = load_file(tmp_path / "params.safetensors")["w"]
    same = train(config, tmp_path / "same", every=3, noise_seed=int(key.read_text(), 16))
    other = train(config, tmp_path / "other", every=3)
    assert np.array_equal(same.params["w"], first) and not np.allclose(other.params["w"], first, atol=1e-3)
    key.unlink()
    with pytest.raises(InputError, match="noise"):
        train(config, tmp_path, every=3)


def test_a_private_run_needs_a_seed_of_its_own():
    """Nothing is drawn from a seed that anybody could guess."""
    private = dataclasses.replace(SMALL, noise=1.0)
    with pytest.raises(InputError, match="seed of a private run's noise"):
        prepare(private)
    assert prepare(private, 3).privacy.noise == 1.0 and prepare(SMALL).privacy is None


def test_sums_are_ordered_where_it_matters(monkeypatch):
    """On a GPU unless told otherwise, elsewhere when asked."""

    def found(**changes):
        config = RunConfig(kind="countsketch", **changes)
        return make_compressor(config, LINEAR).sketch.blocks[0].ordered

    assert found(ordered=True) and not found() and not sketches.on_gpu()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sketches.on_gpu() and found() and not found(ordered=False)
    with jax.default_device(jax.devices("cpu")[0]):
        assert not sketches.on_gpu() and not found()


@pytest.mark.gpu
def test_a_stopped_run_ends_as_the_whole_one_on_a_gpu(tmp_path):  # pragma: no cover - needs a GPU
    """Where sums are ordered, to 1e-4 of the largest weight."""
    config = dataclasses.replace(SMALL, rounds=20, kind="countsketch")
    with jax.default_device(jax.devices("gpu")[0]):
        whole = train(config, tmp_path / "whole", every=5)
        stopped(config, tmp_path / "stopped", 2, every=5)
        resumed = train(config, tmp_path / "stopped", every=5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * np.abs(np.asarray(a)).max()


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, rounds=2)
    train(config, tmp_path, every=2)
    before = files(tmp_path)
    for changed in ({"rate": 0.25}, {"seed": 1}, {"ratio": 4.0}):
        with pytest.raises(InputError, match=f"holds one of {next(iter(changed))}"):
            train(dataclasses.replace(config, **changed), tmp_path, every=2)
    with pytest.raises(InputError, match="checkpoint_every 2"):
        train(config, tmp_path, every=1)
    assert files(tmp_path) == before


def test_other_data_and_torn_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.arange(60) % 3
    path = tmp_path / "mine.npz"
    np.savez(path, x=x, y=y)
    config = dataclasses.replace(SMALL, data=str(path), rounds=6, ratio=2.0, concentration=None)
    whole = train(config, tmp_path / "run", every=2)
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(steps) == 3
    # the newest is torn: the one before it is gone on with, to the same end
    steps[-1].write_bytes(steps[-1].read_bytes()[:-100])
    before = files(tmp_path / "run")
    with pytest.warns(UserWarning, match="torn"):
        again = train(config, tmp_path / "run", every=2)
    assert files(tmp_path / "run") == before and np.array_equal(again.params["w"], whole.params["w"])
    np.savez(path, x=x + 1, y=y)
    with pytest.raises(InputError, match="other data"):
        train(config, tmp_path / "run", every=2)


def test_clients_that_are_not_finite_are_reported(tmp_path, monkeypatch):
    """One client's numbers are broken: the others go on without it. All are: the run stops, and says so."""
    real = training.deal

    def broken(clients):
        def deal(*arguments):
            dealt = real(*arguments)
            return dataclasses.replace(dealt, x=dealt.x.at[np.array(clients)].set(np.nan))

        return deal

    config = dataclasses.replace(SMALL, rounds=2)
    monkeypatch.setattr(training, "deal", broken([2]))
    trained = train(config, tmp_path / "one", every=2)
    assert [row["rejected"] for row in trained.history] == [[2], [2]]
    assert [row["heard"] for row in trained.history] == [[0, 1, 3]] * 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.params))
    assert trained.ledger.client_bytes(2)[0] > 0, "what it sent was sent"
    monkeypatch.setattr(training, "deal", broken(range(4)))
    with pytest.raises(InputError, match="none in round 0"):
        train(config, tmp_path / "all", every=2)
    assert not (tmp_path / "all" / "params.safetensors").exists()


@pytest.mark.parametrize("arm", training.ARMS)
def test_arms_send_what_their_ratio_says(arm):
    params = make_model("mlp", (8, 8, 1), 10).init(jax.random.key(0))
    config = RunConfig(arm=arm, ratio=10.0)
    compressor = make_compressor(config, params)
    assert compressor.d == 2410
    whole = 4 * 2410
    if arm == "plain":
        assert compressor.bytes_up == whole
    else:
        # FetchSGD has five rows of as many columns
        most = whole / 2 if arm == "fetchsgd" else whole / 10
        assert whole / 16 <= compressor.bytes_up <= most, "as near as whole bits and ranks come"
    if arm in ("sketch", "rand-k"):
        assert make_compressor(dataclasses.replace(config, dtype="int8"), params).bytes_up == 4 + 241
    sized = make_compressor(dataclasses.replace(config, size=2), params)
    assert (
        sized.bytes_up
        == {
            **{
                "plain": whole,
                "sketch": 8,
                "rand-k": 8,
                "topk": 16,
                "fetchsgd": 40,
                "qsgd": (3 * 2410 + 7) // 8 + 4 + 4 * 19,
            },
            # two factors of both matrices, and the two biases
            "powersgd": 4 * (2 * (64 + 32) + 2 * (32 + 10) + 32 + 10),
        }[arm]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arm": "gzip"}, "gzip"),
        ({"server": "lion"}, "lion"),
        ({"server_rate": 0.0}, "server rate"),
        ({"clients": 0}, "clients"),
        ({"rounds": 0}, "rounds"),
        ({"ratio": 0.5}, "0.5"),
        ({"ratio": float("inf")}, "inf"),
        ({"size": 0}, "size"),
        ({"seed": -1}, "-1"),
        ({"participants": 21}, "at most 20"),
        ({"epsilon": 1.0, "noise": 1.0}, "both"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"noise": -1.0}, "-1.0"),
        ({"noise": 1.0, "delta": 1.0}, "delta"),
        ({"noise": 1.0, "sampling": 0.0}, "sampling"),
        ({"rate": float("nan")}, "nan"),
        ({"local_steps": 0}, "local_steps"),
        ({"straggle": 1.0}, "straggle"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "int8", "arm": "topk"}, "topk"),
    ],
)
def test_settings_that_mean_nothing(changes, words):
    with pytest.raises(InputError, match=words):
        RunConfig(**changes)


def test_sizes_that_do_not_fit():
    with pytest.raises(InputError, match="650"):
        make_compressor(RunConfig(size=651), LINEAR)
    with pytest.raises(InputError, match="q to divide"):
        make_compressor(RunConfig(kind="sparse", size=6), LINEAR)
    with pytest.raises(InputError, match="650"):
        make_compressor(RunConfig(arm="topk", size=651), LINEAR)


def test_weights_in_files(tmp_path):
    path = save_weights(tmp_path / "w.safetensors", {"1": LINEAR})
    assert load_weights(path, {"1": LINEAR})["1"]["w"].shape == (64, 10)
    with pytest.raises(InputError, match="differs"):
        load_weights(path, LINEAR)
    with pytest.raises(InputError, match="found no"):
        load_weights(tmp_path / "none", LINEAR)
    save_weights(path, {"w": jax.numpy.full((64, 10), np.nan), "b": LINEAR["b"]})
    with pytest.raises(InputError, match="NaN"):
        load_weights(path, LINEAR)
    save_weights(path, {**LINEAR, "b": jax.numpy.zeros(3)})
    with pytest.raises(InputError, match=r"\(3,\)"):
        load_weights(path, LINEAR)
    other = tmp_path / "w.npz"
    np.savez(other, **LINEAR)
    assert np.array_equal(load_weights(other, LINEAR)["w"], LINEAR["w"])
    for torn in (path, other):
        torn.write_bytes(b"\1\2\3")
        with pytest.raises(InputError, match="torn"):
            load_weights(torn, LINEAR)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(other)
    with pytest.raises(InputError, match="torn or other"):
        load_weights(other, LINEAR)


def test_a_ledger_in_a_file():
    ledger = Ledger(2, "sketch", 10)
    ledger.sent_up(0, 1, 40)
    ledger.sent_up(0, 1, 40)
    ledger.sent_down(2, 0, 8)
    ledger.sent_aside("up", 5)
    assert ledger.rounds == 3 and ledger.total == (80, 8)
    assert ledger.round_bytes(0) == (80, 0) and ledger.client_bytes(1) == (80, 0) and ledger.client_bytes(0) == (0, 8)
    text = json.dumps(ledger.to_json())
    assert Ledger.parse(text).to_json() == ledger.to_json()
    for broken in (text[:-3], "[]", "{}", text.replace('"bytes_up": 80', '"bytes_up": 81'), text.replace("80", "-1")):
        assert broken != text
        with pytest.raises(InputError):
            Ledger.parse(broken)
    for call in (
        lambda: ledger.sent_up(0, 2, 1),
        lambda: ledger.sent_up(-1, 0, 1),
        lambda: ledger.sent_down(0, 0, -1),
        lambda: Ledger(0),
    ):
        with pytest.raises(InputError):
            call()
