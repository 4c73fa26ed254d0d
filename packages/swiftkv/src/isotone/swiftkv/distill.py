"""Distillation of a swift model against the model it was converted from, which is inside it.

One step: the lower half once, without gradient, for both; the teacher's upper half with the original projections,
without gradient; the student's upper half; the loss; AdamW. Only Q', K', V' and norm_swiftkv are trained (`train`
"qkv"), so that the teacher stays what it was, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError, check_count
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.convert import TRAINABLE, drop_teacher, freeze
from isotone.swiftkv.data import Batch, Batches, fingerprint
from isotone.swiftkv.losses import IGNORED, tiled_cross_entropy, tiled_kl
from isotone.swiftkv.prompts import check_batch

LOSSES = ("kd", "lm")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DistillConfig:
    """One distillation; the defaults are the authors' recipe's, but for `steps`, which theirs takes from its data.

    `lr` rises from 0 over the first `warmup_ratio` of the steps and falls to 0 linearly. `loss` "kd": temperature-T KL
    of the logits plus `hidden_loss_mult` times the MSE of hidden state `hidden_loss_layer` (of the L + 1 of them; -2
    is the input of the last layer); "lm": cross-entropy of the next token. `train` "qkv", "norms" or "full" (freeze).
    `share_lower` false runs the lower half twice, as the authors' code does: same result, for comparison.
    `compute_dtype` "bf16" runs the forward passes in autocast. Weights that are trained are held in fp32 meanwhile: of
    a model in half precision they are rounded back at the end, and it runs in bf16 autocast whatever `compute_dtype`.
    """

    steps: int = 150
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.05
    temperature: float = 2.0
    hidden_loss_mult: float = 1.0
    hidden_loss_layer: int = -2
    loss: str = "kd"
    train: str = "qkv"
    share_lower: bool = True
    clip: float = 1.0
    tile_bytes: int = 2**30
    gradient_checkpointing: bool = False
    compute_dtype: str = "model"
    evaluate_every: int = 50

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"expected loss to be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.train not in TRAINABLE:
            raise InputError(f"expected train to be one of {', '.join(TRAINABLE)}, got {self.train!r}")
        if self.compute_dtype not in ("model", "bf16"):
            raise InputError(f"expected compute_dtype to be model or bf16, got {self.compute_dtype!r}")
        for name in ("steps", "evaluate_every", "tile_bytes", "hidden_loss_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"expected {name} to be a whole number, got {value!r}")
            if value < 1 and name != "hidden_loss_layer":
                raise InputError(f"expected {name} to be at least 1, got {value}")
        if self.warmup_ratio > 1:
            raise InputError(f"expected warmup_ratio to be at most 1, got {self.warmup_ratio}")
        for name in ("lr", "temperature", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"expected a finite {name} above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "hidden_loss_mult", "warmup_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"expected a finite {name} of at least 0, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The share of `lr` at `step` (0 to steps - 1)."""
        warm = math.ceil(self.warmup_ratio * self.steps)
        if step < warm:
            return step / max(1, warm)
        return max(0.0, (self.steps - step) / max(1, self.steps - warm))


@dataclass
class History:
    """The loss of each step, and at `evaluated` steps what `evaluate` said."""

    losses: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def distill(
    model: Any,
    data: Batches,
    config: DistillConfig | None = None,
    *,
    folder: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = True,
    data_id: str | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **options: Any,
) -> History:
    """Distil `model` in place on `data`, a function of the step that gives its `Batch`; returns the history.

    `options` are fields of `DistillConfig`, for one that is not given whole. With `folder`, checkpoints are kept there
    and, with `resume`, the newest whole one is continued, to the same result bit for bit on a CPU, where it is of the
    same settings, base weights and data. `data_id` names the data; by default it is the data's own (`Windows.data_id`),
    or of a plain function the fingerprint of its first batch. `evaluate` is called
    with the model at the start, every `evaluate_every` steps and at the end. With train "norms" or "full" copies of the
    upper layers are trained, so that a base which shares them stays what it is, and the model loses its teacher
    (`teacher_of`, taken before, keeps it); where such a run does not come to its end, the model is as it was. Raises
    `InputError` where there is no teacher or nothing to train, on a loss that is not finite, and on a checkpoint of
    another run.
    """
    settings = dataclasses.replace(config or DistillConfig(), **options)
    split = SwiftKVConfig.of(model.config)
    if not len(split.upper):
        raise InputError("expected fewer key-value layers than layers: there is nothing to distil")
    if not model.config.teacher_weights:
        raise InputError("expected a model with its teacher's weights to distil, they were dropped")
    check_count("checkpoint_every", checkpoint_every)
    _hidden_state(settings, split)
    # what the teacher shares and is trained, is trained in copies: the layers as they are stay the teacher's
    teacher = None
    if settings.train != "qkv":
        teacher = list(model.model.layers[split.num_key_value_layers :])
        for number in split.upper:
            shared = {id(model.config): model.config}
            model.model.layers[number] = copy.deepcopy(model.model.layers[number], shared)
        # what is in the layers from now on is no teacher: who asks for one is told so
        model.config.teacher_weights = False
    try:
        return _run(model, data, settings, teacher, folder, checkpoint_every, resume, data_id, evaluate, on_step)
    except BaseException:
        if teacher is not None:
            for number, layer in zip(split.upper, teacher, strict=True):
                model.model.layers[number] = layer
            model.config.teacher_weights = True
            freeze(model, "qkv")
        raise


