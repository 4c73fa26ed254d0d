"""The dispatcher, and the common options of every verb."""

import json
import subprocess
import sys
import time
from typing import Annotated

import pytest
import typer

from isotone.shared import cli
from isotone.shared.claims import Claim, Measurement, Report
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli

HEAVY = ("torch", "jax", "typer", "rich", "numpy", "matplotlib")


@pytest.fixture
def app():
    app = cli.paper_app("example", framework="torch")

    @cli.verb(app)
    def work(run: cli.Run, text: Annotated[str, typer.Option(help="a word")] = "a") -> dict:
        """Works."""
        return {"text": text, "seeds": run.seeds, "out": str(run.out), "resume": run.resume}

    @cli.verb(app)
    def reproduce(run: cli.Run, measured: float = 1.0) -> Report:
        """Measures."""
        claim = Claim("c", "a claim", "section 1", "s", 1.0, 1.0, "min")
        return Report("example", "reproduce", "smoke", (0,), "torch", measurements=[Measurement(claim, measured)])

    return app


def test_verb_gets_the_common_options(app, tmp_path):
    result = run_cli(app, ["work", "--text", "b", "--seeds", "0:3", "--fresh", "--json"], tmp_path)
    expected = {"text": "b", "seeds": [0, 1, 2], "out": "isotone-results/example", "resume": False}
    assert json.loads(result.stdout) == expected
    assert "text" in run_cli(app, ["work"], tmp_path).stdout
    assert run_cli(app, ["work", "--quiet"], tmp_path).stdout == ""


def test_out_that_is_a_file_is_refused(app, tmp_path):
    (tmp_path / "taken").write_text("mine")
    result = run_cli(app, ["work", "--out", "taken"], tmp_path)
    assert result.code == 2 and "taken" in result.stderr and (tmp_path / "taken").read_text() == "mine"


def test_report_is_saved_printed_and_strict(app, tmp_path):
    result = run_cli(app, ["reproduce", "--out", "o", "--measured", "0.5"], tmp_path)
    assert result.code == 0 and "not held" in result.stdout
    assert (tmp_path / "o/reproduce-smoke.json").exists() and (tmp_path / "o/report.html").exists()
    assert run_cli(app, ["reproduce", "--strict", "--measured", "0.5"], tmp_path).code == 1
    assert run_cli(app, ["reproduce", "--strict", "--measured", "1.5"], tmp_path).code == 0
    assert json.loads(run_cli(app, ["reproduce", "--json"], tmp_path).stdout)["claims"][0]["held"] is True


@pytest.mark.parametrize("text", ["", "a", "1,1", "-1", "3:1", "0:2:4", "1.5", str(2**32)])
def test_bad_seeds(text):
    with pytest.raises(InputError, match="--seeds"):
        cli.parse_seeds(text)


def test_seeds():
    assert cli.parse_seeds("0,4") == (0, 4) and cli.parse_seeds("2:4") == (2, 3) and cli.parse_seeds(None) is None


def test_list_is_fast_and_imports_no_paper():
    code = "import sys; from isotone.shared.cli import dispatch; dispatch([]); print([m for m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert not [name for name in HEAVY if f"'{name}'" in modules]
    assert "isotone.normuon" not in modules
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "isotone.shared"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nope"], "'nope'"),
        (["reproduce", "nope"], "'nope'"),
        (["reproduce", "--scale", "huge"], "'huge'"),
        (["reproduce", "--scale"], "--scale"),
        (["report", "missing"], "'missing'"),
        (["report", "--readme", "missing.md"], "missing.md"),
        (["report", "--what"], "--what"),
    ],
)
def test_dispatcher_refuses(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.dispatch(argv) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


def test_report_page_of_a_folder(app, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(app, ["reproduce", "--out", "isotone-results/example", "--quiet"], tmp_path)
    assert cli.dispatch(["report"]) == 0
    assert "a claim" in (tmp_path / "isotone-results/report.html").read_text()
    (tmp_path / "README.md").write_text(
        "# x\n<!-- results:isotone-results/example/reproduce-smoke.json -->\n\n<!-- /results -->\n"
    )
    assert cli.dispatch(["report", "--readme", "README.md"]) == 0
    assert "a claim" in (tmp_path / "README.md").read_text()


def test_help_and_version(capsys):
    assert cli.dispatch(["--help"]) == 0 and "usage" in capsys.readouterr().out
    assert cli.dispatch(["--version"]) == 0 and "isotone-shared" in capsys.readouterr().out
