"""The finished arms of an experiment, kept one file each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isotone.shared.checkpoint import atomic_write


class ArmLog:
    """The finished arms of an experiment, so that a run that was killed goes on where it stopped.

    An arm is known by its name and `config` (whatever its result depends on: the package's version too, if it
    should be run again after an upgrade). With `resume` false the stored arms of this `config` are deleted.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any], resume: bool) -> None:
        self.folder = Path(folder) / "arms"
        self.config = json.loads(_arm_json(config))
        self.seconds = 0.0
        """What the arms taken so far took to run, in this process or an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in self.folder.glob("*.json"):
                if (stored := _stored_arm(path)) is None or stored["config"] == self.config:
                    path.unlink()

    def arm(self, name: str, function: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of `function()`, run now or, where this arm is finished, earlier.

        Either way it is what JSON gives back: tuples are lists, NumPy's scalars and arrays numbers and lists.
        """
        key = hashlib.sha256(_arm_json({"name": name, "config": self.config}).encode()).hexdigest()
        path = self.folder / f"{key}.json"
        stored = _stored_arm(path)
        if stored is None:
            start = time.monotonic()
            result = function()
            record = {
                "name": name,
                "config": self.config,
                "result": result,
                "seconds": time.monotonic() - start,
            }
            text = _arm_json(record)
            atomic_write(path, text.encode())
            stored = json.loads(text)
        self.seconds += stored["seconds"]
        return stored["result"]


def _arm_json(value: Any) -> str:
    def default(thing: Any) -> Any:
        if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            return dataclasses.asdict(thing)
        if hasattr(thing, "tolist"):
            return thing.tolist()
        if isinstance(thing, os.PathLike):
            return os.fspath(thing)
        raise TypeError(f"expected what JSON can say, got {type(thing).__name__}: {thing!r}")

    return json.dumps(value, sort_keys=True, default=default)


def _stored_arm(path: Path) -> dict[str, Any] | None:
    """The record in `path`, or None where there is none that can be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored if {"name", "config", "result", "seconds"} <= set(stored) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
