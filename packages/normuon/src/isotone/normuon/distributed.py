"""Who holds which part of a carrier, and how whole matrices reach the rank that orthogonalises them.

Section 2.8 of arXiv 2510.05491 (FSDP2): row shards are exchanged by one all-to-all so that each rank holds
whole matrices of its own, and a second one brings the results back. Bytes a matrix and step: 4 m n / N in
bfloat16. Columns travel as rows of the transpose. Replicated parameters (DDP) are dealt out round-robin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isotone.normuon.layout import Layout

STRATEGIES = ("round_robin", "reduce_scatter")


@dataclass(frozen=True)
class Placement:
    """Where a carrier is: whole (`dim` None), or its rows (0) or columns (1) cut over the ranks of `group`.

    `chunk`: rows (columns) of the first ranks; the last ones hold fewer, or none. `offset`: this rank's first.
    """

    dim: int | None = None
    group: Any = None
    chunk: int = 0
    offset: int = 0

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def members(self) -> tuple[int, ...]:
        """The global ranks of the group: equal on all of them, unlike the group object's identity."""
        return () if self.group is None else tuple(dist.get_process_group_ranks(self.group))


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (shared memory); any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placement_of(parameter: Tensor, layout: Layout, mesh: Any, name: str = "parameter") -> Placement:
    """The placement of `parameter`'s carrier. Raises `ValueError` on a mesh or sharding that cannot be served."""
    if not is_dtensor(parameter):
        return Placement(group=None if mesh is None else group_of(mesh))
    own, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if mesh is not None and mesh != own:
        raise ValueError(f"expected {name} on the optimizer's mesh {mesh}, got one on {own}")
    sharded = [(i, p) for i, p in enumerate(placements) if p.is_shard()]
    if any(p.is_partial() for p in placements) or len(sharded) > 1:
        raise ValueError(f"expected {name} sharded over one mesh dimension at most, got placements {placements}")
    if not sharded:
        return Placement()
    mesh_dim, placement = sharded[0]
    group = own.get_group(mesh_dim)
    shape = tuple(parameter.shape)
    dim = placement.dim % len(shape)
    per_index = layout.shape[0] // shape[0] if dim == 0 else _columns_per_index(shape, dim, layout.experts)
    if per_index is None:
        raise ValueError(f"expected {name} of shape {shape} sharded over its rows or columns, got Shard({dim})")
    chunk = math.ceil(shape[dim] / dist.get_world_size(group)) * per_index
    offset = min(own.get_local_rank(mesh_dim) * chunk, layout.shape[min(dim, 1)])
    return Placement(min(dim, 1), group, chunk, offset)


def _columns_per_index(shape: tuple[int, ...], dim: int, experts: bool) -> int | None:
    """Columns of the carrier that one index of dimension `dim` covers, None where they are not in one piece."""
    if experts:
        return 1 if dim == 2 else None
    return math.prod(shape[2:]) if dim == 1 else None


def group_of(mesh: Any) -> Any:
    """The process group of a 1-D device mesh, or the process group itself."""
    if not hasattr(mesh, "get_group"):
        return mesh
    if mesh.ndim != 1:
        raise ValueError(f"expected a 1-D mesh for parameters that are not DTensors, got {mesh}")
    return mesh.get_group()


def like_parameter(statistic: Tensor, parameter: Tensor, layout: Layout, placement: Placement) -> Tensor:
    """`statistic` (this rank's rows, or one row of columns a block) as a DTensor that DCP can save and reshard."""
    shape = tuple(parameter.shape)
    along = 0 if layout.axis == "row" else 1
    experts = layout.experts
    view: tuple[int, ...]
    if along == 0:
        view = (-1, shape[1], 1) if experts else (-1, 1)
    else:
        view = (len(layout.blocks), shape[2]) if experts else (len(layout.blocks), *shape[1:])
    if not is_dtensor(parameter):
        return statistic.reshape(view)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    kind = Shard(along) if placement.dim == along else Replicate()
    placements = [kind if p.is_shard() else Replicate() for p in parameter.placements]  # type: ignore[attr-defined]
    full = list(view)
    if along == 0:
        full[0] = shape[0]
        here = statistic.reshape(view if statistic.numel() else (0, *full[1:]))
    else:
        here = statistic.reshape(view[0], *(-1 if i == 0 else n for i, n in enumerate(view[1:])))
        if not here.numel():
            here = statistic.new_zeros(view[0], 0, *view[2:])
    stride = torch.empty(full, device="meta").stride()
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=torch.Size(full), stride=stride)


