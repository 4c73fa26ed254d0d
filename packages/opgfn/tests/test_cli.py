"""The command: training on one's own score, sampling, evaluating, exporting; killed and resumed."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from safetensors.torch import load_file

from isotone.opgfn.cli import app
from isotone.shared.testing import kill_and_resume, run_cli

TINY = ["--steps", "3", "--batch", "8", "--candidates", "30", "--quiet"]
MOLECULES = [
    *("train", "--env", "fragments", "--max-fragments", "2", "--channels", "8", "--layers", "1"),
    *TINY,
]


def run(argv: list[str], folder: Path) -> dict:
    result = run_cli(app, [*argv, "--json"], folder)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molecules")
    run([*MOLECULES, "--out", "run"], folder)
    return folder


def test_molecules_from_training_to_files(molecules: Path) -> None:
    out = molecules / "run"
    assert {"loss.png", "front.png", "molecules.png", "candidates.csv", "history.json"} <= {
        p.name for p in out.iterdir()
    }
    rows = list(csv.DictReader((out / "candidates.csv").open()))
    assert rows and list(rows[0]) == ["object", "rank", "qed", "sa", "log_reward"]
    assert all(Chem.MolFromSmiles(row["object"]) for row in rows)
    assert [int(row["rank"]) for row in rows] == sorted(int(row["rank"]) for row in rows)
    found = run(["sample", "run/model", "--n", "40", "--to", "mols.smi", "--unique", "--out", "s"], molecules)
    lines = (molecules / "mols.smi").read_text().splitlines()
    assert len(lines) == found["written"] == len({line.split("\t")[0] for line in lines})
    scored = run(["evaluate", "mols.smi", "--objectives", "qed", "--objectives", "mw", "--out", "e"], molecules)
    assert scored["molecules"] == len(lines) and 0 < scored["hypervolume"] <= 1
    again = run(["evaluate", "run/candidates.csv", "--out", "e"], molecules)
    assert again["molecules"] == len(rows)
    exported = run(["export", "run/model", "--n", "40", "--formats", "csv,jsonl,smi,sdf", "--out", "x"], molecules)
    supplier = Chem.SDMolSupplier(str(molecules / "x" / "candidates.sdf"))
    assert len(supplier) == exported["objects"] and all(m is not None and m.HasProp("qed") for m in supplier)
    document = [json.loads(line) for line in (molecules / "x" / "candidates.jsonl").read_text().splitlines()]
    assert len(document) == exported["objects"]


@pytest.mark.parametrize("env", ["hypergrid", "moo-grid", "bag", "binding", "ngrams", "dna", "nas"])
def test_every_environment_trains_and_samples(env: str, tmp_path: Path) -> None:
    size = {"hypergrid": ["--side", "6"], "moo-grid": ["--side", "6"], "ngrams": ["--length", "6"]}
    size |= {"dna": ["--length", "8"], "binding": ["--length", "4"]}
    found = run(["train", "--env", env, *TINY, *size.get(env, []), "--out", "run"], tmp_path)
    assert found["steps"] == 3 and found["objects drawn"] > 0
    assert run(["sample", "run/model", "--n", "5", "--out", "s"], tmp_path)["written"] == 5


@pytest.mark.parametrize("loss", ["op-fl-subtb", "pc-tb", "gc-tb", "op-fm", "reinforce"])
def test_every_kind_of_loss_is_saved_and_loaded(loss: str, tmp_path: Path) -> None:
    run(["train", "--side", "6", "--loss", loss, *TINY, "--out", "run"], tmp_path)
    assert (tmp_path / "run" / "front.png").exists()
    assert run(["sample", "run/model", "--n", "7", "--out", "s"], tmp_path)["written"] == 7
    assert run(["export", "run/model", "--n", "20", "--out", "x"], tmp_path)["objects"] > 0


def test_a_score_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def ring(smiles):\n    return [[t.count('1'), -len(t)] for t in smiles]\n\n\nring.names = ('rings', 'short')\n"
    )
    found = run([*MOLECULES, "--score", "mine.py:ring", "--out", "run"], tmp_path)
    rows = list(csv.DictReader((tmp_path / "run" / "candidates.csv").open()))
    assert found["objects drawn"] == len(rows) and all(float(row["short"]) == -len(row["object"]) for row in rows)
    assert any(key.startswith("hypervolume above 0, -") for key in found), "objectives below 0 have another reference"
    refused = run_cli(app, ["export", "run/model", "--out", "x"], tmp_path)
    assert refused.code == 2 and "--score" in refused.stderr
    run(["export", "run/model", "--n", "30", "--score", "mine.py:ring", "--out", "x"], tmp_path)
    exported = list(csv.DictReader((tmp_path / "x" / "candidates.csv").open()))
    assert list(exported[0]) == ["object", "rank", "rings", "short", "log_reward"]
    assert all(float(row["short"]) == -len(row["object"]) for row in exported)


def test_diverse_samples(molecules: Path) -> None:
    plain = run(["sample", "run/model", "--n", "40", "--unique", "--out", "d"], molecules)
    found = run(["sample", "run/model", "--n", "40", "--unique", "--diverse", "0.4", "--out", "d"], molecules)
    rows = [row["object"] for row in csv.DictReader((molecules / "d" / "samples.csv").open())]
    assert 0 < len(rows) == found["written"] <= plain["written"]
    from isotone.opgfn.metrics import diverse_top_k

    assert len(diverse_top_k(rows, np.zeros(len(rows)), len(rows), threshold=0.4)) == len(rows)


def test_what_is_no_molecule_has_no_molecule_file(tmp_path: Path) -> None:
    run(["train", "--env", "moo-grid", "--side", "6", *TINY, "--out", "run"], tmp_path)
    for argv in (
        ["sample", "run/model", "--to", "a.smi"],
        ["export", "run/model", "--formats", "sdf"],
        ["sample", "run/model", "--diverse", "0.5"],
    ):
        result = run_cli(app, [*argv, "--out", "x"], tmp_path)
        assert result.code == 2 and "moo-grid" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.smi").exists()


def test_killed_and_resumed(tmp_path: Path) -> None:
    options = [
        "train",
        "--side",
        "8",
        "--steps",
        "400",
        "--batch",
        "16",
        "--candidates",
        "20",
        "--checkpoint-every",
        "20",
    ]
    command = [sys.executable, "-m", "isotone.opgfn", *options, "--quiet", "--out"]
    checkpoints = tmp_path / "killed" / "checkpoints"
    done = kill_and_resume(
        [*command, str(tmp_path / "killed")],
        ready=lambda: any(checkpoints.glob("step-*.safetensors")),
        seed=0,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert run_cli(app, [*options, "--quiet", "--out", str(tmp_path / "whole")]).code == 0
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert (tmp_path / "killed" / "history.json").read_text() == (tmp_path / "whole" / "history.json").read_text()
    other = run_cli(app, [*options, "--lr", "0.5", "--out", str(tmp_path / "killed")])
    assert other.code == 2 and "lr" in other.stderr and "start anew" in other.stderr
