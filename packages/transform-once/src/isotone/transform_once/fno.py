"""The frequency-domain models that T1 is measured against: FNO (section 2.2) and F-FNO (section 2.9).

FNO keeps its complex products whole: the official baseline writes them into a real buffer and loses the imaginary
parts. Its transforms are XLA's FFT, or the truncated DFT as matrices, which on a CPU is often the faster.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from isotone.transform_once.config import FFNOConfig, FNOConfig
from isotone.transform_once.initializers import mixing_scale
from isotone.transform_once.layers import Dense, Weight, activation
from isotone.transform_once.operator import Operator
from isotone.transform_once.transforms import Transform, check_modes


class SpectralConv(nnx.Module):
    """T^-1 S_m^T (A . S_m T z): both corners of each axis but the last, `modes` of each. Field in, field out."""

    def __init__(
        self, modes: tuple[int, ...], inputs: int, outputs: int, *, init: str, n_total: int, fft: str, rngs: nnx.Rngs
    ) -> None:
        self.modes, self.fft = modes, fft
        kept = math.prod(modes) * 2 ** (len(modes) - 1)
        # what the real FFT keeps stands for twice as many modes
        deviation = mixing_scale(init, inputs, outputs, max(n_total, 2 * kept), 2 * kept, True)
        self.mixing = Weight((kept, inputs, outputs), deviation, True, rngs)

    def __call__(self, z: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        sizes, batch = z.shape[1:-1], z.shape[0]
        transform = Transform("dft", sizes, self.modes)
        wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        weight = self.mixing(wide.dtype)
        if self.fft == "matmul":
            block = _matmul_forward(wide, self.modes)
        else:
            spectrum = jnp.fft.rfftn(wide, axes=transform.axes, norm="ortho")
            block = _corners(spectrum, self.modes)
        mixed = jnp.matmul(jnp.moveaxis(block, 0, -2).reshape(-1, batch, z.shape[-1]), weight)
        mixed = jnp.moveaxis(mixed.reshape(*transform.block, batch, -1), -2, 0)
        if self.fft == "matmul":
            field = _matmul_inverse(mixed, sizes, self.modes)
        else:
            field = jnp.fft.irfftn(transform.embed(mixed), s=sizes, axes=transform.axes, norm="ortho")
        return field.astype(z.dtype)


def _corners(spectrum: Array, modes: tuple[int, ...]) -> Array:
    for axis, m in enumerate(modes[:-1], 1):
        index = np.r_[0:m, spectrum.shape[axis] - m : spectrum.shape[axis]]
        spectrum = jnp.take(spectrum, index, axis=axis)
    return jax.lax.slice_in_dim(spectrum, 0, modes[-1], axis=len(modes))


@functools.cache
def _waves(size: int, m: int, both: bool) -> np.ndarray:
    """exp(-2 pi i k n / N) / sqrt(N) for the kept k, (modes, N)."""
    k = np.r_[0:m, size - m : size] if both else np.arange(m)
    return np.exp(-2j * np.pi * np.outer(k, np.arange(size)) / size) / math.sqrt(size)


def _matmul_forward(z: Array, modes: tuple[int, ...]) -> Array:
    dims = len(modes)
    # the last axis first: it is the one that halves
    for axis in range(dims, 0, -1):
        matrix = jnp.asarray(_waves(z.shape[axis], modes[axis - 1], axis != dims))
        if not jnp.iscomplexobj(z):
            pair = [jnp.tensordot(z, part.astype(z.dtype), ((axis,), (1,))) for part in (matrix.real, matrix.imag)]
            z = jax.lax.complex(*pair)
        else:
            z = jnp.tensordot(z, matrix.astype(z.dtype), ((axis,), (1,)))
        z = jnp.moveaxis(z, -1, axis)
    return z


def _matmul_inverse(block: Array, sizes: tuple[int, ...], modes: tuple[int, ...]) -> Array:
    dims = len(sizes)
    for axis in range(1, dims):
        matrix = jnp.asarray(_waves(sizes[axis - 1], modes[axis - 1], True)).conj().astype(block.dtype)
        block = jnp.moveaxis(jnp.tensordot(block, matrix, ((axis,), (0,))), -1, axis)
    waves = _waves(sizes[-1], modes[-1], False).conj()
    twice = np.full((modes[-1], 1), 2.0)
    twice[0] = 1.0
    if sizes[-1] % 2 == 0 and modes[-1] == sizes[-1] // 2 + 1:
        twice[-1] = 1.0
    real, imag = (jnp.asarray(part * twice, block.real.dtype) for part in (waves.real, waves.imag))
    field = jnp.tensordot(block.real, real, ((dims,), (0,))) - jnp.tensordot(block.imag, imag, ((dims,), (0,)))
    return jnp.moveaxis(field, -1, dims)


class FNO(Operator):
    """z <- act(SpectralConv(z) + z + W z), lifted from [a, coordinates], through Linear - GELU - Linear at the end."""

    config: FNOConfig

    def __init__(self, config: FNOConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or FNOConfig())
        rngs = rngs or nnx.Rngs(0)
        sizes = config.sizes or (64,) * config.dims
        width = config.width
        self.lift = Dense(config.in_channels + config.dims, width, rngs=rngs)
        self.convs = nnx.List(
            [
                SpectralConv(
                    *(config.axes_modes, width, width),
                    init=config.init,
                    n_total=math.prod(sizes),
                    fft=config.fft,
                    rngs=rngs,
                )
                for _ in range(config.depth)
            ]
        )
        self.skips = nnx.List([Dense(width, width, rngs=rngs) for _ in range(config.depth)])
        self.project = Dense(width, config.head_width, rngs=rngs)
        self.out = Dense(config.head_width, config.out_channels, rngs=rngs)

    def apply(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        config = self.config
        act = activation(config.activation)
        z = self.lift(self.with_coordinates(fields).astype(config.dtype))
        for number, (conv, skip) in enumerate(zip(self.convs, self.skips, strict=True)):
            mixed = conv(z) + skip(z) + (z if config.residual else 0)
            z = act(mixed) if config.last_activation or number < config.depth - 1 else mixed
        return self.out(jax.nn.gelu(self.project(z))).astype(fields.dtype)


class FFNO(Operator):
    """One axis at a time, the sum of both through a feed-forward network, z <- z - b, and a head on the last b alone.

    The lift sees coordinates. The official run's number of parameters has it without them (2 W fewer), but then the
    model commutes with translations, and a forcing that is fixed in space can not be learnt.
    """

    config: FFNOConfig

    def __init__(self, config: FFNOConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or FFNOConfig())
        rngs = rngs or nnx.Rngs(0)
        width = config.width
        self.lift = Dense(config.in_channels + config.dims, width, rngs=rngs)
        deviation = math.sqrt(2 / (2 * width))  # Xavier-normal of a width x width matrix
        self.axes = nnx.List(
            [
                nnx.List([Weight((m, width, width), deviation / math.sqrt(2), True, rngs) for m in config.axes_modes])
                for _ in range(config.depth)
            ]
        )
        self.feed = nnx.List(
            [
                nnx.List([Dense(a, b, rngs=rngs) for a, b in itertools.pairwise((width, 2 * width, width))])
                for _ in range(config.depth)
            ]
        )
        self.project = Dense(width, config.head_width, rngs=rngs)
        self.out = Dense(config.head_width, config.out_channels, rngs=rngs)

    def apply(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        act = activation(self.config.activation)
        z = self.lift(self.with_coordinates(fields).astype(self.config.dtype))
        b = z
        for weights, (first, second) in zip(self.axes, self.feed, strict=True):
            parts = [_one_axis(z, weight, axis) for axis, weight in enumerate(weights, 1)]
            b = second(act(first(sum(parts[1:], parts[0]))))
            z = z - b
        return self.out(self.project(b)).astype(fields.dtype)


def _one_axis(z: Array, weight: Weight, axis: int) -> Array:
    size = z.shape[axis]
    check_modes((len(weight.value[...]),), (size // 2 + 1,))
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    spectrum = jnp.fft.rfft(wide, axis=axis, norm="ortho")
    matrix = weight(wide.dtype)
    low = jnp.moveaxis(jax.lax.slice_in_dim(spectrum, 0, len(matrix), axis=axis), axis, 0)
    shape = low.shape
    mixed = jnp.matmul(low.reshape(shape[0], -1, shape[-1]), matrix).reshape(*shape[:-1], -1)
    mixed = jnp.moveaxis(mixed, 0, axis)
    pads = [(0, size // 2 + 1 - len(matrix) if a == axis else 0) for a in range(z.ndim)]
    return jnp.fft.irfft(jnp.pad(mixed, pads), n=size, axis=axis, norm="ortho").astype(z.dtype)
