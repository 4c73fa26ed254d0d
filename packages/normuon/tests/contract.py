"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

SMALL = ["--steps", "3", "--dim", "16", "--layers", "1", "--context", "16", "--batch", "2"]
JOB = ["train", "--text", "text.txt", *SMALL]
BAD = [
    (["train", "--text", "missing.txt"], "missing.txt"),
    (["train", "--text", "short.txt"], "short.txt"),
    (["train", "--text", "text.txt", "--lr", "nan"], "nan"),
    (["train", "--text", "text.txt", "--lr", "-1"], "-1"),
    (["train", "--text", "text.txt", "--optimizer", "sgd"], "sgd"),
    (["train", "--text", "text.txt", "--dim", "15"], "15"),
    (["train", "--text", "text.txt", "--seeds", "0,1"], "one seed"),
    (["train", "--text", "text.txt", "--scale-mode", "huge"], "huge"),
    (["inspect", "missing.safetensors"], "missing.safetensors"),
    (["inspect", "text.txt"], "text.txt"),
    (["inspect", "nan.safetensors"], "nan"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--scale", "paper", "--device", "cpu"], "paper"),
    (["bench", "--shapes", "huge"], "huge"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    import torch
    from safetensors.torch import save_file

    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 50)
    (folder / "short.txt").write_text("too short")
    save_file({"weight": torch.full((2, 3), float("nan"))}, folder / "nan.safetensors")
