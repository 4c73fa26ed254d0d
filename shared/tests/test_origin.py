"""Which code a results file names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isotone.shared.claims import Report


def test_commit_and_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src" / "isotone" / "gitted"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("__version__ = '1.2.3'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    monkeypatch.delitem(sys.modules, "isotone.gitted", raising=False)
    report = Report("gitted", "reproduce", "cpu", seeds=(0,), framework="torch")

    def code() -> tuple[Any, Any, Any]:
        report.__dict__.pop("origin", None)
        return tuple(report.to_json()[key] for key in ("version", "commit", "dirty"))

    def git(*arguments: str) -> str:
        names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        command = ["git", "-C", str(tmp_path), *arguments]
        environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    assert code()[1:] == (None, None)
    git("init")
    (tmp_path / "other.txt").write_text("a")
    git("add", "other.txt")
    git("commit", "-m", "someone else's")
    assert code()[1:] == (None, None), "installed inside a checkout that does not track it"
    git("add", "src")
    git("commit", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    assert code()[1:] == (commit, False)
    (tmp_path / "other.txt").write_text("b")
    assert code()[1:] == (commit, False), "what is not its source does not make it dirty"
    (source / "new.py").write_text("")
    assert code()[1:] == (commit, True)
    import isotone.gitted  # noqa: F401

    assert code() == ("1.2.3", commit, True)
    monkeypatch.delitem(sys.modules, "isotone.gitted")
