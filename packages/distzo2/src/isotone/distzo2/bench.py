"""A step beside what a user would run instead, on the same model and batch, in one run.

In memory: the reference's order of passes, checked to give the same projected gradient from the same directions.
Offloaded: beside the same step in memory, where its time goes by lane, and what of the link's rate it reaches.
Memory: LoRA with AdamW (peft), and FSDP2 with its CPU offload (one rank, gloo) on the same model; the losses of their
first steps are compared. On a CPU offload moves blocks within the host's memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from isotone.distzo2 import offloading, timing
from isotone.distzo2.baselines import ReferenceMeZO
from isotone.distzo2.config import ZOConfig
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.mezo import MeZO
from isotone.distzo2.objective import model_loss
from isotone.distzo2.plots import timeline_plot
from isotone.distzo2.ranks import run_ranks
from isotone.distzo2.rng import step_seed
from isotone.distzo2.timing import busy, record, spans_of
from isotone.shared import device, progress
from isotone.shared.bench import Timing, compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Size:
    """What is timed: a shape, batches of rows and tokens, rounds; `target`: the in-memory ratio to reach;
    `link_layers`: blocks behind the modelled link, as many as OPT-13B has (with few, the fill is what is measured)."""

    layers: int
    hidden: int
    vocab: int
    batches: tuple[tuple[int, int], ...]
    rounds: int
    target: float | None
    shapes: tuple[str, ...] = ()
    link_layers: int = 40


SIZES = {
    "tiny": Size(2, 32, 64, ((2, 16),), 6, None, link_layers=3),
    # 100 million parameters; targets from the issue
    "cpu": Size(12, 768, 16384, ((1, 32), (16, 128)), 6, 1.5),
    "gpu": Size(12, 768, 16384, ((1, 32), (16, 128)), 20, 1.5, ("opt-1.3b", "opt-6.7b", "opt-13b")),
}


def bench(run: Run, size: str = "auto", zo2: Path | None = None) -> Report:
    """Every comparison. `size`: auto, cpu, gpu or tiny; `zo2`: a Python in whose environment the authors' code is.

    Raises `InputError` for another size, or gpu where there is none.
    """
    where = device.resolve(run.device)
    name = ("gpu" if where == "cuda" else "cpu") if size == "auto" else size
    if name not in SIZES:
        raise InputError(f"expected --size to be auto or one of {', '.join(SIZES)}, got {size!r}")
    if name == "gpu" and where != "cuda":
        raise InputError("expected a GPU for --size gpu, found none; --size cpu runs here")
    setting = SIZES[name]
    if zo2 is not None and setting.shapes:
        zo2_step(zo2, "tiny", 1, 16)  # said now if it does not run, not after what is measured before it
    start = time.perf_counter()
    figures: dict[str, Any] = {}
    work: list[Callable[[], list[Ratio]]] = [
        *(partial(_in_memory, setting, *batch, where) for batch in setting.batches),
        partial(_small_offloaded, setting, where, figures),
        partial(_link_bound, setting),
        partial(_memory, setting, where),
        *(partial(_offloaded, shape, where, zo2) for shape in setting.shapes),
    ]
    ratios: list[Ratio] = []
    with progress.bar("distzo2 bench", len(work), run.silent) as bar:
        for part in work:
            ratios += part()
            bar.advance(1)
    scale: Any = "gpu" if where == "cuda" else "cpu"
    seconds = time.perf_counter() - start
    return Report(
        "distzo2", "bench", scale, seeds=(), framework="torch", ratios=ratios, seconds=seconds, figures=figures
    )


def random_model(layers: int, hidden: int, vocab: int, length: int) -> Any:
    """A random causal OPT, in eval mode; the same each time."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_attention_heads=max(2, hidden // 64),
        ffn_dim=4 * hidden,
        max_position_embeddings=length,
    )
    return OPTForCausalLM(config).eval()


def random_batch(vocab: int, rows: int, length: int, where: str) -> dict[str, torch.Tensor]:
    """Random tokens, all asked for."""
    ids = torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(0)).to(where)
    return {"input_ids": ids, "labels": ids}


