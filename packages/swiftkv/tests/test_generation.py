"""`generate` is transformers' own: the same tokens where the models agree, the same distribution when it drafts."""

from types import SimpleNamespace

import pytest
import torch
from compiled import shaken
from models import ids, make
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from isotone.shared.errors import InputError
from isotone.swiftkv import convert
from isotone.swiftkv.generation import _Loop, lookup_drafter

OPTIONS = dict(max_new_tokens=12, pad_token_id=0)


def naive(model, row, new):
    """Greedy generation by the full student, no cache."""
    for _ in range(new):
        with torch.no_grad():
            row = torch.cat([row, model(input_ids=row[None], use_cache=False).logits[0, -1].argmax()[None]])
    return row


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "deepseek-v2"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_same_tokens_as_transformers_where_the_models_are_equal(family, options):
    """At l = L - 1 an untrained swift model is the base: one seed, one sequence of tokens."""
    base = make(family)
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    arguments = dict(attention_mask=mask, **OPTIONS, **options)
    model = convert(base, 5, 1)
    torch.manual_seed(5)
    wanted = base.generate(tokens, **arguments)
    torch.manual_seed(5)
    found = model.generate(tokens, **arguments)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("split", [(2, 1), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 4}, {"prompt_lookup_num_tokens": 3}, {"kv_dtype": "fp32"}])
def test_greedy_is_the_full_student_s(split, options):
    model = shaken(convert(make(), *split))
    row = ids(1, 9)
    found = model.generate(row, **OPTIONS, **options)
    assert torch.equal(found[0], naive(model, row[0], 12))


def test_left_padded_rows_are_their_own():
    model = shaken(convert(make(), 2, 2))
    short, long = ids(1, 4, 1)[0], ids(1, 9, 2)[0]
    tokens = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), short]), long])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    found = model.generate(tokens, attention_mask=mask, **OPTIONS)
    assert torch.equal(found[0, 5:], naive(model, short, 12)) and torch.equal(found[1], naive(model, long, 12))


def test_stopping_streaming_and_outputs():
    model = shaken(convert(make(), 2, 2))
    row = ids(1, 9)
    whole = model.generate(row, **OPTIONS)
    end = int(whole[0, 13])
    first = whole[0, 9:].tolist().index(end)
    streamer = Recorder()
    stopped = model.generate(row, eos_token_id=end, streamer=streamer, **OPTIONS)
    assert torch.equal(stopped, whole[:, : 10 + first])
    assert sum(streamer.seen, []) == stopped[0].tolist() and streamer.ended

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    assert model.generate(row, stopping_criteria=StoppingCriteriaList([After()]), **OPTIONS).shape[1] == 12
    later = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(9, first + 3, end, device="cpu")])
    longer = model.generate(row, eos_token_id=end, logits_processor=later, **OPTIONS)
    assert longer.shape[1] > stopped.shape[1]
    out = model.generate(row, return_dict_in_generate=True, output_scores=True, output_logits=True, **OPTIONS)
    assert torch.equal(out.sequences, whole) and len(out.scores) == len(out.logits) == 12
    assert out.past_key_values.lengths == [20]


def test_a_cache_is_gone_on_with():
    model = shaken(convert(make(), 2, 2))
    row = ids(1, 9)
    cache = model.make_cache(1, 40)
    first = model.generate(row, past_key_values=cache, **OPTIONS)
    second = model.generate(first, past_key_values=cache, **OPTIONS)
    assert torch.equal(second[0], naive(model, row[0], 24))
    with pytest.raises(InputError, match="no new token"):
        model.generate(row, past_key_values=cache, **OPTIONS)


def test_finished_rows_are_padded():
    model = shaken(convert(make(), 2, 1))
    rows = ids(2, 9)
    free = model.generate(rows, **OPTIONS)
    end = int(free[0, 10])
    found = model.generate(rows, eos_token_id=end, **OPTIONS)
    place = free[0, 9:].tolist().index(end)
    assert (found[0, 10 + place :] == 0).all() and found[0, 9 + place] == end


@pytest.mark.parametrize("assistant", ["same", "other"])
def test_an_assistant_changes_no_greedy_token(assistant):
    model = shaken(convert(make(), 2, 2))
    helper = make() if assistant == "other" else model
    calls = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: calls.append(out.shape[0]))
    found = model.generate(ids(1, 9), assistant_model=helper, draft_length=4, **OPTIONS)
    handle.remove()
    assert torch.equal(found[0], naive(model, ids(1, 9)[0], 12))
    if assistant == "other":
        assert max(calls) == 5, "four drafted tokens and the one before are verified at once"


@pytest.mark.parametrize("drafted", [0, 5, 7])
def test_a_drafted_token_leaves_the_distribution_as_it_was(drafted):
    """Of 8 tokens, whichever was drafted and however likely it is; chi-square of 7 degrees, false alarm 0.1 %."""
    scores = torch.tensor([[2.0, 0.5, 0.0, -0.5, -1.0, 1.0, 0.2, -2.0]])
    model = convert(make(), 2)
    loop = _Loop(model, model.make_cache(1, 1), None, [], SimpleNamespace(do_sample=True), None)
    torch.manual_seed(0)
    draws = torch.stack([loop.accept(scores, drafted) for _ in range(4000)]).flatten()
    expected = 4000 * scores[0].softmax(-1)
    statistic = ((torch.bincount(draws, minlength=8) - expected) ** 2 / expected).sum()
    assert float(statistic) < 24.32
    assert loop.accept(torch.where(torch.arange(8) == 3, 0.0, -torch.inf)[None], drafted).item() == 3


