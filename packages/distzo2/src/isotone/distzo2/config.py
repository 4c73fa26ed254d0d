"""How a run perturbs, updates and moves: every option, checked in one place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from isotone.shared.errors import InputError, check_count

_CHOICES = {
    "estimator": ("two_sided", "one_sided"),
    "rng": ("philox", "torch"),
    "offload": ("none", "cpu", "disk"),
    "parallel": ("none", "pertp", "ddp", "2d"),
}
_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ZOConfig:
    """Options of `ZOEngine`; the defaults are those of section 2.10 (full fine-tuning).

    `lr`: of the first step; a scheduler may change it, and a step's update takes the rate of that step. `eps`: scale
    of the perturbation. `weight_decay`: lambda, not on biases and norms. `n_directions`: K, over which g_k z_k is
    averaged (n-SPSA). `estimator`: "two_sided", (l+ - l-) / 2 eps, or "one_sided", (l+ - l) / eps.
    `rng`: "philox", counter-based, or "torch", the reference's generator. `seed`: of the run; step seeds follow.
    `offload`: where blocks rest, "none" (the device), "cpu" (pinned if there is a GPU), "disk" (`disk_folder`, mmap).
    `blocks`: the name of the list of layers, or "auto". `working_dtype`: of the forward passes; `offload_dtype`: of the
    blocks at rest and on the link, and of all trained weights as they are stored, so that no result depends on what
    moves (fp32 below a half-precision working type makes it the master copy); None keeps the model's.
    `stochastic_rounding`: of updates that are stored in half precision. `overlap`: move blocks while another computes.
    `slicing`: each rank moves 1/n of a block; "auto" where several ranks offload. `parallel`: the mesh that is made
    where none is given. `check_every`: steps between comparisons of all ranks' weights, 0 for none. `pin_memory` and
    `flat_buckets` false are the ablations of section 2.12: pageable host memory, and a copy a tensor.
    """

    lr: float = 1e-6
    eps: float = 1e-3
    weight_decay: float = 0.0
    n_directions: int = 1
    estimator: str = "two_sided"
    rng: str = "philox"
    seed: int = 0
    offload: str = "none"
    disk_folder: str | os.PathLike[str] | None = None
    blocks: str = "auto"
    working_dtype: torch.dtype | None = None
    offload_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    overlap: bool = True
    slicing: bool | str = "auto"
    parallel: str = "none"
    check_every: int = 0
    pin_memory: bool = True
    flat_buckets: bool = True

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_not_negative("lr", self.lr)
        check_not_negative("weight_decay", self.weight_decay)
        check_count("n_directions", self.n_directions)
        check_count("seed", self.seed, 0)
        check_count("check_every", self.check_every, 0)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"expected {name} to be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.slicing not in ("auto", True, False):
            raise InputError(f"expected slicing to be auto, True or False, got {self.slicing!r}")
        for name in ("working_dtype", "offload_dtype"):
            if getattr(self, name) not in (None, *_STORED):
                raise InputError(f"expected {name} to be fp16, bf16, fp32 or fp64, got {getattr(self, name)}")
        if self.offload == "disk" and self.disk_folder is None:
            raise InputError('expected disk_folder with offload="disk", got none')
        if self.rng == "torch" and self.slicing is True:
            raise InputError('expected rng="philox" with slicing: a slice of the torch generator\'s z needs the whole')

    @property
    def signs(self) -> tuple[int, int]:
        """What the two losses of a direction are taken at, in units of eps."""
        return (1, -1) if self.estimator == "two_sided" else (1, 0)


def check_positive(name: str, value: float) -> None:
    """Raise `InputError` where `value` is not a finite number above 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise InputError(f"expected {name} to be a finite number above 0, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise `InputError` where `value` is not a finite number of at least 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise InputError(f"expected {name} to be a finite number of at least 0, got {value!r}")


def check_deterministic(model: torch.nn.Module) -> None:
    """Raise `InputError` where dropout or batch statistics would make the two forwards two different functions."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        dropout = getattr(module, "p", 0.0) if isinstance(module, torch.nn.modules.dropout._DropoutNd) else 0.0
        rates = [
            getattr(module, rate, 0.0) for rate in ("dropout", "attention_dropout", "activation_dropout", "layerdrop")
        ]
        active = max([dropout, *(rate for rate in rates if isinstance(rate, float))], default=0.0)
        if active > 0:
            raise InputError(f"expected model.eval(): {name or 'the model'} is in train mode with dropout {active:g}")
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise InputError(f"expected model.eval(): {name} is in train mode and would update its batch statistics")
