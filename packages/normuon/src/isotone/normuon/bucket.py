"""Matrices of one shape and placement as one batch: their state, their gradients, their row statistics.

Everything that does not change from one step to the next (layouts, placements, which rows belong to which block)
is found once. Momentum and second moments of a bucket are one tensor each, of which every parameter's state is a
view, so that a step costs a few calls a bucket and not a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.normuon import distributed as ranks
from isotone.normuon.layout import Layout, layout_of
from isotone.normuon.normalize import shape_factor

State = MutableMapping[Tensor, dict[str, Any]]


class Bucket:
    """K parameters of one layout, placement, dtype and device; `layout` is of each."""

    def __init__(
        self, parameters: Sequence[Tensor], layout: Layout, placement: ranks.Placement, first: int = 0
    ) -> None:
        self.parameters = list(parameters)
        self.layout = layout
        self.placement = placement
        self.first = first
        """The rank that owns the first matrix; the others follow round-robin."""
        rows, columns = _held(ranks.local(self.parameters[0]), layout, placement)
        self.shape = (rows, columns)
        """Rows and columns that this rank holds of each carrier."""
        self.dtype = ranks.local(self.parameters[0]).dtype
        self.spans = _local_spans(layout, placement, rows)
        """(block, first local row, past its last) of the blocks that this rank's rows touch."""
        sizes = [stop - start for _, start, stop in self.spans]
        device = self.parameters[0].device
        self.block_of_row = torch.repeat_interleave(
            torch.tensor([block for block, _, _ in self.spans], dtype=torch.long, device=device),
            torch.tensor(sizes, dtype=torch.long, device=device),
            output_size=sum(sizes),
        )
        self.owned: Bucket | None = None
        """Under ZeRO-2, the matrices whose state and update are this rank's, as a bucket of their own."""
        self._views: dict[str, list[Tensor]] = {}
        self._stacked: dict[str, Tensor] = {}
        self._factors: dict[tuple[str | None, torch.dtype], Tensor] = {}

    def shape_factors(self, scale: str | None, dtype: torch.dtype) -> Float[Tensor, " blocks"]:
        """`shape_factor` of each block; copied to the device once."""
        if (scale, dtype) not in self._factors:
            factors = [shape_factor(scale, *matrix) for matrix in self.layout.matrices]
            device = ranks.local(self.parameters[0]).device
            self._factors[scale, dtype] = torch.tensor(factors, dtype=dtype, device=device)
        return self._factors[scale, dtype]

    def gradients(self) -> Float[Tensor, "k rows columns"]:
        """The gradients, copied, in the weights' dtype."""
        parts = []
        for parameter in self.parameters:
            gradient = parameter.grad
            assert gradient is not None
            if gradient.layout != torch.strided:
                raise ValueError(f"expected dense gradients, got {gradient.layout}")
            parts.append(self._carrier(gradient))
        return torch.stack(parts).to(self.dtype)

    def weights(self) -> list[Tensor]:
        """The carriers of the weights: views, or copies where a weight's memory has another order."""
        return [self._carrier(parameter) for parameter in self.parameters]

    def write_back(self, weights: Sequence[Tensor]) -> None:
        """Store what `weights()` had to copy (a convolution whose channels lie last)."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            part = ranks.local(parameter)
            if weight is not part and weight.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
                part.copy_(weight.view(part.shape))

    def momentum(self, state: State) -> Float[Tensor, "k rows columns"]:
        """The momentum of all; zero at first. Its parts are `state[p]["momentum_buffer"]`."""
        return self._state(state, "momentum_buffer", self.shape, self.dtype, ranks.like_weight)

    def second_moments(self, state: State, sums: Tensor) -> Tensor:
        """v of all, in the shape and dtype of `sums`; its parts are `state[p]["second_moment"]`."""
        return self._state(state, "second_moment", tuple(sums.shape[1:]), sums.dtype, ranks.like_parameter)

    def _state(self, state: State, key: str, shape: tuple[int, ...], dtype: torch.dtype, wrap: Any) -> Tensor:
        views = self._views.get(key)
        if views is not None and all(state[p].get(key) is view for p, view in zip(self.parameters, views, strict=True)):
            return self._stacked[key]
        # new, or the user or a checkpoint has put other tensors there: take what they hold
        stacked = torch.zeros(len(self.parameters), *shape, dtype=dtype, device=self.parameters[0].device)
        views = []
        for slot, parameter in zip(stacked, self.parameters, strict=True):
            if key in state[parameter]:
                held = ranks.local(state[parameter][key])
                if held.numel() != slot.numel():
                    raise ValueError(
                        f"expected {key} of shape {shape}, got {tuple(held.shape)}: another axis or layout"
                    )
                slot.copy_(held.reshape(shape))
            views.append(wrap(slot, parameter, self.layout, self.placement))
            state[parameter][key] = views[-1]
        self._stacked[key], self._views[key] = stacked, views
        return stacked

    def _carrier(self, tensor: Tensor) -> Tensor:
        part = ranks.local(tensor)
        return part if part.shape == self.shape else part.reshape(self.shape)

    # --- statistics (section 2.9, steps 4 and 5) ------------------------------------------------------------

    def square_sums(self, orthogonal: Float[Tensor, "k rows columns"]) -> Tensor:
        """Sums of squares, float32 or better: (K, local rows), or (K, blocks, local columns) for axis "column"."""
        dtype = torch.promote_types(orthogonal.dtype, torch.float32)
        if self.layout.axis == "row":
            return torch.linalg.vector_norm(orthogonal, dim=2, dtype=dtype).square_()
        shape = (orthogonal.shape[0], len(self.layout.blocks), orthogonal.shape[2])
        sums = torch.zeros(shape, dtype=dtype, device=orthogonal.device)
        for block, start, stop in self.spans:
            sums[:, block] = torch.linalg.vector_norm(orthogonal[:, start:stop], dim=1, dtype=dtype).square_()
        return sums

    def means(self, sums: Tensor) -> Tensor:
        """Mean squares from `sums`."""
        if self.layout.axis == "row":
            return sums / self.layout.shape[1]
        return sums / torch.tensor(self.layout.blocks, dtype=sums.dtype, device=sums.device)[:, None]

    def norms(self, sums: Tensor, inverse: Tensor | None) -> Float[Tensor, "two k blocks"]:
        """||O||² and ||O^||² of every block from the row statistics alone; this rank's share of them."""
        after = sums if inverse is None else sums * inverse.square()
        both = torch.stack([sums, after])
        if self.layout.axis == "column":
            return both.sum(-1)
        if len(self.layout.blocks) == 1:
            return both.sum(-1, keepdim=True)
        return both.new_zeros(2, sums.shape[0], len(self.layout.blocks)).index_add_(2, self.block_of_row, both)