def _run(
    model: Any,
    data: Batches,
    settings: DistillConfig,
    teacher: list[Any] | None,
    folder: Path | None,
    checkpoint_every: int,
    resume: bool,
    data_id: str | None,
    evaluate: Callable[[Any], dict[str, float]] | None,
    on_step: Callable[[int, float], None],
) -> History:
    parameters = freeze(model, settings.train)
    made_of = {} if folder is None else {"base": start_id(model), "data": data_id or _data_id(data)}
    with _in_single(parameters):
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=parameters[0].is_cuda,
        )
        run = _Distillation(model, settings, data, teacher, optimizer, parameters, evaluate, on_step, made_of)
        model.eval()
        if folder is None:
            run.loop(0, lambda step: None)
        else:
            with CheckpointStore(folder) as store:
                first = 0
                if not resume:
                    store.clear()
                elif (saved := load_latest(folder, "torch")) is not None:
                    run.restore(saved.arrays, saved.state, folder)
                    first = saved.step

                def keep(step: int) -> None:
                    if step % checkpoint_every == 0 or step == settings.steps:
                        store.save(step, *run.snapshot())

                run.loop(first, keep)
    if settings.train != "qkv":
        drop_teacher(model)
    return run.history


def step_loss(model: Any, batch: Batch, settings: DistillConfig, teacher: Any = None) -> Float[Tensor, ""]:
    """The loss of one batch, with its graph. `teacher`: upper layers to use instead of the model's own."""
    split = SwiftKVConfig.of(model.config)
    inner = model.model
    with autocast(model, settings.compute_dtype):
        with torch.no_grad():
            lower, masks, rope, positions = lower_half(model, batch)
            theirs: list[Tensor] = []
            if settings.loss == "kd":
                hidden = lower
                for number in split.upper:
                    layer = inner.layers[number] if teacher is None else teacher[number - split.num_key_value_layers]
                    hidden = layer(
                        hidden, attention_mask=masks[number], position_ids=positions, position_embeddings=rope
                    )
                    theirs.append(hidden)
                theirs[-1] = inner.norm(theirs[-1])
            if not settings.share_lower:
                lower, masks, rope, positions = lower_half(model, batch)
        ours = inner.student_upper(lower, masks, rope, checkpointed=settings.gradient_checkpointing)
        ours[-1] = inner.norm(ours[-1])
        return _loss(model, ours, theirs, batch, settings, split)


def autocast(model: Any, compute_dtype: str = "model") -> Any:
    """bf16 autocast where `compute_dtype` is "bf16" or the model is in half precision, else nothing."""
    weight = model.model.embed_tokens.weight
    if compute_dtype == "bf16" or weight.dtype in HALF:
        return torch.autocast(weight.device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def _in_single(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, half precision parameters are fp32: an update of 2e-4 of a number is lost to bf16's 8 bits."""
    before = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32 if parameter.dtype in HALF else parameter.dtype)
    try:
        yield
    finally:
        for parameter, dtype in zip(parameters, before, strict=True):
            if parameter.dtype != dtype:
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)


def _loss(
    model: Any, ours: list[Tensor], theirs: list[Tensor], batch: Batch, settings: DistillConfig, split: SwiftKVConfig
) -> Tensor:
    head = model.lm_head.weight
    final = ours[-1].to(head.dtype)
    if settings.loss == "lm":
        labels = batch.input_ids if batch.labels is None else batch.labels
        wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return tiled_cross_entropy(final.flatten(0, 1), head, wanted.flatten(), settings.tile_bytes)
    mask = None if batch.labels is None else (batch.labels != IGNORED).flatten()
    loss = tiled_kl(
        final.flatten(0, 1),
        theirs[-1].to(head.dtype).flatten(0, 1),
        head,
        settings.temperature,
        mask,
        settings.tile_bytes,
    )
    if settings.hidden_loss_mult > 0:
        at = _hidden_state(settings, split) - split.num_key_value_layers - 1
        if at >= 0:  # up to h_l the states are shared, and nothing apart
            loss = loss + settings.hidden_loss_mult * F.mse_loss(ours[at].float(), theirs[at].float())
    return loss


