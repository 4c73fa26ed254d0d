"""The engine against MeZO in memory: bit for bit, wherever blocks rest and whatever the model."""

from __future__ import annotations

import math
import threading
import time
import warnings

import models
import pytest
import torch
from torch import nn

from isotone.distzo2 import MeZO, ThrottledLink, ZOConfig, ZOEngine, base_hash, parameter_groups, replay
from isotone.distzo2.objective import model_loss
from isotone.distzo2.plan import pipeline_seconds
from isotone.shared.errors import InputError

OFFLOADS = ["none", "cpu", "disk"]


def engine_for(model, tmp_path, link=None, objective=model_loss, **options):
    folder = tmp_path if options.get("offload") == "disk" else None
    return ZOEngine(model, ZOConfig(**options, disk_folder=folder), objective=objective, link=link)


def in_memory(model, batches, rates, weight_decay=0.0, objective=model_loss, **options):
    """The g_t of MeZO with an immediate update."""
    optimizer = MeZO(parameter_groups(model, weight_decay), lr=rates[0], **options)
    grads = []
    for batch, lr in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step(lambda batch=batch: objective(model, batch)[0])
        grads.append(optimizer.last_grads)
    return grads


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", ["opt", "opt-classifier", "llama", "qwen3-tied", "gpt2"])
def test_deferred_update_and_flush_are_mezo(family, offload, tmp_path):
    """Section 7, item 3: g_t and theta_T bitwise, with scheduled rates and weight decay; tied tensors once."""
    ours, theirs = models.make(family), models.make(family)
    batches = [models.batch(family, seed=t) for t in range(3)]
    rates = [1e-2, 5e-3, 2e-3]
    engine = engine_for(ours, tmp_path, offload=offload, weight_decay=0.1)
    grads = []
    for batch, lr in zip(batches, rates, strict=True):
        engine.lr = lr
        grads.append(engine.step(batch).projected_grads)
    wanted = in_memory(theirs, batches, rates, 0.1)
    assert grads == wanted and max(abs(g) for (g,) in grads) > 0
    state = engine.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())


def test_a_copy_a_tensor_moves_the_same(tmp_path):
    """Section 2.12: without flat buckets, and from pageable memory."""
    whole, pieces = (models.make("llama") for _ in range(2))
    one = engine_for(whole, tmp_path, offload="cpu", lr=1e-2)
    other = engine_for(pieces, tmp_path, offload="cpu", lr=1e-2, flat_buckets=False, pin_memory=False)
    for t in range(2):
        assert one.step(models.batch("llama", seed=t)) == other.step(models.batch("llama", seed=t))
    one.flush()
    other.flush()
    assert torch.equal(models.flat(whole), models.flat(pieces))


@pytest.mark.parametrize("steps", [0, 1])
def test_no_and_one_step(steps, tmp_path):
    ours, theirs = models.chain(dtype=torch.float32), models.chain(dtype=torch.float32)
    batches = [models.points(dtype=torch.float32)] * steps
    engine = engine_for(ours, tmp_path, objective=models.squared_error, offload="cpu", lr=0.1)
    for batch in batches:
        engine.step(batch)
    if steps:
        in_memory(theirs, batches, [0.1], objective=models.squared_error)
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs))


@pytest.mark.parametrize("options", [{"n_directions": 3}, {"estimator": "one_sided"}, {"rng": "torch"}])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_estimators_and_the_torch_generator(options, offload, tmp_path):
    many = {**options, "n_directions": options.get("n_directions", 2)}
    ours, theirs = models.make(), models.make()
    batches = [models.batch(seed=t) for t in range(3)]
    engine = engine_for(ours, tmp_path, offload=offload, lr=1e-2, **many)
    grads = [engine.step(batch).projected_grads for batch in batches]
    assert grads == in_memory(theirs, batches, [1e-2] * 3, **many)
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_rate_zero_leaves_the_weights_as_they_are(offload, tmp_path):
    model = models.make()
    before = models.flat(model)
    engine = engine_for(model, tmp_path, offload=offload, lr=0.0)
    for t in range(3):
        engine.step(models.batch(seed=t))
    engine.flush()
    assert torch.equal(models.flat(model), before)


