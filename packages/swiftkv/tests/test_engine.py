"""Skipping is exact: whatever the batch, the padding, the chunks and the cache, it is the full student's logits."""

import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import reference
import torch
from compiled import shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, ids, make

from isotone.shared.errors import InputError
from isotone.swiftkv import SwiftKVCache, SwiftKVConfig, convert, decode, extend, make_cache, prefill
from isotone.swiftkv.decoders import Decoder
from isotone.swiftkv.prompts import check_batch, check_chunk

SPLITS = [(5, 1), (2, 1), (2, 2), (2, 4), (6, 1), (1, 5)]


def full(model, rows):
    """The full student's logits of each row's last token, one row at a time."""
    with torch.no_grad():
        return torch.stack([model(input_ids=row[None], use_cache=False).logits[0, -1] for row in rows])


def close(ours, theirs, tolerance=2e-5):
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def ragged(lengths, seed=1):
    return [ids(1, n, seed + i)[0] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("split", SPLITS)
def test_student_and_engine_equal_the_equations(split):
    model = shaken(convert(make("llama-bias", tie_word_embeddings=False), *split)).double()
    row = ids(1, 11)[0]
    wanted = reference.swiftkv_forward(model, row, *split)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=row[None]).logits[0], wanted, rtol=1e-5, atol=1e-5)
    found = extend(model, [row], make_cache(model, 1, 11), keep=11)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


EVERY = [(family, (3, 3) if number % 2 else (2, 1)) for number, family in enumerate(FAMILIES)]


@pytest.mark.parametrize("family, split", [*EVERY, ("llama", (2, 4)), ("llama", (5, 1)), ("deepseek-v2", (2, 4))])
def test_ragged_prefill_and_decode_equal_the_full_student(family, split):
    model = shaken(convert(make(family), *split))
    rows = ragged([9, 1, 23])
    cache = make_cache(model, 3, 30)
    close(extend(model, rows, cache), full(model, rows))
    assert cache.lengths == [9, 1, 23]
    for step in range(3):  # decode with the cache is the student on the concatenation, step by step
        tokens = ids(3, 1, 50 + step)[:, 0]
        found = decode(model, tokens, cache)
        rows = [torch.cat([row, token[None]]) for row, token in zip(rows, tokens, strict=True)]
        close(found, full(model, rows))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "deepseek-v2"])
@settings(deadline=None, max_examples=4)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    chunk=st.integers(2, 20),
    more=st.integers(1, 6),
    split=st.sampled_from([(2, 1), (2, 2), (3, 3)]),
)
def test_any_chunks_and_any_continuation(family, lengths, chunk, more, split):
    model = shaken(convert(make(family), *split))
    rows = ragged(lengths)
    cache = make_cache(model, len(rows), 24)
    close(extend(model, rows, cache, chunk=chunk), full(model, rows))
    tails = ragged([more] * len(rows), seed=90)
    found = extend(model, tails, cache, chunk=chunk)
    close(found, full(model, [torch.cat(pair) for pair in zip(rows, tails, strict=True)]))


def test_left_and_right_padding():
    model = shaken(convert(make(), 2, 2))
    rows = ragged([4, 10, 7])
    left, right = torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 10, dtype=torch.long)
    left_mask, right_mask = torch.zeros_like(left), torch.zeros_like(left)
    for i, row in enumerate(rows):
        left[i, 10 - len(row) :], right[i, : len(row)] = row, row
        left_mask[i, 10 - len(row) :], right_mask[i, : len(row)] = 1, 1
    for padded, mask in ((left, left_mask), (right, right_mask)):
        cache = make_cache(model, 3, 12)
        close(prefill(model, padded, cache, attention_mask=mask), full(model, rows))


def test_prompts_decoding_rows_and_drafts_in_one_pass():
    model = shaken(convert(make(), 2, 1))
    rows = ragged([6, 9])
    cache = make_cache(model, 3, 20)
    extend(model, rows, cache, rows=[0, 1])
    draft, new = ids(1, 4, 77)[0], ids(1, 8, 78)[0]
    found = extend(model, [ids(1, 1, 79)[0], draft, new], cache, rows=[0, 1, 2], keep=[1, 4, 1])
    assert found.shape[0] == 6
    whole = [torch.cat([rows[0], ids(1, 1, 79)[0]]), torch.cat([rows[1], draft]), new]
    with torch.no_grad():
        draft_logits = model(input_ids=whole[1][None]).logits[0, -4:]
    close(found[0], full(model, [whole[0]])[0])
    close(found[1:5], draft_logits)
    close(found[5], full(model, [whole[2]])[0])


