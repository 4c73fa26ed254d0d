"""Processes that share the work of an objective: text goes to them, numbers come back, no molecule crosses over."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

_CHUNKS_PER_WORKER = 4


class WorkerPool:
    """`function(settings, items)`, a list of rows for a list of items, spread over `workers` spawned processes."""

    def __init__(self, workers: int, function: Callable[[Any, Sequence[str]], list], settings: Any) -> None:
        if workers < 1:
            raise ValueError(f"expected at least 1 worker, got {workers}")
        self.workers, self.function, self.settings = workers, function, settings
        # not forked: torch's and RDKit's threads do not survive it
        self._pool: Any = multiprocessing.get_context("spawn").Pool(workers)

    def __call__(self, items: Sequence[str]) -> list:
        """The rows in the items' order; an error of a worker is raised here."""
        if self._pool is None:
            raise ValueError("expected an open pool, got a closed one")
        size = max(1, -(-len(items) // (self.workers * _CHUNKS_PER_WORKER)))
        chunks = [(self.settings, list(items[i : i + size])) for i in range(0, len(items), size)]
        return [row for rows in self._pool.starmap(self.function, chunks) for row in rows]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None
