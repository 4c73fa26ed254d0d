"""Speed beside dhg and torch-geometric on the same weights, and the student beside its teacher.

Equal outputs are checked before anything is timed. Each row says the sizes: N vertices, nnz(H) incidences, and the
entries that a materialised Laplacian has (at most).
"""

from __future__ import annotations

import time
import warnings
from importlib import metadata
from typing import Any

import numpy as np
import torch

from isotone.lighthgnn import latency
from isotone.lighthgnn.distill import train_teacher
from isotone.lighthgnn.features import as_features
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.plots import batch_plot, latency_plot
from isotone.lighthgnn.settings import transductive_split
from isotone.lighthgnn.sparse import SparseLinear, SparseMatrix
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.lighthgnn.student import CompiledStudent, LightMLP
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.lighthgnn.teachers import HGNN, HGNNP
from isotone.lighthgnn.training import TrainConfig
from isotone.shared import device
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

TOLERANCE = 1e-5
# vertices, hyperedges, sizes; the mean sizes are 11.5, 30, 200 and 400
SIZES = {
    "full": {
        "small hyperedges": SyntheticConfig(num_vertices=20_000, num_edges=10_000),
        "hyperedges of 30": SyntheticConfig(num_vertices=20_000, num_edges=4_000, sizes=(20, 40)),
        "hyperedges of 200": SyntheticConfig(num_vertices=10_000, num_edges=150, sizes=(150, 250)),
        "hyperedges of 400": SyntheticConfig(num_vertices=20_000, num_edges=360, sizes=(350, 450)),
    },
    "tiny": {"hyperedges of 30": SyntheticConfig(num_vertices=300, num_edges=40, sizes=(20, 40))},
}
SWEEP = {"full": (2_500, 10_000, 55_000), "tiny": (200, 400)}
BATCHES = {"full": (1, 32, 1024, 55_000), "tiny": (1, 32, 400)}
ROUNDS = {"full": 12, "tiny": 6}


def bench(run: Run, size: str = "full") -> Report:
    """Every row of the table; a peer that is not installed has no row."""
    if size not in SIZES:
        raise InputError(f"expected --size to be one of {', '.join(SIZES)}, got {size!r}")
    where = device.resolve(run.device)
    start = time.perf_counter()
    rows: list[Ratio] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own deprecations and torch's beta notices
        for name, config in SIZES[size].items():
            # a pass of the peer takes seconds where its Laplacian has tens of millions of entries
            rounds = 6 if config.sizes[1] > 300 else ROUNDS[size]
            rows += teacher_rows(name, config, where, rounds)
        rows.append(sparse_row(size, where))
        rows.append(stacked_row(size, where))
        student, times, sweep = student_rows(size, where)
        rows += student
    return Report(
        "lighthgnn",
        "bench",
        "gpu" if where == "cuda" else "cpu",
        (0,),
        "torch",
        ratios=rows,
        seconds=time.perf_counter() - start,
        figures={"latency": latency_plot(sweep), "batch": batch_plot(times)},
    )


# --- teachers beside their peers ------------------------------------------------------------------------


def teacher_rows(name: str, config: SyntheticConfig, where: str, rounds: int) -> list[Ratio]:
    """HGNN beside dhg's, cold (what a new hypergraph costs) and warm; HGNN+ beside torch-geometric's convolution."""
    made = make_synthetic(config, 0)
    hypergraph, X = made.hypergraph.to(where), made.X.to(where)
    sizes = f"{hypergraph.num_vertices:,} x {config.dim}, nnz(H) {hypergraph.nnz:,}"
    rows = []
    if (dhg := _import("dhg")) is not None:
        rows += _dhg_rows(dhg, name, hypergraph, X, sizes, where, rounds)
    if (pyg := _import("torch_geometric.nn")) is not None:
        rows.append(_pyg_row(pyg, name, hypergraph, X, sizes, where, rounds))
    return rows


