"""Rounds whose clients are split over four devices are those of one device (section 7, 14)."""

import os
import subprocess
import sys

import pytest

CODE = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
from isotone.sketching.compressors import Sketched, TopK
from isotone.sketching.data import ClientData
from isotone.sketching.federated import fed_algorithm, run
from isotone.sketching.integer import IntegerCode, IntegerSketch
from isotone.sketching.privacy import PrivacyConfig, private_local
from isotone.sketching.sketches import make_sketch

assert len(jax.devices()) == 4
D, S = 48, 12
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((8, 4, D)), jnp.float32).at[2].set(jnp.nan)
data = ClientData(x, jnp.zeros((8, 4), jnp.int32), jnp.array([4, 3, 4, 2, 4, 4, 1, 4]))
start = {"w": jnp.zeros(D)}

def squares(params, x, y):
    return jnp.mean(jnp.sum((params["w"] - x) ** 2, -1)) / 2

private = private_local(squares, PrivacyConfig(rate=0.5, noise=0.3), 2, 0.1, 5)
flat = Mesh(np.array(jax.devices()), ("clients",))
square = Mesh(np.array(jax.devices()).reshape(2, 2), ("hosts", "clients"))
key = jax.random.key(3)
cases = {
    "srht": (None, flat, {}),
    "blocks, two axes": (Sketched(make_sketch("countsketch-blocks", D, S)), square, {"straggle": 0.3}),
    "3 of 8 by size, private": (None, flat, {"participants": 3, "weigh": "size", "local_update": private}),
    "top-k, 5 of 8": (TopK(D, 6, 5), flat, {"participants": 5}),
    "whole numbers": (IntegerSketch(make_sketch("srht", D, S), IntegerCode(50.0, 8)), flat, {"participants": 6}),
}
for name, (compressor, mesh, settings) in cases.items():
    ends = []
    for where in (None, mesh):
        made = fed_algorithm(
            squares, start, compressor, ratio=4.0, local_steps=2, batch=2, rate=0.1, mesh=where, **settings
        )
        program = jax.jit(lambda s, d, made=made: run(made, s, key, d, 2)).lower(made.init(start, 8), data).compile()
        ends.append(program(made.init(start, 8), data))
    (one, told), (two, said) = ends
    assert jnp.array_equal(told.taken, said.taken) and jnp.array_equal(told.heard, said.heard), name
    assert bool(told.heard.any()) and int(two.round) == 2, name
    assert jnp.isfinite(one.params["w"]).all() and float(jnp.abs(one.params["w"]).max()) > 0.01, name
    for a, b in zip(jax.tree.leaves((one, told.loss)), jax.tree.leaves((two, said.loss)), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5), (name, a, b)
    if name == "srht":
        text = program.as_text()
        # what passes between devices: one sum of S numbers; of who was heard and of losses, a number a client
        moved = re.findall(r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)\\(", text)
        shapes = [dims for shape in moved for dims in re.findall(r"\\[([0-9,]*)\\]", shape)]
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n] or [1])) for dims in shapes]
        assert S in sizes and max(sizes) <= S, moved
    print(name)
"""


@pytest.mark.parametrize("devices", [4])
def test_clients_over_devices(devices):
    # the flags of the tests, and the last of two counts
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 5
