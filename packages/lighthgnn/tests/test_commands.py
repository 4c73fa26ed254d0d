"""The commands on a user's files, killed and resumed; reproduction and bench at tiny sizes."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from contract import files
from safetensors.torch import load_file

from isotone.lighthgnn import bench, jobs, load_dataset, production_split, reproduce
from isotone.lighthgnn.cli import app
from isotone.lighthgnn.dataset import from_graph, make_dataset
from isotone.lighthgnn.latency import break_even
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.shared.cli import Run
from isotone.shared.testing import kill_and_resume, run_cli

SMALL = ["--num-train", "3", "--num-val", "4", "--epochs", "6"]


def run(folder, *argv):
    result = run_cli(app, list(argv), folder)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout) if "--json" in argv else result.stdout


def test_from_files_to_predictions(tmp_path):
    files(tmp_path)
    data = np.load(tmp_path / "data.npz")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, data["y"])))
    np.save(tmp_path / "x.npy", data["x"])
    lines = [np.flatnonzero(data["hyperedge_index"][1] == e) for e in range(12)]
    (tmp_path / "mine.txt").write_text("\n".join(" ".join(map(str, line)) for line in lines if len(line)))
    made = run(tmp_path, "convert", "mine.txt", "--features", "x.npy", "--labels", "labels.txt", "--out", "c", "--json")
    assert made["vertices"] == 60 and made["hyperedges"] == 12
    common = ("--data", "c/mine.npz", "--out", "run")
    run(tmp_path, "train", *common, *SMALL, "--test-ind-ratio", "0.5", "--quiet")
    facts = run(tmp_path, "distill", *common, "--epochs", "6", "--hidden", "8", "--calibrate", "--json")
    assert 0 < facts["mean reliability"] <= 1 and facts["temperature"] > 0
    found = run(tmp_path, "evaluate", *common, "--noise-level", "0.1", "--json")
    assert set(found) == {"student", "teacher"} and set(found["student"]) == {"trans", "ind", "prod"}
    run(tmp_path, "predict", "x.npy", "--out", "run", "--quiet")
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").open()))
    assert len(rows) == 61 and abs(sum(map(float, rows[1][2:])) - 1) < 1e-4
    for format in ("safetensors", "torch-export"):
        assert run(tmp_path, "export", "--out", "run", "--format", format, "--json")["bytes"] > 100
    assert {p.name for p in (tmp_path / "run").glob("*.png")} == {"reliability.png", "accuracy.png"}
    other = run_cli(
        app, ["distill", "--data", "data.npz", "--teacher", "run", "--out", "light", "--light", *SMALL[4:]], tmp_path
    )
    assert other.code == 0, other.stderr
    wrong = run_cli(app, ["evaluate", "--data", "digits", "--out", "run"], tmp_path)
    assert wrong.code == 2 and "60 vertices" in wrong.stderr
    np.save(tmp_path / "narrow.npy", np.ones((2, 2)))
    narrow = run_cli(app, ["predict", "narrow.npy", "--out", "run"], tmp_path)
    assert narrow.code == 2 and "expected 3 features" in narrow.stderr


def test_observed_vertices_are_scored_by_what_was_observed(tmp_path):
    files(tmp_path)
    data = load_dataset(tmp_path / "data.npz")
    split = production_split(data.y, 3, 4, 0.5)

    class Counts(torch.nn.Module):
        on_graph = False
        seen: list = []

        def forward(self, X, hypergraph):
            self.seen.append(hypergraph.num_vertices)
            # class 1 where the observed part is looked at, else class 0
            logits = torch.zeros(len(X), 3)
            logits[:, int(len(X) < 60)] = 1
            return logits

    found = jobs.teacher_scores(Counts(), data, split)
    assert Counts.seen == [60, len(split.observed)]
    for part, label, ids in (("trans", 1, split.test_tran), ("ind", 0, split.test_ind), ("prod", 0, split.test)):
        assert abs(found[part]["accuracy"] - 100 * float((data.y[ids] == label).float().mean())) < 1e-4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder with a teacher and a student."""
    folder = tmp_path_factory.mktemp("finished")
    files(folder)
    arrays = dict(np.load(folder / "data.npz"))
    mixed = np.stack((np.tile(np.arange(60), 2), np.random.default_rng(0).integers(12, size=120)))
    np.savez(folder / "data.npz", **{**arrays, "hyperedge_index": mixed})  # of mixed classes: changes may cancel
    for verb in (["train", *SMALL], ["distill", *SMALL[4:]]):
        run(folder, verb[0], "--data", "data.npz", "--out", "run", "--quiet", *verb[1:])
    return folder


