"""What every network returns for a batch of states."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class PolicyOutput(NamedTuple):
    """`logits`: of forward actions, unmasked; under flow matching they are log edge flows. The others are None
    where the network has no such head: `backward_logits` of P_B, `log_flow` log F(s), `log_inter` the
    forward-looking log R-inter(s)."""

    logits: Float[Tensor, "B actions"]
    backward_logits: Float[Tensor, "B backward"] | None = None
    log_flow: Float[Tensor, " B"] | None = None
    log_inter: Float[Tensor, " B"] | None = None


class Policy(nn.Module):
    """A network over states, and a condition where `condition_dim` is above 0 (preferences, goals)."""

    condition_dim: int = 0

    @abstractmethod
    def forward(
        self, states: Int[Tensor, "B width"], condition: Float[Tensor, "B c"] | None = None
    ) -> PolicyOutput: ...

    def check_condition(self, condition: Tensor | None) -> None:
        """Raise `ValueError` where the condition is not what the network was made for."""
        given = 0 if condition is None else condition.shape[-1]
        if given != self.condition_dim:
            raise ValueError(f"expected a condition of {self.condition_dim} numbers, got {given}")
