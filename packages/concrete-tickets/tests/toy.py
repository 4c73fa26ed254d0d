"""A tiny network and data that several test files use."""

import jax
import jax.numpy as jnp
import numpy as np

from isotone.concrete_tickets import Recipe, Trainer

SIZES = (6, 8, 5, 3)


def params(seed=0, sizes=SIZES):
    found = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        kernel = np.random.default_rng(seed * 100 + i).normal(size=(a, b)) * (2 / a) ** 0.5
        found[f"l{i}"] = jax.device_put({"kernel": np.float32(kernel), "bias": np.full(b, 0.01, np.float32)})
    return found


def apply(p, x):
    for i in range(len(p)):
        x = x @ p[f"l{i}"]["kernel"] + p[f"l{i}"]["bias"]
        x = jax.nn.relu(x) if i < len(p) - 1 else x
    return x


def features(p, x):
    found = []
    for i in range(len(p)):
        x = x @ p[f"l{i}"]["kernel"] + p[f"l{i}"]["bias"]
        if i < len(p) - 1:
            x = jax.nn.relu(x)
            found.append(x)
    return x, tuple(found)


def data(n=64, seed=9):
    x = np.random.default_rng(seed).normal(size=(n, SIZES[0]))
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.argmax(x[:, :3] + 0.5 * x[:, 3:], -1), jnp.int32)


RECIPE = Recipe(epochs=4, batch_size=16)
TRAINER = Trainer(apply, RECIPE)
