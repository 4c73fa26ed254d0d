"""The study, the bounds, private training, claims and verbs, at tiny sizes."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli
from isotone.sketching import claims, convergence, private_study, reproduce, study, theory
from isotone.sketching.attack import AttackConfig
from isotone.sketching.audit import AuditConfig, AuditReport, Leak
from isotone.sketching.cli import app
from isotone.sketching.data import digits
from isotone.sketching.models import make_model
from isotone.sketching.scales import SCALES
from isotone.sketching.training import RunConfig, make_compressor
from isotone.sketching.weights import named
from isotone.sketching.wire import HEADER

SMALL = study.Setting("linear", clients=3, plain_rounds=5, looks=3, rates=(1e-4, 1.0), valid=100)
ROUND = 2 * (4 * 650 + HEADER)
"""Bytes of a round of FedAvg."""


def test_an_arm_takes_the_better_rate_and_sends_all_of_its_bytes(monkeypatch):
    """As many as FedAvg's five rounds, headers counted, to the last round that fits; the accuracy is of the test
    split."""
    monkeypatch.setattr(study, "BEYOND", 0)
    row = study.compare(digits(), SMALL, "srht", (0, 1), (100,))
    each = row["bytes_up"] + row["bytes_down"]
    assert row["bytes_up"] == row["bytes_down"] == 4 * 50 + HEADER and 10 * each <= ROUND
    assert row["rounds"] == 5 * ROUND // each and row["bytes"] == [5 * ROUND * i // 3 // each * each for i in (1, 2, 3)]
    assert np.shape(row["accuracy"]) == (2, 3) and np.shape(row["loss"]) == (2, 3) and row["end"]
    assert row["accuracy"][0][-1] > 50 and row["rate"] == 1.0 and row["scores"]["1.0"] > 0.5
    with pytest.raises(InputError, match="a round of fetchsgd, got 5328"):
        study.compare(digits(), dataclasses.replace(SMALL, plain_rounds=1, ratio=1.0), "fetchsgd", (0,))


def test_other_labels_are_other_data():
    """Finished arms of the same pictures with other labels are not these."""
    source = digits()
    for name in ("x", "y", "test_x", "test_y"):
        array = getattr(source, name).copy()
        array[0] += 1
        assert dataclasses.replace(source, **{name: array}).digest != source.digest
    assert digits().digest == source.digest


def test_top_k_is_charged_what_it_sends():
    """The places of the mean's numbers: many fewer than the most that there can be, where clients are alike."""
    setting = dataclasses.replace(SMALL, clients=20, concentration=None, plain_rounds=2, looks=50, rates=(1.0,))
    row = study.compare(digits(), setting, "top-k", (0,))
    compressor = study.compressors(make_model("linear", (8, 8, 1), 10).init(jax.random.key(0)), setting)["top-k"]
    up, most = study.round_bytes(compressor)
    assert most == 4 * 650 + HEADER > 1.1 * row["bytes_down"] and row["bytes_up"] == up
    assert row["rounds"] > 2 * ROUND // (up + most)
    assert 2 * ROUND - up - most < row["bytes"][-1] <= 2 * ROUND


def test_rates_past_an_end_are_tried():
    def run(peak, rates=(0.1, 1.0)):
        asked = []

        def score(rates):
            asked.append(tuple(rates))
            return [-abs(math.log(rate / peak)) for rate in rates]

        found = study.choose(rates, score)
        return study.best_of(found), asked

    assert run(3.9) == (4.0, [(0.1, 1.0), (2.0,), (4.0,), (8.0,)])
    assert run(0.03) == (0.025, [(0.1, 1.0), (0.05,), (0.025,), (0.0125,)])
    assert run(1.0, (0.1, 1.0, 9.0)) == (1.0, [(0.1, 1.0, 9.0)])
    assert run(1e9)[0] == 2.0**study.BEYOND


def test_bytes_to_an_accuracy():
    row = {"bytes": [100, 200, 300], "accuracy": [[10.0, 20.0, 40.0], [30.0, 50.0, 45.0], [0.0, 1.0, 2.0]]}
    assert study.bytes_to(row, 30.0) == [250.0, 100.0, None]


