"""The paper's networks in flax nnx, normalised by the statistics of the batch alone, in training and evaluation.

Images are (n, height, width, channels). Each network gives logits (n, classes), and with `features` also the output of
every ReLU; with `linear=True` normalisation is an affine map alone, which is what SynFlow scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from isotone.concrete_tickets.layout import Params, Where, default_kernels, leaf_name
from isotone.concrete_tickets.noise import host_generator
from isotone.concrete_tickets.objectives import ApplyFn, FeaturesFn
from isotone.shared.errors import InputError

MODELS = ("mlp", "lenet", "resnet20", "vgg16")


class BatchStatNorm(nnx.Module):
    """Batch normalisation without running statistics: those of the dense network are wrong for a sparse one.

    `axis_name`: the mesh axis the batch is spread over.
    """

    def __init__(self, channels: int, *, axis_name: str | None) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.axis_name = axis_name

    def __call__(self, x: Array, linear: bool = False) -> Array:
        if linear:
            return x * self.scale[...] + self.bias[...]
        values = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        mean, square = jnp.mean(values, axes), jnp.mean(jnp.square(values), axes)
        if self.axis_name is not None:
            mean, square = jax.lax.pmean((mean, square), self.axis_name)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        factor = self.scale[...] * jax.lax.rsqrt(variance + 1e-5)
        return ((values - mean) * factor + self.bias[...]).astype(x.dtype)


class _Network(nnx.Module):
    """What the four share: how ReLU outputs are gathered."""

    def run(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        return self.run(x, lambda x: x, False)

    def linear(self, x: Array) -> Array:
        return self.run(x, lambda x: x, True)

    def features(self, x: Array) -> tuple[Array, tuple[Array, ...]]:
        found: list[Array] = []

        def tap(x: Array) -> Array:
            found.append(x)
            return x

        return self.run(x, tap, False), tuple(found)


class MLP(_Network):
    """Fully connected, 300 and 100 hidden units: 50,200 prunable weights on 8 x 8 images."""

    def __init__(self, inputs: int, classes: int, *, hidden: tuple[int, ...] = (300, 100), dtype: Any, rngs: nnx.Rngs):
        sizes = (inputs, *hidden, classes)
        self.layers = nnx.List(nnx.Linear(a, b, dtype=dtype, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False))

    def run(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        for layer in list(self.layers)[:-1]:
            x = tap(nnx.relu(layer(x)))
        return self.layers[-1](x).astype(jnp.float32)


class LeNet(_Network):
    """LeNet-5 with batch statistics: convolutions of 6 and 16 channels, 120 and 84 units."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, *, dtype: Any, axis_name: str | None, rngs: nnx.Rngs
    ) -> None:
        height, width, channels = shape
        conv = functools.partial(nnx.Conv, kernel_size=(5, 5), use_bias=False, dtype=dtype, rngs=rngs)
        dense = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.convs = nnx.List([conv(channels, 6), conv(6, 16)])
        self.norms = nnx.List([BatchStatNorm(c, axis_name=axis_name) for c in (6, 16)])
        self.denses = nnx.List([dense((height // 4) * (width // 4) * 16, 120), dense(120, 84), dense(84, classes)])

    def run(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(tap(nnx.relu(norm(conv(x), linear))), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for dense in list(self.denses)[:-1]:
            x = tap(nnx.relu(dense(x)))
        return self.denses[-1](x).astype(jnp.float32)


class _Block(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, conv: Any, norm: Any) -> None:
        self.conv1, self.norm1 = conv(inputs, outputs, strides=stride), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs), norm(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv(inputs, outputs, strides=stride) if changes else None
        self.shortcut_norm = norm(outputs) if changes else None

    def __call__(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        y = tap(nnx.relu(self.norm1(self.conv1(x), linear)))
        y = self.norm2(self.conv2(y), linear)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), linear)
        return tap(nnx.relu(x + y))


class ResNet20(_Network):
    """Widths 16, 32, 64, three blocks each, 3 x 3 convolutions on the shortcuts: 291,376 prunable weights."""

    def __init__(self, channels: int, classes: int, *, dtype: Any, axis_name: str | None, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(BatchStatNorm, axis_name=axis_name)
        self.stem, self.stem_norm = conv(channels, 16), norm(16)
        blocks, inputs = [], 16
        for stage, outputs in enumerate((16, 32, 64)):
            for number in range(3):
                blocks.append(_Block(inputs, outputs, 2 if stage and not number else 1, conv, norm))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(64, classes, dtype=dtype, rngs=rngs)

    def run(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        x = tap(nnx.relu(self.stem_norm(self.stem(x), linear)))
        for block in self.blocks:
            x = block(x, tap, linear)
        return self.head(jnp.mean(x, (1, 2))).astype(jnp.float32)


class VGG16(_Network):
    """13 convolutions, global average pooling, one linear layer that is not pruned: 14,710,464 prunable weights."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, channels: int, classes: int, *, dtype: Any, axis_name: str | None, rngs: nnx.Rngs) -> None:
        convs, norms = [], []
        for width in (width for stage in self.WIDTHS for width in stage):
            convs.append(
                nnx.Conv(channels, width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs),
            )
            norms.append(BatchStatNorm(width, axis_name=axis_name))
            channels = width
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.head = nnx.Linear(512, classes, dtype=dtype, rngs=rngs)

    def run(self, x: Array, tap: Callable[[Array], Array], linear: bool) -> Array:
        number = 0
        for stage in self.WIDTHS:
            for _ in stage:
                x = tap(nnx.relu(self.norms[number](self.convs[number](x), linear)))
                number += 1
            if min(x.shape[1:3]) >= 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(jnp.mean(x, (1, 2))).astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class Model:
    """A network as pure functions of its parameters; functions keep their identity, so jit compiles once.

    `apply`: logits; `features`: logits and ReLU outputs; `linear`: without normalisation, for SynFlow; `where`: what
    is prunable; `shapes`: of the parameters; `flattened`: (height, width, channels) of the picture that a dense kernel
    takes laid flat, by the kernel's name.
    """

    name: str
    apply: ApplyFn
    features: FeaturesFn
    linear: ApplyFn
    where: Where
    shapes: Params
    flattened: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def init(self, key: Array) -> Params:
        """Parameters as the paper's code draws them: kernels from N(0, 2 / inputs), scales from U(0, 1), biases 0.

        Drawn on the host: nothing has to be compiled.
        """
        source = host_generator(key)

        def draw(path: tuple[Any, ...], leaf: Any) -> Array:
            kind = leaf_name(path).rpartition("/")[2]
            if kind == "kernel":
                values = source.standard_normal(leaf.shape) * math.sqrt(2 / math.prod(leaf.shape[:-1]))
            else:
                values = source.random(leaf.shape) if kind == "scale" else np.zeros(leaf.shape)
            return jax.device_put(values.astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(draw, self.shapes)


def make_model(
    name: str, shape: tuple[int, ...], classes: int, dtype: str = "float32", axis_name: str | None = None
) -> Model:
    """The model called `name` ("mlp", "lenet", "resnet20", "vgg16") for inputs of `shape` (height, width, channels).

    `dtype`: of the products and activations ("bfloat16" on a GPU); weights, normalisation and logits stay float32.
    The same arguments give the same object. Raises `InputError` on an unknown name, or images too small.
    """
    if name not in MODELS:
        raise InputError(f"expected a model of {', '.join(MODELS)}, got {name!r}")
    if name != "mlp" and (len(shape) != 3 or min(shape[:2]) < 4):
        raise InputError(f"expected images (height, width, channels) of 4 x 4 or more for {name}, got {shape}")
    return _model(name, tuple(shape), classes, jnp.dtype(dtype), axis_name)


@functools.cache
def _model(name: str, shape: tuple[int, ...], classes: int, dtype: Any, axis_name: str | None) -> Model:
    def build(rngs: nnx.Rngs) -> _Network:
        if name == "mlp":
            return MLP(math.prod(shape), classes, dtype=dtype, rngs=rngs)
        if name == "lenet":
            return LeNet(shape, classes, dtype=dtype, axis_name=axis_name, rngs=rngs)  # type: ignore[arg-type]
        kind = ResNet20 if name == "resnet20" else VGG16
        return kind(shape[-1], classes, dtype=dtype, axis_name=axis_name, rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)

    def where(leaf: str, value: Any) -> bool:
        return default_kernels(leaf, value) and not (name == "vgg16" and leaf.startswith("head"))

    return Model(
        name,
        lambda params, x: nnx.merge(graph, params)(x),
        lambda params, x: nnx.merge(graph, params).features(x),
        lambda params, x: nnx.merge(graph, params).linear(x),
        where,
        shapes,
        _flattened(name, shape),
    )


def _flattened(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    if name == "lenet":
        return {"denses/0/kernel": (shape[0] // 4, shape[1] // 4, 16)}
    if name == "mlp" and len(shape) == 3 and shape[2] > 1:
        return {"layers/0/kernel": (shape[0], shape[1], shape[2])}
    return {}
