"""What the packages' tests share: in-process command runs, ranks on loopback, kill and resume, README blocks.

`contract.py` beside this file is the suite that every package passes in its own environment.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone.shared.errors import run_app


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str


def run_cli(app: Any, argv: Sequence[str], cwd: Path | None = None) -> Result:
    """Run the typer application `app` in this process, in the folder `cwd`, and capture what it prints."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = run_app(app, argv, "isotone")
    return Result(code, stdout.getvalue(), stderr.getvalue())


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 120,
    preload: Sequence[str] = (),
) -> list[Any]:
    """Run `function(rank, world_size, *args)` in `world_size` spawned processes of one torch process group.

    The rendezvous is on loopback. `function` must be importable (tests/workers.py); what it returns is sent
    back pickled, tensors whole. A rank's exception is raised here as `RuntimeError` with its traceback, and the
    other ranks are ended. `preload`: modules that one process imports for all ranks of this and of later calls
    (a fork server); nothing in them may have started a thread or touched a GPU when they are imported.
    """
    import multiprocessing

    context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(["__main__", *preload])
    # a rank that imports torch on a machine with more ranks than cores gains nothing from threads of its own
    threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    with tempfile.TemporaryDirectory() as folder, _environment(threads):
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            rendezvous = f"file://{folder}/rendezvous"
            process = context.Process(
                target=_rank, args=(sender, function, rank, world_size, rendezvous, backend, timeout, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    from multiprocessing.connection import wait

    results: dict[int, Any] = {}
    failures: list[str] = []
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if not failures:
                failures.append(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not answer in time")
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                error, value = f"ended with exit code {processes[rank].exitcode}", None
            if error:
                failures.append(f"rank {rank}: {error}")
                # the others fail in turn, when they miss this one; their words are worth a moment
                deadline = min(deadline, time.monotonic() + 3)
            results[rank] = value
    if failures:
        for process in processes:
            process.kill()
        raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank(sender: Any, function: Any, rank: int, world: int, url: str, backend: str, timeout: float, args: Any) -> None:
    try:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=limit)
        try:
            value = function(rank, world, *args)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((None, value)))
    except BaseException:
        sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
    finally:
        sender.close()


def kill_and_resume(
    argv: Sequence[str],
    *,
    ready: Callable[[], bool],
    seed: int,
    kills: int = 1,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    delay: float = 0.5,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Start `argv`, wait until `ready()`, SIGKILL it after a seeded random delay; then run it to its end.

    `ready` is called between polls and says that the run has something to lose (a first checkpoint, say).
    Raises `AssertionError` when the run ended before it could be killed: the test would prove nothing.
    """
    moments = random.Random(seed)
    environment = {**os.environ, **(env or {})}
    for _ in range(kills):
        process = subprocess.Popen(
            argv, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + timeout
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, delay))
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended with {process.returncode} before the kill:\n{stderr}"
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@dataclass(frozen=True)
class Block:
    """A fenced code block of a README; `skipped` holds the reason of a `<!-- not tested: ... -->` above it."""

    language: str
    code: str
    line: int
    skipped: str | None


_FENCE = re.compile(
    r"(?:^<!-- not tested: (?P<reason>[^>]*?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)


def readme_blocks(path: Path) -> list[Block]:
    """The fenced code blocks of the Markdown file `path`, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")), m["reason"])
        for m in _FENCE.finditer(text)
    ]


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
