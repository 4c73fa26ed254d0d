"""Bars are there on a terminal, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from isotone.shared.progress import bar, track


def test_silent_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    with bar("steps", 3) as shown:
        shown.advance(2, loss=0.5)
        shown.resize(4)
    assert capfd.readouterr() == ("", "")


def on_a_terminal(code: str) -> str:
    """What `code` writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    os.close(ours)
    assert done.wait() == 0, written.decode()
    return written.decode()


def test_shown_on_a_terminal() -> None:
    written = on_a_terminal(
        "from isotone.shared.progress import bar, track\n"
        "with bar('outer [x]', 2) as outer:\n"
        "    for item in track([1, 2], 'inner'): pass\n"
        "    outer.advance(2, loss=0.123456, arm='muon', step=12345)\n"
    )
    assert "outer [x]" in written and "inner" in written and "100%" in written
    assert "loss=0.1235 arm=muon step=12345" in written


def test_quiet_on_a_terminal() -> None:
    code = (
        "import sys\nfrom isotone.shared.progress import track\nlist(track([1], 'a', quiet=True))\n"
        "assert 'rich' not in sys.modules"
    )
    assert on_a_terminal(code) == ""
