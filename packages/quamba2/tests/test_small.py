"""The byte-level model: its parameters, its training, the premise and the rows of the ablation (section 6, A2)."""

import pytest
import reference
import torch
from transformers import Mamba2ForCausalLM

from isotone.quamba2 import claims, small
from isotone.quamba2.forward import forward
from isotone.quamba2.plain import PlainConfig, PlainMamba2
from isotone.quamba2.small import LADDER, OTHERS, Recipe
from isotone.shared.data import stdlib_text

TINY = Recipe(hidden=128, layers=1, head_dim=32, state=8, steps=25, batch=4, length=48)


@pytest.fixture(scope="module")
def text():
    return small.corpus(stdlib_text(60_000))


def test_a_plain_model_is_hugging_face_s():
    torch.manual_seed(0)
    plain = PlainMamba2(PlainConfig(64, 2, 8, 16, 8, 2, 61, use_bias=True, chunk_size=8))
    theirs = Mamba2ForCausalLM(plain.config.hugging_face()).eval()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(plain.state_dict())
    ids = torch.randint(61, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(forward(plain, ids), theirs(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, small.SIGMA])
def test_the_differentiable_pass_is_the_forward_pass(sigma):
    model = small.untrained(TINY, 0, sigma)
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small.logits(model, ids).detach(), forward(model, ids), rtol=2e-3, atol=2e-3)


def test_planted_gains_reach_x_b_and_c_alone():
    plain, planted = small.untrained(TINY, 0), small.untrained(TINY, 0, 1.5)
    before, after = (m.backbone.layers[0].mixer for m in (plain, planted))
    rows = (before.in_proj.weight != after.in_proj.weight).all(-1)
    assert rows.nonzero().flatten().tolist() == list(range(256, 256 + 256 + 2 * 2 * 8))
    gains = after.conv1d.weight / before.conv1d.weight
    torch.testing.assert_close(gains[:, 0, :1].expand(-1, 4), gains[:, 0])
    assert 1.0 < float(gains.log().std()) < 2.0


def test_training_learns_and_is_repeated_by_its_seed(text):
    losses = []
    model = small.train(TINY, text[0], 0, advance=losses.append)
    assert len(losses) == 25 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    again = small.train(TINY, text[0], 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rank_correlation():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 9, generator=generator)
    found = small.spearman(first, second)
    wanted = [reference.spearman(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted)
    assert small.spearman(first, first.exp()).tolist() == pytest.approx([1.0] * 5)


def test_persistence_tells_an_order_from_none():
    model = small.untrained(TINY, 0, 1.5)
    ids = torch.randint(256, (4, 40), generator=torch.Generator().manual_seed(1))
    same = small.persistence(model, [ids[:1]] * 3)
    assert same["channels over samples"] == pytest.approx(1) and same["heads over samples"] == pytest.approx(1)
    found = small.persistence(model, [row[None] for row in ids])
    assert 0.5 < found["channels over samples"] < 1, "planted gains order the channels"
    assert (
        found["channels over samples"]
        > small.persistence(small.untrained(TINY, 0), [r[None] for r in ids])["channels over samples"]
    )


def test_rows_are_nearer_with_more_bits(text):
    model = small.untrained(TINY, 0, 1.5)
    calibration, scored = [row[0] for row in small.windows(text[0], 4, 48)], small.windows(text[1], 4, 48)
    names = ["W4A8 per group", "+ SnC", "W4A16 + Hadamard + GPTQ", "W8A8"]
    told = []
    rows = small.rows_of(model, names, calibration, scored, advance=told.append)
    assert told == names and rows["float"]["kl"] == 0 and all(rows[name]["kl"] > 0 for name in names)
    assert rows["W8A8"]["kl"] < rows["+ SnC"]["kl"] < rows["W4A8 per group"]["kl"]
    sizes = small.bytes_of(model, names)
    assert sizes["+ SnC"] < sizes["W8A8"] < sizes["float"]


def test_claims_of_the_ladder():
    kl = dict(zip(LADDER, (0.5, 0.4, 0.3, 0.25, 0.1), strict=True)) | {name: 0.2 for name in OTHERS}
    kl |= {"W4A16 per group": 0.2, "W4A16 + Hadamard + GPTQ": 0.08}
    row = {name: {"kl": value, "perplexity": 3.0} for name, value in {"float": 0.0, **kl}.items()}
    found = {one.claim.id: one for one in claims.ablation("plain", [row, row], True)}
    assert found["plain-monotone"].measured == 4 and found["plain-monotone"].held
    assert found["plain-snc-first"].measured == pytest.approx(2.5 / 1.2)
    assert found["plain-removed"].measured == pytest.approx(0.6) and found["plain-removed"].held
    worse = row | {"+ GPTQ": {"kl": 0.6, "perplexity": 3.0}}
    found = {one.claim.id: one for one in claims.ablation("plain", [row, worse], True)}
    assert found["plain-monotone"].measured == 3.5 and found["plain-monotone"].held is False
    assert all(one.held is None for one in claims.ablation("plain", [row], False))
