"""The integer model against its simulation, its caches, what it is saved as, and what is refused."""

import json
import warnings

import pytest
import torch
from models import VOCAB, calibration, ids, make
from safetensors.torch import load_file, save_file

from isotone.quamba2.calibrate import calibrate, samples_of
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.fake import FakeQuamba, fake_quantize
from isotone.quamba2.forward import forward
from isotone.quamba2.loading import load
from isotone.quamba2.modeling import QuambaForCausalLM
from isotone.quamba2.prepare import prepare
from isotone.quamba2.quantize import build, quantize
from isotone.quamba2.report import block_sqnr, report
from isotone.quamba2.sampling import probabilities
from isotone.quamba2.ssd import ScanScales, ssd_step_int8
from isotone.shared.errors import InputError

CASES = {
    "w8a8": ("mamba2", {}, dict(w_bits=8)),
    "w4a8": ("mamba2", {}, dict()),
    "w4a16": ("mamba2", {}, dict(a_bits=16)),
    "mixed": ("mamba2", {}, dict(a_bits="mixed", a16_blocks=(1,))),
    "biases": ("mamba2", {"use_bias": True, "tie_word_embeddings": True}, dict(lm_head_bits=16, embedding_bits=16)),
    "v1": ("mamba2", {}, dict(w_bits=8, sort_and_cluster=False, per_state_group=False, hadamard="out")),
    "plain": ("mamba2", {"use_conv_bias": False}, dict(hadamard="none", gptq=False, group_size=None, state_bits=16)),
    "heads": ("mamba2", {"n_groups": 1}, dict(dt_scales="head", clustering="dp", stat="meanabs", lm_head_bits=8)),
    "a16-int8-states": ("mamba2", {}, dict(a_bits=16, state_bits=8, gptq=False)),
    "mamba-w8a8": ("mamba", {}, dict(w_bits=8)),
    "mamba-w4a8": ("mamba", {"use_bias": True}, dict()),
    "mamba-groups": ("mamba", {}, dict(group_channels=True)),
    "mamba-mixed": ("mamba", {}, dict(a_bits="mixed", a16_blocks=(0, 2))),
}


def options(**changes):
    return QuambaConfig(**{"group_size": 32, "calib_samples": 4, "calib_len": 17, "gptq_len": 17, **changes})


@pytest.fixture(scope="module")
def prepared():
    """Each case prepared once."""
    made = {}

    def get(name):
        if name not in made:
            kind, changes, chosen = CASES[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make(kind, **changes)
                made[name] = model, prepare(model, calibration(), options(**chosen))
        return made[name]

    return get


def integer(prepared, name):
    return build(prepared(name)[1])


def close(got, wanted):
    """Equal but for codes that another order of summation rounds to the neighbour: noise far below the rest."""
    error = (got - wanted).square().mean().sqrt() / wanted.std()
    assert error < 0.02, float(error)
    assert (got - wanted).abs().median() < 5e-3 * wanted.std()


@pytest.mark.parametrize("name", CASES)
def test_the_integer_model_is_the_simulated_one(prepared, name):
    fake, real = FakeQuamba(prepared(name)[1]), integer(prepared, name)
    close(real(ids()).logits, fake(ids()))
    mask = torch.ones_like(ids())
    mask[1, :5] = 0
    close(real(ids(), attention_mask=mask).logits[1, 5:], fake(ids(), attention_mask=mask)[1, 5:])
    ours, theirs = real.new_cache(), fake.new_cache()
    for start, end in ((0, 12), (12, 13), (13, 14), (14, 19)):
        close(real(ids()[:, start:end], ours).logits, fake(ids()[:, start:end], theirs))
    kept = real.blocks[0]
    assert ours.conv[0].dtype == (torch.int8 if kept.bits == 8 else torch.float32)
    assert ours.state[0].dtype == (torch.int8 if kept.int8_state else torch.float32)


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "mamba-w8a8", "a16-int8-states", "plain"])
def test_it_is_near_the_float_model(prepared, name):
    """A wrong scale or order would leave nothing of the float logits; 8 bits keep nearly all of them."""
    wanted, got = forward(prepared(name)[0], ids()), integer(prepared, name)(ids()).logits
    correlation = torch.corrcoef(torch.stack([wanted.flatten(), got.flatten()]))[0, 1]
    assert correlation > (0.97 if "w8" in name else 0.85)


