"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

import functools
import shutil
import tempfile
from pathlib import Path

_FAST = ["--calib-samples", "4", "--calib-len", "24", "--gptq-len", "24", "--group-size", "32"]
_QUANTIZE = ["quantize", "model", "--text", "text.txt", *_FAST]
JOB = _QUANTIZE
BAD = [
    (["quantize", "missing-model", "--text", "text.txt"], "missing-model"),
    (["quantize", "nan-model", "--text", "text.txt", *_FAST], "NaN"),
    (["quantize", "gpt2", "--text", "text.txt"], "gpt2"),
    (["quantize", "torn", "--text", "text.txt"], "torn"),
    (["quantize", "quantized", "--text", "text.txt"], "quantised already"),
    (["quantize", "model", "--text", "missing.txt"], "missing.txt"),
    (["quantize", "model", "--text", "empty.txt"], "2 tokens"),
    (["quantize", "model", "--group-size", "32"], "calibration samples"),
    (["quantize", "model", "--text", "text.txt"], "group_size"),
    ([*_QUANTIZE, "--mode", "w2a8"], "w2a8"),
    ([*_QUANTIZE, "--hadamard", "some"], "some"),
    ([*_QUANTIZE, "--embedding-bits", "5"], "5"),
    ([*_QUANTIZE, "--head-groups", "0"], "0"),
    (["evaluate", "model", "--text", "text.txt"], "quantize it"),
    (["evaluate", "quantized", "--text", "missing.txt"], "missing.txt"),
    (["evaluate", "quantized", "--text", "text.txt", "--length", "1"], "1"),
    (["generate", "quantized", "--prompt", ""], "prompt"),
    (["generate", "quantized", "--prompt", "a", "--temperature", "nan"], "nan"),
    (["generate", "quantized", "--prompt", "a", "--top-p", "2"], "top_p"),
    (["search", "quantized", "--text", "text.txt", "--n-high", "1"], "mixed"),
    (["profile", "quantized", "--batch", "0"], "batch"),
    (["export", "missing-model"], "missing-model"),
    (["reproduce", "--scale", "huge"], "huge"),
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


def make(folder: Path) -> None:
    """Models, whole and spoiled, and texts."""
    import json

    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from isotone.quamba2.config import QuambaConfig
    from isotone.quamba2.quantize import quantize

    def mamba():
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, num_heads=4, head_dim=16, expand=2, n_groups=1, state_size=8, chunk_size=16)
        return Mamba2ForCausalLM(Mamba2Config(**sizes, vocab_size=256, num_hidden_layers=2))

    mamba().save_pretrained(folder / "model")
    spoiled = mamba()
    with torch.no_grad():
        spoiled.backbone.layers[1].mixer.D[0] = float("nan")
    spoiled.save_pretrained(folder / "nan-model")
    config = QuambaConfig(group_size=32, calib_samples=2, calib_len=16, gptq=False)
    quantize(mamba(), [torch.arange(32)], config).save_pretrained(folder / "quantized")
    mamba().save_pretrained(folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8}))
    (folder / "text.txt").write_text("What is past is prologue. " * 40)
    (folder / "empty.txt").write_text("")
