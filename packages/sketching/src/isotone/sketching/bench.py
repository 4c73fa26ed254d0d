"""Speed and bytes: the transform, CountSketch, federated rounds, and what passes a socket, beside their peers.

Each row is the median over pairs of runs, JAX's results waited for. What is asked of one core is measured in a process
that has one, both sides of it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared import device, progress
from isotone.shared.bench import Timing, compare, measure
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.sketching.compressors import Plain, Sketched
from isotone.sketching.data import ClientData
from isotone.sketching.exchange import measure_bytes
from isotone.sketching.federated import FedAlgorithm, fed_algorithm
from isotone.sketching.hadamard import fwht
from isotone.sketching.models import make_model
from isotone.sketching.sketches import Sketch, make_sketch
from isotone.sketching.training import RunConfig, prepare, train
from isotone.sketching.trees import tree_sketch

CORE_MS = 10.0
JAX = f"jax {jax.__version__}"


def bench(run: Run, rounds: int = 20, bits: int = 20) -> Report:
    """Every row; Flower's where flwr is installed. `bits`: of the transform's length, a 16th of CountSketch's."""
    begin = time.perf_counter()
    where = device.resolve(run.device, "jax")
    plan: list[Callable[[], list[Ratio]]] = [
        functools.partial(transform_rows, bits, where, rounds),
        functools.partial(countsketch_rows, bits + 4, where, rounds),
        functools.partial(kind_rows, bits + 4, where, rounds),
        functools.partial(peer_rows, bits, where, rounds, ("countsketch-blocks", "countsketch")),
        functools.partial(simulation_rows, 100, where, rounds),
        functools.partial(flower_rows, 100),
        functools.partial(overhead_rows, 14_000, where, rounds, ("srht", "countsketch-blocks", "countsketch")),
        bytes_rows,
        ledger_rows,
    ]
    ratios: list[Ratio] = []
    with progress.bar("sketching bench", len(plan), run.silent) as bar:
        for row in plan:
            ratios += row()
            bar.advance(1)
    seconds = time.perf_counter() - begin
    scale = "gpu" if where == "cuda" else "cpu"
    return Report("sketching", "bench", scale, (), "jax", ratios=ratios, seconds=seconds)