def test_every_arm_is_cheap():
    params, arms = make_model("mlp", (8, 8, 1), 10).init(jax.random.key(0)), SCALES["cpu"].arms
    made = study.compressors(params, study.Setting())
    assert list(made) == list(arms)
    most = {arm: sum(study.round_bytes(compressor)) for arm, compressor in made.items()}
    exact = [arm for arm in arms if arm not in ("fedavg", "top-k", "fetchsgd")]
    assert all(10 * most[arm] <= most["fedavg"] for arm in exact), most
    assert 10 * study.round_bytes(made["top-k"])[0] <= most["fedavg"] / 2 and 3 * most["fetchsgd"] <= most["fedavg"]
    assert not any(10 * (4 * (c.sketch.s + 4) + HEADER) <= most["fedavg"] / 2 for c in (made["srht"], made["sparse"]))
    # one rule for the study and for training
    config = RunConfig(model="mlp", arm="fetchsgd", ratio=10.64, clients=20)
    assert make_compressor(config, params) == made["fetchsgd"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "transformer"}, {"hidden": 0}, {"clients": 0}, {"plain_rounds": 0}, {"looks": 0}, {"valid": 0},
        {"batch": -1}, {"concentration": 0.0}, {"ratio": 0.5}, {"ratio": float("nan")}, {"rates": ()},
        {"rates": (1.0, -1.0)}, {"local_steps": 0},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(changed):
    with pytest.raises(InputError, match=next(iter(changed)).split("_")[0].rstrip("s")):
        study.Setting(**changed)


@pytest.mark.parametrize("problem", convergence.PROBLEMS)
def test_measured_convergence_is_inside_the_bound(problem):
    found = convergence.measured(problem, "countsketch", 8, draws=8, d=32)
    assert found["inside"] and found["value"][-1] < found["value"][0] and len(found["bound"]) == len(found["value"])
    # a bound of T rounds is of w^0 .. w^{T-1}, or of w^T where there is no choice of them
    assert np.isclose(found["value"][1], found["value"][0], rtol=1e-6) == (problem != "strongly convex")


def test_rounds_where_one_step_is_enough():
    """mu = L without a sketch: the bound is 0 after one step, its logarithm no number."""
    assert theory.rounds_needed(theory.Problem(1.0, 1.0), 1.0, 0.5) == 1
    rounds = theory.convex_rounds_needed(theory.Problem(2.0, 0.0, 3.0), 3.0, 0.7)
    bound = theory.Problem(2.0, 0.0, 3.0).convex_bound
    assert bound(3.0, rounds) <= 0.7 < bound(3.0, rounds - 1)
    with pytest.raises(InputError, match="distance"):
        theory.convex_rounds_needed(theory.Problem(1.0), 0.0, 0.5)


@pytest.mark.parametrize("problem", ["convex", "logistic"])
def test_constants_are_what_they_are_said_to_be(problem):
    """Of unlike clients: nothing is below the minimum, where their slopes cancel."""
    own = convergence.known(problem, 4, 16)
    slopes = jax.jit(jax.vmap(jax.grad(own.loss), (None, 0, 0)))(own.best, own.data.x, own.data.y)
    assert np.abs(np.mean(slopes, 0)).max() < 1e-4 < own.heterogeneity
    assert np.isclose(np.mean(np.sum(np.square(slopes), 1)), own.heterogeneity, rtol=1e-3)
    assert abs(float(own.gap(own.best))) < 1e-5


def test_several_local_steps_are_inside_the_recalled_bound():
    found = convergence.measured_locally("logistic", "countsketch", 8, draws=2, d=16, clients=4, worth=40)
    assert found["inside"] and found["local_steps"] == 5 and found["clients"] == 4 and "recalled" in found["source"]
    assert 0 < found["value"][-1] < 0.95 * found["value"][0]
    with pytest.raises(InputError, match="non-convex"):
        convergence.measured_locally("non-convex", "srht", 8)


def test_numbers_sent():
    """Through the identity they are gradient descent's; the promise is (1 + alpha) s / d."""
    whole = convergence.numbers_sent("identity", 32, draws=2, d=32)
    assert whole["equal"] == 1 and whole["promised"] == 1 and whole["guaranteed"] <= 1
    half = convergence.numbers_sent("srht", 16, draws=8, d=32)
    assert half["promised"] == 1 and 0.8 < half["equal"] < 1.6 and half["most"] == 47 / 32
    with pytest.raises(InputError, match="concave"):
        convergence.measured("concave", "srht", 8)


def test_what_goes_wrong_goes_wrong():
    found = convergence.ablations(d=64, s=8)
    assert found["fixed"] > 0.3 and found["large"] > 1e3


