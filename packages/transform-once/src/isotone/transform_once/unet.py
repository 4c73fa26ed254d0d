"""U-Nets after Deep-Flow-Prediction's: of a field (a baseline), and of a block of modes as a picture (T1U, section
2.4).

Encoder: convolution of stride 2 to c = 2^e channels, then [LeakyReLU 0.2, convolution of stride 2, batch norm] to 2c,
2c, 4c, 8c, 8c, 8c, the last without norm, as many as the picture has halvings; the decoder mirrors it with [ReLU,
bilinear upsampling, convolution, batch norm] and skips, and ends in ReLU and a transposed convolution. The original's
kernels and paddings are tuned by hand for eight sizes; here any picture is zero-padded to a multiple of 2^depth and
cropped."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from isotone.transform_once.config import UNetConfig
from isotone.transform_once.initializers import normal
from isotone.transform_once.operator import Operator

WIDTHS = (1, 2, 2, 4, 8, 8, 8)


class UNetBody(nnx.Module):
    """(B, n1, .., nd, C_in) to (B, n1, .., nd, C_out), for pictures of the size that it was made for or larger.

    `exponent` e: 2^e channels at the top; convolutions in `dtype`, norms and weights in float32; at most `depth`
    halvings, and no more than the smallest of `sizes` has. Batch statistics in training (`train()`), running ones in
    `eval()`."""

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        exponent: int,
        sizes: tuple[int, ...],
        *,
        depth: int,
        rngs: nnx.Rngs,
        dtype: str = "float32",
    ) -> None:
        depth = max(1, min(depth, len(WIDTHS), int(math.log2(max(2, min(sizes))))))
        self.dims, self.depth = dims, depth
        widths = [2**exponent * factor for factor in WIDTHS[:depth]]
        downs, down_norms, ups, up_norms = [], [], [], []
        for level, width in enumerate(widths):
            source = inputs if level == 0 else widths[level - 1]
            normed = 0 < level < depth - 1
            downs.append(_conv(dims, source, width, 4, normed, rngs, dtype))
            down_norms.append(nnx.BatchNorm(width, momentum=0.9, rngs=rngs) if normed else None)
        for level in range(depth - 1, 0, -1):
            source = widths[level] * (1 if level == depth - 1 else 2)
            ups.append(_conv(dims, source, widths[level - 1], 3, True, rngs, dtype))
            up_norms.append(nnx.BatchNorm(widths[level - 1], momentum=0.9, rngs=rngs))
        self.downs, self.down_norms = nnx.List(downs), nnx.List(down_norms)
        self.ups, self.up_norms = nnx.List(ups), nnx.List(up_norms)
        last = widths[0] * (2 if depth > 1 else 1)
        self.last = nnx.ConvTranspose(
            *(last, outputs, (4,) * dims, (2,) * dims), padding="SAME", kernel_init=_kernel, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        sizes, multiple = x.shape[1:-1], 2**self.depth
        x = jnp.pad(x, [(0, 0), *((0, -n % multiple) for n in sizes), (0, 0)])
        kept: list[Array] = []
        for level in range(self.depth):
            x = self.downs[level](x if level == 0 else jax.nn.leaky_relu(x, 0.2))
            norm = self.down_norms[level]
            x = x if norm is None else norm(x)
            kept.append(x)
        for number, level in enumerate(range(self.depth - 1, 0, -1)):
            x = jax.image.resize(jax.nn.relu(x), (x.shape[0], *(2 * n for n in x.shape[1:-1]), x.shape[-1]), "bilinear")
            x = self.up_norms[number](self.ups[number](x))
            x = jnp.concatenate([x, kept[level - 1]], -1)
        x = self.last(jax.nn.relu(x))
        return x[(slice(None), *(slice(0, n) for n in sizes))]


def _conv(dims: int, inputs: int, outputs: int, kernel: int, normed: bool, rngs: nnx.Rngs, dtype: str) -> nnx.Conv:
    stride = 2 if kernel == 4 else 1
    # a norm takes out what a bias would add
    return nnx.Conv(
        *(inputs, outputs, (kernel,) * dims, (stride,) * dims),
        padding="SAME",
        use_bias=not normed,
        kernel_init=_kernel,
        dtype=dtype,
        rngs=rngs,
    )


def _kernel(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Of variance 1 / fan-in (LeCun)."""
    return normal(key, shape, 1 / math.sqrt(math.prod(shape[:-1]))).astype(dtype)


class UNet(Operator):
    """The U-Net on the field itself, coordinates appended."""

    config: UNetConfig

    def __init__(self, config: UNetConfig | None = None, *, rngs: nnx.Rngs | None = None) -> None:
        self._begin(config := config or UNetConfig())
        rngs = rngs or nnx.Rngs(0)
        inputs = config.in_channels + config.dims
        sizes = (2**config.depth,) * config.dims
        self.body = UNetBody(
            config.dims,
            inputs,
            config.out_channels,
            config.exponent,
            sizes,
            depth=config.depth,
            rngs=rngs,
            dtype=config.dtype,
        )

    def apply(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        return self.body(self.with_coordinates(fields)).astype(fields.dtype)