def test_a_chunk_that_ends_no_prompt_runs_no_upper_layer():
    model = convert(make(), 2, 1)
    seen = []
    hook = model.model.layers[4].mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    extend(model, ragged([12, 8]), make_cache(model, 2, 20), chunk=5)
    hook.remove()
    assert seen == [1, 1], "two chunks end a prompt, and one token of each goes on"


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek-v2"])
def test_causality_and_single_input(family):
    """Changing token t changes no logits before t; the upper keys of token t depend on h_l of t alone."""
    model = shaken(convert(make(family), 2, 1))
    row = ids(1, 12)[0]
    other = row.clone()
    other[7] = (other[7] + 1) % 97
    with torch.no_grad():
        before, after = model(input_ids=row[None]).logits[0], model(input_ids=other[None]).logits[0]
    # an expert is given another number of tokens, so that its product may be summed in another order
    close(after[:7], before[:7], 0.0 if family != "deepseek-v2" else 1e-5)
    assert not torch.allclose(before[7:], after[7:])
    caches = [make_cache(model, 1, 12) for _ in range(2)]
    for cache, tokens in zip(caches, (row, other), strict=True):
        extend(model, [tokens], cache)
    for layer in range(6):
        same = torch.isclose(caches[0].key_storage(layer), caches[1].key_storage(layer), atol=1e-6).all(-1).all(1)[0]
        assert same[:7].all() and not same[7:].all()


def test_rope_is_relative():
    """All positions moved by the same offset leave the logits (float64, so that the angles' rounding is small)."""
    model = shaken(convert(make(initializer_range=0.1), 2, 2)).double()
    row = ids(1, 9)[0]
    at_0, at_50 = (reference.swiftkv_forward(model, row, 2, 2, first) for first in (0, 50))
    torch.testing.assert_close(at_0, at_50, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        moved = model(input_ids=row[None], position_ids=torch.arange(50, 59)[None]).logits[0]
    torch.testing.assert_close(moved, at_0, rtol=1e-5, atol=1e-5)


def test_compiled_decode_is_one_graph_and_equal():
    found = compiled.found()
    assert len(found["decode"]) == len(compiled.CASES) and max(found["decode"].values()) <= 2e-5, found
    assert found["generate"], "compiled generation gives the tokens of the eager one"


@pytest.mark.slow
@pytest.mark.parametrize("family, backend", [("llama", "inductor"), ("deepseek-v2", "eager")])
def test_compiled_decode_of_more_kinds(family, backend):
    code = f"import compiled; print(compiled.difference({family!r}, 'model', {backend!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(compiled.__file__).parent
    )
    assert float(done.stdout) < 1e-4


def test_the_engine_follows_the_weights():
    """Written under no_grad, past the version counter (`.data`), and in prefill as in decoding."""
    model = convert(make(), 2, 1)
    rows = ragged([70])  # enough tokens for the stacked product
    extend(model, rows, make_cache(model, 1, 70))
    shaken(model)
    for factor in (1.0, 1.5):
        for layer in model.model.layers[2:]:
            layer.self_attn.k_proj_swiftkv.weight.data.mul_(factor)
        cache = make_cache(model, 1, 71)
        close(extend(model, rows, cache), full(model, rows))
        close(decode(model, rows[0][:1], cache), full(model, [torch.cat([rows[0], rows[0][:1]])]))


def test_weights_of_inference_mode_run():
    with torch.inference_mode():
        model = shaken(convert(make(), 2, 1))
        rows = ragged([70])
        close(extend(model, rows, make_cache(model, 1, 70)), full(model, rows))