@pytest.mark.parametrize(
    "changes, words",
    [
        (["train", "--dropout", "0.1"], "dropout 0.5 (now 0.1)"),
        (["train", "--hidden", "64"], "hidden 32 (now 64)"),
        (["train", "--layers", "3"], "layers 2 (now 3)"),
        (["train", "--teacher", "hgnnp"], "class HGNN (now HGNNP)"),
        (["train", "--normalize"], "X "),
        (["train", "--num-train", "4"], "train "),
        (["distill", "--noise", "additive"], "rho "),
        (["distill", "--noise-level", "0.5"], "rho "),
        (["distill", "--noise-samples", "9"], "rho "),
        (["distill", "--normalize-scores", "quantile"], "rho "),
        (["distill", "--change", "vertices"], "rho "),
        (["distill", "--calibrate-teacher"], "rho "),
        (["distill", "--hidden", "64"], "hidden 128 (now 64)"),
        (["distill", "--dropout", "0.1"], "dropout 0.5 (now 0.1)"),
        (["distill", "--no-batch-norm"], "batch_norm True (now False)"),
        (["distill", "--light"], "plus True (now False)"),
    ],
)
def test_a_finished_run_is_not_mistaken_for_another(finished, changes, words):
    def content():
        names = ("teacher.json", "student.json", "reliability.npy", "teacher.safetensors", "student.safetensors")
        return [(finished / "run" / name).read_bytes() for name in names]

    before = content()
    verb, *more = changes
    small = SMALL if verb == "train" else SMALL[4:]
    result = run_cli(app, [verb, "--data", "data.npz", "--out", "run", *small, *more], finished)
    assert result.code == 2 and f"own settings: {words}" in result.stderr and "--fresh" in result.stderr
    assert content() == before


@pytest.mark.parametrize(
    "name, content", [("run.json", b"[]"), ("run.json", b"{}"), ("run.json", b"{"), ("split.npz", b"PK\3\4")]
)
def test_a_broken_run_is_one_sentence(finished, name, content):
    path = finished / "run" / name
    whole = path.read_bytes()
    path.write_bytes(content)
    result = run_cli(app, ["evaluate", "--data", "data.npz", "--out", "run"], finished)
    path.write_bytes(whole)
    assert result.code == 2 and name in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("teacher", ["gcn", "unigat"])
def test_other_teachers(teacher, tmp_path):
    files(tmp_path)
    run(tmp_path, "train", "--data", "data.npz", "--teacher", teacher, "--out", "run", "--quiet", *SMALL)
    run(tmp_path, "distill", "--data", "data.npz", "--out", "run", "--epochs", "3", "--quiet")
    assert "teacher" in run(tmp_path, "evaluate", "--data", "data.npz", "--out", "run", "--json")


