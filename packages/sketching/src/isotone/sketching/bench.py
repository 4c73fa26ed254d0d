"""Speed and bytes: the transform, CountSketch, federated rounds, and what passes a socket, beside their peers."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.sketching.compressors import Plain, Sketched
from isotone.sketching.data import ClientData
from isotone.sketching.exchange import measure_bytes
from isotone.sketching.federated import FedAlgorithm, fed_algorithm
from isotone.sketching.hadamard import fwht
from isotone.sketching.models import make_model
from isotone.sketching.sketches import make_sketch

CORE_MS = 10.0


def bench(run: Run, rounds: int = 10, bits: int = 20) -> Report:
    """Every row; Flower's where flwr is installed. `bits`: of the transform's and the sketches' length."""
    begin = time.perf_counter()
    where = device.resolve(run.device, "jax")
    plan: list[Callable[[], list[Ratio]]] = [
        functools.partial(transform_rows, bits, where, rounds),
        functools.partial(countsketch_rows, bits + 3, where, rounds),
        functools.partial(peer_rows, bits, where, rounds),
        functools.partial(simulation_rows, 100, where, rounds),
        functools.partial(overhead_rows, 14_000, where, rounds),
        bytes_rows,
    ]
    ratios: list[Ratio] = []
    with progress.bar("sketching bench", len(plan), run.silent) as bar:
        for row in plan:
            ratios += row()
            bar.advance(1)
    seconds = time.perf_counter() - begin
    scale = "gpu" if where == "cuda" else "cpu"
    return Report("sketching", "bench", scale, (), "jax", ratios=ratios, seconds=seconds)


def butterflies(values: Array) -> Array:
    """The transform as its textbook has it: log d passes of sums and differences, by reshaping."""
    d, width = values.shape[-1], 1
    while width < d:
        pairs = values.reshape(-1, 2, width)
        values = jnp.concatenate([pairs[:, :1] + pairs[:, 1:], pairs[:, :1] - pairs[:, 1:]], 1)
        width *= 2
    return values.reshape(d)


def transform_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """Of 2^bits numbers, beside the butterflies, after both gave the same; and on one core, against 10 ms."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1 << bits), jnp.float32)
    ours, theirs = jax.jit(fwht), jax.jit(butterflies)
    if float(jnp.abs(ours(x) - theirs(x)).max()) > 1e-2 * (1 << bits) ** 0.5:
        raise RuntimeError("expected one transform from both")
    timing = compare(functools.partial(ours, x), functools.partial(theirs, x), rounds=max(6, rounds), device=where)
    seconds = timing.ours_seconds
    peer = ("butterflies, jitted", f"jax {jax.__version__}")
    found = [
        Ratio(
            "fwht",
            f"Walsh-Hadamard transform of 2^{bits}",
            "blocks of +-1",
            *peer,
            seconds,
            seconds * timing.ratio,
            "s",
            3.0,
        )
    ]
    if where == "cpu":
        one = on_one_core(bits)
        found.append(
            Ratio(
                "fwht-core",
                f"the same on one core, 2^{bits}",
                "blocks of +-1",
                "what was asked",
                "",
                one,
                CORE_MS / 1e3,
                "s",
                1.0,
            )
        )
    return found


def on_one_core(bits: int) -> float:
    """Seconds of a transform in a process that has one core: the median of 20."""
    code = (
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}) if hasattr(os, 'sched_setaffinity') else None\n"
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from isotone.sketching.hadamard import fwht\n"
        f"x = jnp.asarray(np.random.default_rng(0).standard_normal({1 << bits}), jnp.float32)\n"
        "run, times = jax.jit(fwht), []\n"
        "run(x).block_until_ready()\n"
        "for _ in range(20):\n"
        "    start = time.perf_counter(); run(x).block_until_ready(); times.append(time.perf_counter() - start)\n"
        "print(float(np.median(times)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return float(done.stdout)


def countsketch_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """Bytes read a second, its hash made on the way, beside a copy of the same numbers (STREAM: read and written)."""
    d, s = 1 << bits, 1 << max(4, bits - 7)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(d), jnp.float32)
    sketch = make_sketch("countsketch", d, s)
    run = jax.jit(lambda x: sketch.sk(0, x))
    copied = jax.jit(lambda x: x + 1.0) if where == "cuda" else None
    source, target = np.asarray(x), np.empty(d, np.float32)
    peer = functools.partial(copied, x) if copied is not None else functools.partial(np.copyto, target, source)
    timing = compare(functools.partial(run, x), peer, rounds=max(6, rounds), device=where)
    ours = 4 * d / timing.ours_seconds / 1e9
    stream = 8 * d / (timing.ours_seconds * timing.ratio) / 1e9
    work = f"CountSketch of 2^{bits} numbers to 2^{bits - 7}, beside a copy"
    return [Ratio("countsketch-stream", work, "sk", "copy", "", ours, stream, "GB/s", 0.5, higher_is_better=True)]


def peer_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """CountSketch beside scipy's, fresh each time as rounds want it; both keep inner products on average."""
    from scipy import __version__ as version
    from scipy.linalg import clarkson_woodruff_transform

    d, s = 1 << bits, 1 << (bits - 7)
    x = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    sketch = make_sketch("countsketch", d, s)
    run = jax.jit(sketch.sk)
    count = [0]

    def ours() -> Array:
        count[0] += 1
        return run(jnp.int32(count[0]), x)

    def theirs() -> Any:
        return clarkson_woodruff_transform(x[:, None], s, rng=count[0])

    for name, values in (("ours", np.asarray(ours())), ("scipy's", np.asarray(theirs()))):
        if abs(float(np.sum(values**2)) / float(np.sum(x**2)) - 1) > 0.1:
            raise RuntimeError(f"expected {name} sketch to keep the norm")
    timing = compare(ours, theirs, rounds=max(6, rounds), warmup=2, device=where)
    seconds = timing.ours_seconds
    work = f"a fresh CountSketch of 2^{bits} numbers to 2^{bits - 7}"
    peer = ("scipy.linalg.clarkson_woodruff_transform", version)
    return [Ratio("countsketch-scipy", work, "sk", *peer, seconds, seconds * timing.ratio, "s", 1.0)]


