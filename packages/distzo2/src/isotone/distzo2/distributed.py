"""Ranks that share a direction: PertP, DDP by scalars, both, and K directions apart (sections 2.6 to 2.8).

What a step sends for its gradient is one sum of 2 K + 1 fp64 numbers, whatever the model's size: 24 bytes at K = 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from isotone.shared.errors import InputError, check_count

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another rank failed, ended or did not answer: this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: its data shard, its directions, its sign; `group` is all of them, None for one."""

    rank: int = 0
    world: int = 1
    data: int = 0
    data_size: int = 1
    direction: int = 0
    direction_size: int = 1
    sign: int = 0
    sign_size: int = 1
    group: Any = None

    @property
    def counts_terms(self) -> bool:
        """Whether this rank speaks for its data shard: one does of those that share it."""
        return self.direction == 0 and self.sign == 0

    def streams(self, n_directions: int, signs: Sequence[int]) -> list[tuple[int, int]]:
        """The forward passes that are this rank's: pairs of a direction and an index into `signs`."""
        mine = range(self.direction, n_directions, self.direction_size)
        return [(k, s) for k in mine for s in range(len(signs)) if s % self.sign_size == self.sign]


def init_mesh(
    pertp: int = 1, ddp: int | Literal["rest"] = "rest", directions: int = 1, device: str = "cpu"
) -> dist.DeviceMesh:
    """The device mesh of dimensions "data" and "pert", and between them "direction" where `directions` is above 1.

    `pertp`: 2 puts the two signs on two ranks, 1 on one. Raises `InputError` where the sizes do not make the world.
    """
    if not dist.is_initialized():
        raise InputError("expected a torch process group: launch with torchrun, or call init_process_group first")
    world = dist.get_world_size()
    if pertp not in (1, 2):
        raise InputError(f"expected a PertP group of 2 ranks (or 1 for none), got {pertp}")
    check_count("directions", directions)
    if ddp != "rest":
        check_count("ddp", ddp)
    other = pertp * directions
    size = world // other if ddp == "rest" else ddp
    if size * other != world:
        raise InputError(f"expected a world of {max(size, 1)} x {other} ranks (data x the rest), got {world}")
    shape = (size, directions, pertp) if directions > 1 else (size, pertp)
    names = ("data", "direction", "pert") if directions > 1 else ("data", "pert")
    return dist.init_device_mesh(device, shape, mesh_dim_names=names)


def mesh_for(parallel: str, device: str) -> dist.DeviceMesh | None:
    """The mesh that a config's word names, over the whole world; None for "none"."""
    if parallel == "none":
        return None
    if parallel == "pertp":
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != 2:
            raise InputError(f"expected a PertP group of 2 ranks, got {world}; take 2d for more")
    return init_mesh(1 if parallel == "ddp" else 2, "rest", device=device)


