"""Arrays out of the files that fields come in: what a file of each form holds, before its shapes are judged.

.npz: `inputs` and `targets`, or `x` and `y`, or `trajectories`. HDF5 of PDEBench: `tensor`; a group a sample with
`data`; `density`, `pressure`, `Vx`, .. (compressible flow); `velocity`, `particles`, `force` (incompressible). MATLAB,
5 and 7.3, of the FNO authors: `a` and `u`, `coeff` and `sol`. Torch files of a dict of tensors, through torch's
restricted reader, which never unpickles code.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isotone.shared.errors import InputError

PAIRS = (("inputs", "targets"), ("x", "y"), ("a", "u"), ("coeff", "sol"))
FLOWS = ("Vx", "Vy", "Vz")


@dataclass(frozen=True)
class Content:
    """What a file holds: `inputs` and `targets` (n, N1, ..), or `frames` of trajectories (n, t, N1, ..); `channels`:
    whether the last axis is one of channels, None where the form does not say; `trajectory`: each sample's number."""

    inputs: np.ndarray | None = None
    targets: np.ndarray | None = None
    frames: np.ndarray | None = None
    channels: bool | None = None
    trajectory: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Content:
    """What lies in a file, by its suffix: .npz; .h5, .hdf5 (extra `hdf5`), .mat; .pt, .pth (extra `torch`).

    Raises `InputError` on a missing, torn or foreign file.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Content]] = {".npz": _npz, ".pt": _torch, ".pth": _torch}
    readers |= {".h5": _hdf5, ".hdf5": _hdf5, ".mat": _matlab}
    if path.suffix not in readers:
        raise InputError(f"expected a file of {', '.join(readers)}, got {str(path)!r}")
    if not path.is_file():
        raise InputError(f"expected fields in {str(path)!r}, found no file")
    try:
        return readers[path.suffix](path)
    except InputError:
        raise
    except Exception as error:  # whatever the form's parser meets in a file that is torn
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"expected a whole {path.suffix} file in {str(path)!r}: {text}") from None


def _named(names: Iterable[str], get: Callable[[str], np.ndarray], path: Path) -> Content:
    """The arrays that are known by their names."""
    found = sorted(names)
    if "trajectories" in found:
        return Content(frames=get("trajectories"))
    for first, second in PAIRS:
        if first in found and second in found:
            return Content(get(first), get(second))
    said = ", ".join(found[:8]) or "nothing"
    raise InputError(f"expected arrays inputs and targets (or x and y) in {str(path)!r}, found {said}")


def _npz(path: Path) -> Content:
    with np.load(path, allow_pickle=False) as file:
        plain = _named(file.files, lambda name: file[name], path)
        about = _about(str(file["about"]), path) if "about" in file.files else {}
        channels = about.pop("channels", None)
        if not isinstance(channels, bool | None):
            raise InputError(f"expected true or false as channels in about of {str(path)!r}, got {channels!r}")
        numbers = file["trajectory"] if "trajectory" in file.files else None
        return Content(plain.inputs, plain.targets, plain.frames, channels, numbers, about)


def _about(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"expected JSON as about in {str(path)!r}, got {text[:40]!r}") from None
    if not isinstance(found, dict):
        raise InputError(f"expected an object as about in {str(path)!r}, got {type(found).__name__}")
    return found


def _hdf5(path: Path) -> Content:
    try:
        import h5py
    except ImportError:
        raise InputError("expected h5py for HDF5 files (extra hdf5), it is not installed") from None
    with h5py.File(path, "r") as file:
        sets = [name for name in file if isinstance(file[name], h5py.Dataset)]

        def get(name: str) -> np.ndarray:
            return np.asarray(file[name])

        if path.suffix == ".mat" or any("MATLAB_class" in file[name].attrs for name in sets):
            return _of_matlab(sets, lambda name: get(name).T, path)  # HDF5 has MATLAB's axes in reverse
        if "tensor" in sets:
            tensor = get("tensor")
            # Darcy: coefficient to solution, which has a time axis of 1
            if "nu" in sets and file["nu"].ndim >= 2 and tensor.ndim == file["nu"].ndim + 1:
                return Content(get("nu"), tensor[:, 0], channels=False)
            return Content(frames=tensor, channels=False)
        if {"density", "pressure", "Vx"} <= set(sets):
            axes = file["density"].ndim - 2
            return _stacked([get(name) for name in _flow(sets, axes, path)], path)
        if "velocity" in sets:
            parts = {name: get(name) for name in ("velocity", "particles", "force") if name in sets}
            return _incompressible(parts, path)
        groups = [name for name in sorted(file) if isinstance(file[name], h5py.Group) and "data" in file[name]]
        if groups:
            each = [np.asarray(file[name]["data"]) for name in groups]
            _check_alike([frames.shape for frames in each], path)
            return Content(frames=np.stack(each), channels=True)
        return _named(sets, get, path)


def _flow(sets: list[str], axes: int, path: Path) -> list[str]:
    """The channels of PDEBench's compressible flow on a grid of so many axes, in their order."""
    names = ["density", "pressure", *FLOWS[: max(1, axes)]]
    if missing := [name for name in names if name not in sets]:
        raise InputError(f"expected {', '.join(names)} of {axes} axes in {str(path)!r}, found no {missing[0]}")
    return names


