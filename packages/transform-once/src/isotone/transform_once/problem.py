"""What a training loop reads: fields, or the blocks of modes that stand for them, and the loss on a batch of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from isotone.shared.errors import InputError
from isotone.transform_once import losses
from isotone.transform_once.operator import Operator, check_finite
from isotone.transform_once.t1 import Spectral
from isotone.transform_once.transforms import Transform


class Problem(NamedTuple):
    """What the loop reads: `arrays`, the samples' axis first; `loss(model, batch) -> scalar`."""

    arrays: dict[str, Array]
    loss: Callable[[Any, dict[str, Array]], Array]


def prepare(model: Operator, inputs: np.ndarray, targets: np.ndarray, loss: str = "relative_l2") -> Problem:
    """The arrays to keep on the device, and the loss on batches of them.

    Raises `InputError` on fields that do not fit the model or each other, that are not finite, and, for the relative
    loss, on targets that are 0 everywhere.
    """
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    check_pair(model, inputs, targets)
    if loss == "relative_l2":
        flat = np.abs(targets).reshape(len(targets), -1).max(1)
        if (flat == 0).any():
            raise InputError(f"expected targets that are not 0 everywhere, got sample {int(np.argmin(flat))}")
    if isinstance(model, Spectral) and model.direct:
        return _spectral_problem(model, inputs, targets, loss)
    return Problem({"x": jnp.asarray(inputs), "y": jnp.asarray(targets)}, FieldLoss(loss))


def check_pair(model: Operator, inputs: Any, targets: Any, what: str = "") -> None:
    """Raises `InputError` on fields that do not fit the model or each other, or are not finite; `what` they are."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    model.check_fields(inputs, f"{what}inputs")
    model.check_fields(targets, f"{what}targets", model.config.out_channels)
    if inputs.shape[:-1] != targets.shape[:-1] or not len(inputs):
        raise InputError(
            f"expected as many {what}targets as inputs on one grid, got {inputs.shape} and {targets.shape}"
        )
    check_finite(f"{what}inputs", inputs)
    check_finite(f"{what}targets", targets)


@dataclass(frozen=True)
class FieldLoss:
    """`loss` of fields. Losses are values, so that what was compiled for one serves an equal one."""

    loss: str

    def __call__(self, model: Any, batch: dict[str, Array]) -> Array:
        found = model(batch["x"])
        return losses.relative_l2(found, batch["y"]) if self.loss == "relative_l2" else losses.mse(found, batch["y"])


@dataclass(frozen=True)
class BlockLoss:
    """`loss` of fields from blocks of modes, by Parseval; `points`: numbers in a field of the model's own grid."""

    loss: str
    grid: Transform
    points: int

    def __call__(self, model: Any, batch: dict[str, Array]) -> Array:
        weights = self.grid.weights() if self.grid.kind == "dft" else None
        block = model.spectrum(batch["x"])
        found = block * model.out_scale[...].astype(block.real.dtype)
        if self.loss == "relative_l2":
            return losses.relative_l2_freq(found, batch["y"], batch["outside"], weights, batch["norm"])
        return losses.mse_freq(found, batch["y"], batch["outside"], self.points, weights)


def _spectral_problem(model: Spectral, inputs: np.ndarray, targets: np.ndarray, loss: str) -> Problem:
    graph, state = nnx.split(model)
    # some samples at a time: the fields need not fit beside their spectra
    parts = max(1, math.ceil(inputs.size * 4 / 2**28))
    x = jnp.concatenate([_encode(graph, state, part) for part in np.array_split(inputs, parts)])
    each = [_encode_targets(graph, state, part) for part in np.array_split(targets, parts)]
    y, outside, norm = (jnp.concatenate(part) for part in zip(*each, strict=True))
    points = math.prod(model.reference) * targets.shape[-1]
    return Problem(
        {"x": x, "y": y, "outside": outside, "norm": norm}, BlockLoss(loss, model.grid(inputs.shape[1:-1]), points)
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: Any, state: Any, fields: Array) -> Array:
    return nnx.merge(graph, state).encode(fields)


@functools.partial(jax.jit, static_argnums=0)
def _encode_targets(graph: Any, state: Any, fields: Array) -> tuple[Array, Array, Array]:
    found: tuple[Array, Array, Array] = nnx.merge(graph, state).encode_targets(fields)
    return found
