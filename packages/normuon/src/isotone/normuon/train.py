"""Train a small GPT on bytes with AdamW, torch's Muon, our Muon or NorMuon; killed at any moment, it resumes.

The batch of a step is a function of the seed and the step alone, so that a resumed run sees what the
uninterrupted one saw: bit for bit on a CPU at the same number of threads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from isotone.normuon.gpt import GPT, GPTConfig
from isotone.normuon.layout import split_params
from isotone.normuon.optimizer import Muon, NorMuon
from isotone.normuon.stats import update_stats
from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.data import sha256
from isotone.shared.errors import InputError

OPTIMIZERS = ("adamw", "torch-muon", "muon", "normuon")
_TORCH_SCALES = {"original": "original", "spectral": "spectral_unclamped", "match_rms_adamw": "match_rms_adamw"}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `lr` is the arm's own rate: of the matrices (`scale`'s units), or of AdamW.

    Everything that is not a hidden matrix takes AdamW at `adamw_lr` with betas (0.9, 0.95). The rate is constant
    for 60 % of the steps and then falls to 0 linearly. `micro_batch`: windows in one forward pass (None: all);
    gradients of a step are averaged over its passes. On a GPU the model runs in bfloat16 autocast.
    """

    optimizer: str = "normuon"
    lr: float = 0.02
    adamw_lr: float = 3e-3
    scale: str = "original"
    weight_decay: float = 0.0
    steps: int = 300
    batch: int = 16
    seed: int = 0
    evaluate_every: int = 10
    windows: int = 64
    ns_steps: int = 5
    micro_batch: int | None = None
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"expected an optimizer of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        for name in ("steps", "batch", "evaluate_every", "windows"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if self.micro_batch is not None and not (1 <= self.micro_batch and self.batch % self.micro_batch == 0):
            raise InputError(f"expected micro_batch to divide the batch of {self.batch}, got {self.micro_batch}")
        if self.optimizer == "torch-muon" and self.scale not in _TORCH_SCALES:
            known = ", ".join(_TORCH_SCALES)
            raise InputError(f"expected a scale of torch.optim.Muon ({known}), got {self.scale!r}")
        for name in ("lr", "adamw_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"expected a finite {name} above 0, got {value}")


@dataclass(frozen=True)
class Text:
    """Bytes, 90 % to train on and the rest to validate on; `sha256` of all of them."""

    train: UInt8[Tensor, " n"]
    validation: UInt8[Tensor, " m"]
    sha256: str = ""

    @classmethod
    def from_bytes(cls, data: bytes, context: int, name: str = "the text") -> Text:
        """Raises `InputError` where either part is shorter than a window of `context` + 1 bytes."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return cls._cut(tensor, context, name, sha256(data))

    @classmethod
    def from_file(cls, path: Path, context: int) -> Text:
        """The file at `path` by memory map: it may be larger than memory. Raises `InputError` as `from_bytes`."""
        size = path.stat().st_size
        if size == 0:
            return cls.from_bytes(b"", context, str(path))
        tensor = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return cls._cut(tensor, context, str(path), sha256(path))

    @classmethod
    def _cut(cls, tensor: Tensor, context: int, name: str, digest: str) -> Text:
        cut = len(tensor) * 9 // 10
        if len(tensor) - cut < context + 2:
            raise InputError(f"expected {name} to have at least {10 * (context + 2)} bytes, got {len(tensor)}")
        return cls(tensor[:cut], tensor[cut:], digest)


def make_optimizer(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of an arm; ours take the AdamW group with them, torch's Muon needs a second one."""
    groups = split_params(model, head=[model.head])
    betas, decay = (0.9, 0.95), config.weight_decay
    matrices = [p for group in groups if group["kind"] == "matrix" for _, p in group["params"]]
    others = [p for group in groups if group["kind"] == "adamw" for _, p in group["params"]]
    rest = {"params": others, "lr": config.adamw_lr, "weight_decay": 0.0}
    if config.optimizer == "adamw":
        arms = [{"params": matrices, "lr": config.lr, "weight_decay": decay}, rest]
        return [torch.optim.AdamW(arms, betas=betas)]
    if config.optimizer == "torch-muon":
        adjust = _TORCH_SCALES[config.scale]
        muon = torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn=adjust, ns_steps=config.ns_steps
        )
        return [muon, torch.optim.AdamW([rest], betas=betas)]
    kind = NorMuon if config.optimizer == "normuon" else Muon
    return [
        kind(
            groups,
            lr=config.lr,
            weight_decay=decay,
            scale=config.scale,
            orthogonalize="ns5",
            ns_steps=config.ns_steps,
            adamw={"lr": config.adamw_lr, "betas": betas, "eps": 1e-8},
        )
    ]


