"""What fails half way: no update is lost, none is applied twice, and nothing that was saved is gone."""

from __future__ import annotations

import errno
import os
import sys

import contract
import models
import pytest
import torch
from test_engine import engine_for, in_memory

from isotone.distzo2 import ZOConfig, ZOEngine
from isotone.distzo2.checkpoints import Tensors, load_run
from isotone.distzo2.cli import app
from isotone.distzo2.link import Link
from isotone.distzo2.loading import load_model
from isotone.distzo2.training import train
from isotone.shared.errors import InputError
from isotone.shared.testing import kill_and_resume, run_cli


class Once:
    """A function that fails the `at`-th time it is called, and is itself at all others."""

    def __init__(self, function, at):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.at:
            raise MemoryError("no room")
        return self.function(*arguments, **options)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize(
    ("part", "name", "at"), [("weights", "perturb", 2), ("weights", "begin", 1), ("pipeline", "hold", 3)]
)
def test_an_update_reaches_every_block_once_whatever_fails(part, name, at, offload, tmp_path, monkeypatch):
    ours, theirs = models.make(), models.make()
    batches = [models.batch(seed=t) for t in range(3)]
    engine = engine_for(ours, tmp_path, offload=offload, lr=1e-2)
    found = [engine.step(batches[0]).projected_grads]
    monkeypatch.setattr(getattr(engine, part), name, Once(getattr(getattr(engine, part), name), at))
    with pytest.raises(MemoryError):
        engine.step(batches[1])
    found += [engine.step(batch).projected_grads for batch in batches[1:]]
    engine.flush()
    assert found == in_memory(theirs, batches, [1e-2] * 3)
    assert torch.equal(models.flat(ours), models.flat(theirs))


class Torn(Link):
    """A link whose offloads of one block fail."""

    def throttle(self, lane, moved, start):
        if lane == "offload" and self.bytes[lane]:
            raise OSError("torn link")


def test_an_offload_that_fails_is_not_passed_over(tmp_path):
    engine = engine_for(models.make(), tmp_path, Torn(), offload="cpu", lr=1e-2)
    engine.step(models.batch())
    with pytest.raises(OSError, match="torn link"):
        engine.step(models.batch())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="room for the blocks"):
        engine_for(models.make(), tmp_path, offload="disk")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_put_in_train_mode_is_refused_at_the_next_step(tmp_path):
    model = models.make("gpt2")
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-2)
    engine.step(models.batch())
    model.train()
    with pytest.raises(InputError, match="eval"):
        engine.step(models.batch())
    model.eval()
    assert engine.step(models.batch()).step == 1


@pytest.mark.parametrize("family", ["opt", "qwen3-tied"])
def test_a_closed_engine_leaves_the_model_as_it_found_it(family, tmp_path):
    """Types, ties and what does not train; in another type it is rounded for the forwards alone."""
    model = models.make(family)
    embedding = model.get_input_embeddings().weight.requires_grad_(family != "opt")
    if family == "opt":
        model.lm_head.weight.requires_grad_(False)
    before = embedding.detach().clone()
    engine = engine_for(
        model, tmp_path, offload="cpu", lr=1e-2, working_dtype=torch.bfloat16, offload_dtype=torch.float32
    )
    engine.step(models.batch())
    state = engine.state_dict()
    engine.close()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(embedding, before) == (family == "opt")
    if family != "opt":
        assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    model(**models.batch())


def run(folder, steps, **options):
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2, offload="cpu", **options))
    history = train(engine, lambda t: models.batch(seed=t), steps, folder=folder, checkpoint_every=2)
    return engine, history


def test_checkpoints_are_a_file_a_block_that_transformers_reads(tmp_path):
    engine, _ = run(tmp_path, 4)
    folder = tmp_path / "weights-00000004"
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == {"resident.safetensors", *(f"model.decoder.layers.{n}.safetensors" for n in range(3))}
    loaded, state = load_model(folder).state_dict(), engine.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())
    found, weights = load_run(tmp_path)
    assert found.step == 4 and isinstance(weights, Tensors) and list(weights) and len(weights) == len(list(weights))


@pytest.mark.parametrize("tear", ["flip", "lose"])
def test_torn_weights_are_passed_over_and_taken_again(tear, tmp_path):
    whole, history = run(tmp_path / "whole", 5)
    run(tmp_path / "torn", 4)
    path = tmp_path / "torn" / "weights-00000004" / "model.decoder.layers.1.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink() if tear == "lose" else path.write_bytes(data)
    with pytest.warns(UserWarning, match="torn or missing"):
        again, resumed = run(tmp_path / "torn", 5)
    assert resumed.losses == history.losses and again.trajectory == whole.trajectory
    assert torch.equal(models.state_flat(again.trained_state()), models.state_flat(whole.trained_state()))


def test_a_run_does_not_end_before_its_checkpoint(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(InputError, match="steps of at least 4"):
        run(tmp_path, 2)
    assert load_run(tmp_path)[0].step == 4


def test_other_folders_are_left_alone(tmp_path):
    """Two runs after one another: what the first wrote goes, what is a user's stays."""
    for name in ("weights-2024", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / ".weights-00000009.tmp").mkdir()
    run(tmp_path, 2)
    engine = ZOEngine(models.make(), ZOConfig(lr=1e-2))
    train(engine, lambda t: models.batch(seed=t), 1, folder=tmp_path, resume=False)
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"weights-2024", "notes", "weights-00000001"}


def test_weights_are_read_once(tmp_path, monkeypatch):
    run(tmp_path, 2)
    reads = []
    read = Tensors.__getitem__
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, name: (reads.append(name), read(self, name))[1])
    engine, _ = run(tmp_path, 2)
    # the array checker of the tests reads one more where a function takes them
    assert set(reads) == set(engine.layout.trained) and len(reads) < 2 * len(engine.layout.trained)
    with pytest.raises(InputError, match="of shape"):
        other = ZOEngine(models.make("gpt2"), ZOConfig(lr=1e-2))
        other.load_state_dict({name: torch.zeros(1) for name in other.layout.trained})


def test_a_disk_that_fills_up_while_saving_loses_nothing(tmp_path, monkeypatch):
    from isotone.distzo2 import checkpoints

    run(tmp_path, 2)
    monkeypatch.setattr(checkpoints, "atomic_write", Once(checkpoints.atomic_write, 2))
    with pytest.raises(MemoryError):
        run(tmp_path, 4)
    monkeypatch.undo()
    found, _ = load_run(tmp_path)
    assert found.step == 2
    assert run(tmp_path, 4)[0].steps == 4 and not list(tmp_path.glob(".weights-*"))


def test_a_killed_command_ends_where_one_that_was_not_does(tmp_path):
    contract.files(tmp_path)
    command = [sys.executable, "-m", "isotone.distzo2", *contract.JOB, "--lr", "1e-4", "--checkpoint-every", "20"]
    command[command.index("--steps") + 1] = "60"

    def ready():
        return bool(list((tmp_path / "killed" / "checkpoints").glob("step-*")))

    environment = {"OMP_NUM_THREADS": "1"}
    done = kill_and_resume([*command, "--out", "killed"], ready=ready, seed=3, cwd=tmp_path, env=environment, delay=0.1)
    assert done.returncode == 0, done.stderr
    assert run_cli(app, [*command[3:], "--out", "whole"], tmp_path).code == 0
    killed, whole = (load_model(tmp_path / name / "model").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in killed.items())
