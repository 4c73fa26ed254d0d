"""A step beside what a user would run instead, on the same model and batch, in one run.

In memory: the reference's order of passes, checked to give the same projected gradient from the same directions.
Memory: LoRA with AdamW (peft), and FSDP2 with its CPU offload (one rank, gloo) on the same model; the losses of their
first steps are compared. On a CPU offload moves nothing.
"""

from __future__ import annotations

import json
import resource
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

from isotone.distzo2 import offloading
from isotone.distzo2.baselines import ReferenceMeZO
from isotone.distzo2.config import ZOConfig
from isotone.distzo2.engine import ZOEngine
from isotone.distzo2.mezo import MeZO
from isotone.distzo2.objective import model_loss
from isotone.distzo2.ranks import run_ranks
from isotone.distzo2.rng import step_seed
from isotone.shared import device, progress
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class Size:
    """What is timed: a shape, batches of rows and tokens, rounds; `target`: the in-memory ratio to reach."""

    layers: int
    hidden: int
    vocab: int
    batches: tuple[tuple[int, int], ...]
    rounds: int
    target: float | None
    shapes: tuple[str, ...] = ()


SIZES = {
    "tiny": Size(2, 32, 64, ((2, 16),), 6, None),
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
    work: list[Callable[[], list[Ratio]]] = [
        *(partial(_in_memory, setting, *batch, where) for batch in setting.batches),
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
    return Report("distzo2", "bench", scale, seeds=(), framework="torch", ratios=ratios, seconds=seconds)


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
    engine = ZOEngine(models[0], ZOConfig(lr=1e-7))
    optimizer = MeZO(models[1].parameters(), lr=1e-7)
    reference = ReferenceMeZO(models[2].named_parameters(), lr=1e-7)

    def loss(model: Any) -> Any:
        return model_loss(model, batch)[0]

    _agree(setting, rows, length, where, batch)
    steps = iter(range(10**9))
    parameters = sum(p.numel() for p in models[0].parameters())
    work = f"a step in memory, {parameters / 1e6:.0f}M parameters, {rows} x {length} tokens"
    ratios = []
    for ident, name, ours in (
        ("engine", "ZOEngine", lambda: engine.step(batch)),
        ("optimizer", "MeZO", lambda: optimizer.step(lambda: loss(models[1]))),
    ):
        timing = compare(
            ours,
            lambda: reference.step(lambda: float(loss(models[2])), step_seed(0, next(steps))),
            rounds=setting.rounds,
            warmup=1,
            device=where,
        )
        values = (timing.ours_seconds, timing.ours_seconds * timing.ratio)
        peer = ("MeZO, the reference's order of passes", "this package")
        ratios.append(Ratio(f"{ident}-{rows}x{length}", work, name, *peer, *values, "s", setting.target))
    return ratios


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
    work = f"peak memory of training, {rows} x {length} tokens"
    mebi = {arm: result["peak"] / 2**20 for arm, result in found.items()}
    return [
        Ratio(f"memory-{arm}", work, "ZOEngine in memory", *peers[arm], mebi["zo"], mebi[arm], "MiB", None)
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


def _zo(model: Any, batch: dict[str, torch.Tensor], where: str) -> Callable[[], Any]:
    # on a GPU blocks rest on the host, as FSDP2's do; on a CPU that is where they are
    engine = ZOEngine(model, ZOConfig(lr=1e-7, offload="cpu" if where == "cuda" else "none"), device=where)
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
    """A large shape offloaded: beside resident at 8 x 2048 tokens, and at 1 x 2048 beside moving blocks in turn, and
    beside the authors' ZO2 in an environment of its own (it pins another transformers)."""
    long = offloading.beside_resident(shape, 8, 2048, where)
    ours, turn = (offloading.offloaded(shape, 1, 2048, where, overlap=overlap)["seconds"] for overlap in (True, False))
    work = f"a step, {shape}, fp16"
    theirs = []
    if zo2 is not None:
        found = zo2_step(zo2, shape, 1, 2048)
        peer = (f"zo2 {found['version']}", "github liangyuwang/zo2")
        each = (ours, found["seconds"])
        theirs = [Ratio(f"zo2-{shape}", f"{work}, 1 x 2048 tokens", "offloaded", *peer, *each, "s", 1.3)]
    return [
        *theirs,
        Ratio(
            f"resident-{shape}",
            f"{work}, 8 x 2048 tokens",
            "offloaded",
            "resident",
            "this package",
            long["offloaded"],
            long["resident"],
            "s",
            0.95,
        ),
        Ratio(
            f"serial-{shape}",
            f"{work}, 1 x 2048 tokens",
            "overlapped",
            "in turn",
            "this package",
            ours,
            turn,
            "s",
            None,
        ),
    ]


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
