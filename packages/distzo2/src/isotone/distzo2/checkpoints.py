"""A run's checkpoints: a safetensors file a block, and beside them what the run must know to go on.

`weights-STEP/` is laid out as Hugging Face lays out a model in shards, so that `from_pretrained` reads it where all
tensors are trained; its files' SHA-256 stand in the checkpoint of the same step. No more than a block is held twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from isotone.distzo2.engine import ZOEngine
from isotone.shared.checkpoint import Checkpoint, CheckpointStore, atomic_write, load_file
from isotone.shared.errors import InputError

_STEP = re.compile(r"step-(\d{8,})-[0-9a-f]{64}\.safetensors")
_WEIGHTS = re.compile(r"(\.?)weights-(\d{8,})(?:\.tmp)?")


class Tensors(Mapping[str, Tensor]):
    """Tensors by name out of several safetensors files, each read when it is asked for. `shapes`: of all of them."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    self._files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_run(engine: ZOEngine, store: CheckpointStore | None, arrays: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint of `engine`'s step, block by block; all ranks call it, the one with a `store` writes.

    Raises where writing failed: its error on the rank that writes, `RankLostError` on the others.
    """
    failed: list[Exception] = []
    files: dict[str, str] = {}
    work = store.directory / f".weights-{engine.steps:08d}.tmp" if store else None
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    names: dict[str, str] = {}
    size = 0
    for unit, tensors in engine.trained_units():
        # ranks that hold slices go through all blocks together, whatever the disk says
        if work is None or failed or not tensors:
            continue
        try:
            work.mkdir(parents=True, exist_ok=True)
            data = save({name: value.contiguous() for name, value in tensors.items()}, {"format": "pt"})
            atomic_write(work / f"{unit}.safetensors", data)
        except Exception as error:
            failed.append(error)
            continue
        files[f"{unit}.safetensors"] = hashlib.sha256(data).hexdigest()
        names |= dict.fromkeys(tensors, f"{unit}.safetensors")
        size += sum(value.numel() * value.element_size() for value in tensors.values())

    def finish() -> None:
        if failed:
            raise failed[0]
        if work is None or store is None:
            return
        index = {"metadata": {"total_size": size}, "weight_map": names}
        atomic_write(work / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
        config: Any = getattr(engine.model, "config", None)
        if config is not None and hasattr(config, "to_json_string"):
            atomic_write(work / "config.json", config.to_json_string().encode())
        final = store.directory / f"weights-{engine.steps:08d}"
        # one that is there is of no whole checkpoint
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        store.save(engine.steps, arrays, {**state, "files": files})
        _prune(store.directory)

    engine.wire.together(finish)


def load_run(folder: str | os.PathLike[str]) -> tuple[Checkpoint, Tensors] | None:
    """The newest whole checkpoint in `folder` and its weights, or None; a torn one is passed over with a warning."""
    steps = {path: int(match[1]) for path in Path(folder).glob("step-*") if (match := _STEP.fullmatch(path.name))}
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        try:
            found = load_file(path, "torch")
            return found, _weights(found, Path(folder) / f"weights-{steps[path]:08d}")
        except InputError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None


def forget_after(store: CheckpointStore, step: int) -> None:
    """Delete the checkpoints past `step`, which `load_run` passed over: they would stand in the way of new ones."""
    for path in store.directory.glob("step-*"):
        if (match := _STEP.fullmatch(path.name)) and int(match[1]) > step:
            path.unlink(missing_ok=True)


def _weights(found: Checkpoint, folder: Path) -> Tensors:
    for name, digest in found.state.get("files", {}).items():
        try:
            with (folder / name).open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            whole = False
        if not whole:
            raise InputError(f"expected the weights of step {found.step}, got torn or missing ones: {name!r}")
    return Tensors([folder / name for name in found.state.get("files", {})])


def clear_runs(store: CheckpointStore) -> None:
    """Delete every checkpoint: what `--fresh` asks for."""
    store.clear()
    _prune(store.directory)


def _prune(folder: Path) -> None:
    """Delete the weights of steps that have no checkpoint."""
    kept = {int(match[1]) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))}
    for path in folder.iterdir():
        match = _WEIGHTS.fullmatch(path.name)
        if match and (match[1] or int(match[2]) not in kept):
            shutil.rmtree(path, ignore_errors=True)
