"""Random numbers: the logistic noise of a search, and what is drawn once, on the host.

The noise is the one cost of a search step that a training step has not. Threefry-2x32 (Salmon et al. 2011) has its 20
rounds written out here, so that a compiler makes one vectorised loop of them and the logarithm after them; the bits are
those of `jax.extend.random.threefry_2x32`. `jax.random` spends a block on each word where a block gives two, and on a
CPU runs the rounds one after another over the whole array.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def logistic_noise(key: Array, shape: tuple[int, ...]) -> Float[Array, ...]:
    """l = log u - log(1 - u), float32, u uniform on the 2^23 midpoints of (0, 1): neither end is reached."""
    size = math.prod(shape)
    halves = threefry(jax.random.bits(key, (2,), jnp.uint32), jnp.arange(size + size % 2, dtype=jnp.uint32))
    drawn = jnp.concatenate([_logistic(half) for half in halves])[:size].reshape(shape)
    # without it a compiler draws the noise again at each of its uses
    return jax.lax.optimization_barrier(drawn)


def _logistic(bits: UInt32[Array, " n"]) -> Float[Array, " n"]:
    # u = step / 2^23 with step at a half: both it and 2^23 - step are exact, and so is their order
    step = (bits >> 9).astype(jnp.float32) + 0.5
    return jnp.log(step / (2.0**23 - step))


def host_generator(key: Array, number: int = 0) -> np.random.Generator:
    """The `number`-th NumPy generator of a JAX key, for what is drawn once: nothing has to be compiled."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.random.default_rng([*np.asarray(data).tolist(), number])


def threefry(key: UInt32[Array, 2], counters: UInt32[Array, " n"]) -> tuple[Array, Array]:
    """Two words for each pair of counters (i, i + n/2), n even: the first words, the second words."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = jnp.split(counters, 2)
    a, b = a + keys[0], b + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << rotation) | (b >> (32 - rotation)))
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b
