"""The optax transformation with a sketch that was made already."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isotone.shared.errors import InputError
from isotone.sketching import make_sketch, sketched, tree_sketch

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(10)}


def test_a_sketch_that_was_made_is_the_one_that_is_used():
    gradient = jax.tree.map(jnp.cos, PARAMS)
    found = []
    for tx in (
        sketched(optax.sgd(0.1), make_sketch("srht", 16, 4, seed=3)),
        sketched(optax.sgd(0.1), tree_sketch(PARAMS, s=4, seed=3)),
        sketched(optax.sgd(0.1), kind="srht", s=4, seed=3),
    ):
        updates, _ = tx.update(gradient, tx.init(PARAMS))
        found.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)]))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_a_sketch_of_another_size_is_refused():
    with pytest.raises(InputError, match="16 numbers"):
        sketched(optax.sgd(0.1), make_sketch("srht", 17, 4)).init(PARAMS)
