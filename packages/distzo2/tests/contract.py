"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

import functools
import shutil
import tempfile
from pathlib import Path

_TRAIN = ["train", "model", "--text", "text.txt", "--steps", "3", "--batch", "2", "--context", "16"]
JOB = [*_TRAIN, "--offload", "cpu"]
BAD = [
    (["train", "missing-model", "--text", "text.txt"], "missing-model"),
    (["train", "model", "--text", "missing.txt", "--context", "16"], "missing.txt"),
    (["train", "nan-model", "--text", "text.txt"], "NaN"),
    (["train", "torn", "--text", "text.txt"], "torn"),
    ([*_TRAIN, "--eps", "0"], "eps"),
    ([*_TRAIN, "--lr", "nan"], "nan"),
    ([*_TRAIN, "--lr", "-1"], "lr"),
    ([*_TRAIN, "--offload", "cloud"], "cloud"),
    ([*_TRAIN, "--estimator", "three"], "three"),
    ([*_TRAIN, "--schedule", "cosine"], "cosine"),
    ([*_TRAIN, "--parallel", "pertp"], "torchrun"),
    ([*_TRAIN, "--parallel", "5d"], "5d"),
    ([*_TRAIN, "--offload-dtype", "fp4"], "fp4"),
    ([*_TRAIN, "--steps", "0"], "--steps"),
    ([*_TRAIN, "--seeds", "1,2"], "one seed"),
    (["train", "model", "--text", "short.txt", "--context", "16"], "short.txt"),
    (["train", "model", "--text", "bad.jsonl", "--context", "16"], "line 2"),
    (["replay", "model", "--trajectory", "missing.safetensors"], "missing.safetensors"),
    (["replay", "model", "--trajectory", "torn.safetensors"], "torn.safetensors"),
    (["evaluate", "model", "--text", "missing.txt", "--context", "16"], "missing.txt"),
    (["evaluate", "model", "--text", "text.txt", "--context", "65"], "64 positions"),
    (["plan", "model", "--pertp", "7"], "pertp"),
    (["plan", "model", "--offload-bytes", "-2"], "offload_bytes"),
    (["plan", "missing-model"], "missing-model"),
    (["plan", "model", "--link", "0"], "link"),
    (["plan", "model", "--tokens", "0"], "tokens"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--scale", "paper"], "--model"),
    (["bench", "--size", "huge"], "huge"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use: made once, copied for every command."""
    shutil.copytree(made().name, folder, dirs_exist_ok=True)


@functools.cache
def made() -> tempfile.TemporaryDirectory[str]:
    """The files, in a folder that goes with the process."""
    temporary = tempfile.TemporaryDirectory()
    make(Path(temporary.name))
    return temporary


def small():
    """A byte-level OPT."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    return OPTForCausalLM(OPTConfig(vocab_size=256, max_position_embeddings=64, **sizes))


def make(folder: Path) -> None:
    """Models, whole and spoiled, and texts."""
    import torch

    small().save_pretrained(folder / "model")
    spoiled = small()
    with torch.no_grad():
        spoiled.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    spoiled.save_pretrained(folder / "nan-model")
    small().save_pretrained(folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "text.txt").write_text("What is past is prologue. " * 60)
    (folder / "short.txt").write_text("Too short.")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (folder / "torn.safetensors").write_bytes(b"not a trajectory")