@pytest.mark.slow
def test_drafting_keeps_the_distribution():
    """The frequencies of two sampled tokens with a drafter, by chi-square; false alarm 0.1 %."""
    model = shaken(convert(make(vocab_size=8, initializer_range=0.1), 2, 2))
    row = ids(1, 6, vocab=8)
    with torch.no_grad():
        first = model(input_ids=row).logits[0, -1].softmax(-1)
        both = torch.zeros(8, 8)
        for token in range(8):
            longer = torch.cat([row, torch.tensor([[token]])], 1)
            both[token] = first[token] * model(input_ids=longer).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    counts = torch.zeros(8, 8)
    for _ in range(3000):
        out = model.generate(row, do_sample=True, top_k=0, max_new_tokens=2, prompt_lookup_num_tokens=2, pad_token_id=0)
        counts[out[0, 6], out[0, 7]] += 1
    expected = 3000 * both.flatten()
    common = expected > 5
    observed, rare = counts.flatten()[common], ~common
    if rare.any():
        observed = torch.cat([observed, counts.flatten()[rare].sum()[None]])
        expected = torch.cat([expected[common], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    tail = torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), statistic / 2)
    assert float(tail) > 1e-3


def test_lookup_drafts_what_followed_last():
    draft = lookup_drafter()
    assert draft(torch.tensor([1, 2, 3, 4, 5, 1, 2, 3]), 2).tolist() == [4, 5]
    assert draft(torch.tensor([1, 2, 3]), 2).tolist() == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_beams": 2}, "beam"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "own arguments"),
        ({"position_ids": torch.arange(5)[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"kv_dtype": "int3"}, "int3"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"decode_mode": "cudagraph"}, "GPU"),
        ({"decode_mode": "quick"}, "quick"),
        ({"draft_length": 0}, "draft_length"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"past_key_values": object()}, "SwiftKVCache"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"generation_config": GenerationConfig(use_cache=False, max_new_tokens=2)}, "use_cache"),
        ({"generation_config": GenerationConfig(cache_implementation="quantized", max_new_tokens=2)}, "cache_imp"),
    ],
)
def test_refusals(options, words):
    model = convert(make(), 2)
    with pytest.raises(InputError, match=words):
        model.generate(ids(1, 5), **{**OPTIONS, **options})


def test_more_refusals():
    model = convert(make(), 2)
    with pytest.raises(InputError, match="one prompt"):
        model.generate(ids(2, 5), prompt_lookup_num_tokens=2, **OPTIONS)
    with pytest.raises(InputError, match="vocabulary"):
        model.generate(ids(1, 5), assistant_model=make(vocab_size=8), **OPTIONS)
    with pytest.raises(InputError, match="got both"):
        model.generate(ids(1, 5), past_key_values=model.make_cache(1, 30), kv_dtype="int8", **OPTIONS)
    for bad, words in ((ids(1, 5)[0], r"\(batch, n\)"), (ids(1, 5).float(), "whole numbers")):
        with pytest.raises(InputError, match=words):
            model.generate(bad, **OPTIONS)
    with pytest.raises(InputError, match="rows"):
        model.generate(ids(2, 5), past_key_values=model.make_cache(1, 30), **OPTIONS)


def test_a_refusal_leaves_the_caller_s_cache_as_it_was():
    model = convert(make(), 2)
    for rows, options, words in (
        (2, {"prompt_lookup_num_tokens": 2}, "one prompt"),
        (1, {"decode_mode": "cudagraph"}, "GPU"),
        (1, {"max_new_tokens": 60}, "more tokens in row 0"),
    ):
        cache = model.make_cache(rows, 30)
        with pytest.raises(InputError, match=words):
            model.generate(ids(rows, 5), past_key_values=cache, **{**OPTIONS, **options})
        assert cache.lengths == [0] * rows


def test_weights_of_nan_generate_nothing():
    model = convert(make(), 2)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite logits"):
        model.generate(ids(1, 5), **OPTIONS)


def test_generation_inside_generation_keeps_its_settings():
    """A streamer, criterion or processor may generate with the same model."""
    model = shaken(convert(make(), 2, 2))
    options = dict(prefill_chunk=4, kv_dtype="int4", **OPTIONS)
    wanted = model.generate(ids(1, 9), **options)
    seen = []

    class Nested:
        def put(self, value):
            seen.append(model.generate(ids(1, 5), max_new_tokens=2, pad_token_id=0))

        def end(self):
            pass

    assert torch.equal(
        model.generate(ids(1, 9), prefill_chunk=4, kv_dtype="int4", streamer=Nested(), **OPTIONS), wanted
    )
    assert len(seen) == 13
