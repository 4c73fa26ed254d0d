"""The naive forms that the fast paths are held to: dense matrices and loops, from the equations alone."""

import math

import torch


def incidence(num_vertices, edges):
    h = torch.zeros(num_vertices, len(edges), dtype=torch.float64)
    for number, edge in enumerate(edges):
        for vertex in edge:
            h[vertex, number] = 1
    return h


def _powers(h, w):
    d = (h * w).sum(1)
    root = torch.where(d > 0, d.clamp(min=1e-30) ** -0.5, torch.zeros_like(d))
    inverse = torch.where(d > 0, 1 / d.clamp(min=1e-30), torch.zeros_like(d))
    return torch.diag(root), torch.diag(inverse)


def hgnn(h, w):
    """D_v^{-1/2} H W D_e^{-1} H^T D_v^{-1/2}."""
    root, _ = _powers(h, w)
    return root @ h @ torch.diag(w / h.sum(0)) @ h.T @ root


def hgnnp(h, w):
    """D_v^{-1} H W D_e^{-1} H^T."""
    _, inverse = _powers(h, w)
    return inverse @ h @ torch.diag(w / h.sum(0)) @ h.T


def reliability(entropy, noisy, edges):
    delta = [abs(sum(noisy[v] - entropy[v] for v in e) / len(e)) for e in edges]
    top = max(delta)
    return [1.0 if top == 0 else 1 - x / top for x in delta]


def entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def high_order(teacher, student, edges, drawn):
    """(1 / |E'|) sum over drawn hyperedges of KL(mean p^t || mean p^s)."""
    total, count = 0.0, 0
    for edge, chosen in zip(edges, drawn, strict=True):
        if not chosen:
            continue
        count += 1
        classes = range(len(teacher[0]))
        means = [[sum(p[v][c] for v in edge) / len(edge) for c in classes] for p in (teacher, student)]
        total += kl(*means)
    return total / count if count else 0.0


def topology(embedding, edges):
    total = 0.0
    for edge in edges:
        centre = sum(embedding[v] for v in edge) / len(edge)
        total += sum(float((embedding[v] - centre).norm()) for v in edge) / len(edge)
    return total / len(edges)