def ranks_of(mesh: dist.DeviceMesh | None) -> Ranks:
    """This process's place in `mesh`. Raises `InputError` for a mesh without the dimensions of `init_mesh`."""
    if mesh is None:
        return Ranks()
    names = mesh.mesh_dim_names or ()
    if not {"data", "pert"} <= set(names) <= {"data", "direction", "pert"}:
        raise InputError(f"expected a mesh of dimensions data and pert, got {names}")
    place = {name: (mesh.get_local_rank(name), mesh.size(names.index(name))) for name in names}
    if place["pert"][1] > 2:
        raise InputError(f"expected a PertP group of 2 ranks (or 1 for none), got {place['pert'][1]}")
    if mesh.size() != dist.get_world_size():
        raise InputError(f"expected a mesh of all {dist.get_world_size()} ranks, got one of {mesh.size()}")
    check_backend(dist.get_backend(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    direction = place.get("direction", (0, 1))
    return Ranks(dist.get_rank(), mesh.size(), *place["data"], *direction, *place["pert"], group=dist.group.WORLD)


def check_backend(backend: str, local_ranks: int, gpus: int) -> None:
    """Raise `InputError` where nccl would have two ranks on one GPU, which it refuses."""
    if "nccl" in backend and local_ranks > gpus:
        raise InputError(f"expected a GPU for each of {local_ranks} ranks with nccl, got {gpus}; gloo shares one")


class Wire:
    """The collectives of one engine. `scalar_bytes`: what this rank gave to sums of scalars so far."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.scalar_bytes = 0
        # blocks travel from a thread of their own, and so in a group of their own; both can be left
        several = ranks.group is not None
        self.blocks: Any = dist.new_group() if several else None
        self.scalars: Any = dist.new_group() if several else None
        self._left = False

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in fp64; the same bits on every rank.

        Raises `RankLostError` where a rank is gone.
        """
        if self.ranks.group is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        self.scalar_bytes += sums.numel() * sums.element_size()
        self._collective(lambda: dist.all_reduce(sums, group=self.scalars))
        return sums.tolist()

    def hang_up(self) -> None:
        """Leave the groups for good: ranks that wait for this one stop (gloo closes its connections)."""
        if self.ranks.group is None or self._left:
            return
        self._left = True
        groups, self.blocks, self.scalars = (self.blocks, self.scalars), None, None
        for group in groups:
            dist.destroy_process_group(group)

    def together(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, if no rank's fails; all ranks call it.

        Raises this rank's own error, or `RankLostError` where another failed.
        """
        try:
            value = attempt()
        except RankLostError:
            raise
        except Exception:
            with suppress(RankLostError):
                self._failures(1)
            raise
        if self._failures(0):
            raise RankLostError(f"rank {self.ranks.rank} of {self.ranks.world} stops: another rank failed")
        return value

    def _failures(self, mine: int) -> int:
        if self.ranks.group is None:
            return mine
        count = torch.tensor(mine, device=self._device)
        self._collective(lambda: dist.all_reduce(count, group=self.scalars))
        return int(count)

    def gather(self, whole: Tensor, own: Tensor) -> int:
        """Fill `whole` with every rank's `own` slice, in rank order; returns the bytes received."""
        if self.ranks.group is None:
            whole.copy_(own)
            return 0
        raw, part = whole.view(torch.uint8), own.contiguous().view(torch.uint8)
        self._collective(lambda: dist.all_gather_into_tensor(raw, part, group=self.blocks))
        return raw.numel() - part.numel()

    def differing(self, sums: Int[Tensor, " units"]) -> list[int]:
        """The units of which not all ranks have the same checksum."""
        if self.ranks.group is None:
            return []
        low, high = sums.clone().to(self._device), sums.clone().to(self._device)
        self._collective(lambda: dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.scalars))
        self._collective(lambda: dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.scalars))
        return (low != high).nonzero().flatten().tolist()

    def from_first(self, value: int) -> int:
        """Rank 0's `value` on every rank."""
        if self.ranks.group is None:
            return value
        held = torch.tensor(value, device=self._device)
        self._collective(lambda: dist.broadcast(held, 0, group=self.scalars))
        return int(held)

    @property
    def _device(self) -> str:
        return "cuda" if "nccl" in dist.get_backend() else "cpu"

    def _collective(self, send: Any) -> None:
        if self._left:
            raise RankLostError(f"rank {self.ranks.rank} of {self.ranks.world} stops: it failed before, and left")
        try:
            send()
        except torch.OutOfMemoryError:
            raise  # of this rank's own
        except RuntimeError as error:
            # gloo's words begin with a file of its own and end with advice
            reason = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0]).split(". ")[0]
            raise RankLostError(
                f"rank {self.ranks.rank} of {self.ranks.world} stops: another rank ended or did not answer ({reason})"
            ) from None


def shard(batch: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This rank's rows of a global batch: contiguous, at most one more on some ranks than on others.

    Raises `InputError` where there are fewer rows than data shards.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    rows = {len(value) for value in tensors.values()}
    if len(rows) != 1:
        raise InputError(f"expected tensors of as many rows each, got {sorted(rows)}")
    (count,) = rows
    if count < ranks.data_size:
        raise InputError(f"expected a batch of at least {ranks.data_size} rows, one a data shard, got {count}")
    mine = slice(ranks.data * count // ranks.data_size, (ranks.data + 1) * count // ranks.data_size)
    return {**batch, **{name: value[mine] for name, value in tensors.items()}}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def checksum(flat: Tensor, first: int = 0) -> int:
    """A sum of the bits of `flat`, each weighted by its place, modulo 2**64; slices' sums add to the whole's.

    `first`: the place of its first element in the whole.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = 0
    for start in range(0, flat.numel(), 1 << 22):
        bits = flat[start : start + (1 << 22)].view(integer).to(torch.int64)
        place = torch.arange(first + start, first + start + bits.numel(), device=flat.device)
        # an odd multiplier a place, so that no single change and no exchange of two goes unseen
        total += int((bits * (place * -7046029254386353131 * 2 + 1)).sum())
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
