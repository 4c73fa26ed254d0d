"""What was seen, and what is trained on again: objects are kept, their trajectories drawn anew from P_B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from isotone.opgfn.pareto import ParetoArchive
from isotone.shared.errors import check_count

MODES = ("off", "uniform", "prioritized", "offline")


@dataclass(frozen=True)
class ReplayConfig:
    """`mode`: "off"; "uniform", the whole batch is drawn again from the buffer once it holds `warmup` objects,
    `pareto_fraction` of it from the archive; "prioritized" (PRT), to each fresh batch come `offline` objects, half
    from the best tenth of what was seen and half from `rest` ("all", or "below" the best tenth); "offline", nothing is
    sampled, batches are drawn from what `GFlowNet.observe` was given.

    `augment`: after each step so many more gradient steps, each on `augment_batch` prioritised objects (-AUG).
    `archive`: capacity of the Pareto archive, or of the top-k list of one objective.
    """

    mode: str = "off"
    capacity: int = 100_000
    warmup: int = 1000
    pareto_fraction: float = 0.0
    offline: int = 64
    rest: str = "all"
    top: float = 0.1
    archive: int = 1000
    augment: int = 0
    augment_batch: int = 20

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected replay mode to be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.rest not in ("all", "below"):
            raise ValueError(f"expected rest to be all or below, got {self.rest!r}")
        counts = (("capacity", 1), ("warmup", 1), ("offline", 2), ("archive", 1), ("augment", 0), ("augment_batch", 2))
        for name, least in counts:
            check_count(name, getattr(self, name), least)
        if self.mode == "uniform" and self.warmup > self.capacity:
            raise ValueError(f"expected warmup of at most the capacity of {self.capacity}, got {self.warmup}")
        for name in ("pareto_fraction", "top"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")


class ReplayBuffer:
    """The last `capacity` distinct terminal objects with their objectives, and the archive of the best.

    Draws depend on the objectives' order alone: what is trained on is the same for u and for any increasing map.
    """

    def __init__(self, config: ReplayConfig, width: int) -> None:
        self.config, self.width = config, width
        self.states = np.zeros((0, width), np.int64)
        self.u: np.ndarray | None = None
        self.valid = np.zeros(0, bool)
        self.pushed = 0
        self.archive = ParetoArchive(config.archive)
        self._place: dict[bytes, int] = {}
        self._size = 0
        self._top: np.ndarray | None = None

    def __len__(self) -> int:
        return self._size

    def push(self, states: Int[Tensor, "B width"], u: Tensor | None, valid: Tensor | None = None) -> None:
        """Take in objects; those that are there already are not counted again. Past the capacity, oldest out."""
        rows = np.ascontiguousarray(states.cpu().numpy())
        values = np.zeros((len(rows), 1)) if u is None else u.cpu().numpy()
        good = np.ones(len(rows), bool) if valid is None else valid.cpu().numpy()
        if self.u is None:
            self.u = np.zeros((0, values.shape[1]))
        if self.u.shape[1] != values.shape[1]:
            # the number of objectives is not known before the first valid object
            if self.valid[: self._size].any() and good.any():
                raise ValueError(f"expected {self.u.shape[1]} objectives as held, got {values.shape[1]}")
            width = max(self.u.shape[1], values.shape[1])
            self.u, values = (part if part.shape[1] == width else np.zeros((len(part), width)) for part in
                              (self.u, values))  # fmt: skip
        new = []
        for i, row in enumerate(rows):
            key = row.tobytes()
            if key in self._place:
                continue
            slot = self.pushed % self.config.capacity
            if slot < self._size:
                del self._place[self.states[slot].tobytes()]
            else:
                self._grow(slot + 1)
            self.states[slot], self.u[slot], self.valid[slot] = row, values[i], good[i]
            self._place[key] = slot
            self._size = max(self._size, slot + 1)
            self.pushed += 1
            new.append(i)
        if new:
            self._top = None
            if u is not None and good[new].any():
                kept = [i for i in new if good[i]]
                self.archive.add(values[kept], rows[kept])

    def _grow(self, size: int) -> None:
        if size <= len(self.states):
            return
        assert self.u is not None
        room = min(self.config.capacity, max(1024, 2 * len(self.states), size))
        self.states = np.concatenate([self.states, np.zeros((room - len(self.states), self.width), np.int64)])
        self.u = np.concatenate([self.u, np.zeros((room - len(self.u), self.u.shape[1]))])
        self.valid = np.concatenate([self.valid, np.zeros(room - len(self.valid), bool)])

    # --- draws ---------------------------------------------------------------------------------------------

    def uniform(self, n: int, generator: torch.Generator) -> Int[Tensor, "n width"]:
        """n objects with replacement, `pareto_fraction` of them from the archive."""
        best = self._archive_states()
        m = min(n, round(self.config.pareto_fraction * n)) if len(best) else 0
        drawn = [self._pick(self.states[: self._size], n - m, generator), self._pick(best, m, generator)]
        return torch.from_numpy(np.concatenate(drawn))

    def prioritized(self, n: int, generator: torch.Generator) -> Int[Tensor, "n width"]:
        """n objects, half of them from the best tenth."""
        top = self.top()
        rest = np.arange(self._size)
        if self.config.rest == "below" and len(top) < self._size:
            rest = np.setdiff1d(rest, top)
        half = n // 2
        drawn = [self._pick(self.states[top], half, generator), self._pick(self.states[rest], n - half, generator)]
        return torch.from_numpy(np.concatenate(drawn))

    def top(self) -> np.ndarray:
        """Places of the best tenth: by value with one objective, ties at the edge included, else the archive."""
        if self._top is None:
            assert self.u is not None
            if self.u.shape[1] > 1:
                places = [self._place.get(row.tobytes(), -1) for row in self._archive_states()]
                self._top = np.array([place for place in places if place >= 0], dtype=np.int64)
                if not len(self._top):
                    self._top = np.arange(self._size)
            else:
                values = np.where(self.valid[: self._size], self.u[: self._size, 0], -np.inf)
                count = max(1, int(self.config.top * self._size))
                edge = np.partition(values, self._size - count)[self._size - count]
                self._top = np.flatnonzero(values >= edge)
        return self._top

    def reference(self) -> np.ndarray | None:
        """Objectives of the archive: what labels against a buffer are taken from."""
        return self.archive.u

    def _archive_states(self) -> np.ndarray:
        payload = self.archive.payload
        return self.states[:0] if payload is None else payload

    @staticmethod
    def _pick(rows: np.ndarray, n: int, generator: torch.Generator) -> np.ndarray:
        if n == 0:
            return rows[:0]
        places = torch.randint(len(rows), (n,), generator=generator, device=generator.device)
        return rows[places.cpu().numpy()]

    # --- checkpoint ----------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and JSON state for a checkpoint."""
        n = self._size
        u = np.zeros((n, 1)) if self.u is None else self.u[:n]
        arrays: dict[str, Any] = {"states": self.states[:n], "u": u, "valid": self.valid[:n]}
        if self.archive.u is not None:
            arrays |= {"archive_u": self.archive.u, "archive_states": self.archive.payload}
        return arrays, {"pushed": self.pushed, "empty": self.u is None}

    def restore(self, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        parts = {name: np.ascontiguousarray(np.asarray(array)) for name, array in arrays.items()}
        self.states, self.u, self.valid = parts["states"], None if state["empty"] else parts["u"], parts["valid"]
        self._size, self.pushed, self._top = len(self.states), state["pushed"], None
        self._place = {row.tobytes(): i for i, row in enumerate(self.states)}
        self.archive = ParetoArchive(self.config.archive)
        if "archive_u" in parts:
            self.archive.u, self.archive.payload = parts["archive_u"], parts["archive_states"]
