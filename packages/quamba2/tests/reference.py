"""The naive forms that the fast paths are held to.

Those of clustering, GPTQ and the Hadamard transform are the package's own `naive`, which its bench times; here are
those that the tests alone need.
"""

import math

from isotone.quamba2.naive import butterflies, gptq, lloyd, sort_and_cluster, ward

__all__ = ["butterflies", "channel_errors", "gptq", "lloyd", "rounded", "sort_and_cluster", "spearman", "ssd", "ward"]


def rounded(value, largest, bits=8):
    """A number through its code: halves to the even one, clamped."""
    top = 2 ** (bits - 1)
    scale = max(max(largest, 1e-5) / (top - 1), 1e-6)
    return min(max(round(value / scale), -top), top - 1) * scale


def ssd(x, dt, A, B, C, D):
    """One head: x (T, p), dt (T), B and C (T, N) as lists; y (T, p), a number at a time."""
    state = [[0.0] * len(B[0]) for _ in x[0]]
    found = []
    for t, row in enumerate(x):
        decay = math.exp(dt[t] * A)
        state = [
            [decay * s + dt[t] * row[i] * b for s, b in zip(channel, B[t], strict=True)]
            for i, channel in enumerate(state)
        ]
        found.append([sum(s * c for s, c in zip(state[i], C[t], strict=True)) + D * row[i] for i in range(len(row))])
    return found


def channel_errors(wanted, got):
    """||y_q - y|| / ||y|| of each channel of (T, d) lists."""
    return [
        math.dist(a, b) / math.hypot(*a) for a, b in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True)
    ]


def spearman(first, second):
    """Pearson's correlation of the ranks."""
    ranks = [[sorted(values).index(v) for v in values] for values in (first, second)]
    centre = (len(first) - 1) / 2
    a, b = ([r - centre for r in row] for row in ranks)
    return sum(u * v for u, v in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
