"""Conversion: what the new weights start as, what is frozen, and that the base is untouched."""

import pytest
import torch
from models import FAMILIES, ids, make

from isotone.shared.errors import InputError
from isotone.swiftkv import SwiftKVConfig, convert, drop_teacher, freeze
from isotone.swiftkv.convert import teacher_of


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_the_base_bit_for_bit(family):
    base = make(family)
    tokens = ids(2, 13)
    wanted = logits(base, tokens)
    model = convert(base, 2, 2)
    with model.teacher():
        assert torch.equal(logits(model, tokens), wanted)
    assert not torch.equal(logits(model, tokens), wanted)
    assert torch.equal(logits(base, tokens), wanted), "the base that was converted still runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_kept_is_the_base_bit_for_bit(family):
    base = make(family)
    wanted = logits(base, ids(2, 13))
    assert torch.equal(logits(convert(base, 6, 1), ids(2, 13)), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_layer_skipped_starts_as_the_base(family):
    """The input of layer L - 1 is the true one, and norm and projections are copies."""
    base = make(family)
    wanted = logits(base, ids(2, 13))
    found = logits(convert(base, 5, 1), ids(2, 13))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def test_only_the_last_layer_skipped_is_exact_on_a_llama():
    base = make("llama")
    wanted = logits(base, ids(2, 13))
    assert torch.equal(logits(convert(base, 5, 1), ids(2, 13)), wanted)


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen3", "deepseek-v2-lora"])
def test_a_group_starts_as_the_mean_of_its_layers(family):
    base = make(family)
    model = convert(base, 2, 4)
    attention = [layer.self_attn for layer in model.model.layers]
    names = ["kv_a_proj_with_mqa", "kv_b_proj"] if "deepseek" in family else ["k_proj", "v_proj"]
    for name in names:
        mean = sum(getattr(attention[j], name).weight for j in range(2, 6)) / 4
        torch.testing.assert_close(getattr(attention[2], name + "_swiftkv").weight, mean)
        if getattr(attention[2], name).bias is not None:
            mean = sum(getattr(attention[j], name).bias for j in range(2, 6)) / 4
            torch.testing.assert_close(getattr(attention[2], name + "_swiftkv").bias, mean)
        assert not hasattr(attention[3], name + "_swiftkv"), "the other layers of the group reuse them"
    for j in range(2, 6):
        query = "q_b_proj" if "deepseek" in family else "q_proj"
        assert torch.equal(getattr(attention[j], query + "_swiftkv").weight, getattr(attention[j], query).weight)
    assert torch.equal(model.model.norm_swiftkv.weight, base.model.layers[2].input_layernorm.weight)


def test_with_equal_teachers_groups_start_alike():
    base = make()
    for layer in base.model.layers[3:]:
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).load_state_dict(getattr(base.model.layers[2].self_attn, name).state_dict())
    single = logits(convert(base, 2, 1), ids(2, 9))
    torch.testing.assert_close(logits(convert(base, 2, 4), ids(2, 9)), single, rtol=1e-6, atol=1e-6)


def test_what_is_trained():
    model = convert(make(), 2, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "swiftkv" in name}
    d, heads, kept = 32, 32, 16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * d * heads + 2 * 2 * d * kept + d
    full = {name for name, p in model.named_parameters() if any(p is q for q in freeze(model, "full"))}
    assert "model.layers.2.mlp.up_proj.weight" in full and "model.layers.2.self_attn.o_proj.weight" in full
    assert not any("model.layers.1." in name or name.endswith("self_attn.q_proj.weight") for name in full)
    norms = {name for name, p in model.named_parameters() if any(p is q for q in freeze(model, "norms"))}
    assert norms - trained == {
        f"model.layers.{j}.{n}.weight" for j in range(2, 6) for n in ("input_layernorm", "post_attention_layernorm")
    }
    with pytest.raises(InputError, match="heads"):
        freeze(model, "heads")


def test_dropping_the_teacher_keeps_the_student():
    for family in ("llama", "qwen3", "deepseek-v2"):
        model = convert(make(family), 2, 2)
        wanted = logits(model, ids(1, 9))
        size = sum(p.numel() for p in model.parameters())
        drop_teacher(model)
        assert torch.equal(logits(model, ids(1, 9)), wanted)
        assert sum(p.numel() for p in model.parameters()) < size
        with pytest.raises(InputError, match="teacher"):
            model.swiftkv(False)


@pytest.mark.parametrize("family", ["llama", "deepseek-v2-lora"])
def test_one_base_is_converted_twice(family):
    """Neither the base nor the other model is changed, by conversion or by dropping the teacher."""
    base = make(family)
    names, base_wanted = set(base.state_dict()), logits(base, ids(1, 9))
    first = convert(base, 2, 2)
    wanted = logits(first, ids(1, 9))
    second = convert(base, 4, 1)
    assert set(base.state_dict()) == names, "the base has no new weights"
    assert torch.equal(logits(first, ids(1, 9)), wanted)
    second_wanted = logits(second, ids(1, 9))
    drop_teacher(first)
    assert set(base.state_dict()) == names and torch.equal(logits(base, ids(1, 9)), base_wanted)
    assert torch.equal(logits(second, ids(1, 9)), second_wanted) and torch.equal(logits(first, ids(1, 9)), wanted)
    with second.teacher():
        assert torch.equal(logits(second, ids(1, 9)), base_wanted)
    mine, theirs = second.model.layers[5].mlp, base.model.layers[5].mlp
    assert mine is theirs, "weights are shared"


