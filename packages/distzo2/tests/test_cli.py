"""The commands on small folders: train, resume, replay, evaluate, plan, and ranks that torchrun starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import contract
import pytest
import torch

from isotone.distzo2 import load_trajectory
from isotone.distzo2.cli import app
from isotone.distzo2.loading import load_model
from isotone.shared.testing import run_cli


@pytest.fixture
def folder(tmp_path):
    contract.files(tmp_path)
    return tmp_path


def ran(folder, *argv):
    result = run_cli(app, [*argv, "--json"], folder)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


TRAIN = ["train", "model", "--text", "text.txt", "--batch", "2", "--context", "16", "--lr", "1e-4"]


def weights(folder, name):
    return torch.cat([p.detach().reshape(-1) for p in load_model(folder / name / "model").parameters()])


def test_a_run_is_resumed_replayed_and_evaluated(folder):
    found = ran(folder, *TRAIN, "--steps", "6", "--checkpoint-every", "2", "--out", "whole")
    assert found["steps"] == 6 and found["skipped"] == 0
    ran(folder, *TRAIN, "--steps", "4", "--checkpoint-every", "2", "--offload", "disk", "--out", "parts")
    ran(folder, *TRAIN, "--steps", "6", "--checkpoint-every", "2", "--offload", "cpu", "--out", "parts")
    assert torch.equal(weights(folder, "whole"), weights(folder, "parts"))
    steps = load_trajectory(folder / "whole" / "trajectory.safetensors")
    assert (folder / "whole" / "loss.png").is_file() and len(steps) == 6
    replayed = ran(folder, "replay", "model", "--trajectory", "whole/trajectory.safetensors", "--out", "again")
    assert replayed["steps"] == 6 and torch.equal(weights(folder, "again"), weights(folder, "whole"))
    evaluated = ran(folder, "evaluate", "whole/model", "--text", "text.txt", "--batch", "2", "--context", "16")
    assert evaluated["loss"] == pytest.approx(found["held-out loss"], rel=1e-5)


def test_lines_of_prompts_and_lora(folder):
    lines = [json.dumps({"prompt": f"What is {i}?", "completion": f" {i}."}) for i in range(20)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    options = ["--text", "lines.jsonl", "--steps", "2", "--batch", "2", "--context", "16", "--eps", "0.01"]
    lora = ["--lora", "2", "--seeds", "5"]
    found = ran(folder, "train", "model", *options, *lora, "--estimator", "one_sided", "--directions", "2")
    assert found["steps"] == 2 and list((folder / found["model"]).glob("adapter_model.*"))
    # an adapter is read again, offloaded too, and replayed from the same first values
    judge = ["--text", "lines.jsonl", "--batch", "2", "--context", "16"]
    judged = ran(folder, "evaluate", found["model"], *judge)
    assert judged["loss"] == pytest.approx(found["held-out loss"], rel=1e-5)
    assert ran(folder, "evaluate", found["model"], *judge, "--offload", "cpu")["loss"] == judged["loss"]
    steps = str(Path(found["model"]).parent / "trajectory.safetensors")
    again = ran(folder, "replay", "model", "--trajectory", steps, *lora, "--out", "again")
    replayed, trained = (load_model(folder / at["model"]).state_dict() for at in (again, found))
    assert all(torch.equal(value, trained[name]) for name, value in replayed.items())
    result = run_cli(app, ["replay", "model", "--trajectory", steps, "--lora", "2", "--seeds", "6"], folder)
    assert result.code == 2 and "base model" in result.stderr


@pytest.mark.parametrize(
    "line", [{"prompt": "", "completion": "a"}, {"prompt": "a", "completion": ""}, {"prompt": "", "completion": ""}]
)
def test_lines_that_ask_for_nothing_are_named(line, folder):
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(x) for x in [{"prompt": "a", "completion": "b"}, line]))
    result = run_cli(app, ["evaluate", "model", "--text", "lines.jsonl", "--context", "16"], folder)
    assert result.code == 2 and "line 2" in result.stderr and "Traceback" not in result.stderr


def test_ranks_without_a_word_on_what_they_share_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_cli(app, [*TRAIN, "--steps", "2"], folder)
    assert result.code == 2 and "--parallel" in result.stderr


def test_a_tokenizers_own_marks(tmp_path):
    """What begins a text stays before a prompt that is cut; what ends one does not stand before the completion."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from isotone.distzo2.texts import _PROMPT, _WHOLE, _Encoder, _tail

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="c"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    encode = _Encoder(tmp_path, 5)
    assert encode("a b") == [2, 3] and encode("a b", _WHOLE) == [0, 2, 3, 1] and encode("a b", _PROMPT) == [0, 2, 3]
    assert _tail(encode("a b c", _PROMPT), 3, encode.first) == [0, 3, 4]
    assert _tail([2, 3, 4], 2, None) == [3, 4]


