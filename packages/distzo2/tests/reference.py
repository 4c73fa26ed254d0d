"""The naive forms: Philox word by word, Box-Muller with the standard library, and MeZO as its algorithm reads."""

from __future__ import annotations

import math

import torch


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 of one counter in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def normal(seed: int, parameter: int, element: int) -> float:
    """One element of a direction, in double precision."""
    words = philox((element // 4 & 0xFFFFFFFF, element // 4 >> 32, 0, 0), (seed, parameter))
    radius_word, angle_word = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log((2 * (radius_word >> 9) + 1) / 2**24))
    quadrant, rest = angle_word >> 30, (angle_word & 0x3FFFFFFF) >> 7
    angle = (quadrant + (2 * rest + 1) / 2**24 - 0.5) * math.pi / 2
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


def mezo(model, losses, directions, rates, eps, decays, weight_decay):
    """Algorithm 1 of MeZO on copies: `losses[t](model)`, `directions[t]` a list of z a parameter. The g_t."""
    grads = []
    parameters = list(model.parameters())
    for loss, z, lr in zip(losses, directions, rates, strict=True):
        theta = [p.detach().clone() for p in parameters]

        def at(sign, theta=theta, z=z, loss=loss):
            with torch.no_grad():
                for p, t, d in zip(parameters, theta, z, strict=True):
                    p.copy_(t + sign * eps * d)
                return float(loss(model))

        grads.append((at(1) - at(-1)) / (2 * eps))
        with torch.no_grad():
            for p, t, d, decayed in zip(parameters, theta, z, decays, strict=True):
                p.copy_(t - lr * (grads[-1] * d + (weight_decay if decayed else 0.0) * t))
    return grads