def _in_memory(setting: Size, rows: int, length: int, where: str) -> list[Ratio]:
    """Our step, engine and optimizer, beside the reference's order of passes."""
    models = [random_model(setting.layers, setting.hidden, setting.vocab, length).to(where) for _ in range(3)]
    batch = random_batch(setting.vocab, rows, length, where)
    engine = ZOEngine(models[0], ZOConfig(lr=1e-7), device=where)
    optimizer = MeZO(models[1].parameters(), lr=1e-7)
    reference = ReferenceMeZO(models[2].named_parameters(), lr=1e-7)

    def loss(model: Any) -> Any:
        return model_loss(model, batch)[0]

    _agree(setting, rows, length, where, batch)
    steps = iter(range(10**9))
    work = f"a step in memory, {_size(models[0])}, {rows} x {length} tokens"
    peer = ("MeZO, the reference's order of passes", "this package")
    ratios = []
    for ident, name, ours in (
        ("engine", "ZOEngine", lambda: engine.step(batch)),
        ("optimizer", "MeZO", lambda: optimizer.step(lambda: loss(models[1]))),
    ):
        timed = compare(
            ours,
            lambda: reference.step(lambda: float(loss(models[2])), step_seed(0, next(steps))),
            rounds=setting.rounds,
            warmup=1,
            device=where,
        )
        ratios += _step_rows(f"{ident}-{rows}x{length}", work, name, peer, timed, rows * length, setting.target)
    return ratios