def test_private_training():
    """A huge epsilon trains, and what it costs is what was asked for."""
    mode = private_study.PrivateSetting(epsilons=(1e3,), rounds=(30,), rates=(2.0,), sampling=0.5)
    setting = dataclasses.replace(SMALL, ratio=1.0)
    (row,) = private_study.private(digits(), setting, mode, "client", (0,))
    assert row["accuracy"][0] > 40 and row["releases"] == 30 and 990 < row["rdp"] <= 1e3
    assert claims.private_claims([row])[0].measured == row["accuracy"][0]
    assert row["theorem"] > row["noise"] and row["sampling"] == 1.0
    with pytest.raises(InputError, match="nobody"):
        private_study.private(digits(), setting, mode, "nobody", (0,))


@pytest.mark.slow  # the contract runs it too, as a process
def test_the_reproduction_measures(tmp_path):
    report = reproduce.reproduce("smoke", Run(tmp_path, device="cpu", quiet=True))
    found = {m.claim.id: m for m in report.measurements}
    wanted = {
        "equal-srht",
        "cheap-srht",
        "bytes-fedavg",
        "control",
        "fails-8",
    }
    assert wanted <= set(found) and len(found) == len(report.measurements)
    assert found["cheap-srht"].held is None and found["control"].measured < 1


class Stop(Exception):
    """A run that is killed between two arms."""


@pytest.fixture
def quick(monkeypatch):
    """Arms that cost nothing: (name, arguments) of those that ran."""
    ran = []

    def arm(module, name, give):
        def stub(*arguments, **options):
            ran.append((name, arguments))
            return give(*arguments, **options)

        monkeypatch.setattr(module, name, stub)

    curve = {"problem": "convex", "kind": "srht", "s": 64, "alpha": 1.0, "draws": 2, "local_steps": 1, "clients": 1,
             "source": "derived", "value": [1.0, 0.5], "error": [0.0, 0.1], "bound": [1.0, 0.9],
             "inside": True}  # fmt: skip
    pictures = {"batch 1": {"truth": np.zeros((2, 8, 8, 1)), "whole": np.ones((2, 8, 8, 1))}}
    arm(study, "compare", lambda source, setting, name, seeds: compared(name, 80, 90.0))
    local = {"local_steps": 5, "clients": 10, "source": "recalled"}
    arm(
        *(convergence, "measured_locally"),
        lambda problem, kind, s, draws: {**curve, **local, "problem": problem, "kind": kind, "s": s},
    )
    arm(convergence, "measured", lambda problem, kind, s, draws: {**curve, "problem": problem, "kind": kind, "s": s})
    sent = {"equal": 1.0, "error": None, "guaranteed": 0.9, "promised": 1.1, "most": 1.5}
    arm(convergence, "numbers_sent", lambda kind, s, draws: {"kind": kind, "s": s, **sent})
    arm(convergence, "ablations", lambda: {"fixed": 0.8, "large": 1e6})
    arm(reproduce, "_embedding", lambda kind, draws: {"kind": kind, "d": 64, "s": 16, "alpha": 4.9, "a": 1.9,
        "alpha_error": 0.01, "alpha_theory": 4.9, "a_error": 0.01, "bias": 1.0, "draws": draws})  # fmt: skip

    def audited(model, networks, x, y, config, known, seeds):
        sizes, noises = config.sizes or config.private_sizes, config.noises or (None,)
        rows = [leak(s=s, noise=noise) for s in sizes for noise in noises]
        return AuditReport([Leak(**{k: v for k, v in row.items() if k != "failed"}) for row in rows], pictures)

    arm(reproduce, "audit_networks", audited)
    arm(reproduce, "private", lambda source, setting, mode, trust, seeds: [trained(trust)])
    return ran


def test_the_reproduction_resumes_arm_by_arm(tmp_path, quick, monkeypatch):
    run = Run(tmp_path, device="cpu", quiet=True)
    real = reproduce.audit_networks

    def killed(*arguments, **options):
        raise Stop

    monkeypatch.setattr(reproduce, "audit_networks", killed)
    with pytest.raises(Stop):
        reproduce.reproduce("smoke", run)
    before = list(quick)
    assert [name for name, _ in before] == ["compare", "compare"]
    monkeypatch.setattr(reproduce, "audit_networks", real)
    report = reproduce.reproduce("smoke", run)
    assert [name for name, _ in quick[len(before) :]] == ["audit_networks"]
    report.save(tmp_path)
    names = {"accuracy-bytes", "loss-bytes", "sheet-batch-1"}
    assert set(report.figures) == names and len(list(tmp_path.glob("*.png"))) == len(names)
    count = len(quick)
    again = reproduce.reproduce("smoke", run)
    assert len(quick) == count, "nothing is run again"
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]
    assert all(m.held is None for m in report.measurements), "too small a scale to say what holds"
    for scale, words in (("huge", "huge"), ("gpu", "GPU")):
        with pytest.raises(InputError, match=words):
            reproduce.reproduce(scale, run)