@pytest.mark.slow
def test_a_killed_training_resumes(tmp_path):
    files(tmp_path)
    command = [sys.executable, "-m", "isotone.lighthgnn", "train", "--data", "data.npz", *SMALL[:4], "--quiet"]
    command += ["--epochs", "200", "--checkpoint-every", "10"]

    def ready():
        return any((tmp_path / "killed" / "checkpoints-teacher").glob("step-*"))

    done = kill_and_resume([*command, "--out", "killed"], ready=ready, seed=3, cwd=tmp_path, delay=0.1)
    assert done.returncode == 0, done.stderr
    whole = run_cli(app, [*command[3:], "--out", "whole"], tmp_path)
    assert whole.code == 0, whole.stderr
    killed, uninterrupted = (load_file(tmp_path / name / "teacher.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], uninterrupted[name]) for name in uninterrupted)


def _tiny_sets(setting):
    """A bag of words with the names of the real sets, so that every claim is measured."""
    made = make_synthetic(num_vertices=150, num_edges=80, dim=8, num_classes=3, seed=5)
    source = np.random.default_rng(0)
    y = made.y.numpy()
    words = scipy.sparse.random(150, 300, 0.02, "csr", np.float32, source) + scipy.sparse.csr_matrix(
        (np.ones(150, np.float32), (np.arange(150), y)), (150, 300)
    )
    pairs = source.integers(150, size=(2, 900))
    pairs = pairs[:, y[pairs[0]] == y[pairs[1]]]
    hypergraph = make_dataset("coauthorship-cora", words, y, made.hypergraph)
    return [hypergraph, from_graph("planetoid-cora", words, y, pairs)]


def test_every_scale_is_one_path(tmp_path, monkeypatch):
    """The gpu scale's code at a tiny size: arms, claims, plots; finished arms are not run again."""
    tiny = reproduce.SCALES["gpu"]
    recipe = dataclasses.replace(
        tiny.recipe, epochs=4, num_train=5, num_val=10, student_hidden=16, many_samples=2, test_ind_ratio=0.5
    )
    small = SyntheticConfig(num_vertices=200, num_edges=100, dim=8)
    setting = dataclasses.replace(
        tiny, recipe=recipe, synthetic=small, speed=small, signals=(0.8,), batches=(1,), least_seeds=2
    )
    monkeypatch.setitem(reproduce.SCALES, "gpu", setting)
    monkeypatch.setattr(reproduce, "_data", _tiny_sets)
    options = Run(tmp_path, seeds=(0, 1), device="cpu", quiet=True)
    report = reproduce.reproduce("gpu", options)
    values = {m.claim.id: m.measured for m in report.measurements}
    assert {claim.id for claim in reproduce.CLAIMS} <= set(values)
    assert {"best-baseline-synthetic", "accuracy-hypergraph-synthetic-lighthgnn+"} <= set(values)
    assert values["accuracy-production-synthetic-teacher-unseen"] >= 0
    missing = {name for name, value in values.items() if value is None}
    assert missing == {"cocitation-gain-plus", "citeseer-gain-plus", "digits-gain-plus"}, "all others are measured"
    assert 0 <= values["noise-auc-additive"] <= 1 and values["topology-mlp"] != 0
    plots = {"accuracy-synthetic", "settings-synthetic", "reliability", "signal", "teachers-coauthorship-cora"}
    assert plots <= set(report.figures)
    report.save(tmp_path)

    def never(*arguments, **options):
        raise AssertionError("a finished arm is run again")

    for name in ("transductive", "teachers_together", "planted_noise", "graph_arms"):
        monkeypatch.setattr(reproduce.experiments, name, never)
    again = reproduce.reproduce("gpu", options)
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]


@pytest.mark.slow
def test_bench_on_tiny_sizes(tmp_path):
    report = bench.bench(Run(tmp_path, device="cpu", quiet=True), "tiny")
    rows = {row.id: row for row in report.ratios}
    assert {
        "student-1",
        "student-32",
        "student-1-whole",
        "student-1-p99",
        "flat-in-hyperedges",
        "sparse-first-layer",
    } <= set(rows)
    assert {"dhg-cold-hyperedges-of-30", "pyg-hyperedges-of-30"} <= set(rows)
    assert all(row.ratio > 0 for row in report.ratios) and rows["student-1"].ratio > 1
    report.save(tmp_path)


def test_break_even_is_interpolated():
    times = [{"batch": 1, "ratio": 100.0}, {"batch": 100, "ratio": 1.0}, {"batch": 10_000, "ratio": 0.01}]
    assert abs(break_even(times) - 100) < 1e-6
    assert break_even(times[:1]) is None