def test_half_precision_means_are_taken_in_single():
    base = make().to(torch.bfloat16)
    model = convert(base, 2, 4)
    mean = torch.stack([base.model.layers[j].self_attn.k_proj.weight.float() for j in range(2, 6)]).mean(0)
    assert torch.equal(model.model.layers[2].self_attn.k_proj_swiftkv.weight, mean.to(torch.bfloat16))


@pytest.mark.parametrize(
    "arguments, words",
    [((0, 1), "from 1 to"), ((7, 1), "got 7"), ((2, 3), "divide"), ((2, 0), "got 0")],
)
def test_splits_that_do_not_fit(arguments, words):
    with pytest.raises(InputError, match=words):
        convert(make(), *arguments)


def test_models_that_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InputError, match="gpt2"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)), 1)
    with pytest.raises(InputError, match="not converted"):
        convert(convert(make(), 2), 2)
    with pytest.raises(InputError, match="lm_head"):
        convert(make().model, 2)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="dynamic"):
        convert(make("llama", rope_parameters=dynamic), 2)
    mixed = make("llama")
    mixed.model.layers[3].self_attn.k_proj = torch.nn.Linear(32, 16, bias=True)
    with pytest.raises(InputError, match="bias"):
        convert(mixed, 2, 2)
    broken = make("llama")
    broken.model.layers[4].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        convert(broken, 2)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
        broken = make("llama")
        broken.get_parameter(name).data.view(-1)[0] = float("inf")
        with pytest.raises(InputError, match=name):
            convert(broken, 2)


def test_slots():
    split = SwiftKVConfig(8, 4, 2)
    assert split.slots == 6 and [split.slot(j) for j in range(8)] == [0, 1, 2, 3, 4, 4, 5, 5]
    assert [split.owner(j) for j in range(8)] == [0, 1, 2, 3, 4, 4, 6, 6]


@pytest.mark.parametrize("numbers", [(6, 2.0), (6, 2, 2.0), (6, True)])
def test_a_split_is_of_whole_numbers(numbers):
    with pytest.raises((InputError, TypeError)):  # TypeError from the checks of annotations, where they are on
        SwiftKVConfig(*numbers)


def test_forward_refusals():
    model = convert(make(), 2)
    with pytest.raises(InputError, match="output_attentions"):
        model(input_ids=ids(1, 3), output_attentions=True)
    with pytest.raises(InputError, match="SwiftKVCache"):
        model(input_ids=ids(1, 3), past_key_values=model.make_cache(1, 3))
    with pytest.raises(InputError, match="exactly one"):
        model.model()


def test_hidden_states_and_padding_are_the_student_s():
    model = convert(make(), 2, 2)
    tokens = ids(1, 9)
    with torch.no_grad():
        out = model(input_ids=tokens, output_hidden_states=True)
        padded = model(
            input_ids=torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1),
            attention_mask=torch.tensor([[0] * 3 + [1] * 9]),
            position_ids=torch.tensor([[0] * 3 + list(range(9))]),
        ).logits
    assert len(out.hidden_states) == 7
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(padded[:, 3:], out.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_attention_implementation_is_the_model_s_own(family, kind):
    """Set after conversion, on either of the two, it reaches every layer of that model, and none of the other."""
    base, tokens = make(family), ids(2, 13)
    model = convert(base, 2, 2)
    student, teacher = logits(model, tokens), logits(base, tokens)
    model.set_attn_implementation(kind)
    torch.testing.assert_close(logits(model, tokens), student, rtol=1e-4, atol=1e-4)
    with model.teacher():
        torch.testing.assert_close(logits(model, tokens), teacher, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(base, tokens), teacher)
    before = logits(model, tokens)
    base.set_attn_implementation("eager")
    torch.testing.assert_close(logits(base, tokens), teacher, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, tokens), before)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_a_hook_on_one_model_is_not_the_other_s():
    base = make()
    model = convert(base, 2, 2)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(1))
    logits(base, ids(1, 4))
    assert not seen
    model.generation_config.max_new_tokens = 3
    assert base.generation_config.max_new_tokens != 3
    assert not base.training and not any(p.requires_grad for p in base.parameters())


def test_the_teacher_of_a_model():
    base = make()
    wanted = logits(base, ids(1, 9))
    model = convert(base, 2, 2)
    teacher = teacher_of(model)
    assert torch.equal(logits(teacher, ids(1, 9)), wanted) and model.config.swiftkv
    drop_teacher(model)
    assert torch.equal(logits(teacher, ids(1, 9)), wanted)


def test_projections_that_are_more_than_linear_are_refused():
    class Lora(torch.nn.Linear):
        pass

    base = make()
    base.model.layers[3].self_attn.q_proj = Lora(32, 32, bias=False)
    with pytest.raises(InputError, match="merge adapters"):
        convert(base, 2)


def test_a_transformers_cache_that_forgets_is_refused():
    from transformers import DynamicCache

    model = convert(make("mistral-window"), 2, 2)
    with pytest.raises(InputError, match="without a config"):
        model(input_ids=ids(1, 9), past_key_values=DynamicCache(config=model.config))
    whole = logits(model, ids(1, 20))
    with torch.no_grad():
        past = DynamicCache()
        model(input_ids=ids(1, 20)[:, :12], past_key_values=past)
        more = model(input_ids=ids(1, 20)[:, 12:], past_key_values=past).logits
    torch.testing.assert_close(more, whole[:, 12:], rtol=1e-4, atol=1e-4)


def test_outputs_as_the_config_and_the_caller_say():
    model = convert(make(), 2, 2)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert len(model(input_ids=ids(1, 5)).hidden_states) == 7
        assert isinstance(model(input_ids=ids(1, 5), return_dict=False), tuple)