def make_buckets(
    parameters: Sequence[Tensor], options: Mapping[str, Any], mesh: Any, strategy: str, foreach: bool
) -> list[Bucket]:
    """The buckets of a group's parameters, in an order that is the same on every rank (section 2.9)."""
    found: dict[tuple, tuple[list[Tensor], Layout, ranks.Placement]] = {}
    for index, parameter in enumerate(parameters):
        layout = layout_of(parameter.shape, options)
        placement = ranks.placement_of(parameter, layout, mesh)
        where = (-1 if placement.dim is None else placement.dim, placement.members)
        kind = (str(parameter.dtype), str(parameter.device))
        key = (layout.shape, layout.blocks, layout.axis, *where, *kind, -1 if foreach else index)
        # a permuted or sharded tensor of one carrier may hold another number of rows: only equal shapes share one
        found.setdefault((*key, tuple(ranks.local(parameter).shape)), ([], layout, placement))[0].append(parameter)
    buckets, dealt = [], 0
    for key in sorted(found):
        bucket = Bucket(*found[key], first=dealt % found[key][2].world)
        buckets.append(bucket)
        dealt += len(bucket.parameters)
        if strategy == "reduce_scatter" and bucket.placement.dim is None and bucket.placement.world > 1:
            mine = ranks.owned(len(bucket.parameters), bucket.placement.group, bucket.first)
            owned = [bucket.parameters[i] for i in mine]
            bucket.owned = Bucket(owned, bucket.layout, ranks.Placement()) if owned else None
    return buckets


def _held(part: Tensor, layout: Layout, placement: ranks.Placement) -> tuple[int, int]:
    """This rank's rows and columns of the carrier, either of which may be none."""
    columns = layout.shape[1]
    if placement.dim == 1:
        columns = max(0, min(placement.chunk, columns - placement.offset))
    return (part.numel() // columns if columns else layout.shape[0]), columns


def _local_spans(layout: Layout, placement: ranks.Placement, held: int) -> list[tuple[int, int, int]]:
    offset = placement.offset if placement.dim == 0 else 0
    spans, start = [], 0
    for block, rows in enumerate(layout.blocks):
        first, last = max(start - offset, 0), min(start + rows - offset, held)
        if first < last:
            spans.append((block, first, last))
        start += rows
    return spans
