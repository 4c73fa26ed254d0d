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

    The model is in eval mode while it trains: dropout would make the two forwards two functions. `args.bf16` is the
    forwards' autocast. After `train` the weights are whole. Raises `InputError` for gradient accumulation (a larger
    batch costs no more memory for activations that are not kept), for several processes, whose data Trainer would deal
    out without regard to the mesh, and for arguments that a step without a backward pass has no use for.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, config: ZOConfig | None = None, **options: Any):
        if args.gradient_accumulation_steps != 1:
            given = args.gradient_accumulation_steps
            raise InputError(f"expected gradient_accumulation_steps of 1, got {given}; take larger batches")
        if args.world_size > 1:
            raise InputError(f"expected one process for ZOTrainer, got {args.world_size}; `training.train` has ranks")
        if args.n_gpu > 1:
            raise InputError(f"expected one GPU for ZOTrainer, got {args.n_gpu}; name it in CUDA_VISIBLE_DEVICES")
        _refuse_unused(args, options)
        args.max_grad_norm = 0.0
        super().__init__(model=model, args=args, **options)
        self.accelerator.device_placement = False
        self.engine = ZOEngine(model.eval(), config, device=args.device if args.use_cpu else None)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As Trainer's, with the last update applied."""
        found = super().train(*arguments, **options)
        self.engine.flush()
        return found

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
        with self.compute_loss_context_manager():
            found = self.engine.step(self._prepare_inputs(inputs))
        return torch.tensor(found.loss, device=self.args.device)

    def _load_best_model(self) -> None:
        """As Trainer's: nothing that waits comes on top of it."""
        self.engine.flush()
        super()._load_best_model()

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


def _refuse_unused(args: TrainingArguments, options: dict[str, Any]) -> None:
    """Raise `InputError` for what Trainer offers and a zeroth-order step would pass over in silence."""
    if args.fp16:
        raise InputError("expected fp16=False: there is no gradient to scale; load the model in float16, or take bf16")
    if args.weight_decay:
        raise InputError(f"expected weight_decay in ZOConfig, got {args.weight_decay} in the arguments")
    if args.label_smoothing_factor:
        raise InputError(f"expected label_smoothing_factor of 0, got {args.label_smoothing_factor}")
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise InputError(f"expected no {name} for ZOTrainer: ZOConfig says where blocks rest")
    for name in ("optimizers", "optimizer_cls_and_kwargs", "compute_loss_func"):
        given = options.get(name)
        if given is not None and given != (None, None):
            raise InputError(f"expected no {name} for ZOTrainer: the engine makes steps and losses")