class Adapter(torch.nn.Module):
    """What peft puts in a projection's place: `weight` is still the base's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.more = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, states):
        return self.base(states) + self.more(states)


@pytest.mark.parametrize("kind", ["adapter", "hook"])
def test_what_stands_around_a_latent_projection_counts(kind):
    """MLA's decoding folds kv_b_proj's weight into queries, unless there is more to the projection than its weight."""
    model = shaken(convert(make("deepseek-v2"), 2, 2))
    attention = model.model.layers[4].self_attn
    if kind == "adapter":
        attention.kv_b_proj_swiftkv = Adapter(attention.kv_b_proj_swiftkv)
    else:
        attention.kv_b_proj_swiftkv.register_forward_hook(lambda module, inputs, output: 2 * output)
    rows = ragged([9])
    cache = make_cache(model, 1, 10)
    close(extend(model, rows, cache), full(model, rows))
    close(decode(model, rows[0][:1], cache), full(model, [torch.cat([rows[0], rows[0][:1]])]))


@pytest.mark.parametrize("kind", ["adapter", "hook"])
def test_what_stands_around_a_projection_counts(kind):
    model = shaken(convert(make("llama-bias"), 2, 2))
    attention = model.model.layers[4].self_attn
    if kind == "adapter":
        attention.k_proj_swiftkv = Adapter(attention.k_proj_swiftkv)
    else:
        attention.k_proj_swiftkv.register_forward_hook(lambda module, inputs, output: 2 * output)
    rows = ragged([70])
    cache = make_cache(model, 1, 71)
    close(extend(model, rows, cache), full(model, rows))
    close(decode(model, rows[0][:1], cache), full(model, [torch.cat([rows[0], rows[0][:1]])]))


def test_engine_runs_the_teacher_and_unconverted_models():
    base = make()
    rows = ragged([6, 11])
    wanted = full(base, rows)
    close(extend(base, rows, make_cache(base, 2, 11)), wanted)
    model = shaken(convert(base, 2, 2))
    with model.teacher():
        cache = make_cache(model, 2, 11)
        assert cache.split.slots == 6
        close(extend(model, rows, cache), wanted)


def test_transformers_cache_holds_a_group_once():
    model = shaken(convert(make(), 2, 2))
    row = ids(1, 10)
    with torch.no_grad():
        first = model(input_ids=row[:, :6], use_cache=True)
        second = model(input_ids=row[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(input_ids=row).logits
    assert len(first.past_key_values.layers) == 4
    close(second.logits[0], whole[0, 6:])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, c: prefill(m, torch.zeros(2, 0, dtype=torch.long), c), "empty"),
        (lambda m, c: prefill(m, ids(1, 4), c), "2 rows"),
        (lambda m, c: prefill(m, ids(2, 4) + 97, c), "0 to 96"),
        (lambda m, c: prefill(m, ids(2, 4), c, attention_mask=torch.tensor([[1, 0, 1, 1]] * 2)), "holes"),
        (lambda m, c: prefill(m, ids(2, 4), c, attention_mask=torch.ones(2, 3)), "attention_mask"),
        (lambda m, c: prefill(m, ids(2, 4), c, position_ids=torch.tensor([[0, 1, 2, 4]] * 2)), "position_ids"),
        (lambda m, c: prefill(m, ids(2, 4), c, chunk=0), "prefill_chunk"),
        (lambda m, c: prefill(m, ids(2, 40), c), "at most 8"),
        (lambda m, c: prefill(m, ids(2, 4), c, chunk=True), "prefill_chunk"),
        (lambda m, c: check_batch(ids(2, 4).double()), "whole numbers"),
        (lambda m, c: check_chunk("8"), "whole number"),
        (lambda m, c: extend(m, ragged([3, 3]), c, keep=4), "survivors"),
        (lambda m, c: extend(m, ragged([3, 3]), c, keep=[1]), "1 numbers"),
        (lambda m, c: extend(m, ragged([3]), c, rows=[-1]), "from 0 to 1"),
        (lambda m, c: extend(m, ragged([3]), c, rows=[2]), "from 0 to 1"),
        (lambda m, c: extend(m, ragged([3, 3]), c, rows=[0, 0]), "different rows"),
        (lambda m, c: extend(m, ragged([3, 3, 3]), c), "different rows"),
        (lambda m, c: extend(m, ragged([3, 3]), c, rows=[0]), "1 rows"),
        (lambda m, c: extend(m, [], c), "at least one prompt"),
        (lambda m, c: extend(m, [ids(1, 3)[0] + 97], c), "0 to 96"),
        (lambda m, c: decode(m, torch.tensor([1]), c), "each of the cache's 2 rows"),
        (lambda m, c: Decoder(m, c)(torch.tensor([1])), "each of the cache's 2 rows"),
        (lambda m, c: prefill(m, ids(2, 4), make_cache(convert(make(), 2, 2), 2, 8)), "expected a cache for"),
        (lambda m, c: make_cache(m, 0, 8), "at least 1 row"),
        (lambda m, c: make_cache(m, 1, 8, "int3"), "int3"),
        (lambda m, c: make_cache(m, 1, 8, "fp8", key_scale=torch.zeros(6)), "above 0"),
        (lambda m, c: Decoder(m, c, "quick"), "quick"),
        (lambda m, c: c.crop(0, 3), "0 to 0"),
        (lambda m, c: decode(m, torch.tensor([1, 97]), c), "0 to 96"),
        (lambda m, c: prefill(m, ids(2, 4), c, attention_mask=torch.zeros(2, 4) - 1e4), "0 and 1"),
        (lambda m, c: prefill(m, ids(2, 4), SwiftKVCache(m.config, 2, 8, dtype=torch.bfloat16)), "bfloat16"),
    ],
)
def test_refusals(call, words):
    model = convert(make(), 2, 1)
    with pytest.raises(InputError, match=words):
        call(model, make_cache(model, 2, 8))


def test_a_pass_that_fails_adds_nothing_to_the_cache():
    model = shaken(convert(make(), 2, 2))
    row = ids(1, 9)[0]
    cache = make_cache(model, 1, 9)
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend(model, [row], cache, chunk=4)
    handle.remove()
    assert cache.lengths == [8], "two chunks were whole, the last was not"
    close(extend(model, [row[8:]], cache), full(model, [row]))


def test_wrong_positions_are_found_after_a_past():
    model = convert(make(), 2, 1)
    cache = make_cache(model, 1, 8)
    prefill(model, ids(1, 3), cache)
    prefill(model, ids(1, 2), cache, position_ids=torch.tensor([[3, 4]]))
    with pytest.raises(InputError, match="from 5"):
        prefill(model, ids(1, 2), cache, position_ids=torch.tensor([[0, 1]]))


def test_a_teacher_s_cache_needs_the_teacher():
    from isotone.swiftkv import drop_teacher

    model = drop_teacher(convert(make(), 2, 1))
    cache = SwiftKVCache(model.config, 1, 8, split=SwiftKVConfig(6, 6))
    with pytest.raises(InputError, match="teacher"):
        extend(model, ragged([3]), cache)
    with pytest.raises(InputError, match="teacher"), model.teacher():
        pass


def test_models_of_other_kinds_are_refused():
    from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    granite = GraniteForCausalLM(GraniteConfig(**small)).eval()
    moving = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for model, words in (
        (granite, "granite"),
        (LlamaForCausalLM(LlamaConfig(**small, rope_parameters=moving)).eval(), "dynamic"),
    ):
        with pytest.raises(InputError, match=words):
            make_cache(model, 1, 8)
        with pytest.raises(InputError, match=words):
            extend(model, ragged([3]), SwiftKVCache(model.config, 1, 8))


def test_a_cache_is_used_where_it_was_made():
    """Inside teacher() it computes the base, outside the student: never one with the other's."""
    model = shaken(convert(make(), 2, 1))
    outside = make_cache(model, 1, 8)
    with model.teacher():
        inside = make_cache(model, 1, 8)
        with pytest.raises(InputError, match="inside"):
            extend(model, ragged([3]), outside)
    with pytest.raises(InputError, match="outside"):
        extend(model, ragged([3]), inside)
    assert inside.lengths == outside.lengths == [0]


@pytest.mark.parametrize(
    "positions", [torch.arange(5)[None], torch.arange(4.0)[None], torch.zeros(3, 4, dtype=torch.long)]
)
def test_positions_of_another_shape_are_refused(positions):
    model = convert(make(), 2)
    with pytest.raises(InputError, match="position_ids"):
        prefill(model, ids(2, 4), make_cache(model, 2, 8), position_ids=positions)


@pytest.mark.parametrize("family, name", [("qwen3", "k_norm"), ("deepseek-v2", "kv_a_layernorm")])
def test_a_hook_on_a_key_s_norm_counts(family, name):
    model = shaken(convert(make(family), 2, 2))
    for number in (2, 4):
        norm = getattr(model.model.layers[number].self_attn, name + "_swiftkv")
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    rows = ragged([70])
    cache = make_cache(model, 1, 71)
    close(extend(model, rows, cache), full(model, rows))
    close(decode(model, rows[0][:1], cache), full(model, [torch.cat([rows[0], rows[0][:1]])]))
