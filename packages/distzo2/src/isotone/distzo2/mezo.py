"""MeZO as a torch optimizer: two forward passes and one scalar a step, on parameters that are all in memory (2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from isotone.distzo2 import kernels, rng
from isotone.distzo2.config import ZOConfig, check_not_negative
from isotone.distzo2.kernels import Update
from isotone.distzo2.layout import Segment
from isotone.distzo2.trajectory import make_update
from isotone.shared.errors import InputError


class MeZO(torch.optim.Optimizer):
    """SGD on the projected gradient g z: `step(closure)`, where the closure returns the loss and needs no gradient.

    `params`: parameters or groups of them, whose lr and weight_decay may differ (`parameter_groups` leaves norms and
    biases out of the decay); schedulers of torch work. `eps`, `n_directions`, `estimator`, `rng`, `seed`: as in
    `ZOConfig`. Perturbed weights are copies: while the closure runs the parameters are views of them, and updates alone
    touch the weights. Two more copies of the parameters are held between steps; `ZOEngine` does with two blocks.

    A parameter's direction follows from its number: its place in the groups or, with the groups of `parameter_groups`,
    in the model, which is how `ZOEngine` numbers them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        n_directions: int = 1,
        estimator: str = "two_sided",
        rng: str = "philox",
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {"n_directions": n_directions, "estimator": estimator, "rng": rng, "seed": seed}
        self.config = ZOConfig(lr=lr, eps=eps, weight_decay=weight_decay, **options)
        self.steps = 0
        self.skipped = 0
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            check_not_negative("lr", float(group["lr"]))
            check_not_negative("weight_decay", float(group["weight_decay"]))
        self._trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not self._trained:
            raise InputError("expected parameters to train, got requires_grad=False everywhere")
        if any(p.is_meta for p in self._trained):
            raise InputError("expected parameters with values, got one on the meta device")
        numbers = self._numbers()
        self._segments = {
            id(p): [Segment(number, 0, 0, p.numel(), True)]
            for number, p in zip(numbers, self._trained, strict=True)
            if p.numel()
        }
        self._noise = self._make_noise(numbers)
        self._copies: dict[int, list[Tensor]] = {}
        self.last_grads: tuple[float, ...] = ()
        """The projected gradients of the last step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One step; the closure runs twice for each direction (once more than K for the one-sided estimator).

        Returns l+, averaged over the directions. A loss that is not finite skips the update and is counted in
        `skipped`. Raises `InputError` without a closure.
        """
        if closure is None:
            raise InputError("expected a closure that returns the loss, got none")
        config = self.config
        seeds = tuple(rng.step_seed(config.seed, self.steps, k) for k in range(config.n_directions))
        two_sided = config.estimator == "two_sided"
        base = None if two_sided else float(closure())
        pairs = [self._pair(seed, closure, base) for seed in seeds]
        self.steps += 1
        if not all(math.isfinite(loss) for pair in pairs for loss in pair):
            self.skipped += 1
            return sum(plus for plus, _ in pairs) / len(pairs)
        width = 2 * config.eps if two_sided else config.eps
        self.last_grads = tuple((plus - minus) / width for plus, minus in pairs)
        for group in self.param_groups:
            update = make_update(seeds, self.last_grads, float(group["lr"]), float(group["weight_decay"]))
            if update is not None:
                for parameter in group["params"]:
                    self._update(parameter, update)
        return sum(plus for plus, _ in pairs) / len(pairs)

    def state_dict(self) -> dict[str, Any]:
        """torch's own, and the number of steps, from which the seeds follow."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        state = dict(state_dict)
        self.steps = int(state.pop("steps", 0))
        super().load_state_dict(state)

    def _pair(self, seed: int, closure: Callable[[], Any], base: float | None) -> tuple[float, float]:
        """The losses at theta + eps z and theta - eps z, of one draw of z; at theta for the one-sided estimator."""
        weights = [parameter.data for parameter in self._trained]
        two_sided = base is None
        for parameter, value in zip(self._trained, weights, strict=True):
            self._perturb(parameter, value, seed, two_sided)
        try:
            plus = self._at(0, closure)
            minus = self._at(1, closure) if two_sided else base
        finally:
            for parameter, value in zip(self._trained, weights, strict=True):
                parameter.data = value
        assert minus is not None
        return plus, minus

    def _perturb(self, parameter: nn.Parameter, value: Tensor, seed: int, two_sided: bool) -> None:
        copies = self._copies.setdefault(id(parameter), [])
        while len(copies) < 1 + two_sided:
            copies.append(torch.empty_like(value, memory_format=torch.contiguous_format))
        flat = [copy.view(-1) for copy in copies]
        segments = self._segments.get(id(parameter), [])
        minus = flat[1] if two_sided else None
        whole, eps = value.contiguous().view(-1), self.config.eps
        kernels.advance(whole, segments, self._noise, seed=seed, eps=eps, plus=flat[0], minus=minus)

    def _at(self, sign: int, closure: Callable[[], Any]) -> float:
        for parameter in self._trained:
            parameter.data = self._copies[id(parameter)][sign]
        return float(closure())

    def _update(self, parameter: nn.Parameter, update: Update) -> None:
        segments = self._segments.get(id(parameter), [])
        flat = parameter.data.contiguous().view(-1)
        kernels.advance(flat, segments, self._noise, update)
        if not parameter.data.is_contiguous():
            parameter.data.copy_(flat.view(parameter.shape))

    def _numbers(self) -> list[int]:
        """Each trained parameter's number. Raises `InputError` where groups number them twice or not at all."""
        given = [number for group in self.param_groups for number in group.get("numbers", ())]
        numbers = given or list(range(len(self._trained)))
        if sorted(numbers) != list(range(len(self._trained))):
            raise InputError(f"expected every one of {len(self._trained)} parameters numbered once, got {numbers}")
        return numbers

    def _make_noise(self, numbers: list[int]) -> rng.Noise:
        if self.config.rng == "philox":
            return rng.PhiloxNoise()
        ordered = [p for _, p in sorted(zip(numbers, self._trained, strict=True), key=lambda pair: pair[0])]
        sizes, dtypes = [p.numel() for p in ordered], [p.dtype for p in ordered]
        return rng.TorchNoise(sizes, dtypes, ordered[0].device, keep=self.config.n_directions)
