"""Every verb on files, in one process."""

import json

import contract
import pytest
import torch
from transformers import AutoModelForCausalLM

from isotone.quamba2.cli import app
from isotone.quamba2.evaluate import evaluate
from isotone.quamba2.export import dequantized
from isotone.quamba2.modeling import QuambaForCausalLM
from isotone.quamba2.texts import decode, encode, samples
from isotone.shared.errors import InputError, run_app


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    contract.files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, out="out"):
    assert run_app(app, [*words, "--out", out, "--device", "cpu", "--quiet"], "isotone quamba2") == 0


def load(name):
    return json.loads(open(name).read())


def test_the_verbs(here):
    run(*contract.JOB)
    model = QuambaForCausalLM.from_pretrained("out/model")
    assert model.config.w_bits == 4 and model.config.calib_samples == 4 and model.config.group_size == 32
    report = load("out/report.json")
    assert len(report["blocks"]) == 2 and report["blocks"][0]["sqnr"] > 0 and (here / "out/blocks.png").is_file()
    assert (here / "out/channels.png").is_file()
    run("evaluate", "out/model", "--text", "text.txt", "--base", "model", "--samples", "2", "--length", "32", out="e")
    scores = load("e/evaluation.json")
    assert scores["tokens"] == 62 and 0 < scores["kl"] < 3 and 0 <= scores["agreement"] <= 1
    run("generate", "out/model", "--prompt", "What is", "--max-new-tokens", "4", out="g")
    wanted = model.generate(encode("What is", here / "out/model", 256)[None], max_new_tokens=4)[0, 7:]
    assert load("g/generation.json")["ids"] == wanted.tolist()
    run("profile", "out/model", "--prompt", "8", "--rounds", "2", out="p")
    profile = load("p/profile.json")
    assert profile["ttft"] > 0 and profile["tpot"] > 0 and profile["weight_bytes"] < profile["float16_bytes"]
    run("export", "out/model", out="x")
    exported = AutoModelForCausalLM.from_pretrained("x/model")
    assert type(exported).__name__ == "Mamba2ForCausalLM"


def test_search_and_w4a16(here):
    run("quantize", "model", "--text", "text.txt", "--mode", "w4ax", *contract._FAST, "--no-gptq")
    few = ("--population", "2", "--generations", "1", "--samples", "2", "--length", "16")
    run("search", "out/model", "--text", "text.txt", "--n-high", "1", *few, "--base", "model", out="s")
    assert sorted(load("s/precision.json")) == ["W4A16", "W4A8"] and (here / "s/search.png").is_file()
    found = QuambaForCausalLM.from_pretrained("s/model")
    assert sorted(found.block_bits) == [8, 16]
    run("quantize", "model", "--mode", "w4a16", "--no-gptq", "--group-size", "32", out="w")
    high = QuambaForCausalLM.from_pretrained("w/model")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(dequantized(high)(ids).logits, high(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("words, said", contract.BAD)
def test_bad_input_is_one_sentence(words, said, capsys):
    assert run_app(app, [*words, "--device", "cpu"] if words[0] != "reproduce" else words, "isotone quamba2") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_model_that_is_read_is_not_overwritten(here, capsys):
    (here / "quantized").rename(here / "model-q")
    (here / "in").mkdir()
    (here / "model-q").rename(here / "in" / "model")
    before = (here / "in/model/model.safetensors").read_bytes()
    assert run_app(app, ["export", "in/model", "--out", "in", "--device", "cpu"], "isotone quamba2") == 2
    assert "overwritten" in capsys.readouterr().err
    assert (here / "in/model/model.safetensors").read_bytes() == before


def test_evaluate_is_its_definition():
    logits = torch.randn(3, 9, 7, generator=torch.Generator().manual_seed(0))
    other = logits + torch.randn(3, 9, 7, generator=torch.Generator().manual_seed(1)) * 0.1
    ids = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(2))
    found = evaluate(lambda _: logits, [ids], lambda _: other)
    chances, theirs = logits.softmax(-1)[:, :-1], other.softmax(-1)[:, :-1]
    wanted = -chances.gather(-1, ids[:, 1:, None]).log().mean()
    assert found.tokens == 24 and found.cross_entropy == pytest.approx(float(wanted), rel=1e-5)
    assert found.perplexity == pytest.approx(float(wanted.exp()), rel=1e-5)
    assert found.kl == pytest.approx(float((theirs * (theirs / chances).log()).sum(-1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((logits.argmax(-1) == other.argmax(-1))[:, :-1].float().mean()))
    assert evaluate(lambda _: logits, [ids]).kl is None
    with pytest.raises(InputError, match="at least 2 tokens"):
        evaluate(lambda _: logits, [])
    with pytest.raises(InputError, match="finite logits"):
        evaluate(lambda _: logits * float("nan"), [ids])


def test_texts(here):
    assert encode("hé", here / "model", 256).tolist() == list("hé".encode())
    assert decode([104, 195, 169, 999], here / "model") == "hé"
    with pytest.raises(InputError, match="got 104 out of bytes"):
        encode("h", here / "model", 50)
    windows = samples(torch.arange(100), 4, 10)
    assert [int(window[0]) for window in windows] == [0, 30, 60, 90] and all(len(window) == 10 for window in windows)
    assert len(samples(torch.arange(15), 4, 10)) == 1 and len(samples(torch.arange(5), 4, 10)[0]) == 5
    (here / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="whole tokenizer"):
        encode("a", here / "model", 256)
    (here / "text.txt").write_bytes(b"\xff\xfe\xff")
    assert run_app(app, ["quantize", "model", "--text", "text.txt"], "isotone quamba2") == 2
