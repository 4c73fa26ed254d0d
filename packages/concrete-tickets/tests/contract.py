"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

SMALL = ["--epochs", "4", "--search-epochs", "2", "--rewind", "1", "--batch-size", "16"]
JOB = ["search", "--data", "npz:data.npz", "--density", "0.05", *SMALL]
BAD = [
    (["search", "--data", "npz:missing.npz"], "missing.npz"),
    (["search", "--data", "npz:nan.npz"], "nan"),
    (["search", "--data", "cifar10:missing"], "missing"),
    (["search", "--data", "svhn"], "svhn"),
    (["search", "--density", "0"], "0.0"),
    (["search", "--density", "1.5"], "1.5"),
    (["search", "--density", "nan"], "nan"),
    (["search", "--density", "1e-9"], "1e-09"),
    (["search", "--objective", "entropy"], "entropy"),
    (["search", "--when", "later"], "later"),
    (["search", "--model", "resnet9"], "resnet9"),
    (["search", "--lr", "nan"], "nan"),
    (["search", "--epochs", "2", "--rewind", "2"], "rewind epoch"),
    (["search", "--seeds", "0,1"], "one seed"),
    (["search", "--structure", "4:2"], "4:2"),
    (["search", "--controller", "pid"], "pid"),
    (["search", "--checkpoint-every", "0"], "checkpoint-every"),
    (["search", "--batch-size", "5000"], "5000"),
    (["ltr", "--keep", "1"], "keep"),
    (["train", "missing"], "missing"),
    (["train", "torn"], "run.json"),
    (["sanity", "missing"], "missing"),
    (["export", "missing"], "missing"),
    (["export", "missing", "--format", "onnx"], "onnx"),
    (["compare", "--arms", "cts,obd"], "obd"),
    (["compare", "--density", "half"], "half"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--scale", "paper", "--device", "cpu"], "paper"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 12))
    np.savez(folder / "data.npz", x=x, y=np.argmax(x[:, :3], 1))
    np.savez(folder / "nan.npz", x=np.full((80, 12), np.nan), y=np.zeros(80, int))
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text('{"data": ')
