"""Arms run one after another on several seeds: what is finished is kept, and times are without compiling."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from isotone.concrete_tickets.arms import Arm, Experiment, Start
from isotone.concrete_tickets.sanity import sanity_check
from isotone.shared import progress
from isotone.shared.claims import ArmLog
from isotone.shared.cli import Run

FILES_OVER = 1_000_000
"""LTR keeps its rounds on the disk where a round computes more than so many examples: in less the files would count."""


class Study:
    """The arms of one experiment. `log` holds the finished ones; `objectives` are those that tickets are evaluated
    with."""

    def __init__(self, experiment: Experiment, log: ArmLog, run: Run, objectives: Sequence[str] = ()) -> None:
        self.experiment, self.log, self.run, self.objectives = experiment, log, run, tuple(objectives)
        self._starts: dict[int, Start] = {}
        self._warm: set[str] = set()
        text = json.dumps(log.config, sort_keys=True)
        self._rounds = run.out / "rounds" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not run.resume:
            # all of them at once: a fresh study that is killed must not go on with the rounds of the one before
            shutil.rmtree(self._rounds, ignore_errors=True)

    def rows(self, arms: Sequence[str], densities: Sequence[float], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Every arm at every density on every seed, as JSON rows: arm, density, seed, and `Outcome.summary`'s.

        "first_seconds" is what running the arm for the first time in this process took, compiling included; it is
        run again for its time.
        """
        plan = [(arm, density, seed) for density in densities for seed in seeds for arm in arms]
        found = []
        with progress.bar("arms", len(plan), self.run.silent) as bar:
            for arm, density, seed in plan:
                bar.advance(0, arm=f"{arm} {density:.3g}", seed=seed)
                result = self.log.arm(f"{arm} at {density!r} seed {seed}", partial(self._timed, arm, density, seed))
                found.append({"arm": arm, "density": density, "seed": seed, **result})
                bar.advance(1)
        return found

    def dense(self, seed: int) -> float:
        """Test accuracy of the dense network, %."""

        def run() -> dict[str, float]:
            _, correct, seconds = self.experiment.finish(self._start(seed), None)
            return {"accuracy": 100 * correct, "seconds": seconds}

        return self.log.arm(f"dense seed {seed}", run)["accuracy"]

    def sanity(self, density: float, seed: int) -> dict[str, float]:
        """Test accuracy of the `cts` arm's ticket and of its changes, %."""

        def run() -> dict[str, float]:
            start = self._start(seed)
            result = self.experiment.search(start, density, Arm("cts"), seed)
            report = sanity_check(
                *(result.ticket, start.rewind),
                lambda params, ticket: self.experiment.finish(start, ticket, weights=params)[1],
                key=jax.random.fold_in(jax.random.key(seed), 4),
                scores=result.logits,
            )
            return {"ticket": 100 * report.accuracy, **{name: 100 * value for name, value in report.changed.items()}}

        return self.log.arm(f"sanity at {density!r} seed {seed}", run)

    def _start(self, seed: int) -> Start:
        if seed not in self._starts:
            self._starts[seed] = self.experiment.start(seed)
        return self._starts[seed]

    def _timed(self, arm: str, density: float, seed: int) -> dict[str, Any]:
        experiment, start = self.experiment, self._start(seed)
        first = None
        if arm not in self._warm:
            begin = time.perf_counter()
            experiment.warm(arm, density, seed, start)
            first = time.perf_counter() - begin
            self._warm.add(arm)
        folder = None
        if Arm.parse(arm).method == "ltr" and experiment.recipe.epochs * len(experiment.data[1]) > FILES_OVER:
            folder = self._rounds / f"{arm.replace(':', '-')}-{density:.6g}-{seed}"
        outcome = experiment.run(arm, density, seed, start, folder)
        values = {}
        if self.objectives:
            weights = start.weights(Arm.parse(arm).at_init)
            values = experiment.objective_values(weights, outcome.ticket, self.objectives)
        count = experiment.count(start.initial, density)
        return {**outcome.summary(), "first_seconds": first, "expected_count": count, "values": values}
