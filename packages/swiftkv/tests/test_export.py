"""Saving and loading: bit for bit, always the student, and the names that the authors' code and loader use."""

import json

import pytest
import torch
from models import FAMILIES, ids, make
from safetensors.torch import load_file, save_file
from test_engine import shaken
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from isotone.shared.errors import InputError
from isotone.swiftkv import SwiftKVForCausalLM, convert, drop_teacher, export_arctic, load
from isotone.swiftkv.export import arctic_config


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids(2, 9)).logits


@pytest.mark.parametrize("number, family", list(enumerate(FAMILIES)))
def test_round_trip_is_bitwise(number, family, tmp_path):
    export = ("swift", "dual")[number % 2]  # each family of several variants has both
    model = shaken(convert(make(family), 2, 2))
    model.swiftkv(False).save_pretrained(tmp_path, export=export)
    assert model.config.swiftkv is False and model.config.teacher_weights, "saving changes nothing in memory"
    model.swiftkv(True)
    for loaded in (SwiftKVForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and loaded.split == model.split
        ours, theirs = loaded.state_dict(), model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        # the same weights elsewhere in memory: products of widths that fill no vector may round apart
        torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-6, atol=5e-6)
        assert loaded.config.teacher_weights == (export == "dual")
        if export == "dual":
            assert set(ours) == set(theirs)
            with loaded.teacher(), model.teacher():
                torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=5e-6)
    names = set(load_file(tmp_path / "model.safetensors"))
    teacher = {n for n in names if ".3.self_attn." in n and "_swiftkv" not in n and ".o_proj." not in n}
    assert bool(teacher) == (export == "dual")


def test_given_weights_are_saved_and_the_bare_model_loads(tmp_path):
    """`state_dict=` is how transformers' Trainer saves; `AutoModel` is how encoders and reward models load."""
    model = shaken(convert(make(), 2, 2))
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given, export="swift")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved and all(torch.equal(tensor, given[name]) for name, tensor in saved.items())
    assert not any(name.endswith("layers.3.self_attn.q_proj.weight") for name in saved)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is type(model.model)
    loaded = SwiftKVForCausalLM.from_pretrained(tmp_path).model
    with torch.no_grad():
        both = [one.eval()(input_ids=ids(1, 7)).last_hidden_state for one in (bare, loaded)]
    torch.testing.assert_close(*both, rtol=1e-6, atol=5e-6)


def test_a_config_that_is_switched_off_names_the_remedy(tmp_path):
    """The authors' configs say swiftkv = false, and their checkpoints have no teacher."""
    convert(make(), 2, 2).save_pretrained(tmp_path, export="swift")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "swiftkv": False}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="config.swiftkv = True"):
        loaded(input_ids=ids(1, 3))
    assert logits(SwiftKVForCausalLM.from_pretrained(tmp_path)).isfinite().all()


def test_key_names_are_the_authors(tmp_path):
    convert(make(), 2, 2).save_pretrained(tmp_path, export="swift")
    tensors = load_file(tmp_path / "model.safetensors")
    added = {name: tuple(t.shape) for name, t in tensors.items() if "swiftkv" in name}
    wanted = {f"model.layers.{j}.self_attn.q_proj_swiftkv.weight": (32, 32) for j in range(2, 6)}
    wanted |= {f"model.layers.{j}.self_attn.{x}_proj_swiftkv.weight": (16, 32) for j in (2, 4) for x in "kv"}
    assert added == wanted | {"model.norm_swiftkv.weight": (32,)}
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["model_type"] == "llama_swiftkv" and document["swiftkv"] is True
    assert (document["num_key_value_layers"], document["key_value_group_size"]) == (2, 2)


def test_the_authors_checkpoint_runs_its_student(tmp_path):
    """Theirs has teacher and student, no teacher_weights, and may say swiftkv: false."""
    model = shaken(convert(make(), 2, 1))
    model.save_pretrained(tmp_path, export="dual")
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document.pop("teacher_weights")
    document["swiftkv"] = False
    path.write_text(json.dumps(document))
    assert torch.equal(logits(SwiftKVForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_tied_embeddings_stay_tied(tmp_path):
    model = convert(make(tie_word_embeddings=True), 2, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path, export="swift")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = SwiftKVForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded), logits(model))


def test_dtype_and_generation_config_are_kept(tmp_path):
    base = make().to(torch.bfloat16)
    base.generation_config.max_new_tokens = 3
    convert(base, 2).save_pretrained(tmp_path)
    loaded = SwiftKVForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and loaded.generation_config.max_new_tokens == 3


