"""The parts beside the step: objectives, data, layouts, plans, links, trajectory files, runs that are killed."""

from __future__ import annotations

import math

import models
import pytest
import torch
from torch import nn

from isotone.distzo2 import (
    ThrottledLink,
    Trajectory,
    ZOConfig,
    ZOEngine,
    find_blocks,
    label_words,
    load_trajectory,
    model_loss,
    parameter_groups,
    save_trajectory,
)
from isotone.distzo2.data import Windows, ZipfMarkov, keyword_batch
from isotone.distzo2.layout import lay_out
from isotone.distzo2.plan import Hardware, Shape, pipeline_seconds, predict, shape_of
from isotone.distzo2.training import Schedule, train
from isotone.shared.errors import InputError

# --- objectives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "opt-classifier"])
def test_losses_are_the_models_own(family):
    model, batch = models.make(family), models.batch(family)
    loss, count = model_loss(model, batch)
    assert float(loss) == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert count == (4 if family.endswith("classifier") else 4 * 7 - 2)


def test_only_positions_that_are_asked_for_go_through_the_head():
    model, batch = models.make("llama"), models.batch("llama", length=12)
    batch["labels"][:, :9] = -100
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    loss, count = model_loss(model, batch)
    hook.remove()
    assert seen == [3] and count == 12
    assert float(loss) == pytest.approx(float(model(**batch).loss), rel=1e-5)
    batch["labels"][:] = -100
    assert model_loss(model, batch)[1] == 0
    engine = ZOEngine(model, ZOConfig())
    with pytest.raises(InputError, match="-100 everywhere"):
        engine.step(batch)


def test_label_words_are_classified_at_the_last_token():
    model, batch = models.make("opt"), models.batch("opt", rows=3)
    batch["attention_mask"][1, 5:] = 0
    batch["labels"] = torch.tensor([0, 1, 1])
    loss, count = label_words([7, 9])(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = torch.stack([logits[0, 7], logits[1, 4], logits[2, 7]])[:, [7, 9]]
    assert count == 3
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(last, batch["labels"])), rel=1e-5)
    with pytest.raises(InputError, match="label words"):
        label_words([7, 7])


