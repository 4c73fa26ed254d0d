"""How much of an input was recovered: error, PSNR, SSIM, and whether it can be told from others."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import ndimage, optimize, special

from isotone.shared.errors import InputError

Batch = Float[np.ndarray, "n ..."]
Picture = Float[np.ndarray, " *shape"]
WINDOW = 7


def matched(found: Batch, truth: Batch) -> Batch:
    """`found` in the order that is nearest to `truth`: a batch has none of its own."""
    a, b = found.reshape(len(found), -1), truth.reshape(len(truth), -1)
    cost = ((b[:, None] - a[None]) ** 2).mean(-1)
    return found[optimize.linear_sum_assignment(cost)[1]]


def mse(found: Picture, truth: Picture) -> float:
    """Mean squared error."""
    return float(np.mean((np.asarray(found, np.float64) - np.asarray(truth, np.float64)) ** 2))


def psnr(found: Picture, truth: Picture, peak: float = 1.0) -> float:
    """10 log10(peak^2 / MSE), dB, at most 100: what is beyond is rounding."""
    return float(min(100.0, 10 * np.log10(peak**2 / max(mse(found, truth), 1e-300))))


def ssim(found: Picture, truth: Picture, peak: float = 1.0) -> float:
    """Structural similarity of two pictures (height, width, ...): the mean over windows of 7 x 7 that lie inside (or of
    the whole picture, where it is smaller), with sample covariances (Wang et al. 2004); 1 where they are equal."""
    a, b = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if a.ndim < 2:
        a, b = a[:, None], b[:, None]
    size = tuple(min(WINDOW, side) for side in a.shape[:2])
    inside = tuple(slice((w - 1) // 2, (w - 1) // 2 + side - w + 1) for w, side in zip(size, a.shape, strict=False))

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, (*size, *(1 for _ in a.shape[2:])), origin=_origin(size, a.ndim))[inside]

    n = size[0] * size[1]
    first, second = mean(a), mean(b)
    each = n / max(1, n - 1)
    var_a, var_b = each * (mean(a * a) - first**2), each * (mean(b * b) - second**2)
    both = each * (mean(a * b) - first * second)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    top = (2 * first * second + c1) * (2 * both + c2)
    return float(np.mean(top / ((first**2 + second**2 + c1) * (var_a + var_b + c2))))


def _origin(size: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """So that the window of place i begins at i - (w - 1) // 2, for even widths too."""
    return tuple(0 if w % 2 else -1 for w in size) + (0,) * (ndim - 2)


def nearest(found: Picture, pool: Batch) -> int:
    """The entry of `pool` that `found` is nearest to."""
    return int(((pool.reshape(len(pool), -1) - found.reshape(1, -1)) ** 2).sum(1).argmin())


def identified(found: Picture, pool: Batch, truth: int) -> bool:
    """Whether `found` is nearer to entry `truth` of `pool` than to any other; chance is 1 in as many."""
    return nearest(found, pool) == truth


def interval(hits: int, tried: int, level: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper and Pearson's) interval of a rate of which `hits` of `tried` were seen."""
    if not 0 <= hits <= tried or tried < 1:
        raise InputError(f"expected hits from 0 to those tried, got {hits} of {tried}")
    side = (1 - level) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, tried - hits + 1, side))
    high = 1.0 if hits == tried else float(special.betaincinv(hits + 1, tried - hits, 1 - side))
    return low, high


def at_least(hits: int, tried: int, chance: float) -> float:
    """How likely `hits` of `tried` or more are where each has the same `chance`."""
    return 1.0 if hits == 0 else float(special.bdtrc(hits - 1, tried, chance))
