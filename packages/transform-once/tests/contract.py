"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

import numpy as np

TRAIN = ["--epochs", "2", "--batch-size", "4", "--width", "3", "--depth", "1", "--modes", "4"]
JOB = ["train", "fields.npz", *TRAIN]
BAD = [
    (["train", "missing.npz"], "missing.npz"),
    (["train", "torn.npz", *TRAIN], "torn.npz"),
    (["train", "nan.npz", *TRAIN], "NaN"),
    (["train", "integers.npz", *TRAIN], "int64"),
    (["train", "other.npz", *TRAIN], "found z"),
    (["train", "grids.npz", *TRAIN], "one grid"),
    (["train", "fields.txt", *TRAIN], "fields.txt"),
    (["train", "torn.h5", *TRAIN], "torn.h5"),
    (["train", "fields.npz", "--model", "lstm"], "lstm"),
    (["train", "fields.npz", "--modes", "9"], "9"),
    (["train", "fields.npz", "--modes", "four"], "four"),
    (["train", "fields.npz", "--init", "xavier"], "xavier"),
    (["train", "fields.npz", *TRAIN, "--lr", "nan"], "nan"),
    (["train", "either.npz", *TRAIN], "--no-channels"),
    (["train", "complex.npz", *TRAIN], "complex128"),
    (["train", "flipped.npz", *TRAIN], "flipped.npz"),
    (["train", "one.npz", *TRAIN], "1 trajectories"),
    (["train", "fields.npz", "--model", "u-net", "--modes", "4"], "--modes"),
    (["train", "fields.npz", *TRAIN, "--context", "2"], "--context"),
    (["train", "fields.npz", *TRAIN, "--order", "2"], "order 2"),
    (["train", "fields.npz", *TRAIN, "--loss", "l7"], "l7"),
    (["train", "fields.npz", *TRAIN, "--test", "1.5"], "1.5"),
    (["train", "fields.npz", *TRAIN, "--batch-size", "99"], "99"),
    (["train", "fields.npz", *TRAIN, "--seeds", "0,1"], "one seed"),
    (["train", "fields.npz", *TRAIN, "--dtype", "float8"], "float8"),
    (["train", "zero.npz", *TRAIN], "not 0 everywhere"),
    (["evaluate", "missing", "fields.npz"], "config.json"),
    (["rollout", "torn", "fields.npz"], "whole model"),
    (["modes", "fields.npz", "--tol", "2"], "2"),
    (["modes", "either.npz"], "--channels"),
    (["export", "missing"], "config.json"),
    (["generate", "--problem", "weather"], "weather"),
    (["generate", "--samples", "0"], "samples"),
    (["generate", "--problem", "joukowski", "--dt", "0.1"], "--dt"),
    (["generate", "--samples", "1", "--size", "8", "--dt", "-1"], "-1"),
    (["benchmark", "--sizes", "64,large"], "large"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--task", "chess"], "chess"),
    (["reproduce", "--scale", "paper", "--device", "cpu"], "paper"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    x = np.random.default_rng(0).standard_normal((12, 8, 8))
    np.savez(folder / "fields.npz", inputs=x, targets=x[:, ::-1])
    np.savez(folder / "nan.npz", x=x * np.nan, y=x)
    np.savez(folder / "integers.npz", x=x.astype(int), y=x.astype(int))
    np.savez(folder / "other.npz", z=x)
    np.savez(folder / "grids.npz", x=x, y=x[:, :4])
    np.savez(folder / "zero.npz", x=x, y=0 * x)
    np.savez(folder / "either.npz", x=x[:, :, :4], y=x[:, :, :4])
    np.savez(folder / "complex.npz", x=x + 1j, y=x)
    np.savez(folder / "one.npz", trajectories=x[:1, :, :, None])
    np.savez_compressed(folder / "flipped.npz", x=x, y=x)
    flipped = bytearray((folder / "flipped.npz").read_bytes())
    flipped[2000] ^= 0xFF  # in the middle of a compressed stream
    (folder / "flipped.npz").write_bytes(flipped)
    (folder / "torn.npz").write_bytes((folder / "fields.npz").read_bytes()[:200])
    (folder / "torn.h5").write_bytes(b"\x89HDF\r\n")
    (folder / "fields.txt").write_text("1 2 3")
    (folder / "torn").mkdir()
    (folder / "torn" / "config.json").write_text("{")
    (folder / "torn" / "model.safetensors").write_bytes(b"")
