"""The naive forms that the fast paths are held to."""

from __future__ import annotations

import math

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


def clip(gradient, bound):
    """g min(1, C / |g|), in float64."""
    flat = np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in gradient])
    factor = min(1.0, bound / max(float(np.linalg.norm(flat)), 1e-300))
    return [factor * np.asarray(leaf, np.float64) for leaf in gradient]


def fed_avg(w, gradients, steps, rate):
    """One round of plain averaging on functions with gradients: K steps each, then the mean of the differences."""
    deltas = []
    for gradient in gradients:
        u = np.array(w, float)
        for _ in range(steps):
            u = u - rate * gradient(u)
        deltas.append(u - w)
    return w + np.mean(deltas, 0)


def gaussian_delta(epsilon, sigma, n=400_001):
    """delta of one Gaussian release by integrating max(p - e^eps q, 0)."""
    x = np.linspace(-40 * sigma, 40 * sigma + 1, n)
    p = np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    q = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return float(np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x))


def subsampled_rdp(rate, sigma, order, n=800_001):
    """Renyi divergence of one subsampled Gaussian release, the larger of both directions, by integration."""
    x = np.linspace(-60 * sigma, 60 * sigma + 1, n)
    q = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    p = (1 - rate) * q + rate * np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    keep = q > 1e-290
    one = np.trapezoid(np.where(keep, (p / np.where(keep, q, 1)) ** order * q, 0), x)
    return float(np.log(one) / (order - 1))
