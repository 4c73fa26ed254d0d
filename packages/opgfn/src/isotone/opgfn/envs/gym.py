"""Any of our environments as a `gymnasium.Env`: one trajectory an episode, the objective as the last reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from isotone.opgfn.envs.base import Environment


class GymEnv(gymnasium.Env):
    """Observations are rows of integers, `info["action_mask"]` (int8) the legal actions; stop ends the episode.

    `objective`: terminal objects to one value each, the environment's own where none is given; several objectives
    come as `info["objectives"]`, and their mean as the reward. An illegal action raises `ValueError`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, env: Environment, objective: Callable[[Any], Any] | None = None) -> None:
        function = objective or getattr(env, "objective", None)
        if function is None:
            raise ValueError("expected an objective: this environment has none of its own")
        self.env, self.objective = env, function
        self.observation_space = spaces.MultiDiscrete(np.array(env.cardinalities))
        self.action_space = spaces.Discrete(env.num_actions)
        self._state = env.reset(1)
        self._over = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The source state."""
        super().reset(seed=seed)
        self._state, self._over = self.env.reset(1), False
        return self._state[0].numpy(), {"action_mask": self._mask()}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Observation, reward, terminated, truncated, info."""
        if self._over:
            raise ValueError("expected reset before another step: this episode has stopped")
        chosen = torch.tensor([int(action)])
        if not 0 <= int(action) < self.env.num_actions:
            raise ValueError(f"expected an action below {self.env.num_actions}, got {action}")
        self.env.check_actions(self._state, chosen)
        done = bool(self.env.is_done(chosen))
        self._over = done
        self._state, _ = self.env.step(self._state, chosen)
        reward, info = 0.0, {"action_mask": self._mask()}
        if done and bool(self.env.valid(self._state)):
            values = np.asarray(self.objective(self.env.objects(self._state)), dtype=np.float64).reshape(-1)
            reward, info["objectives"] = float(values.mean()), values
        return self._state[0].numpy(), reward, done, False, info

    def _mask(self) -> np.ndarray:
        return self.env.forward_mask(self._state)[0].numpy().astype(np.int8)
