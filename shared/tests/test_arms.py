"""Finished arms of an experiment: run once, kept, and run again where what was kept is damaged."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isotone.shared.claims import ArmLog


def test_arms_are_not_run_again(tmp_path: Path) -> None:
    config = {"scale": "cpu", "seeds": (0, 1), "folder": tmp_path}
    runs: list[str] = []

    def arm(name: str) -> dict[str, Any]:
        runs.append(name)
        return {"loss": np.float64(0.1), "curve": np.array([1.5, math.inf]), "pair": (1, 2)}

    expected = {"loss": 0.1, "curve": [1.5, math.inf], "pair": [1, 2]}
    for resume in (False, True, True):
        log = ArmLog(tmp_path, config, resume=resume)
        assert [log.arm(name, lambda name=name: arm(name)) for name in ("a", "b")] == [expected] * 2
    assert runs == ["a", "b"] and log.seconds > 0
    ArmLog(tmp_path, {**config, "scale": "smoke"}, resume=True).arm("a", lambda: arm("a"))
    assert runs == ["a", "b", "a"] and len(list((tmp_path / "arms").iterdir())) == 3
    ArmLog(tmp_path, config, resume=False)
    assert len(list((tmp_path / "arms").iterdir())) == 1, "fresh forgets the arms of its own config only"


def test_failed_and_damaged_arms_are_run_again(tmp_path: Path) -> None:
    log = ArmLog(tmp_path, {}, resume=True)
    with pytest.raises(ZeroDivisionError):
        log.arm("a", lambda: {"x": 1 / 0})
    with pytest.raises(TypeError, match="expected what JSON can say"):
        log.arm("a", lambda: {"x": object()})
    assert not list((tmp_path / "arms").iterdir())
    log.arm("a", lambda: {"x": 1})
    (stored,) = (tmp_path / "arms").iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}\.json", stored.name)
    for damage in ("", '{"result": {"x": 1', "[]", "{}"):
        stored.write_text(damage)
        assert log.arm("a", lambda: {"x": 2}) == {"x": 2}
    assert log.arm("a", lambda: {"x": 3}) == {"x": 2}
