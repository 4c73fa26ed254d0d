"""The verbs end to end on a small model, and the reproduction's and bench's other scales at a tiny size."""

import dataclasses
import json

import pytest
import torch
from models import make

from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli
from isotone.swiftkv import bench, benchmark, convert, drop_teacher, kv_bytes, reproduce, speedup_bound, texts
from isotone.swiftkv.cli import app
from isotone.swiftkv.data import pack
from isotone.swiftkv.evaluate import fidelity, student_logits, teacher_logits
from isotone.swiftkv.loading import load
from isotone.swiftkv.profiling import throughput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    make(vocab_size=256, initializer_range=0.1).save_pretrained(path / "base")
    convert(make(vocab_size=256, initializer_range=0.1), 3, 1).save_pretrained(path / "swift")
    (path / "p.txt").write_text("It was the best")
    (path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    lines = [{"prompt": f"What is {i} and {i}? ", "completion": f"It is {2 * i}."} for i in range(40)]
    (path / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def run(folder, *argv):
    result = run_cli(app, [*argv, "--json"], folder)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def test_from_a_base_to_text(folder):
    said = run(folder, "convert", "base", "--num-key-value-layers", "3", "--out", "a")
    assert said["cache slots"] == "6 of 6"
    said = run(
        folder,
        "distill",
        "a/model",
        "--text",
        "text.txt",
        "--steps",
        "15",
        "--lr",
        "3e-3",
        "--context",
        "32",
        "--out",
        "b",
    )
    assert said["kl after"] < said["kl before"]
    assert (folder / "b" / "loss.png").exists() and (folder / "b" / "history.json").exists()
    said = run(
        folder, "evaluate", "b/model", "--text", "text.txt", "--base", "base", "--context", "32", "--batches", "2"
    )
    assert 0 < said["kl"] < 1
    greedy = run(folder, "generate", "b/model", "--prompt", "It was", "--max-new-tokens", "8")
    assert greedy["new tokens"] == 8
    drafted = run(
        folder,
        "generate",
        "b/model",
        "--prompt",
        "It was",
        "--max-new-tokens",
        "8",
        "--lookup",
        "3",
        "--kv-dtype",
        "fp32",
    )
    assert drafted["text"] == greedy["text"]
    sampled = [
        run(
            folder,
            "generate",
            "b/model",
            "--prompt-file",
            "p.txt",
            "--temperature",
            "1",
            "--max-new-tokens",
            "12",
            "--seeds",
            seed,
        )["text"]
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    run(folder, "export", "b/model", "--out", "c")
    assert json.loads((folder / "c" / "model" / "config.json").read_text())["architectures"] == [
        "LlamaSwiftKVForCausalLM"
    ]
    run(folder, "export", "b/model", "--format", "swift", "--out", "d")


def test_conversations_are_packed_and_only_answers_count(folder):
    said = run(
        folder,
        "distill",
        "swift",
        "--text",
        "talk.jsonl",
        "--steps",
        "4",
        "--context",
        "48",
        "--train",
        "full",
        "--out",
        "e",
    )
    assert said["steps"] == 4
    config = json.loads((folder / "e" / "model" / "config.json").read_text())
    assert config["teacher_weights"] is False, "a trained teacher is not saved"


def test_an_answer_begins_no_text_and_ends(folder, tmp_path):
    """With a tokenizer that puts a token before a text: once, before the prompt; the answer is closed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "what", "is", "it", "one", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="it"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "talk.jsonl").write_text(json.dumps({"prompt": "what is it", "completion": "one two"}))
    (found,) = texts.examples_of(tmp_path / "talk.jsonl", tmp_path, make())
    assert found == ([0, 2, 3, 4, 5, 6, 1], [-100] * 4 + [5, 6, 1])


def test_held_out_rows_are_scored_as_they_are_trained_and_never_trained(folder):
    swift = load(folder / "swift")
    training, held, _ = texts.batches_of(folder / "talk.jsonl", folder / "swift", swift, 4, 48, 0, 0.0)
    rows = pack(texts.examples_of(folder / "talk.jsonl", folder / "swift", swift), 48)
    cut = len(rows) * 9 // 10
    for ours, row in zip(held, rows[cut:], strict=True):
        assert all(torch.equal(getattr(ours, k), getattr(row, k)) for k in ("input_ids", "labels", "position_ids"))
    scored = {tuple(row.input_ids[0].tolist()) for row in held}
    assert all(tuple(row) not in scored for step in range(20) for row in training(step).input_ids.tolist())
    # by hand: only labelled tokens, at the packed positions
    row = held[0]
    with torch.no_grad():
        logits = swift(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits[0, :-1]
    asked = row.labels[0, 1:] != -100
    wanted = torch.nn.functional.cross_entropy(logits[asked], row.labels[0, 1:][asked])
    found = fidelity(student_logits(swift), teacher_logits(swift), [row])
    assert found["cross_entropy"] == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(InputError, match="at least 2 rows"):
        texts.batches_of(folder / "talk.jsonl", folder / "swift", swift, 4, 5000, 0, 0.0)


def test_numbers_without_training(folder):
    said = run(folder, "flops", "base", "--n", "1000", "--key-value-group-size", "3", "--out", "f")
    assert said["KV bytes kept"] == f"{100 * 4 / 6:g} %"
    assert (
        run(folder, "suggest", "base", "--text", "text.txt", "--batches", "2", "--context", "16", "--out", "g")[
            "layers"
        ]
        == 6
    )
    for model in ("base", "swift"):
        said = run(folder, "benchmark", model, "--lengths", "32", "--out", "h")
        assert set(said) == {"n = 32"} and (folder / "h" / "prefill.png").exists()


def test_benchmark_is_beside_the_teacher_or_a_base():
    model, base = convert(make(), 2, 4), make()
    (inside,) = benchmark(model, [24], kv_dtype="int8")
    (outside,) = benchmark(model, [24], base=base, chunk=8)
    assert inside.base_cache_bytes == kv_bytes(base.config, 25, kv_dtype="fp32") == outside.base_cache_bytes
    assert inside.cache_bytes == kv_bytes(base.config, 25, 2, 4, kv_dtype="int8")
    assert inside.bound == speedup_bound(base.config, 24, 2, 4) > 1
    assert inside.ttft > 0 < inside.tpot and model.config.swiftkv
    with pytest.raises(InputError, match="at least 1 token"):
        benchmark(model, [])
    with pytest.raises(InputError, match="teacher"):
        benchmark(drop_teacher(model), [24])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["generate", "base", "--prompt", "a"], "convert"),
        (["generate", "swift"], "--prompt"),
        (["generate", "swift", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["distill", "swift", "--text", "broken.jsonl"], "line 1"),
        (["distill", "swift", "--text", "text.txt", "--checkpoint-every", "0"], "checkpoint-every"),
        (["distill", "swift", "--text", "latin.txt"], "UTF-8"),
        (["export", "base"], "convert"),
        (["export", "swift", "--format", "gguf"], "gguf"),
        (["evaluate", "swift", "--text", "text.txt", "--batches", "0"], "batches"),
        (["reproduce", "--scale", "paper"], "GPU"),
        (["flops", "gpt2"], "gpt2"),
        (["flops", "base", "--num-key-value-layers", "0"], "got 0"),
        (["evaluate", "swift", "--text", "text.txt", "--base", "other"], "vocabulary"),
        (["distill", "swift", "--text", "talk.jsonl", "--batch", "0"], "--batch"),
        (["distill", "swift", "--text", "chat.jsonl"], "chat template"),
        (["suggest", "base", "--text", "text.txt", "--batches", "-3"], "-3"),
        (["suggest", "base", "--text", "talk.jsonl"], "talk.jsonl"),
        (["benchmark", "swift", "--num-key-value-layers", "2"], "its own 3"),
        (["flops", "many-words"], "many-words"),
        (["flops", "base/model.safetensors"], "model.safetensors"),
        (["distill", "swift", "--text", "text.txt", "--export", "foo"], "foo"),
        (["convert", "base", "--num-key-value-layers", "3", "--export", "foo"], "foo"),
        (["distill", "swift", "--text", "text.txt", "--train", "full", "--export", "dual"], "full"),
        (["distill", "swift", "--text", "text.txt", "--seeds", "0,1"], "0,1"),
        (["generate", "swift", "--prompt", "a", "--seeds", "0,1"], "0,1"),
        (["export", "student", "--format", "dual"], "dual"),
        (["bench", "--size", "gpu"], "GPU"),
    ],
)
def test_refusals(folder, argv, words):
    (folder / "broken.jsonl").write_text("{}\n")
    (folder / "latin.txt").write_bytes("perché".encode("latin-1"))
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Yes."}]}')
    (folder / "gpt2").mkdir(exist_ok=True)
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    if not (folder / "other").exists():
        make(vocab_size=300).save_pretrained(folder / "other")
        load(folder / "swift").save_pretrained(folder / "student", export="swift")
    result = run_cli(app, [*argv, "--device", "cpu"], folder)
    assert result.code == 2 and words in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_throughput_at_equal_memory():
    base, swift = make(), convert(make(), 2, 4)
    budget = 24 * 6 * 2 * 2 * 8 * 4 * 3  # three rows of 24 tokens of the base, in fp32
    before = throughput(base, budget, 16, 8, chunk=8)
    after = throughput(swift, budget, 16, 8, chunk=8)
    assert before["batch"] == 3 and after["batch"] == 6 and after["tokens_per_second"] > 0
    assert throughput(swift, budget, 16, 8, kv_dtype="int8")["batch"] == 16
    with pytest.raises(InputError, match="row of 24 tokens"):
        throughput(base, 100, 16, 8)


@pytest.mark.slow
def test_bench_at_a_tiny_size(tmp_path):
    report = bench.bench(Run(out=tmp_path, device="cpu"), "tiny")
    assert {"prefill-hf", "prefill-own", "tpot-own", "cache-g4-model", "distil-step"} <= {r.id for r in report.ratios}
    (quarter,) = (r for r in report.ratios if r.id == "cache-g4-model")
    assert quarter.ratio == pytest.approx(1.6)


@pytest.mark.slow
def test_the_gpu_scale_at_a_tiny_size(tmp_path, monkeypatch):
    """Every arm of --scale gpu, throughput at equal memory too, with numbers that a CPU can do."""
    tiny = {k: getattr(reproduce.SCALES["smoke"], k) for k in reproduce._SMOKE}
    setting = dataclasses.replace(
        reproduce.SCALES["gpu"], **tiny, shape="tiny", compute_dtype="bf16", prompt=24, output=8, memory=2_000_000
    )
    # the tiny shape has 8 layers, of which 4 are not shared by 8
    setting = dataclasses.replace(
        setting, speed_dtype="float32", recall_shape="tiny", arms=reproduce.ARMS, checkpoint_every=1
    )
    run = Run(out=tmp_path, device="cpu", quiet=True)
    report = reproduce.reproduce("gpu", run, setting=setting)
    found = {item.claim.id: item for item in report.measurements}
    assert found["throughput"].measured > 0 and found["kv-bytes"].measured == 0
    for name in ("distill", "convert", "random_llama"):
        monkeypatch.setattr(reproduce, name, None)
    again = reproduce.reproduce("gpu", run, setting=setting)
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements], "arms are kept"
    assert again.seconds == pytest.approx(report.seconds, rel=0.2), "the time is that of the arms"


@pytest.mark.slow
def test_the_paper_scale_at_a_tiny_size(tmp_path, folder):
    """A given model instead of one that is trained here."""
    tiny = {k: v for k, v in reproduce._SMOKE.items() if k not in ("base_steps", "text")}
    tiny |= dict(shape="tiny", speed_shape="tiny", speed_dtype="float32", prompt=24, output=8, memory=2_000_000)
    setting = dataclasses.replace(reproduce.SCALES["paper"], **tiny, compute_dtype="model")
    run = Run(out=tmp_path, device="cpu", quiet=True)
    make(vocab_size=256, num_hidden_layers=8, initializer_range=0.1).save_pretrained(tmp_path / "model")
    report = reproduce.reproduce("paper", run, folder / "text.txt", tmp_path / "model", setting)
    assert [source["name"] for source in report.data] == ["text.txt", "config of model"]
    with pytest.raises(InputError, match="--model"):
        reproduce.reproduce("paper", run, folder / "text.txt", None, setting)


def test_the_model_that_is_read_is_not_overwritten(tmp_path):
    make(vocab_size=256).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    result = run_cli(app, ["convert", "model", "--num-key-value-layers", "2", "--out", "."], tmp_path)
    assert result.code == 2 and "overwritten" in result.stderr
    assert (tmp_path / "model" / "config.json").read_text() == before


def test_a_base_of_nan_is_no_perfect_match(folder):
    swift, spoilt = load(folder / "swift"), make(vocab_size=256)
    with torch.no_grad():
        spoilt.lm_head.weight[0, 0] = float("nan")
    batch = [torch.zeros(1, 4, dtype=torch.long)]
    with pytest.raises(InputError, match="compared with"):
        fidelity(student_logits(swift), student_logits(spoilt), batch)


def chat_tokenizer(path, words=("<s>", "</s>", "user", "assistant", "what", "is", "it", "one", "two")):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="it"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "<s> {% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    made.save_pretrained(path)


def test_conversations_ask_for_the_assistant_s_words_alone(tmp_path):
    chat_tokenizer(tmp_path)
    turns = [("user", "what is it"), ("assistant", "one"), ("user", "is it"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages}))
    (found,) = texts.examples_of(tmp_path / "talk.jsonl", tmp_path, make())
    assert found[0] == [0, 2, 4, 5, 6, 1, 3, 7, 1, 2, 5, 6, 1, 3, 8, 1]
    assert found[1] == [-100] * 7 + [7, 1] + [-100] * 5 + [8, 1]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages[:1]}))
    with pytest.raises(InputError, match="assistant, on line 1"):
        texts.examples_of(tmp_path / "talk.jsonl", tmp_path, make())
    with pytest.raises(InputError, match="below its model's 5"):
        texts.tokens_of(tmp_path / "talk.jsonl", tmp_path, make(vocab_size=5))


def test_lines_are_evaluated_as_lines_and_full_training_is_scored(folder):
    said = run(folder, "evaluate", "swift", "--text", "talk.jsonl", "--context", "48", "--out", "ev")
    swift = load(folder / "swift")
    rows = pack(texts.examples_of(folder / "talk.jsonl", folder / "swift", swift), 48)
    wanted = fidelity(student_logits(swift), teacher_logits(swift), rows)
    assert said["kl"] == pytest.approx(wanted["kl"], abs=1e-4)
    arguments = ["--text", "text.txt", "--steps", "2", "--context", "32", "--train", "full", "--out", "fu"]
    said = run(folder, "distill", "swift", *arguments)
    assert said["kl before"] > 0 and said["kl after"] > 0


def test_a_name_on_the_hub_goes_to_transformers(folder, monkeypatch):
    from isotone.swiftkv import loading

    asked = []

    class Hub:
        @staticmethod
        def from_pretrained(name, **kwargs):
            asked.append(str(name))
            return config

    config = loading.config_of(folder / "base")
    monkeypatch.setattr(loading, "AutoConfig", Hub)
    assert loading.config_of("owner/name") is config and asked == ["owner/name"]
    for name in ("name-alone", "a/b/c", str(folder)):
        with pytest.raises(InputError, match="model folder"):
            loading.config_of(name)


def test_lines_are_lines_and_the_tokenizer_is_read_once(tmp_path, monkeypatch):
    from isotone.swiftkv import tokens

    chat_tokenizer(tmp_path)
    calls = []
    whole = tokens.tokenizer_of
    for module in (tokens, texts):
        monkeypatch.setattr(module, "tokenizer_of", lambda folder: calls.append(1) or whole(folder))
    line = json.dumps({"prompt": "what\u2028is\u0085it", "completion": "one"}, ensure_ascii=False)
    (tmp_path / "talk.jsonl").write_text("\n".join([line] * 5), encoding="utf-8")
    assert len(texts.examples_of(tmp_path / "talk.jsonl", tmp_path, make())) == 5 and len(calls) == 1


def test_what_a_chat_template_refuses_is_one_sentence(tmp_path):
    chat_tokenizer(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ raise_exception('no system role') }}")
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "one"}]}))
    with pytest.raises(InputError, match="no system role, on line 1"):
        texts.examples_of(tmp_path / "talk.jsonl", tmp_path, make())
