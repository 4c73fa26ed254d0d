"""Several forward passes that go through a model together, block by block: the dual forward (section 2.3 c).

Each pass is a stream in a thread of its own, and one runs at a time: a stream runs until it arrives at a block, and
waits there until the driver has brought the block and lets it go on. So the same code of the model and of the closure
runs for every sign, whatever stands between the blocks, and passes may differ in length (generation that ends early).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class _Aborted(BaseException):
    """Ends a stream whose neighbour has failed."""


class _Stream:
    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.block: int | None = None
        self.aborted = False


class Lockstep:
    """Runs functions in turn, handing over at `arrive`. One object serves one engine, a run at a time."""

    def __init__(self) -> None:
        self._turn = threading.Semaphore(0)
        self._current: _Stream | None = None
        # it starts a thread only where none is idle: as many as there are streams
        self._pool = ThreadPoolExecutor(256, thread_name_prefix="forward")

    @property
    def running(self) -> bool:
        """Whether a stream is running now: whether the model that calls a block is ours."""
        return self._current is not None

    def arrive(self, block: int) -> None:
        """Called by the running stream before it computes block `block`; returns when the block is there."""
        stream = self._current
        assert stream is not None
        if stream.aborted:
            raise _Aborted
        stream.block = block
        self._turn.release()
        stream.go.acquire()
        if stream.aborted:
            raise _Aborted

    def run(
        self,
        functions: Sequence[Callable[[], Any]],
        load: Callable[[int], None],
        select: Callable[[int, int | None], None],
        leave: Callable[[int], None],
    ) -> list[Any]:
        """The results of `functions`, each a stream.

        `load(block)` brings a block once for all streams that wait at it; `select(stream, block)` points the model at a
        stream's weights just before it runs on (None: only those that stay); `leave(block)` after the last of them. An
        exception of a stream or of a callback ends all streams and is raised here.
        """
        streams = [_Stream() for _ in functions]
        futures = [self._submit(stream, function) for stream, function in zip(streams, functions, strict=True)]
        try:
            for number, stream in enumerate(streams):
                select(number, None)
                self._resume(stream, futures[number])
            while waiting := [n for n, stream in enumerate(streams) if stream.block is not None]:
                block = streams[waiting[0]].block
                assert block is not None
                load(block)
                try:
                    for number in [n for n in waiting if streams[n].block == block]:
                        select(number, block)
                        self._resume(streams[number], futures[number])
                finally:
                    leave(block)
            return [future.result() for future in futures]
        finally:
            self._abort(streams, futures)

    def _submit(self, stream: _Stream, function: Callable[[], Any]) -> Future[Any]:
        def body() -> Any:
            stream.go.acquire()
            try:
                if stream.aborted:
                    raise _Aborted
                return function()
            finally:
                stream.block = None
                self._turn.release()

        return self._pool.submit(body)

    def _resume(self, stream: _Stream, future: Future[Any]) -> None:
        """Let a stream run until it arrives at its next block or ends; raise its error if it failed."""
        stream.block = None
        self._current = stream
        stream.go.release()
        self._turn.acquire()
        self._current = None
        if stream.block is None:
            future.result()

    def _abort(self, streams: list[_Stream], futures: list[Future[Any]]) -> None:
        for stream, future in zip(streams, futures, strict=True):
            if not future.done():
                stream.aborted = True
                self._current = stream
                stream.go.release()
                self._turn.acquire()
                self._current = None
                future.exception()
