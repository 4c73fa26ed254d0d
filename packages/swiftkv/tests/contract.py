"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

import functools
import shutil
import tempfile
from pathlib import Path

_CONVERT = ["convert", "model", "--num-key-value-layers"]
JOB = [*_CONVERT, "2", "--key-value-group-size", "2"]
BAD = [
    (["convert", "missing-model", "--num-key-value-layers", "2"], "missing-model"),
    (["convert", "nan-model", "--num-key-value-layers", "2"], "NaN"),
    ([*_CONVERT, "0"], "0"),
    ([*_CONVERT, "5"], "5"),
    ([*_CONVERT, "1", "--key-value-group-size", "2"], "divide"),
    (["convert", "swift", "--num-key-value-layers", "2"], "converted"),
    (["convert", "gpt2", "--num-key-value-layers", "2"], "gpt2"),
    (["convert", "torn", "--num-key-value-layers", "2"], "torn"),
    ([*_CONVERT, "2", "--export", "gguf"], "gguf"),
    (["distill", "swift", "--text", "missing.txt"], "missing.txt"),
    (["distill", "swift", "--text", "text.txt", "--lr", "nan"], "nan"),
    (["distill", "swift", "--text", "short.txt"], "short.txt"),
    (["distill", "model", "--text", "text.txt"], "convert"),
    (["generate", "swift", "--prompt", ""], "prompt"),
    (["generate", "swift", "--prompt", "a", "--kv-dtype", "int3"], "int3"),
    (["generate", "swift", "--prompt", "a", "--decode-mode", "cudagraph"], "GPU"),
    (["generate", "swift", "--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk"),
    (["export", "grouped", "--format", "arctic"], "key_value_group_size"),
    (["benchmark", "model", "--lengths", "many"], "many"),
    (["evaluate", "swift", "--text", "missing.txt"], "missing.txt"),
    (["flops", "missing-model"], "missing-model"),
    (["bench", "--size", "huge"], "huge"),
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
    from transformers import LlamaConfig, LlamaForCausalLM

    from isotone.swiftkv import convert

    def llama():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    llama().save_pretrained(folder / "model")
    spoiled = llama()
    with torch.no_grad():
        spoiled.model.layers[3].self_attn.q_proj.weight[0, 0] = float("nan")
    spoiled.save_pretrained(folder / "nan-model")
    convert(llama(), 2, 1).save_pretrained(folder / "swift")
    convert(llama(), 2, 2).save_pretrained(folder / "grouped")
    llama().save_pretrained(folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2})
    )
    (folder / "text.txt").write_text("What is past is prologue. " * 200)
    (folder / "short.txt").write_text("Too short.")
