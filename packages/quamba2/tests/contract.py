"""What the contract runs: the JOB that succeeds, and the BAD inputs with the words that their sentence holds."""

from pathlib import Path

JOB = ["apply", "numbers.txt"]
BAD = [
    (["apply", "missing.txt"], "missing.txt"),
    (["apply", "nan.txt"], "nan"),
    (["reproduce", "--scale", "huge"], "huge"),
]


def files(folder: Path) -> None:
    """The input files that JOB and BAD use."""
    (folder / "numbers.txt").write_text("3\n1\n2\n")
    (folder / "nan.txt").write_text("1\nnan\n")
