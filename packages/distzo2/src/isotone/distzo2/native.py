"""philox.c, compiled once by the system's C compiler for this machine's vector units and kept in the user's cache.

Without a compiler there is none, and the eager form in kernels.py gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from isotone.distzo2.layout import GROUP, Segment

# no result depends on -fno-trapping-math: without it a choice between two numbers is a branch, and no vector
_FLAGS = ["-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-shared", "-fPIC"]
_SHARE = 1 << 18
"""Elements below which a second thread is not worth its start."""
_pointer = ctypes.c_void_p


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no C compiler that takes the flags."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    source = Path(__file__).with_name("philox.c")
    if compiler is None:
        return None
    described = f"{_FLAGS}{platform.machine()}{_processor()}".encode() + source.read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isotone" / "distzo2"
    path = folder / f"philox-{hashlib.sha256(described).hexdigest()[:32]}.so"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = Path(work) / "philox.so"
                subprocess.run(
                    [compiler, *_FLAGS, str(source), "-o", str(made), "-lm"], check=True, capture_output=True
                )
                os.replace(made, path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    sized = [ctypes.c_int64, ctypes.c_uint64]
    loaded.zo_normal.argtypes = [_pointer, *sized, ctypes.c_uint32, ctypes.c_uint32]
    loaded.zo_normal.restype = None
    loaded.zo_advance.argtypes = [_pointer, _pointer, _pointer, *sized, ctypes.c_uint32, ctypes.c_int64]
    loaded.zo_advance.argtypes += [_pointer, _pointer, ctypes.c_float, ctypes.c_uint32, ctypes.c_float]
    loaded.zo_advance.restype = None
    return loaded


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels can work on these: fp32 in this machine's memory, one element after the other."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in given)
    return plain and library() is not None


def advance(
    weights: Tensor,
    segments: list[Segment],
    updates: tuple[tuple[int, ...], tuple[float, ...], float],
    seed: int,
    eps: float,
    plus: Tensor | None,
    minus: Tensor | None,
) -> None:
    """`kernels.advance` on the CPU, each segment in as many pieces as torch has threads."""
    loaded = library()
    assert loaded is not None
    seeds, coefficients, decay = updates
    seed_array = (ctypes.c_uint32 * max(1, len(seeds)))(*seeds)
    coefficient_array = (ctypes.c_float * max(1, len(seeds)))(*coefficients)

    def piece(segment: Segment, begin: int, end: int) -> None:
        at = 4 * (segment.start + begin)
        outs = [None if out is None else out.data_ptr() + at for out in (plus, minus)]
        loaded.zo_advance(
            *(weights.data_ptr() + at, *outs, end - begin, (segment.first + begin) // GROUP, segment.parameter),
            *(len(seeds), ctypes.addressof(seed_array), ctypes.addressof(coefficient_array)),
            *(decay if segment.decays else 0.0, seed, eps),
        )

    for segment in segments:
        _in_pieces(functools.partial(piece, segment), segment.length)


def normal(out: Tensor, seed: int, segment: Segment) -> None:
    """z of one segment into `out` (segment.length,)."""
    loaded = library()
    assert loaded is not None

    def piece(begin: int, end: int) -> None:
        first = (segment.first + begin) // GROUP
        loaded.zo_normal(out.data_ptr() + 4 * begin, end - begin, first, seed, segment.parameter)

    _in_pieces(piece, segment.length)


def _in_pieces(piece: Callable[[int, int], None], length: int) -> None:
    """The interpreter's lock is free while C computes, so that threads share the work."""
    threads = min(torch.get_num_threads(), length // _SHARE)
    if threads < 2:
        piece(0, length)
        return
    step = -(-length // (threads * GROUP)) * GROUP
    bounds = [(begin, min(begin + step, length)) for begin in range(0, length, step)]
    list(_pool().map(lambda bound: piece(*bound), bounds))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())
