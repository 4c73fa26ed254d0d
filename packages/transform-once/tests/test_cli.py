"""The commands one after another, a killed training, the study's arms, the bench's rows."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import kill_and_resume, run_cli
from isotone.transform_once import bench, claims, cli, metrics, peers, reproduce, scales, speed
from isotone.transform_once.cli import app
from isotone.transform_once.config import FNOConfig, T1Config
from isotone.transform_once.data import load
from isotone.transform_once.operator import Operator
from isotone.transform_once.study import Arm, rolled
from isotone.transform_once.training import TrainConfig

SMALL = ["--width", "3", "--depth", "1", "--modes", "4", "--batch-size", "4"]


DEFAULT_OUT = "isotone-results/transform-once"


def write_fields(folder):
    x = np.random.default_rng(0).standard_normal((20, 8, 8)).astype(np.float32)
    np.savez(folder / "fields.npz", inputs=x, targets=x[:, ::-1] + x)


def commands(folder):
    def run(*argv):
        result = run_cli(app, [*argv, "--json"], folder)
        assert result.code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def table(path):
    return np.genfromtxt(path, delimiter=",", names=True)


def test_from_fields_to_predictions(tmp_path):
    run = commands(tmp_path)
    made = run("generate", "--problem", "plume", "--samples", "3", "--size", "8", "--frames", "5", "--out", "gen")
    assert made["inputs"] == "(9, 16, 8, 2)"
    found = run("train", "gen/fields.npz", "--epochs", "3", *SMALL, "--out", "run")
    assert found["test relative L2"] >= found["irreducible"]
    assert (tmp_path / "run" / "history.csv").read_text().count("\n") == 4
    errors = run("evaluate", "run", "gen/fields.npz")
    rows = table(tmp_path / "run" / "errors.csv")
    assert len(rows) == 9 and np.isclose(rows["relative_l2"].mean(), errors["relative l2"], rtol=1e-3)
    # three trajectories, of each three frames after the first two
    rolled_out = run("rollout", "run", "gen/fields.npz", "--steps", "4")
    assert rolled_out["frames"] == "(3, 4, 16, 8, 1)" and rolled_out["finite"]
    with np.load(tmp_path / "run" / "rollout.npz") as file:
        frames = file["frames"]
    steps = table(tmp_path / "run" / "rollout-errors.csv")
    assert steps["step"].tolist() == [1, 2, 3] and steps.dtype.names[1:] == ("relative_l2", "mae", "smape", "psnr")
    # the first step is the prediction of each trajectory's first window
    assert np.isclose(steps["relative_l2"][0], rows["relative_l2"][:3].mean(), rtol=1e-4)
    truth = load(tmp_path / "gen" / "fields.npz").targets[6:9]
    assert np.isclose(steps["mae"][2], metrics.mae(frames[:, 2], truth).mean(), rtol=1e-4)
    late = run("rollout", "run", "gen/fields.npz", "--steps", "4", "--start", "2", "--out", "late")
    assert "relative L2 at step 1" in late and (tmp_path / "late" / "rollout.npz").is_file()
    assert "modes for 0.02" in run("modes", "gen/fields.npz", "--out", "m", "--per-axis")
    # a folder that is named is taken, the default one too
    assert run("export", "run", "--out", DEFAULT_OUT)["fields"] == "(batch, 16, 8, 2)"
    assert (tmp_path / DEFAULT_OUT / "model.jax").is_file() and not (tmp_path / "run" / "model.jax").exists()
    for name in ("gen/fields.png", "run/prediction.png", "m/modes.png"):
        assert (tmp_path / name).stat().st_size > 3000


def test_models_of_increments(tmp_path):
    """What is learnt at once: frames that fall by a tenth of a fixed field each."""
    run = commands(tmp_path)
    rng = np.random.default_rng(0)
    fixed, first = rng.standard_normal((2, 1, 16)), rng.standard_normal((10, 1, 16))
    frames = 0.1 * first + np.arange(6).reshape(1, 6, 1) * fixed[0] + 3
    np.savez(tmp_path / "t.npz", trajectories=frames)
    argv = ["t.npz", *SMALL, "--modes", "16", "--epochs", "2", "--no-channels", "--order", "1", "--context", "2"]
    trained = run("train", *argv, "--out", "run")
    assert trained["test relative L2, increments of order 1"] > 0 and "irreducible" in trained
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["order"], info["context"], info["step"], info["data"]) == (1, 2, 1, "t.npz")
    # the windows and the order are those of the training, and what it adds is added
    errors = run("evaluate", "run", "t.npz", "--no-channels")
    run("rollout", "run", "t.npz", "--no-channels", "--steps", "3")
    steps = table(tmp_path / "run" / "rollout-errors.csv")
    model, fields = Operator.load(tmp_path / "run"), load(tmp_path / "t.npz", 2, channels=False)
    found = model.predict(fields.inputs) + fields.inputs[..., 1:]
    each = metrics.relative_l2(found, fields.targets)
    assert np.isclose(errors["relative l2"], each.mean(), rtol=1e-3)
    assert np.isclose(steps["relative_l2"][0], each[:10].mean(), rtol=1e-3)
    done = run_cli(app, ["rollout", "run", "t.npz", "--no-channels", "--order", "0"], tmp_path)
    assert done.code == 2 and "expected --order 1" in done.stderr
    load(tmp_path / "t.npz", 2, 2, channels=False).save(tmp_path / "wider.npz")
    done = run_cli(app, ["rollout", "run", "wider.npz"], tmp_path)
    assert done.code == 2 and "windows of step 1" in done.stderr
    (tmp_path / "run" / "run.json").write_text("{}")
    done = run_cli(app, ["evaluate", "run", "t.npz", "--no-channels"], tmp_path)
    assert done.code == 2 and "run.json" in done.stderr


@pytest.mark.parametrize("axes", [1, 3])
def test_fields_of_one_and_three_axes(axes, tmp_path):
    run = commands(tmp_path)
    x = np.random.default_rng(0).standard_normal((8, *(6, 8, 5)[-axes:], 1)).astype(np.float32)
    np.savez(tmp_path / "fields.npz", x=x, y=x + 1)
    run("train", "fields.npz", "--model", "mlp", *SMALL, "--epochs", "1", "--out", "run")
    assert run("evaluate", "run", "fields.npz")["relative l2"] > 0
    assert (tmp_path / "run" / "prediction.png").stat().st_size > 3000
    assert f"modes for {0.02:g}" in run("modes", "fields.npz", "--out", "m")


def test_options_that_a_model_has_no_use_for(tmp_path):
    write_fields(tmp_path)
    for argv, words in (
        ("--model u-net --modes 4", "no --modes for u-net"),
        ("--model u-net --width 3", "no --width for u-net"),
        ("--model u-net --init zero", "no --init for u-net"),
        ("--model t1u --width 300", "no --width for t1u"),
        ("--model mlp --init vp", "no --init for mlp"),
        ("--model f-fno --init vp", "no --init for f-fno"),
        ("--model fno --transform dct", "no --transform for fno"),
        ("--dtype bfloat16 --transform dft", "bfloat16"),
        ("--dtype float64", "float64"),
        ("--modes 4,4,4", "1 or 2 numbers"),
        ("--context 1", "no --context"),
        ("--step 1", "no --step"),
        ("--order 2", "order 2"),
        ("--order 3", "order 0, 1 or 2"),
        ("--channels --model t1 --modes 4,4", "1 or 1 numbers"),
    ):
        done = run_cli(app, ["train", "fields.npz", *argv.split()], tmp_path)
        assert done.code == 2 and words in done.stderr and done.stderr.count("\n") == 1, (argv, done.stderr)
    fields = load(tmp_path / "fields.npz")
    for init in ("vp", None):
        config = cli._config("fno", fields, {"init": init, "modes": "3"}, "float32")
        assert config == FNOConfig(modes=(3, 3), init=init or "naive", sizes=(8, 8))
    assert cli._config("t1", fields, {"modes": "4"}, "float32").first_layer_init_only


@pytest.mark.parametrize("model", [pytest.param("t1u", marks=pytest.mark.slow), "mlp", "fno"])
def test_every_model_is_trained_by_name(model, tmp_path):
    write_fields(tmp_path)
    modes = ["--modes", "auto" if model == "fno" else "3"]
    small = SMALL if model != "t1u" else [word for word in SMALL if word not in ("--width", "3")]
    argv = ["train", "fields.npz", "--model", model, *small, *modes, "--epochs", "1", "--out", model, "--json"]
    done = run_cli(app, argv, tmp_path)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["test relative L2"] > 0


def test_a_run_of_other_settings_is_not_continued(tmp_path):
    write_fields(tmp_path)
    argv = ["train", "fields.npz", *SMALL, "--epochs", "2", "--out", "run"]
    assert run_cli(app, argv, tmp_path).code == 0
    done = run_cli(app, [*argv, "--lr", "0.01"], tmp_path)
    assert done.code == 2 and "another's" in done.stderr
    assert run_cli(app, [*argv, "--lr", "0.01", "--fresh"], tmp_path).code == 0


@pytest.mark.slow  # two processes; that a resumed training is the whole one is tested beside `fit`
def test_a_killed_command_resumes(tmp_path):
    write_fields(tmp_path)
    command = [sys.executable, "-m", "isotone.transform_once", "train", "fields.npz", *SMALL, "--epochs", "3000"]
    command += ["--checkpoint-every", "20", "--quiet"]

    def ready():
        return any((tmp_path / "killed" / "checkpoints").glob("step-*"))

    done = kill_and_resume([*command, "--out", "killed"], ready=ready, seed=3, cwd=tmp_path, delay=0.1)
    assert done.returncode == 0, done.stderr
    assert run_cli(app, [*command[3:], "--out", "whole"], tmp_path).code == 0
    killed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(np.array_equal(killed[name], whole[name]) for name in whole)


TINY = scales.Task(
    "plume",
    "tiny plumes",
    "plume",
    *(8, 4, 1, 2),
    (
        Arm("t1-vp", T1Config(modes=(4, 4), width=3, depth=1, sizes=(16, 8), in_channels=2), (1e-3, 1e-2)),
        *scales.fnos(2, 3, 1, (1e-3,), in_channels=2),
    ),
    TrainConfig(batch_size=8, epochs=2, schedule="cosine"),
    {"frames": 8},
    rollout=3,
    order=1,
)


def test_a_task_with_rollouts_and_both_fnos(tmp_path, monkeypatch):
    """The gpu scale's code at a tiny size; what finished is not run again."""
    monkeypatch.setitem(reproduce.SCALES, "gpu", scales.Scale((TINY,), (0,), 3, speed=(8,)))
    monkeypatch.setattr(
        reproduce, "curve", lambda sizes, where: [("t1", 8, 1.0), ("fno", 8, 4.0), ("neuralop", 8, 9.0)]
    )
    run = Run(tmp_path, device="cpu", quiet=True)
    report = reproduce.reproduce("gpu", run)
    found = {m.claim.id: m.measured for m in report.measurements}
    assert found["speed-8"] == 4.0 and found["plume-t1-vp-rollout"] > 0 and found["plume-t1-vp-wall"] > 0
    assert found["plume-irreducible"] >= 1
    assert ("plume-error-neuralop" in found) == peers.available()
    assert set(report.figures) == {"plume-time", "plume-fields", "plume-modes", "speed"}
    monkeypatch.setattr(reproduce, "trained", lambda *args, **more: pytest.fail("trained again"))
    monkeypatch.setattr(reproduce, "plume", lambda *args: np.zeros((2, 5, 16, 8, 1)))
    again = reproduce.reproduce("gpu", run)
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]
    with pytest.raises(InputError, match="GPU"):
        reproduce.reproduce("paper", run)


