"""Step time and memory of the optimizers beside what a user would pick instead, on a GPT's shapes.

Equal updates are checked before anything is timed: our Muon against torch.optim.Muon, and NorMuon against
pytorch-optimizer's, each with the same Newton-Schulz table and in the same precision. The peers iterate in bfloat16
everywhere; a CPU without bfloat16 units does that many times slower than float32, which is our default there. So
every row names the precisions, and on a CPU rows in equal precision stand beside those in default precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from isotone.normuon.optimizer import Muon, NorMuon
from isotone.normuon.orthogonalize import default_dtype, zeropower
from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError


def _layer(dim: int) -> list[tuple[int, int]]:
    return [(dim, dim)] * 4 + [(4 * dim, dim), (dim, 4 * dim)]


SHAPES = {
    "gpt-124m": _layer(768) * 12,
    "gpt-1.1b": _layer(1792) * 26,
    "gpt-5.4b": _layer(3840) * 30,
    "gpt-124m-layer": _layer(768),
    "gpt-256-layer": _layer(256),
    "tiny": [(32, 32)] * 4 + [(64, 32), (32, 64)],
}
SMALL = dict.fromkeys(("gpt-124m", "gpt-1.1b", "gpt-5.4b", "gpt-124m-layer"), "gpt-256-layer")
MANY = [(16, 16)] * 100
ROUNDS = 6
SETTINGS: dict[str, Any] = {"lr": 1e-3, "orthogonalize": "ns5", "scale": "original"}
BF16 = torch.bfloat16


def bench(run: Run, shapes: str | None = None) -> Report:
    """Time a step of every optimizer on `shapes` (None: the 124M list on a GPU, one layer of it on a CPU).

    A peer that is not installed has no row.
    """
    where = device.resolve(run.device)
    shapes = shapes or ("gpt-124m" if where == "cuda" else "gpt-124m-layer")
    if shapes not in SHAPES:
        raise InputError(f"expected --shapes to be one of {', '.join(SHAPES)}, got {shapes!r}")
    start = time.perf_counter()
    large, small = SHAPES[shapes], SMALL.get(shapes, shapes)
    check_equal_to_torch(SHAPES["tiny"], where)
    plan = _rows(shapes, small, where)
    rows = []
    with progress.bar(f"normuon bench {shapes}", len(plan), run.silent) as bar:
        for row in plan:
            rows.append(row())
            bar.advance(1)
    normuon, adamw = _stepper(_normuon(), large, where), _stepper(_adamw, large, where)
    normuon()
    adamw()
    rows.append(
        Ratio(
            *("state-adamw", f"{shapes}, optimizer state", "NorMuon", "torch.optim.AdamW", torch.__version__),
            *(float(_state_bytes(normuon.optimizer)), float(_state_bytes(adamw.optimizer)), "bytes", 1.9),
        )
    )
    scale = "gpu" if where == "cuda" else "cpu"
    return Report("normuon", "bench", scale, (), "torch", ratios=rows, seconds=time.perf_counter() - start)


def _rows(shapes: str, small: str, where: str) -> list[Callable[[], Ratio]]:
    """What is timed, as functions that time it."""
    default = str(default_dtype(torch.empty(0, device=where))).removeprefix("torch.")

    def row(id: str, on: str, ours: Any, peer: Any, target: float | None = None, version: str = "") -> Any:
        def timed() -> Ratio:
            list_ = MANY if on == "many" else SHAPES[on]
            steps = [_stepper(make, list_, where) for _, make in (ours, peer)]
            work = "100 matrices of 16 x 16, one step" if on == "many" else f"{on}, one step"
            return _ratio(id, work, (ours[0], steps[0]), (peer[0], steps[1]), target, where, version)

        return timed

    torch_muon = ("torch.optim.Muon (bfloat16)", lambda p: torch.optim.Muon(p, lr=1e-3))
    ours = (f"Muon ({default})", lambda p: Muon(p, **SETTINGS))
    normuon = (f"NorMuon ({default})", _normuon())
    plan = [
        row("muon-torch", shapes, ours, torch_muon, 1 / 0.6 if where == "cuda" else 1 / 0.75),
        row("normuon-muon", shapes, normuon, ours, 1 / 1.03),
        row("many-small-torch", "many", normuon, torch_muon),
    ]
    if where == "cpu":
        same = ("Muon (bfloat16)", lambda p: Muon(p, ns_dtype=BF16, **SETTINGS))
        plan.append(row("muon-torch-same-precision", small, same, torch_muon))
    try:
        import pytorch_optimizer
    except ImportError:
        return plan
    check_equal_to_pytorch_optimizer(SHAPES["tiny"], where)
    version = metadata.version("pytorch-optimizer")

    def peer_step(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return pytorch_optimizer.NorMuon([{"params": p, "use_muon": True}], lr=1e-3)

    peer = ("pytorch_optimizer.NorMuon (bfloat16)", peer_step)
    plan.append(row("normuon-peer", shapes if where == "cuda" else small, normuon, peer, 1.0, version))
    plan.append(row("many-small-peer", "many", normuon, peer, None, version))
    if where == "cpu":
        same = ("NorMuon (bfloat16)", _normuon(ns_dtype=BF16))
        plan.append(row("normuon-peer-same-precision", small, same, peer, None, version))
        plan.append(lambda: _newton_schulz_row(SHAPES[shapes][-2], where, version))
    return plan


def _newton_schulz_row(shape: tuple[int, int], where: str, version: str) -> Ratio:
    """Five Newton-Schulz steps of one matrix, in float32 on both sides; equal results are checked first."""
    from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(where)

    def ours() -> Tensor:
        return zeropower(matrix, "ns5", dtype=torch.float32)

    def peer() -> Tensor:
        return zero_power_via_newton_schulz_5(matrix, dtype=torch.float32)

    difference = (ours() - peer()).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"expected pytorch-optimizer's polar factor, got a difference of {difference}")
    work = f"Newton-Schulz, 5 steps, one {shape[0]} x {shape[1]} matrix"
    names = ("zeropower (float32)", ours), ("pytorch_optimizer (float32)", peer)
    return _ratio("newton-schulz-float32", work, *names, 1.0, where, version)


def _normuon(**more: Any) -> Any:
    return lambda p: NorMuon(p, **SETTINGS, **more)


def _adamw(p: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, fused=True)


def check_equal_to_torch(shapes: list[tuple[int, int]], where: str) -> float:
    """Largest difference of weights from torch.optim.Muon's after two steps; raises beyond rounding."""
    return _check_equal(
        *(shapes, where, "torch.optim.Muon", lambda p: Muon(p, ns_dtype=BF16, **SETTINGS)),
        lambda p: torch.optim.Muon(p, lr=1e-3),
    )


