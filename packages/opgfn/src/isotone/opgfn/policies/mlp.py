"""Multilayer perceptrons on one-hot states; the first layer is a sum of rows, never a product with zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.opgfn.envs.base import Environment
from isotone.opgfn.policies.base import Policy, PolicyOutput


class MLPPolicy(Policy):
    """One-hot -> hidden layers with LeakyReLU -> heads, all on one torso (section 2.7).

    `backward`: a learned P_B. `flow`: log F(s). `inter`: the forward-looking head. `logit_clip`: logits into
    [-clip, clip], None for none. The weight of the last layer is scaled by `head_scale`: 1 is PyTorch's own.
    """

    def __init__(
        self,
        env: Environment,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        backward: bool = False,
        flow: bool = False,
        inter: bool = False,
        condition_dim: int = 0,
        logit_clip: float | None = None,
        head_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"expected widths of at least 1, got {tuple(hidden)}")
        self.env, self.condition_dim, self.logit_clip = env, condition_dim, logit_clip
        self.sizes = (
            *(env.num_actions, env.num_backward_actions if backward else 0),
            *(int(flow), int(inter)),
        )
        self._make_first(hidden[0])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(hidden, hidden[1:], strict=False))
        self.heads = nn.Linear(hidden[-1], sum(self.sizes))
        with torch.no_grad():
            self.heads.weight *= head_scale

    def _make_first(self, width: int) -> None:
        """A linear layer's weight, as PyTorch draws it, with a token's row in one piece."""
        linear = nn.Linear(self.env.num_tokens + self.condition_dim, width)
        self.table, self.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias

    def forward(self, states: Int[Tensor, "B width"], condition: Float[Tensor, "B c"] | None = None) -> PolicyOutput:
        self.check_condition(condition)
        tokens = self.env.num_tokens
        hidden = F.embedding_bag(self.env.tokens(states), self.table[:tokens], mode="sum") + self.bias
        if condition is not None:
            hidden = hidden + condition.to(hidden.dtype) @ self.table[tokens:]
        return self._output(hidden)

    def _output(self, first: Tensor) -> PolicyOutput:
        """The rest of the network, from what its first layer gives."""
        hidden = F.leaky_relu(first)
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden))
        logits, backward, flow, inter = self.heads(hidden).split(self.sizes, 1)
        if self.logit_clip is not None:
            logits = logits.clamp(-self.logit_clip, self.logit_clip)
            backward = backward.clamp(-self.logit_clip, self.logit_clip)
        return PolicyOutput(
            logits,
            backward if self.sizes[1] else None,
            flow.squeeze(1) if self.sizes[2] else None,
            inter.squeeze(1) if self.sizes[3] else None,
        )


class SetPolicy(MLPPolicy):
    """For multisets: each letter's count and whether it is there, as numbers, not one-hot columns."""

    def __init__(self, env: Environment, hidden: Sequence[int] = (64, 64), **options: object) -> None:
        super().__init__(env, hidden, **options)  # type: ignore[arg-type]

    def _make_first(self, width: int) -> None:
        self.first = nn.Linear(2 * self.env.width + self.condition_dim, width)

    def forward(self, states: Int[Tensor, "B width"], condition: Float[Tensor, "B c"] | None = None) -> PolicyOutput:
        self.check_condition(condition)
        largest = torch.tensor(self.env.cardinalities, device=states.device) - 1
        parts = [states / largest, (states > 0).to(self.first.weight.dtype)]
        if condition is not None:
            parts.append(condition)
        return self._output(self.first(torch.cat([part.to(self.first.weight.dtype) for part in parts], 1)))
