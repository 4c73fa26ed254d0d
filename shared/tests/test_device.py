"""The device that was asked for, and a description of the machine that never fails."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from isotone.shared import device
from isotone.shared.errors import InputError

FIELDS = ["cpu", "cores", "threads", "memory_gib", "gpu", "python"]


def test_machine() -> None:
    facts = device.machine("torch")
    assert list(facts) == [*FIELDS, "torch"]
    assert facts["torch"] == torch.__version__ and facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads() and 1 <= facts["cores"] <= os.cpu_count()
    assert 0.1 < facts["memory_gib"] < 1e5 and isinstance(facts["cpu"], str)
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


def test_machine_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no such thing here")

    for name in ("_cpu_model", "_cores", "_threads", "_memory_gib", "_gpus", "import_module"):
        monkeypatch.setattr(device, name, fail)
    assert list(device.machine("jax").values()) == [None] * 5 + [platform.python_version(), None]


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_gpus", lambda framework: [])
    assert device.resolve() == device.resolve("cpu") == "cpu"
    with pytest.raises(InputError, match="expected a GPU for --device cuda, jax sees none"):
        device.resolve("cuda", "jax")
    monkeypatch.setattr(device, "_gpus", lambda framework: ["one"])
    assert device.resolve() == device.resolve("cuda") == "cuda" and device.resolve("cpu") == "cpu"
    with pytest.raises(InputError, match="auto, cpu or cuda, got 'tpu'"):
        device.resolve("tpu")
    with pytest.raises(ValueError, match="torch or jax"):
        device.resolve("auto", "tensorflow")


def test_several_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for models, expected in (([], None), (["H200"], "H200"), (["H200"] * 4, "4 x H200")):
        monkeypatch.setattr(device, "_gpus", lambda framework, models=models: models)
        assert device.machine("torch")["gpu"] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_gpu_is_named() -> None:
    assert device.resolve() == "cuda" and device.machine("torch")["gpu"]
