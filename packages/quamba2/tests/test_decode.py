"""Decoding out of fixed buffers, and the float model that quantised ones are timed beside."""

import pytest
import torch
from models import calibration, ids, make

from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.decode import Decoder
from isotone.quamba2.forward import Cache, forward
from isotone.quamba2.half import HalfMamba2
from isotone.quamba2.quantize import quantize
from isotone.shared.errors import InputError


@pytest.fixture(scope="module")
def made():
    found = {}
    for a_bits in (8, 16):
        config = QuambaConfig(a_bits=a_bits, group_size=32, calib_samples=4, calib_len=17, gptq=False)
        found[a_bits] = quantize(make(), calibration(), config)
    found["half"] = HalfMamba2.of(make(), dtype=torch.float32)
    return found


@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "tie_word_embeddings": True}, {"use_conv_bias": False}])
def test_the_float_model_is_the_forward_pass(changes):
    model = make(**changes)
    half = HalfMamba2.of(model, dtype=torch.float32)
    torch.testing.assert_close(half(ids()).logits, forward(model, ids()), rtol=1e-4, atol=1e-4)
    ours, theirs = half.new_cache(), Cache(3)
    half(ids(), ours), forward(model, ids(), cache=theirs)
    for _ in range(3):
        got = half(ids(2, 1, 7), ours, last_only=True).logits
        torch.testing.assert_close(got, forward(model, ids(2, 1, 7), cache=theirs), rtol=1e-3, atol=1e-3)
    assert half.bytes == 4 * sum(p.numel() for p in model.parameters())
    low = HalfMamba2.of(model, dtype=torch.bfloat16)
    wanted = forward(model, ids())
    assert ((low(ids()).logits.float() - wanted).square().mean() / wanted.square().mean()).sqrt() < 0.05
    with pytest.raises(InputError, match="expected a Mamba2"):
        HalfMamba2(make("mamba").config)


@pytest.mark.parametrize("kind", [8, 16, "half"])
def test_steps_are_those_of_a_growing_cache(made, kind):
    model, prompt, after = made[kind], ids(2, 6), ids(2, 5, 3)
    decoder, cache = Decoder(model, 2), model.new_cache()
    assert torch.equal(decoder.prefill(prompt), model(prompt, cache, last_only=True).logits[:, -1])
    places = [values.data_ptr() for values in [*decoder.cache.conv, *decoder.cache.state]]
    for t in range(5):
        got, wanted = decoder.step(after[:, t]), model(after[:, t : t + 1], cache, last_only=True).logits[:, -1]
        assert torch.equal(got, wanted)
    assert decoder.cache.length == cache.length == 11
    first = decoder.prefill(prompt)
    assert torch.equal(first, model(prompt, model.new_cache(), last_only=True).logits[:, -1])
    assert torch.equal(decoder.step(after[:, 0]), Decoder_of(model, prompt).step(after[:, 0]))
    assert [values.data_ptr() for values in [*decoder.cache.conv, *decoder.cache.state]] == places


def Decoder_of(model, prompt):
    decoder = Decoder(model, len(prompt))
    decoder.prefill(prompt)
    return decoder


def test_refusals(made):
    decoder = Decoder(made[8], 2)
    with pytest.raises(InputError, match="before the first step"):
        decoder.step(torch.tensor([1, 2]))
    with pytest.raises(InputError, match="expected 2 prompts, got 1"):
        decoder.prefill(ids(1, 4))
    with pytest.raises(InputError, match="CUDA graph"):
        Decoder(made[8], graph=True)
    decoder.prefill(ids(2, 4))
    with pytest.raises(InputError, match="from 0 to 60"):
        decoder.step(torch.tensor([1, 61]))


@pytest.mark.slow
def test_a_compiled_step_is_the_step():
    model = HalfMamba2.of(make(num_hidden_layers=1), dtype=torch.float32)
    eager, compiled = Decoder(model, 2), Decoder(model, 2, compiled=True)
    for decoder in (eager, compiled):
        decoder.prefill(ids(2, 6))
    for t in range(3):
        tokens = ids(2, 3, 3)[:, t]
        torch.testing.assert_close(compiled.step(tokens), eager.step(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_graph_is_the_step(made):  # pragma: no cover - needs a GPU
    import copy

    for kind in (8, 16):
        model = copy.deepcopy(made[kind]).to("cuda")
        graph, eager = Decoder(model, 2), Decoder(model, 2, graph=False)
        for decoder in (graph, eager):
            decoder.prefill(ids(2, 6).cuda())
        for t in range(4):
            tokens = ids(2, 4, 3)[:, t].cuda()
            torch.testing.assert_close(graph.step(tokens), eager.step(tokens), rtol=1e-3, atol=1e-3)
