"""Losses against loops, gradients where they belong, and a killed run that ends as the uninterrupted one."""

import copy
import json
import sys

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ids, make

from isotone.shared.errors import InputError
from isotone.shared.testing import kill_and_resume, run_cli
from isotone.swiftkv import Batch, DistillConfig, Windows, convert, distill, distillation_kl, drop_teacher, tiled_kl
from isotone.swiftkv.cli import app
from isotone.swiftkv.convert import teacher_of
from isotone.swiftkv.distill import step_loss
from isotone.swiftkv.losses import tiled_cross_entropy


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.5, 8.0), st.integers(1, 12))
def test_kl_equals_the_loops(seed, temperature, tokens):
    student, teacher = normal(tokens, 9, seed=seed), normal(tokens, 9, seed=seed + 1)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = float(distillation_kl(student, teacher, temperature, mask))
    assert found == pytest.approx(reference.kl(student, teacher, temperature, mask), rel=1e-4, abs=1e-6)
    assert found >= -1e-7


def test_kl_is_zero_where_equal_and_finite_where_the_teacher_is_certain():
    logits = normal(5, 9)
    assert abs(float(distillation_kl(logits, logits))) < 1e-7
    certain = torch.zeros(5, 9, dtype=torch.float16)
    certain[:, 3] = 60000.0
    assert torch.isfinite(distillation_kl(logits.half(), certain, 1.0))


