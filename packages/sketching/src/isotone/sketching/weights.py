"""Weights as safetensors files, each leaf by its path in the tree."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError


def named(params: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their paths: {"1/w": ..., "1/b": ...}."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(_word(key) for key in path) or "value": np.array(leaf, order="C") for path, leaf in paths}


def save_weights(path: Path, params: Any) -> Path:
    """Write a tree's leaves, all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, safetensors.numpy.save(named(params)))
    return path


def load_weights(path: Path, like: Any) -> Any:
    """The leaves of a safetensors file, or of an .npz of the same names, in the tree of `like`.

    Raises `InputError` on a missing or torn file, names, shapes or types that differ, and NaN.
    """
    if not path.is_file():
        raise InputError(f"expected weights at {str(path)!r}, found no such file")
    kind = "an .npz of weights" if path.suffix == ".npz" else "a safetensors file"
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:  # a TypeError where it is one array
                arrays = {name: file[name] for name in file.files}
        else:
            arrays = safetensors.numpy.load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        raise InputError(f"expected {kind}, got a torn or other one: {str(path)!r}") from None
    wanted = named(like)
    if set(arrays) != set(wanted):
        odd = sorted(set(arrays) ^ set(wanted))[0]
        raise InputError(f"expected weights {', '.join(sorted(wanted))} in {str(path)!r}, {odd} differs")
    for name, leaf in wanted.items():
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            got = f"{found.dtype} {found.shape}"
            raise InputError(f"expected {name} as {leaf.dtype} {leaf.shape} in {str(path)!r}, got {got}")
        if not np.isfinite(found).all():
            raise InputError(f"expected finite weights {name} in {str(path)!r}, got NaN or infinity")
    return jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(arrays[name]) for name in wanted])


def _word(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
