"""Parameters in safetensors files, by leaf name, so that any tool of the ecosystem opens them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from isotone.concrete_tickets.layout import Params, leaf_name
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError


def save_weights(path: str | Path, params: Params, metadata: dict[str, str] | None = None) -> Path:
    """Write every leaf of `params` under its name; a crash leaves the old file or the new one."""
    from safetensors.numpy import save

    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {leaf_name(leaf_path): np.ascontiguousarray(np.asarray(leaf)) for leaf_path, leaf in leaves}
    path = Path(path)
    atomic_write(path, save(arrays, metadata))
    return path


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name. Raises `InputError` where it is missing or torn."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise InputError(f"expected weights at {str(path)!r}, found no such file")
    try:
        return load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        message = f"expected a whole safetensors file, got a torn or corrupted one: {str(path)!r} ({error})"
        raise InputError(message) from None


def load_metadata(path: str | Path) -> dict[str, str]:
    """What `save_weights` was told to keep beside the arrays. Raises `InputError` where the file is torn."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        message = f"expected a whole safetensors file, got a torn or corrupted one: {str(path)!r} ({error})"
        raise InputError(message) from None


def load_weights(path: str | Path, like: Params) -> Params:
    """The weights of a file in the structure of `like`, an array or a shape for each leaf.

    Raises `InputError` where the file lacks a leaf, has it in another shape, or holds NaN.
    """
    arrays = load_arrays(path)

    def take(leaf_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = leaf_name(leaf_path)
        if name not in arrays:
            raise InputError(f"expected {name} in {str(path)!r}, got {', '.join(arrays)}")
        found = arrays[name]
        if found.shape != tuple(leaf.shape):
            raise InputError(f"expected {name} of shape {tuple(leaf.shape)} in {str(path)!r}, got {found.shape}")
        if not np.isfinite(found).all():
            raise InputError(f"expected finite weights in {str(path)!r}, got NaN or infinity in {name}")
        return jax.device_put(found)

    return jax.tree_util.tree_map_with_path(take, like)