def test_evaluation_generation_and_state_see_the_last_update(tmp_path):
    """The reference misses it (section 3)."""
    ours, theirs = models.make("llama"), models.make("llama")
    batch = models.batch("llama")
    engine = engine_for(ours, tmp_path, offload="cpu", lr=1e-2)
    engine.step(batch)
    in_memory(theirs, [batch], [1e-2])
    assert engine.evaluate(batch) == float(model_loss(theirs, batch)[0])
    prompt = batch["input_ids"][:2]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(engine.generate(prompt, **options), theirs.generate(prompt, **options))
    logits = engine.run(lambda: ours(input_ids=prompt).logits)
    assert torch.equal(logits, theirs(input_ids=prompt).logits)


def test_objectives_without_a_gradient(tmp_path):
    """Generation of different lengths for the two signs, scored by a count: blocks are visited several times."""
    ours, theirs = models.make("opt"), models.make("opt")
    prompt = models.batch()["input_ids"]
    lengths = []

    def score(model):
        out = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=list(range(9)))
        lengths.append(out.shape[1])
        return -float((out % 3 == 0).float().mean())

    engine = engine_for(ours, tmp_path, offload="cpu", lr=1e-2, eps=0.2)
    found = [engine.step(lambda: score(ours)) for _ in range(3)]
    optimizer = MeZO(theirs.parameters(), lr=1e-2, eps=0.2)
    wanted = []
    for _ in range(3):
        optimizer.step(lambda: score(theirs))
        wanted.append(optimizer.last_grads[0])
    assert [step.projected_grad for step in found] == wanted and len(set(wanted)) > 1
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs))


def test_autocast_in_a_closure_is_each_streams_own(tmp_path):
    ours, theirs = models.make(), models.make()
    batch = models.batch()

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model_loss(model, batch)[0]

    engine = engine_for(ours, tmp_path, offload="cpu", lr=1e-2)
    found = engine.step(lambda: loss(ours))
    optimizer = MeZO(theirs.parameters(), lr=1e-2)
    optimizer.step(lambda: loss(theirs))
    assert found.projected_grads == optimizer.last_grads


def test_a_closure_that_fails_leaves_whole_weights(tmp_path):
    ours, theirs = models.make(), models.make()
    batch = models.batch()
    engine = engine_for(ours, tmp_path, offload="cpu", lr=1e-2)
    engine.step(batch)
    seen = []

    def fails():
        value = model_loss(ours, batch)
        seen.append(value)
        if len(seen) == 2:
            raise KeyError("closure")
        return value

    with pytest.raises(KeyError):
        engine.step(fails)
    in_memory(theirs, [batch], [1e-2])
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs)) and engine.steps == 1
    assert math.isfinite(engine.step(batch).loss)


def test_blocks_that_a_closure_does_not_call_are_updated_all_the_same(tmp_path):
    ours, theirs = models.chain(dtype=torch.float32), models.chain(dtype=torch.float32)
    x = models.points(dtype=torch.float32)["x"]

    def some(model):
        return (model.layers[2](model.layers[0](model.enter(x))) ** 2).mean()

    engine = engine_for(ours, tmp_path, offload="cpu", lr=0.1)
    grads = [engine.step(lambda: some(ours)).projected_grads for _ in range(3)]
    assert grads == in_memory(theirs, [None] * 3, [0.1] * 3, objective=lambda model, _: (some(model), 1))
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs))


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path):
    model = models.make()
    before = models.flat(model)
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-2)
    found = engine.step(lambda: math.inf)
    engine.flush()
    assert found.skipped and engine.skipped == 1 and torch.equal(models.flat(model), before)


def test_trajectories_replay_bit_for_bit(tmp_path):
    model, base = models.make(), models.make()
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-2, weight_decay=0.1, n_directions=2)
    for t in range(4):
        engine.lr = 1e-2 / (t + 1)
        engine.step(models.batch(seed=t) if t != 2 else (lambda: math.nan))
    engine.flush()
    assert engine.trajectory.base == base_hash(base)
    assert torch.equal(models.flat(replay(base, engine.trajectory)), models.flat(model))
    with pytest.raises(InputError, match="base model"):
        replay(base, engine.trajectory)


