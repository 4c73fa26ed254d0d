"""Step time and memory of the optimizers beside what a user would pick instead, on a GPT's shapes.

Equal updates are checked before anything is timed: our Muon against torch.optim.Muon with the same Newton-Schulz
table and precision, and NorMuon against pytorch-optimizer's in its conventions.
"""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from isotone.normuon.optimizer import Muon, NorMuon
from isotone.shared import device
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

SHAPES = {
    "gpt-124m": [(768, 768)] * 4 * 12 + [(3072, 768), (768, 3072)] * 12,
    "tiny": [(32, 32)] * 4 + [(64, 32), (32, 64)],
}
ROUNDS = {"gpt-124m": 6, "tiny": 6}


def bench(run: Run, shapes: str = "gpt-124m") -> Report:
    """Time a step of every optimizer on `shapes`; a peer that is not installed has no row."""
    if shapes not in SHAPES:
        raise InputError(f"expected --shapes to be one of {', '.join(SHAPES)}, got {shapes!r}")
    where = device.resolve(run.device)
    start = time.perf_counter()
    list_ = SHAPES[shapes]
    check_equal_to_torch(list_[-2:], where)
    ours = _stepper(lambda p: Muon(p, lr=1e-3, orthogonalize="ns5", scale="original"), list_, where)
    normuon = _stepper(lambda p: NorMuon(p, lr=1e-3, orthogonalize="ns5", scale="original"), list_, where)
    theirs = _stepper(lambda p: torch.optim.Muon(p, lr=1e-3), list_, where)
    rows = [
        _row("muon-torch", shapes, ("Muon (default precision)", ours), ("torch.optim.Muon", theirs), 1 / 0.75, where),
        _row("normuon-muon", shapes, ("NorMuon", normuon), ("our Muon", ours), 1 / 1.03, where),
    ]
    if where == "cpu":
        same = _stepper(
            lambda p: Muon(p, lr=1e-3, orthogonalize="ns5", scale="original", ns_dtype=torch.bfloat16), list_, where
        )
        rows.append(
            _row("muon-torch-bf16", shapes, ("Muon in bfloat16", same), ("torch.optim.Muon", theirs), None, where)
        )
    try:
        from pytorch_optimizer import NorMuon as Peer
    except ImportError:
        Peer = None
    if Peer is not None:
        peer = _stepper(lambda p: Peer([{"params": p, "use_muon": True}], lr=1e-3), list_, where)
        version = metadata.version("pytorch-optimizer")
        rows.append(
            _row(
                "normuon-pytorch-optimizer",
                shapes,
                ("NorMuon", normuon),
                ("pytorch_optimizer.NorMuon", peer),
                None,
                where,
                version,
            )
        )
    adamw = _stepper(lambda p: torch.optim.AdamW(p, fused=True), list_, where)
    adamw()
    rows.append(
        Ratio(
            *("state-adamw", f"{shapes}, optimizer state", "NorMuon", "torch.optim.AdamW", torch.__version__),
            *(float(_state_bytes(normuon.optimizer)), float(_state_bytes(adamw.optimizer)), "bytes", 1.9),
        )
    )
    scale = "gpu" if where == "cuda" else "cpu"
    return Report("normuon", "bench", scale, (), "torch", ratios=rows, seconds=time.perf_counter() - start)


def check_equal_to_torch(shapes: list[tuple[int, int]], where: str) -> float:
    """The largest difference of weights from torch.optim.Muon's after two steps; raises beyond rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(where) for shape in shapes]
    pair: list[list[nn.Parameter]] = [[nn.Parameter(w.clone()) for w in weights] for _ in range(2)]
    settings: dict[str, Any] = dict(orthogonalize="ns5", scale="original", ns_dtype=torch.bfloat16)
    optimizers = [Muon(pair[0], lr=1e-3, **settings), torch.optim.Muon(pair[1], lr=1e-3)]
    for _ in range(2):
        gradients = [torch.randn(shape, generator=generator).to(where) for shape in shapes]
        for parameters, optimizer in zip(pair, optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    difference = max((a - b).abs().max().item() for a, b in zip(*pair, strict=True))
    if difference > 2e-4:  # two steps of bfloat16 products in another order
        raise RuntimeError(f"expected the updates of torch.optim.Muon, got a difference of {difference}")
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


def _row(
    id: str,
    shapes: str,
    ours: tuple[str, Any],
    peer: tuple[str, Any],
    target: float | None,
    where: str,
    version: str = "",
) -> Ratio:
    timing = compare(ours[1], peer[1], rounds=ROUNDS[shapes], warmup=1, device=where)
    # the ratio is the median over pairs; the seconds of ours are scaled to it, so that row and ratio agree
    seconds = timing.ours_seconds
    work = f"{shapes}, one step"
    version = version or torch.__version__
    return Ratio(id, work, ours[0], peer[0], version, seconds, seconds * timing.ratio, "s", target)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
