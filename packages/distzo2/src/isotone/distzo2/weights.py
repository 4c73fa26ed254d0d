"""What the forward passes see: a block's weights perturbed for each of them, and the tensors that stay on the device.

Perturbed weights are written into buffers of their own; the weights themselves are touched by updates alone, so that
steps at rate 0 leave them as they are, bit for bit (section 7, item 9).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isotone.distzo2 import kernels
from isotone.distzo2.config import ZOConfig
from isotone.distzo2.distributed import checksum
from isotone.distzo2.kernels import Update
from isotone.distzo2.layout import Bucket, Layout
from isotone.distzo2.pipeline import stored_dtype, working_dtype
from isotone.distzo2.rng import Noise

LOST = 0.5
"""The share of an update that rounding may swallow before a warning says so."""
_SAMPLE = 1 << 20
"""Elements that are looked at for it."""
Stream = tuple[int, int]
"""A forward pass: its direction, and whether it is the first of the two losses or the second."""


class Weights:
    """The buffers that the parameters are views of while a stream runs. `streams`: this rank's forward passes."""

    def __init__(
        self, layout: Layout, config: ZOConfig, device: torch.device, noise: Noise, streams: list[Stream]
    ) -> None:
        self.blocks, self.config, self.device, self.noise = layout.blocks, config, device, noise
        self.streams = streams
        # what is not trained and stays needs no bucket
        self.resident = [bucket for bucket in layout.resident.buckets if bucket.trainable]
        self._frozen = [bucket for bucket in layout.resident.buckets if not bucket.trainable]
        self._originals: dict[int, Tensor] = {}
        self._moved: list[tuple[nn.Module, str, torch.device]] = []
        self.rest = [torch.zeros(b.size, dtype=stored_dtype(b, config), device=device) for b in self.resident]
        for bucket, flat in zip(self.resident, self.rest, strict=True):
            bucket.gather(flat)
            bucket.point(flat)  # what it was is free again
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._shown: dict[Stream | None, list[Tensor]] = {}
        self._shown_rest: dict[Stream | None, list[Tensor]] = {}
        self._watched = False
        self._pointed: Stream | None = None
        self._rest_pointed = False

    def move_rest(self, model: nn.Module) -> None:
        """Bring what stays to the device: tensors that are not trained, and the buffers of all modules.

        Where the forward passes take another type, the host keeps those tensors as they are.
        """
        for bucket in self._frozen:
            dtype = working_dtype(bucket, self.config)
            for entry in bucket.entries:
                value = entry.parameters[0].data
                if dtype != bucket.dtype:
                    self._originals |= dict.fromkeys(map(id, entry.parameters), value.cpu())
                value = value.to(self.device, dtype)
                for parameter in entry.parameters:
                    parameter.data = value
        for module in model.modules():
            for name, value in module.named_buffers(recurse=False):
                self._moved.append((module, name, value.device))
                module._buffers[name] = value.to(self.device)

    def move_buffers_back(self) -> None:
        """Put the buffers of all modules where `move_rest` found them."""
        for module, name, device in self._moved:
            module._buffers[name] = module.get_buffer(name).to(device)

    def begin(self, update: Update | None, seeds: tuple[int, ...]) -> None:
        """Update what stays, and perturb it for each stream for the whole step (none where `seeds` is empty)."""
        self._shown_rest = self._written("rest", self.resident, self.rest, update, seeds)
        self._rest_pointed = False

    def perturb(self, block: int, buckets: list[Tensor], update: Update | None, seeds: tuple[int, ...]) -> None:
        """Update a block that has come and write it perturbed for each stream."""
        self._shown = self._written("block", self.blocks[block].buckets, buckets, update, seeds)

    def show(self, block: int, buckets: list[Tensor]) -> None:
        """A block that has come, as it is."""
        self._shown = self._written("block", self.blocks[block].buckets, buckets, None, ())

    def point(self, stream: Stream | None, block: int | None) -> None:
        """Make the parameters of what stays, and of a block, views of what a stream is to see (None: the weights)."""
        if not self._rest_pointed or stream != self._pointed:
            self._point(self.resident, self._shown_rest[stream])
            self._pointed, self._rest_pointed = stream, True
        if block is not None:
            self._point(self.blocks[block].buckets, self._shown[stream])

    def point_rest(self) -> None:
        """Make the parameters of what stays views of the weights again."""
        self._point(self.resident, self.rest)
        self._rest_pointed = False

    def tensors(self) -> dict[int, Tensor]:
        """The tensors that stay, as they are stored, by their parameters' ids."""
        frozen = [p for bucket in self._frozen for entry in bucket.entries for p in entry.parameters]
        found = {id(p): self._originals.get(id(p), p.data) for p in frozen}
        for bucket, flat in zip(self.resident, self.rest, strict=True):
            found |= bucket.values(flat)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what stays from a state that has every trained tensor."""
        for bucket, flat in zip(self.resident, self.rest, strict=True):
            bucket.take(flat, state)

    def checksum(self) -> int:
        """A checksum of what stays and is trained."""
        return sum(checksum(flat) for flat in self.rest) % (1 << 63)

    def _point(self, buckets: list[Bucket], flats: list[Tensor]) -> None:
        for bucket, flat in zip(buckets, flats, strict=True):
            bucket.point(flat)

    def _written(
        self, where: str, buckets: list[Bucket], flats: list[Tensor], update: Update | None, seeds: tuple[int, ...]
    ) -> dict[Stream | None, list[Tensor]]:
        """The buffers that each stream sees, bucket by bucket; key None is the weights themselves."""
        shown: dict[Stream | None, list[Tensor]] = {stream: [] for stream in [None, *self.streams]}
        moved = [stream for stream in self.streams if self._moves(stream)] if seeds else []
        # what may fail for want of room does so before the first update
        room = [
            {stream: self._buffer((where, number, stream), bucket) for stream in moved if bucket.trainable}
            for number, bucket in enumerate(buckets)
        ]
        for number, (bucket, flat, outs) in enumerate(zip(buckets, flats, room, strict=True)):
            if not bucket.trainable:
                clean = self._as_working((where, number), bucket, flat)
                for seen in shown.values():
                    seen.append(clean)
                continue
            self._advance(bucket, flat, update, seeds, outs)
            clean_needed = not seeds or any(not self._moves(stream) for stream in self.streams)
            clean = self._as_working((where, number), bucket, flat) if clean_needed else flat
            for stream, seen in shown.items():
                seen.append(clean if stream is None else outs.get(stream, clean))
        return shown

    def _moves(self, stream: Stream) -> bool:
        """Whether a stream's weights are perturbed: the one-sided estimator's second are not."""
        return self.config.signs[stream[1]] != 0

    def _advance(
        self,
        bucket: Bucket,
        flat: Tensor,
        update: Update | None,
        seeds: tuple[int, ...],
        outs: dict[Stream, Tensor],
    ) -> None:
        """The update with the first direction's perturbations in one pass, and a pass for each further direction."""
        segments = bucket.segments()
        before = flat[:_SAMPLE].clone() if update is not None and self._watches(flat) else None
        for direction in sorted({stream[0] for stream in outs}):
            kernels.advance(
                *(flat, segments, self.noise, update),
                seed=seeds[direction],
                eps=self.config.eps,
                plus=outs.get((direction, 0)),
                minus=outs.get((direction, 1)),
                stochastic=self.config.stochastic_rounding,
            )
            update = None
        if update is not None:
            kernels.advance(flat, segments, self.noise, update, stochastic=self.config.stochastic_rounding)
        if before is not None:
            self._warn(kernels.lost_updates(before, flat[:_SAMPLE]))

    def _watches(self, flat: Tensor) -> bool:
        """Whether an update may be lost to rounding, and none has been looked at yet."""
        return not (self._watched or self.config.stochastic_rounding) and flat.dtype in (torch.float16, torch.bfloat16)

    def _warn(self, lost: float) -> None:
        self._watched = True
        if lost > LOST:
            warnings.warn(
                f"rounding to half precision swallowed {100 * lost:.0f} % of an update: take stochastic_rounding=True, "
                f"or offload_dtype=torch.float32 for a master copy",
                stacklevel=2,
            )

    def _as_working(self, key: tuple[object, ...], bucket: Bucket, flat: Tensor) -> Tensor:
        """A bucket in the type of the forward passes: itself where that is how it is stored."""
        if flat.dtype == working_dtype(bucket, self.config):
            return flat
        return self._buffer((*key, "clean"), bucket).copy_(flat)

    def _buffer(self, key: tuple[object, ...], bucket: Bucket) -> Tensor:
        """A buffer that is kept from block to block, at least as long as the bucket."""
        dtype = working_dtype(bucket, self.config)
        kept = self._buffers.get((*key, dtype))
        if kept is None or len(kept) < bucket.size:
            # zeros, so that the padding between tensors is a number
            kept = self._buffers[(*key, dtype)] = torch.zeros(bucket.size, dtype=dtype, device=self.device)
        return kept[: bucket.size]