def loader_parameters(config):
    """The parameters of ArcticInference's Llama and their shapes before fusing, by its public code (no biases)."""
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    size = config["head_dim"]
    q, k = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "lm_head.weight": (config["vocab_size"], d)}
    shapes |= {"model.norm.weight": (d,), "model.norm_swiftkv.weight": (d,)}
    for j in range(layers):
        at, swift = f"model.layers.{j}", "" if j < config["num_key_value_layers"] else "_swiftkv"
        shapes[f"{at}.self_attn.q_proj{swift}.weight"] = (q, d)
        shapes[f"{at}.self_attn.k_proj{swift}.weight"] = shapes[f"{at}.self_attn.v_proj{swift}.weight"] = (k, d)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, q)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (f, d)
        shapes[f"{at}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (d,)
    return shapes


@pytest.mark.parametrize("family", ["llama", "llama3-rope"])
def test_arctic_export(family, tmp_path):
    model = shaken(convert(make(family), 2, 1))
    export_arctic(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == loader_parameters(config)
    assert config["architectures"] == ["LlamaSwiftKVForCausalLM"] and config["model_type"] == "llama_swiftkv"
    assert config["swiftkv"] is True and config["key_value_group_size"] == 1 and config["num_key_value_layers"] == 2
    assert config["rope_theta"] == 10000.0 and "rope_parameters" not in config
    if family == "llama":
        assert config["rope_scaling"] is None
    else:
        assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 4.0
    # what it wrote opens here again, and is the same model
    assert torch.equal(logits(SwiftKVForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "model, words",
    [
        (lambda: convert(make("qwen2"), 2), "Llama"),
        (lambda: convert(make(), 2, 2), "key_value_group_size"),
        (lambda: convert(make(), 6), "nothing to skip"),
    ],
)
def test_what_arctic_s_loader_does_not_take(model, words, tmp_path):
    with pytest.raises(InputError, match=words):
        export_arctic(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arctic_config_of_a_student_alone():
    assert "teacher_weights" not in arctic_config(drop_teacher(convert(make(), 2)))


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        SwiftKVForCausalLM.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="convert it"):
        SwiftKVForCausalLM.from_pretrained(tmp_path / "base")
    assert type(load(tmp_path / "base")).__name__ == "LlamaForCausalLM"
    with pytest.raises(InputError, match="gguf"):
        convert(make(), 2).save_pretrained(tmp_path / "x", export="gguf")
    convert(make(), 2).save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(InputError, match="torn"):
        load(tmp_path / "torn")


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    convert(make(), 2).save_pretrained(tmp_path, export="swift")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.4.self_attn.q_proj_swiftkv.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="q_proj_swiftkv"):
        load(tmp_path)


def test_registration():
    for family in ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2"):
        assert AutoConfig.for_model(f"{family}_swiftkv").swiftkv is True


def test_weights_that_are_not_finite_are_not_loaded(tmp_path):
    model = convert(make(), 2, 2)
    with torch.no_grad():
        model.model.layers[4].self_attn.q_proj_swiftkv.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="q_proj_swiftkv"):
        load(tmp_path)


def test_biases_that_arctic_drops_are_refused(tmp_path):
    with pytest.raises(InputError, match="attention_bias"):
        export_arctic(convert(make("llama-bias"), 2, 1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_too_few_or_too_many_weights_is_no_model(tmp_path):
    make().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="up_proj.weight is missing"):
        load(tmp_path / "base")
    make().save_pretrained(tmp_path / "more")
    _edit(tmp_path / "more", num_hidden_layers=5)
    with pytest.raises(InputError, match=r"layers\.5"):
        load(tmp_path / "more")
    convert(make(), 2, 1).save_pretrained(tmp_path / "swift")
    _edit(tmp_path / "swift", key_value_group_size=2)
    with pytest.raises(InputError, match="swiftkv"):
        load(tmp_path / "swift")
    _edit(tmp_path / "more", num_hidden_layers="four")
    with pytest.raises(InputError, match="num_hidden_layers"):
        load(tmp_path / "more")


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_where_a_model_lies_is_said_to_its_config_too(tmp_path):
    convert(make(), 2, 1).save_pretrained(tmp_path / "part")
    model = SwiftKVForCausalLM.from_pretrained(tmp_path, subfolder="part")
    assert model.split.num_key_value_layers == 2
