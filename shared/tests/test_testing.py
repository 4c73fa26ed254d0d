"""The helpers that the packages' tests rely on."""

import sys

import pytest
import workers

from isotone.shared.testing import cores, kill_and_resume, readme_blocks, run_ranks


def test_ranks_share_a_group():
    assert run_ranks(workers.total, 2, 10) == [21.0, 21.0]
    assert run_ranks(workers.total, 2, 10, preload=["torch"]) == [21.0, 21.0]


def test_a_failing_rank_is_raised_here():
    with pytest.raises(RuntimeError, match=r"rank 1: (?s:.*)rank one is unwell"):
        run_ranks(workers.fail_on_one, 2, timeout=60)


COUNTER = """
import pathlib, time
path = pathlib.Path("count")
start = int(path.read_text()) if path.exists() else 0
for number in range(start, 40):
    pathlib.Path("new").write_text(str(number + 1)); pathlib.Path("new").rename(path); time.sleep(0.02)
print("from", start)
"""


def test_kill_and_resume(tmp_path):
    def ready():
        return (tmp_path / "count").exists()

    done = kill_and_resume([sys.executable, "-c", COUNTER], ready=ready, seed=0, cwd=tmp_path, delay=0.2)
    assert done.returncode == 0 and (tmp_path / "count").read_text() == "40"
    assert int(done.stdout.split()[-1]) > 0, "the second run went on from the first"
    with pytest.raises(AssertionError, match="before the kill"):
        kill_and_resume([sys.executable, "-c", "pass"], ready=lambda: False, seed=0, cwd=tmp_path)


def test_readme_blocks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# a\n\n```python\nx = 1\n```\n\n<!-- not tested: gpu -->\n```console\n$ isotone a\n```\n\ntext\n\n"
        "<!-- not tested: network -->\n\ntext\n\n```python\ny = 2\n```\n"
    )
    blocks = readme_blocks(path)
    assert [(b.language, b.skipped) for b in blocks] == [
        ("python", None),
        ("console", "gpu"),
        ("python", None),
    ]
    assert blocks[0].code == "x = 1\n" and blocks[0].line == 3


def test_how_slow_a_core_is(monkeypatch):
    """Of a core that takes three times the reference's seconds, and of one that takes half."""
    times = iter((1.0, 1.0 + 3 * cores.LOOP_SECONDS, 2.0, 2.0 + cores.LOOP_SECONDS / 2))
    monkeypatch.setattr(cores.time, "thread_time", lambda: next(times))
    assert cores.slowness() == pytest.approx(3) and cores.slowness() == 1
