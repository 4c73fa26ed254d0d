"""Rounds whose clients are split over four devices are those of one device (section 7, 14)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isotone.sketching.compressors import Sketched, TopK
from isotone.sketching.data import ClientData
from isotone.sketching.federated import fed_algorithm, run
from isotone.sketching.integer import IntegerCode, IntegerSketch
from isotone.sketching.privacy import PrivacyConfig, private_local
from isotone.sketching.sketches import make_sketch

D, S = 48, 12


def squares(params, x, y):
    return jnp.mean(jnp.sum((params["w"] - x) ** 2, -1)) / 2


PRIVATE = private_local(squares, PrivacyConfig(rate=0.5, noise=0.3), 2, 0.1, 5)
WHOLE = IntegerSketch(make_sketch("srht", D, S), IntegerCode(50.0, 8))
CASES = {
    "rows of a transform": (None, (4,), {}),
    "blocks, two axes": (Sketched(make_sketch("countsketch-blocks", D, S)), (2, 2), {"straggle": 0.3}),
    "3 of 8 by size, private": (None, (4,), {"participants": 3, "weigh": "size", "local_update": PRIVATE}),
    "top-k, 5 of 8": (TopK(D, 6, 5), (4,), {"participants": 5}),
    "whole numbers": (WHOLE, (4,), {"participants": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_clients_over_devices(case):
    """With one client whose numbers are not finite, and 8 clients, not all of them in every round."""
    compressor, shape, settings = CASES[case]
    assert len(jax.devices()) == 4
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("hosts", "clients")[-len(shape) :])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 4, D)), jnp.float32).at[2].set(jnp.nan)
    data = ClientData(x, jnp.zeros((8, 4), jnp.int32), jnp.array([4, 3, 4, 2, 4, 4, 1, 4]))
    start, key = {"w": jnp.zeros(D)}, jax.random.key(3)
    ends = []
    for where in (None, mesh):
        made = fed_algorithm(
            squares, start, compressor, ratio=4.0, local_steps=2, batch=2, rate=0.1, mesh=where, **settings
        )
        state = made.init(start, 8)
        program = jax.jit(lambda s, d, made=made: run(made, s, key, d, 2)).lower(state, data).compile()
        ends.append(program(state, data))
    (one, told), (two, said) = ends
    assert jnp.array_equal(told.taken, said.taken) and jnp.array_equal(told.heard, said.heard)
    assert bool(told.heard.any()) and int(two.round) == 2
    assert jnp.isfinite(one.params["w"]).all() and float(jnp.abs(one.params["w"]).max()) > 0.01
    for a, b in zip(jax.tree.leaves((one, told.loss)), jax.tree.leaves((two, said.loss)), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)
    if compressor is None and not settings:
        # what passes between devices: one sum of S numbers; of who was heard and of losses, a number a client
        moved = re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)\(", program.as_text())
        shapes = [dims for shape in moved for dims in re.findall(r"\[([0-9,]*)\]", shape)]
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n] or [1])) for dims in shapes]
        assert S in sizes and max(sizes) <= S, moved
