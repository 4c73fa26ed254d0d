"""A user's mistake is one sentence and exit code 2; a bug is a traceback and exit code 1."""

from pathlib import Path

import pytest
import typer

from isotone.shared.errors import InputError, check_count
from isotone.shared.testing import run_cli

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def mistake() -> None:
    raise InputError("expected a positive number,\n got -1")


@app.command()
def bug() -> None:
    raise ValueError("an invariant of ours broke")


@app.command()
def read(path: Path) -> None:
    path.read_text()


@app.command()
def read_inside(path: Path) -> None:
    (path / "inner" / "file").read_text()


@app.command()
def read_own() -> None:
    Path("our-own-file-that-is-not-there").read_text()


@app.command()
def fine(number: int = 3) -> None:
    print(number)


@app.command()
def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mistake"], "expected a positive number, got -1"),
        (["fine", "--nope"], "--nope"),
        (["fine", "--number", "x"], "--number"),
        (["nothing"], "nothing"),
        (["read", "gone.txt"], "gone.txt: No such file"),
        (["read-inside", "folder"], "No such file"),
    ],
)
def test_mistakes(argv, words, tmp_path):
    result = run_cli(app, argv, tmp_path)
    assert result.code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("argv", [["bug"], ["read-own"]])
def test_bugs_keep_their_traceback(argv, tmp_path):
    result = run_cli(app, argv, tmp_path)
    assert result.code == 1 and "Traceback" in result.stderr


def test_success_and_interruption(tmp_path):
    assert run_cli(app, ["fine"], tmp_path).stdout == "3\n"
    assert run_cli(app, ["stop"], tmp_path).code == 130


@pytest.mark.parametrize(("value", "least"), [(0, 1), (-1, 0), (2.0, 1), (True, 1), ("3", 1), (None, 1)])
def test_what_is_no_count(value: object, least: int) -> None:
    with pytest.raises(InputError, match=f"expected steps to be a whole number of at least {least}, got "):
        check_count("steps", value, least)


def test_counts() -> None:
    check_count("steps", 1)
    check_count("steps", 0, 0)
