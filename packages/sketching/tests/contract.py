"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

SMALL = ["--clients", "4", "--rounds", "4", "--local-steps", "2", "--batch", "8"]
MINE = ["train", "--data", "data.npz", "--ratio", "2", *SMALL]
JOB = MINE
BAD = [
    (["train", "--data", "missing.npz"], "missing.npz"),
    (["train", "--data", "nan.npz"], "nan"),
    (["train", "--data", "torn.npz"], "torn.npz"),
    (["train", "--data", "empty.npz"], "empty.npz"),
    (["train", "--data", "halves.npz"], "whole numbers"),
    (["train", "--data", "mnist"], "mnist"),
    ([*MINE, "--model", "transformer"], "transformer"),
    ([*MINE, "--model", "cnn"], "pictures"),
    ([*MINE, "--arm", "gzip"], "gzip"),
    ([*MINE, "--kind", "fourier"], "fourier"),
    ([*MINE, "--size", "100"], "at most d = 8"),
    ([*MINE, "--size", "0"], "size"),
    ([*MINE, "--kind", "sparse", "--size", "6"], "q to divide s"),
    ([*MINE, "--ratio", "0.5"], "0.5"),
    ([*MINE, "--ratio", "nan"], "nan"),
    ([*MINE, "--arm", "topk", "--size", "9"], "k from 1"),
    ([*MINE, "--arm", "qsgd", "--size", "-1"], "-1"),
    ([*MINE, "--clients", "100"], "clients"),
    ([*MINE, "--clients", "0"], "clients"),
    ([*MINE, "--participants", "5"], "at most 4"),
    ([*MINE, "--concentration", "-1"], "concentration"),
    ([*MINE, "--local-steps", "0"], "local_steps"),
    ([*MINE, "--rate", "-1"], "-1.0"),
    ([*MINE, "--rate", "3e38"], "none in round"),
    ([*MINE, "--eta-g", "fast"], "fast"),
    ([*MINE, "--server-opt", "lion"], "lion"),
    ([*MINE, "--noise", "-1"], "-1.0"),
    ([*MINE, "--noise", "nan"], "nan"),
    ([*MINE, "--noise", "1", "--clip", "0"], "clip"),
    ([*MINE, "--noise", "1", "--delta", "0"], "delta in (0, 1)"),
    ([*MINE, "--noise", "1", "--delta", "1"], "delta in (0, 1)"),
    ([*MINE, "--noise", "1", "--sampling", "2"], "sampling"),
    ([*MINE, "--epsilon", "-2"], "-2.0"),
    ([*MINE, "--epsilon", "1", "--noise", "1"], "both"),
    ([*MINE, "--seeds", "0,1"], "one seed"),
    ([*MINE, "--checkpoint-every", "0"], "every"),
    ([*MINE, "--straggle", "1"], "straggle"),
    ([*MINE, "--device", "tpu"], "tpu"),
    ([*MINE, "--noise", "1", "--out", "begun"], "noise.key"),
    (["server", "--arm", "topk"], "topk"),
    (["server", "--shape", "8x8"], "8x8"),
    (["server", "--port", "70000"], "70000"),
    (["server", "--deadline", "nan"], "nan"),
    (["server", "--wait-for", "21"], "at most 20"),
    (["server", "--noise", "-1"], "-1.0"),
    (["server", "--out", "torn"], "same plan"),
    (["server", "--port", "0", "--patience", "0.05", "--quiet"], "0.05 seconds"),
    (["client", "--client", "4", "--clients", "4"], "from 0 to 3"),
    (["client", "--client", "0", "--data", "missing.npz"], "missing.npz"),
    (["client", "--client", "0", "--port", "1", "--patience", "0.05"], "expected a server"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["account"], "neither"),
    (["account", "--noise", "1", "--delta", "2"], "delta"),
    (["account", "--noise", "nan"], "nan"),
    (["account", "--epsilon", "-1"], "epsilon"),
    (["attack", "--weights", "missing.safetensors"], "missing.safetensors"),
    (["attack", "--weights", "data.npz"], "differs"),
    (["attack", "--weights", "torn.npz"], "torn"),
    (["attack", "--size", "100000"], "100000"),
    (["attack", "--data", "nan.npz"], "nan"),
    (["audit", "--sizes", "many"], "many"),
    (["audit", "--noises", "-1"], "-1"),
    (["compare", "--arms", "pigeons"], "pigeons"),
    (["compare", "--rates", "fast"], "fast"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    import hashlib

    import numpy as np
    import safetensors.numpy

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    y = (x[:, 0] > 0).astype(int)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "nan.npz", x=np.full((80, 3), np.nan), y=y)
    np.savez(folder / "empty.npz", x=x[:0], y=y[:0])
    np.savez(folder / "halves.npz", x=x, y=y / 2)
    (folder / "torn.npz").write_bytes((folder / "data.npz").read_bytes()[:100])
    (folder / "torn").mkdir()
    (folder / "torn" / "plan.json").write_text('{"config": ')
    # a checkpoint of a private run whose noise is gone
    saved = folder / "begun" / "checkpoints"
    saved.mkdir(parents=True)
    data = safetensors.numpy.save({}, {"isotone": '{"step": 2, "state": {}}'})
    (saved / f"step-00000002-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
