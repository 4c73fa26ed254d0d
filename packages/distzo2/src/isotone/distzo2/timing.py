"""Step times: overlap beside its model, slices over ranks under a modelled link, PertP on real cores (section 6 a).

All of it is of the host: the links are models of hardware, and the ranks share its cores, whatever GPU is there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isotone.distzo2.config import ZOConfig
from isotone.distzo2.distributed import init_mesh, shard
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.link import Span, ThrottledLink
from isotone.distzo2.plan import pipeline_seconds


class TimedLinear(nn.Linear):
    """A linear layer whose forward takes `seconds` for a whole batch of `rows` rows, in proportion for fewer.

    What it waits for before it begins (its block, other forwards) is not in these seconds.
    """

    def __init__(self, width: int, seconds: float, rows: int) -> None:
        super().__init__(width, width)
        self.seconds, self.rows = seconds, rows

    def forward(self, input: Tensor) -> Tensor:
        start = time.perf_counter()
        found = super().forward(input)
        rest = start + self.seconds * len(input) / self.rows - time.perf_counter()
        time.sleep(max(0.0, rest))
        return found


class TimedLayers(nn.Module):
    """`layers` of `TimedLinear`."""

    def __init__(self, layers: int, width: int, seconds: float, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TimedLinear(width, seconds, rows) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mean_square(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """An objective for layers without a task."""
    return model(batch["x"]).square().double().mean(), len(batch["x"])


HOST = "cpu"
"""Where everything here computes."""


def step_seconds(engine: ZOEngine, batch: dict[str, Tensor], rounds: int, immediate: bool = False) -> float:
    """The median time of a step; on all ranks the slowest's, since they wait for one another.

    `immediate`: the update is applied at the end of its step, which brings and returns every block once more.
    """

    def step() -> None:
        engine.step(batch)
        if immediate:
            engine.flush()

    step()
    return statistics.median(_once(step) for _ in range(rounds))


def sweep(ratios: tuple[float, ...], layers: int, transfer: float, rounds: int, width: int = 32) -> dict[str, Any]:
    """Steps at several ratios of compute to upload: measured and N max(T) + fill, overlapped and in turn.

    `transfer`: seconds that the modelled link takes for a block. Compute is a dual forward that sleeps.
    """
    points, spans = [], []
    batch = {"x": torch.randn(4, width)}
    for ratio in ratios:
        compute = ratio * transfer
        point = {"ratio": ratio}
        for name, overlap in (("measured", True), ("serial_measured", False)):
            engine, _ = throttled(layers, width, transfer, compute, overlap=overlap)
            # moving in turn is for comparison alone
            point[name] = step_seconds(engine, batch, rounds if overlap else max(1, rounds // 2))
            if overlap and ratio == 1:
                spans = record(engine, batch)
        point["predicted"] = pipeline_seconds([transfer, compute, transfer], layers)
        point["serial_predicted"] = layers * (2 * transfer + compute)
        points.append(point)
    return {"points": points, "spans": spans}


def record(engine: ZOEngine, batch: dict[str, Tensor]) -> list[list[Any]]:
    """When each lane worked in one step: lane, block, start, end."""
    spans = engine.link.record()
    engine.step(batch)
    found = [[span.lane, span.block, span.start, span.end] for span in sorted(spans, key=lambda s: s.start)]
    engine.link.spans = None
    return found


def busy(rows: list[list[Any]]) -> dict[str, float]:
    """The seconds that each lane worked, of what `record` gave: a lane does one thing at a time."""
    found: dict[str, float] = {}
    for lane, _, start, end in rows:
        found[lane] = found.get(lane, 0.0) + end - start
    return found


def spans_of(rows: list[list[Any]]) -> list[Span]:
    """What `record` gave, as spans again."""
    return [Span(*row) for row in rows]


def throttled(
    layers: int, width: int, transfer: float, compute: float, rows: int = 4, **options: Any
) -> tuple[ZOEngine, int]:
    """An engine on timed layers behind a link that takes `transfer` seconds for an fp32 block; a block's bytes."""
    size = 4 * width * (width + 1)
    config = ZOConfig(lr=1e-3, offload="cpu", **options)
    link = ThrottledLink(size / transfer, overlap=config.overlap)
    model = TimedLayers(layers, width, compute / 2, rows).eval()
    return ZOEngine(model, config, objective=mean_square, device=HOST, link=link), size


ABLATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "ours": ({}, False),
    "immediate": ({}, True),
    "in turn": ({"overlap": False}, False),
    "naive": ({"overlap": False}, True),
    "half": ({"offload_dtype": torch.bfloat16, "stochastic_rounding": True}, False),
}
"""Options of the engine, and whether the update is applied at once: what section 2.12 asks to be left out in turn."""