def like_weight(part: Tensor, parameter: Tensor, layout: Layout, placement: Placement) -> Tensor:
    """`part` (this rank's rows and columns) in the shape of `parameter`; a DTensor where that is one."""
    view = part.view(local(parameter).shape)
    if not is_dtensor(parameter):
        return view
    from torch.distributed.tensor import DTensor

    stride = torch.empty(parameter.shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(view, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)


def owned(count: int, group: Any, first: int) -> list[int]:
    """Which of `count` matrices are this rank's, dealt out round-robin from rank `first` on."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    return list(range((rank - first) % world, count, world))


def slots(count: int, world: int, first: int) -> list[int]:
    """Where each of `count` matrices stands among world * ceil(count / world) places, an owner's side by side."""
    each = math.ceil(count / world)
    return [(i + first) % world * each + i // world for i in range(count)]


class Exchange:
    """The journey of one bucket: `start`, `matrices` (whole ones, of this rank), `send` back, `collect`.

    `updates`: K local parts of one shape and placement, (K, rows, columns); `first`: the rank that owns the first of
    them. Where nothing is sharded, nothing moves.
    """

    def __init__(
        self, updates: Tensor, layout: Layout, placement: Placement, wire: torch.dtype | None, first: int = 0
    ) -> None:
        self.updates, self.layout, self.placement = updates, layout, placement
        self.wire = wire or updates.dtype
        self.world = placement.world
        self.each = math.ceil(len(updates) / self.world)  # matrices a rank owns, the last ones padding
        self.first = first
        self.slots = slots(len(updates), self.world, first)
        self.work: Any = None
        self.buffer: Tensor | None = None
        self.sent: Tensor | None = None

    def start(self) -> None:
        if self.world == 1:
            return
        if self.placement.dim is None:
            mine = owned(len(self.updates), self.placement.group, self.first)
            self.buffer = self.updates.new_zeros(self.each, *self.layout.shape)
            self.buffer[: len(mine)] = self.updates[mine]
            return
        self.sent = self._padded()
        self.buffer = torch.empty_like(self.sent)
        self.work = dist.all_to_all_single(self.buffer, self.sent, group=self.placement.group, async_op=True)

    def matrices(self) -> Tensor:
        """(matrices of this rank, rows, columns); rows past the parameter's own are cut, padding matrices zero."""
        if self.world == 1:
            return self.updates
        assert self.buffer is not None
        if self.placement.dim is None:
            return self.buffer
        self.work.wait()
        whole = self.buffer.view(self.world, self.each, *self.buffer.shape[1:]).transpose(0, 1).flatten(1, 2)
        whole = whole[:, : self.layout.shape[self.placement.dim]]
        return (whole.mT if self.placement.dim == 1 else whole).to(self.updates.dtype)

    def send(self, orthogonal: Tensor) -> None:
        if self.world == 1:
            self.sent = orthogonal
            return
        if self.placement.dim is None:
            self.sent = orthogonal.contiguous().to(self.wire)
            self.buffer = self.sent.new_empty(self.world * self.each, *self.layout.shape)
            self.work = dist.all_gather_into_tensor(self.buffer, self.sent, group=self.placement.group, async_op=True)
            return
        rows = (orthogonal.mT if self.placement.dim == 1 else orthogonal).to(self.wire)
        padded = rows.new_zeros(self.each, self.world * self.placement.chunk, rows.shape[2])
        padded[:, : rows.shape[1]] = rows
        self.sent = padded.view(self.each, self.world, self.placement.chunk, -1).transpose(0, 1).flatten(0, 1)
        self.sent = self.sent.contiguous()
        self.buffer = torch.empty_like(self.sent)
        self.work = dist.all_to_all_single(self.buffer, self.sent, group=self.placement.group, async_op=True)

    def collect(self) -> Tensor:
        """(K, local rows, local columns): this rank's part of every orthogonalised matrix."""
        if self.world == 1:
            assert self.sent is not None
            return self.sent
        assert self.buffer is not None
        self.work.wait()
        results = self.buffer[self.slots]
        if self.placement.dim is not None:
            held = self.updates.shape[1 + self.placement.dim]
            results = results[:, :held]
            results = results.mT if self.placement.dim == 1 else results
        return results.to(self.updates.dtype)

    def _padded(self) -> Tensor:
        """(world * each, chunk, other): what goes to rank r stands from r * each on; missing rows are zero."""
        parts = self.updates.mT if self.placement.dim == 1 else self.updates
        other = self.layout.shape[1 - int(self.placement.dim or 0)]
        out = torch.zeros(self.world * self.each, self.placement.chunk, other, dtype=self.wire, device=parts.device)
        out[self.slots, : parts.shape[1]] = parts.to(self.wire)
        return out


def sum_over_ranks(pieces: Sequence[tuple[Tensor, Any]]) -> None:
    """All-reduce every tensor over its group, in place: one call a group, whatever the number of tensors."""
    groups: dict[int, tuple[Any, list[Tensor]]] = {}
    for tensor, group in pieces:
        groups.setdefault(id(group), (group, []))[1].append(tensor)
    for group, tensors in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def mean_scatter(gradients: Tensor, group: Any, first: int) -> Tensor:
    """The averaged gradients of the matrices this rank owns, padded with zeros: (each, m, n) of (K, m, n) (ZeRO-2)."""
    world = dist.get_world_size(group)
    each = math.ceil(len(gradients) / world)
    padded = gradients.new_zeros(world * each, *gradients.shape[1:])
    padded[slots(len(gradients), world, first)] = gradients
    own = padded.new_empty(each, *gradients.shape[1:])
    dist.reduce_scatter_tensor(own, padded, group=group)
    return own.div_(world)


def gather_weights(own: Tensor, count: int, group: Any, first: int) -> Tensor:
    """The weights of all `count` matrices from those each rank owns."""
    world = dist.get_world_size(group)
    whole = own.new_empty(world * own.shape[0], *own.shape[1:])
    dist.all_gather_into_tensor(whole, own.contiguous(), group=group)
    return whole[slots(count, world, first)]
