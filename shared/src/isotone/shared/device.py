"""Which device to compute on, and what the results say about the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from isotone.shared.errors import InputError


def resolve(name: str = "auto", framework: str = "torch") -> str:
    """The device `name` ("auto", "cpu", "cuda") as "cpu" or "cuda"; "auto" takes a GPU where there is one.

    `framework` ("torch" or "jax") is the one asked. Raises `InputError` for "cuda" where it sees no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"expected --device to be auto, cpu or cuda, got {name!r}")
    if framework not in ("torch", "jax"):
        raise ValueError(f"expected framework to be torch or jax, got {framework!r}")
    if name == "cpu":
        return "cpu"
    if _gpus(framework):
        return "cuda"
    if name == "cuda":
        raise InputError(f"expected a GPU for --device cuda, {framework} sees none")
    return "cpu"


def machine(framework: str) -> dict[str, Any]:
    """The machine as the results name it; what cannot be found out is None. Never raises."""
    return {
        "cpu": _try(_cpu_model),
        "cores": _try(_cores),
        "threads": _try(lambda: _threads(framework)),
        "memory_gib": _try(_memory_gib),
        "gpu": _try(lambda: _gpu_model(framework)),
        "python": platform.python_version(),
        framework: _try(lambda: str(import_module(framework).__version__)),
    }


def _try(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception:
        return None


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.check_output(command, text=True, timeout=10).strip() or None
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1].strip() if match else platform.machine() or None


def _cores() -> int | None:
    """The cores that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _threads(framework: str) -> int | None:
    return import_module("torch").get_num_threads() if framework == "torch" else _cores()


def _gpus(framework: str) -> list[str]:
    """The models of the GPUs that the framework sees."""
    if framework == "torch":
        cuda = import_module("torch").cuda
        return [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else []
    try:
        return [device.device_kind for device in import_module("jax").devices("gpu")]
    except RuntimeError:  # how JAX says that it has no such backend
        return []


def _gpu_model(framework: str) -> str | None:
    models = _gpus(framework)
    return (f"{len(models)} x " if len(models) > 1 else "") + models[0] if models else None
