"""A model as one file that any JAX opens without this package: `jax.export` of its inference, weights inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, export

from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError, check_count
from isotone.transform_once.operator import Operator


def export_model(model: Operator, sizes: tuple[int, ...], path: str | Path, platforms: tuple[str, ...] = ()) -> Path:
    """Write `model` for fields (any number, *sizes, C): float32 in and out. `platforms`: "cpu", "cuda" (this one)."""
    config = model.config
    if len(sizes) != config.dims:
        raise InputError(f"expected {config.dims} sizes, got {sizes}")
    for size in sizes:
        check_count("size", size)
    graph, state = nnx.split(model.evaluating())

    def run(fields: Array) -> Array:
        return nnx.merge(graph, state)(fields)

    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *sizes, config.in_channels), jnp.float32)
    made = export.export(jax.jit(run), platforms=platforms or None)(shape)
    atomic_write(Path(path), bytes(made.serialize()))
    return Path(path)


def load_exported(path: str | Path) -> Callable[[Any], np.ndarray]:
    """The function of a file of `export_model`. Raises `InputError` where it is missing, torn or another file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"expected an exported model at {str(path)!r}, found no file")
    try:
        made = export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:  # the reader of the format raises whatever its parser meets
        raise InputError(f"expected a whole exported model at {str(path)!r}: {type(error).__name__}") from None
    return lambda fields: np.asarray(made.call(jnp.asarray(fields, jnp.float32)))
