"""Choosing l, the tasks' data, the measures of fidelity and the baselines."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ids, make
from test_engine import shaken

from isotone.shared.errors import InputError
from isotone.swiftkv import (
    Batch,
    DistillConfig,
    Windows,
    convert,
    fidelity,
    pack,
    recall_accuracy,
    recall_task,
    student_logits,
    suggest_l,
    teacher_logits,
)
from isotone.swiftkv.baselines import CopiedKeyValues, EarlyExit, train_baseline
from isotone.swiftkv.basemodel import train_base, train_recall
from isotone.swiftkv.choose import knee_of
from isotone.swiftkv.data import FILLERS, KEYS, RECALL_VOCAB, VALUES, Bytes


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "deepseek-v2"])
def test_suggestion_is_what_conversion_gives(family):
    base = make(family, initializer_range=0.1)
    data = [ids(2, 16, seed) for seed in range(2)]
    found = suggest_l(base, data)
    assert len(found.kl) == 5 and found.kl[-1] < 1e-6 and found.num_key_value_layers == 5, "3/4 of a small model"
    for kept in (1, 3):
        model = convert(make(family, initializer_range=0.1), kept)
        total = 0.0
        for tokens in data:
            with torch.no_grad():
                ours = model(input_ids=tokens).logits.log_softmax(-1)
                theirs = base(input_ids=tokens).logits.log_softmax(-1)
            total += float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum"))
        assert found.kl[kept - 1] == pytest.approx(total / 64, rel=1e-3)
    matrix = torch.tensor(found.similarity)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(6), rtol=1e-5, atol=1e-5)


def test_knee():
    assert knee_of([10.0, 2.0, 1.0, 0.5, 0.0]) == 2
    assert knee_of([1.0, 1.0]) == 1 and knee_of([0.0, 1.0, 2.0]) == 1


def test_suggestion_refusals():
    with pytest.raises(InputError, match="batches"):
        suggest_l(make(), [])
    with pytest.raises(InputError, match="not converted"):
        suggest_l(convert(make(), 2), [ids(1, 4)])
    broken = make()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        suggest_l(broken, [ids(1, 4)])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 24), st.data())
def test_recall_sequences_are_what_they_say(seed, pairs, data):
    queries = data.draw(st.integers(1, pairs))
    rows, labels = recall_task(4, pairs, torch.Generator().manual_seed(seed), queries)
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        asked = [i for i, wanted in enumerate(label) if wanted != -100]
        assert len(asked) == queries
        start, known = asked[0] - 1, {}
        body = [token for token in row[:start] if token < KEYS + VALUES]
        fillers = [token for token in row[:start] if token >= KEYS + VALUES]
        assert len(body) == 2 * pairs and len(fillers) <= pairs and all(t < RECALL_VOCAB for t in fillers)
        for key, value in zip(body[::2], body[1::2], strict=True):
            assert key < KEYS <= value and key not in known, "keys without replacement"
            known[key] = value
        for place in asked:
            assert label[place] == row[place] == known[row[place - 1]]


def test_fillers_come_with_their_probability():
    rows, _ = recall_task(400, 16, torch.Generator().manual_seed(0))
    share = float((rows >= KEYS + VALUES).sum()) / (400 * 16)
    # 6400 draws of probability 0.3: six standard deviations
    assert abs(share - 0.3) < 6 * math.sqrt(0.21 / 6400) and FILLERS == 32
    with pytest.raises(InputError, match="pairs"):
        recall_task(1, 65, torch.Generator())


def test_recall_accuracy_counts():
    def oracle(tokens):
        logits = torch.zeros(*tokens.shape, RECALL_VOCAB + 3)
        for row, line in enumerate(tokens.tolist()):
            for place, token in enumerate(line[:-1]):
                if token in line[:place]:
                    logits[row, place, line[line.index(token) + 1]] = 1.0
        return logits

    assert recall_accuracy(oracle, 8, examples=20, batch=8, offset=3) == 1.0
    assert recall_accuracy(lambda t: torch.zeros(*t.shape, RECALL_VOCAB), 8, examples=20) < 0.2


def test_fidelity_of_the_same_and_of_another():
    model = shaken(convert(make(initializer_range=0.1), 2, 2))
    batches = [ids(2, 12, seed) for seed in range(3)]
    same = fidelity(student_logits(model), student_logits(model), batches)
    assert same["kl"] == 0 and same["agreement"] == 1 and same["cross_entropy"] == same["teacher_cross_entropy"]
    other = fidelity(student_logits(model), teacher_logits(model), batches)
    logits = torch.cat([student_logits(model)(b)[:, :-1].flatten(0, 1) for b in batches]).detach()
    wanted = torch.nn.functional.cross_entropy(logits, torch.cat([b[:, 1:].flatten() for b in batches]))
    assert other["cross_entropy"] == pytest.approx(float(wanted), rel=1e-5)
    assert other["kl"] > 0 and other["agreement"] < 1
    with pytest.raises(InputError, match="finite"):
        fidelity(lambda t: torch.full((*t.shape, 97), float("nan")), teacher_logits(model), batches)
    with pytest.raises(InputError, match="at least one"):
        fidelity(student_logits(model), teacher_logits(model), [])


def test_windows_are_a_function_of_the_step():
    text = torch.arange(50)
    windows = Windows(text, 8, 3, seed=1)
    first = windows(4).input_ids
    assert torch.equal(first, windows(4).input_ids) and not torch.equal(first, windows(5).input_ids)
    assert (first[:, 1:] - first[:, :-1] == 1).all() and int(first.max()) <= 49
    assert Windows(text[:8], 8, 1)(0).input_ids.tolist() == [list(range(8))]
    for tokens, context, batch in ((text, 51, 1), (text, 1, 1), (text, 8, 0)):
        with pytest.raises(InputError):
            Windows(tokens, context, batch)


def test_vocabulary_of_bytes():
    vocabulary = Bytes(b"hello")
    assert len(vocabulary) == 4 and vocabulary.decode(vocabulary.encode(b"hole")) == b"hole"
    with pytest.raises(InputError, match="vocabulary"):
        vocabulary.encode(b"help")
    with pytest.raises(InputError, match="at least one"):
        Bytes(b"")


def test_packing():
    rows = pack([([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5]), ([6, 7, 8], [6, 7, 8])], 6)
    assert rows[0].input_ids.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert rows[0].labels.tolist() == [[-100, 2, 3, -100, 5, -100]], "no example predicts the next one's first token"
    assert rows[0].position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert rows[1].input_ids.tolist() == [[6, 7, 8, 0, 0, 0]]
    fused = pack([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])], 6, fuse_positions_prob=1.0)
    assert fused[0].position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    for examples in ([], [([1], [])], [([], [])]):
        with pytest.raises(InputError):
            pack(examples, 6)


def test_packed_examples_do_not_see_each_other():
    """A packed row's loss is that of its examples alone: transformers' masks follow the positions."""
    from isotone.swiftkv.distill import lower_half

    model = convert(make(), 2, 2)
    a, b = ids(1, 5, 1)[0].tolist(), ids(1, 4, 2)[0].tolist()
    row = pack([(a, a), (b, b)], 9)[0]
    hidden, masks, rope, _ = lower_half(model, row)
    packed = model.model.student_upper(hidden, masks, rope)[-1]
    hidden, masks, rope, _ = lower_half(model, Batch(torch.tensor([b])))
    alone = model.model.student_upper(hidden, masks, rope)[-1]
    torch.testing.assert_close(packed[:, 5:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [EarlyExit, CopiedKeyValues])
def test_baselines_learn(kind):
    model = convert(make(initializer_range=0.1), 3)
    arm = kind(model)
    batches = [ids(4, 12, seed) for seed in range(4)]
    before = fidelity(arm, teacher_logits(model), batches)["kl"]
    train_baseline(arm, lambda step: Batch(batches[step % 4]), DistillConfig(steps=40, lr=1e-2))
    assert fidelity(arm, teacher_logits(model), batches)["kl"] < before


def test_dropped_layers_start_as_the_norm_of_h_l():
    model = convert(make(), 3)
    with torch.no_grad():
        hidden = model(input_ids=ids(1, 7), output_hidden_states=True).hidden_states[3]
        wanted = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(EarlyExit(model)(ids(1, 7)), wanted, rtol=1e-4, atol=1e-5)


def test_copied_keys_are_the_layer_below_s():
    model = convert(make("llama"), 3)
    wanted = reference.swiftkv_forward(model, ids(1, 7)[0], 3, 1, copied=True)
    with torch.no_grad():
        found = CopiedKeyValues(model)(ids(1, 7))[0].double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    other = reference.swiftkv_forward(model, ids(1, 7)[0], 3, 1)
    assert (found - other).abs().max() > 0.01, "the student's own keys would give other logits"


def test_the_exit_has_as_many_weights_as_swiftkv():
    for shape in ({}, {"hidden_size": 64}, {"num_hidden_layers": 8}):
        model = convert(make(**shape), 3)
        own = sum(p.numel() for p in model.parameters() if p.requires_grad)
        theirs = sum(p.numel() for p in EarlyExit(model).parameters())
        assert own <= theirs < own + 2 * model.config.hidden_size, (own, theirs)


def test_base_training():
    model = make(initializer_range=0.1)
    tokens = ids(4, 12)
    losses = []
    taken = train_base(model, lambda step: (tokens, tokens), 60, 3e-3, on_step=lambda s, loss: losses.append(loss))
    assert taken == 60 and losses[-1] < 0.7 * losses[0] and not model.training
    assert train_base(model, lambda step: (tokens, tokens), 60, 3e-3, until=100.0) == 1
    with pytest.raises(InputError, match="finite"):
        train_base(model, lambda step: (tokens, tokens), 5, float("inf"))
    assert train_recall(make(vocab_size=RECALL_VOCAB), batch=2, copying=2, recalling=3) == 5


@pytest.mark.parametrize("family", ["qwen3", "deepseek-v2", "llama-bias", "mistral-window"])
def test_copied_keys_of_every_family(family):
    """As many layers kept as there are but one, and layer l - 1's keys given to the last: the queries' norms count."""
    model = convert(make(family), 5)
    arm = CopiedKeyValues(model)
    with torch.no_grad():
        found = arm(ids(2, 7))
        assert found.isfinite().all() and found.shape == (2, 7, 97)
        for name, module in arm.queries.items():
            if "norm" in name:
                module.weight.mul_(3)
                assert not torch.allclose(arm(ids(2, 7)), found, atol=1e-3), name
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_baseline(arm, lambda step: Batch(ids(2, 7)), DistillConfig(steps=3, lr=1e-2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.allclose(arm(ids(2, 7)), found, atol=1e-3)


def test_suggestions_do_not_depend_on_the_mode():
    base = make(attention_dropout=0.5).train()
    first, second = (suggest_l(base, [ids(2, 8)]) for _ in range(2))
    assert first == second and first.kl[-1] < 1e-6 and base.training
    for bad in (ids(2, 8) + 97, ids(2, 8)[:, :0]):
        with pytest.raises(InputError, match="ids"):
            suggest_l(base, [bad])


def test_examples_whose_answers_are_cut_off_are_left_out():
    long = ([1] * 9, [-100] * 8 + [1])
    rows = pack([long, ([2, 3], [-100, 3])], 6)
    assert len(rows) == 1 and rows[0].input_ids.tolist() == [[2, 3, 0, 0, 0, 0]]
    with pytest.raises(InputError, match="none of 1"):
        pack([long], 6)