@pytest.mark.parametrize("name", ["w4a8", "w4a16", "mamba-w4a8"])
def test_prefill_and_steps_are_near_one_pass(prepared, name):
    """Invariant 7, the int8 path within tolerance: only the states are rounded between the pieces."""
    model = integer(prepared, name)
    whole, cache = model(ids()).logits, model.new_cache()
    pieces = [model(ids()[:, a:b], cache).logits for a, b in ((0, 7), (7, 8), (8, 19))]
    got = torch.cat(pieces, 1)
    error = (got - whole).square().mean().sqrt() / whole.std()
    assert error < (1e-4 if name == "w4a16" else 0.25), float(error)
    assert cache.length == 19


def test_all_of_one_precision_is_that_model(prepared):
    """Invariant 11. Without sort-and-cluster, which W4A16 does not have: it would reorder the weights."""
    plain = dict(sort_and_cluster=False)
    mixed, low, high = (quantize(make(), calibration(), options(a_bits=bits, **plain)) for bits in ("mixed", 8, 16))
    assert torch.equal(mixed.set_precision([8] * 3)(ids()).logits, low(ids()).logits)
    assert torch.equal(mixed.set_precision([16] * 3)(ids()).logits, high(ids()).logits)
    assert not torch.equal(low(ids()).logits, high(ids()).logits)
    clustered = integer(prepared, "mixed").set_precision([8] * 3)
    assert torch.equal(clustered(ids()).logits, integer(prepared, "w4a8")(ids()).logits)
    assert mixed.set_precision([8, 16, 8]).block_bits == (8, 16, 8)
    with pytest.raises(InputError, match="8 or 16 for each of 3"):
        mixed.set_precision([8, 16])
    with pytest.raises(InputError, match="a_bits 'mixed'"):
        low.set_precision([8, 16, 8])


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_gives_the_same_logits(prepared, name, tmp_path):
    """Invariant 12."""
    model = integer(prepared, name)
    model.save_pretrained(tmp_path)
    loaded = QuambaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    ours, theirs = model.new_cache(), loaded.new_cache()
    for start, end in ((0, 9), (9, 10), (10, 11)):
        part = ids()[:, start:end]
        assert torch.equal(model(part, ours).logits, loaded(part, theirs).logits)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["quantization_config"]["quant_method"] == "quamba2"
    assert loaded.config == model.config and document["model_type"] == CASES[name][0]


