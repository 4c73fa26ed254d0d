"""The commands on files, killed and resumed; the reproduction, arm by arm; the peer of the bench."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from isotone.concrete_tickets import Recipe, SearchConfig, Ticket, bench, reproduce
from isotone.concrete_tickets.arms import Arm, Experiment
from isotone.concrete_tickets.cli import app
from isotone.concrete_tickets.images import load_images
from isotone.concrete_tickets.models import make_model
from isotone.concrete_tickets.weights import load_weights, save_weights
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import kill_and_resume, run_cli

SMALL = ["--data", "npz:data.npz", "--epochs", "4", "--batch-size", "16", "--rewind", "1", "--density", "0.05"]


def write_data(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 12))
    np.savez(folder / "data.npz", x=x, y=np.argmax(x[:, :3], 1))


def test_from_search_to_export(tmp_path):
    write_data(tmp_path)

    def run(*argv):
        result = run_cli(app, [*argv, "--json"], tmp_path)
        assert result.code == 0, result.stderr
        return json.loads(result.stdout)

    found = run("search", *SMALL, "--search-epochs", "4", "--out", "run")
    ticket = Ticket.load(tmp_path / "run" / "ticket.safetensors")
    assert ticket.total == 12 * 300 + 300 * 100 + 100 * 3 and found["kept"].startswith(f"{ticket.kept} of")
    assert 0 <= run("train", "run")["test accuracy (%)"] <= 100
    sparse = load_file(tmp_path / "run" / "sparse.safetensors")
    for name, mask in ticket.masks.items():
        assert (sparse[name][~np.asarray(mask)] == 0).all() and (sparse[name] != 0).any()
    checks = run("sanity", "run")
    assert {"ticket (%)", "shuffled (%)", "inverted (%)", "reinitialised (%)"} == set(checks)
    assert (tmp_path / "run" / "sanity.png").stat().st_size > 5000
    for form, name in (("npz", "dense.npz"), ("safetensors", "model.safetensors"), ("torch", "torch.safetensors")):
        assert run("export", "run", "--format", form)["trained"]
        assert (tmp_path / "run" / name).exists()
    with np.load(tmp_path / "run" / "dense.npz") as file:
        assert np.array_equal(file["layers/0/kernel"], sparse["layers/0/kernel"])
    turned = load_file(tmp_path / "run" / "torch.safetensors")
    assert np.array_equal(turned["layers.0.weight_mask"] > 0, np.asarray(ticket.masks["layers/0/kernel"]).T)
    assert np.array_equal(turned["layers.0.weight_orig"].T, sparse["layers/0/kernel"])

    refused = run_cli(app, ["search", *SMALL, "--lr", "0.2", "--out", "run"], tmp_path)
    assert refused.code == 2 and "recipe" in refused.stderr
    (tmp_path / "run" / "rewind.safetensors").unlink()
    refused = run_cli(app, ["train", "run"], tmp_path)
    assert refused.code == 2 and "rewind checkpoint" in refused.stderr


def test_a_whole_network_is_a_ticket_too(tmp_path):
    write_data(tmp_path)
    whole = [*SMALL[:-1], "1.0", "--search-epochs", "1", "--out", "run"]
    for argv in (["search", *whole], ["sanity", "run"], ["export", "run"]):
        done = run_cli(app, argv, tmp_path)
        assert done.code == 0, done.stderr


def test_ltr_and_compare(tmp_path):
    write_data(tmp_path)
    done = run_cli(app, ["ltr", *SMALL, "--keep", "0.3", "--out", "ltr", "--json"], tmp_path)
    assert done.code == 0, done.stderr
    assert (
        json.loads(done.stdout)["rounds"] == 3 and len(list((tmp_path / "ltr" / "rounds").glob("*.safetensors"))) == 3
    )
    rounds = {p: p.stat().st_mtime_ns for p in (tmp_path / "ltr" / "rounds").iterdir()}
    again = run_cli(app, ["ltr", *SMALL, "--keep", "0.3", "--out", "ltr", "--json"], tmp_path)
    assert json.loads(again.stdout) == json.loads(done.stdout), "the seconds of its rounds too"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "ltr" / "rounds").iterdir()} == rounds
    arms = "cts,cts:loss+lagrangian@init,ltr:2,snip,grasp:2,synflow,saliency:kl+2,magnitude@init,random,erk,gmp,dense"
    argv = ["compare", *SMALL, "--search-epochs", "2", "--arms", arms, "--seeds", "0,1", "--out", "cmp", "--json"]
    done = run_cli(app, argv, tmp_path)
    assert done.code == 0, done.stderr
    rows = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert len(rows) == 24 and all(row["kept"] == row["expected_count"] for row in rows if row["arm"] != "dense")
    for name in ("accuracy-density", "accuracy-time", "layers"):
        assert (tmp_path / "cmp" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow  # three processes; that a resumed search and training are the whole ones is tested beside each
@pytest.mark.parametrize("verb", ["search", "train"])
def test_a_killed_command_resumes(verb, tmp_path):
    write_data(tmp_path)
    search = [sys.executable, "-m", "isotone.concrete_tickets", "search", *SMALL, "--search-epochs", "2000", "--quiet"]
    search += ["--checkpoint-every", "20"]
    command = search if verb == "search" else [*search[:3], "train", "RUN", "--checkpoint-every", "1", "--quiet"]
    if verb == "train":
        short = ["400" if word == "4" else "2" if word == "2000" else word for word in search[3:]]
        for name in ("killed", "whole"):
            assert run_cli(app, [*short, "--out", name], tmp_path).code == 0

    def ready():
        return any((tmp_path / "killed" / "checkpoints" / verb).glob("step-*"))

    def argv(name):
        return [name if word == "RUN" else word for word in command] + ["--out", name]

    done = kill_and_resume(argv("killed"), ready=ready, seed=3, cwd=tmp_path, delay=0.1)
    assert done.returncode == 0, done.stderr
    whole = run_cli(app, argv("whole")[3:], tmp_path)
    assert whole.code == 0, whole.stderr
    file = {"search": "logits.safetensors", "train": "sparse.safetensors"}[verb]
    killed, uninterrupted = (load_file(tmp_path / name / file) for name in ("killed", "whole"))
    assert all(np.array_equal(killed[name], uninterrupted[name]) for name in uninterrupted)


def test_weights_in_files(tmp_path):
    params = {"a": {"kernel": jax.numpy.ones((2, 3))}}
    path = save_weights(tmp_path / "w.safetensors", params)
    assert load_weights(path, params)["a"]["kernel"].shape == (2, 3)
    with pytest.raises(InputError, match=r"shape \(3, 3\)"):
        load_weights(path, {"a": {"kernel": jax.numpy.ones((3, 3))}})
    with pytest.raises(InputError, match="b"):
        load_weights(path, {"b": jax.numpy.ones(3)})
    save_weights(path, {"a": {"kernel": jax.numpy.full((2, 3), jax.numpy.nan)}})
    with pytest.raises(InputError, match="NaN"):
        load_weights(path, params)
    path.write_bytes(b"\1\2\3")
    with pytest.raises(InputError, match="torn"):
        load_weights(path, params)
    with pytest.raises(InputError, match="found no"):
        load_weights(tmp_path / "no", params)


@pytest.mark.parametrize(
    "text",
    [
        "obd",
        "snip@late",
        "snip:",
        "snip:0",
        "cts:entropy",
        "ltr:x",
        "ltr:1.5",
        "erk:2",
        "snip:²",
        "cts:kl+short+lagrangian",
        "saliency:kl+short",
    ],
)
def test_bad_arms(text):
    with pytest.raises(InputError):
        Arm.parse(text)


def test_arms_are_read():
    assert Arm.parse("ltr:7").keep(0.8**22) == pytest.approx(0.8 ** (22 / 7)) and Arm.parse("ltr:0.5").keep(0.1) == 0.5
    assert Arm.parse("cts:loss+lagrangian@init") == Arm("cts", "loss+lagrangian", True)
    digits = load_images("digits")
    with pytest.raises(InputError, match="rewind epoch"):
        Experiment(digits, make_model("mlp", digits.shape, 10), Recipe(epochs=3), rewind=3)


@pytest.mark.slow  # the smoke reproduction runs the same code
def test_the_gpu_scale_runs_small_on_a_cpu(tmp_path, monkeypatch):
    """The same code at a tiny size; finished arms are not run again."""
    setting = dataclasses.replace(
        reproduce.SCALES["gpu"],
        recipe=Recipe(epochs=2, batch_size=400),
        rewind=1,
        config=SearchConfig(epochs=1, batch_size=400),
        arms=("cts", "ltr", "snip", "magnitude"),
        known_epochs=1,
        teacher=False,
        model="mlp",
    )
    monkeypatch.setitem(reproduce.SCALES, "gpu", setting)
    monkeypatch.delenv("ISOTONE_DATA_DIR", raising=False)
    run = Run(tmp_path, seeds=(0,), device="cpu", quiet=True)
    report = reproduce.reproduce("gpu", run)
    values = {m.claim.id: m.measured for m in report.measurements}
    assert values["resnet20"] is None, "digits are not CIFAR-10"
    assert values["faster-than-ltr"] > 1 and values["above-snip"] is not None
    assert set(report.figures) == {"density", "time", "layers"}
    assert report.save(tmp_path).name == "reproduce-gpu.json"
    monkeypatch.setattr(Experiment, "run", None)
    monkeypatch.setattr(Experiment, "start", None)
    again = reproduce.reproduce("gpu", run)
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]


@pytest.mark.slow  # two searches to compile, of problems that have tests of their own
def test_a_scale_runs_the_known_problems():
    setting = reproduce.SCALES["cpu"]
    images = load_images("digits")
    found = reproduce._known(reproduce._experiment(setting, images), setting, 0)
    assert found["separated_exact"] == 1 and found["normal_energy"] > 0.85
    assert found["teacher"] > 30 and 0 < found["jaccard"] < 1, "chance is 10 %"


@pytest.mark.slow  # a search to compile for each row
def test_every_row_of_the_bench(monkeypatch):
    """The whole bench at its fewest rounds, on scans of one epoch."""
    pytest.importorskip("torch")
    monkeypatch.setattr(bench, "EPOCHS", 1)
    plan = bench._plan(load_images("digits"), 6, "cpu")
    ids = [row().id for row in plan]
    steps = ["mlp-kl-train", "mlp-kl-train-cached", "mlp-loss-train", "lenet-kl-train", "lenet-kl-train-cached"]
    assert ids == [*steps, "mlp-torch", "magnitude-torch"]
