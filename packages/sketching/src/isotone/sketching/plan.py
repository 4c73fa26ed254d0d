"""What all sides of a run over the network share: the plan, and what a round of it is made of.

The server sends the plan to whoever greets it. Seeds are in it, and so everybody makes the same sketches, the same
first weights and the same draw of participants, and nothing but sketches and their means travels (section 2.3).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared.errors import InputError
from isotone.sketching.cohort import Steps, check_carried, make_steps, message_size
from isotone.sketching.compressors import Compressor
from isotone.sketching.federated import round_keys
from isotone.sketching.models import Model, make_model
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.training import RunConfig, make_algorithm, make_compressor, run_keys

LINEAR_ARMS = ("sketch", "plain", "rand-k")


@dataclass(frozen=True)
class Plan:
    """`config` of the run; `shape` and `classes` of everybody's data. `config.data` and the dealing are the clients'
    own affair.

    Raises `InputError` where what travels can not be added by a server that knows nothing of it, where stragglers are
    to be drawn (here they are real) and where clients are to be weighed.
    """

    config: RunConfig
    shape: tuple[int, ...]
    classes: int

    def __post_init__(self) -> None:
        if self.config.arm not in LINEAR_ARMS:
            raise InputError(f"expected an arm of {', '.join(LINEAR_ARMS)} for a server, got {self.config.arm!r}")
        check_carried(self.config)
        if self.classes < 2 or not self.shape or min(self.shape) < 1:
            raise InputError(f"expected 2 classes or more and a shape, got {self.classes} and {self.shape}")
        self.compressor  # noqa: B018 - its own checks

    @cached_property
    def model(self) -> Model:
        return make_model(self.config.model, self.shape, self.classes, self.config.hidden)

    @cached_property
    def outline(self) -> Any:
        """Shapes and types of the weights: all that a server has of them."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    @cached_property
    def compressor(self) -> Compressor:
        return make_compressor(self.config, self.outline)

    @property
    def s(self) -> int:
        """Numbers in a message."""
        return message_size(self.compressor)

    def down(self, t: int, mean: np.ndarray) -> np.ndarray:
        """The mean of round t as it is sent: rounded where what clients send is, alike by whoever rounds it."""
        if not isinstance(self.compressor, RoundedSketch):
            return mean
        key = round_keys(run_keys(self.config.seed)[1], t)[3]
        return np.asarray(self.compressor.down(key, jnp.asarray(mean)))

    def taken(self, t: int) -> list[int]:
        """Who takes part in round t: what `FedAlgorithm.round` draws."""
        clients, m = self.config.clients, self.config.participants or self.config.clients
        return list(range(clients)) if m == clients else _drawn(self.config.seed, clients, m, t)

    @property
    def text(self) -> str:
        """As it travels."""
        config = dataclasses.asdict(self.config)
        return json.dumps({"config": config, "shape": list(self.shape), "classes": self.classes}, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """What `text` was. Raises `InputError` on anything else."""
        try:
            found = json.loads(text)
            shape = tuple(int(n) for n in found["shape"])
            return cls(RunConfig(**found["config"]), shape, int(found["classes"]))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise InputError("expected a plan, got other text") from None


@functools.lru_cache(maxsize=1 << 16)
def _drawn(seed: int, clients: int, m: int, t: int) -> list[int]:
    chosen = round_keys(run_keys(seed)[1], t)[0]
    return sorted(jax.random.choice(chosen, clients, (m,), replace=False).tolist())


@functools.lru_cache(maxsize=8)
def steps_of(plan: Plan, noise_seed: int | None = None) -> Steps:
    """First weights and compiled steps; `noise_seed`: of the private mode's noise. Raises `InputError` on a private
    plan without one."""
    start, rounds = run_keys(plan.config.seed)
    params = plan.model.init(start)
    algorithm = make_algorithm(plan.config, plan.model, params, plan.config.privacy(), noise_seed)
    return make_steps(algorithm, params, rounds)