def test_a_searched_precision_is_saved(prepared, tmp_path):
    model = integer(prepared, "mixed").set_precision([16, 8, 16])
    model.save_pretrained(tmp_path)
    loaded = QuambaForCausalLM.from_pretrained(tmp_path)
    assert loaded.block_bits == (16, 8, 16) and torch.equal(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_is_as_large_as_the_weights_say(bits, tmp_path):
    """Invariant 12: within 2 % of bits a weight and float16 scales of groups, small tensors counted by hand."""
    hidden, inner, heads, state, vocab = 512, 1024, 16, 64, 2000
    model = make(
        hidden_size=hidden, num_heads=heads, head_dim=64, expand=2, n_groups=1, state_size=state, vocab_size=vocab
    )
    config = options(w_bits=bits, group_size=128, gptq=False, calib_samples=1)
    quantize(model, calibration(1), config, in_place=True).save_pretrained(tmp_path)
    rows, width = 2 * inner + 2 * state + heads, inner + 2 * state
    matrices = 3 * (rows * hidden + hidden * inner) + vocab * hidden
    per_weight = 4 / 8 + 2 / 128 if bits == 4 else 1
    small = 3 * (width * 5 + 2 * heads + 4 * heads + 4 * inner + 4 * 16 * (1 + state)) + 4 * vocab
    wanted = matrices * per_weight + vocab * hidden * bits / 8 + small
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(wanted, rel=0.02)


def test_int8_states_do_not_drift():
    """Invariant 13: a state that decays by a keeps an error of at most s/2 / (1 - a) however many steps it takes."""
    generator = torch.Generator().manual_seed(0)
    labels, step, scale = torch.zeros(3, 4, dtype=torch.long), torch.tensor([0.01]), torch.full((1, 5), 0.02)
    int8 = ScanScales(labels, step, step, step, step, scale)
    plain = ScanScales(labels, step, step, step, step)
    A, dt = torch.tensor([-0.3, -1.0, -3.0]), torch.full((1, 3), 40, dtype=torch.int8)
    decay = (torch.nn.functional.softplus(dt[0] * 0.01) * A).exp()[:, None, None]
    kept, exact = torch.zeros(1, 3, 4, 5, dtype=torch.int8), torch.zeros(1, 3, 4, 5)
    largest = 0.0
    for _ in range(400):
        x = torch.randint(-80, 81, (1, 3, 4), generator=generator).to(torch.int8)
        B = torch.randint(-80, 81, (1, 1, 5), generator=generator).to(torch.int8)
        _, kept = ssd_step_int8(kept, x, dt, A, B, B, int8)
        _, exact = ssd_step_int8(exact, x, dt, A, B, B, plain)
        error = (kept[0] * 0.02 - exact[0]).abs()
        assert (error <= 0.01 / (1 - decay) + 1e-5).all()
        largest = max(largest, float(error.max()))
    assert largest > 0.01 and exact.abs().max() < 2.5, "rounding added up over steps, and nothing was clipped"


def test_the_model_runs_long_with_int8_states(prepared):
    model = integer(prepared, "w4a8")
    cache = model.new_cache()
    tokens, errors = ids(1, 160, 9), []
    whole = model(tokens).logits
    for step in range(160):
        got = model(tokens[:, step : step + 1], cache).logits[0, 0]
        errors.append(float((got - whole[0, step]).square().mean().sqrt() / whole.std()))
    assert sum(errors[120:]) / 40 < 2 * sum(errors[20:60]) / 40 + 0.05


def test_generate(prepared):
    model = integer(prepared, "w4a8")
    prompt = ids(2, 6)
    out = model.generate(prompt, max_new_tokens=5)
    assert out.shape == (2, 11) and torch.equal(out[:, :6], prompt)
    cache = model.new_cache()
    logits, found = model(prompt, cache).logits[:, -1:], []
    for _ in range(5):
        found.append(logits.argmax(-1))
        logits = model(found[-1], cache).logits
    assert torch.equal(out[:, 6:], torch.cat(found, 1))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    assert torch.equal(model.generate(padded, max_new_tokens=5, attention_mask=mask)[:, 9:], out[:, 6:])
    first = int(out[0, 6])
    ended = model.generate(prompt[:1], max_new_tokens=5, eos_token_id=first)
    assert ended.shape == (1, 7)
    drawn = [
        model.generate(prompt, max_new_tokens=5, do_sample=True, top_k=9, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for wrong in ({"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(InputError):
            model.generate(prompt, **wrong)


def test_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    wanted = {(None, 1.0): [0.5, 0.3, 0.15, 0.05], (2, 1.0): [0.625, 0.375, 0, 0], (None, 0.6): [0.625, 0.375, 0, 0]}
    for (top_k, top_p), chances in wanted.items():
        torch.testing.assert_close(probabilities(logits, 1.0, top_k, top_p), torch.tensor([chances]))


def test_report(prepared, tmp_path):
    model, _ = prepared("w8a8")
    made = integer(prepared, "w8a8")
    found = report(made, model, ids())
    assert len(found.blocks) == 3 and all(one.sqnr > 15 for one in found.blocks)
    assert [one.sqnr for one in found.blocks] == block_sqnr(made, model, ids())
    cache = made.new_cache()
    made(ids(1), cache)
    assert found.state_bytes == cache.bytes
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert found.total_bytes == sum(values.nbytes for values in tensors.values())
    assert found.total_bytes == sum(one.weight_bytes for one in found.blocks) + found.embedding + found.lm_head
    assert found.float16_bytes == 2 * sum(values.numel() for values in model.parameters())
    # 7 single scales; 3 groups of 4 x 4 for x, 3 for B and C each; 8 states a group of channels
    assert found.blocks[0].scales == 7 + 48 + 6 + 48 * 8
    rounded = prepared("w4a8")[0]
    assert report(integer(prepared, "w4a8")).total_bytes < found.total_bytes
    assert min(block_sqnr(integer(prepared, "w4a8"), rounded, ids())) > 3


def test_the_float_model_stays_as_it_was():
    model = make()
    before = [parameter.clone() for parameter in model.parameters()]
    fake = fake_quantize(model, options(w_bits=8), calibration())
    assert all(map(torch.equal, before, model.parameters())) and fake(ids()).isfinite().all()
    steps = []
    with pytest.warns(UserWarning, match="dB"):
        # 4-bit rows of one scale each and planted outliers: well below 10 dB
        quantize(
            make(),
            calibration(),
            options(hadamard="none", gptq=False, group_size=None, sort_and_cluster=False),
            held_out=ids(1)[0],
            on_progress=lambda *now: steps.append(now),
        )
    assert ("calibration", 4, 4) in steps and ("weights", 4, 4) in steps


def test_calibration_resumes_inside_quantize(tmp_path):
    done = []
    config = options(w_bits=8)

    def stop(step, at, total):
        done.append((step, at))
        if (step, at) == ("weights", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(make(), calibration(), config, folder=tmp_path, on_progress=stop)
    done.clear()
    found = quantize(make(), calibration(), config, folder=tmp_path, on_progress=lambda *now: done.append(now[:2]))
    assert not any(step == "calibration" for step, _ in done), "the samples are not run again"
    wanted = quantize(make(), calibration(), config)
    assert torch.equal(found(ids()).logits, wanted(ids()).logits)


def test_folders_and_mamba_ssm_checkpoints(tmp_path):
    model = make(n_groups=1)
    model.save_pretrained(tmp_path / "hf")
    config = options(w_bits=8)
    wanted = quantize(model, calibration(), config)(ids()).logits
    assert torch.equal(quantize(tmp_path / "hf", calibration(), config)(ids()).logits, wanted)
    ours = model.config
    ssm = {
        "layer": "Mamba2",
        "d_state": ours.state_size,
        "headdim": ours.head_dim,
        "expand": ours.expand,
        "chunk_size": 8,
    }
    document = {"d_model": 64, "n_layer": 3, "vocab_size": VOCAB, "tie_embeddings": False, "ssm_cfg": ssm}
    state = {k.replace("embeddings.", "embedding."): v.clone() for k, v in model.state_dict().items()}
    for folder, write in (("st", save_file), ("pt", torch.save)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(document))
        write(state, tmp_path / folder / ("model.safetensors" if folder == "st" else "pytorch_model.bin"))
        torch.testing.assert_close(forward(load(tmp_path / folder), ids()), forward(model, ids()))
    with pytest.raises(InputError, match="hybrid"):
        (tmp_path / "st" / "config.json").write_text(json.dumps({**document, "attn_layer_idx": [1]}))
        load(tmp_path / "st")
    with pytest.raises(InputError, match="MLP"):
        (tmp_path / "st" / "config.json").write_text(json.dumps({**document, "d_intermediate": 64}))
        load(tmp_path / "st")
    with pytest.raises(InputError, match="weights that the config asks for"):
        (tmp_path / "st" / "config.json").write_text(json.dumps({**document, "n_layer": 4}))
        load(tmp_path / "st")
    (tmp_path / "pt" / "pytorch_model.bin").write_bytes(b"torn")
    with pytest.raises(InputError, match="whole checkpoint"):
        load(tmp_path / "pt")


def test_d_with_a_number_a_channel():
    model = make()
    for layer in model.backbone.layers:
        layer.mixer.D = torch.nn.Parameter(torch.randn(192))
    ready = prepare(model, calibration(), options(w_bits=8))
    close(build(ready)(ids()).logits, FakeQuamba(ready)(ids()))


def test_other_models_are_refused(prepared, tmp_path):
    from transformers import BambaConfig, GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, n_positions=8))
    with pytest.raises(InputError, match="mamba or mamba2, got 'gpt2'"):
        quantize(small, calibration())
    BambaConfig().save_pretrained(tmp_path / "bamba")
    with pytest.raises(InputError, match="mamba or mamba2, got 'bamba'"):
        load(tmp_path / "bamba")
    for kind in ("nemotron_h", "granitemoehybrid", "falcon_h1", "zamba2", "jamba"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(InputError, match="mamba") as refused:
            load(tmp_path / kind)
        assert "\n" not in str(refused.value)
    quantized = integer(prepared, "w4a8")
    with pytest.raises(InputError, match="quantised already"):
        quantize(quantized, calibration())
    quantized.save_pretrained(tmp_path / "q")
    with pytest.raises(InputError, match="quantised already"):
        load(tmp_path / "q")
    with pytest.raises(InputError, match="found none"):
        load(tmp_path)
    make().save_pretrained(tmp_path / "float")
    with pytest.raises(InputError, match="quantize it"):
        QuambaForCausalLM.from_pretrained(tmp_path / "float")
    with pytest.raises(InputError, match="head"):
        load(make().backbone)


def test_broken_files_are_refused(prepared, tmp_path):
    integer(prepared, "w4a8").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    # not the mapped file itself, which is written over
    whole, tensors = path.read_bytes(), {name: values.clone() for name, values in load_file(path).items()}
    path.write_bytes(whole[:3000])
    with pytest.raises(InputError, match="whole model.safetensors"):
        QuambaForCausalLM.from_pretrained(tmp_path)
    name = "blocks.1.scales.dt"
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        ({**tensors, "extra": torch.zeros(1)}, "got extra too"),
        ({**tensors, name: torch.zeros(2, 1)}, f"expected {name} of shape"),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=words):
            QuambaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        QuambaForCausalLM.from_pretrained(tmp_path)


def test_bad_input_is_refused_before_the_first_step():
    nan = make()
    with torch.no_grad():
        nan.backbone.layers[1].mixer.D[0] = float("nan")
    for model, data, config, words in (
        (nan, calibration(), options(), "layers.1.mixer.D"),
        (make(), [], options(), "at least one calibration sample"),
        (make(), None, options(), "samples of token ids for static scales"),
        (make(), calibration(), options(group_size=48), "divide the 64 inputs of in_proj"),
        (make(), calibration(), options(a_bits="mixed", a16_blocks=(3,)), "below 3"),
        (
            make(hidden_size=56, num_heads=7, head_dim=16, expand=2, n_groups=1),
            calibration(),
            options(w_bits=8),
            "56|112",
        ),
    ):
        with pytest.raises(InputError, match=words):
            quantize(model, data, config)
    with pytest.raises(InputError, match="in_place=False"):
        quantize(make(), calibration(), options(), in_place=True, held_out=ids())
    model = quantize(make(), None, options(a_bits=16, gptq=False))
    with pytest.raises(InputError, match="from 0 to 60"):
        model(ids() + 60)
    with pytest.raises(InputError, match="at least one"):
        model(ids()[:, :0])


def test_calibration_on_a_model_without_sites_is_not_needed():
    """W4A16 has no static scales: nothing of the samples but GPTQ's Hessians."""
    with_data = quantize(make(), calibration(), options(a_bits=16, gptq=False))
    without = quantize(make(), None, options(a_bits=16, gptq=False))
    assert torch.equal(with_data(ids()).logits, without(ids()).logits)
    assert not any("scales.conv_x" in name for name in without.tensors())
    assert calibrate(make(), samples_of(calibration(), 1, 4, VOCAB), options())
