"""Invariants 2 and 3: fused norms and rotations leave the model what it was, in float64 to 1e-10."""

import pytest
import torch
from models import ids, make

from isotone.quamba2.forward import Cache, forward
from isotone.quamba2.rotate import apply_hadamard, fuse_norms, rotate_residual
from isotone.shared.errors import InputError

CASES = [("mamba2", {}), ("mamba2", {"use_bias": True, "tie_word_embeddings": True}), ("mamba", {"use_bias": True})]


@pytest.mark.parametrize("kind, changes", CASES)
def test_the_forward_pass_is_hugging_face_s(kind, changes):
    model = make(kind, **changes)
    with torch.no_grad():
        wanted = model(ids()).logits
        torch.testing.assert_close(forward(model, ids()), wanted, rtol=1e-4, atol=1e-4)
        mask = torch.ones_like(ids())
        mask[0, :4] = 0
        theirs = model(ids(), attention_mask=mask).logits
    ours = forward(model, ids(), attention_mask=mask)
    torch.testing.assert_close(ours[0, 4:], theirs[0, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, changes", CASES)
def test_prefill_and_steps_are_one_pass(kind, changes):
    model = make(kind, **changes).double()
    whole, cache = forward(model, ids()), Cache(3)
    pieces = [forward(model, ids()[:, a:b], cache=cache) for a, b in ((0, 2), (2, 13), (13, 14), (14, 19))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)
    assert cache.length == 19 and cache.bytes > 0


def test_time_step_limits_hold_in_steps_too():
    model = make(time_step_limit=(0.01, 0.05)).double()
    whole, cache = forward(model, ids()), Cache(3)
    pieces = [forward(model, ids()[:, i : i + 1], cache=cache) for i in range(19)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind, changes", CASES)
@pytest.mark.parametrize("hadamard", ["none", "out", "all"])
def test_rotations_change_nothing(kind, changes, hadamard):
    model = make(kind, **changes).double()
    wanted, embedding = forward(model, ids()), model.backbone.embeddings.weight.clone()
    before = model.backbone.layers[1].mixer.out_proj.weight.clone()
    apply_hadamard(model, hadamard)
    after = forward(model, ids(), online=hadamard != "none")
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-10)
    assert torch.equal(model.backbone.embeddings.weight, embedding) == (hadamard != "all")
    assert torch.equal(model.backbone.layers[1].mixer.out_proj.weight, before) == (hadamard == "none")
    assert (model.backbone.norm_f.weight == 1).all()


def test_a_tied_head_is_untied_and_the_embedding_stays():
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    embedding, norm = model.backbone.embeddings.weight.clone(), model.backbone.norm_f.weight.clone()
    fuse_norms(model)
    assert torch.equal(model.backbone.embeddings.weight, embedding) and not model.config.tie_word_embeddings
    torch.testing.assert_close(model.lm_head.weight, embedding * norm)


def test_the_rotated_residual_is_still_a_hugging_face_model():
    model = make()
    with torch.no_grad():
        wanted = model(ids()).logits
        torch.testing.assert_close(rotate_residual(fuse_norms(model))(ids()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(InputError, match="fuse_norms first"):
        rotate_residual(make())
    model = make(hidden_size=28, num_heads=7, head_dim=12, n_groups=1, expand=3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match="got 84"):
        apply_hadamard(model, "all")
    assert all(map(torch.equal, before, model.parameters())), "refused before any weight changed"
    with pytest.raises(InputError, match="random"):
        apply_hadamard(make(), "random")
    with pytest.raises(InputError, match="vocabulary|from 0 to 60"):
        forward(make(), ids() + 50)
    mask = torch.ones_like(ids())
    mask[0, -1] = 0
    with pytest.raises(InputError, match="left"):
        forward(make(), ids(), attention_mask=mask)