def _dhg_rows(
    dhg: Any, name: str, hypergraph: Hypergraph, X: torch.Tensor, sizes: str, where: str, rounds: int
) -> list[Ratio]:
    theirs = dhg.models.HGNN(X.shape[1], 32, 5).eval().to(where)
    ours = HGNN(X.shape[1], 32, 5).eval().to(where)
    ours.load_state_dict(theirs.state_dict())
    peer = dhg.Hypergraph(hypergraph.num_vertices, hypergraph.edges(), device=torch.device(where))
    index = hypergraph.hyperedge_index.cpu().numpy()
    with torch.inference_mode():
        _check(ours(X, hypergraph), theirs(X, peer), "dhg's HGNN")
        entries = peer.L_HGNN._nnz()

        def warm() -> Any:
            return ours(X, hypergraph)

        def their_warm() -> Any:
            return theirs(X, peer)

        def cold() -> Any:
            return ours(X, Hypergraph(hypergraph.num_vertices, (index[0], index[1])).to(where))

        def their_cold() -> Any:
            # what it derived from its hyperedges is forgotten; the hyperedges themselves stay
            peer._clear_cache()
            return theirs(X, peer)

        # the paper's own comparison: every vertex, by an HGNN that has its N x N Laplacian, and by the MLP
        student = CompiledStudent(LightMLP(X.shape[1], 128, 5).eval().to(where))

        def answer() -> Any:
            return student(X)

        hundred = 100.0 if hypergraph.laplacian_entries() >= 5e7 else None
        above_20 = hypergraph.nnz / hypergraph.num_edges > 20
        version = metadata.version("dhg")
        work = f"HGNN forward, {name}, {sizes}, nnz(L) {entries:,}"
        return [
            _row(f"dhg-cold-{name}", f"{work}, cold", "HGNN and building it", cold, "dhg HGNN", their_cold, version,
                 3.0 if above_20 else None, where, 6),
            _row(f"dhg-warm-{name}", f"{work}, warm", "HGNN, factored", warm, "dhg HGNN, L kept", their_warm, version,
                 1.0, where, rounds),
            _row(f"paper-{name}", f"all vertices, {name}, {sizes}, nnz(L) {entries:,}, warm",
                 "student (128 wide), all", answer, "dhg HGNN, L kept, all", their_warm, version, hundred, where,
                 rounds),
        ]  # fmt: skip


def _pyg_row(
    pyg: Any, name: str, hypergraph: Hypergraph, X: torch.Tensor, sizes: str, where: str, rounds: int
) -> Ratio:
    ours = HGNNP(X.shape[1], 32, 5).eval().to(where)
    convs = [pyg.HypergraphConv(X.shape[1], 32, bias=False), pyg.HypergraphConv(32, 5, bias=False)]
    with torch.no_grad():
        layers: list[Any] = list(ours.layers)
        for conv, layer in zip(convs, layers, strict=True):
            layer.theta.bias.zero_()  # torch-geometric adds its bias after the smoothing
            conv.to(where).lin.weight.copy_(layer.theta.weight)
    index, number = hypergraph.hyperedge_index, hypergraph.num_edges

    def their_pass() -> Any:
        return convs[1](convs[0](X, index, num_edges=number).relu(), index, num_edges=number)

    with torch.inference_mode():
        _check(ours(X, hypergraph), their_pass(), "torch-geometric's HypergraphConv")
        version = metadata.version("torch-geometric")
        work = f"HGNN+ forward, {name}, {sizes}"
        peer = "torch-geometric HypergraphConv"
        return _row(
            f"pyg-{name}", work, "HGNN+", lambda: ours(X, hypergraph), peer, their_pass, version, 1.0, where, rounds
        )


def sparse_row(size: str, where: str) -> Ratio:
    """The first layer forward and backward on a bag of words of Cora's shape (1.3 % dense), sparse against dense."""
    rows, words = (2708, 1433) if size == "full" else (300, 400)
    source = np.random.default_rng(0)
    dense = torch.from_numpy((source.random((rows, words)) < 0.0127).astype(np.float32))
    sparse = as_features(dense)
    assert isinstance(sparse, SparseMatrix)
    sparse, dense = sparse.to(where), dense.to(where)
    layer = SparseLinear(words, 128).to(where)
    _check(layer(sparse), layer(dense), "the dense product")

    def step(X: Any) -> Any:
        layer.zero_grad(set_to_none=True)
        layer(X).sum().backward()
        return layer.weight.grad

    work = f"first layer to 128, forward and backward, {rows:,} x {words:,}, 1.3 % dense"
    ours, peer, version = lambda: step(sparse), lambda: step(dense), torch.__version__
    return _row(
        "sparse-first-layer", work, "CSR features", ours, "dense features", peer, version, 8.0, where, ROUNDS[size]
    )


def stacked_row(size: str, where: str) -> Ratio:
    """Eight seeds of HGNN trained as one job against one after another, five epochs each."""
    seeds, epochs = 8, 5
    config = SyntheticConfig() if size == "full" else SyntheticConfig(num_vertices=300, num_edges=150)
    made = make_synthetic(config, 0)
    X, hypergraph, y = made.X.to(where), made.hypergraph.to(where), made.y.to(where)
    splits = [transductive_split(made.y, 10, 20, seed) for seed in range(seeds)]
    train, val = (torch.stack([getattr(split, part) for split in splits]).to(where) for part in ("train", "val"))
    settings = TrainConfig(epochs=epochs)

    def fresh() -> list[HGNN]:
        return [HGNN(config.dim, 32, config.num_classes).to(where) for _ in range(seeds)]

    def together() -> Any:
        return train_teachers_together(fresh(), X, hypergraph, y, train, val, settings)

    def apart() -> Any:
        for number, teacher in enumerate(fresh()):
            train_teacher(teacher, X, hypergraph, y, train[number], val[number], settings)

    work = f"{seeds} seeds of HGNN, {epochs} epochs, {len(y):,} vertices, nnz(H) {hypergraph.nnz:,}"
    return _row("stacked-seeds", work, "as one job", together, "one by one", apart, torch.__version__, None, where, 6)


