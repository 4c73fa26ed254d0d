"""`ZOTrainer` beside the engine; the bench and the reproduction at tiny sizes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import models
import pytest
import torch

from isotone.distzo2 import ZOConfig, ZOEngine, bench, reproduce
from isotone.distzo2.loading import load_model
from isotone.distzo2.offloading import beside_resident
from isotone.distzo2.scales import SCALES
from isotone.shared.cli import Run
from isotone.shared.errors import InputError


class Rows(torch.utils.data.Dataset):
    """One batch's rows."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.batch.items()}


def trainer(model, folder, **options):
    from transformers import TrainingArguments

    from isotone.distzo2.trainer import ZOTrainer

    settings = dict(output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to=[])
    settings |= dict(lr_scheduler_type="linear", max_steps=3, save_steps=2, use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(**{**settings, **options})
    rows = Rows(models.batch(rows=4))
    return ZOTrainer(model, arguments, ZOConfig(lr=1e-2, offload="cpu"), train_dataset=rows, eval_dataset=rows)


def test_the_trainer_takes_the_engines_steps(tmp_path):
    ours, other = models.make(), models.make()
    made = trainer(ours, tmp_path)
    made.train()
    engine = ZOEngine(other, ZOConfig(lr=1e-2))
    for step in range(3):
        engine.lr = 1e-2 * (1 - step / 3)
        engine.step(models.batch(rows=4))
    engine.flush()
    # the trainer shuffles the rows of the batch: sums in another order
    torch.testing.assert_close(models.flat(ours), models.flat(other), rtol=1e-3, atol=1e-3)
    assert made.evaluate()["eval_loss"] == pytest.approx(float(other(**models.batch(rows=4)).loss), rel=1e-2)
    resumed = trainer(models.make(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.engine.steps == 3 and len(resumed.engine.trajectory) == 3
    assert resumed.engine.trajectory.seeds == made.engine.trajectory.seeds
    torch.testing.assert_close(models.flat(resumed.model), models.flat(ours), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        trainer(models.make(), tmp_path, **options)


def test_the_best_model_is_what_the_trainer_ends_with(tmp_path):
    """Nothing that waited for the next step comes on top of it."""
    options = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    made = trainer(models.make(), tmp_path, **options, metric_for_best_model="loss", max_steps=4, learning_rate=0.2)
    made.train()
    best = made.state.best_model_checkpoint
    wanted = models.make()
    wanted.load_state_dict(load_model(Path(best)).state_dict())
    assert torch.equal(models.flat(made.model), models.flat(wanted))
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-5)


def test_the_trainers_bfloat16_is_the_forwards(tmp_path):
    seen = []
    made = trainer(models.make(), tmp_path, bf16=True, max_steps=1)
    made.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    made.train()
    assert set(seen) == {torch.bfloat16}


def test_the_authors_code_is_run_by_its_own_python(tmp_path):
    """What another Python prints is taken; what it says where it fails is passed on."""
    python = tmp_path / "python"
    for words, said in (
        ('echo warned; echo \'{"seconds": 2.5, "version": "0"}\'', ""),
        ("echo no zo2 >&2; exit 1", "no zo2"),
    ):
        python.write_text(f"#!/bin/sh\n{words}\n")
        python.chmod(0o755)
        if said:
            with pytest.raises(InputError, match=said):
                bench.zo2_step(python, "tiny", 1, 8)
        else:
            assert bench.zo2_step(python, "tiny", 1, 8)["seconds"] == 2.5
    with pytest.raises(InputError, match="nowhere"):
        bench.zo2_step(tmp_path / "nowhere", "tiny", 1, 8)


def test_offloading_on_a_cpu():
    found = beside_resident("tiny", 2, 16, "cpu", rounds=2)
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in found.values())
    with pytest.raises(InputError, match="huge"):
        beside_resident("huge", 2, 16, "cpu")


@pytest.mark.slow
def test_bench_at_a_tiny_size(tmp_path):
    report = bench.bench(Run(tmp_path, device="cpu", quiet=True), "tiny")
    assert {ratio.id for ratio in report.ratios} >= {"engine-2x16", "optimizer-2x16", "memory-fsdp2", "memory-lora"}


@pytest.mark.slow
def test_reproduction_with_ranks_at_a_tiny_size(tmp_path):
    setting = dataclasses.replace(
        SCALES["smoke"],
        ranks=True,
        learns=True,
        lora_rates=(1e-2,),
        pert=dataclasses.replace(SCALES["cpu"].pert, hidden=32, layers=2, length=16, rounds=2),
        sliced=dataclasses.replace(SCALES["cpu"].sliced, layers=3, rounds=1),
    )
    report = reproduce.measure(setting, "smoke", Run(tmp_path, quiet=True), "cpu")
    found = {item.claim.id: item.measured for item in report.measurements}
    assert found["same-steps"] == 0 and found["same-weights"] == 0 and found["bytes"] == 24
    assert all(found[name] is not None for name in ("shards", "throughput", "pertp", "keyword", "lora", "accuracy"))
    assert {"loss", "sweep", "timeline-sliced"} <= set(report.figures)