def test_label_words_of_a_causal_model(folder):
    """Section 2.11: the same loss as the classes' cross-entropy by hand; the accuracy beside it."""
    lines = [
        json.dumps({"text": f"{'good' if i % 2 else 'bad'} film number {i}. It was", "label": i % 2}) for i in range(20)
    ]
    (folder / "films.jsonl").write_text("\n".join(lines))
    options = ["--text", "films.jsonl", "--batch", "4", "--context", "40", "--label-words", "n,y"]
    found = ran(folder, "train", "model", *options, "--steps", "2", "--out", "films")
    judged = ran(folder, "evaluate", "films/model", *options)
    assert judged["terms"] == 2 and judged["accuracy"] in (0, 50, 100)
    assert judged["loss"] == pytest.approx(found["held-out loss"], rel=1e-6)
    model, losses = load_model(folder / "films" / "model"), []
    for number in (18, 19):
        ids = torch.tensor([list(json.loads(lines[number])["text"].encode())])
        losses.append(-model(ids).logits[0, -1, [ord("n"), ord("y")]].log_softmax(0)[number % 2].item())
    assert judged["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    for words, said in (("", "label words"), ("n", "two or more"), ("no,yes", "one token"), ("n,n", "different")):
        result = run_cli(app, ["evaluate", "model", *options[:-1], words], folder)
        assert result.code == 2 and said in result.stderr
    result = run_cli(app, ["train", "model", *TRAIN[2:], "--label-words", "n,y"], folder)
    assert result.code == 2 and "text and label" in result.stderr


def test_a_classifier_sees_each_row_alone(tmp_path):
    """Shorter rows are padded with the token by which the model finds their last one: the batch changes nothing."""
    from transformers import OPTConfig, OPTForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    config = OPTConfig(vocab_size=256, max_position_embeddings=64, num_labels=2, **sizes)
    OPTForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    lines = [json.dumps({"text": "a good film"[: 3 + i % 8], "label": i % 2}) for i in range(60)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    options = ["classifier", "--text", "lines.jsonl", "--context", "16", "--batch"]
    alone, together = (ran(tmp_path, "evaluate", *options, rows) for rows in ("1", "6"))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6) and together["terms"] == 6
    assert together["accuracy"] == alone["accuracy"]
    stripped = json.loads((tmp_path / "classifier" / "config.json").read_text()) | {"pad_token_id": None}
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(stripped))
    result = run_cli(app, ["evaluate", *options, "6"], tmp_path)
    assert result.code == 2 and "pad_token_id" in result.stderr


def test_plans(folder):
    found = ran(folder, "plan", "model", "--slices", "2")
    assert "2 blocks" in found["parameters"] and found["gradient"].startswith("24 bytes")
    ran(folder, "plan", "model/config.json")


@pytest.mark.slow
def test_ranks_of_torchrun_train_and_a_killed_one_ends_all(folder):
    """Two ranks take the steps that one process takes; when one is killed the command ends with one sentence."""
    ran(folder, *TRAIN, "--steps", "4", "--out", "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "isotone.distzo2", *TRAIN, "--parallel", "pertp", "--offload", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run([*command, "--steps", "4", "--out", "two"], timeout=200, **options)
    assert done.returncode == 0 and done.stdout.count("scalar bytes") == 1, "one rank speaks"
    assert torch.equal(weights(folder, "two"), weights(folder, "one"))
    process = subprocess.Popen([*command, "--steps", "100000", "--checkpoint-every", "5", "--out", "three"], **options)
    checkpoints = folder / "three" / "checkpoints"
    while not list(checkpoints.glob("step-*")) and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=100)
    # torchrun may end the other rank before it has said its sentence
    assert process.returncode and stderr.count("another rank ended or did not answer") <= 1
    assert "isotone/distzo2" not in stderr, "a traceback of ours"
