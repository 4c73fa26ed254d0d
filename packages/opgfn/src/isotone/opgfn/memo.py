"""The objective, asked once for each distinct object: its evaluation is what a budget counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.checks import check_objectives
from isotone.opgfn.envs.base import Environment


class Memo:
    """Objective values of terminal states by `env.identities`; `evaluations` distinct objects so far, of `lookups`
    asked for.

    `objective` takes what `env.objects` makes of the new states and returns (n, d) or (n,) finite numbers.
    """

    def __init__(self, env: Environment, objective: Callable[[Any], Any], objectives: int | None = None) -> None:
        self.env, self.objective, self.objectives = env, objective, objectives
        self.evaluations = self.lookups = 0
        self._row: dict[bytes, int] = {}
        self._states: list[np.ndarray] = []
        self._u: list[np.ndarray] = []
        self._valid: list[np.ndarray] = []
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, states: Int[Tensor, "B width"]) -> tuple[Float[Tensor, "B d"], Bool[Tensor, " B"]]:
        """Objectives in float64 (zeros where invalid), and which objects are valid, on the states' device.

        Raises `ValueError` where the objective returns NaN, infinity or another shape.
        """
        rows = np.ascontiguousarray(states.cpu().numpy())
        keys = self.env.identities(states)
        self.lookups += len(keys)
        fresh: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._row and key not in fresh:
                fresh[key] = i
        if fresh:
            self._ask(rows[list(fresh.values())], list(fresh))
        u, valid = self._arrays()
        index = [self._row[key] for key in keys]
        return torch.from_numpy(u[index]).to(states.device), torch.from_numpy(valid[index]).to(states.device)

    def tell(self, states: Int[Tensor, "n width"], values: Any) -> None:
        """Keep measured `values` (n, d) or (n,) of `states`; those that are known already stay as they are.

        Raises `ValueError` on NaN, infinity or another shape.
        """
        answer = self._checked(values, len(states))
        valid = self.env.valid(states).cpu().numpy()
        fresh = {key: i for i, key in reversed(list(enumerate(self.env.identities(states)))) if key not in self._row}
        places = sorted(fresh.values())
        if places:
            rows = np.ascontiguousarray(states.cpu().numpy())[places]
            names = {i: key for key, i in fresh.items()}
            u = np.where(valid[places, None], answer[places], 0.0)
            self._keep(rows, u, valid[places], [names[i] for i in places])

    def _checked(self, given: Any, rows: int) -> np.ndarray:
        try:
            answer = np.asarray(given.cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"expected objectives as numbers, got {type(given).__name__}") from None
        answer = answer[:, None] if answer.ndim == 1 else answer
        check_objectives(answer, rows)
        if self.objectives is not None and answer.shape[1] != self.objectives:
            raise ValueError(f"expected {self.objectives} objectives, got {answer.shape[1]}")
        self.objectives = answer.shape[1]
        return answer

    def _ask(self, rows: np.ndarray, keys: list[bytes]) -> None:
        states = torch.from_numpy(rows)
        valid = self.env.valid(states).numpy()
        good = states[torch.from_numpy(valid)]
        answer = self._checked(self.objective(self.env.objects(good)), len(good)) if len(good) else None
        u = np.zeros((len(rows), self.objectives or 1))
        if answer is not None:
            u[valid] = answer
        self._keep(rows, u, valid, keys)

    def _keep(self, rows: np.ndarray, u: np.ndarray, valid: np.ndarray, keys: list[bytes]) -> None:
        self._row.update((key, self.evaluations + i) for i, key in enumerate(keys))
        self.evaluations += len(keys)
        self._states.append(rows)
        self._u.append(u)
        self._valid.append(valid)
        self._table = None

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if self._table is None:
            width = self.objectives or 1
            # before the first valid object is seen, the number of objectives is not known
            self._u = [np.concatenate([u if u.shape[1] == width else np.zeros((len(u), width)) for u in self._u])]
            self._valid = [np.concatenate(self._valid)]
            self._states = [np.concatenate(self._states)]
            self._table = self._u[0], self._valid[0]
        return self._table

    def has(self, key: bytes) -> bool:
        """Whether the object of this identity (`env.identities`) was evaluated."""
        return key in self._row

    @property
    def reuse(self) -> float:
        """The share of lookups that asked for nothing new."""
        return 1 - self.evaluations / self.lookups if self.lookups else 0.0

    def seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All distinct states (n, width), their objectives (n, d) and validity, in the order they were asked for."""
        if not self.evaluations:
            return np.zeros((0, self.env.width), np.int64), np.zeros((0, self.objectives or 1)), np.zeros(0, bool)
        u, valid = self._arrays()
        return self._states[0], u, valid

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and JSON state for a checkpoint."""
        states, u, valid = self.seen()
        return {"states": states, "u": u, "valid": valid}, {"lookups": self.lookups, "objectives": self.objectives}

    def restore(self, arrays: dict[str, Any], state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.objectives, self.lookups = state["objectives"], state["lookups"]
        self._row, self.evaluations, self._table = {}, 0, None
        self._states, self._u, self._valid = [], [], []
        rows = np.ascontiguousarray(np.asarray(arrays["states"]))
        if len(rows):
            keys = self.env.identities(torch.from_numpy(rows))
            self._keep(rows, np.asarray(arrays["u"]), np.asarray(arrays["valid"]), keys)
