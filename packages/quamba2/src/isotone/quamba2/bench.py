"""Speed beside the peers that a user would pick instead. FILL: the work, the peers, the check that they agree."""

from __future__ import annotations

import torch

from isotone.quamba2.method import method
from isotone.shared.bench import compare
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run


def bench(run: Run) -> Report:
    """Time `method` beside its peers on the same work, equal answers checked first."""
    numbers = [float(-i) for i in range(1000)]
    values = torch.tensor(numbers)
    assert method(values).tolist() == sorted(numbers)
    timing = compare(lambda: method(values), lambda: sorted(numbers), rounds=20)
    ratio = Ratio(
        id="sorted",
        work="1000 numbers",
        ours="method",
        peer="sorted",
        peer_version="built in",
        ours_value=timing.ours_seconds,
        peer_value=timing.peer_seconds,
        unit="s",
        target=None,
    )
    return Report(package="quamba2", kind="bench", scale="cpu", seeds=(), framework="torch", ratios=[ratio])
