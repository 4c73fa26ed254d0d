"""The naive forms that the fast paths are held to: written from the paper's equations, in NumPy, in loops."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def relaxed_mask(logit, u, tau, parametrization):
    """Section 2.1: m = sigmoid((l + a) / tau), a = tau * alpha or alpha."""
    noise = np.log(u) - np.log(1 - u)
    location = tau * logit if parametrization == "scaled" else logit
    return sigmoid((noise + location) / tau)


def top_k(scores, k):
    """The k largest, ties to the lower index, one after another."""
    left = list(range(len(scores)))
    kept = []
    for _ in range(k):
        best = max(left, key=lambda i: (scores[i], -i))
        kept.append(best)
        left.remove(best)
    return [i in kept for i in range(len(scores))]


class GradBalance:
    """Section 2.3, in float64."""

    def __init__(self, slack=1.1, ema=0.01):
        self.slack, self.ema, self.multiplier = slack, ema, None

    def direction(self, g, logits, density):
        desired = self.slack * density * len(logits)
        p = sigmoid(logits)
        error = 100 * (p.sum() / desired - 1)
        h = 100 / desired * p * (1 - p)
        target = np.linalg.norm(g) / (np.linalg.norm(h) + 1e-12) if error > 0 else 0.0
        first = self.multiplier is None
        self.multiplier = target if first else (1 - self.ema) * self.multiplier + self.ema * target
        return g + self.multiplier * h


class Adam:
    """Kingma and Ba, Algorithm 1."""

    def __init__(self, lr, eps):
        self.lr, self.eps, self.m, self.v, self.t = lr, eps, 0.0, 0.0, 0

    def step(self, g, lr=None):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return -(lr or self.lr) * m / (np.sqrt(v) + self.eps)


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    """Mean over rows of sum a log(a / b)."""
    return float(np.mean(np.sum(a * np.log(a / b), -1)))


def cross_entropy(z, y):
    return float(-np.mean(np.log(softmax(z)[np.arange(len(y)), y])))


def standardise(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean()) / (x.std() + 1e-9)


def finite_difference(function, x, step=1e-6):
    """Central differences, a coordinate at a time."""
    x = np.array(x, np.float64)
    found = np.zeros_like(x)
    for i in range(x.size):
        for sign in (1, -1):
            moved = x.copy()
            moved.flat[i] += sign * step
            found.flat[i] += sign * float(function(moved)) / (2 * step)
    return found
