"""Uploading, exchanging and offloading blocks beside the computation (section 2.4).

On a GPU each is a CUDA stream, and what waits for what is said by events, so that the host never blocks. On a CPU each
is a thread. `ThrottledLink` copies and then sleeps until a link of a given bandwidth and latency would be done: a model
of hardware to measure the schedule with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from isotone.distzo2.config import check_not_negative, check_positive

LANES = ("upload", "exchange", "compute", "offload")


@runtime_checkable
class Ticket(Protocol):
    """A piece of work that is under way."""

    def wait(self) -> None:
        """Return when it is done (a CPU), or make what is computed from now on wait for it (a GPU)."""
        ...


@dataclass(frozen=True)
class Span:
    """When a lane worked on a block: seconds since the link's start."""

    lane: str
    block: int
    start: float
    end: float


class Link:
    """The lanes between where blocks rest and where they are computed, on a CPU: a thread each.

    `overlap` false does every piece of work at once, in turn. `bytes`: moved so far by lane.
    """

    def __init__(self, overlap: bool = True) -> None:
        self.overlap = overlap
        self.bytes = dict.fromkeys(LANES, 0)
        self.spans: list[Span] | None = None
        self._origin = time.perf_counter()
        self._lanes = {lane: ThreadPoolExecutor(1, thread_name_prefix=lane) for lane in LANES if lane != "compute"}
        self._lock = threading.Lock()

    def record(self) -> list[Span]:
        """Keep the spans from now on, in the list that is returned."""
        self.spans, self._origin = [], time.perf_counter()
        return self.spans

    def submit(self, lane: str, block: int, work: Callable[[], int], after: Sequence[Ticket | None] = ()) -> Ticket:
        """Do `work` (which returns the bytes it moved) on `lane` when all of `after` are done."""

        def timed() -> None:
            for ticket in after:
                if ticket is not None:
                    ticket.wait()
            start = time.perf_counter()
            moved = work()
            self.throttle(lane, moved, start)
            self._note(lane, block, moved, start)

        ticket = _Thread(self._lanes[lane].submit(timed))
        if not self.overlap:
            ticket.wait()
        return ticket

    def computing(self, block: int, start: float) -> None:
        """Note that block `block` was computed from `start` (of `time.perf_counter`) to now."""
        self._note("compute", block, 0, start)

    def throttle(self, lane: str, moved: int, start: float) -> None:
        """Take longer, where the link is a model of another."""

    def mark(self) -> Ticket | None:
        """What a lane must wait for to follow what has been computed so far; None where that is done already."""
        return None

    def finish(self) -> None:
        """Return when all that was submitted is done."""
        for lane in self._lanes.values():
            lane.submit(int).result()

    def _note(self, lane: str, block: int, moved: int, start: float) -> None:
        with self._lock:
            self.bytes[lane] += moved
            if self.spans is not None:
                self.spans.append(Span(lane, block, start - self._origin, time.perf_counter() - self._origin))


@dataclass
class _Thread:
    future: Future[None]

    def wait(self) -> None:
        self.future.result()


class ThrottledLink(Link):
    """A link of `bandwidth` bytes a second and `latency` seconds each way; `exchange_bandwidth` between ranks.

    Raises `InputError` where one is not a finite number above 0 (latency: at least 0).
    """

    def __init__(
        self,
        bandwidth: float,
        latency: float = 0.0,
        exchange_bandwidth: float | None = None,
        overlap: bool = True,
    ) -> None:
        super().__init__(overlap)
        check_positive("bandwidth", bandwidth)
        check_not_negative("latency", latency)
        exchange = bandwidth if exchange_bandwidth is None else exchange_bandwidth
        check_positive("exchange_bandwidth", exchange)
        self.latency = latency
        self.bandwidth = {"upload": bandwidth, "offload": bandwidth, "exchange": exchange}

    def seconds(self, lane: str, moved: int) -> float:
        """What moving so many bytes takes on the link that is modelled."""
        return self.latency + moved / self.bandwidth[lane]

    def throttle(self, lane: str, moved: int, start: float) -> None:
        """Sleep until the modelled time has passed since `start`."""
        rest = start + self.seconds(lane, moved) - time.perf_counter()
        if rest > 0:
            time.sleep(rest)


class CudaLink(Link):  # pragma: no cover - needs a GPU
    """The lanes as CUDA streams; a ticket is an event, and waiting for it holds the present stream, not the host."""

    def __init__(self, device: torch.device, overlap: bool = True) -> None:
        super().__init__(overlap)
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in LANES if lane != "compute"}
        self._marks: list[tuple[str, int, Any, Any]] = []
        self._first: Any = None

    def record(self) -> list[Span]:
        """Keep the spans from now on; they are in the list after `finish`."""
        self._first = torch.cuda.Event(enable_timing=True)
        self._first.record(torch.cuda.current_stream(self._device))
        self._marks.clear()
        return super().record()

    def submit(self, lane: str, block: int, work: Callable[[], int], after: Sequence[Ticket | None] = ()) -> Ticket:
        """Queue `work` on the lane's stream behind the events of `after`."""
        with torch.cuda.stream(self._streams[lane]) if self.overlap else nullcontext():
            for ticket in after:
                if ticket is not None:
                    ticket.wait()
            begin = self._event()
            self.bytes[lane] += work()
            event = self._event()
        if self.spans is not None:
            self._marks.append((lane, block, begin, event))
        return _Event(event, self._device)

    def computing(self, block: int, start: float) -> None:
        """The host's clock does not say when a GPU computes: the lanes alone are noted."""

    def mark(self) -> Ticket | None:
        """An event after all that the present stream was given."""
        return _Event(self._event(), self._device)

    def finish(self) -> None:
        """Wait for the GPU, and write down when the lanes worked."""
        torch.cuda.synchronize(self._device)
        for lane, block, begin, end in self._marks:
            assert self.spans is not None
            times = (self._first.elapsed_time(event) / 1000 for event in (begin, end))
            self.spans.append(Span(lane, block, *times))
        self._marks.clear()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=self.spans is not None)
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass
class _Event:  # pragma: no cover - needs a GPU
    event: Any
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


def copy(target: Tensor, source: Tensor) -> int:
    """Copy a buffer, without waiting where both ends allow it; returns its bytes."""
    target.copy_(source, non_blocking=True)
    return source.numel() * source.element_size()