def test_gradient_hardly_depends_on_the_temperature():
    sizes = []
    for temperature in (4.0, 8.0, 16.0):
        student = (0.1 * normal(64, 50)).requires_grad_()
        distillation_kl(student, 0.1 * normal(64, 50, seed=1), temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("tile", [4 * 11, 4 * 11 * 3, 4 * 11 * 7, 2**30])
def test_tiles_change_nothing(tile):
    """7 tokens and a vocabulary of 11: tiles of 1, of 3 with a short last one, of 7, and one."""
    teacher, head = normal(7, 6, seed=1), normal(11, 6, seed=2)
    mask = torch.tensor([1, 1, 1, 0, 0, 0, 1]).bool()  # the second tile of 3 is masked whole
    states, whole = (normal(7, 6).requires_grad_() for _ in range(2))
    tiled = tiled_kl(states, teacher, head, 2.0, mask, tile)
    plain = distillation_kl(whole @ head.T, teacher @ head.T, 2.0, mask)
    tiled.backward()
    plain.backward()
    assert float(tiled) == pytest.approx(float(plain), rel=1e-6)
    torch.testing.assert_close(states.grad, whole.grad, rtol=1e-5, atol=1e-6)
    labels = torch.tensor([1, 2, -100, -100, -100, -100, 10])
    tiled = tiled_cross_entropy(states, head, labels, tile)
    wanted = torch.nn.functional.cross_entropy(states @ head.T, labels)
    assert float(tiled) == pytest.approx(float(wanted), rel=1e-6)


def batch(seed=5):
    return Batch(ids(2, 14, seed))


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek-v2", "mistral-window"])
def test_only_the_new_weights_change_and_the_teacher_stays(family):
    model = convert(make(family), 2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), model.teacher():
        wanted = model(input_ids=ids(1, 9)).logits
    distill(model, lambda step: batch(step), steps=4, lr=1e-2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("swiftkv" in name), name
    with torch.no_grad(), model.teacher():
        assert torch.equal(model(input_ids=ids(1, 9)).logits, wanted)


def test_loss_is_the_paper_s_of_two_full_forwards():
    model = convert(make(), 2, 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "swiftkv" in name:
                p.add_(0.1)
    labels = ids(2, 14).clone()
    labels[0, :6] = -100
    given_batch = Batch(ids(2, 14), labels)
    with torch.no_grad():
        student = model(input_ids=given_batch.input_ids, output_hidden_states=True)
        with model.teacher():
            teacher = model(input_ids=given_batch.input_ids, output_hidden_states=True)
    kl = distillation_kl(student.logits.flatten(0, 1), teacher.logits.flatten(0, 1), 2.0, (labels != -100).flatten())
    wanted = kl + torch.nn.functional.mse_loss(student.hidden_states[-2], teacher.hidden_states[-2])
    for options in ({}, {"share_lower": False}, {"gradient_checkpointing": True}, {"tile_bytes": 400}):
        assert float(step_loss(model, given_batch, DistillConfig(**options))) == pytest.approx(float(wanted), rel=1e-5)
    logits = student.logits[:, :-1].flatten(0, 1)
    cross = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert float(step_loss(model, given_batch, DistillConfig(loss="lm"))) == pytest.approx(float(cross), rel=1e-5)


def test_sharing_the_lower_half_and_checkpoints_change_no_gradient():
    gradients = []
    for options in ({}, {"share_lower": False}, {"gradient_checkpointing": True}):
        model = convert(make(), 2, 2)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(step_loss(model, batch(), DistillConfig(**options)), parameters))
    for other in gradients[1:]:
        for ours, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_is_near():
    model = convert(make(initializer_range=0.1), 2, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "swiftkv" in name:
                p.add_(0.1)
    plain = float(step_loss(model, batch(), DistillConfig()))
    assert float(step_loss(model, batch(), DistillConfig(compute_dtype="bf16"))) == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize(
    "family, train, dtype",
    [("llama", "qkv", torch.bfloat16), ("deepseek-v2", "full", torch.bfloat16), ("qwen3", "qkv", torch.float16)],
)
def test_half_precision_models_are_trained_in_single(family, train, dtype):
    """At a rate whose steps bf16's 8 bits would lose: nearly all weights change, and the loss falls as in fp32."""
    falls, batches = {}, [batch(seed) for seed in range(3)]
    for kind in (torch.float32, dtype):
        model = convert(make(family, initializer_range=0.1).to(kind), 2, 2)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_proj_swiftkv.weight")}
        seen = []
        options = dict(steps=30, lr=3e-4, train=train, evaluate_every=30)
        score = lambda m: {"x": float(m(input_ids=batch().input_ids).logits.mean())}  # noqa: B023, E731
        history = distill(
            model,
            lambda step: batches[step % 3],
            evaluate=score,
            on_step=lambda step, loss: seen.append(model.model.norm_swiftkv.weight.dtype),  # noqa: B023
            **options,
        )
        falls[kind] = sum(history.losses[:3]) - sum(history.losses[-3:])
        assert set(seen) == {torch.float32} and {p.dtype for p in model.parameters()} == {kind}
        changed = [(p != before[n]).float().mean() for n, p in model.named_parameters() if n in before]
    assert sum(changed) / len(changed) > 0.75
    assert falls[dtype] == pytest.approx(falls[torch.float32], rel=0.2) and falls[dtype] > 0


@pytest.mark.parametrize("train", ["qkv", "norms", "full"])
def test_distillation_lowers_the_loss(train):
    model = convert(make(initializer_range=0.1), 2, 4)
    data = [batch(seed) for seed in range(3)]
    history = distill(model, lambda step: data[step % 3], steps=60, lr=5e-3, train=train)
    assert sum(history.losses[-3:]) < 0.7 * sum(history.losses[:3])
    assert model.config.teacher_weights == (train == "qkv"), "a trained teacher is dropped"


def test_training_all_is_against_the_base_as_it_was():
    """The teacher of train=full is a copy: its first loss is that of qkv, though its MLPs are trained after."""
    losses = {}
    for train in ("qkv", "full"):
        model = convert(make(initializer_range=0.1), 2, 2)
        base = copy.deepcopy(make(initializer_range=0.1))
        losses[train] = distill(model, lambda step: batch(), steps=30, lr=1e-2, train=train).losses
        with torch.no_grad():
            wanted = base(input_ids=batch().input_ids).logits.log_softmax(-1)
            ours = model(input_ids=batch().input_ids).logits.log_softmax(-1)
        kl = float(torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="sum") / 28)
        assert kl < losses[train][0], train
    assert losses["full"][0] == pytest.approx(losses["qkv"][0])


def test_schedule():
    config = DistillConfig(steps=100)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[4] == pytest.approx(0.8)
    assert rates[99] == pytest.approx(1 / 95) and sorted(rates[5:], reverse=True) == rates[5:]


@pytest.mark.parametrize("train", ["qkv", "full"])
def test_a_resumed_run_is_bit_identical(train, tmp_path):
    def run(folder, steps_before=None):
        # of a model in bf16 the fp32 weights are what is kept
        model = convert(make().to(torch.float32 if train == "full" else torch.bfloat16), 2, 2)
        config = DistillConfig(steps=8, lr=1e-2, train=train, evaluate_every=4)
        data = Windows(ids(1, 300)[0], 12, 2)

        def stop(step, loss):
            if step == steps_before:
                raise KeyboardInterrupt

        history = distill(model, data, config, folder=folder, checkpoint_every=2, on_step=stop)
        return model, history

    straight, wanted = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", steps_before=5)
    resumed, found = run(tmp_path / "killed")
    assert found.losses == wanted.losses
    for ours, theirs in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="its own settings"):
        distill(convert(make(), 2, 1), lambda step: batch(), steps=8, folder=tmp_path / "killed")


@pytest.mark.parametrize("change", ["text", "seed", "context", "batch", "model", "wider", "function"])
def test_another_run_s_checkpoint_is_refused(change, tmp_path):
    def run(text=1, seed=0, context=12, batch=2, **model):
        data = Windows(ids(1, 300, text)[0], context, batch, seed)
        distill(convert(make(**model), 2, 2), data, steps=2, folder=tmp_path, checkpoint_every=1)

    run()
    run()  # of the same data and model it goes on
    other = {"text": {"text": 2}, "seed": {"seed": 1}, "context": {"context": 13}, "batch": {"batch": 3}}
    other |= {"model": {"initializer_range": 0.1}, "wider": {"hidden_size": 64}}
    with pytest.raises(InputError, match="its own settings") as raised:
        if change == "function":
            distill(convert(make(), 2, 2), lambda step: batch(), steps=2, folder=tmp_path)
        else:
            run(**other[change])
    assert ("base" if change in ("model", "wider") else "data") in str(raised.value)


def test_a_command_on_another_text_is_refused(tmp_path):
    convert(make(vocab_size=256), 2, 2).save_pretrained(tmp_path / "swift")
    lines = [json.dumps({"prompt": f"{i} and {i}? ", "completion": f"{2 * i}."}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[1:]))
    arguments = ["--quiet", "--steps", "1", "--context", "16", "--batch", "2", "--checkpoint-every", "1", "--out", "o"]
    assert run_cli(app, ["distill", "swift", "--text", "a.jsonl", *arguments], tmp_path).code == 0
    for more in (["--text", "b.jsonl"], ["--text", "a.jsonl", "--seeds", "1"]):
        result = run_cli(app, ["distill", "swift", *more, *arguments], tmp_path)
        assert result.code == 2 and "data" in result.stderr, result.stderr


def test_a_killed_command_resumes_to_the_same_weights(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    torch.manual_seed(0)
    convert(make(vocab_size=256), 2, 2).save_pretrained(tmp_path / "swift")
    arguments = ["distill", "swift", "--text", "text.txt", "--quiet", "--steps", "100", "--context", "16"]
    arguments += ["--batch", "2", "--checkpoint-every", "10", "--out"]
    assert run_cli(app, [*arguments, "straight"], tmp_path).code == 0
    store = tmp_path / "killed" / "checkpoints"
    command = [sys.executable, "-m", "isotone.swiftkv", *arguments, "killed"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are the same at the same number
    done = kill_and_resume(
        command, cwd=tmp_path, ready=lambda: any(store.glob("step-*")), seed=0, delay=0.2, env=threads
    )
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (tmp_path / folder / "model" / name for folder in ("killed", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss": "mse"}, "mse"),
        ({"train": "heads"}, "heads"),
        ({"steps": 0}, "steps"),
        ({"lr": float("nan")}, "nan"),
        ({"temperature": 0.0}, "temperature"),
        ({"hidden_loss_mult": -1.0}, "hidden_loss_mult"),
        ({"compute_dtype": "fp8"}, "fp8"),
        ({"hidden_loss_layer": -8}, "hidden_loss_layer"),
        ({"hidden_loss_layer": 9}, "hidden_loss_layer"),
        ({"hidden_loss_layer": 9, "hidden_loss_mult": 0.0}, "hidden_loss_layer"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"steps": True}, "whole number"),
        ({"lr": 1e9, "clip": 1e9, "steps": 20}, "finite loss"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=words):
        distill(convert(make(), 2), lambda step: batch(), **{"steps": 2, **options})


@pytest.mark.parametrize("layer", [-2, 0, 5])
def test_the_hidden_loss_of_a_shared_state_is_0(layer):
    model = convert(make(), 5)
    losses = [
        float(step_loss(model, batch(), DistillConfig(hidden_loss_layer=layer, hidden_loss_mult=mult)))
        for mult in (0.0, 1.0)
    ]
    assert losses[0] == losses[1]


def test_models_without_a_teacher_or_anything_to_train():
    with pytest.raises(InputError, match="teacher"):
        distill(drop_teacher(convert(make(), 2)), lambda step: batch(), steps=1)
    with pytest.raises(InputError, match="nothing to distil"):
        distill(convert(make(), 6), lambda step: batch(), steps=1)


@pytest.mark.parametrize("train", ["norms", "full"])
def test_training_what_is_shared_leaves_the_base_alone(train):
    base = make(initializer_range=0.1)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = convert(base, 2, 2)
    teacher = teacher_of(model)
    with torch.no_grad():
        wanted = base(input_ids=ids(1, 9)).logits
    distill(model, lambda step: batch(), steps=3, lr=1e-2, train=train)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids(1, 9)).logits, wanted)
        assert torch.equal(teacher(input_ids=ids(1, 9)).logits, wanted)
    assert not torch.equal(
        model.model.layers[3].input_layernorm.weight, before["model.layers.3.input_layernorm.weight"]
    )
    assert model.model.layers[3].self_attn.config is model.config


def by_hand(model, data, steps, lr, clip, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW with gradients clipped to a norm, written out; returns the weights after `steps`."""
    config = DistillConfig(steps=steps, lr=lr)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    for step in range(steps):
        gradients = dict(
            zip(named, torch.autograd.grad(step_loss(model, data(step), config), named.values()), strict=True)
        )
        norm = torch.sqrt(sum((g * g).sum() for g in gradients.values()))
        rate = lr * config.rate(step)
        with torch.no_grad():
            for name, p in named.items():
                g = gradients[name] * min(1.0, clip / (float(norm) + 1e-6))
                first[name] = betas[0] * first[name] + (1 - betas[0]) * g
                second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
                p.mul_(1 - rate * decay)
                corrected = second[name] / (1 - betas[1] ** (step + 1))
                p.sub_(rate * first[name] / (1 - betas[0] ** (step + 1)) / (corrected.sqrt() + eps))
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("clip, decay", [(1e9, 0.0), (0.05, 0.0), (0.05, 0.3)])
def test_steps_are_adamw_s_with_clipped_gradients(clip, decay):
    data = lambda step: batch(step)  # noqa: E731
    wanted = by_hand(convert(make(), 2, 2), data, 5, 1e-2, clip, decay)
    model = convert(make(), 2, 2)
    distill(model, data, steps=5, lr=1e-2, clip=clip, weight_decay=decay)
    named = dict(model.named_parameters())
    for name, weight in wanted.items():
        torch.testing.assert_close(named[name].detach(), weight, rtol=1e-3, atol=1e-4)


def test_a_batch_is_of_matching_shapes():
    with pytest.raises(InputError, match="labels"):
        Batch(ids(2, 5), ids(2, 4))
    with pytest.raises(InputError, match="position_ids"):
        Batch(ids(2, 5), position_ids=ids(3, 5))
    with pytest.raises(InputError, match="shape"):
        Batch(ids(2, 5)[0])
    with pytest.raises(InputError, match="0 to 96"):
        distill(convert(make(), 2), lambda step: Batch(ids(2, 5) + 97), steps=1)


@pytest.mark.parametrize("train", ["norms", "full"])
def test_a_run_that_breaks_off_leaves_the_model_as_it_was(train):
    model = convert(make(initializer_range=0.1), 2, 2)
    with torch.no_grad(), model.teacher():
        wanted = model(input_ids=ids(1, 9)).logits
    seen = []

    def stop(step, loss):
        with pytest.raises(InputError, match="teacher"), model.teacher():
            pass
        seen.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, lambda step: batch(step), steps=9, lr=1e-2, train=train, on_step=stop)
    with torch.no_grad(), model.teacher():
        assert torch.equal(model(input_ids=ids(1, 9)).logits, wanted) and seen == [1, 2, 3]
    history = distill(model, lambda step: batch(step), steps=1)
    fresh = distill(convert(make(initializer_range=0.1), 2, 2), lambda step: batch(step), steps=1)
    # the new projections were trained on; the teacher and all that is shared with it were not
    assert history.losses[0] < fresh.losses[0]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "swiftkv" in name
    }


def test_the_weights_that_a_run_starts_from_are_part_of_it(tmp_path):
    data = Windows(ids(1, 300)[0], 12, 2)
    distill(convert(make(), 2, 2), data, steps=2, folder=tmp_path, checkpoint_every=1)
    other = convert(make(), 2, 2)
    with torch.no_grad():
        other.model.layers[3].self_attn.q_proj_swiftkv.weight.mul_(2)
    with pytest.raises(InputError, match="base"):
        distill(other, data, steps=2, folder=tmp_path)


def test_labels_that_ask_for_nothing_are_refused():
    nothing = torch.full((2, 5), -100)
    with pytest.raises(InputError, match="learn from at step 0|token to learn from"):
        distill(convert(make(), 2), lambda step: Batch(ids(2, 5), nothing), steps=1)