def test_the_scale_that_judges(tmp_path, quick):
    """All arms of the scale "cpu", each once, with other seeds where they are asked for."""
    report = reproduce.reproduce("cpu", Run(tmp_path, device="cpu", quiet=True, seeds=(5, 6)))
    scale, names = SCALES["cpu"], [name for name, _ in quick]
    assert names.count("compare") == len(scale.arms) and names.count("private") == len(scale.trusts)
    assert names.count("ablations") == 1 and names.count("numbers_sent") == len(scale.sent)
    assert names.count("measured") == len(scale.problems) * len(scale.curves)
    assert names.count("measured_locally") == len(scale.local_curves)
    assert all(arguments[-1] == (5, 6) for name, arguments in quick if name in ("compare", "private"))
    assert any(m.held for m in report.measurements) and {"epsilon", "bounds", "psnr"} <= set(report.figures)


def compared(arm, up, final):
    return {"arm": arm, "clients": 20, "bytes_up": up, "bytes_down": up, "bytes": [1000, 2000], "rounds": 2,
            "accuracy": [[50.0, final], [60.0, final]], "loss": [[1.0, 0.5], [1.0, 0.4]], "rate": 0.1,
            "end": False}  # fmt: skip


def trained(trust):
    return {"trust": trust, "epsilon": 8.0, "noise": 2.0, "accuracy": [30.0, 32.0], "delta": 1e-5, "releases": 9,
            "pld": None, "rdp": 7.9, "theorem": 14.0, "sampling": 0.2, "rounds": 9, "rate": 0.5}  # fmt: skip


def leak(**more):
    row = {"s": None, "d": 100, "batch": 1, "local_steps": 1, "noise": None, "mse": 0.01, "median": 1e-12, "psnr": 90.0,
           "ssim": 1.0, "guess": 0.05, "gap": -0.04, "gap_error": 0.001, "p_below": 0.0, "found": 3, "tried": 3,
           "pool": 50, "low": 0.3, "high": 1.0, "chance": 0.02, "p_found": 0.0, "by_likelihood": 3,
           "p_likelihood": 1e-5, "psnrs": (89.0, 91.0), "medians": (1e-12, 3e-12)}  # fmt: skip
    return {**row, "failed": False, **more}


def test_claims_by_hand():
    rows = [compared("fedavg", 100, 90.0), compared("srht", 10, 89.5), compared("qsgd", 20, 80.0)]
    found = {m.claim.id: m for m in claims.federated_claims(rows)}
    assert found["equal-srht"].measured == -0.5 and found["equal-srht"].held and found["equal-qsgd"].held is None
    assert found["cheap-srht"].measured == 10 and found["cheap-srht"].held
    # the line from (1, 50) and from (1, 60) to (2, 89.5) at 89: of each seed, with their spread
    wanted = 1 + np.array([39 / 39.5, 29 / 29.5])
    assert np.isclose(found["bytes-srht"].measured, wanted.mean()) and found["bytes-srht"].claim.unit == "kB"
    assert np.isclose(found["bytes-srht"].spread, wanted.std(ddof=1))
    never = found["bytes-qsgd"]
    assert never.measured == 9.0 and never.verdict == "reported" and "never within 2 kB" in never.claim.statement
    worse = {m.claim.id: m for m in claims.federated_claims([rows[0], compared("srht", 11, 88.9)])}
    assert worse["equal-srht"].held is False and worse["cheap-srht"].held is False
    audits = {"single": [leak(), leak(s=64, median=1e-3), leak(s=128, median=1e-9)], "steps": [leak(local_steps=5)]}
    found = {m.claim.id: m for m in claims.leak_claims(audits, 64)}
    assert found["error-all-b1-k1"].held and found["error-64-b1-k1"].held and not found["error-128-b1-k1"].held
    assert "error-all-b1-k5" not in found and found["psnr-all-b1-k5"].measured == 90
    assert np.isclose(found["psnr-all-b1-k1"].spread, 2**0.5) and np.isclose(
        found["error-all-b1-k1"].spread, 2**0.5 * 1e-12
    )
    private = trained("local")
    leaks = [leak(noise=0.02), leak(noise=2.0, failed=True, mse=0.05), leak(noise=2.0, s=50)]
    measured = claims.attack_claims(leaks, {2.0: private}, 0.02) + claims.private_claims([private])
    found = {m.claim.id: m for m in measured}
    assert found["fails-8"].held and found["fails-8-s50"].held is False and "31.0 %" in found["fails-8"].claim.statement
    assert "8 of 9 releases (accuracy 31.0 %), one of them attacked" in found["fails-8"].claim.statement
    assert "likeliest of the pool 3, chance 2.0 %" in found["fails-8"].claim.statement
    assert found["control"].held is None and found["noise-local-8"].measured == 7