def ablations(layers: int, width: int, transfer: float, compute: float, rounds: int) -> dict[str, float]:
    """Seconds of a transfer-bound step on one rank under one link model, with a part of the method left out.

    `transfer`: seconds that the link takes for a block in fp32; `compute`: a block's dual forward.
    """
    batch = {"x": torch.randn(4, width)}
    found = {}
    for name, (options, immediate) in ABLATIONS.items():
        engine, _ = throttled(layers, width, transfer, compute, **options)
        found[name] = step_seconds(engine, batch, rounds, immediate)
    return found


def sliced(rank: int, world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """A transfer-bound step of our own ZO2 engine on one rank, and of all ranks, 2D with slices, under one link model;
    the same without slices ("whole"), and DDP with them ("ddp").

    The global batch is the same; the link's figures are a model of hardware, not this machine's.
    """
    layers, width, rounds, transfer, compute = (
        arguments[key] for key in ("layers", "width", "rounds", "transfer", "compute")
    )
    bandwidth = 4 * width * (width + 1) / transfer
    options = {"exchange_bandwidth": bandwidth * arguments["exchange"]}
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, width)}

    def engine_on(mesh: Any, slicing: bool | str = "auto") -> ZOEngine:
        torch.manual_seed(0)
        model = TimedLayers(layers, width, compute / 2, 8).eval()
        link = ThrottledLink(bandwidth, **options)
        config = ZOConfig(lr=1e-3, offload="cpu", slicing=slicing)
        return ZOEngine(model, config, mesh, objective=mean_square, device=HOST, link=link)

    found: dict[str, Any] = {}
    if rank == 0:
        found["one"] = step_seconds(engine_on(None), batch, rounds)
    dist.barrier()
    engine = engine_on(init_mesh(2))
    own = shard(batch, engine.ranks)
    found["all"] = step_seconds(engine, own, rounds)
    found["spans"] = record(engine, own)
    blocks = 4 * width * (width + 1) * layers * engine.steps
    found["uploaded"] = engine.link.bytes["upload"] / blocks
    for name, pertp, slicing in (("whole", 2, False), ("ddp", 1, "auto")):
        other = engine_on(init_mesh(pertp), slicing)
        found[name] = step_seconds(other, shard(batch, other.ranks), rounds)
    return found


def sliced_seconds(ranks: int, arguments: dict[str, Any]) -> float:
    """What the model of the link predicts for a step of `sliced`: whole on one rank, or 2D and slices on four."""
    transfer, exchange = arguments["transfer"], arguments["exchange"]
    received = transfer / exchange * (ranks - 1) / ranks
    lanes = [transfer / ranks, received, arguments["compute"] / ranks, transfer / ranks]
    return pipeline_seconds(lanes, arguments["layers"])


def lm_engine(shape: dict[str, int], mesh: Any) -> ZOEngine:
    """A random causal OPT in memory."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512,
        hidden_size=shape["hidden"],
        word_embed_proj_dim=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 32,
        ffn_dim=4 * shape["hidden"],
        max_position_embeddings=shape["length"] + 2,
    )
    return ZOEngine(OPTForCausalLM(config).eval(), ZOConfig(lr=1e-6), mesh, device=HOST)


def lm_batch(shape: dict[str, int]) -> dict[str, Tensor]:
    """Random tokens, all asked for."""
    ids = torch.randint(512, (shape["rows"], shape["length"]), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def pert_parallel(rank: int, world: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """One process beside ranks that share the work, a thread each, in turns: medians of the ratios.

    "limit": what two processes that share nothing gain over one here, each with a step of its own, at once; two ranks
    cannot gain more on cores that slow one another down.
    """
    shape, rounds = arguments["shape"], arguments["rounds"]
    batch = lm_batch(shape)
    alone = lm_engine(shape, None)
    arms = {"pertp": lm_engine(shape, init_mesh(2)), "ddp": lm_engine(shape, init_mesh(1))}
    times: dict[str, list[float]] = {name: [] for name in ("alone", "limit", *arms)}
    for _ in range(rounds + 1):
        if rank == 0:
            times["alone"].append(_once(partial(alone.step, batch)))
        dist.barrier()
        times["limit"].append(_once(partial(alone.step, batch)))
        for name, engine in arms.items():
            own = shard(batch, engine.ranks)
            dist.barrier()
            times[name].append(_once(partial(engine.step, own)))
        dist.barrier()
    if rank:
        return {}
    kept = {name: values[1:] for name, values in times.items()}  # the first round warms up
    ratios = {name: [a / b for a, b in zip(kept["alone"], kept[name], strict=True)] for name in arms}
    ratios["limit"] = [2 * a / b for a, b in zip(kept["alone"], kept["limit"], strict=True)]
    return {"ratios": ratios, "seconds": {name: statistics.median(values) for name, values in kept.items()}}


def all_cores(shape: dict[str, int], rounds: int, threads: int) -> float:
    """A step of one process with `threads` threads: the median of its seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return step_seconds(lm_engine(shape, None), lm_batch(shape), rounds)
    finally:
        torch.set_num_threads(before)


def _once(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
