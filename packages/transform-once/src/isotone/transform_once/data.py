"""The user's fields from files, and ours from the solvers: inputs and targets on one grid, channels last.

Read: .npz (`inputs` and `targets`, or `x` and `y`, with or without a channel axis); HDF5 in PDEBench's layouts
(`tensor` (n, t, N1, ..), or a group a sample with `data` (t, N1, .., C)) and MATLAB 7.3 files of the FNO authors (`a`,
`u`); torch files of a dict of tensors `x` and `y`, through torch's restricted reader, which never unpickles code.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from isotone.shared.checkpoint import atomic_write
from isotone.shared.data import sha256
from isotone.shared.errors import InputError, check_count
from isotone.transform_once.solvers import joukowski, navier_stokes, plume
from isotone.transform_once.solvers.plume import PlumeConfig

PROBLEMS = ("navier-stokes", "joukowski", "plume")
_PAIRS = (("inputs", "targets"), ("x", "y"), ("a", "u"))


@dataclass(frozen=True)
class Fields:
    """`inputs` (samples, N1, .., Nd, C), `targets` of the same grid; `frames`: how many frames the inputs' channels
    are, oldest first (a rollout's context); `name` and `sha256` of where they came from."""

    inputs: np.ndarray
    targets: np.ndarray
    name: str = "fields"
    sha256: str = ""
    frames: int = 1
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The grid."""
        return self.inputs.shape[1:-1]

    def split(self, test: int | float, seed: int | None = None) -> tuple[Fields, Fields]:
        """Training and test samples: the last `test` of them, a number or a share; with a seed, of a random order.

        Raises `InputError` where one side would be empty.
        """
        count = round(test * len(self)) if isinstance(test, float) else test
        if not 0 < count < len(self):
            raise InputError(f"expected a test split of 1 to {len(self) - 1} samples, got {test}")
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        return self.take(order[:-count]), self.take(order[-count:])

    def take(self, rows: np.ndarray | slice) -> Fields:
        """Some samples."""
        return Fields(self.inputs[rows], self.targets[rows], self.name, self.sha256, self.frames, self.about)

    def coarser(self, size: int) -> Fields:
        """Every so many-th point of each axis, to `size` points a side. Raises `InputError` where that does not
        divide."""
        if any(n % size for n in self.sizes):
            raise InputError(f"expected a size that divides the grid {self.sizes}, got {size}")
        rows = (slice(None), *(slice(None, None, n // size) for n in self.sizes))
        return Fields(self.inputs[rows], self.targets[rows], self.name, self.sha256, self.frames, self.about)

    def save(self, path: str | Path) -> None:
        """An .npz that `load` reads, whole before it is there."""
        import io

        buffer = io.BytesIO()
        about = json.dumps({"context": self.frames, **self.about})
        np.savez_compressed(buffer, inputs=self.inputs, targets=self.targets, about=np.array(about))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), buffer.getvalue())


def load(path: str | Path, context: int = 1, step: int = 1) -> Fields:
    """Fields of a file by its suffix: .npz; .h5, .hdf5, .mat (extra `hdf5`); .pt, .pth (extra `torch`).

    Of a file of trajectories (n, t, N1, .., C) the pairs are windows: `context` frames as channels, and the frame
    `step` after the last of them. Raises `InputError` on a missing, torn or foreign file, shapes that are no fields,
    NaN, and a file of trajectories shorter than the window.
    """
    path = Path(path)
    check_count("context", context)
    check_count("step", step)
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {".npz": _npz, ".pt": _torch, ".pth": _torch}
    readers |= dict.fromkeys((".h5", ".hdf5", ".mat"), _hdf5)
    if path.suffix not in readers:
        raise InputError(f"expected a file of {', '.join(readers)}, got {str(path)!r}")
    if not path.is_file():
        raise InputError(f"expected fields in {str(path)!r}, found no file")
    arrays = readers[path.suffix](path)
    about: dict[str, Any] = {}
    if "about" in arrays:
        about = dict(json.loads(str(arrays.pop("about"))))
    if "trajectories" in arrays:
        return _windows(arrays["trajectories"], context, step, path)
    for first, second in _PAIRS:
        if first in arrays and second in arrays:
            return _fields(arrays[first], arrays[second], path, int(about.pop("context", 1)), about)
    found = ", ".join(sorted(arrays)) or "nothing"
    raise InputError(f"expected arrays inputs and targets (or x and y) in {str(path)!r}, found {found}")


def _fields(inputs: np.ndarray, targets: np.ndarray, path: Path, frames: int, about: dict[str, Any]) -> Fields:
    """Checked, float32, with a channel axis; targets of trajectories by their last frame."""
    if inputs.ndim < 2 or not len(inputs):
        raise InputError(f"expected fields (samples, N1, .., channels) in {str(path)!r}, got shape {inputs.shape}")
    # Burgers files hold all frames of the target: the last is what the operator gives
    if targets.ndim == inputs.ndim + 1 and targets.shape[2:] == inputs.shape[1:]:
        targets = targets[:, -1]
    if targets.shape == inputs.shape and not _has_channels(inputs):
        inputs, targets = inputs[..., None], targets[..., None]
    if inputs.shape[:-1] != targets.shape[:-1]:
        raise InputError(f"expected one grid in {str(path)!r}, got {inputs.shape} and {targets.shape}")
    inputs, targets = _finite("inputs", inputs, path), _finite("targets", targets, path)
    return Fields(inputs, targets, path.name, sha256(path), frames, about)


def _finite(name: str, array: np.ndarray, path: Path) -> np.ndarray:
    """float32, of floats (or masks) that are finite."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == bool):
        raise InputError(f"expected real floating-point {name} in {str(path)!r}, got {array.dtype}")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"expected finite {name} in {str(path)!r}, got NaN or infinity")
    return array


