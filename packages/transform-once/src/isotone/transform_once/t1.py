"""T1: one transform, a deep network on the lowest modes, and no way back until a field is asked for (section 2.3).

Two identities make training free of transforms. The lift is linear and commutes with the transform: the spectrum of
Linear(a, coordinates) is Linear(spectrum of a, spectra of the coordinates) + bias x the spectrum of ones; only the
input's own channels are transformed, and can be kept. And sin(0) = 0 in a head without biases: modes that are 0 stay 0,
so that the head runs on the block alone.
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
from jaxtyping import Float, Inexact

from isotone.shared.errors import InputError
from isotone.transform_once.config import MLPConfig, T1Config, T1UConfig
from isotone.transform_once.layers import Dense, Head, T1Layer, activation
from isotone.transform_once.operator import Operator
from isotone.transform_once.transforms import Transform, energy, pack, rescale, unpack
from isotone.transform_once.unet import UNetBody

DEFAULT_SIZE = 64


def coordinates(sizes: tuple[int, ...], grid: str) -> np.ndarray:
    """The coordinate channels (N1, .., Nd, d): from 0 to 1 along each axis, the last point 1 on a closed grid."""
    lines = [np.linspace(0, 1, n, endpoint=grid == "closed") for n in sizes]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1)


class Spectral(Operator):
    """What T1, T1U and the plain network share: fields in, a block of modes through, a block or fields out.

    Fields are (B, N1, .., Nd, C). On a grid other than `config.sizes` the orthonormal coefficients are rescaled by
    sqrt(N / N') an axis, so that the same modes mean the same field.
    """

    config: T1Config
    lift: Dense

    def grid(self, sizes: tuple[int, ...]) -> Transform:
        """The transform of fields of `sizes`, padding included, whole with `keep_high`."""
        config = self.config
        if len(sizes) != config.dims:
            raise InputError(f"expected a grid of {config.dims} axes, got {sizes}")
        padded = tuple(n + pad for n, pad in zip(sizes, self._padding(sizes), strict=True))
        if padded != self.reference:
            if config.keep_high:
                raise InputError(f"expected a grid of {self._sizes} with keep_high, got {sizes}")
            # of a Nyquist mode a finer grid needs the half that a coarser one does not tell apart
            highest = (*config.axes_modes[:-1], config.axes_modes[-1] - 1)
            limits = map(min, padded, self.reference)
            if config.transform == "dft" and any(2 * k >= n for k, n in zip(highest, limits, strict=True)):
                raise InputError(f"expected modes below half of each axis on another grid than {self._sizes}")
        return Transform(config.transform, padded, padded if config.keep_high else config.axes_modes)

    def _padding(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Points at the far end of each axis: on another grid as long a stretch of the domain."""
        found = []
        for n, own in zip(sizes, self._sizes, strict=True):
            if self.config.padding * n % own:
                raise InputError(f"expected a grid on which the padding is whole points, got {sizes}")
            found.append(self.config.padding * n // own)
        return tuple(found)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.config.sizes or (DEFAULT_SIZE,) * self.config.dims

    @property
    def reference(self) -> tuple[int, ...]:
        """The padded grid that coefficients are scaled to."""
        return tuple(n + self.config.padding for n in self._sizes)

    @property
    def direct(self) -> bool:
        """Whether the output's block is all of its field: the loss then needs no field."""
        return not self.config.padding and not self.config.keep_high

    def encode(self, fields: Float[Array, "B ... C"]) -> Inexact[Array, "B ... C"]:
        """The block of the standardised input's modes, at the reference's scale: all that a training loop has to
        keep."""
        self.check_fields(fields)
        return self.block(self.standardized(fields))

    def decode(self, spectrum: Inexact[Array, "B ... C"], sizes: tuple[int, ...]) -> Float[Array, "B ... C"]:
        """The fields, in the targets' units, of a block of modes on a grid of `sizes`."""
        return self.restored(self.field(spectrum, sizes))

    def field(self, block: Inexact[Array, "B ... C"], sizes: tuple[int, ...]) -> Float[Array, "B ... C"]:
        """The field of a block, no units."""
        grid = self.grid(sizes)
        fields = grid.inverse(block / rescale(grid.sizes, self.reference))
        return fields[(slice(None), *(slice(0, n) for n in sizes))]

    def encode_targets(
        self, fields: Float[Array, "B ... C"]
    ) -> tuple[Inexact[Array, "B ... C"], Float[Array, " B"], Float[Array, " B"]]:
        """The block of the targets' modes less their shift; of each the squared norm that no block can hold, and that
        of the target itself (both at the block's scale)."""
        wide = fields.astype(jnp.promote_types(fields.dtype, jnp.float32))
        moved = wide - self.out_shift[...].astype(wide.dtype)
        block, grid = self.block(moved), self.grid(fields.shape[1:-1])
        scale, axes = rescale(grid.sizes, self.reference), tuple(range(1, fields.ndim))
        whole, norm = (jnp.sum(each**2, axes) * scale**2 for each in (moved, wide))
        return block, jnp.maximum(whole - energy(grid, block), 0.0), norm

    def block(self, fields: Array) -> Array:
        """The modes of fields at the reference's scale, no units."""
        sizes = fields.shape[1:-1]
        grid = self.grid(sizes)
        padded = jnp.pad(fields, [(0, 0), *((0, pad) for pad in self._padding(sizes)), (0, 0)])
        return grid.forward(padded) * rescale(grid.sizes, self.reference)

    def standardized_block(self, block: Array) -> Array:
        """`encode`'s block of the block of an input that is not standardised."""
        ones = jnp.asarray(self._constants[..., -1:], block.dtype)
        return (block - self.in_shift[...].astype(block.real.dtype) * ones) / self.in_scale[...].astype(
            block.real.dtype
        )

    @property
    def _constants(self) -> np.ndarray:
        """Spectra of the coordinates and of ones, (block, d + 1): what the lift adds to the input's."""
        return _coordinate_spectra(self.config, self.reference, jnp.zeros(()).dtype == jnp.float64)

    def __call__(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        """Fields to fields."""
        return self.decode(self.spectrum(self.encode(fields)), fields.shape[1:-1])

    def _lift(self, block: Array) -> Array:
        """The lifted spectrum: linear in the input's, the coordinates' and the ones'."""
        kernel, bias = self.lift.kernel[...], self.lift.bias
        assert bias is not None
        own = self.config.in_channels
        constants = jnp.asarray(self._constants, block.dtype)
        fixed = constants[..., :-1] @ kernel[own:].astype(block.dtype) + constants[..., -1:] * bias[...]
        lifted = block @ kernel[:own].astype(block.dtype) + fixed
        return lifted if jnp.iscomplexobj(block) else lifted.astype(self.config.dtype)

    def spectrum(self, block: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... D"]:
        """The block of the output's modes from that of the input's: the network itself."""
        raise NotImplementedError


@functools.cache
def _coordinate_spectra(config: T1Config, reference: tuple[int, ...], wide: bool) -> np.ndarray:
    sizes = tuple(n - config.padding for n in reference)
    fields = np.concatenate([coordinates(sizes, config.grid), np.ones((*sizes, 1))], -1)
    padded = np.pad(fields, [*((0, config.padding) for _ in sizes), (0, 0)])
    modes = reference if config.keep_high else config.axes_modes
    # evaluated at once, also while a program is being traced
    with jax.ensure_compile_time_eval():
        return np.asarray(Transform(config.transform, reference, modes).forward(jnp.asarray(padded[None])))[0]


class T1(Spectral):
    """The paper's model: `T1(T1Config(modes=(24, 24), width=48, depth=8))`; of one, two or three axes."""

    def __init__(self, config: T1Config | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or T1Config())
        rngs = rngs or nnx.Rngs(0)
        wave = config.transform == "dft"
        block = Transform(config.transform, self.reference, config.axes_modes).block
        self.lift = Dense(config.in_channels + config.dims, config.width, rngs=rngs)
        self.layers = nnx.List(
            [
                T1Layer(
                    block,
                    config.width,
                    config.width,
                    rngs=rngs,
                    n_total=math.prod(self.reference),
                    init="kaiming" if number and config.first_layer_init_only else config.init,
                    act=config.activation,
                    residual=config.residual,
                    complex_weights=wave,
                )
                for number in range(config.depth)
            ]
        )
        self.head = Head(config.width, config.head_width, config.out_channels, config.head_scale, rngs=rngs)

    def spectrum(self, block: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... D"]:
        config = self.config
        z = jnp.moveaxis(self._lift(block), 0, -2)
        low = z[tuple(slice(0, m) for m in config.axes_modes)] if config.keep_high else z
        for layer in self.layers:
            low = layer(low)
        if config.keep_high:
            low = z.at[tuple(slice(0, m) for m in config.axes_modes)].set(low)
        y = jnp.moveaxis(self.head(low), -2, 0)
        grid = Transform(config.transform, self.reference, self.reference if config.keep_high else config.axes_modes)
        return grid.project(y.astype(block.dtype))


class T1U(Spectral):
    """T1U (section 2.4): the block of modes, lifted to C_in + d channels, as a picture through a U-Net."""

    config: T1UConfig

    def __init__(self, config: T1UConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or T1UConfig())
        rngs = rngs or nnx.Rngs(0)
        width = config.in_channels + config.dims
        self.lift = Dense(width, width, rngs=rngs)
        self.layers = nnx.List(
            [
                T1Layer(
                    *(config.axes_modes, width, width),
                    rngs=rngs,
                    n_total=math.prod(self.reference),
                    init=config.init,
                    act=config.activation,
                    residual=config.residual,
                )
                for _ in range(config.operator_layer)
            ]
        )
        self.unet = UNetBody(
            *(config.dims, width, config.out_channels, config.exponent, config.axes_modes),
            depth=config.depth,
            rngs=rngs,
            dtype=config.dtype,
        )

    def spectrum(self, block: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... D"]:
        z = self._lift(block)
        for layer in self.layers:
            z = jnp.moveaxis(layer(jnp.moveaxis(z, 0, -2)), -2, 0)
        return self.unet(z).astype(block.dtype)


class MLP(Spectral):
    """A plain network on all modes of the block at once: what T1's structure has to beat."""

    config: MLPConfig

    def __init__(self, config: MLPConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or MLPConfig())
        rngs = rngs or nnx.Rngs(0)
        block = Transform(config.transform, self.reference, config.axes_modes).block
        parts = 2 if config.transform == "dft" else 1
        self.shape = block
        sizes = [
            math.prod(block) * config.in_channels * parts,
            *([config.width] * (config.depth - 1)),
            math.prod(block) * config.out_channels * parts,
        ]
        self.layers = nnx.List([Dense(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def spectrum(self, block: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... D"]:
        config, wave = self.config, self.config.transform == "dft"
        h = (pack(block) if wave else block).reshape(len(block), -1).astype(config.dtype)
        for number, layer in enumerate(self.layers):
            h = layer(h)
            if number < len(self.layers) - 1:
                h = activation(config.activation)(h)
        shape = (len(block), *self.shape, config.out_channels)
        if wave:
            y = unpack(h.reshape(*shape, 2).astype(block.real.dtype))
            return Transform("dft", self.reference, config.axes_modes).project(y)
        return h.reshape(shape).astype(block.dtype)
