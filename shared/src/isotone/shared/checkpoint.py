"""Checkpoints that survive a kill at any moment, a full disk and a flipped bit.

One safetensors file a checkpoint: the arrays, and step and JSON state in its metadata. The SHA-256 of the
whole file stands in its name, so that a torn or corrupted file is known by its name alone. A file gets that
name only after its bytes are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone.shared.errors import InputError

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{64})\.safetensors")
_NUMPY_TYPES = {
    **{"BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64"},
    **{"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `arrays` by name, and `state` as JSON gives it back (tuples as lists)."""

    step: int
    arrays: dict[str, Any]
    state: dict[str, Any]
    path: Path


class CheckpointStore:
    """The one writer of the checkpoints in `directory`; the last `keep` of them stay.

    Use it as a context manager: entering takes the writer's lock (`InputError` naming the other writer's
    process if there is one), leaving or dying releases it.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"expected keep to be at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self._lock: int | None = None

    def __enter__(self) -> CheckpointStore:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.directory)
        _open_stores.add(self)
        for leftover in self.directory.glob(".step-*.tmp"):
            leftover.unlink(missing_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        import fcntl

        if self._lock is not None:
            # a child that was forked a moment ago may not have closed its copy yet
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, step: int, arrays: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and return its path; on return it survives a power cut.

        `arrays`: NumPy, torch or JAX arrays, of any layout and device. `state`: whatever JSON can say. Raises
        `InputError` where a whole checkpoint of a later step is there: `load_latest` would return that one.
        An error while writing leaves everything saved before as it was.
        """
        if self._lock is None:
            raise RuntimeError("expected save inside `with CheckpointStore(...)`")
        if step < 0:
            raise ValueError(f"expected step to be at least 0, got {step}")
        later = [path for path in _newest_first(self.directory) if _step(path) > step]
        if whole := next(filter(_is_whole, later), None):
            raise InputError(f"expected a step past {_step(whole)}, saved in {str(self.directory)!r}, got {step}")
        data = _serialize(step, arrays, state)
        path = self.directory / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        atomic_write(path, data)
        # the file just written is whole; what is later than it is torn
        earlier = [old for old in _newest_first(self.directory) if old != path and old not in later]
        for old in [*later, *earlier[self.keep - 1 :]]:
            old.unlink(missing_ok=True)
        return path

    def clear(self) -> None:
        """Delete every checkpoint here: what `--fresh` asks for."""
        if self._lock is None:
            raise RuntimeError("expected clear inside `with CheckpointStore(...)`")
        for path in _newest_first(self.directory):
            path.unlink(missing_ok=True)


def load_latest(directory: str | os.PathLike[str], framework: str = "numpy") -> Checkpoint | None:
    """The newest whole checkpoint in `directory`, or None.

    A torn or corrupted one is passed over with a warning; older ones are not read. `framework`: "numpy" or
    "torch", the kind of the returned arrays (on the CPU).
    """
    for path in _newest_first(Path(directory)):
        try:
            return load_file(path, framework)
        except InputError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None


def load_file(path: str | os.PathLike[str], framework: str = "numpy") -> Checkpoint:
    """The checkpoint in the file `path`; `InputError` where it is missing, torn or corrupted."""
    if framework not in ("numpy", "torch"):
        raise ValueError(f"expected framework to be numpy or torch, got {framework!r}")
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if not match:
        raise InputError(f"expected a checkpoint named step-STEP-SHA256.safetensors, got {str(path)!r}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"expected a checkpoint at {str(path)!r}, found none") from None
    if hashlib.sha256(data).hexdigest() != match[2]:
        raise InputError(f"expected a whole checkpoint, got a torn or corrupted one: {str(path)!r}")
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        saved = json.loads(header["__metadata__"]["isotone"])
        step, state = saved["step"], saved["state"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"expected a checkpoint of isotone, got another file: {str(path)!r}") from None
    if step != int(match[1]):
        raise InputError(f"expected a checkpoint of step {int(match[1])}, got step {step}: {str(path)!r}")
    return Checkpoint(step, _deserialize(data, framework), state, path)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, whatever happens."""
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # the rename itself is on the disk only when the folder is
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _newest_first(directory: Path) -> list[Path]:
    """The files that are named as checkpoints, by name alone: none is read here."""
    if not directory.is_dir():
        return []
    found = []
    for entry in os.scandir(directory):
        if match := _NAME.fullmatch(entry.name):
            found.append((int(match[1]), entry.stat().st_mtime_ns, entry.name))
    return [directory / name for *_, name in sorted(found, reverse=True)]


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == path.stem.split("-")[2]


def _serialize(step: int, arrays: Mapping[str, Any], state: Mapping[str, Any]) -> bytes:
    metadata = {"isotone": json.dumps({"step": step, "state": dict(state)})}
    if any(_is_torch(array) for array in arrays.values()):
        import safetensors.torch
        import torch

        # tied weights share memory, which safetensors refuses: each gets its own
        tensors = {
            name: (array.detach() if _is_torch(array) else torch.from_numpy(_contiguous(array)))
            .to("cpu", copy=True)
            .contiguous()
            for name, array in arrays.items()
        }
        return safetensors.torch.save(tensors, metadata)
    import safetensors.numpy

    return safetensors.numpy.save({name: _contiguous(array) for name, array in arrays.items()}, metadata)


def _is_torch(array: Any) -> bool:
    return hasattr(array, "detach")


def _contiguous(array: Any) -> Any:
    import numpy as np

    # not np.ascontiguousarray, which makes a 0-d array 1-d
    array = np.asarray(array)
    native = array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else array.dtype
    return np.array(array, dtype=native, order="C", copy=True)


def _deserialize(data: bytes, framework: str) -> dict[str, Any]:
    if framework == "torch":
        import safetensors.torch

        return safetensors.torch.load(data)
    import numpy as np
    import safetensors

    arrays = {}
    for name, view in safetensors.deserialize(data):
        kind = _NUMPY_TYPES[view["dtype"]]
        if kind.startswith(("bfloat", "float8")):
            dtype = _extended_type(name, kind)
        else:
            dtype = np.dtype(kind)
        arrays[name] = np.frombuffer(bytearray(view["data"]), dtype).reshape(view["shape"])
    return arrays


def _extended_type(array: str, kind: str) -> Any:
    """A type that NumPy has only where ml_dtypes (which JAX brings) is installed."""
    import importlib

    import numpy as np

    try:
        return np.dtype(getattr(importlib.import_module("ml_dtypes"), kind))
    except ImportError:
        raise InputError(f"expected framework='torch' for {array!r}: NumPy alone has no {kind}") from None


def _take_lock(directory: Path) -> int:
    import fcntl

    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise InputError(f"expected no other writer of {str(directory)!r}, found process {holder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


_open_stores: weakref.WeakSet[CheckpointStore] = weakref.WeakSet()


def _forget_locks() -> None:
    for store in list(_open_stores):
        store._close()


# a forked data-loading worker would hold its parent's lock for as long as it outlives it
os.register_at_fork(after_in_child=_forget_locks)
