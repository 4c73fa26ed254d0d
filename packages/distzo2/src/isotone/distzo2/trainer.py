"""Hugging Face's Trainer with zeroth-order steps: its data, schedules, logging, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from isotone.distzo2.config import ZOConfig
from isotone.distzo2.engine import ZOEngine
from isotone.shared.errors import InputError


class EngineOptimizer(torch.optim.Optimizer):
    """The rate of an engine as torch's schedulers and Trainer see it; the steps are the engine's own."""

    def __init__(self, engine: ZOEngine) -> None:
        self.engine = engine
        super().__init__([p for p in engine.model.parameters() if p.requires_grad], {"lr": engine.config.lr})

    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """A step on `closure`; without one the engine has taken it, and there is nothing to do."""
        if closure is None:
            return None
        self.engine.lr = float(self.param_groups[0]["lr"])
        return self.engine.step(closure).loss

    def state_dict(self) -> dict[str, Any]:
        """torch's own, the engine's steps, from which the seeds follow, and its trajectory."""
        return {**super().state_dict(), "steps": self.engine.steps, "trajectory": self.engine.trajectory.arrays()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        state = dict(state_dict)
        self.engine.steps = int(state.pop("steps"))
        self.engine.trajectory.fill(state.pop("trajectory"))
        super().load_state_dict(state)


class ZOTrainer(Trainer):
    """`Trainer` that needs no backward pass. `config`: of the engine, whose rate is `args.learning_rate`.

    The model is in eval mode while it trains: dropout would make the two forwards two functions. Raises `InputError`
    for gradient accumulation (a larger batch costs no more memory for activations that are not kept) and for several
    processes, whose data Trainer would deal out without regard to the mesh.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, config: ZOConfig | None = None, **options: Any):
        if args.gradient_accumulation_steps != 1:
            given = args.gradient_accumulation_steps
            raise InputError(f"expected gradient_accumulation_steps of 1, got {given}; take larger batches")
        if args.world_size > 1:
            raise InputError(f"expected one process for ZOTrainer, got {args.world_size}; `training.train` has ranks")
        args.max_grad_norm = 0.0
        super().__init__(model=model, args=args, **options)
        self.accelerator.device_placement = False
        self.engine = ZOEngine(model.eval(), config)

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """The optimizer through which the scheduler sets the engine's rate."""
        self.optimizer = optimizer = EngineOptimizer(self.engine)
        for group in optimizer.param_groups:
            group["lr"] = self.args.learning_rate
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One zeroth-order step; the loss is l+."""
        model.eval()
        optimizer: Any = self.optimizer
        self.engine.lr = float(optimizer.param_groups[0]["lr"])
        return torch.tensor(self.engine.step(self._prepare_inputs(inputs)).loss, device=self.args.device)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: the engine brings each block itself, and a model that is offloaded may not fit."""

    def prediction_step(self, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        """As Trainer's, with the last update applied and the blocks brought as they are needed."""
        return self.engine.run(lambda: super(ZOTrainer, self).prediction_step(model, *arguments, **options))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with the last update applied."""
        self.engine.flush()
        target = output_dir or self.args.output_dir
        assert target is not None
        self._save(target, state_dict=self.engine.state_dict())
