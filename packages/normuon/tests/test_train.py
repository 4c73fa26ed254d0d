"""The trainer resumes bit for bit, the commands work on files, the reproduction resumes arm by arm."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from isotone.normuon import bench, reproduce, train
from isotone.normuon.cli import app
from isotone.normuon.gpt import GPT, GPTConfig
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import kill_and_resume, run_cli

SMALL = GPTConfig(dim=16, layers=1, heads=2, context=16)
CONFIG = train.TrainConfig(steps=12, batch=2, evaluate_every=4, windows=4, model=SMALL)
TEXT = train.Text.from_bytes(b"so long as men can breathe, or eyes can see\n" * 40, 16)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_resumed_run_equals_the_uninterrupted_one(optimizer, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.004)
    whole, history = train.train(config, TEXT)

    def stop(step, loss):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, TEXT, folder=tmp_path, checkpoint_every=5, on_step=stop)
    resumed, again = train.train(config, TEXT, folder=tmp_path, checkpoint_every=5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.losses == history.losses and again.row_cv == history.row_cv
    other = train.Text.from_bytes(b"another text, of which no step was seen\n" * 40, 16)
    with pytest.raises(InputError, match="data"):
        train.train(config, other, folder=tmp_path)
    with pytest.raises(InputError, match="lr 0.004"):
        train.train(dataclasses.replace(config, lr=0.5), TEXT, folder=tmp_path)
    fresh, _ = train.train(dataclasses.replace(config, steps=1), TEXT, folder=tmp_path, resume=False)
    assert not torch.equal(fresh.head.weight, whole.head.weight)


@pytest.mark.slow  # three processes; the resumption itself is tested above
def test_a_killed_command_resumes(tmp_path):
    (tmp_path / "text").write_bytes(b"shall I compare thee to a summer's day\n" * 60)
    command = [sys.executable, "-m", "isotone.normuon", "train", "--text", "text", "--steps", "100", "--quiet"]
    command += ["--dim", "16", "--layers", "1", "--context", "16", "--batch", "2", "--checkpoint-every", "10"]

    def ready():
        return any((tmp_path / "killed" / "checkpoints").glob("step-*"))

    done = kill_and_resume([*command, "--out", "killed"], ready=ready, seed=3, cwd=tmp_path, delay=0.1)
    assert done.returncode == 0, done.stderr
    whole = run_cli(app, [*command[3:], "--out", "whole"], tmp_path)
    assert whole.code == 0, whole.stderr
    killed, uninterrupted = (load_file(tmp_path / name / "model/model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], uninterrupted[name]) for name in uninterrupted)


def test_the_loss_falls_and_samples_are_text():
    model, history = train.train(dataclasses.replace(CONFIG, steps=150, batch=8), TEXT)
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert len(history.row_cv) == len(history.steps) - 1
    assert isinstance(train.sample(model, 8), str)
    assert model(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 256)


def test_micro_batches_and_files_give_the_same_run(tmp_path):
    (tmp_path / "text").write_bytes(b"so long as men can breathe, or eyes can see\n" * 40)
    whole, _ = train.train(CONFIG, TEXT)
    parts, _ = train.train(
        dataclasses.replace(CONFIG, micro_batch=1), train.Text.from_file(tmp_path / "text", SMALL.context)
    )
    difference = max((a - b).abs().max() for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert 0 < difference < 1e-4


def test_zero_initialised_gpt_predicts_uniformly():
    assert abs(GPT(SMALL).loss(torch.zeros(1, 17, dtype=torch.long)).item() - 5.5452) < 1e-3


@pytest.mark.parametrize("values", [{"steps": 0}, {"lr": float("nan")}, {"optimizer": "sgd"}, {"micro_batch": 3},
                                    {"optimizer": "torch-muon", "scale": "rms"}])  # fmt: skip
def test_bad_configs(values):
    with pytest.raises(InputError):
        train.TrainConfig(**values)
    with pytest.raises(ValueError, match="heads"):
        GPTConfig(dim=10, heads=3)


def test_a_torn_checkpoint_falls_back(tmp_path):
    whole, _ = train.train(CONFIG, TEXT, folder=tmp_path, checkpoint_every=4)
    newest = max(tmp_path.glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="torn"):
        again, _ = train.train(CONFIG, TEXT, folder=tmp_path, checkpoint_every=4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_divergence_is_one_sentence():
    with pytest.raises(InputError, match="finite loss"):
        train.train(dataclasses.replace(CONFIG, optimizer="adamw", lr=1e30, adamw_lr=1e30), TEXT)


def test_inspect(tmp_path):
    train.export(GPT(SMALL), tmp_path / "model")
    result = run_cli(app, ["inspect", "model", "--json"], tmp_path)
    stats = json.loads(result.stdout)["matrices"]["blocks.0.up.weight"]
    assert stats["sigma_max"] > stats["sigma_min"] > 0 and 0 < stats["row_cv"] < 1
    shown = run_cli(app, ["inspect", "model"], tmp_path).stdout
    assert "blocks.0.up" in shown and "inf" in shown, "the zero-initialised projections have no condition number"
    save_file({"experts": torch.randn(2, 4, 3), "none": torch.empty(0, 3)}, tmp_path / "experts.safetensors")
    found = json.loads(run_cli(app, ["inspect", "experts.safetensors", "--json"], tmp_path).stdout)["matrices"]
    assert list(found) == ["experts[0]", "experts[1]"]


def test_steps_to_a_loss():
    history = {"steps": [0, 10, 20], "losses": [4.0, 2.0, 1.0]}
    assert reproduce.steps_to(history, 3.0) == 5 and reproduce.steps_to(history, 1.5) == 15
    assert reproduce.steps_to(history, 0.5) == 25 and reproduce.steps_to(history, 2.0) == 10


def test_the_gpu_scale_runs_small_on_a_cpu(tmp_path, monkeypatch):
    """The same code at a tiny size: arms, claims, plots; finished arms are not run again."""
    base = dataclasses.replace(
        reproduce.SCALE["gpu"].base, steps=6, batch=2, micro_batch=1, evaluate_every=3, windows=4, model=SMALL
    )
    setting = dataclasses.replace(reproduce.SCALE["gpu"], base=base, bytes=20_000, checkpoint_every=2)
    monkeypatch.setitem(reproduce.SCALE, "gpu", setting)
    run = Run(tmp_path, seeds=(0, 1, 2), device="cpu", quiet=True)
    report = reproduce.reproduce("gpu", run)
    values = {m.claim.id: m.measured for m in report.measurements}
    assert not list((tmp_path / "unfinished").iterdir()), "a finished arm keeps no checkpoints"
    assert values["steps-saved-adamw"] is not None and values["steps-saved-5b"] is None
    assert set(report.figures) == {"loss", "learning-rates", "row-variation"}
    assert report.save(tmp_path).name == "reproduce-gpu.json"
    monkeypatch.setattr(reproduce, "train", None)
    again = reproduce.reproduce("gpu", run)
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]


def test_bench_on_tiny_shapes(tmp_path):
    shapes = [(24, 16), (16, 24)]
    assert bench.check_equal_to_torch(shapes, "cpu") < 2e-4
    with pytest.raises(RuntimeError, match="a peer"):  # NorMuon for Muon is found out
        bench._check_equal(shapes, "cpu", "a peer", bench._normuon(), lambda p: torch.optim.Muon(p, lr=1e-3))
    report = bench.bench(Run(tmp_path, device="cpu", quiet=True), "tiny")
    rows = {row.id: row for row in report.ratios}
    assert {"muon-torch", "normuon-muon", "state-adamw"} <= set(rows)
    assert 1.5 < rows["state-adamw"].ratio < 2 and all(row.ratio > 0 for row in report.ratios)
