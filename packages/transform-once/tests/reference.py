"""The naive forms that the fast paths are held to, in NumPy, from the equations alone."""

import math

import numpy as np
from scipy import fft, special


def gelu(x):
    """The tanh form, which is JAX's default."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x):
    return x * special.ndtr(x)


def t1_2d(weights, field, modes, keep_high=False, residual=True):
    """Section 2.3 step by step on the full grid: lift in space, DCT, layers on the corner, head everywhere, spectrum.

    `weights`: lift (kernel, bias), layers [(mixing (i, o, x, y), S1 (x, o, c), S2 (y, o, c))], head (Fc1, Fc2).
    """
    b, n1, n2, _ = field.shape
    m1, m2 = modes
    x, y = np.meshgrid(np.linspace(0, 1, n1), np.linspace(0, 1, n2), indexing="ij")
    grid = np.broadcast_to(np.stack([x, y], -1), (b, n1, n2, 2))
    h = np.concatenate([field, grid], -1) @ weights["lift"][0] + weights["lift"][1]
    z = np.moveaxis(fft.dctn(h, axes=(1, 2), norm="ortho"), -1, 1)
    for mixing, s1, s2 in weights["layers"]:
        r = z[:, :, :m1, :m2]
        q = gelu(np.einsum("bixy,ioxy->boxy", r, mixing))
        q = np.einsum("bcxy,xoc->bcoy", q, s1)
        q = np.einsum("bcxy,yoc->bcxo", q, s2)
        q = q + r if residual else q
        after = z.copy() if keep_high else np.zeros((*z.shape[:1], q.shape[1], *z.shape[2:]))
        after[:, :, :m1, :m2] = q
        z = after
    first, second = weights["head"]
    return np.sin(np.moveaxis(z, 1, -1) @ first) @ second


def fno_layer(z, weight, modes):
    """One spectral convolution: full complex FFT of real fields, corners times (corner, i, o, x, y), back."""
    b, n1, n2, _ = z.shape
    m1, m2 = modes
    spectrum = np.fft.rfft2(z, axes=(1, 2), norm="ortho")
    out = np.zeros((b, n1, n2 // 2 + 1, weight.shape[2]), complex)
    out[:, :m1, :m2] = np.einsum("bxyi,ioxy->bxyo", spectrum[:, :m1, :m2], weight[0])
    out[:, -m1:, :m2] = np.einsum("bxyi,ioxy->bxyo", spectrum[:, -m1:, :m2], weight[1])
    return np.fft.irfft2(out, s=(n1, n2), axes=(1, 2), norm="ortho")


def advect(w, viscosity, dt, steps):
    """Explicit Euler steps of the unforced vorticity equation, derivatives by full complex FFTs, no dealiasing."""
    n = w.shape[-1]
    k = 2 * np.pi * np.fft.fftfreq(n, 1 / n)
    kx, ky = k[:, None], k[None]
    square = kx**2 + ky**2
    for _ in range(steps):
        spectrum = np.fft.fft2(w)
        psi = np.where(square > 0, spectrum / np.where(square > 0, square, 1), 0)
        u, v = np.fft.ifft2(1j * ky * psi).real, np.fft.ifft2(-1j * kx * psi).real
        wx, wy = np.fft.ifft2(1j * kx * spectrum).real, np.fft.ifft2(1j * ky * spectrum).real
        w = w + dt * (-u * wx - v * wy + viscosity * np.fft.ifft2(-square * spectrum).real)
    return w
