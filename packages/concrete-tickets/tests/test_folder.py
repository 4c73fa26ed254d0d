"""A folder holds one run: resumed, replaced and killed runs never mix their files."""

import json

import numpy as np
import pytest

from isotone.concrete_tickets import Ticket, study
from isotone.concrete_tickets.arms import Experiment
from isotone.concrete_tickets.cli import app
from isotone.concrete_tickets.folder import begin, open_run
from isotone.concrete_tickets.lottery import round_seconds
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli

SMALL = ["--data", "npz:data.npz", "--epochs", "4", "--batch-size", "16", "--density", "0.05"]
SEARCH = ["search", *SMALL, "--when", "init", "--search-epochs", "2", "--out", "run"]


@pytest.fixture
def run(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 12))
    np.savez(tmp_path / "data.npz", x=x, y=np.argmax(x[:, :3], 1))
    return lambda *argv: run_cli(app, [*argv, "--json"], tmp_path)


def killed(*args, **more):
    raise KeyboardInterrupt


def test_a_folder_holds_one_run(tmp_path, monkeypatch, run):
    """Nothing of another run is trained, checked or exported; a fresh run that is killed leaves the old one."""
    assert run(*SEARCH).code == 0 and run("train", "run").code == 0
    folder = tmp_path / "run"
    for other in (["ltr", *SMALL, "--when", "init", "--out", "run"], [*SEARCH, "--objective", "loss"]):
        refused = run(*other)
        assert refused.code == 2 and "--fresh" in refused.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    refused = run("train", "run", "--out", "other")
    assert refused.code == 2 and "another run" in refused.stderr
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    # from the initial weights another rate finds the same ticket, and trains it to other weights
    changed = [*SEARCH, "--lr", "0.2"]
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "search", killed)
        assert run(*changed, "--fresh").code != 0
    after = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    assert before.items() <= after.items() and json.loads(run("export", "run").stdout)["trained"]
    assert run(*changed).code == 0, "the fresh run goes on without --fresh"
    assert (folder / "ticket.safetensors").read_bytes() == before["ticket.safetensors"]
    assert not {"sparse.safetensors", "model.safetensors", "unfinished.json"} & {p.name for p in folder.iterdir()}
    assert not json.loads(run("export", "run").stdout)["trained"]
    # files of two runs, whoever mixed them
    for name, verb in (("sparse", "export"), ("logits", "sanity")):
        (folder / f"{name}.safetensors").write_bytes(before[f"{name}.safetensors"])
        refused = run(verb, "run")
        assert refused.code == 2 and f"{name}.safetensors of the run beside it, got another's" in refused.stderr
    ticket = Ticket.load(folder / "ticket.safetensors")
    Ticket({name: ~mask for name, mask in ticket.masks.items()}).save(folder / "ticket.safetensors")
    refused = run("train", "run")
    assert refused.code == 2 and "two runs'" in refused.stderr
    (folder / "run.json").write_text("[1, 2]")
    for verb in (["train", "run"], changed):
        refused = run(*verb)
        assert refused.code == 2 and "run.json" in refused.stderr
    assert run(*changed, "--fresh").code == 0
    assert not (folder / "sparse.safetensors").exists() and run("export", "run").code == 0
    whole = json.loads((folder / "run.json").read_text())
    monkeypatch.chdir(tmp_path)
    for name, value in {"data": 5, "seed": 2**70, "rewind": 1.5, "recipe": {"milestones": ["a"]}, "files": []}.items():
        (folder / "run.json").write_text(json.dumps({**whole, name: value}))
        with pytest.raises(InputError, match=f"expected the {name} of a run"):
            open_run(folder)


def test_what_was_saved_on_the_way_binds(tmp_path):
    """A killed run goes on with its own settings alone; `--fresh` clears it, and no other's rounds are left."""
    begin(tmp_path, {"density": 0.1}, True)
    begin(tmp_path, {"density": 0.2}, True)
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "round-001.safetensors").touch()
    begin(tmp_path, {"density": 0.2}, True)
    with pytest.raises(InputError, match="a run of the same density"):
        begin(tmp_path, {"density": 0.1}, True)
    begin(tmp_path, {"density": 0.1}, False)
    assert not any((tmp_path / "rounds").iterdir())


def test_what_cannot_be_kept_is_refused_before_any_training(monkeypatch, run):
    monkeypatch.setattr(Experiment, "start", killed)
    refused = run("search", *SMALL[:-1], "0.0003", "--structure", "output")
    assert refused.code == 2 and "keeps a group of 12 weights, got room for 10" in refused.stderr


def test_rounds_of_a_comparison(tmp_path, monkeypatch, run):
    """Rounds that are found again count with their seconds; a fresh comparison, killed at once, leaves none."""
    monkeypatch.setattr(study, "FILES_OVER", 0)
    compare = ["compare", *SMALL, "--rewind", "1", "--arms", "ltr:2", "--out", "out"]
    assert run(*compare).code == 0
    (folder,) = (tmp_path / "out" / "rounds").glob("*/ltr*")
    for path in (tmp_path / "out" / "arms").iterdir():
        path.unlink()
    # more than the whole comparison could take
    (folder / "round-001.json").write_text('{"seconds": 1000}')
    assert run(*compare).code == 0
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert row["ticket_seconds"] == round_seconds(folder) > 1000
    monkeypatch.setattr(Experiment, "start", killed)
    assert run(*compare, "--fresh").code != 0
    assert not folder.exists()
