"""The transforms (section 7: 1 to 3), their truncation, and what a block of modes weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import fft

from isotone.shared.errors import InputError
from isotone.transform_once import Transform, dct, idct
from isotone.transform_once.transforms import cosine_matrix, energy, pack, rescale, unpack

SHAPES = [(7,), (1,), (16,), (5, 8), (13, 1), (4, 6, 3)]


def field(shape, dtype=np.float64, batch=3, channels=2):
    return np.random.default_rng(0).standard_normal((batch, *shape, channels)).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dct_is_scipys(shape, dtype):
    with jax.enable_x64(dtype == np.float64):
        x, axes = field(shape, dtype), tuple(range(1, 1 + len(shape)))
        found = dct(jnp.asarray(x), axes)
        wanted = fft.dctn(x.astype(np.float64), type=2, axes=axes, norm="ortho")
        tolerance = 2e-6 if dtype == np.float32 else 1e-12
        assert np.abs(found - wanted).max() < tolerance
        assert np.abs(idct(found, shape, axes) - x).max() < tolerance
        assert abs(float(jnp.linalg.norm(found)) - np.linalg.norm(x)) < tolerance * np.linalg.norm(x)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_matrix_is_orthogonal(size):
    matrix = cosine_matrix(size, size)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13


@pytest.mark.parametrize("shape,modes", [((9,), (4,)), ((8, 6), (3, 5)), ((6, 4, 5), (2, 4, 1))])
def test_truncated_is_full_then_sliced(shape, modes):
    with jax.enable_x64(True):
        x, axes = jnp.asarray(field(shape)), tuple(range(1, 1 + len(shape)))
        block = (slice(None), *(slice(0, m) for m in modes))
        found = dct(x, axes, modes=modes)
        assert np.abs(found - dct(x, axes)[block]).max() < 1e-13
        padded = np.zeros((3, *shape, 2))
        padded[block] = found
        assert np.abs(idct(found, shape, axes) - idct(jnp.asarray(padded), shape, axes)).max() < 1e-13


@pytest.mark.parametrize("kind", ["dct", "dft"])
@pytest.mark.parametrize("sizes,modes", [((12,), (5,)), ((8, 8), (4, 5)), ((9, 6), (3, 2)), ((6, 4, 8), (2, 2, 3))])
def test_blocks_of_modes(kind, sizes, modes):
    """The inverse of a block is a real field whose block it is; |field|^2 is the block's energy; projecting twice is
    projecting once."""
    with jax.enable_x64(True):
        transform = Transform(kind, sizes, modes)
        block = transform.forward(jnp.asarray(field(sizes)))
        assert block.shape == (3, *transform.block, 2)
        low = transform.inverse(block)
        assert low.shape == (3, *sizes, 2) and low.dtype == jnp.float64
        assert np.abs(transform.forward(low) - block).max() < 1e-12
        assert np.allclose(energy(transform, block), jnp.sum(low**2, tuple(range(1, low.ndim))), rtol=1e-12)
        noise = 2 * block if kind == "dct" else block + 1j * block * 0.3 + 0.1
        once = transform.project(noise)
        assert np.abs(transform.project(once) - once).max() < 1e-13
        assert np.abs(transform.forward(transform.inverse(noise)) - once).max() < 1e-12


def test_all_modes_lose_nothing():
    with jax.enable_x64(True):
        x = jnp.asarray(field((8, 6)))
        for transform in (Transform("dct", (8, 6), (8, 6)), Transform("dft", (8, 6), (4, 4))):
            assert np.abs(transform.inverse(transform.forward(x)) - x).max() < 1e-12


def test_rescaled_coefficients_are_the_same_field():
    """A cosine of the domain, sampled on two grids, has one block after the rescale."""
    found = []
    for size in (16, 40):
        x = (np.arange(size) + 0.5) / size
        wave = np.cos(np.pi * 3 * x)[None, :, None] + 0.5
        found.append(Transform("dct", (size,), (8,)).forward(jnp.asarray(wave, jnp.float32)) * rescale((size,), (16,)))
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_pack_and_back():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)) + 2j)
    assert jnp.array_equal(unpack(pack(x)), x)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: dct(jnp.ones((2, 4, 1)), (1,), modes=(5,)), "5"),
        (lambda: dct(jnp.ones((2, 4, 1)), (1,), norm="none"), "none"),
        (lambda: Transform("dct", (4,), (0,)), "0"),
        (lambda: Transform("dft", (8, 8), (5, 4)), "5"),
        (lambda: Transform("dst", (4,), (2,)), "dst"),
        (lambda: Transform("dct", (4,), (2,)).forward(jnp.ones((1, 5, 1))), "5"),
        (lambda: Transform("dct", (4,), (2,)).inverse(jnp.ones((1, 3, 1))), "3"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_what_is_not_real_is_refused(dtype):
    with pytest.raises((InputError, TypeCheckError)):
        dct(jnp.ones((2, 4, 1), dtype), (1,))
