"""How many modes: the error that a truncation alone costs, and the smallest block that costs no more (section 2.7)."""

from __future__ import annotations

import numpy as np
from scipy import fft

from isotone.shared.errors import InputError
from isotone.transform_once.transforms import check_modes


def spectra(fields: np.ndarray) -> np.ndarray:
    """The whole orthonormal DCT of fields (B, N1, .., Nd, C), float64."""
    _check(fields)
    return fft.dctn(fields.astype(np.float64), axes=tuple(range(1, fields.ndim - 1)), norm="ortho")


def irreducible_error(fields: np.ndarray, modes: int | tuple[int, ...]) -> np.ndarray:
    """sqrt(R_m) / |y| of each sample, (B,): the least relative L2 that a model truncated to `modes` can have.

    0 at all modes, non-increasing in each. Raises `InputError` on more modes than points and fields that are 0.
    """
    whole = spectra(fields)
    sizes = whole.shape[1:-1]
    kept = check_modes((modes,) * len(sizes) if isinstance(modes, (int, np.integer)) else modes, sizes)
    outside = whole.copy()
    outside[(slice(None), *(slice(0, m) for m in kept))] = 0
    norms = (whole**2).reshape(len(whole), -1).sum(1)
    if (norms == 0).any():
        raise InputError("expected fields that are not 0 everywhere")
    return np.sqrt((outside**2).reshape(len(whole), -1).sum(1) / norms)


def energy_spectrum(fields: np.ndarray) -> list[np.ndarray]:
    """For each axis, the share of the energy at each of its modes, mean over samples: [(N1,), .., (Nd,)], sums 1."""
    whole = spectra(fields) ** 2
    share = whole / whole.reshape(len(whole), -1).sum(1).reshape(-1, *([1] * (whole.ndim - 1)))
    dims = whole.ndim - 2
    return [share.mean(0).sum(tuple(a for a in range(dims + 1) if a != axis)) for axis in range(dims)]


def select_modes(
    fields: np.ndarray, tol: float | None = None, *, energy: float | None = None, per_axis: bool = False
) -> tuple[int, ...]:
    """The smallest block whose mean irreducible relative error is at most `tol`, or that keeps the share `energy`.

    One number for all axes (no more than each has); with `per_axis` modes are dropped from the axis where that costs
    least, as long as the tolerance holds. The rule of thumb for `tol` is a third of the error that a model is expected
    to reach. Raises `InputError` where neither or both are given, and on values outside (0, 1).
    """
    if (tol is None) == (energy is None):
        raise InputError(f"expected tol or energy, got {'neither' if tol is None else 'both'}")
    given = tol if tol is not None else energy
    assert given is not None
    if not 0 < given < 1:
        raise InputError(f"expected a tolerance or a share of energy in (0, 1), got {given}")
    whole = spectra(fields) ** 2
    norms = whole.reshape(len(whole), -1).sum(1)
    if (norms == 0).any():
        raise InputError("expected fields that are not 0 everywhere")
    sizes = whole.shape[1:-1]
    # energies of corner blocks of every size, by cumulated sums
    total = (whole / norms.reshape(-1, *([1] * (whole.ndim - 1)))).sum(-1)
    for axis in range(1, total.ndim):
        total = total.cumsum(axis)

    def enough(kept: tuple[int, ...]) -> bool:
        inside = np.minimum(total[(slice(None), *(m - 1 for m in kept))], 1.0)
        if tol is not None:
            # what float64 sums lose counts for nothing
            return bool(np.sqrt(np.where(1 - inside < 1e-13, 0, 1 - inside)).mean() <= tol)
        return bool(inside.mean() >= given)

    kept = sizes
    for m in range(1, max(sizes) + 1):
        if enough(tuple(min(m, n) for n in sizes)):
            kept = tuple(min(m, n) for n in sizes)
            break
    while per_axis:
        smaller = [tuple(m - (a == axis) for a, m in enumerate(kept)) for axis in range(len(kept)) if kept[axis] > 1]
        fitting = [block for block in smaller if enough(block)]
        if not fitting:
            break
        kept = max(fitting, key=lambda block: total[(slice(None), *(m - 1 for m in block))].mean())
    return kept


def _check(fields: np.ndarray) -> None:
    if fields.ndim < 3 or fields.ndim > 5 or not len(fields):
        raise InputError(f"expected fields (samples, N1, .., channels) of 1 to 3 axes, got shape {fields.shape}")
    if not np.issubdtype(fields.dtype, np.floating):
        raise InputError(f"expected real floating-point fields, got {fields.dtype}")
    if not np.isfinite(fields).all():
        raise InputError("expected finite fields, got NaN or infinity")
