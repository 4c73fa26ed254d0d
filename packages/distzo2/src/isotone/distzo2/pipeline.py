"""Blocks on their way: at rest on the host (or on disk), in one of three places on the device, and back (section 2.4).

A place takes the next block when the one before it has left; so no more than three are ever on the device. With n
slices each rank keeps 1/n of every block: it brings that over its own link, applies the last update to it, and the
ranks gather the whole (section 2.9).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from isotone.distzo2 import kernels
from isotone.distzo2.config import ZOConfig
from isotone.distzo2.distributed import Wire
from isotone.distzo2.kernels import Update
from isotone.distzo2.layout import Bucket, Unit
from isotone.distzo2.link import Link, Ticket, copy
from isotone.distzo2.rng import Noise
from isotone.shared.errors import InputError

PLACES = 3
"""One is computed, one on its way in, one on its way out; with slices a fourth is being gathered."""


def stored_dtype(bucket: Bucket, config: ZOConfig) -> torch.dtype:
    """The type of a bucket at rest and on the link."""
    return config.offload_dtype or bucket.dtype if bucket.dtype.is_floating_point else bucket.dtype


def working_dtype(bucket: Bucket, config: ZOConfig) -> torch.dtype:
    """The type of a bucket in the forward passes."""
    return config.working_dtype or bucket.dtype if bucket.dtype.is_floating_point else bucket.dtype


@dataclass
class Place:
    """Room for one block on the device: whole buckets, this rank's slices of them, and what must end before reuse."""

    whole: list[Tensor]
    slices: list[Tensor]
    block: int | None = None
    ready: Ticket | None = None
    before: list[Ticket | None] = field(default_factory=list)
    freed: int = 0


