"""A checkpoint is whole or it is known not to be: shown for every byte of a small one."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isotone.shared import checkpoint, seeding
from isotone.shared.checkpoint import CheckpointStore, load_file, load_latest
from isotone.shared.errors import InputError

SMALL = {"weight": np.arange(3, dtype=np.float32), "step": np.array(7)}


def write(folder: Path, *steps: int, keep: int = 3) -> list[Path]:
    with CheckpointStore(folder, keep) as store:
        return [store.save(step, SMALL, {"at": step}) for step in steps]


def latest_step(folder: Path) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_latest(folder)
    return found.step if found else None


def test_round_trip_and_name(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 42)
    assert path.name.startswith("step-00000042-") and path.suffix == ".safetensors"
    found = load_latest(tmp_path)
    assert found.path == path == load_file(path).path
    assert found.step == 42 and found.state == {"at": 42}
    assert found.arrays["step"].shape == () and found.arrays["weight"].flags.writeable
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "missing") is None


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    """Kill the writer after any number of bytes, whatever had its name by then: the one before it is loaded."""
    first, second = write(tmp_path, 1, 2)
    whole = second.read_bytes()
    second.unlink()
    temporary = tmp_path / f".{second.name[:40]}.1.tmp"
    for length in range(len(whole) + 1):
        temporary.write_bytes(whole[:length])
        assert load_latest(tmp_path).path == first
        os.replace(temporary, second)
        assert latest_step(tmp_path) == (2 if length == len(whole) else 1)
        second.unlink()


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="torn or corrupted"):
            load_file(path)
    path.write_bytes(whole)
    renamed = path.with_name(path.name.replace("step-00000001", "step-00000009"))
    os.replace(path, renamed)
    with pytest.raises(InputError, match="expected a checkpoint of step 9, got step 1"):
        load_file(renamed)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["whole", "cut", "flipped", "missing"]), min_size=1, max_size=5), st.data())
def test_newest_whole_one_is_found(fates: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, fate in zip(write(folder, *range(len(fates)), keep=9), fates, strict=True):
            content = path.read_bytes()
            position = data.draw(st.integers(0, len(content) - 1))
            if fate == "cut":
                path.write_bytes(content[:position])
            elif fate == "flipped":
                flipped = content[position] ^ data.draw(st.integers(1, 255))
                path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
            elif fate == "missing":
                path.unlink()
        whole = [step for step, fate in enumerate(fates) if fate == "whole"]
        assert latest_step(folder) == (whole[-1] if whole else None)


def test_only_the_newest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = write(tmp_path, 1, 2, 3)[-1]
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path, real=Path.read_bytes: read.append(path) or real(path))
    assert load_latest(tmp_path).step == 3 and read == [newest]


def test_damage_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2)[-1]
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="torn or corrupted.*the one before"):
        assert load_latest(tmp_path).step == 1
    with pytest.raises(InputError, match="found none"):
        load_file(tmp_path / f"step-00000005-{'0' * 64}.safetensors")
    with pytest.raises(InputError, match="named step-STEP-SHA256"):
        load_file(tmp_path / "model.safetensors")


def test_foreign_file_with_a_right_name(tmp_path: Path) -> None:
    import hashlib

    for content in (b"", b"x" * 40, (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\xff" * 16):
        path = tmp_path / f"step-00000001-{hashlib.sha256(content).hexdigest()}.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError, match="expected a checkpoint of isotone"):
            load_file(path)


def test_keeps_the_last(tmp_path: Path) -> None:
    write(tmp_path, *range(6), keep=2)
    assert sorted(path.name[:13] for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]


def test_the_only_whole_one_stays(tmp_path: Path) -> None:
    """A newer torn file neither counts as kept nor survives the next save."""
    for path in write(tmp_path, 10, 20, keep=1):
        if path.exists():
            path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, 11, keep=1)
    assert [path.name[:13] for path in tmp_path.glob("step-*")] == ["step-00000011"]
    assert load_latest(tmp_path).step == 11


def test_a_later_whole_one_is_not_overrun(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with pytest.raises(InputError, match="past 10.*got 9"):
        write(tmp_path, 9)
    write(tmp_path, 10)
    with CheckpointStore(tmp_path) as store:
        store.clear()
        store.save(9, SMALL, {})
    assert load_latest(tmp_path).step == 9


@pytest.mark.parametrize("broken", ["write", "replace", "fsync", "open"])
def test_failed_write_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    write(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.glob("step-*")}
    with CheckpointStore(tmp_path, keep=1) as store:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, broken, full_disk(getattr(os, broken)))
            with pytest.raises(OSError, match="No space left"):
                store.save(3, SMALL, {})
        assert {path: path.read_bytes() for path in tmp_path.glob("step-*")} == before
        assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".step*"))
        assert load_latest(tmp_path).step == 2
        store.save(3, SMALL, {})
    assert load_latest(tmp_path).step == 3


def full_disk(real):
    """The second write of a file fails, after a short first one; anything else fails at once."""
    written = []

    def call(*arguments, **options):
        if real is os.write and not written:
            written.append(real(arguments[0], arguments[1][:5]))
            return written[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    return call


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "write", lambda fd, data, real=os.write: real(fd, data[:7]))
    write(tmp_path, 1)
    assert load_latest(tmp_path).step == 1


HOLDER = """
import sys, time
from isotone.shared.checkpoint import CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_and_the_lock_dies_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"no other writer.*process {holder.pid}"):
            write(tmp_path, 1)
        holder.send_signal(signal.SIGKILL)
    write(tmp_path, 1)
    with CheckpointStore(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()}"):
        write(tmp_path, 2)
    write(tmp_path, 2)


