"""What an answer costs: the student beside the fastest way a teacher has to answer for vertices not seen before.

A teacher can run the whole factored pass, or build the exact closure of the asked vertices from CSR arrays and run
its layers on that. The denominator of a speed-up is the faster of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isotone.lighthgnn.blocks import Incidences
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.student import CompiledStudent, LightMLP
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.lighthgnn.teachers import Teacher, make_teacher
from isotone.lighthgnn.training import seeded
from isotone.shared.bench import compare


@dataclass
class Contest:
    """A teacher and a student on one hypergraph, weights random: only time is asked."""

    X: Tensor
    hypergraph: Hypergraph
    teacher: Teacher
    student: CompiledStudent
    incidences: Incidences

    @torch.inference_mode()
    def whole_pass(self) -> Tensor:
        """Every vertex's logits by the factored teacher."""
        return self.teacher(self.X, self.hypergraph)

    @torch.inference_mode()
    def closure(self, asked: Tensor) -> Tensor:
        """The asked vertices' logits by the teacher on their exact closure."""
        blocks, needed = self.incidences.blocks(asked, len(self.teacher.layers))
        device = self.X.device
        return self.teacher(self.X[needed.to(device)], [block.to(device) for block in blocks])


def make_contest(config: SyntheticConfig, device: str = "cpu", teacher: str = "hgnn", seed: int = 0) -> Contest:
    """Random weights at the paper's widths (teacher 32, student 128) on a synthetic hypergraph."""
    made = make_synthetic(config, seed)
    with seeded(seed):
        model = make_teacher(teacher, config.dim, config.num_classes).eval().to(device)
        student = LightMLP(config.dim, 128, config.num_classes).eval().to(device)
    hypergraph = made.hypergraph.to(device)
    return Contest(made.X.to(device), hypergraph, model, CompiledStudent(student), Incidences.of(made.hypergraph))


def answer_times(
    contest: Contest, batch: int, *, rounds: int = 12, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Seconds for `batch` unseen vertices: student, whole pass, closure (None where it is all vertices).

    Each call asks for other vertices, so that no cache of a former answer helps. The student is handed the asked rows;
    a teacher's closure fetches the rows of its neighbourhood itself. Student and teacher take turns: `ratio` is the
    median of their pairs for the faster of the teacher's ways, `spread` half its 95 % interval.
    """
    source = np.random.default_rng(seed)
    num_vertices = contest.hypergraph.num_vertices
    asked = [torch.from_numpy(source.choice(num_vertices, batch, replace=False)) for _ in range(16)]
    rows = [contest.X[ids.to(contest.X.device)] for ids in asked]
    turn = {"student": 0, "closure": 0}

    def ask_student() -> Tensor:
        turn["student"] += 1
        return contest.student(rows[turn["student"] % len(rows)])

    def ask_closure() -> Tensor:
        turn["closure"] += 1
        return contest.closure(asked[turn["closure"] % len(asked)])

    options: dict[str, Any] = {"rounds": rounds, "warmup": 2, "device": device}
    ways = {"whole": compare(ask_student, contest.whole_pass, **options)}
    if batch < num_vertices:
        ways["closure"] = compare(ask_student, ask_closure, **options)
    faster = min(ways.values(), key=lambda way: way.ratio)
    student = faster.ours_seconds
    times: dict[str, Any] = {"batch": batch, "student": student, "ratio": faster.ratio, "closure": None}
    times |= {name: student * way.ratio for name, way in ways.items()}
    times |= {"teacher": student * faster.ratio, "spread": (faster.high - faster.low) / 2}
    calls = 300 if batch <= 1024 or device == "cuda" else 20
    times["student_p50"], times["student_p99"] = percentiles(ask_student, calls, device)
    return times


def percentiles(function: Callable[[], Any], calls: int = 300, device: str = "cpu") -> tuple[float, float]:
    """Seconds of single calls, waited for one by one: their median and 99th percentile."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if device == "cuda":  # pragma: no cover - needs a GPU
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.percentile(seconds, (50, 99))
    return float(p50), float(p99)


def break_even(times: list[dict[str, Any]]) -> float | None:
    """The batch at which the ratio reaches 1, interpolated between logarithms; None where it stays above."""
    ordered = sorted(times, key=lambda t: t["batch"])
    for left, right in zip(ordered, ordered[1:], strict=False):
        if left["ratio"] >= 1 > right["ratio"]:
            a, b = np.log([left["ratio"], right["ratio"]])
            x, y = np.log([left["batch"], right["batch"]])
            return float(np.exp(x + (y - x) * a / (a - b)))
    return None