def problem(hidden: int, clients: int, most: int = 32) -> tuple[Any, ClientData, Any]:
    """(model, data, params) of digits-like noise: times do not depend on what is in it."""
    rng = np.random.default_rng(0)
    model = make_model("mlp", (8, 8, 1), 10, hidden)
    x = jnp.asarray(rng.random((clients, most, 8, 8, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, (clients, most)))
    return model, ClientData(x, y, jnp.full(clients, most)), model.init(jax.random.key(0))


def _round(algorithm: FedAlgorithm, params: Any, data: ClientData) -> Callable[[], Any]:
    state = algorithm.init(params, len(data))
    step = jax.jit(lambda state, arrays: algorithm.round(state, jax.random.key(0), ClientData(*arrays))[0])
    arrays = tuple(vars(data).values())
    return lambda: step(state, arrays)


def simulation_rows(clients: int, where: str, rounds: int) -> list[Ratio]:
    """A round of many clients in one program, beside a loop over jitted clients, and beside Flower's simulation."""
    model, data, params = problem(32, clients)
    algorithm = fed_algorithm(model.loss, params, ratio=10.0, local_steps=5)
    local = jax.jit(lambda p, key, arrays, client: algorithm.local(p, key, ClientData(*arrays), client)[0])
    send = jax.jit(lambda t, delta: algorithm.compressor.sketch.sk(t, algorithm.tree.flatten(delta)))
    arrays = tuple(vars(data).values())

    def loop() -> Any:
        sent = [send(0, local(params, jax.random.key(client), arrays, client)) for client in range(clients)]
        return algorithm.compressor.sketch.desk(0, sum(sent) / clients)

    timing = compare(_round(algorithm, params, data), loop, rounds=max(6, rounds), warmup=2, device=where)
    seconds = timing.ours_seconds
    work = f"a sketched round of {clients} clients, K = 5, d = 2,410"
    peer = ("a loop over jitted clients", f"jax {jax.__version__}")
    found = [Ratio("simulation-loop", work, "one program", *peer, seconds, seconds * timing.ratio, "s", 2.0)]
    if importlib.util.find_spec("flwr") is not None:  # pragma: no cover - flwr is installed for the bench alone
        from importlib.metadata import version

        from isotone.sketching.flower import simulate
        from isotone.sketching.training import RunConfig

        theirs = simulate(RunConfig(model="mlp", clients=clients, rounds=3, local_steps=5, ratio=10.0), 3)
        found.append(
            Ratio(
                "simulation-flower",
                work,
                "one program",
                "Flower's simulation",
                version("flwr"),
                seconds,
                theirs,
                "s",
                10.0,
            )
        )
    return found


def overhead_rows(hidden: int, where: str, rounds: int) -> list[Ratio]:
    """What a sketch adds to a round at d of a million: at most 10 %."""
    model, data, params = problem(hidden, 4)
    plain = fed_algorithm(model.loss, params, Plain(sum(leaf.size for leaf in jax.tree.leaves(params))), local_steps=5)
    found = []
    for kind in ("srht", "countsketch"):
        sketched = fed_algorithm(model.loss, params, kind=kind, ratio=10.0, local_steps=5)
        timing = compare(
            _round(sketched, params, data), _round(plain, params, data), rounds=max(6, rounds), warmup=2, device=where
        )
        seconds = timing.ours_seconds
        work = f"a round of 4 clients, K = 5 on 32 examples, d = {plain.compressor.d:,}, {kind} to a tenth"
        peer = ("the plain round", f"jax {jax.__version__}")
        found.append(Ratio(f"overhead-{kind}", work, "sketched", *peer, seconds, seconds * timing.ratio, "s", 1 / 1.1))
    return found


def bytes_rows() -> list[Ratio]:
    """Bytes of a client's update counted at a socket, header and all, sketched beside plain."""
    d = 100_000
    ours = measure_bytes(Sketched(make_sketch("srht", d, d // 10)))
    theirs = measure_bytes(Plain(d))
    work = f"one client's update of d = {d:,} over TCP on loopback, all bytes"
    return [
        Ratio(
            "bytes-up",
            work,
            "a sketch of a tenth",
            "plain",
            "",
            ours.up + ours.headers // 2,
            theirs.up + theirs.headers // 2,
            "bytes",
            9.9,
        )
    ]
