"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

SMALL = ["--num-train", "3", "--num-val", "4", "--epochs", "4", "--hidden", "8"]
JOB = ["train", "--data", "data.npz", *SMALL]
BAD = [
    (["train", "--data", "missing.npz"], "missing.npz"),
    (["train", "--data", "nan.npz"], "NaN"),
    (["train", "--data", "text.npz"], "text.npz"),
    (["train", "--data", "far.npz"], "got 99"),
    (["train", "--data", "data.npz"], "class 0"),
    (["train", "--data", "data.npz", *SMALL, "--lr", "nan"], "nan"),
    (["train", "--data", "data.npz", *SMALL, "--teacher", "gnn"], "gnn"),
    (["train", "--data", "data.npz", *SMALL, "--test-ind-ratio", "1.5"], "1.5"),
    (["distill", "--data", "data.npz", "--teacher", "nowhere"], "nowhere"),
    (["distill", "--data", "data.npz", "--lam", "2"], "2"),
    (["distill", "--data", "data.npz", "--tau", "0"], "tau"),
    (["predict", "missing.npy"], "student"),
    (["export", "--format", "pickle"], "pickle"),
    (["convert", "edges.txt"], "--features"),
    (["convert", "missing"], "missing"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--scale", "gpu", "--device", "cpu"], "gpu"),
    (["bench", "--size", "huge"], "huge"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    import numpy as np

    source = np.random.default_rng(0)
    y = np.arange(60) % 3
    X = np.eye(3)[y] + source.normal(size=(60, 3))
    edges = np.stack((np.arange(60), np.arange(60) % 3 + 3 * (np.arange(60) // 15)))
    np.savez(folder / "data.npz", x=X, y=y, hyperedge_index=edges)
    np.savez(folder / "nan.npz", x=np.full((60, 3), np.nan), y=y, hyperedge_index=edges)
    np.savez(folder / "far.npz", x=X, y=y, hyperedge_index=np.array([[0, 99], [0, 0]]))
    (folder / "text.npz").write_text("not an npz")
    (folder / "edges.txt").write_text("0 1\n1 2\n")
