"""The naive forms that the fast paths are held to."""

from __future__ import annotations

import numpy as np


def hadamard(d):
    """The +-1 matrix by its definition: (-1)^(number of ones that i and j share)."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(d)] for i in range(d)], float)


def fwht(values):
    """Butterflies, one pass a bit."""
    values, h = np.array(values, float), 1
    while h < len(values):
        for i in range(0, len(values), 2 * h):
            for j in range(i, i + h):
                values[j], values[j + h] = values[j] + values[j + h], values[j] - values[j + h]
        h *= 2
    return values


def fed_avg(w, gradients, steps, rate):
    """One round of plain averaging on functions with gradients: K steps each, then the mean of the differences."""
    deltas = []
    for gradient in gradients:
        u = np.array(w, float)
        for _ in range(steps):
            u = u - rate * gradient(u)
        deltas.append(u - w)
    return w + np.mean(deltas, 0)
