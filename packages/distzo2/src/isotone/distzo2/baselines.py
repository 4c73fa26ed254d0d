"""What the engine is measured beside: MeZO in the reference's order of passes, written from its description (2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


class ReferenceMeZO:
    """The in-place order of the reference: + eps z, forward, - 2 eps z, forward, + eps z, then the update; four draws.

    `named`: names and parameters, in the order that z is drawn in. Decay spares names with "bias", "layer_norm" or
    "layernorm", as the reference does.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, eps: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        self.named = [(name, p) for name, p in named if p.requires_grad]
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay
        self.grads: list[float] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float], seed: int) -> float:
        """One step with the seed s_t; returns l+."""
        self._perturb(seed, 1.0)
        plus = float(closure())
        self._perturb(seed, -2.0)
        minus = float(closure())
        self._perturb(seed, 1.0)
        grad = (plus - minus) / (2 * self.eps)
        self.grads.append(grad)
        torch.manual_seed(seed)
        for name, parameter in self.named:
            z = self._draw(parameter)
            spared = any(word in name for word in ("bias", "layer_norm", "layernorm"))
            decay = 0.0 if spared else self.weight_decay
            parameter.data = parameter.data - self.lr * (grad * z + decay * parameter.data)
        return plus

    def _perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for _, parameter in self.named:
            parameter.data = parameter.data + scale * self._draw(parameter) * self.eps

    def _draw(self, parameter: nn.Parameter) -> torch.Tensor:
        data = parameter.data
        return torch.normal(mean=0, std=1, size=data.size(), device=data.device, dtype=data.dtype)
