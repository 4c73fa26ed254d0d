"""The one transform: real orthonormal DCT-II (or the ortho-normalised real FFT), truncated to its lowest modes.

Legend: fields are (B, N1, .., Nd, C), spectra (B, m1, .., md, C), channels last; a grid of sizes N, m modes an axis.
The DCT is applied as a matrix of m x N cosines an axis, which truncates for nothing; W W^T = I (section 2.1), so that
the inverse is the transpose and norms are kept. Matrices are made in float64 and applied at the highest precision:
TF32 or bfloat16 here would break Parseval at 1e-3."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float, Inexact

from isotone.shared.errors import InputError

KINDS = ("dct", "dft")


@functools.cache
def cosine_matrix(modes: int, size: int) -> np.ndarray:
    """The first `modes` rows of the orthonormal DCT-II of length `size`: X_k = s_k sum_n x_n cos(pi (2n+1) k / 2N)."""
    k, n = np.arange(modes)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[:1] /= math.sqrt(2)
    return matrix


def dct(
    x: Float[Array, ...], axes: Sequence[int], norm: str = "ortho", modes: Sequence[int] | None = None
) -> Float[Array, ...]:
    """The DCT-II over `axes`, of each the first `modes` (None: all): S_m T x of section 2.1.

    Raises `InputError` on a field that is not real and floating, more modes than points, or a norm but "ortho".
    """
    _check_real(x)
    if norm != "ortho":
        raise InputError(f"expected norm ortho, got {norm!r}")
    sizes = [x.shape[axis] for axis in axes]
    kept = check_modes(sizes if modes is None else modes, sizes)
    x = x.astype(_wide(x))
    for axis, size, m in zip(axes, sizes, kept, strict=True):
        x = _apply(cosine_matrix(m, size), x, axis)
    return x


def idct(spectrum: Float[Array, ...], sizes: Sequence[int], axes: Sequence[int]) -> Float[Array, ...]:
    """The field on a grid of `sizes` along `axes` whose modes past those given are 0: T^-1 S_m^T X (a DCT-III)."""
    _check_real(spectrum)
    check_modes([spectrum.shape[axis] for axis in axes], sizes)
    spectrum = spectrum.astype(_wide(spectrum))
    for axis, size in zip(axes, sizes, strict=True):
        spectrum = _apply(cosine_matrix(spectrum.shape[axis], size).T, spectrum, axis)
    return spectrum


def check_modes(modes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """`modes`, one an axis. Raises `InputError` where they are not from 1 to the size of their axis."""
    if len(modes) != len(sizes) or any(not 1 <= m <= n for m, n in zip(modes, sizes, strict=True)):
        raise InputError(f"expected modes from 1 to the grid's size on each axis {tuple(sizes)}, got {tuple(modes)}")
    return tuple(int(m) for m in modes)


def _check_real(x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"expected real floating-point values for a DCT, got {x.dtype}")


def _apply(matrix: np.ndarray, x: Array, axis: int) -> Array:
    """`matrix` (out, in) along one axis of x."""
    moved = jnp.tensordot(x, jnp.asarray(matrix, x.dtype), ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(moved, -1, axis)


@dataclass(frozen=True)
class Transform:
    """One truncated transform of grids of `sizes` to `modes` an axis.

    "dct": a block of real numbers, the lowest `modes`. "dft": complex; of the last axis the lowest `modes` of the real
    FFT, of the others the lowest and the highest (negative) `modes`, side by side, where there are so many. Raises
    `InputError` on another kind and on more modes than the grid has.
    """

    kind: str
    sizes: tuple[int, ...]
    modes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected a transform of {', '.join(KINDS)}, got {self.kind!r}")
        limits = self.sizes
        if self.kind == "dft":
            limits = (*(n // 2 for n in self.sizes[:-1]), self.sizes[-1] // 2 + 1)
        check_modes(self.modes, limits)

    @property
    def block(self) -> tuple[int, ...]:
        """The shape of a spectrum's modes."""
        if self.kind == "dct":
            return self.modes
        return (*(2 * m for m in self.modes[:-1]), self.modes[-1])

    @property
    def axes(self) -> tuple[int, ...]:
        """The grid's axes of a field."""
        return tuple(range(1, 1 + len(self.sizes)))

    def forward(self, field: Float[Array, "B ... C"]) -> Inexact[Array, "B ... C"]:
        """The block of modes of a field. Raises `InputError` on another grid."""
        if field.shape[1:-1] != self.sizes:
            raise InputError(f"expected a grid of {self.sizes}, got {field.shape[1:-1]}")
        if self.kind == "dct":
            return dct(field, self.axes, modes=self.modes)
        _check_real(field)
        spectrum = jnp.fft.rfftn(field.astype(_wide(field)), axes=self.axes, norm="ortho")
        for axis, m in zip(self.axes[:-1], self.modes[:-1], strict=True):
            low, high = jax.lax.slice_in_dim(spectrum, 0, m, axis=axis), _last(spectrum, m, axis)
            spectrum = jnp.concatenate([low, high], axis)
        return self.project(jax.lax.slice_in_dim(spectrum, 0, self.modes[-1], axis=self.axes[-1]))

    def inverse(self, spectrum: Inexact[Array, "B ... C"]) -> Float[Array, "B ... C"]:
        """The field whose other modes are 0."""
        if spectrum.shape[1:-1] != self.block:
            raise InputError(f"expected a block of modes {self.block}, got {spectrum.shape[1:-1]}")
        if self.kind == "dct":
            return idct(spectrum, self.sizes, self.axes)
        whole = self.embed(spectrum)
        return jnp.fft.irfftn(whole, s=self.sizes, axes=self.axes, norm="ortho")

    def project(self, spectrum: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... C"]:
        """The block nearest to `spectrum` that is the spectrum of a real field.

        Of the real FFT, the modes at 0 (and at the Nyquist frequency) of the last axis hold each conjugate pair twice:
        the pair is averaged, and a mode whose partner lies outside the block is dropped. The DCT's is itself.
        """
        if self.kind == "dct":
            return spectrum
        columns = [0]
        if self.sizes[-1] % 2 == 0 and self.modes[-1] == self.sizes[-1] // 2 + 1:
            columns.append(self.modes[-1] - 1)
        for column in columns:
            part = spectrum[..., column, :]
            mirror, paired = part, np.ones((), bool)
            for number, (axis, m) in enumerate(zip(self.axes[:-1], self.modes[:-1], strict=True)):
                mirror = jnp.take(mirror, (-np.arange(2 * m)) % (2 * m), axis=axis)
                alone = (np.arange(2 * m) != m) | (2 * m == self.sizes[number])
                paired = paired[..., None] & alone if paired.ndim else alone
            whole = jnp.where(jnp.asarray(paired)[None, ..., None], (part + jnp.conj(mirror)) / 2, 0)
            spectrum = spectrum.at[..., column, :].set(whole)
        return spectrum

    def embed(self, spectrum: Inexact[Array, "B ... C"]) -> Inexact[Array, "B ... C"]:
        """The whole spectrum, zeros outside the block (S_m^T)."""
        for number, axis in enumerate(self.axes):
            size, m = self.sizes[number], self.modes[number]
            if self.kind == "dct" or axis == self.axes[-1]:
                full = size if self.kind == "dct" else size // 2 + 1
                spectrum = _pad(spectrum, axis, full - m)
            else:
                low, high = jax.lax.slice_in_dim(spectrum, 0, m, axis=axis), _last(spectrum, m, axis)
                spectrum = jnp.concatenate([_pad(low, axis, size - 2 * m), high], axis)
        return spectrum

    def weights(self) -> np.ndarray:
        """How often each mode of the block counts in the field's squared norm: 1 for the DCT; for the real FFT the
        modes whose conjugates are not stored count twice. Shape `block`."""
        if self.kind == "dct":
            return np.ones(self.block)
        last = np.full(self.modes[-1], 2.0)
        last[0] = 1.0
        if self.sizes[-1] % 2 == 0 and self.modes[-1] == self.sizes[-1] // 2 + 1:
            last[-1] = 1.0
        return np.broadcast_to(last, self.block)


def energy(transform: Transform, spectrum: Inexact[Array, "B ... C"]) -> Float[Array, " B"]:
    """|x|^2 of the field of each spectrum, by Parseval."""
    weights = jnp.asarray(transform.weights(), spectrum.real.dtype)[None, ..., None]
    return jnp.sum(weights * jnp.abs(spectrum) ** 2, tuple(range(1, spectrum.ndim)))


def rescale(sizes: Sequence[int], reference: Sequence[int]) -> float:
    """What the orthonormal coefficients of a field on a grid of `sizes` are to be multiplied by to be those of the same
    field on `reference`: sqrt(N' / N) an axis, for the DCT and the ortho FFT."""
    return math.sqrt(math.prod(reference) / math.prod(sizes))


def pack(spectrum: Complex[Array, ...]) -> Float[Array, "... 2"]:
    """Real and imaginary parts on a last axis."""
    return jnp.stack([spectrum.real, spectrum.imag], -1)


def unpack(pair: Float[Array, "... 2"]) -> Complex[Array, ...]:
    """The complex numbers of `pack`."""
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def _last(x: Array, count: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, x.shape[axis] - count, x.shape[axis], axis=axis)


def _pad(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if a == axis else 0) for a in range(x.ndim)])


def _wide(x: Array) -> jnp.dtype:
    """At least float32: a transform of half precision would not be exact, and the FFT has none."""
    return jnp.promote_types(x.dtype, jnp.float32)