def test_rolled_frames_by_hand():
    class Add:
        def predict(self, inputs):
            return inputs[..., :1] + 1

    frames = np.arange(1.0, 6.0).reshape(1, 5, 1, 1, 1) * np.ones((1, 5, 2, 2, 1))
    assert rolled(Add(), frames, 0) == {"1": 1 / 3, "2": 1 / 4, "3": 2 / 5}
    assert rolled(Add(), frames, 1)["1"] == pytest.approx(1 / 3)


def test_neuraloperator_learns_under_our_loop():
    pytest.importorskip("neuralop")
    x, y = speed.fields(8, 16)
    config = TrainConfig(batch_size=4, epochs=30, lr=1e-2, schedule="constant")
    made = peers.NeuralopTrainer(x, 0 * y + x, config, modes=(2, 2), width=8, depth=1)
    assert made.warm_up() > 0 and made.seconds_per_epoch() > 0 and made.epoch == 0
    losses = made.run(30)
    assert losses[-1] < 0.5 * losses[0] and made.predict(x).shape == x.shape
    gap = np.linalg.norm((made.predict(x) - x).reshape(16, -1), axis=1) / np.linalg.norm(x.reshape(16, -1), axis=1)
    assert abs(gap.mean() - losses[-1]) < 0.3


def test_claims_by_hand():
    def row(arm, seed, error, seconds, **more):
        facts = {"epochs": 3, "seconds": 3 * seconds, "lr": 1e-3, "epoch_seconds": seconds}
        return {"arm": arm, "seed": seed, "error": error, **facts, **more}

    rows = [row("t1-vp", s, 0.1 + s / 100, 1.0, above=1.5 - s / 10) for s in (0, 1)]
    rows += [row("fno", s, 0.2, 4.0) for s in (0, 1)] + [row("neuralop", s, 0.1, 2.0) for s in (0, 1)]
    assert claims.fastest(rows) == "neuralop"
    found = {m.claim.id: m for m in claims.compared("a", "words", rows, 1.0)}
    assert found["a-t1-vp-fno"].measured == pytest.approx(1.05) and not found["a-t1-vp-fno"].held
    assert found["a-irreducible"].measured == 1.4 and found["a-irreducible"].held
    assert found["a-t1-vp-wall"].measured == 2.0 and "a-t1-vp-mlp" not in found
    assert claims.fastest([]) is None and claims.times("wall", "25 s", rows) == []
    naive = [dataclasses.replace(Arm("t1-naive", None)).name]
    timed = [claims.times(task, "8 s", [*rows, row(naive[0], 0, 0.1, 0.5)], False)[0] for task in ("wall", "darcy")]
    assert [one.measured for one in timed] == [4.0, 4.0] and len({one.claim.id for one in timed}) == 2


@pytest.mark.slow
def test_every_row_of_the_bench(monkeypatch):
    monkeypatch.setattr(bench, "MODES", 3)
    monkeypatch.setattr(bench, "WIDTH", 2)
    monkeypatch.setattr(bench, "DEPTH", 1)
    monkeypatch.setattr(bench, "BATCH", 2)
    assert set(bench.rivals(8)) >= {"fno", "fno-matmul", "f-fno"}
    monkeypatch.setattr(bench, "rivals", lambda size: {"fno": FNOConfig(modes=(3, 3), width=2, depth=1)})
    ids = [r.id for r in bench.train_rows(8, "cpu", 6)] + [r.id for r in bench.predict_rows(8, "cpu", 6)]
    assert ids == ["train-8-fno", "memory-8-fno", "predict-8-fno"]
    small = {"t1": T1Config(modes=(2, 2), width=2, depth=1, sizes=(8, 8))}
    monkeypatch.setattr(speed, "arms", lambda *args: small)
    monkeypatch.setattr(speed, "available", lambda: False)
    steps = speed.curve((8,), "cpu", batch=2, modes=2, width=2, depth=1)
    assert [row[:2] for row in steps] == [("t1", 8)] and steps[0][2] > 0