@pytest.mark.parametrize("value", ["loss", torch.zeros(2), (1.0, 2.5), (1.0, -1)])
def test_closures_that_give_no_loss(value):
    engine = ZOEngine(models.chain(), ZOConfig())
    with pytest.raises(InputError, match="expected a loss"):
        engine.step(lambda: value)
    with pytest.raises(InputError, match="labels"):
        engine.step({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(InputError, match="tensor"):
        engine.step({"input_ids": torch.zeros(1, 2), "labels": [1]})


# --- data -----------------------------------------------------------------------------------------------


def test_keywords_tell_the_class():
    batch = keyword_batch(4000, 3)
    ids, labels = batch["input_ids"], batch["labels"]
    words = [((ids >= 2 + 3 * y) & (ids < 5 + 3 * y)).sum(1) for y in (0, 1)]
    assert torch.equal((words[1] > words[0]).long(), labels)
    assert abs(float(labels.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert torch.equal(keyword_batch(4000, 3)["input_ids"], ids) and ids.max() < 64


def test_the_chains_entropy_is_its_texts():
    chain = ZipfMarkov(16, seed=1)
    torch.testing.assert_close(chain.stationary @ chain.transitions, chain.stationary)
    ids = chain.batch(400, 101, seed=2)["input_ids"]
    nats = -chain.transitions.log()[ids[:, :-1], ids[:, 1:]]
    # five standard errors of the rows' means
    assert abs(float(nats.mean()) - chain.entropy_rate) < 5 * float(nats.mean(1).std()) / math.sqrt(400)
    assert chain.entropy_rate < math.log(16)


def test_windows_are_a_function_of_the_step():
    windows = Windows(torch.arange(100), 10, 3, seed=1)
    batch = windows(5)["input_ids"]
    assert torch.equal(batch, windows(5)["input_ids"]) and not torch.equal(batch, windows(6)["input_ids"])
    assert bool((batch.diff(dim=1) == 1).all())
    with pytest.raises(InputError, match="at least 10 tokens"):
        Windows(torch.arange(9), 10, 3, seed=1)


# --- layouts --------------------------------------------------------------------------------------------


def test_blocks_are_found_or_named():
    model = models.make("opt")
    assert find_blocks(model)[0] == "model.decoder.layers" == find_blocks(model, "model.decoder.layers")[0]
    with pytest.raises(InputError, match="ModuleList"):
        find_blocks(model, "model.decoder")
    with pytest.raises(InputError, match='blocks="model.layers"'):
        find_blocks(nn.Linear(2, 2))


def test_tied_tensors_are_one_and_stay():
    layout = lay_out(models.make("opt"))
    (bucket,) = layout.resident.buckets
    tied = [entry for entry in bucket.entries if "embed_tokens" in entry.name]
    assert len(tied) == 1 and not any("lm_head" in name for name in layout.trained)
    chain = models.chain()
    chain.layers[2][0].weight = chain.layers[0][0].weight  # blocks that share
    chain.layers[3][0].bias = nn.Parameter(chain.layers[1][0].bias.data)  # the same storage, another parameter
    layout = lay_out(chain)
    names = {entry.name: len(entry.parameters) for b in layout.resident.buckets for entry in b.entries}
    assert names["layers.0.0.weight"] == 1 and names["layers.1.0.bias"] == 2
    assert len(layout.trained) == len(list(chain.parameters())) - 1


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_slices_make_the_bucket(slices):
    layout = lay_out(models.chain(), slices=slices)
    for unit in layout.blocks:
        for bucket in unit.buckets:
            share = bucket.size // slices
            assert bucket.size % (4 * slices) == 0
            found = [
                (s.parameter, s.first + i)
                for r in range(slices)
                for s in bucket.segments(r * share, (r + 1) * share)
                for i in range(s.length)
            ]
            assert found == [(e.number, i) for e in bucket.entries for i in range(e.numel)]


def test_decay_goes_by_role():
    class Odd(nn.Module):
        """Names that the reference's pieces of names take for norms."""

        def __init__(self):
            super().__init__()
            self.kiln = nn.Linear(2, 2)
            self.scale = nn.LayerNorm(2)

    groups = parameter_groups(Odd(), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 3] and groups[0]["params"][0].ndim == 2


@pytest.mark.parametrize("spoil", ["frozen", "meta", "part", "dropout", "batchnorm"])
def test_refused_models(spoil):
    model = models.chain(dtype=torch.float32)
    words = {"frozen": "requires_grad", "part": "shared whole", "batchnorm": "batch"}
    if spoil == "frozen":
        model.requires_grad_(False)
    elif spoil == "meta":
        model.enter.to("meta")
    elif spoil == "part":
        model.leave.bias = nn.Parameter(model.enter.weight.data.view(-1)[2:3])
    elif spoil == "dropout":
        model.layers[1].append(nn.Dropout(0.1))
        model.train()
    else:
        model.layers[1].append(nn.BatchNorm1d(6))
        model.train()
    with pytest.raises(InputError, match=words.get(spoil, spoil)):
        ZOEngine(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 0.0}, "eps"),
        ({"lr": -1.0}, "lr"),
        ({"offload": "cloud"}, "offload"),
        ({"offload": "disk"}, "disk_folder"),
        ({"parallel": "3d"}, "parallel"),
        ({"slicing": "maybe"}, "slicing"),
        ({"slicing": True, "rng": "torch"}, "slicing"),
        ({"offload_dtype": torch.int8}, "offload_dtype"),
        ({"check_every": -1}, "check_every"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(InputError, match=words):
        ZOConfig(**options)


def test_one_process_has_nothing_to_slice_and_no_pert_ranks():
    with pytest.raises(InputError, match="several ranks"):
        ZOEngine(models.chain(), ZOConfig(slicing=True))
    with pytest.raises(InputError, match="PertP group of 2"):
        ZOEngine(models.chain(), ZOConfig(parallel="pertp"))


# --- plans and links ------------------------------------------------------------------------------------


def test_plans_count_what_the_engine_moves(tmp_path):
    model = models.make("llama")
    shape = shape_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) and shape.blocks == 3
    engine = ZOEngine(model, ZOConfig(offload="cpu", lr=1e-3))
    engine.step(models.batch("llama"))
    before = dict(engine.link.bytes)
    engine.step(models.batch("llama"))
    plan = predict(shape, Hardware(), tokens=32, offload_bytes=4)
    assert plan.upload_bytes == engine.link.bytes["upload"] - before["upload"]
    assert plan.upload_bytes == engine.link.bytes["offload"] - before["offload"] == plan.host_bytes
    assert plan.host_bytes <= plan.pinned_bytes < 2 * plan.host_bytes and plan.start_bytes > plan.host_bytes
    sliced = predict(shape, Hardware(), tokens=32, offload_bytes=4, slices=2)
    # four places and their slices, two perturbed blocks in half precision; what stays, and perturbed twice
    blocks, rest = shape.block_parameters, shape.resident_parameters
    assert sliced.device_bytes == 4 * (4 + 4 // 2) * blocks + 2 * 2 * blocks + 4 * rest + 2 * 2 * rest


def test_plans_follow_the_law():
    """13B over 50 GB/s at 600 TFLOP/s: about 6,000 tokens hide the transfers of the dual forward, half with PertP's one
    pass takes twice as many, four slices a quarter (section 9)."""
    shape, hardware = Shape(40, 314_000_000, 257_000_000), Hardware(50e9, 300e9, 600e12)
    dual = predict(shape, hardware, tokens=2048)
    assert dual.tokens_to_hide == pytest.approx(6000) and dual.bottleneck in ("upload", "offload")
    assert predict(shape, hardware, tokens=2048, pertp=2).tokens_to_hide == pytest.approx(12000)
    sliced = predict(shape, hardware, tokens=2048, slices=4)
    assert sliced.tokens_to_hide == pytest.approx(1500) and sliced.upload_bytes * 4 == dual.upload_bytes
    assert sliced.seconds < dual.seconds < dual.serial_seconds
    assert dual.scalar_bytes == 24 and dual.gradient_bytes / dual.scalar_bytes > 1e6
    assert pipeline_seconds([1.0, 3.0, 2.0], 4) == 15.0
    for bad in ({"tokens": 0}, {"tokens": 1, "slices": 0}):
        with pytest.raises(InputError):
            predict(shape, hardware, **bad)
    with pytest.raises(InputError, match="link"):
        Hardware(link=0.0)


def test_links_take_the_modelled_time():
    link = ThrottledLink(1e6, 0.01, exchange_bandwidth=4e6)
    assert link.seconds("upload", 10_000) == pytest.approx(0.02) and link.seconds("exchange", 10_000) < 0.013
    spans = link.record()
    link.submit("upload", 0, lambda: 20_000).wait()
    assert 0.03 <= spans[0].end - spans[0].start < 0.2
    with pytest.raises(InputError, match="bandwidth"):
        ThrottledLink(0.0)


# --- trajectory files and runs --------------------------------------------------------------------------


def test_trajectories_are_16_bytes_a_step(tmp_path):
    trajectory = Trajectory("base", 0.1)
    for step in range(1000):
        trajectory.append((step,), (0.5 * step,), 1e-6)
    path = tmp_path / "steps.safetensors"
    save_trajectory(trajectory, path)
    assert load_trajectory(path) == trajectory
    size = path.stat().st_size
    trajectory.append((5,), (1.0,), 0.0)
    trajectory.append((5,), (1.0,), 1e-6)
    save_trajectory(trajectory, path)
    assert load_trajectory(path) == trajectory and size < 16 * 1000 + 1000
    with pytest.raises(InputError, match="found none"):
        load_trajectory(tmp_path / "missing")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="torn"):
        load_trajectory(path)
    trajectory.append((5,), (math.nan,), 1e-6)
    save_trajectory(trajectory, path)
    with pytest.raises(InputError, match="NaN"):
        load_trajectory(path)


def run(folder, steps, **options):
    model = models.chain(dtype=torch.float32)
    settings = {"lr": 0.05, "offload": "cpu", **options}
    engine = ZOEngine(model, ZOConfig(**settings), objective=models.squared_error)
    batches = lambda step: models.points(seed=step, dtype=torch.float32)  # noqa: E731
    schedule = Schedule(0.05, 8, "linear")
    options = {"folder": folder, "checkpoint_every": 3, "schedule": schedule, "evaluate_every": 4}
    held = models.points(dtype=torch.float32)
    history = train(engine, batches, steps, evaluate=lambda e: e.evaluate(held), **options)
    return models.flat(model), history, engine


def test_runs_go_on_where_they_were_bit_for_bit(tmp_path):
    whole, history, engine = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 3)
    parts, resumed, other = run(tmp_path / "parts", 8)
    assert torch.equal(parts, whole) and resumed.losses == history.losses and resumed.scores[8] == history.scores[8]
    assert other.trajectory == engine.trajectory and len(history.losses) == 8
    with pytest.raises(InputError, match="checkpoint with eps"):
        run(tmp_path / "parts", 8, eps=0.5)
    with pytest.raises(InputError, match="constant or linear"):
        Schedule(0.1, 3, "cosine")