def test_verbs(tmp_path, monkeypatch):
    def run(*argv):
        done = run_cli(app, [*argv, "--json"], tmp_path)
        assert done.code == 0, done.stderr
        return json.loads(done.stdout)

    found = run("account", "--noise", "1.5", "--rounds", "10")
    assert found["releases"] == 50 and 0 < found["epsilon (Renyi)"] < 10
    assert run("account", "--epsilon", "2", "--rounds", "10")["epsilon (Renyi)"] <= 2
    params = make_model("mlp", (8, 8, 1), 10, 8).init(jax.random.key(5))
    np.savez(tmp_path / "mine.npz", **named(params))
    tiny = ["attack", "--hidden", "8", "--messages", "1", "--steps", "20", "--restarts", "1"]
    mine = run(*tiny, "--weights", "mine.npz", "--out", "a")
    assert next(iter(mine)).startswith("whole")
    (row,) = json.loads((tmp_path / "a" / "attack.json").read_text())
    assert row["tried"] == 1 and row["d"] == 610 and row["s"] is None
    assert (tmp_path / "a" / "attack-batch-1.png").stat().st_size > 1000
    asked = []

    def compare(source, setting, name, seeds):
        asked.append((setting.model, setting.clients, setting.plain_rounds, setting.rates, name, seeds))
        return compared(name, 100 if name == "fedavg" else 10, 90.0)

    monkeypatch.setattr(study, "compare", compare)
    argv = ["compare", "--model", "linear", "--arms", "fedavg,srht", "--clients", "3", "--rounds", "2", "--rates", "1"]
    said = run(*argv, "--out", "c", "--seeds", "7")
    assert asked == [("linear", 3, 2, (1.0,), arm, (7,)) for arm in ("fedavg", "srht")]
    assert said["srht"].startswith("90.00 % in 2 rounds of 10 bytes up") and "89.0 % after 2 kB" in said["srht"]
    found = run("theory", "--numbers", "1000", "--size", "100", "--kind", "ams", "--strong-convexity", "0.1")
    assert found["alpha"] == 9.99 and found["rounds of gradient descent"] == 44 and found["rounds"] == 504
    assert found["step (K = 1)"] == pytest.approx(1 / 10.99) and found["(1 + alpha) s / d"] == 1.099
    found = run("theory", "--numbers", "1000", "--distance", "2")
    assert found["s"] == 100 and found["rounds of gradient descent"] == 800
    assert len(json.loads((tmp_path / "c" / "compare.json").read_text())) == 2 and (tmp_path / "c/bytes.png").is_file()
    run(*argv, "--out", "c", "--seeds", "7")
    assert len(asked) == 2, "arms that finished are not run again"
    for argv, words in (
        (["account", "--noise", "1", "--epsilon", "1"], "both"),
        (["account", "--noise", "1", "--rounds", "0"], "rounds"),
        (["compare", "--rounds", "0"], "rounds"),
        (["compare", "--ratio", "nan"], "nan"),
        (["compare", "--rates", ""], "rates"),
        (["compare", "--hidden", "0"], "hidden"),
        (["attack", "--hidden", "-1"], "hidden"),
        (["theory", "--numbers", "0"], "--numbers"),
        (["theory", "--numbers", "10", "--smoothness", "-1"], "smoothness"),
        (["theory", "--numbers", "10", "--target", "0"], "target"),
        (["attack", "--weights", "mine.npz"], "mine.npz"),
        (["attack", "--optimizer", "sgd"], "sgd"),
    ):
        done = run_cli(app, argv, tmp_path)
        assert done.code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert AuditConfig().attack == AttackConfig(restarts=2)
