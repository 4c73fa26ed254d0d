"""Batches of a data set that lies on the device whole, as functions of a key and the step alone.

A resumed run therefore sees what the uninterrupted one saw, on any number of devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from isotone.concrete_tickets.noise import host_generator
from isotone.shared.errors import InputError

AXIS = "data"
"""The mesh axis that a network's own means over the batch run over (`axis_name`), on a mesh."""


def check_mesh(mesh: Mesh | None, batch_size: int) -> None:
    """Raise `InputError` where batches cannot be spread over `mesh`."""
    if mesh is not None and (mesh.axis_names != (AXIS,) or batch_size % mesh.size):
        message = f"expected a mesh with one axis {AXIS!r} whose devices divide the batch of {batch_size}"
        raise InputError(f"{message}, got {dict(mesh.shape)}")


def count_classes(apply_fn: Any, params: Any, data: Any, prepare: Any, mesh: Mesh | None = None) -> int | None:
    """How many classes the network tells apart; None where `data` is no pair (`check_data` says so)."""
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        return None
    example = np.asarray(data[0]) if not hasattr(data[0], "dtype") else data[0]
    inputs = jax.ShapeDtypeStruct((1, *example.shape[1:]), example.dtype)

    def logits(params: Any, x: Any) -> Array:
        return apply_fn(params, x if prepare is None else prepare(x))

    # a network that takes means over the mesh's axis can be traced only there
    shape = jax.eval_shape(logits if mesh is None else everywhere(logits, mesh), params, inputs).shape
    if len(shape) != 2:
        raise InputError(f"expected apply_fn to give logits (n, classes), got shape {shape}")
    return shape[1]


def everywhere(function: Any, mesh: Mesh) -> Any:
    """`function` on every device with the same arguments."""
    whole = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)


def check_spread(apply_fn: Any, params: Any, inputs: Any, prepare: Any, mesh: Mesh) -> None:
    """Raise `InputError` where the logits of examples change when their batch is spread over the mesh: a network that
    normalises over the batch has to do so over the axis "data"."""
    few = inputs[: min(2, len(inputs) // mesh.size) * mesh.size]

    def logits(params: Any, x: Any) -> Array:
        return apply_fn(params, x if prepare is None else prepare(x))

    def apart(params: Any, x: Any) -> Array:
        return jax.lax.all_gather(logits(params, share(x, AXIS, mesh.size)), AXIS, tiled=True)

    whole, parts = (np.asarray(jax.jit(everywhere(f, mesh))(params, few)) for f in (logits, apart))
    if np.abs(whole - parts).max() > 1e-3 * (1 + np.abs(whole).max()):
        raise InputError(f"expected batch statistics over the mesh axis {AXIS!r} (axis_name), got those of each device")


def check_data(data: Any, batch_size: int, classes: int | None = None) -> tuple[Array, Array]:
    """`(inputs, labels)` on the device.

    Raises `InputError` where they are not a pair of equal length, hold NaN or infinities, are fewer than a batch, or
    where labels are not whole numbers from 0 to `classes` - 1.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise InputError(f"expected data as (inputs, labels), got {type(data).__name__}")
    inputs, labels = data
    if not hasattr(inputs, "dtype"):
        inputs = np.asarray(inputs)
    if len(inputs) != len(labels):
        raise InputError(f"expected as many labels as inputs, got {len(labels)} and {len(inputs)}")
    if not 1 <= batch_size <= len(inputs):
        raise InputError(f"expected a batch_size from 1 to the {len(inputs)} examples, got {batch_size}")
    if jnp.issubdtype(inputs.dtype, jnp.floating) and not np.isfinite(np.asarray(inputs, np.float32)).all():
        raise InputError("expected finite inputs, got NaN or infinity")
    host = np.asarray(labels)
    if host.ndim != 1 or not np.issubdtype(host.dtype, np.integer):
        raise InputError(f"expected labels as whole numbers, one an example, got {host.dtype} of shape {host.shape}")
    if host.min() < 0 or (classes is not None and host.max() >= classes):
        upper = "on" if classes is None else f"to {classes - 1}"
        raise InputError(f"expected labels from 0 {upper}, got {host.min()} to {host.max()}")
    return jax.device_put(inputs), jax.device_put(host.astype(np.int32))


def epoch_order(key: Array, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """Indices (steps, batch_size) of an epoch; what does not fill a batch waits for another epoch.

    Drawn on the host, so that no sort has to be compiled.
    """
    steps = examples // batch_size
    order = host_generator(key, epoch).permutation(examples)[: steps * batch_size]
    return order.reshape(steps, batch_size).astype(np.int32)


def share(index: Array, axis_name: str, devices: int) -> Array:
    """This device's part of a batch, its indices or examples (batch, ...), inside shard_map."""
    return index.reshape(devices, -1, *index.shape[1:])[jax.lax.axis_index(axis_name)]


@functools.partial(jax.jit, static_argnames=("apply_fn", "prepare"))
def _correct(apply_fn: Any, prepare: Any, params: Any, inputs: Any, labels: Array) -> Array:
    logits = apply_fn(params, inputs if prepare is None else prepare(inputs))
    return jnp.sum(jnp.argmax(logits, -1) == labels)


def accuracy(apply_fn: Any, params: Any, data: Any, prepare: Any = None, batch_size: int = 1000) -> float:
    """The share of examples classified right, 0 to 1.

    `prepare`: run on the inputs inside jit. A network that normalises with batch statistics sees batches of
    `batch_size` (the last one smaller), in the order given.
    """
    inputs, labels = data
    if not len(labels):
        raise InputError("expected examples to classify, got none")
    starts = range(0, len(labels), batch_size)
    correct = [
        _correct(apply_fn, prepare, params, inputs[i : i + batch_size], labels[i : i + batch_size]) for i in starts
    ]
    return sum(int(c) for c in correct) / len(labels)
