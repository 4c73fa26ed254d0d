"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

SMALL = ["--steps", "3", "--batch", "8", "--candidates", "20"]
GRID = ["train", "--env", "moo-grid", "--side", "6", *SMALL]
FRAGMENTS = ["train", "--env", "fragments", "--max-fragments", "2", "--channels", "8", "--layers", "1", *SMALL]
JOB = [*FRAGMENTS, "--objectives", "qed", "--objectives", "sa"]
BAD = [
    ([*GRID, "--env", "chess"], "chess"),
    ([*GRID, "--loss", "op-magic"], "op-magic"),
    ([*GRID, "--label", "best"], "best"),
    ([*GRID, "--objectives", "rastrigin"], "rastrigin"),
    ([*GRID, "--lr", "nan"], "nan"),
    ([*GRID, "--batch", "1"], "got 1"),
    ([*GRID, "--steps", "0"], "--steps"),
    ([*GRID, "--seeds", "0,1"], "one seed"),
    ([*GRID, "--score", "missing.py:score"], "missing.py"),
    ([*GRID, "--score", "score.py:missing"], "missing"),
    ([*GRID, "--score", "score.py:nan"], "nan for object 0"),
    ([*GRID, "--score", "score.py:few"], "objects, got 1"),
    ([*GRID, "--score", "score.py:boom"], "ZeroDivisionError"),
    ([*GRID, "--score", "broken.py:score"], "SyntaxError"),
    ([*GRID, "--score", "score.py:few", "--objectives", "branin"], "both"),
    (["train", "--env", "dna", "--length", "0", *SMALL], "got 0"),
    (["evaluate", "latin.smi"], "UTF-8"),
    (["evaluate", "latin.csv"], "UTF-8"),
    ([*FRAGMENTS, "--vocabulary", "missing.txt"], "missing.txt"),
    ([*FRAGMENTS, "--vocabulary", "stems.txt"], "got 9"),
    ([*FRAGMENTS, "--max-fragments", "0"], "got 0"),
    ([*FRAGMENTS, "--objectives", "beauty"], "beauty"),
    ([*FRAGMENTS, "--objectives", "seh", "--seh-weights", "missing.safetensors"], "missing.safetensors"),
    (["train", "--env", "hypergrid", "--objectives", "qed"], "qed"),
    (["sample", "missing"], "missing"),
    (["sample", "torn"], "torn"),
    (["export", "torn", "--formats", "xls"], "xls"),
    (["evaluate", "missing.smi"], "missing.smi"),
    (["evaluate", "empty.smi"], "empty.smi"),
    (["evaluate", "wrong.smi"], "not-a-molecule"),
    (["evaluate", "wrong.csv"], "column"),
    (["reproduce", "--scale", "huge"], "huge"),
    (["reproduce", "--table", "chess"], "chess"),
    (["reproduce", "--scale", "paper", "--device", "cpu"], "paper"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    (folder / "score.py").write_text(
        "def nan(xs):\n    return [float('nan')] * len(xs)\n\n\ndef few(xs):\n    return [1.0]\n"
        "\n\ndef boom(xs):\n    return 1 / 0\n"
    )
    (folder / "broken.py").write_text("def score(:\n")
    for name in ("latin.smi", "latin.csv"):
        (folder / name).write_bytes("CCO caf\xe9\n".encode("latin-1"))
    (folder / "stems.txt").write_text("CCO 0,1\nC 9\n")
    (folder / "empty.smi").write_text("\n")
    (folder / "wrong.smi").write_text("CCO first\nnot-a-molecule second\n")
    (folder / "wrong.csv").write_text("molecule\nCCO\n")
    (folder / "torn").mkdir()
    (folder / "torn" / "config.json").write_text("{")
    (folder / "torn" / "model.safetensors").write_bytes(b"")
