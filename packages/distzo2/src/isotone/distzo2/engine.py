"""ZO2's step on any model with a list of blocks, on one device or many (sections 2.3 to 2.9).

A step brings each block once. On arrival the block gets the update that the last step put off, with that step's rate;
then both perturbed forwards go through it; then it leaves. What a step knows at its end, one scalar a direction, is the
next one's update; `flush` applies it without a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from isotone.distzo2 import rng
from isotone.distzo2.config import ZOConfig, check_deterministic
from isotone.distzo2.distributed import RankLostError, Wire, checksum, mesh_for, ranks_of, to_device
from isotone.distzo2.kernels import Update
from isotone.distzo2.layout import lay_out
from isotone.distzo2.link import CudaLink, Link
from isotone.distzo2.lockstep import Lockstep
from isotone.distzo2.objective import Objective, as_loss, model_loss
from isotone.distzo2.pipeline import Pipeline
from isotone.distzo2.trajectory import Trajectory, base_hash, make_update
from isotone.distzo2.weights import Weights
from isotone.shared.errors import InputError

T = TypeVar("T")


class RanksDifferError(RuntimeError):
    """Ranks that must hold the same weights hold others."""


@dataclass(frozen=True)
class ZOStep:
    """What a step measured, over all ranks. `loss_plus`, `loss_minus`: at theta + eps z and theta - eps z (at theta for
    the one-sided estimator), averaged over the directions. `terms`: what the loss is a mean over. `skipped`: a loss was
    not finite, and the step changed nothing."""

    step: int
    loss_plus: float
    loss_minus: float
    projected_grads: tuple[float, ...]
    seeds: tuple[int, ...]
    terms: int
    skipped: bool = False

    @property
    def loss(self) -> float:
        """l+, which the reference reports too."""
        return self.loss_plus

    @property
    def projected_grad(self) -> float:
        """g_t of the first direction."""
        return self.projected_grads[0]

    @property
    def seed(self) -> int:
        """s_t of the first direction."""
        return self.seeds[0]


class ZOEngine:
    """Zeroth-order fine-tuning of `model` in place.

    `model`: a Hugging Face causal or classification model, or any module with a `ModuleList` of layers; in eval mode,
    with `requires_grad` on what is trained. `mesh`: of `init_mesh`, or None for what `config.parallel` names.
    `objective`: what a batch costs, the model's own mean loss by default. `device`: where blocks are computed, a GPU if
    there is one and they are offloaded, else where the model is. `link`: how blocks move.

    While the engine is in use the parameters are views of its buffers: read them after `flush`, from `state_dict`.
    Raises `InputError` for what section 7 lists: no blocks, nothing to train, dropout, other weights on other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZOConfig | None = None,
        mesh: dist.DeviceMesh | None = None,
        *,
        objective: Objective = model_loss,
        device: torch.device | str | None = None,
        link: Link | None = None,
    ) -> None:
        self.config = config = config or ZOConfig()
        check_deterministic(model)
        self.model, self.objective = model, objective
        self._homes = {id(p): (p.device, p.dtype) for p in model.parameters()}
        self.device = _device(model, config, device)
        self.ranks = ranks_of(mesh if mesh is not None else mesh_for(config.parallel, self.device.type))
        self.wire = Wire(self.ranks)
        slices = self.ranks.world if self._slicing() else 1
        self.layout = lay_out(model, config.blocks, slices)
        self._streams = self._own_streams()
        self.noise = self._noise()
        self._refuse_other_weights()
        self.seed = self.wire.from_first(config.seed)
        self.trajectory = self._new_trajectory()
        self.lr = config.lr
        self.link = link or self._link()
        blocks = self.layout.blocks
        self.pipeline = Pipeline(blocks, config, self.device, self.link, self.wire, slices, self.noise)
        self.weights = Weights(self.layout, config, self.device, self.noise, self._streams)
        self.weights.move_rest(model)
        self.pending: Update | None = None
        self.steps = 0
        self.skipped = 0
        self._lockstep = Lockstep()
        modules = [(number, unit.module) for number, unit in enumerate(blocks) if unit.module is not None]
        self._hooks = [module.register_forward_pre_hook(partial(self._arrive, number)) for number, module in modules]

    # --- what a user calls ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, batch: Any) -> ZOStep:
        """One step on this rank's `batch`, or on a closure that gives a loss or a pair of a mean and its terms.

        A batch comes to the engine's device. The closure runs once for each perturbation and calls the model as it
        likes; what it returns need not be differentiable. Where ranks hold slices all closures must call the model
        equally often: one that generates texts of any length needs `slicing=False`. The rate is `self.lr` of now, also
        where the update comes later. Where a rank's closure fails, it raises its error and the others `RankLostError`;
        the step is nobody's, and without slices all can go on.
        """
        seeds = tuple(rng.step_seed(self.seed, self.steps, k) for k in range(self.config.n_directions))
        found = self._combine(self._losses(batch, seeds), seeds)
        lr = 0.0 if found.skipped else self.lr
        self.trajectory.append(seeds, found.projected_grads, lr)
        self.pending = make_update(seeds, found.projected_grads, lr, self.config.weight_decay)
        self.steps += 1
        self.skipped += found.skipped
        if self.config.check_every and self.steps % self.config.check_every == 0:
            self.check_ranks()
        return found

    @torch.no_grad()
    def flush(self) -> None:
        """Apply the update that waits for the next step: afterwards the weights are theta_t."""
        if self.pending is not None:
            self._begin(())
        if self.pipeline.due:
            self._settle()

    @torch.no_grad()
    def run(self, function: Callable[[], T]) -> T:
        """What `function` gives, which calls the model, with the weights as they are; blocks come as it needs them.

        Where ranks hold slices, all of them must call the model equally often.
        """
        self._refuse_dropout()
        self.flush()
        self.weights.begin(None, ())
        (value,) = self._through([function], self._load_clean, self._select_clean)
        return value

    def evaluate(self, batch: Any) -> float:
        """The mean loss of this rank's `batch` (or closure), over the data shards of all ranks."""
        with self._together(2):
            loss, count = as_loss(self.run(self._function(batch)))
        speaks = self.ranks.counts_terms and count > 0
        total, terms = self._sum([loss * count, float(count)] if speaks else [0.0, 0.0])
        return total / terms if terms else math.nan

    def generate(self, *arguments: Any, **options: Any) -> Tensor:
        """`model.generate` with the weights as they are."""
        generate: Any = self.model.generate
        return self.run(partial(generate, *arguments, **options))

    def state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """The model's state as `model.state_dict()` names it, on the CPU, with the last update, as it is stored.

        All ranks call it; with `rank0_only` rank 0 alone keeps what it finds, and the others get nothing.
        """
        self.flush()
        keeps = self.ranks.rank == 0 or not rank0_only
        held: dict[int, Tensor] = {}
        for unit in self._unit_tensors():
            if keeps:
                held |= {number: value.to("cpu", copy=True) for number, value in unit.items()}
        if not keeps:
            return {}
        state = self.model.state_dict(keep_vars=True)
        return {
            name: held[id(value)] if id(value) in held else value.detach().to("cpu", copy=True)
            for name, value in state.items()
        }

    def trained_units(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What stays, then block after block: its name, and its trained tensors by name, on the CPU as they are stored.

        A checkpoint needs no more room than a block. The tensors are the engine's own until the next one is asked for.
        All ranks go through all of it.
        """
        self.flush()
        units = [self.layout.resident, *self.layout.blocks]
        for unit, tensors in zip(units, self._unit_tensors(), strict=True):
            entries = [entry for bucket in unit.buckets if bucket.trainable for entry in bucket.entries]
            yield unit.name, {entry.name: tensors[id(entry.parameters[0])].cpu() for entry in entries}

    def trained_state(self) -> dict[str, Tensor]:
        """The trained tensors alone, by name in the model's order, as they are stored. All ranks call it."""
        found = {name: value.clone() for _, unit in self.trained_units() for name, value in unit.items()}
        return {name: found[name] for name in self.layout.trained}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of `state_dict` or `trained_state`; what waits for the next step is forgotten.

        Raises `InputError` where a trained tensor is missing or of another shape; nothing is changed then.
        """
        units = [*self.layout.blocks, self.layout.resident]
        wanted = {e.name: e for unit in units for bucket in unit.buckets if bucket.trainable for e in bucket.entries}
        # files say shapes without being read
        shapes = getattr(state, "shapes", None) or {name: value.shape for name, value in state.items()}
        for name, entry in wanted.items():
            if name not in shapes:
                raise InputError(f"expected {name} in the state, found none")
            if tuple(shapes[name]) != tuple(entry.shape):
                raise InputError(f"expected {name} of shape {tuple(entry.shape)}, got {tuple(shapes[name])}")
        self.pending = None
        self.pipeline.begin(None)
        self.pipeline.load(state)
        self.weights.load(state)

    def close(self) -> None:
        """Apply what waits and let go of the model: it holds its weights itself and can be used without us.

        Every parameter is again where it was, in the type that it had (`state_dict` keeps a master copy of another
        type). All ranks call it where they hold slices.
        """
        self.flush()
        units = [self.layout.resident, *self.layout.blocks]
        for unit, tensors in zip(units, self._unit_tensors(), strict=True):
            for entry in (entry for bucket in unit.buckets for entry in bucket.entries):
                device, dtype = self._homes[id(entry.parameters[0])]
                value = tensors[id(entry.parameters[0])].to(device, dtype, copy=True)
                for parameter in entry.parameters:
                    parameter.data = value
        self.weights.move_buffers_back()
        for hook in self._hooks:
            hook.remove()

    def check_ranks(self) -> None:
        """Compare the weights of all ranks. Raises `RanksDifferError` naming the blocks that differ.

        Blocks of which each rank holds a slice are not there twice; what stays is compared.
        """
        if differing := self._differing():
            raise RanksDifferError(f"expected the same weights on all ranks, got others in {', '.join(differing)}")

    @property
    def scalar_bytes(self) -> int:
        """What this rank has sent for its gradients and losses so far."""
        return self.wire.scalar_bytes

    # --- the step ---------------------------------------------------------------------------------------

    def _losses(self, batch: Any, seeds: tuple[int, ...]) -> list[tuple[float, int]]:
        """What this rank's forward passes found, with the update of the last step applied on the way."""
        with self._together(2 * self.config.n_directions + 1):
            self._refuse_dropout()
            functions = [self._function(batch)] * len(self._streams)
            if self.pipeline.due:
                self._settle()  # what a failure left
            self._begin(seeds)
            return [as_loss(value) for value in self._through(functions, partial(self._load, seeds), self._select)]

    def _begin(self, seeds: tuple[int, ...]) -> None:
        """Update what stays and, from now on, each block as it comes: from here the update is the pipeline's."""
        self.weights.begin(self.pending, seeds)
        self.pipeline.begin(self.pending)
        self.pending = None

    def _refuse_dropout(self) -> None:
        if self.model.training:
            check_deterministic(self.model)

    @contextmanager
    def _together(self, numbers: int) -> Iterator[None]:
        """Where this rank fails, the others, who wait in a sum of so many `numbers`, are told (NaN for the terms)."""
        try:
            yield
        except RankLostError:
            raise
        except Exception:
            if self.pipeline.slices > 1:
                self.wire.hang_up()
            elif self.ranks.group is not None:
                with suppress(RankLostError):
                    self.wire.sum([0.0] * (numbers - 1) + [math.nan])
            raise

    def _sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, of which the last is a count. Raises `RankLostError` where a rank failed."""
        sums = self.wire.sum(values)
        if math.isnan(sums[-1]):
            raise RankLostError(
                f"rank {self.ranks.rank} of {self.ranks.world} stops: another rank failed in this step, which is undone"
            )
        return sums

    def _function(self, batch: Any) -> Callable[[], Any]:
        if callable(batch):
            return batch
        given = to_device(batch, self.device) if isinstance(batch, Mapping) else batch
        return partial(self.objective, self.model, given)

    def _through(
        self,
        functions: Sequence[Callable[[], Any]],
        load: Callable[[int], None],
        select: Callable[[int, int | None], None],
    ) -> list[Any]:
        guarded = [self._guarded(function) for function in functions]
        try:
            values = self._lockstep.run(guarded, load, select, self._leave)
        except RankLostError:
            raise  # what is left to do would wait for that rank
        except BaseException:
            # what was interrupted may have left a turn too many
            self._lockstep = Lockstep()
            if self.pipeline.slices > 1:
                self.wire.hang_up()  # others wait for slices, nobody knows how many
            else:
                self._settle()  # a closure that fails must not leave half an update behind
            raise
        self._settle()
        return values

    def _settle(self) -> None:
        self.pipeline.settle()
        self.pipeline.drain()
        self.pipeline.rest_again()
        self.weights.point_rest()

    def _load(self, seeds: tuple[int, ...], block: int) -> None:
        buckets, update = self.pipeline.hold(block)
        self._started = time.perf_counter()
        self.weights.perturb(block, buckets, update, seeds)
        self._changed = update is not None
        self.pipeline.updated(block)

    def _load_clean(self, block: int) -> None:
        buckets, _ = self.pipeline.hold(block)
        self._started = time.perf_counter()
        self._changed = False
        self.weights.show(block, buckets)

    def _select(self, stream: int, block: int | None) -> None:
        self.weights.point(self._streams[stream], block)

    def _select_clean(self, stream: int, block: int | None) -> None:
        self.weights.point(None, block)

    def _leave(self, block: int) -> None:
        self.link.computing(block, self._started)
        self.pipeline.release(block, self._changed)

    def _arrive(self, number: int, module: nn.Module, inputs: Any) -> None:
        if self._lockstep.running:
            self._lockstep.arrive(number)

    def _guarded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Gradients, autocast and the GPU's stream are a thread's own, and are taken over from the caller's; autocast's
        cache of cast weights would outlive the weights."""
        kind = self.device.type
        stream = torch.cuda.current_stream(self.device) if kind == "cuda" else None
        cast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def call() -> Any:
            mixed = torch.autocast(kind, dtype, enabled=cast, cache_enabled=False)
            with torch.no_grad(), mixed, nullcontext() if stream is None else torch.cuda.stream(stream):
                return function()

        return call

    def _combine(self, losses: Sequence[tuple[float, int]], seeds: tuple[int, ...]) -> ZOStep:
        """One sum over all ranks of the losses weighted by their terms, and of the terms (sections 2.7 and 2.8)."""
        directions = self.config.n_directions
        values = [0.0] * (2 * directions + 1)
        for (direction, sign), (loss, count) in zip(self._streams, losses, strict=True):
            # a shard that asks for nothing may say NaN
            values[2 * direction + sign] += loss * count if count else 0.0
        values[-1] = float(losses[0][1]) if losses and self.ranks.counts_terms else 0.0
        *sums, terms = self._sum(values)
        if terms == 0:
            raise InputError("expected labels that are asked for, got -100 everywhere")
        means = [value / terms for value in sums]
        two_sided = self.config.estimator == "two_sided"
        plus = means[0::2]
        # one loss at theta serves all directions
        minus = means[1::2] if two_sided else [means[1]] * directions
        width = 2 * self.config.eps if two_sided else self.config.eps
        skipped = not all(math.isfinite(value) for value in means)
        grads = tuple(0.0 if skipped else (p - m) / width for p, m in zip(plus, minus, strict=True))
        mean_plus, mean_minus = (sum(side) / directions for side in (plus, minus))
        return ZOStep(self.steps, mean_plus, mean_minus, grads, seeds, int(terms), skipped)

    # --- the parts --------------------------------------------------------------------------------------

    def _own_streams(self) -> list[tuple[int, int]]:
        one_sided = self.config.estimator == "one_sided"
        if one_sided and self.ranks.direction_size > 1 and self.ranks.sign_size > 1:
            raise InputError("expected a mesh without PertP for one-sided directions over ranks, got both")
        mine = self.ranks.streams(self.config.n_directions, self.config.signs)
        if self.config.n_directions < self.ranks.direction_size:
            raise InputError(
                f"expected n_directions of at least {self.ranks.direction_size}, one a rank of the mesh's direction, "
                f"got {self.config.n_directions}"
            )
        if one_sided:
            mine = [(k, sign) for k, sign in mine if sign == 0 or k == 0]
        return mine

    def _slicing(self) -> bool:
        several = self.ranks.world > 1 and self.config.offload != "none"
        if self.config.slicing is True and not several:
            raise InputError("expected several ranks and offload for slicing=True, got one or none")
        return several and self.config.rng == "philox" if self.config.slicing == "auto" else bool(self.config.slicing)

    def _noise(self) -> rng.Noise:
        if self.config.rng == "philox":
            return rng.PhiloxNoise()
        keep = 2 * self.config.n_directions
        return rng.TorchNoise(self.layout.sizes, self.layout.dtypes, self.device, keep)

    def _link(self) -> Link:
        cuda = self.device.type == "cuda"
        return CudaLink(self.device, self.config.overlap) if cuda else Link(self.config.overlap)

    def _new_trajectory(self) -> Trajectory:
        stored = "" if self.config.offload_dtype is None else str(self.config.offload_dtype).removeprefix("torch.")
        name = rng.RNG_VERSION if self.config.rng == "philox" else "torch"
        decay, stochastic = self.config.weight_decay, self.config.stochastic_rounding
        return Trajectory(base_hash(self.model), decay, stochastic, stored, name)

    def _refuse_other_weights(self) -> None:
        """Before anything is cut into slices."""
        units = [*self.layout.blocks, self.layout.resident]
        if self.wire.differing(torch.tensor([len(units), sum(self.layout.sizes)])):
            raise InputError("expected the same model on all ranks, got others of other blocks or trained sizes")
        sums = [_unit_sum([e.parameters[0] for bucket in unit.buckets for e in bucket.entries]) for unit in units]
        if differing := self.wire.differing(torch.tensor(sums)):
            names = ", ".join(units[number].name for number in differing)
            raise InputError(f"expected the same weights on all ranks, got others in {names}")

    def _differing(self) -> list[str]:
        sums, names = [self.weights.checksum()], ["resident"]
        if self.pipeline.slices == 1:
            sums += [_unit_sum(buckets) for buckets in self.pipeline.rest]
            names += [unit.name for unit in self.layout.blocks]
        found: Int[Tensor, " units"] = torch.tensor(sums)
        return [names[number] for number in self.wire.differing(found)]

    def _unit_tensors(self) -> Iterator[dict[int, Tensor]]:
        """Every parameter's value by its id, whole: what stays, then block after block."""
        yield self.weights.tensors()
        for number, unit in enumerate(self.layout.blocks):
            found: dict[int, Tensor] = {}
            for bucket, flat in zip(unit.buckets, self.pipeline.whole_at_rest(number), strict=True):
                found |= bucket.values(flat)
            yield found


def _unit_sum(tensors: Sequence[Tensor]) -> int:
    total = 0
    for place, tensor in enumerate(tensors):
        total = (total * 1_000_003 + checksum(tensor.detach().reshape(-1)) + place) % (1 << 63)
    return total


def _device(model: nn.Module, config: ZOConfig, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    if here.type == "cpu" and config.offload != "none" and torch.cuda.is_available():  # pragma: no cover - a GPU's
        return torch.device("cuda", torch.cuda.current_device())
    return here