class Pipeline:
    """The blocks of one engine."""

    def __init__(
        self,
        blocks: list[Unit],
        config: ZOConfig,
        device: torch.device,
        link: Link,
        wire: Wire,
        slices: int,
        noise: Noise,
    ) -> None:
        self.blocks, self.config, self.device = blocks, config, device
        self.link, self.wire, self.slices, self.noise = link, wire, slices, noise
        self.offloads = config.offload != "none"
        self.rest = [self._laid_down(number, unit) for number, unit in enumerate(blocks)]
        self._room = [self._buffers() for _ in range(PLACES + (slices > 1))] if self.offloads else []
        self._places = [Place([], []) for _ in self._room]
        self.rest_again()
        self._update: Update | None = None
        self._due: set[int] = set()
        self._held: set[int] = set()
        self._leaving: dict[int, Ticket] = {}
        self._releases = 0

    def begin(self, update: Update | None) -> None:
        """From now on every block that comes gets `update`, once."""
        self._update = update
        self._due = set(range(len(self.blocks))) if update else set()

    def ahead(self, block: int) -> None:
        """Start to bring what follows `block`: the next one, and with slices the one after it too."""
        for distance in range(1, 2 + (self.slices > 1)):
            self.fetch(block + distance)

    @property
    def due(self) -> list[int]:
        """The blocks that the update has not reached."""
        return sorted(self._due)

    def fetch(self, block: int) -> None:
        """Start to bring a block, if it is not there or on its way."""
        if not self.offloads or block >= len(self.blocks) or self._place_of(block) is not None:
            return
        number = self._free()
        before = self._places[number].before
        whole, parts = self._fitted(number, block)
        place = self._places[number] = Place(whole, parts, block)
        # a forward pass that comes back to a block finds it as it was offloaded
        after = [*before, self._leaving.pop(block, None)]
        sides = [self._pieces(block, side) for side in (parts, self.rest[block])]
        up = self.link.submit("upload", block, partial(_copies, *sides), after)
        place.ready = up
        if self.slices > 1:
            self._exchange(place, block, up)

    def hold(self, block: int) -> tuple[list[Tensor], Update | None]:
        """The whole buckets of a block on the device, and the update that the caller must apply to them, if any.

        When it is applied the caller says so by `updated`.
        """
        if not self.offloads:
            return self.rest[block], self._update if block in self._due else None
        self._held.add(block)
        self.fetch(block)
        place = self._place_of(block)
        assert place is not None and place.ready is not None
        place.ready.wait()
        self.ahead(block)
        return place.whole, self._update if block in self._due and self.slices == 1 else None

    def updated(self, block: int) -> None:
        """The update that `hold` gave is applied."""
        if self.slices == 1:
            self._due.discard(block)

    def release(self, block: int, changed: bool) -> None:
        """Let a block go; it is offloaded if the caller `changed` it."""
        self._held.discard(block)
        place = self._place_of(block)
        if place is None:
            return
        computed = self.link.mark()
        self._releases += 1
        place.block, place.before, place.freed = None, [*place.before, computed], self._releases
        if changed and self.slices == 1:
            out = self._offload(place, block, computed)
            place.before.append(out)

    def settle(self) -> None:
        """Bring the update to every block that it has not reached."""
        for block in self.due:
            if block not in self._due:
                continue  # it was updated on its way in
            whole, update = self.hold(block)
            if update:
                self.advance(block, whole, update)
                self.updated(block)
            self.release(block, changed=update is not None)

    def advance(self, block: int, buckets: list[Tensor], update: Update) -> None:
        """Apply `update` to the whole buckets of a block."""
        for bucket, flat in zip(self.blocks[block].buckets, buckets, strict=True):
            if bucket.trainable:
                self._advance(flat, bucket, update, 0, bucket.size)

    def drain(self) -> None:
        """Wait until everything is at rest; nothing that was fetched in vain stays on the device."""
        for place in self._places:
            if place.block is not None:
                assert place.ready is not None
                place.ready.wait()
                self.release(place.block, changed=False)
        for ticket in self._leaving.values():
            ticket.wait()  # a thread's error is raised here
        self._leaving.clear()
        self.link.finish()

    def whole_at_rest(self, block: int) -> list[Tensor]:
        """The buckets of a block as they rest, gathered from all ranks where they hold slices."""
        if self.slices == 1:
            return self.rest[block]
        found = []
        for bucket, part in zip(self.blocks[block].buckets, self.rest[block], strict=True):
            whole = torch.empty(bucket.size, dtype=part.dtype, device=self.device)
            self.wire.gather(whole, part.to(self.device))
            found.append(whole.cpu())
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the trained tensors of every block from a state that has them all."""
        for unit, resting in zip(self.blocks, self.rest, strict=True):
            for bucket, part in zip(unit.buckets, resting, strict=True):
                if bucket.trainable:
                    whole = torch.zeros(bucket.size, dtype=part.dtype)
                    bucket.take(whole, state)
                    start, stop = self._own(bucket)
                    part.copy_(whole[start:stop])

    def _free(self) -> int:
        """A place to bring a block to; one that was fetched in vain makes room."""
        free = [i for i, place in enumerate(self._places) if place.block is None]
        if not free:
            idle = next(place for place in self._places if place.block not in self._held)
            assert idle.block is not None and idle.ready is not None
            idle.ready.wait()
            self.release(idle.block, changed=False)
            return self._places.index(idle)
        # the one that has been free for longest: what leaves it is likeliest to have left
        return min(free, key=lambda i: self._places[i].freed)

    def _place_of(self, block: int) -> Place | None:
        return next((place for place in self._places if place.block == block), None)

    def _own(self, bucket: Bucket) -> tuple[int, int]:
        """Where this rank's slice of a bucket lies."""
        share = bucket.size // self.slices
        first = self.wire.ranks.rank * share if self.slices > 1 else 0
        return first, first + share

    def _exchange(self, place: Place, block: int, up: Ticket) -> None:
        """Update this rank's slices, send them back, and gather the whole from all ranks."""
        update = self._update if block in self._due else None
        self._due.discard(block)
        if update is not None:
            up = self.link.submit("exchange", block, partial(self._advance_slices, block, place.slices, update), [up])
            place.before.append(self._offload(place, block, up))

        def gather() -> int:
            pairs = zip(place.whole, place.slices, strict=True)
            return sum(self.wire.gather(whole, part) for whole, part in pairs)

        place.ready = self.link.submit("exchange", block, gather, [up])

    def _advance_slices(self, block: int, parts: list[Tensor], update: Update) -> int:
        for bucket, part in zip(self.blocks[block].buckets, parts, strict=True):
            if bucket.trainable:
                self._advance(part, bucket, update, *self._own(bucket))
        return 0

    def _advance(self, flat: Tensor, bucket: Bucket, update: Update, start: int, stop: int) -> None:
        kernels.advance(
            flat, bucket.segments(start, stop), self.noise, update, stochastic=self.config.stochastic_rounding
        )

    def _offload(self, place: Place, block: int, after: Ticket | None) -> Ticket:
        trained = [i for i, bucket in enumerate(self.blocks[block].buckets) if bucket.trainable]
        sides = [self._pieces(block, side, trained) for side in (self.rest[block], place.slices)]
        ticket = self.link.submit("offload", block, partial(_copies, *sides), [after])
        self._leaving[block] = ticket
        return ticket

    def _laid_down(self, number: int, unit: Unit) -> list[Tensor]:
        """A block's buckets at rest; its parameters let go of what they held, so that one block is there twice."""
        found = []
        for place, bucket in enumerate(unit.buckets):
            resting = self._at_rest(number, place, bucket)
            bucket.point(resting if self.slices == 1 else _missing(bucket.size, resting.dtype))
            found.append(resting)
        return found

    def _pieces(self, block: int, flats: list[Tensor], chosen: list[int] | None = None) -> list[Tensor]:
        """What one copy each moves: this rank's slice of each (chosen) bucket, or of each tensor in it."""
        chosen = list(range(len(flats))) if chosen is None else chosen
        if self.config.flat_buckets:
            return [flats[number] for number in chosen]
        pieces = []
        for number in chosen:
            bucket = self.blocks[block].buckets[number]
            for part in bucket.segments(*self._own(bucket)):
                pieces.append(flats[number][part.start : part.start + part.length])
        return pieces

    def _at_rest(self, block: int, number: int, bucket: Bucket) -> Tensor:
        """A bucket filled with the parameters' values, where it rests: this rank's slice of it."""
        dtype = stored_dtype(bucket, self.config)
        whole = torch.zeros(bucket.size, dtype=dtype, device="cpu" if self.offloads else self.device)
        bucket.gather(whole)
        start, stop = self._own(bucket)
        if self.config.offload == "disk":
            resting = _on_disk(
                self.config, f"block-{block:05d}-{number}-rank-{self.wire.ranks.rank}", dtype, stop - start
            )
            resting.copy_(whole[start:stop])
        else:
            resting = whole if self.slices == 1 else whole[start:stop].clone()
            if self.config.pin_memory and self.offloads and self.device.type == "cuda":  # pragma: no cover - a GPU's
                resting = resting.pin_memory()
        return resting

    def rest_again(self) -> None:
        """Make the parameters views of what is at rest; of nothing (NaN) where that is a slice."""
        for unit, buckets in zip(self.blocks, self.rest, strict=True):
            for bucket, resting in zip(unit.buckets, buckets, strict=True):
                bucket.point(resting if self.slices == 1 else _missing(bucket.size, resting.dtype))

    def _buffers(self) -> dict[torch.dtype, Tensor]:
        """One flat buffer a type that the largest block fits into, its slices behind it."""
        sizes: dict[torch.dtype, int] = {}
        for unit in self.blocks:
            here: dict[torch.dtype, int] = {}
            for bucket in unit.buckets:
                dtype = stored_dtype(bucket, self.config)
                share = bucket.size // self.slices if self.slices > 1 else 0
                here[dtype] = here.get(dtype, 0) + bucket.size + share
            for dtype, size in here.items():
                sizes[dtype] = max(size, sizes.get(dtype, 0))
        return {dtype: torch.empty(size, dtype=dtype, device=self.device) for dtype, size in sizes.items()}

    def _fitted(self, place: int, block: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of a place's buffers for a block: whole buckets, and slices (the same where there is one)."""
        used: dict[torch.dtype, int] = {}

        def cut(dtype: torch.dtype, size: int) -> Tensor:
            start = used.get(dtype, 0)
            used[dtype] = start + size
            return self._room[place][dtype][start : start + size]

        buckets = self.blocks[block].buckets
        dtypes = [stored_dtype(bucket, self.config) for bucket in buckets]
        whole = [cut(dtype, bucket.size) for dtype, bucket in zip(dtypes, buckets, strict=True)]
        if self.slices == 1:
            return whole, whole
        return whole, [cut(d, b.size // self.slices) for d, b in zip(dtypes, buckets, strict=True)]


def _copies(targets: list[Tensor], sources: list[Tensor]) -> int:
    return sum(copy(target, source) for target, source in zip(targets, sources, strict=True))


def _on_disk(config: ZOConfig, name: str, dtype: torch.dtype, size: int) -> Tensor:
    assert config.disk_folder is not None
    folder = Path(config.disk_folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a file of this engine alone, whatever else uses the folder; its room is free again when nothing maps it
    handle, path = tempfile.mkstemp(".bin", f"{name}-", folder)
    try:
        # a file with holes would end the process where the disk is full
        os.posix_fallocate(handle, 0, max(1, size * dtype.itemsize))
        return torch.from_file(path, shared=True, size=size, dtype=dtype)
    except OSError as error:
        raise InputError(f"expected room for the blocks in {str(folder)!r}: {error.strerror}") from None
    finally:
        os.close(handle)
        os.unlink(path)


@functools.cache
def _missing(size: int, dtype: torch.dtype) -> Tensor:
    """What parameters hold whose values are on other ranks."""
    return torch.full((1,), float("nan") if dtype.is_floating_point else 0, dtype=dtype).expand(size)
