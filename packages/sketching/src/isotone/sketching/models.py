"""Small networks as pure functions of pytrees: a linear classifier, an MLP, a convolutional network.

`init(key)` and `apply(params, x)`; sigmoid units by default, whose second derivatives the attack needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from isotone.shared.errors import InputError, check_count
from isotone.sketching.compiling import fast_jit

MODELS = ("linear", "mlp", "cnn")


@dataclass(frozen=True, eq=False)
class Model:
    """`apply(params, x (n, *shape)) -> logits (n, classes)`."""

    name: str
    shape: tuple[int, ...]
    classes: int
    init: Callable[[Array], Any]
    apply: Callable[[Any, Array], Array]

    def loss(self, params: Any, x: Float[ArrayLike, "n ..."], y: Int[ArrayLike, " n"]) -> Float[Array, ""]:
        """Mean cross-entropy, nats."""
        logits = self.apply(params, jnp.asarray(x))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)))

    def accuracy(self, params: Any, x: Float[ArrayLike, "n ..."], y: Int[ArrayLike, " n"]) -> Float[Array, ""]:
        """Share of right answers."""
        return jnp.mean(jnp.argmax(self.apply(params, jnp.asarray(x)), -1) == jnp.asarray(y))


@functools.lru_cache(maxsize=64)
def make_model(name: str, shape: tuple[int, ...], classes: int, hidden: int = 32) -> Model:
    """ "linear"; "mlp", one hidden layer of sigmoid units; "cnn", two convolutions of 12 and 24 channels, each halving
    the picture, and a linear layer (sigmoid units, as the attack's papers have). Raises `InputError` on
    another, and on no unit."""
    if name not in MODELS:
        raise InputError(f"expected a model of {', '.join(MODELS)}, got {name!r}")
    check_count("hidden", hidden, 1)
    inputs = math.prod(shape)

    def dense(key: Array, a: int, b: int) -> dict[str, Array]:
        return {"w": jax.random.normal(key, (a, b)) / math.sqrt(a), "b": jnp.zeros(b)}

    if name == "linear":
        return Model(
            *(name, shape, classes, fast_jit(lambda key: dense(key, inputs, classes))),
            lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"],
        )
    if name == "mlp":

        def init_mlp(key: Array) -> Any:
            first, second = jax.random.split(key)
            return {"1": dense(first, inputs, hidden), "2": dense(second, hidden, classes)}

        def apply_mlp(p: Any, x: Array) -> Array:
            h = jax.nn.sigmoid(x.reshape(len(x), -1) @ p["1"]["w"] + p["1"]["b"])
            return h @ p["2"]["w"] + p["2"]["b"]

        return Model(name, shape, classes, fast_jit(init_mlp), apply_mlp)
    if len(shape) != 3 or min(shape[:2]) < 4:
        raise InputError(f"expected pictures (height, width, channels) of 4 x 4 or more for cnn, got {shape}")
    height, width, channels = shape
    flat = -(-height // 4) * -(-width // 4) * 24

    def init_cnn(key: Array) -> Any:
        keys = jax.random.split(key, 3)

        def conv(k: Array, a: int, b: int) -> dict[str, Array]:
            return {"w": jax.random.normal(k, (5, 5, a, b)) / math.sqrt(25 * a), "b": jnp.zeros(b)}

        return {"1": conv(keys[0], channels, 12), "2": conv(keys[1], 12, 24), "3": dense(keys[2], flat, classes)}

    def apply_cnn(p: Any, x: Array) -> Array:
        for layer in ("1", "2"):
            x = jax.lax.conv_general_dilated(
                x, p[layer]["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.sigmoid(x + p[layer]["b"])
        return x.reshape(len(x), -1) @ p["3"]["w"] + p["3"]["b"]

    return Model(name, shape, classes, fast_jit(init_cnn), apply_cnn)