# --- the student beside its teacher ---------------------------------------------------------------------


def student_rows(size: str, where: str) -> tuple[list[Ratio], list[dict[str, Any]], list[dict[str, Any]]]:
    """Unseen vertices at several batches, the break-even batch, and flatness in the number of hyperedges."""
    rows: list[Ratio] = []
    largest = SWEEP[size][-1]
    base = SyntheticConfig(num_vertices=largest, num_edges=largest // 2)
    contest = latency.make_contest(base, where)
    _check(contest.closure(torch.arange(5)), contest.whole_pass()[:5], "the closure")
    times = [latency.answer_times(contest, batch, rounds=ROUNDS[size], device=where) for batch in BATCHES[size]]
    for entry in times:
        batch = entry["batch"]
        fastest = "closure" if entry["teacher"] == entry["closure"] else "factored pass"
        rows.append(
            Ratio(
                f"student-{batch}",
                f"{batch:,} unseen of {largest:,} vertices, nnz(H) {contest.hypergraph.nnz:,}, d 64",
                "student (128 wide)",
                f"HGNN (32 wide), {fastest}",
                torch.__version__,
                *(entry["student"], entry["teacher"], "s", 100.0 if batch in (1, 32) else None),
            )
        )
    rows.append(
        Ratio(
            "student-1-whole", f"1 unseen of {largest:,} vertices, nnz(H) {contest.hypergraph.nnz:,}, d 64",
            "student (128 wide)", "HGNN (32 wide), factored pass over all", torch.__version__,
            times[0]["student"], times[0]["whole"], "s", 1000.0,
        )
    )  # fmt: skip
    rows += [
        Ratio(
            f"student-{entry['batch']}-p99", f"{entry['batch']:,} unseen vertices, single calls",
            "student, 99th percentile", "its median", torch.__version__,
            entry["student_p99"], entry["student_p50"], "s", None,
        )
        for entry in times[:2]
    ]  # fmt: skip
    even = latency.break_even(times)
    if even is not None:
        rows.append(
            Ratio(
                "break-even", f"batch at which the ratio reaches 1, of {largest:,} vertices",
                "student faster up to", "one vertex", "", even, 1.0, "vertices", None, higher_is_better=True,
            )
        )  # fmt: skip
    rows += [_flat_row(size, where)]
    sweep = [_sweep_entry(n, where, ROUNDS[size]) for n in SWEEP[size][:-1]]
    sweep.append({"vertices": largest, **times[0], "all": times[-1]})
    return rows, times, sweep


def _flat_row(size: str, where: str) -> Ratio:
    """A sanity row: the student never sees a hyperedge, so that the ratio of its times is 1 within noise."""
    vertices = SWEEP[size][0]
    students = [
        latency.make_contest(SyntheticConfig(num_vertices=vertices, num_edges=edges), where)
        for edges in (vertices // 4, 2 * vertices)
    ]
    few, many = (
        (lambda c=contest: c.student(c.X[:32]))
        for contest in students  # type: ignore[misc]
    )
    timing = compare(many, few, rounds=max(ROUNDS[size], 12), device=where)
    seconds = timing.ours_seconds
    return Ratio(
        "flat-in-hyperedges", f"sanity: student, 32 of {vertices:,} vertices, 8 times the hyperedges",
        "with many", "with few", torch.__version__, seconds, seconds * timing.ratio, "s", 0.9,
    )  # fmt: skip


def _sweep_entry(vertices: int, where: str, rounds: int) -> dict[str, Any]:
    contest = latency.make_contest(SyntheticConfig(num_vertices=vertices, num_edges=vertices // 2), where)
    one = latency.answer_times(contest, 1, rounds=rounds, device=where)
    return {"vertices": vertices, **one, "all": latency.answer_times(contest, vertices, rounds=rounds, device=where)}


def _row(
    id: str, work: str, ours: str, our_call: Any, peer: str, peer_call: Any, version: str, target: float | None,
    where: str, rounds: int,
) -> Ratio:  # fmt: skip
    timing = compare(our_call, peer_call, rounds=rounds, warmup=2, device=where)
    # the ratio is the median over pairs; the peer's seconds are scaled to it, so that row and ratio agree
    seconds = timing.ours_seconds
    identifier = id.replace(" ", "-")
    return Ratio(identifier, work, ours, peer, version, seconds, seconds * timing.ratio, "s", target)


def _check(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"expected the output of {name} within {TOLERANCE}, got a difference of {difference}")


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None
