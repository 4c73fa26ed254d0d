"""Every claim at a tiny size, resumed where it was left, and the bench's peers."""

import dataclasses
import json

import pytest
import reference
import torch

from isotone.quamba2 import bench as side_by_side
from isotone.quamba2 import naive
from isotone.quamba2 import reproduce as measured
from isotone.quamba2.clustering import sort_and_cluster
from isotone.quamba2.hadamard import hadamard_transform
from isotone.quamba2.reproduce import SCALES, Scale, reproduce
from isotone.quamba2.small import LADDER, OTHERS, Recipe
from isotone.shared.claims import validate
from isotone.shared.cli import Run
from isotone.shared.errors import InputError

TINY = Scale(
    seeds=(0, 1),
    trained=1,
    recipe=Recipe(layers=1, state=8, steps=2, batch=2, length=32),
    text=30_000,
    names=(*LADDER, "W4A16 per group", "W4A16 + Hadamard + GPTQ"),
    samples=2,
    scored=2,
    length=32,
    more_heads=False,
    memory=("tiny",),
)


def test_every_claim_at_a_tiny_size(tmp_path, monkeypatch):
    run = Run(tmp_path, device="cpu", quiet=True)
    report = reproduce("cpu", run, TINY)
    document = report.to_json()
    validate(document)
    found = {one["id"]: one for one in document["claims"]}
    for name in ("scan-ranges", "no-planted-gains-monotone", "planted-gains-removed", "memory-tiny-states"):
        assert found[name]["measured"] is not None and found[name]["held"] is not None, name
    assert found["speed-8b-tpot"]["measured"] is None and found["speed-8b-tpot"]["held"] is None
    assert set(report.figures) == {"scan", "profiles", "rows-plain", "rows-planted"}
    path = report.save(tmp_path)
    assert json.loads(path.read_text())["seeds"] == [0, 1]

    def never(*_):
        raise AssertionError("a finished arm is not run again")

    monkeypatch.setattr(measured.synthetic, "ladder", never)
    monkeypatch.setattr(measured.small, "train", never)
    assert reproduce("cpu", run, TINY).to_json()["claims"] == document["claims"]
    with pytest.raises(AssertionError):
        reproduce("cpu", dataclasses.replace(run, resume=False), TINY)


def test_scales_and_what_they_need(tmp_path, monkeypatch):
    run = Run(tmp_path, device="cpu", quiet=True)
    assert set(SCALES) == {"smoke", "cpu", "gpu", "paper"} and SCALES["cpu"].names == (*LADDER, *OTHERS)
    with pytest.raises(InputError, match="got 'huge'"):
        reproduce("huge", run)
    for scale in ("gpu", "paper"):
        with pytest.raises(InputError, match="expected a GPU"):
            reproduce(scale, run)
    monkeypatch.delenv("ISOTONE_DATA_DIR", raising=False)
    with pytest.raises(InputError, match="ISOTONE_DATA_DIR"):
        reproduce("paper", run, dataclasses.replace(TINY, checkpoint=True))


@pytest.mark.slow
def test_a_checkpoint_at_hand_is_measured(tmp_path, monkeypatch):
    from transformers import Mamba2ForCausalLM

    from isotone.quamba2.shapes import shape

    folder = tmp_path / "data" / "quamba2"
    Mamba2ForCausalLM(shape("tiny").hugging_face()).save_pretrained(folder / "model")
    for name in measured.TEXTS:
        (folder / name).write_text("What is past is prologue. " * 20)
    monkeypatch.setenv("ISOTONE_DATA_DIR", str(tmp_path / "data"))
    setting = dataclasses.replace(TINY, checkpoint=True, seeds=(0,), trained=1)
    found = {one.claim.id for one in reproduce("paper", Run(tmp_path, device="cpu", quiet=True), setting).measurements}
    assert {"checkpoint-monotone", "checkpoint-removed"} <= found


@pytest.mark.parametrize("seed", range(3))
def test_the_plain_forms_are_the_fast_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    stats = torch.randn(2 * 9 * 16, generator=generator, dtype=torch.float64).exp()
    plan = sort_and_cluster(stats, 16, 2, 3, 4)
    order, heads, dims = naive.sort_and_cluster(stats.tolist(), 16, 2, 3, 4)
    assert (plan.channel_index.tolist(), plan.head_sizes.tolist(), plan.dim_sizes.tolist()) == (order, heads, dims)
    x = torch.randn(3, 64, generator=generator)
    torch.testing.assert_close(reference.butterflies(x), hadamard_transform(x))


@pytest.mark.slow
def test_the_bench(tmp_path):
    recipe = Recipe(layers=1, state=8, steps=4, batch=2, length=32)
    report = side_by_side.bench(Run(tmp_path, device="cpu", quiet=True), recipe, rounds=6, tokens=16)
    validate(report.to_json())
    names = {ratio.id for ratio in report.ratios}
    assert {"fake-quant", "clustering", "clustering-8b", "gptq", "hadamard-4096-butterflies"} <= names
    if side_by_side._torchao():
        kept = {ratio.id: ratio for ratio in report.ratios}
        assert 0 < kept["torchao-kl-4"].peer_value < 1 and 0.5 < kept["torchao-bytes-4"].ratio < 2