def check_equal_to_pytorch_optimizer(shapes: list[tuple[int, int]], where: str) -> float:
    """The same for pytorch-optimizer's NorMuon, in its "match_rms" form, which is the paper's."""
    import pytorch_optimizer

    settings: dict[str, Any] = {**SETTINGS, "scale": "rms", "weight_decay": 0.0, "eps": 1e-10, "ns_dtype": BF16}
    return _check_equal(
        *(shapes, where, "pytorch_optimizer.NorMuon", lambda p: NorMuon(p, **settings)),
        lambda p: pytorch_optimizer.NorMuon(
            [{"params": p, "use_muon": True}], lr=1e-3, update_scale="match_rms", eps=1e-10
        ),
    )


def _check_equal(shapes: list[tuple[int, int]], where: str, name: str, ours: Any, peer: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(where) for shape in shapes]
    pair: list[list[nn.Parameter]] = [[nn.Parameter(w.clone()) for w in weights] for _ in range(2)]
    optimizers = [ours(pair[0]), peer(pair[1])]
    for _ in range(2):
        gradients = [torch.randn(shape, generator=generator).to(where) for shape in shapes]
        for parameters, optimizer in zip(pair, optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()  # a peer may write into it
            optimizer.step()
    difference = max((a - b).abs().max().item() for a, b in zip(*pair, strict=True))
    # two steps of 1e-3 in bfloat16, products in another order; Muon and NorMuon differ by five times as much
    if difference > 2e-5:
        raise RuntimeError(f"expected the updates of {name}, got a difference of {difference}")
    return difference


class _stepper:
    """A step of one optimizer on given shapes with fixed gradients."""

    def __init__(self, make: Any, shapes: list[tuple[int, int]], where: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(where)) for shape in shapes]
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
        self.optimizer = make(self.parameters)

    def __call__(self) -> None:
        self.optimizer.step()


def _ratio(
    id: str, work: str, ours: tuple[str, Any], peer: tuple[str, Any], target: float | None, where: str, version: str
) -> Ratio:
    timing = compare(ours[1], peer[1], rounds=ROUNDS, warmup=1, device=where)
    # the ratio is the median over pairs; the seconds of ours are scaled to it, so that row and ratio agree
    seconds = timing.ours_seconds
    version = version or torch.__version__
    return Ratio(id, work, ours[0], peer[0], version, seconds, seconds * timing.ratio, "s", target)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