def on_one_core(name: str, *arguments: Any) -> Any:
    """What the function `name` of this module returns in a process that has one core."""
    code = (
        "import json, os, sys\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}) if hasattr(os, 'sched_setaffinity') else None\n"
        "from isotone.sketching import bench\n"
        "print(json.dumps(getattr(bench, sys.argv[1])(*json.loads(sys.argv[2]))))\n"
    )
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    done = subprocess.run(
        [sys.executable, "-c", code, name, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    return json.loads(done.stdout)


def here_or_on_one_core(function: Callable[..., Any], where: str, *arguments: Any) -> Any:
    """On a GPU `function` of `where` and the arguments, else the same on one core."""
    return function(where, *arguments) if where == "cuda" else on_one_core(function.__name__, where, *arguments)


def _seconds(timing: Timing) -> tuple[float, float]:
    """(ours, peer) of the median ratio."""
    return timing.ours_seconds, timing.ours_seconds * timing.ratio


# --- transform and sketches ---------------------------------------------------------------------------------------


def butterflies(values: Any, numpy: Any = jnp) -> Any:
    """The transform as its textbook has it: log d passes of sums and differences, by reshaping."""
    d, width = values.shape[-1], 1
    while width < d:
        pairs = values.reshape(-1, 2, width)
        values = numpy.concatenate([pairs[:, :1] + pairs[:, 1:], pairs[:, :1] - pairs[:, 1:]], 1)
        width *= 2
    return values.reshape(d)


def transform_seconds(where: str, bits: int, rounds: int, jitted: bool = True) -> tuple[float, float]:
    """(ours, butterflies), after both gave the same; theirs compiled by JAX too, or a loop over NumPy's."""
    x = _numbers(1 << bits)
    ours = functools.partial(jax.jit(fwht), x)
    theirs = functools.partial(butterflies, np.asarray(x), np)
    if jitted:
        theirs = functools.partial(jax.jit(butterflies), x)
    if float(jnp.abs(ours() - theirs()).max()) > 1e-2 * (1 << bits) ** 0.5:
        raise RuntimeError("expected one transform from both")
    return _seconds(compare(ours, theirs, rounds=rounds, device=where))


def transform_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """Of 2^bits numbers, beside the butterflies, and on one core against 10 ms."""
    ours, theirs = here_or_on_one_core(transform_seconds, where, bits, max(6, rounds))
    work = f"Walsh-Hadamard transform of 2^{bits}" + ("" if where == "cuda" else ", one core")
    mine = (work, "4 bits as a product, then by two")
    found = [Ratio("fwht", *mine, "butterflies, jitted", JAX, ours, theirs, "s", 3.0)]
    if where == "cpu":
        own, slow = here_or_on_one_core(transform_seconds, where, bits, max(6, rounds), False)
        found.append(Ratio("fwht-numpy", *mine, "butterflies, NumPy", np.__version__, own, slow, "s", None))
        found.append(Ratio("fwht-core", *mine, "what was asked", "", ours, CORE_MS / 1e3, "s", 1.0))
    return found


def stream_seconds(where: str, bits: int, rounds: int) -> tuple[float, float]:
    """(sk in blocks, a copy) of 2^bits numbers, the sketch's hash made on the way. On a CPU what is copied to is there
    before; XLA's own copies are slower, by the pages that they ask for."""
    sketch, x = _wide("countsketch-blocks", bits), _numbers(1 << bits)
    run, added = jax.jit(sketch.sk), jax.jit(lambda v: v + 1.0)
    source, target = np.asarray(x), np.empty(1 << bits, np.float32)
    copy = functools.partial(added, x) if where == "cuda" else functools.partial(np.copyto, target, source)
    return _seconds(compare(functools.partial(run, jnp.int32(1), x), copy, rounds=rounds, device=where))


def countsketch_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """Bytes a second: read by sk, and read and written by a copy of the same numbers (STREAM)."""
    ours, copied = here_or_on_one_core(stream_seconds, where, bits, max(6, rounds))
    sketch = _wide("countsketch-blocks", bits)
    work = f"CountSketch in blocks of 2^{bits} numbers to {sketch.s:,}, beside a copy"
    work += "" if where == "cuda" else ", one core"
    rates = (4 * sketch.d / ours / 1e9, 8 * sketch.d / copied / 1e9)
    return [Ratio("countsketch-stream", work, "sk", "copy", "", *rates, "GB/s", 0.5, higher_is_better=True)]


def kind_seconds(where: str, bits: int, rounds: int) -> list[tuple[float, float]]:
    """Pairs: sk in blocks and the textbook's scatter; the same of desk; desk in blocks and a copy by XLA, which takes
    new pages too."""
    blocked, plain = _wide("countsketch-blocks", bits), _wide("countsketch", bits)
    x, y, t = _numbers(blocked.d), _numbers(blocked.s), jnp.int32(1)
    sks = [functools.partial(jax.jit(sketch.sk), t, x) for sketch in (blocked, plain)]
    desks = [functools.partial(jax.jit(sketch.desk), t, y) for sketch in (blocked, plain)]
    copied = functools.partial(jax.jit(lambda v: v + 1.0), x)
    pairs = (sks, desks, (desks[0], copied))
    return [_seconds(compare(*pair, rounds=rounds, device=where)) for pair in pairs]


def kind_rows(bits: int, where: str, rounds: int) -> list[Ratio]:
    """The two CountSketches beside each other, both ways."""
    pairs = here_or_on_one_core(kind_seconds, where, bits, max(6, rounds))
    work = f"CountSketch of 2^{bits} numbers" + ("" if where == "cuda" else ", one core")
    rows = (
        ("blocks-scatter", "sk", "textbook: scatter-add", 5.0 if where == "cuda" else None),
        ("blocks-gather", "desk", "textbook: gather", None),
        ("blocks-desk-copy", "desk beside a copy", "x + 1", None),
    )
    return [
        Ratio(id, f"{work}, {what}", "in blocks", peer, JAX, ours, theirs, "s", target)
        for (id, what, peer, target), (ours, theirs) in zip(rows, pairs, strict=True)
    ]


def peer_rows(bits: int, where: str, rounds: int, kinds: Sequence[str] = ("countsketch-blocks",)) -> list[Ratio]:
    """CountSketch beside scipy's, fresh each time as rounds want it; both keep norms on average."""
    from scipy import __version__ as version
    from scipy.linalg import clarkson_woodruff_transform

    d, s = 1 << bits, 1 << (bits - 7)
    x = _numbers(d)
    column = np.asarray(x)[:, None]
    count = [0]

    def theirs() -> Any:
        count[0] += 1
        return clarkson_woodruff_transform(column, s, rng=count[0])

    found = []
    for kind in kinds:
        run = jax.jit(make_sketch(kind, d, s).sk)

        def ours(run: Callable[..., Array] = run) -> Array:
            count[0] += 1
            return run(jnp.int32(count[0]), x)

        for name, values in (("ours", np.asarray(ours())), ("scipy's", np.asarray(theirs()))):
            # the deviation of |R x|^2 / |x|^2 is sqrt(2 / s)
            if abs(float(np.sum(values**2)) / float(np.sum(column**2)) - 1) > 6 * (2 / s) ** 0.5:
                raise RuntimeError(f"expected {name} sketch to keep the norm")
        seconds = _seconds(compare(ours, theirs, rounds=max(6, rounds), warmup=2, device=where))
        work = f"a fresh CountSketch of 2^{bits} numbers to {s:,}, {kind}"
        id = "countsketch-scipy" if kind == "countsketch-blocks" else "textbook-scipy"
        found.append(Ratio(id, work, "sk", "scipy.linalg.clarkson_woodruff_transform", version, *seconds, "s", 1.0))
    return found


def _numbers(n: int) -> Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(n), jnp.float32)


def _wide(kind: str, bits: int) -> Sketch:
    """2^bits numbers into a 256th."""
    return make_sketch(kind, 1 << bits, 1 << max(4, bits - 8))


# --- rounds -------------------------------------------------------------------------------------------------------


def problem(hidden: int, clients: int, most: int = 32) -> tuple[Any, ClientData, Any]:
    """(model, data, params) of digits-like noise: times do not depend on what is in it."""
    rng = np.random.default_rng(0)
    model = make_model("mlp", (8, 8, 1), 10, hidden)
    x = jnp.asarray(rng.random((clients, most, 8, 8, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, (clients, most)))
    return model, ClientData(x, y, jnp.full(clients, most)), model.init(jax.random.key(0))


def _round(algorithm: FedAlgorithm, params: Any, data: ClientData) -> Callable[[], Any]:
    state, key = algorithm.init(params, len(data)), jax.random.key(0)
    step = jax.jit(lambda state, data: algorithm.round(state, key, data)[0])
    return lambda: step(state, data)


def simulation_rows(clients: int, where: str, rounds: int) -> list[Ratio]:
    """A round of many clients in one program, beside a loop over jitted clients."""
    model, data, params = problem(32, clients)
    sketch = tree_sketch(params, ratio=10.0)
    algorithm = fed_algorithm(model.loss, params, Sketched(sketch), local_steps=5)

    @jax.jit
    def local(params: Any, key: Array, data: ClientData, client: Array) -> Array:
        own = jax.random.fold_in(key, client)
        return algorithm.tree.flatten(algorithm.local(params, own, data, client)[0])

    @jax.jit
    def receive(params: Any, deltas: list[Array]) -> Any:
        # their mean is sketched once, as in the program beside it
        y = sketch.sk(0, sum(deltas[1:], deltas[0]) / clients)
        return jax.tree.map(jnp.add, params, sketch.unflatten(algorithm.eta_g * sketch.desk(0, y)))

    numbers, key = [jnp.int32(client) for client in range(clients)], jax.random.key(0)

    def loop() -> Any:
        return receive(params, [local(params, key, data, client) for client in numbers])

    timing = compare(_round(algorithm, params, data), loop, rounds=max(6, rounds), warmup=2, device=where)
    work = f"a sketched round of {clients} clients, K = 5, d = {sketch.d:,}"
    peer = ("a loop over jitted clients", JAX)
    return [Ratio("simulation-loop", work, "one program", *peer, *_seconds(timing), "s", 2.0)]


def flower_rows(clients: int) -> list[Ratio]:
    """Seconds a round beside Flower's simulation; nothing where flwr is not installed: it asks for older libraries than
    this package, and stands in no group of it."""
    return [] if importlib.util.find_spec("flwr") is None else _beside_flower(clients)


def _beside_flower(clients: int) -> list[Ratio]:  # pragma: no cover - flwr is installed for the bench alone
    """The very same run on both: digits by a Dirichlet dealing, K = 5 on 32."""
    from importlib.metadata import version

    from isotone.sketching.flower import simulate

    config = RunConfig(model="mlp", clients=clients, rounds=12, ratio=10.0)
    setup = prepare(config)
    ours, _ = measure(_round(setup.algorithm, setup.params, setup.data))
    work = f"a sketched round of {clients} clients, K = 5, d = {setup.algorithm.tree.d:,}, digits"
    peer = ("Flower's simulation", f"flwr {version('flwr')}")
    return [Ratio("simulation-flower", work, "one program", *peer, ours, simulate(config, config.rounds), "s", 10.0)]


def overhead_rows(hidden: int, where: str, rounds: int, kinds: Sequence[str] = ("srht", "countsketch")) -> list[Ratio]:
    """What a sketch adds to a round at d of a million: at most 10 %. Of 4 clients in one program, which sketches their
    mean, and of one, which sketches its own update."""
    found = []
    for clients, name in ((4, "4 clients"), (1, "one client")):
        model, data, params = problem(hidden, clients)
        whole = Plain(sum(leaf.size for leaf in jax.tree.leaves(params)))
        plain = _round(fed_algorithm(model.loss, params, whole, local_steps=5), params, data)
        for kind in kinds:
            sketched = _round(fed_algorithm(model.loss, params, kind=kind, ratio=10.0, local_steps=5), params, data)
            timing = compare(sketched, plain, rounds=max(6, rounds), warmup=2, device=where)
            work = f"a round of {name}, K = 5 on 32 examples, d = {whole.d:,}, {kind} to a tenth"
            pair = ("sketched", "the plain round", JAX)
            found.append(Ratio(f"overhead-{kind}-{clients}", work, *pair, *_seconds(timing), "s", 1 / 1.1))
    return found


# --- bytes --------------------------------------------------------------------------------------------------------


def bytes_rows() -> list[Ratio]:
    """Bytes of a client's update counted at a socket, header and all, sketched beside plain."""
    d = 100_000
    ours, theirs = (measure_bytes(arm) for arm in (Sketched(make_sketch("srht", d, d // 10)), Plain(d)))
    work = f"one client's update of d = {d:,} over TCP on loopback, all bytes"
    counts = (ours.up + ours.headers // 2, theirs.up + theirs.headers // 2)
    return [Ratio("bytes-up", work, "a sketch of a tenth", "plain", "", *counts, "bytes", 9.9)]


def ledger_rows(rounds: int = 2, clients: int = 3) -> list[Ratio]:
    """The ledger of a run beside what the same rounds are at a socket, numbers alone: to the byte, or it raises."""
    config = RunConfig(clients=clients, rounds=rounds, local_steps=1, concentration=None)
    with tempfile.TemporaryDirectory() as folder:
        written = sum(train(config, folder, every=rounds).ledger.total)
    found = measure_bytes(prepare(config).algorithm.compressor, clients)
    counted = rounds * clients * (found.up + found.down)
    if written != counted:
        raise RuntimeError(f"expected a ledger of the {counted} bytes at the socket, got {written}")
    work = f"{rounds} rounds of {clients} clients, sketches of digits, both ways"
    return [Ratio("bytes-ledger", work, "counted at a socket", "the ledger", "", counted, written, "bytes", 1.0)]