def _has_channels(array: np.ndarray) -> bool:
    """A last axis that is much shorter than the grid's is one of channels."""
    return array.ndim > 2 and array.shape[-1] <= 8 and 2 * array.shape[-1] <= min(array.shape[1:-1])


def _windows(frames: np.ndarray, context: int, step: int, path: Path, hashed: bool = True) -> Fields:
    if not np.isfinite(frames).all():
        raise InputError(f"expected finite trajectories in {str(path)!r}, got NaN or infinity")
    times = frames.shape[1]
    if times < context + step:
        raise InputError(f"expected {context + step} frames or more in {str(path)!r}, got {times}")
    starts = range(times - context - step + 1)
    inputs = np.concatenate([np.concatenate([frames[:, s + c] for c in range(context)], -1) for s in starts])
    targets = np.concatenate([frames[:, s + context + step - 1] for s in starts])
    digest = sha256(path) if hashed else ""
    return Fields(inputs.astype(np.float32), targets.astype(np.float32), path.name, digest, context)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise InputError(f"expected a whole .npz in {str(path)!r}: {error}") from None


def _hdf5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise InputError("expected h5py for HDF5 files (extra hdf5), it is not installed") from None
    try:
        with h5py.File(path, "r") as file:
            if "tensor" in file:
                tensor = np.asarray(file["tensor"])
                if "nu" in file and file["nu"].ndim >= 2:  # PDEBench's Darcy: coefficient to solution
                    return {"x": np.asarray(file["nu"])[..., None], "y": tensor[:, 0][..., None]}
                return {"trajectories": tensor[..., None]}
            if {"a", "u"} <= set(file):  # MATLAB keeps the axes in reverse
                a, u = (np.asarray(file[name]) for name in ("a", "u"))
                a, u = np.moveaxis(a, -1, 0).swapaxes(1, 2), np.moveaxis(u, -1, 0).swapaxes(2, 3)
                return {"x": a[..., None], "y": u[:, -1][..., None]}
            groups = [name for name in sorted(file) if isinstance(file[name], h5py.Group) and "data" in file[name]]
            if groups:
                return {"trajectories": np.stack([np.asarray(file[name]["data"]) for name in groups])}
            return {name: np.asarray(file[name]) for name in file if isinstance(file[name], h5py.Dataset)}
    except (OSError, ValueError) as error:
        raise InputError(f"expected a whole HDF5 file in {str(path)!r}: {error}") from None


def _torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError("expected torch for .pt files (extra torch), it is not installed") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader meets in a file that is torn or holds more than tensors
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"expected a torch file of tensors alone in {str(path)!r}: {text}") from None
    if not isinstance(content, dict):
        raise InputError(f"expected a dict of tensors in {str(path)!r}, got {type(content).__name__}")
    return {str(name): value.numpy() for name, value in content.items() if isinstance(value, torch.Tensor)}


def generate(problem: str, samples: int, size: int, seed: int = 0, **settings: Any) -> Fields:
    """Fields of a solver: "navier-stokes" (vorticity at 0 to that at `t_final`), "joukowski" (stream and mask to
    pressure and velocity), "plume" (two frames of density to the next; `frames` of each plume, height 2 `size`).

    `settings`: of the solver. Raises `InputError` on another problem.
    """
    if problem == "navier-stokes":
        first, last = navier_stokes(jax.random.key(seed), samples, size, **settings)
        return _made(first, last[:, -1], problem, samples, size, seed, settings)
    if problem == "joukowski":
        return _made(*joukowski(seed, samples, size), problem, samples, size, seed, settings)
    if problem == "plume":
        frames = settings.pop("frames", 60)
        found = plume(seed, samples, frames, PlumeConfig(2 * size, size, **settings))
        made = _windows(found, 2, 1, Path("plume"), hashed=False)
        return _made(made.inputs, made.targets, problem, samples, size, seed, {"frames": frames, **settings}, 2)
    raise InputError(f"expected a problem of {', '.join(PROBLEMS)}, got {problem!r}")


def _made(
    inputs: np.ndarray,
    targets: np.ndarray,
    problem: str,
    samples: int,
    size: int,
    seed: int,
    settings: dict[str, Any],
    frames: int = 1,
) -> Fields:
    about = {"problem": problem, "samples": samples, "size": size, "seed": seed, **settings}
    digest = sha256(inputs.tobytes() + targets.tobytes())
    return Fields(inputs.astype(np.float32), targets.astype(np.float32), problem, digest, frames, about)