@pytest.mark.parametrize(("offload_dtype", "working"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_half_precision_on_the_link_and_master_weights(offload_dtype, working, tmp_path):
    """AMP: what rests is rounded, what is computed is exact about what rests; fp32 at rest is the master copy."""
    model = models.make()
    start = models.flat(model)
    options = {"offload_dtype": getattr(torch, offload_dtype), "working_dtype": getattr(torch, working)}
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-6, weight_decay=0.1, **options)
    seen = []
    hook = model.model.decoder.layers[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(module.fc1.weight.dtype)
    )
    engine.step(models.batch(seed=0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in (1, 2):
            engine.step(models.batch(seed=t))
    assert ("swallowed" in " ".join(str(w.message) for w in said)) == (offload_dtype == "bfloat16")
    hook.remove()
    assert set(seen) == {getattr(torch, working)}
    state = models.state_flat(engine.trained_state())
    moved = state.dtype == torch.float32 and not torch.equal(state, start)
    # updates of 1e-6 are lost in bfloat16 and kept in the master copy
    assert moved == (offload_dtype == "float32")
    assert math.isfinite(engine.evaluate(models.batch()))


def test_stochastic_rounding_in_the_engine_replays(tmp_path):
    model, base = models.make(), models.make()
    options = {"offload_dtype": torch.bfloat16, "stochastic_rounding": True, "weight_decay": 0.1}
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-4, **options)
    for t in range(3):
        engine.step(models.batch(seed=t))
    replayed = replay(base, engine.trajectory)
    assert torch.equal(models.state_flat(engine.trained_state()).float(), models.flat(replayed))


def test_subsets_of_peft_train_alone(tmp_path):
    import peft

    def lora():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(models.make("llama"), config).eval()

    ours, theirs = lora(), lora()
    batches = [models.batch("llama", seed=t) for t in range(2)]
    engine = engine_for(ours, tmp_path, offload="cpu", lr=1e-1, eps=1e-2)
    grads = [engine.step(batch).projected_grads for batch in batches]
    assert grads == in_memory(theirs, batches, [1e-1] * 2, eps=1e-2)
    assert all("lora" in name for name in engine.trained_state())
    engine.flush()
    assert torch.equal(models.flat(ours), models.flat(theirs))


def test_prefixes_of_peft_train_alone(tmp_path):
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(models.make("llama"), config).eval()
    engine = engine_for(model, tmp_path, offload="cpu", lr=1e-1, eps=1e-1)
    before = models.state_flat(engine.trained_state())
    found = engine.step(models.batch("llama"))
    assert found.projected_grad != 0
    assert not torch.equal(models.state_flat(engine.trained_state()), before)


def test_state_is_taken_back(tmp_path):
    first, second = models.make(seed=0), models.make(seed=1)
    one = engine_for(first, tmp_path, offload="cpu", lr=1e-2)
    one.step(models.batch())
    two = engine_for(second, tmp_path, offload="none", lr=1e-2)
    two.step(models.batch())
    two.load_state_dict(one.state_dict())
    two.flush()
    assert torch.equal(models.flat(second), models.flat(first))
    state = one.trained_state()
    name = next(iter(state))
    with pytest.raises(InputError, match=name):
        two.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(InputError, match="shape"):
        two.load_state_dict({**state, name: torch.zeros(1)})


def sizes(engine):
    return sum(b.size * 4 for b in engine.layout.blocks[0].buckets)


@pytest.mark.parametrize("overlap", [True, False])
def test_one_upload_and_one_offload_a_block_and_no_more_than_three_at_once(overlap, tmp_path):
    model = models.chain(dtype=torch.float32, layers=6)
    engine = engine_for(model, tmp_path, objective=models.squared_error, offload="cpu", lr=0.1, overlap=overlap)
    engine.step(models.points(dtype=torch.float32))
    spans = engine.link.record()
    before = dict(engine.link.bytes)
    engine.step(models.points(dtype=torch.float32))
    for lane in ("upload", "offload"):
        assert sorted(span.block for span in spans if span.lane == lane) == list(range(6))
        assert engine.link.bytes[lane] - before[lane] == 6 * sizes(engine)
    there = {b: [s for s in spans if s.block == b] for b in range(6)}
    stay = {b: (min(s.start for s in own), max(s.end for s in own)) for b, own in there.items()}
    for now in [start for start, _ in stay.values()]:
        assert sum(start <= now < end for start, end in stay.values()) <= 3


class Sleepy(nn.Module):
    """Layers that take a given time."""

    def __init__(self, layers, seconds):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.seconds = seconds
        for layer in self.layers:
            layer.register_forward_hook(lambda *_: time.sleep(seconds))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean()


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_step_time_is_the_slowest_lane_or_the_sum(ratio, tmp_path):
    """Section 7, item 10: N max(T_up, T_c, T_off) + fill with overlap, N times the sum without."""
    transfer, layers = 0.08, 4
    compute = ratio * transfer
    lanes = [transfer, compute, transfer]
    wanted = {True: pipeline_seconds(lanes, layers), False: layers * sum(lanes)}
    took = {}
    for overlap in (True, False):
        model = Sleepy(layers, compute / 2).eval()
        link = ThrottledLink(4 * 64 * 65 / transfer, overlap=overlap)
        engine = engine_for(model, tmp_path, link=link, offload="cpu", lr=0.1, overlap=overlap)
        x = torch.randn(2, 64)
        engine.step(lambda model=model, x=x: model(x))
        took[overlap] = math.inf
        for _ in range(8):  # a machine that is busy only adds
            start = time.perf_counter()
            engine.step(lambda model=model, x=x: model(x))
            took[overlap] = min(took[overlap], time.perf_counter() - start)
            if took[overlap] < 1.2 * wanted[overlap]:
                break
    assert all(took[overlap] == pytest.approx(wanted[overlap], rel=0.3) for overlap in (True, False))
    assert took[False] > 1.3 * took[True]


def test_threads_end_with_the_engine(tmp_path):
    before = threading.active_count()
    for _ in range(3):
        engine = engine_for(models.chain(), tmp_path, offload="cpu")
        engine.step(lambda: 1.0)
        del engine
    import gc

    gc.collect()
    time.sleep(0.2)
    assert threading.active_count() <= before + 6


def test_autocast_of_the_caller_is_the_forwards_own(tmp_path):
    """Forwards run in other threads, which have no autocast of their own."""
    seen = []
    engine = engine_for(models.chain().float(), tmp_path, offload="cpu")

    def closure():
        seen.append(torch.is_autocast_enabled("cpu"))
        return 1.0

    engine.step(closure)
    with torch.autocast("cpu", torch.bfloat16):
        engine.step(closure)
    assert seen == [False, False, True, True]


def test_two_engines_share_a_folder_and_leave_nothing(tmp_path):
    batch = models.batch()
    one, other = (ZOEngine(models.make(), ZOConfig(lr=1e-2, offload="disk", disk_folder=tmp_path)) for _ in range(2))
    one.step(batch)
    alone = models.state_flat(one.trained_state())
    before = models.state_flat(other.trained_state())
    one.step(batch)
    assert torch.equal(models.state_flat(other.trained_state()), before) and not torch.equal(alone, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
def test_offloaded_is_resident_on_a_gpu(overlap):  # pragma: no cover - needs a GPU
    """Streams and events: the same bits, whatever overlaps."""
    batch = models.batch()
    config = ZOConfig(lr=1e-2)
    resident = ZOEngine(models.make().cuda(), config, device="cuda")
    moved = ZOEngine(models.make(), ZOConfig(lr=1e-2, offload="cpu", overlap=overlap), device="cuda")
    for _ in range(5):
        assert resident.step(batch).projected_grads == moved.step(batch).projected_grads
    assert torch.equal(models.state_flat(resident.trained_state()), models.state_flat(moved.trained_state()))
