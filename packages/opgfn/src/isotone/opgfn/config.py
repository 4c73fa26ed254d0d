"""What a training run is: validated in one place, written beside every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isotone.opgfn.order import LABELS
from isotone.shared.errors import check_count

FAMILIES = ("tb", "db", "fm", "subtb", "fl-db", "fl-subtb")
KINDS = ("op", "reward", "pc", "gc")
OBJECTIVES = (
    *(f"op-{family}" for family in FAMILIES),
    *("tb", "db", "fm", "subtb", "pc-tb", "pc-db", "pc-subtb", "gc-tb", "gc-db", "gc-subtb", "reinforce"),
)


def parse_objective(name: str) -> tuple[str, str]:
    """ "op-tb" to ("op", "tb"), "tb" to ("reward", "tb"), "reinforce" to itself twice. Raises `ValueError`."""
    if name not in OBJECTIVES:
        raise ValueError(f"expected an objective of {', '.join(OBJECTIVES)}, got {name!r}")
    if name == "reinforce":
        return name, name
    kind, _, family = name.partition("-")
    return (kind, family) if kind in KINDS else ("reward", name)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `label`: how an order becomes a target (`order.LABELS`); None is "pairwise" for one objective, "pareto" for more.
    `epsilon`: the share of uniform exploration. `lambda_op`: None is 1 for op-tb and 0.1 for the other families.
    `lambda_kl`: weight of the backward KL regulariser, which needs a learned P_B. `lam`: SubTB's lambda.
    `ema`: tau of the sampling weights, 0 to sample with those that are trained. `lr_half_life`: steps in which the
    rates halve, None for constant ones. `updates`: gradient steps on each batch.

    For the baselines: R = mean(u)^beta (`beta`; PC-GFN (w . u)^beta), values below `floor` raised to it; an invalid
    object has `invalid_log_reward`. `idempotent`: actions to isomorphic children count as one, and so do backward
    actions to isomorphic parents. `entropy`: REINFORCE's bonus. `log_z`: where log Z starts.
    """

    objective: str = "op-tb"
    label: str | None = None
    batch_size: int = 128
    lr: float = 1e-3
    lr_log_z: float = 1e-1
    weight_decay: float = 0.0
    lr_half_life: int | None = None
    epsilon: float = 0.01
    ema: float = 0.0
    clip_norm: float | None = 10.0
    updates: int = 1
    lambda_op: float | None = None
    lambda_kl: float = 0.0
    lam: float = 0.9
    beta: float = 1.0
    beta_low: float | None = None
    floor: float = 1e-8
    invalid_log_reward: float = -75.0
    entropy: float = 0.01
    log_z: float = 0.0
    idempotent: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        parse_objective(self.objective)
        if self.label is not None and self.label not in LABELS:
            raise ValueError(f"expected a label of {', '.join(LABELS)}, got {self.label!r}")
        if self.label == "buffer" and self.family.startswith("fl-"):
            raise ValueError(
                f"expected another label than buffer for {self.objective}: differences of objectives have no archive"
            )
        counts = (("batch_size", 2), ("updates", 1), ("seed", 0), ("lr_half_life", 1))
        for name, least in counts:
            if getattr(self, name) is not None or name != "lr_half_life":
                check_count(name, getattr(self, name), least)
        if self.idempotent and self.family == "fm":
            raise ValueError(f"expected idempotent=False for {self.objective}, whose flows are of edges")
        for name in ("log_z", "invalid_log_reward"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"expected a finite {name}, got {getattr(self, name)}")
        if self.beta_low is not None and not 0 < self.beta_low <= self.beta:
            raise ValueError(f"expected beta_low above 0 and at most beta, {self.beta}, got {self.beta_low}")
        for name in ("lr", "lr_log_z", "beta", "floor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"expected a finite {name} above 0, got {value}")
        for name in ("lambda_op", "lambda_kl", "weight_decay", "entropy"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"expected a finite {name} of at least 0, got {value}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"expected epsilon in [0, 1], got {self.epsilon}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected ema in [0, 1), got {self.ema}")
        if not 0 < self.lam <= 1:
            raise ValueError(f"expected lam in (0, 1], got {self.lam}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"expected clip_norm above 0, got {self.clip_norm}")

    @property
    def kind(self) -> str:
        """ "op", "reward", "pc", "gc" or "reinforce"."""
        return parse_objective(self.objective)[0]

    @property
    def family(self) -> str:
        """The balance condition."""
        return parse_objective(self.objective)[1]

    @property
    def needs_flow(self) -> bool:
        """Whether the policy needs state flows."""
        return self.family in ("db", "subtb", "fl-db", "fl-subtb")

    @property
    def order_weight(self) -> float:
        """lambda_OP."""
        if self.lambda_op is not None:
            return self.lambda_op
        return 1.0 if self.family == "tb" else 0.1