def _hidden_state(settings: DistillConfig, split: SwiftKVConfig) -> int:
    """`hidden_loss_layer` as a number from 0 to L. Raises `InputError` where there is no such hidden state."""
    states = split.num_hidden_layers + 1
    if not -states <= settings.hidden_loss_layer < states:
        raise InputError(f"expected hidden_loss_layer of {states} hidden states, got {settings.hidden_loss_layer}")
    return settings.hidden_loss_layer % states


def lower_half(model: Any, batch: Batch, layers: int | None = None) -> tuple[Tensor, list[Any], Any, Tensor]:
    """The output of the first `layers` layers (default: l), the masks of all layers, RoPE and positions."""
    inner = model.model
    embeds = inner.embed_tokens(batch.input_ids)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)
    masks = inner.masks(embeds, None, None, positions)
    rope = inner.rotary_emb(embeds, position_ids=positions)
    hidden = embeds
    for number in range(SwiftKVConfig.of(model.config).num_key_value_layers if layers is None else layers):
        hidden = inner.layers[number](
            hidden, attention_mask=masks[number], position_ids=positions, position_embeddings=rope
        )
    return hidden, masks, rope, positions


class _Distillation:
    """One run: the loop, and its state in and out of a checkpoint."""

    def __init__(
        self,
        model: Any,
        settings: DistillConfig,
        data: Batches,
        teacher: Any,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        evaluate: Callable[[Any], dict[str, float]] | None,
        on_step: Callable[[int, float], None],
        made_of: dict[str, str],
    ) -> None:
        self.model, self.settings, self.data, self.teacher = model, settings, data, teacher
        self.optimizer, self.parameters, self.evaluate, self.on_step = optimizer, parameters, evaluate, on_step
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.history = History()
        self.made_of = made_of

    def loop(self, first: int, keep: Callable[[int], None]) -> None:
        """Steps `first` to the last; `keep` is called after each."""
        settings, device = self.settings, self.parameters[0].device
        if first == 0:
            self.score(0)
        for step in range(first, settings.steps):
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * settings.rate(step)
            batch = self.data(step)
            if batch.labels is not None and not bool((batch.labels[:, 1:] != IGNORED).any()):
                raise InputError(
                    f"expected a token to learn from in the batch of step {step}, all labels are {IGNORED}"
                )
            batch = batch.to(device)
            check_batch(batch.input_ids, self.model.config.vocab_size if device.type == "cpu" else None)
            loss = step_loss(self.model, batch, settings, self.teacher)
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"expected a finite loss, got {value} at step {step} with lr {settings.lr}")
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
            self.optimizer.step()
            self.history.losses.append(value)
            self.history.seconds += time.perf_counter() - start
            done = step + 1
            if done % settings.evaluate_every == 0 or done == settings.steps:
                self.score(done)
            keep(done)
            self.on_step(done, value)

    def score(self, step: int) -> None:
        if self.evaluate is not None:
            self.history.evaluated.append(step)
            with autocast(self.model):
                self.history.scores.append(self.evaluate(self.model))

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Trained weights and optimizer state; the frozen ones are the base model's."""
        arrays: dict[str, Tensor] = {f"model.{n}": p for n, p in zip(self.names, self._ordered(), strict=True)}
        for number, values in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
        return arrays, {"config": self._identity(), "history": dataclasses.asdict(self.history)}

    def restore(self, arrays: dict[str, Tensor], state: dict[str, Any], folder: Path) -> None:
        """Go on from a checkpoint. Raises `InputError` where it is of another run."""
        ours, theirs = self._identity(), state.get("config", {})
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {_short(theirs.get(key))} (now {_short(ours[key])})" for key in differing)
            raise InputError(
                f"expected to resume the run in {str(folder)!r} with its own settings: {pairs}; or use --fresh"
            )
        named = dict(self.model.named_parameters())
        document = self.optimizer.state_dict()
        with torch.no_grad():
            for key, value in arrays.items():
                kind, _, rest = key.partition(".")
                if kind == "model":
                    named[rest].copy_(value)
                else:
                    number, name = rest.split(".")
                    document["state"].setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(document)
        self.history = History(**state["history"])

    def _ordered(self) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.names]

    def _identity(self) -> dict[str, Any]:
        split = dataclasses.asdict(SwiftKVConfig.of(self.model.config))
        return json.loads(json.dumps({**dataclasses.asdict(self.settings), **split, **self.made_of}))


def start_id(model: Any) -> str:
    """The SHA-256 of the weights that a run starts from, names and types included."""
    return fingerprint(*(part for pair in model.named_parameters() for part in pair))


def _data_id(data: Batches) -> str:
    own = getattr(data, "data_id", None)
    if own is not None:
        return str(own)
    first = data(0)
    return fingerprint(first.input_ids, first.labels, first.position_ids)


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