@dataclass
class History:
    """What a run left: validation loss (nats a byte) at `steps`, of the orthogonalised momentum before and after
    normalisation the row variation and sigma_max / sigma_min (geometric mean over matrices), and seconds of steps."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    row_cv: list[float] = field(default_factory=list)
    row_cv_after: list[float] = field(default_factory=list)
    condition: list[float] = field(default_factory=list)
    condition_after: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    config: TrainConfig,
    text: Text,
    device: str = "cpu",
    folder: Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[GPT, History]:
    """Run `config` on `text` and return the model and its history.

    With `folder`, checkpoints are kept there and, with `resume`, the newest whole one is continued. Raises
    `InputError` where that one is of another config, or another process writes there.
    """
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    optimizers = make_optimizer(model, config)
    history, first = History(), 0
    if folder is None:
        _loop(model, optimizers, config, text, device, history, first, on_step, lambda step: None)
        return model, history
    with CheckpointStore(folder) as store:
        if not resume:
            store.clear()
        elif (saved := load_latest(folder, "torch")) is not None:
            _check_config({**dataclasses.asdict(config), "data": text.sha256}, saved.state["config"], folder)
            _restore(model, optimizers, saved.arrays, saved.state)
            history, first = History(**saved.state["history"]), saved.step

        def keep(step: int) -> None:
            if step % checkpoint_every == 0 or step == config.steps:
                arrays, state = _snapshot(model, optimizers)
                identity = {**dataclasses.asdict(config), "data": text.sha256}
                state |= {"config": identity, "history": dataclasses.asdict(history)}
                store.save(step, arrays, state)

        _loop(model, optimizers, config, text, device, history, first, on_step, keep)
    return model, history


def _loop(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    config: TrainConfig,
    text: Text,
    device: str,
    history: History,
    first: int,
    on_step: Callable[[int, float], None],
    keep: Callable[[int], None],
) -> None:
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if first:
        rates = [[group["base_lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if first == 0:
        history.steps.append(0)
        history.losses.append(validate(model, config, text, device))
    for optimizer, bases in zip(optimizers, rates, strict=True):
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["base_lr"] = base
    for step in range(first, config.steps):
        factor = min(1.0, (config.steps - step) / (0.4 * config.steps))
        start = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        for optimizer in optimizers:
            optimizer.zero_grad()
        passes = _batch(text.train, config, step).to(device).split(config.micro_batch or config.batch)
        value = 0.0
        for windows in passes:
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                loss = model.loss(windows) / len(passes)
            loss.backward()
            value += loss.item()
        for optimizer in optimizers:
            optimizer.step()
        history.seconds += time.perf_counter() - start
        if not math.isfinite(value):
            raise InputError(f"expected a finite loss, got {value} at step {step} with lr {config.lr}")
        done = step + 1
        if done % config.evaluate_every == 0 or done == config.steps:
            history.steps.append(done)
            history.losses.append(validate(model, config, text, device))
            if isinstance(optimizers[0], Muon):
                stats = update_stats(optimizers[0]).values()
                history.row_cv.append(sum(s["row_cv"] for s in stats) / len(stats))
                history.row_cv_after.append(sum(s["row_cv_after"] for s in stats) / len(stats))
                history.condition.append(_condition(stats, ""))
                history.condition_after.append(_condition(stats, "_after"))
        keep(done)
        on_step(done, value)


@torch.no_grad()
def validate(model: GPT, config: TrainConfig, text: Text, device: str) -> float:
    """Loss on `windows` evenly spaced windows of the validation text: the same ones at every call."""
    context = config.model.context
    starts = torch.linspace(0, len(text.validation) - context - 1, config.windows).long()
    windows = text.validation[starts[:, None] + torch.arange(context + 1)].long()
    parts = windows.to(device).split(config.micro_batch or config.windows)
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        return sum(model.loss(part).item() * len(part) for part in parts) / len(windows)


def _condition(stats: Collection[dict[str, float]], which: str) -> float:
    """Geometric mean of sigma_max / sigma_min over the matrices of full rank; 1 where there is none."""
    pairs = [(s["sigma_max" + which], s["sigma_min" + which]) for s in stats]
    logs = [math.log(largest / smallest) for largest, smallest in pairs if smallest > 0]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


@torch.no_grad()
def sample(model: GPT, length: int = 120, seed: int = 0) -> str:
    """`length` bytes drawn from the model after a newline, as text (what is not UTF-8 is replaced)."""
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    tokens = [10]
    for _ in range(length):
        context = torch.tensor([tokens[-model.config.context :]], device=device)
        probabilities = model(context)[0, -1].float().softmax(-1).cpu()
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(tokens[1:]).decode("utf-8", errors="replace")


def export(model: GPT, folder: Path) -> Path:
    """Write model.safetensors and config.json into `folder`; returns the safetensors file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, path)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=1), encoding="utf-8")
    return path


def _batch(data: Tensor, config: TrainConfig, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + step)
    context = config.model.context
    starts = torch.randint(len(data) - context, (config.batch,), generator=generator)
    return data[starts[:, None] + torch.arange(context + 1)].long()


def _snapshot(model: GPT, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arrays = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    groups = []
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for number, values in state["state"].items():
            arrays |= {f"optimizer.{i}.{number}.{key}": value for key, value in values.items()}
        groups.append([group["base_lr"] for group in state["param_groups"]])
    return arrays, {"base_lr": groups}


def _restore(
    model: GPT, optimizers: list[torch.optim.Optimizer], arrays: dict[str, Tensor], state: dict[str, Any]
) -> None:
    model.load_state_dict({k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        document = optimizer.state_dict()
        for name, value in arrays.items():
            kind, *where = name.split(".")
            if kind == "optimizer" and int(where[0]) == i:
                document["state"].setdefault(int(where[1]), {})[where[2]] = value
        for group, base in zip(document["param_groups"], state["base_lr"][i], strict=True):
            group["base_lr"] = base
        optimizer.load_state_dict(document)


def _check_config(config: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    ours = json.loads(json.dumps(config))
    differing = [key for key in ours if ours[key] != saved.get(key)]
    if differing:
        pairs = ", ".join(f"{key} {saved.get(key)} (now {ours[key]})" for key in differing)
        raise InputError(
            f"expected to resume the run in {str(folder)!r} with its own settings: {pairs}; or use --fresh"
        )
