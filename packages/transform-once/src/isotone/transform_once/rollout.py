"""Rollouts: a model that gives the next frame, applied to its own output (section 2.8).

Orders: 0, x_{t+1} = f; 1, x_{t+1} = x_t + f; 2, x_{t+1} = 2 x_t - x_{t-1} + f. The updates and the sliding window are
linear, so that a model of the frequency domain stays there: the context is transformed once, each step works on
blocks of modes, and all frames are inverted at the end."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from isotone.shared.errors import InputError, check_count
from isotone.transform_once.operator import Operator, check_finite
from isotone.transform_once.t1 import Spectral

DOMAINS = ("auto", "frequency", "physical")


def rollout(model: Operator, frames: np.ndarray, steps: int, order: int = 0, domain: str = "auto") -> np.ndarray:
    """`steps` frames (B, steps, N1, .., Nd, C) after the context `frames` (B, context, N1, .., Nd, C).

    The model takes context x C channels, oldest frame first, and gives C. `domain` "frequency": blocks of modes alone
    are stepped, the same frames as "physical"; "auto": it where the model can. Raises `InputError` on another order or
    domain, a context that does not fit, order 2 of one frame, and NaN.
    """
    check_count("steps", steps)
    frames = np.asarray(frames)
    config = model.config
    if order not in (0, 1, 2):
        raise InputError(f"expected order 0, 1 or 2, got {order!r}")
    if domain not in DOMAINS:
        raise InputError(f"expected a domain of {', '.join(DOMAINS)}, got {domain!r}")
    if frames.ndim != config.dims + 3:
        raise InputError(
            f"expected frames of {config.dims + 3} axes (samples, context, grid, channels), got {frames.shape}"
        )
    context, own = frames.shape[1], frames.shape[-1]
    if context * own != config.in_channels or own != config.out_channels:
        wanted = f"{config.in_channels} context channels and {config.out_channels} a frame"
        raise InputError(f"expected {wanted}, got {context} frames of {own}")
    if order == 2 and context < 2:
        raise InputError("expected two context frames for order 2, got 1")
    check_finite("frames", frames)
    able = isinstance(model, Spectral) and model.direct
    if domain == "frequency" and not able:
        raise InputError("expected a model of the frequency domain without padding and keep_high, or domain physical")
    graph, state = nnx.split(model.evaluating())
    run = _frequency if able and domain != "physical" else _physical
    return np.asarray(run(graph, steps, order, state, jnp.asarray(frames)))


def advance(order: int, window: Array, found: Array) -> Array:
    """The window (context, ...) moved on by one frame."""
    if order == 1:
        found = window[-1] + found
    elif order == 2:
        found = 2 * window[-1] - window[-2] + found
    return jnp.concatenate([window[1:], found[None]])


def channels(window: Array) -> Array:
    """(context, B, grid, C) to (B, grid, context C)."""
    return jnp.concatenate(list(window), -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _physical(graph: Any, steps: int, order: int, state: Any, frames: Array) -> Array:
    def step(window: Array, _: None) -> tuple[Array, Array]:
        window = advance(order, window, nnx.merge(graph, state)(channels(window)))
        return window, window[-1]

    _, found = jax.lax.scan(step, jnp.moveaxis(frames, 1, 0), None, length=steps)
    return jnp.moveaxis(found, 0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _frequency(graph: Any, steps: int, order: int, state: Any, frames: Array) -> Array:
    model = nnx.merge(graph, state)
    sizes = frames.shape[2:-1]
    count = frames.shape[1]
    window = jnp.stack([model.block(frames[:, t]) for t in range(count)])
    # of the output's shift, which is the field's and not the network's, the block is that of ones
    shift = model.out_shift[...] * jnp.asarray(model._constants[..., -1:], window.dtype)

    def step(window: Array, _: None) -> tuple[Array, Array]:
        given = model.standardized_block(channels(window))
        found = model.spectrum(given) * model.out_scale[...].astype(window.real.dtype) + shift
        window = advance(order, window, found)
        return window, window[-1]

    _, found = jax.lax.scan(step, window, None, length=steps)
    fields = model.field(found.reshape(-1, *found.shape[2:]), sizes)
    fields = jnp.moveaxis(fields.reshape(steps, frames.shape[0], *fields.shape[1:]), 0, 1)
    if order == 0:
        return fields
    # modes past the block are never changed by the network: they stay (order 1) or go on as they went (order 2)
    last = [frames[:, t] - model.field(model.block(frames[:, t]), sizes) for t in range(count - order, count)]
    outside = last[-1][:, None]
    if order == 2:
        later = jnp.arange(1, steps + 1, dtype=fields.dtype).reshape(1, -1, *([1] * (len(sizes) + 1)))
        outside = outside + later * (last[1] - last[0])[:, None]
    return fields + outside
