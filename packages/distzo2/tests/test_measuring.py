"""What the reproduction and the bench measure: on which device, with how many threads, and what their rows say."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch

from isotone.distzo2 import MeZO, ZOConfig, ZOEngine, bench, equivalence, offloading, reproduce, tasks, timing
from isotone.distzo2.findings import CLAIMS
from isotone.distzo2.objective import model_loss
from isotone.distzo2.reproduce import Rounds
from isotone.distzo2.scales import SCALES
from isotone.distzo2.tasks import KeywordTask
from isotone.shared.bench import Timing
from isotone.shared.claims import Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

TASK = KeywordTask(hidden=16, rows=8, held_out=64)
SHAPES_CLAIMS = {f"gpu-{name}" for name in ("speed", "naive", "buckets", "overlap", "deferred", "line")}
BATCHES = {"long": (2, 16), "short": (1, 16), "bound": (1, 4)}


@pytest.fixture
def with_a_gpu(monkeypatch):
    """A machine that says it has a GPU: whoever takes it without being told so ends with an error of CUDA's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())  # asks for the present device


@pytest.fixture
def small(monkeypatch):
    """The arms of a GPU's shapes, on batches for a CPU."""
    own = functools.partial(offloading.offloaded, **BATCHES)
    monkeypatch.setattr(offloading, "offloaded", own)
    there = {name: batch for name, batch in BATCHES.items() if name != "bound"}
    monkeypatch.setattr(offloading, "resident", functools.partial(offloading.resident, **there))
    monkeypatch.setattr(offloading, "left_out", functools.partial(offloading.left_out, short=there["short"]))
    for name in ("offloaded", "resident", "left_out"):
        fewer = getattr(offloading, name)
        monkeypatch.setattr(
            offloading, name, lambda *given, arm=fewer, **options: arm(*given, **{**options, "rounds": 2})
        )