def _size(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters"


def _step_rows(
    ident: str, work: str, ours: str, peer: tuple[str, str], timing: Timing, tokens: int, target: float | None
) -> list[Ratio]:
    """Median seconds of a step, with the interval of the ratio pair by pair, and tokens a second."""
    pairs = f"{work} (pairs: {timing.ratio:.2f} x, 95 % in {timing.low:.2f} to {timing.high:.2f})"
    seconds = (timing.ours_seconds, timing.peer_seconds)
    rates = (tokens / timing.ours_seconds, tokens / timing.peer_seconds)
    return [
        Ratio(ident, pairs, ours, *peer, *seconds, "s", target),
        Ratio(f"{ident}-tokens", work, ours, *peer, *rates, "tokens/s", None, higher_is_better=True),
    ]


def _small_offloaded(setting: Size, where: str, figures: dict[str, Any]) -> list[Ratio]:
    """The same model with its blocks on the host: beside resident and beside a copy for each tensor, and the shares of
    the lanes in a step."""
    length = max(length for _, length in setting.batches)
    options: tuple[dict[str, Any], ...] = ({"offload": "cpu"}, {}, {"offload": "cpu", "flat_buckets": False})
    models = [random_model(setting.layers, setting.hidden, setting.vocab, length).to(where) for _ in options]
    moved, resident, tensors = (
        ZOEngine(model, ZOConfig(lr=1e-7, **own), device=where) for model, own in zip(models, options, strict=True)
    )
    rows, length = setting.batches[0]
    batch = random_batch(setting.vocab, rows, length, where)
    work = f"a step offloaded, {_size(models[0])}"
    found = []
    for ident, name, other in (("offload", "in memory", resident), ("bucket", "a copy for each tensor", tensors)):
        timed = compare(
            partial(moved.step, batch), partial(other.step, batch), rounds=setting.rounds, warmup=1, device=where
        )
        peer, named = (f"ZOEngine, {name}", "this package"), f"{ident}-{rows}x{length}"
        found += _step_rows(
            named, f"{work}, {rows} x {length} tokens", "ZOEngine, offloaded", peer, timed, rows * length, None
        )
    for rows, length in setting.batches:
        batch = random_batch(setting.vocab, rows, length, where)
        moved.step(batch)
        spans, seconds, rounds = [], [], max(1, setting.rounds // 3)
        for _ in range(rounds):
            start = time.perf_counter()
            spans.append(record(moved, batch))
            seconds.append(time.perf_counter() - start)
        lanes = {lane: statistics.median(busy(one).get(lane, 0.0) for one in spans) for lane in busy(spans[0])}
        step = statistics.median(seconds)
        found += lane_rows(f"{rows}x{length}", f"{work}, {rows} x {length} tokens", lanes, step)
        figures[f"timeline-{rows}x{length}"] = timeline_plot(
            spans_of(spans[0]), f"One step, blocks offloaded, {rows} x {length} tokens"
        )
    return found


def lane_rows(ident: str, work: str, lanes: dict[str, float], step: float) -> list[Ratio]:
    """Each lane's seconds in a step of `step` seconds; the step beside its slowest lane alone, and all in turn."""
    rows = [
        Ratio(f"lane-{lane}-{ident}", work, f"the {lane} lane", "the whole step", "", seconds, step, "s", None)
        for lane, seconds in lanes.items()
        if seconds
    ]
    total, most = sum(lanes.values()), max(lanes.values())
    return [
        *rows,
        Ratio(f"lanes-bound-{ident}", work, "the whole step", "its slowest lane alone", "", step, most, "s", None),
        Ratio(f"lanes-in-turn-{ident}", work, "the whole step", "its lanes in turn", "", step, total, "s", None),
    ]


def _link_bound(setting: Size) -> list[Ratio]:
    """What a step that the link holds up reaches of the link's rate: of a model of hardware, whose rate is known."""
    layers, transfer = setting.link_layers, 0.03
    engine, size = timing.throttled(layers, 64, transfer, transfer / 10)
    batch = {"x": torch.randn(4, 64)}
    seconds = timing.step_seconds(engine, batch, 5)
    work = f"a step of {layers} blocks, throttled link, compute a tenth of an upload (a model of hardware)"
    rates = (layers * size / seconds / 1e6, size / transfer / 1e6)
    row = ("bytes uploaded in the step's time", "the link's rate", "")
    return [Ratio("line-rate-model", work, *row, *rates, "MB/s", 0.9, higher_is_better=True)]


def _agree(setting: Size, rows: int, length: int, where: str, batch: dict[str, torch.Tensor]) -> None:
    """The same directions give the same projected gradient, in double precision where perturbing in place is exact."""
    narrow = random_model(2, 32, setting.vocab, length).to(where).double()
    other = random_model(2, 32, setting.vocab, length).to(where).double()
    ours = MeZO(narrow.parameters(), lr=1e-7, rng="torch")
    ours.step(lambda: model_loss(narrow, batch)[0])
    theirs = ReferenceMeZO(other.named_parameters(), lr=1e-7)
    theirs.step(lambda: float(model_loss(other, batch)[0]), step_seed(0, 0))
    if abs(ours.last_grads[0] - theirs.grads[0]) > 1e-6 * max(1.0, abs(theirs.grads[0])):
        raise RuntimeError(f"expected the same gradient before timing, got {ours.last_grads[0]} and {theirs.grads[0]}")


def _memory(setting: Size, where: str) -> list[Ratio]:
    """The most that each way of training holds, in a process of its own."""
    rows, length = setting.batches[-1]
    arguments: dict[str, Any] = {"layers": setting.layers, "hidden": setting.hidden, "vocab": setting.vocab}
    arguments |= {"rows": rows, "length": length, "where": where}
    arms = ["zo", "fsdp2", *(["lora"] if _installed("peft") else [])]
    found = {arm: run_ranks(peak_memory, 1, {**arguments, "arm": arm})[0] for arm in arms}
    losses = [result["loss"] for result in found.values()]
    if max(losses) - min(losses) > 0.05:  # ours is l+, at eps from where the others begin
        raise RuntimeError(f"expected about the same loss in every first step, got {losses}")
    peers = {
        "lora": ("LoRA and AdamW", f"peft {version('peft')}" if "lora" in found else ""),
        "fsdp2": ("FSDP2, CPU offload, AdamW", f"torch {torch.__version__}"),
    }
    work = (
        f"peak memory of training, {rows} x {length} tokens, {'of the device' if where == 'cuda' else 'of the process'}"
    )
    ours = f"ZOEngine, {'offloaded' if _zo_offload(where) == 'cpu' else 'in memory'}"
    mebi = {arm: result["peak"] / 2**20 for arm, result in found.items()}
    return [
        Ratio(f"memory-{arm}", work, ours, *peers[arm], mebi["zo"], mebi[arm], "MiB", None)
        for arm in arms
        if arm != "zo"
    ]


def peak_memory(rank: int, world: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Two training steps of one way in this process: the loss before, and the most memory above what was there.

    On a CPU what is above is of the process; on a GPU what torch allocated on the device.
    """
    where, arm = arguments["where"], arguments["arm"]
    batch = random_batch(arguments["vocab"], arguments["rows"], arguments["length"], where)
    warm = random_model(1, 32, 64, 16)
    model_loss(warm, random_batch(64, 1, 16, "cpu"))
    before = _resident() if where == "cpu" else 0
    model = random_model(arguments["layers"], arguments["hidden"], arguments["vocab"], arguments["length"])
    step = _STEPS[arm](model, batch, where)
    if where == "cuda":  # pragma: no cover - needs a GPU
        torch.cuda.reset_peak_memory_stats()
    loss = float(step())
    step()
    peak = _resident() if where == "cpu" else torch.cuda.max_memory_allocated()
    return {"loss": loss, "peak": float(peak - before)}


def _resident() -> int:
    """The most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # rusage counts what the parent had when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _zo_offload(where: str) -> str:
    # on a GPU blocks rest on the host, as FSDP2's do; on a CPU that is where they are
    return "cpu" if where == "cuda" else "none"


def _zo(model: Any, batch: dict[str, torch.Tensor], where: str) -> Callable[[], Any]:
    engine = ZOEngine(model, ZOConfig(lr=1e-7, offload=_zo_offload(where)), device=where)
    return lambda: engine.step(batch).loss


def _first_order(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss: Any = model_loss(model, batch)[0]
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _lora(model: Any, batch: dict[str, torch.Tensor], where: str) -> Callable[[], Any]:
    import peft

    return _first_order(peft.get_peft_model(model.to(where), peft.LoraConfig(r=8, task_type="CAUSAL_LM")), batch)


def _fsdp2(model: Any, batch: dict[str, torch.Tensor], where: str) -> Callable[[], Any]:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = init_device_mesh(where, (1,))
    for layer in model.model.decoder.layers:
        fully_shard(layer, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=where == "cuda"))
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=where == "cuda"))
    return _first_order(model, batch)


_STEPS: dict[str, Callable[..., Callable[[], Any]]] = {"zo": _zo, "lora": _lora, "fsdp2": _fsdp2}


def _offloaded(shape: str, where: str, zo2: Path | None) -> list[Ratio]:
    """A large shape offloaded: beside resident at 8 x 2048 tokens; at 1 x 2048 beside the authors' ZO2 in an
    environment of its own (it pins another transformers), and with a part of the method left out; at 1 x 128 beside
    the link alone."""
    ours = offloading.offloaded(shape, where, rounds=10)
    there = offloading.resident(shape, where, rounds=10)
    long, short, bound = (
        f"{rows} x {length}" for rows, length in (offloading.LONG, offloading.SHORT, offloading.BOUND)
    )
    work = f"a step, {shape}, fp16"
    found = []
    if zo2 is not None:
        theirs = zo2_step(zo2, shape, *offloading.SHORT)
        peer = (f"zo2 {theirs['version']}", "github liangyuwang/zo2")
        seconds = (ours["short"]["seconds"], theirs["seconds"])
        spread = _ranges(ours["short"], theirs)
        found.append(Ratio(f"zo2-{shape}", f"{work}, {short} tokens {spread}", "offloaded", *peer, *seconds, "s", 1.3))
    for ident, name, batch, mine, other, target in (
        ("resident", "resident", long, ours["long"], there["long"], 0.95),
        ("resident-short", "resident", short, ours["short"], there["short"], None),
        ("serial", "in turn", short, ours["short"], ours["in turn"], None),
        ("immediate", "updated at the end of each step", short, ours["short"], ours["immediate"], None),
    ):
        described = f"{work}, {batch} tokens {_ranges(mine, other)}"
        each = (mine["seconds"], other["seconds"])
        found.append(Ratio(f"{ident}-{shape}", described, "offloaded", name, "this package", *each, "s", target))
    tokens = (ours["long"]["tokens"], there["long"]["tokens"])
    rate = ("offloaded", "resident", "this package")
    found.append(
        Ratio(f"tokens-{shape}", f"{work}, {long} tokens", *rate, *tokens, "tokens/s", None, higher_is_better=True)
    )
    line = (ours["bytes"] / ours["bound"]["seconds"] / 1e9, ours["line_rate"] / 1e9)
    names = ("bytes uploaded in the step's time", "the link alone", "")
    found.append(
        Ratio(f"line-rate-{shape}", f"{work}, {bound} tokens", *names, *line, "GB/s", 0.9, higher_is_better=True)
    )
    found += lane_rows(shape, f"{work}, {bound} tokens", ours["lanes"], ours["bound"]["seconds"])
    return found


def _ranges(ours: dict[str, float], peer: dict[str, Any]) -> str:
    """The fastest and slowest steps of both."""
    each = [f"{one['fastest']:.3g} to {one['slowest']:.3g} s" for one in (ours, peer)]
    return f"({each[0]}; peer {each[1]})"


def zo2_step(python: Path, shape: str, rows: int, length: int) -> dict[str, Any]:
    """Median `seconds` of a step of the authors' ZO2 on a random OPT of a shape, run by another Python.

    Raises `InputError` with the last line that it said where it does not run.
    """
    layers, heads, hidden, ffn = offloading.SHAPES[shape]
    given = {"layers": layers, "heads": heads, "hidden": hidden, "ffn": ffn, "rows": rows, "length": length}
    script = Path(__file__).with_name("zo2_peer.py")
    try:
        done = subprocess.run([str(python), str(script), json.dumps(given)], capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise InputError(f"expected a Python that has zo2 at {str(python)!r}: {error.strerror}") from None
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise InputError(f"expected a Python that has zo2 and a GPU at {str(python)!r}: {last}") from None


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