def _stacked(parts: list[np.ndarray], path: Path) -> Content:
    _check_alike([part.shape for part in parts], path)
    return Content(frames=np.stack(parts, -1), channels=True)


def _incompressible(parts: dict[str, np.ndarray], path: Path) -> Content:
    """(n, t, N1, N2, 2), (n, t, N1, N2, 1); the force (n, N1, N2, 2) is the same in every frame."""
    velocity = parts["velocity"]
    if "force" in parts:
        force = parts["force"]
        if force.ndim == velocity.ndim - 1 and velocity.ndim > 2:
            parts["force"] = np.broadcast_to(force[:, None], (len(force), velocity.shape[1], *force.shape[1:]))
    _check_alike([part.shape[:-1] for part in parts.values()], path)
    return Content(frames=np.concatenate(list(parts.values()), -1), channels=True)


def _check_alike(shapes: list[tuple[int, ...]], path: Path) -> None:
    for shape in shapes:
        if shape != shapes[0]:
            raise InputError(f"expected arrays of one shape in {str(path)!r}, got {shapes[0]} and {shape}")


def _matlab(path: Path) -> Content:
    """MATLAB 7.3 is HDF5; 5 is scipy's."""
    try:
        import h5py

        if h5py.is_hdf5(path):
            return _hdf5(path)
    except ImportError:
        pass
    from scipy.io import loadmat

    try:
        found = {name: value for name, value in loadmat(path).items() if isinstance(value, np.ndarray)}
    except NotImplementedError:  # scipy's word for 7.3
        raise InputError("expected h5py for HDF5 files (extra hdf5), it is not installed") from None
    return _of_matlab(list(found), lambda name: found[name], path)


def _of_matlab(names: list[str], get: Callable[[str], np.ndarray], path: Path) -> Content:
    """Arrays in MATLAB's order of axes: samples first; of `u` time last, of which the last frame is the target."""
    if {"a", "u"} <= set(names):
        a, u = get("a"), get("u")
        return Content(a, u[..., -1] if u.ndim == a.ndim + 1 else u, channels=False)
    plain = _named(names, get, path)
    return Content(plain.inputs, plain.targets, plain.frames, False if "coeff" in names else None)


def _torch(path: Path) -> Content:
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
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}

    def get(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested or tensor.is_quantized:
            kind = "meta" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")
            raise InputError(f"expected dense tensors in {str(path)!r}, got {name} of kind {kind}")
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()  # NumPy has no bfloat16
        return tensor.resolve_conj().resolve_neg().numpy()

    return _named(tensors, get, path)
