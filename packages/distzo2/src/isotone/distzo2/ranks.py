"""Ranks on this machine for the reproduction: spawned processes of one gloo group, a thread each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from isotone.shared.checkpoint import atomic_write

RankFunction = Callable[[int, int, dict[str, Any]], dict[str, Any]]


def run_ranks(function: RankFunction, world: int, arguments: dict[str, Any], limit: float = 1800.0) -> list[Any]:
    """`function(rank, world, arguments)` on every rank; what each returned, as JSON gives it back.

    `function` is importable. An error of one ends all and is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        before = {name: os.environ.get(name) for name in start}
        os.environ.update(start)
        try:
            processes.start_processes(_rank, (function, world, arguments, folder, limit), nprocs=world)  # type: ignore[no-untyped-call]
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, function: RankFunction, world: int, arguments: dict[str, Any], folder: str, limit: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    rendezvous = f"file://{folder}/rendezvous"
    patience = timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=patience)
    try:
        found = function(rank, world, arguments)
        atomic_write(Path(folder) / f"{rank}.json", json.dumps(found).encode())
        dist.barrier()
    finally:
        dist.destroy_process_group()