FORKER = HOLDER.replace("    time", "    if os.fork() == 0: print(os.getpid(), flush=True)\n    time").replace(
    "sys,", "os, sys,"
)


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Workers that load data outlive a killed trainer by seconds; its successor starts at once."""
    command = [sys.executable, "-c", FORKER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(InputError, match=f"process {holder.pid}"):
                write(tmp_path, 1)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            write(tmp_path, 1)
        finally:
            os.kill(child, signal.SIGKILL)


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003-abc.17.tmp").write_bytes(b"half")
    write(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == []


def test_save_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        CheckpointStore(tmp_path).save(1, SMALL, {})
    with pytest.raises(ValueError, match="keep"):
        CheckpointStore(tmp_path, keep=0)


DTYPES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 complex64".split()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(
        lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    )
)
def test_arrays_survive_bit_for_bit(array: np.ndarray) -> None:
    """Any type and shape, 0-d and empty ones too, transposed and strided."""
    views = {"plain": array, "transposed": array.T, "reversed": array[..., ::-1] if array.ndim else array}
    if array.ndim:
        views["strided"] = np.repeat(array, 2, axis=0)[::2]
    with tempfile.TemporaryDirectory() as name:
        with CheckpointStore(name) as store:
            store.save(0, views, {})
        for framework in ("numpy", "torch"):
            found = load_latest(name, framework).arrays
            for key, expected in views.items():
                got = found[key] if framework == "numpy" else found[key].numpy()
                assert got.dtype == expected.dtype and got.shape == expected.shape
                assert got.tobytes() == expected.tobytes()


def test_nan_payloads_survive(tmp_path: Path) -> None:
    words = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000], np.uint32)
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"a": words.view(np.float32), "b": torch.from_numpy(words.view(np.float32))}, {})
        store.save(1, {"a": words.view(np.float32)}, {})
    assert (load_latest(tmp_path).arrays["a"].view(np.uint32) == words).all()
    both = load_file(min(tmp_path.glob("step-*"))).arrays
    assert (both["a"].view(np.uint32) == words).all() and (both["b"].view(np.uint32) == words).all()


def test_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"a": np.array([1.5, -2.0], ">f4")}, {})
    assert load_latest(tmp_path).arrays["a"].tolist() == [1.5, -2.0]


def test_torch_tensors_survive(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    tensors = {
        "bf16": torch.randn(5).to(torch.bfloat16),
        "nan": torch.tensor([0x7FC1, 0x7F81], dtype=torch.uint16).view(torch.bfloat16),
        "0-d": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "transposed": weight.T,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "tied": weight,
    }
    with CheckpointStore(tmp_path) as store:
        store.save(0, tensors, {})
    found = load_latest(tmp_path, "torch").arrays
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw), name


def test_bfloat16_needs_ml_dtypes_in_numpy(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"a": torch.ones(2, dtype=torch.bfloat16)}, {})
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        with pytest.warns(UserWarning, match="framework='torch'"):
            assert load_latest(tmp_path) is None
    else:
        assert load_latest(tmp_path).arrays["a"].astype(np.float32).tolist() == [1.0, 1.0]


def test_state_holds_the_generators(tmp_path: Path) -> None:
    seeding.seed_everything(3)
    with CheckpointStore(tmp_path) as store:
        store.save(0, {}, {"rng": seeding.rng_state(), "loss": float("nan"), "name": "é"})
    drawn = random.random(), np.random.rand(), torch.rand(())
    state = load_latest(tmp_path).state
    seeding.set_rng_state(state["rng"])
    assert (random.random(), np.random.rand(), torch.rand(())) == drawn
    assert state["loss"] != state["loss"] and state["name"] == "é"
    with CheckpointStore(tmp_path) as store, pytest.raises(TypeError):
        store.save(1, {}, {"thing": object()})
    assert load_latest(tmp_path).step == 0


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("1", "22"):
        checkpoint.atomic_write(path, text.encode())
        assert json.loads(path.read_text()) == int(text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