def test_every_engine_that_is_measured_is_told_its_device():
    """In spawned ranks too, where no patch of this process reaches."""
    folder, found = Path(timing.__file__).parent, 0
    for name in ("bench", "equivalence", "offloading", "reproduce", "tasks", "timing"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ZOEngine":
                found += 1
                assert "device" in {keyword.arg for keyword in node.keywords}, f"{name}.py, line {node.lineno}"
    assert found >= 12


def test_a_gpu_is_left_alone_by_what_is_measured_on_the_cpu(with_a_gpu):
    model = timing.TimedLayers(2, 4, 0.0, 1).eval()
    with pytest.raises((RuntimeError, AssertionError)):
        ZOEngine(model, ZOConfig(offload="cpu"), objective=timing.mean_square)
    found = equivalence.single(TASK, 1e-3, 2, 0, "cpu")
    assert found["differing"] == found["weights"] == found["replayed"] == 0
    assert timing.sweep((1.0,), 2, 0.005, 1)["points"][0]["measured"] > 0
    assert offloading.beside_resident("tiny", 1, 8, "cpu", rounds=1).keys() == {"resident", "offloaded"}


def test_scales_run_where_they_say(monkeypatch, tmp_path):
    """A GPU is taken by the scales that are made for one, and by those that are told to."""
    seen = []
    report = Report("distzo2", "reproduce", "smoke", (0,), "torch")
    monkeypatch.setattr(reproduce, "measure", lambda setting, scale, run, where, given: seen.append(where) or report)
    monkeypatch.setattr(reproduce.device, "resolve", lambda name: "cuda" if name == "auto" else name)
    for scale, device in (("smoke", "auto"), ("cpu", "auto"), ("gpu", "auto"), ("smoke", "cuda"), ("cpu", "cpu")):
        reproduce.reproduce(scale, Run(tmp_path, device=device))
    assert seen == ["cpu", "cpu", "cuda", "cuda", "cpu"]
    with pytest.raises(InputError, match="GPU"):
        reproduce.reproduce("gpu", Run(tmp_path, device="cpu"))


def test_a_gpus_arms_keep_the_threads_of_the_host(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(reproduce, "_one_device", lambda *_: {"gpu": seen.setdefault("gpu", torch.get_num_threads())})
    monkeypatch.setattr(reproduce, "_offloading", lambda *_: {})
    monkeypatch.setattr(reproduce, "_rates", lambda *_: {"zo": seen.setdefault("cpu", torch.get_num_threads())})
    for name in ("_equivalences", "_learning", "_timing"):
        monkeypatch.setattr(reproduce, name, lambda *_: {})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reproduce.measure(SCALES["gpu"], "gpu", Run(tmp_path, quiet=True), "cuda")
        reproduce.measure(SCALES["smoke"], "smoke", Run(tmp_path, quiet=True), "cpu")
        assert seen == {"gpu": 3, "cpu": 1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_accuracy_row_is_of_whole_runs_beside_both_baselines():
    setting = dataclasses.replace(SCALES["smoke"], ranks=True, steps=17)
    asked = {}

    def arm(name, config, function):
        asked[name] = function
        return {"2d run": {"ranks": [{"accuracy": 98.0}]}, "reference run": {"accuracy": 99.5}}[name]

    found = reproduce._trained_alike(setting, arm, 4, 1e-3, 99.0, "cpu")
    assert found == {
        "accuracy": [1.5],
        "accuracy-2d": [98.0],
        "accuracy-memory": [99.0],
        "accuracy-reference": [99.5],
    }
    function, world, arguments = asked["2d run"].args
    assert (function, world, arguments["steps"], arguments["seed"]) == (equivalence.run_2d, 4, 17, 4)
    assert asked["reference run"].args[2:4] == (17, 4)
    assert set(found) <= set(CLAIMS)
    assert reproduce._trained_alike(SCALES["smoke"], arm, 4, 1e-3, 99.0, "cpu") == {}


def test_the_reference_takes_the_references_steps():
    """MeZO's own optimizer with torch's generator takes the same first step, to rounding."""
    found = tasks.reference(TASK, 1e-3, 2, 5, "cpu")
    model = tasks.keyword_model(TASK, 5)
    optimizer = MeZO(model.parameters(), lr=1e-3, rng="torch", seed=5)
    losses = [
        float(optimizer.step(lambda s=step: model_loss(model, tasks.batch_of(TASK, 5, s))[0])) for step in range(2)
    ]
    assert found["losses"] == pytest.approx(losses, rel=1e-5) and found["losses"][0] != found["losses"][1]


def test_rounds_give_their_median_and_its_interval():
    found = reproduce._measurement("pertp", Rounds([1.9, 1.5, 1.6, 1.7, 1.8, 9.0]))
    # of six values the interval is all of them
    assert found.measured == pytest.approx(1.75) and found.spread == pytest.approx((9.0 - 1.5) / 2)
    few = reproduce._measurement("pertp", Rounds([1.9, 1.5]))
    assert few.measured == pytest.approx(1.7) and few.spread is None


def test_rows_print_the_seconds_that_were_measured():
    """A median of ratios is not the ratio of medians: the row has the seconds, and the pairs beside them."""
    timed = Timing(2.0, 1.5, 2.5, ours_seconds=1.0, peer_seconds=3.0, rounds=6)
    seconds, tokens = bench._step_rows("x", "a step", "ours", ("peer", "1"), timed, 60, 1.5)
    assert (seconds.ours_value, seconds.peer_value, seconds.ratio, seconds.held) == (1.0, 3.0, 3.0, True)
    assert "2.00 x, 95 % in 1.50 to 2.50" in seconds.work
    assert (tokens.ours_value, tokens.peer_value, tokens.ratio) == (60.0, 20.0, 3.0)


def test_lanes_of_a_step():
    """Two blocks: upload 2 s each, compute 3 s each, in a step of 9 s."""
    spans = [["upload", 0, 0, 2], ["compute", 0, 2, 5], ["upload", 1, 2, 4], ["compute", 1, 5, 8]]
    lanes = timing.busy(spans)
    assert lanes == {"upload": 4, "compute": 6}
    rows = {row.id: row for row in bench.lane_rows("x", "work", lanes, 9.0)}
    assert rows["lane-upload-x"].ours_value == 4 and rows["lane-upload-x"].peer_value == 9
    assert rows["lanes-bound-x"].ratio == pytest.approx(6 / 9)
    assert rows["lanes-in-turn-x"].ratio == pytest.approx(10 / 9)


def test_parts_are_left_out_one_by_one(monkeypatch):
    """Of two steps of four blocks: what was uploaded in fp32 blocks, and whether lanes may work at once."""
    seen, whole = {}, timing.step_seconds

    def counted(engine, batch, rounds, immediate):
        whole(engine, batch, rounds, immediate)
        seen[len(seen)] = (engine.link.bytes["upload"] / (4 * 32 * 33), engine.link.overlap)
        return float(len(seen))

    monkeypatch.setattr(timing, "step_seconds", counted)
    names = list(timing.ablations(4, 32, 0.001, 0.0001, 1))
    found = {name: seen[number] for number, name in enumerate(names)}
    assert found == {
        "ours": (8, True),
        "immediate": (16, True),
        "in turn": (8, False),
        "naive": (16, False),
        "half": (4, True),
    }


def test_slices_shorten_the_step_by_the_model():
    """By hand: 12 blocks of 0.1 s to bring, 0.1 s back, 0.02 s of compute; a quarter each, and 3/4 of a block between
    ranks at six times the rate."""
    given = dataclasses.asdict(SCALES["cpu"].sliced)
    assert timing.sliced_seconds(1, given) == pytest.approx(12 * 0.1 + 0.1 + 0.02)
    assert timing.sliced_seconds(4, given) == pytest.approx(12 * 0.025 + 0.025 + 0.0125 + 0.005)


def test_the_arms_of_a_gpus_shapes(small):
    """At a tiny size on the CPU: every claim has a figure, and what is left out changes no step."""
    setting, figures = dataclasses.replace(SCALES["gpu"], shapes=("tiny",)), {}
    found = reproduce._offloading(setting, lambda name, config, function: function(), "cpu", figures)
    assert set(found) == SHAPES_CLAIMS <= set(CLAIMS)
    assert all(math.isfinite(value) and value > 0 for (value,) in found.values())
    assert list(figures) == ["timeline-tiny"]
    without = [{}, *offloading.LEFT_OUT.values()]
    engines = [offloading.engine_of("tiny", 16, "cpu", offload="cpu", **options) for options in without]
    ids = torch.arange(16).view(1, 16)
    grads = [[e.step({"input_ids": ids, "labels": ids}).projected_grad for _ in range(3)] for e in engines]
    assert grads[0] == grads[1] == grads[2] and grads[0][0] != grads[0][1]


def test_the_bench_of_a_gpus_shapes(small, monkeypatch):
    theirs = {"seconds": 2.0, "fastest": 1.5, "slowest": 2.5, "version": "0.1"}
    monkeypatch.setattr(bench, "zo2_step", lambda python, shape, rows, length: theirs)
    rows = {row.id: row for row in bench._offloaded("tiny", "cpu", Path("python"))}
    assert {f"{name}-tiny" for name in ("resident", "serial", "immediate", "tokens", "line-rate")} <= set(rows)
    assert rows["zo2-tiny"].peer_value == 2.0 and rows["zo2-tiny"].target == 1.3
    assert "1.5 to 2.5 s" in rows["zo2-tiny"].work
    assert rows["line-rate-tiny"].target == 0.9 and rows["resident-tiny"].target == 0.95


def test_a_link_that_holds_up_the_step_is_used():
    (row,) = bench._link_bound(bench.SIZES["tiny"])
    # three blocks: the last one's way back is the fill
    assert 0.3 < row.ratio < 0.8


def test_peaks_are_labelled_by_where_blocks_rest(monkeypatch):
    found = {"zo": {"loss": 1.0, "peak": 1.0}, "fsdp2": {"loss": 1.0, "peak": 4.0}, "lora": {"loss": 1.0, "peak": 2.0}}
    monkeypatch.setattr(bench, "run_ranks", lambda function, world, arguments: [found[arguments["arm"]]])
    for where, words in (("cpu", ("in memory", "process")), ("cuda", ("offloaded", "device"))):
        row = bench._memory(bench.SIZES["tiny"], where)[0]
        assert words[0] in row.ours and words[1] in row.work and row.ratio == 4
