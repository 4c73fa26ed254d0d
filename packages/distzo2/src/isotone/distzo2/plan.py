"""What a fine-tune will need, before it is started: memory, bytes a step, seconds a step (sections 2.4, 2.9 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from isotone.distzo2.config import check_not_negative, check_positive
from isotone.distzo2.layout import find_blocks
from isotone.shared.errors import InputError, check_count


@dataclass(frozen=True)
class Shape:
    """A model's size: its blocks, the largest block's parameters, and those that stay on the device."""

    blocks: int
    block_parameters: int
    resident_parameters: int

    @property
    def parameters(self) -> int:
        """All, where the blocks are alike."""
        return self.blocks * self.block_parameters + self.resident_parameters


@dataclass(frozen=True)
class Hardware:
    """A device and its links: bytes a second each way between host and device, and between devices; multiply-adds
    counted as two operations a second; seconds that a transfer waits."""

    link: float = 50e9
    exchange: float = 300e9
    flops: float = 600e12
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("link", "exchange", "flops"):
            check_positive(name, getattr(self, name))
        check_not_negative("latency", self.latency)


@dataclass(frozen=True)
class Plan:
    """A step as predicted, of one rank. Bytes but for `seconds` and `lanes` (seconds a block by lane).

    `host_bytes`: of blocks at rest; `pinned_bytes`: the same where torch pins them, each bucket rounded up to a power
    of two; `start_bytes`: what the host holds at most while the engine takes the model over, block by block.
    """

    device_bytes: int
    host_bytes: int
    pinned_bytes: int
    start_bytes: int
    upload_bytes: int
    exchange_bytes: int
    scalar_bytes: int
    gradient_bytes: int
    lanes: dict[str, float]
    seconds: float
    serial_seconds: float
    tokens_to_hide: float

    @property
    def bottleneck(self) -> str:
        """The lane that sets the pace."""
        return max(self.lanes, key=lambda lane: self.lanes[lane])


def shape_of(model: nn.Module, blocks: str = "auto") -> Shape:
    """The sizes of a model, which may be on the meta device."""
    path, modules = find_blocks(model, blocks)
    inside = {id(p) for module in modules for p in module.parameters()}
    largest = max(sum(p.numel() for p in module.parameters()) for module in modules)
    return Shape(len(modules), largest, sum(p.numel() for p in model.parameters() if id(p) not in inside))


def pipeline_seconds(lanes: Sequence[float], blocks: int) -> float:
    """N max(T) + fill: of stages that overlap, where the fill is one block's way through the others (section 6 a)."""
    return blocks * max(lanes) + (sum(lanes) - max(lanes))


def predict(
    shape: Shape,
    hardware: Hardware,
    *,
    tokens: int,
    offload_bytes: int = 2,
    working_bytes: int = 2,
    pertp: int = 1,
    slices: int = 1,
    directions: int = 1,
) -> Plan:
    """A step on `tokens` tokens a rank, of `directions` directions, with slices over `slices` ranks.

    Compute is 2 FLOP a parameter, token and forward pass, attention left out; `pertp` 2 leaves one sign to a rank.
    Activations are not in `device_bytes`. `tokens_to_hide`: from how many on the compute hides the transfers.
    `gradient_bytes`: what first-order data parallelism would send where `scalar_bytes` are sent here.
    Raises `InputError` for numbers below 1.
    """
    sizes = {"tokens": tokens, "slices": slices, "directions": directions}
    for name, value in {**sizes, "offload_bytes": offload_bytes, "working_bytes": working_bytes}.items():
        check_count(name, value)
    if pertp not in (1, 2):
        raise InputError(f"expected pertp to be 1 or 2, got {pertp}")
    block = shape.block_parameters
    passes = 2 * directions / pertp
    one_way = block * offload_bytes / slices
    received = block * offload_bytes * (slices - 1) / slices
    transfer = hardware.latency + one_way / hardware.link
    lanes = {"upload": transfer, "compute": 2 * passes * block * tokens / hardware.flops, "offload": transfer}
    if slices > 1:
        lanes["exchange"] = hardware.latency + received / hardware.exchange
    resident_compute = 2 * passes * shape.resident_parameters * tokens / hardware.flops
    slowest = max(seconds for lane, seconds in lanes.items() if lane != "compute")
    places = 4 + 4 / slices if slices > 1 else 3
    return Plan(
        device_bytes=int(
            places * block * offload_bytes
            + passes * block * working_bytes
            + shape.resident_parameters * (offload_bytes + passes * working_bytes)
        ),
        host_bytes=int(shape.blocks * one_way),
        pinned_bytes=shape.blocks * (1 << (int(one_way) - 1).bit_length()),
        start_bytes=int(
            shape.blocks * max(one_way, block * working_bytes)
            + shape.resident_parameters * working_bytes
            + block * offload_bytes
        ),
        upload_bytes=int(shape.blocks * one_way),
        exchange_bytes=int(shape.blocks * received),
        scalar_bytes=8 * (2 * directions + 1),
        gradient_bytes=2 * shape.parameters * working_bytes,
        lanes=lanes,
        seconds=pipeline_seconds(list(lanes.values()), shape.blocks) + resident_compute,
        serial_seconds=shape.blocks * sum(lanes.values()) + resident_compute,
        tokens_to_hide=slowest * hardware.flops / (2 * passes * block),
    )
