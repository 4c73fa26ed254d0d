"""Image data sets from the user's files, whole in memory, and augmentation inside jit.

"digits" comes with scikit-learn and is always there; "mnist:FOLDER" reads the idx files (plain or .gz),
"cifar10:FOLDER" and "cifar100:FOLDER" the binary version of CIFAR, "npz:FILE" arrays `x` (n, ...) and `y` (n,) of your
own.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.shared.errors import InputError

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
FORMS = "digits, mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER or npz:FILE"


@dataclass(frozen=True, eq=False)
class Images:
    """`train` and `test`: (inputs, labels), NumPy. `prepare`: inputs to floats, run inside jit; `augment(key, inputs)`:
    random flips and crops, None where the data has none. `sha256`: of all of it."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    prepare: Callable[[Any], Array] | None
    augment: Callable[[Array, Array], Array] | None
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.train[0].shape[1:])


def load_images(source: str) -> Images:
    """The data set that `source` names. Raises `InputError` where it is not one, or a file is missing or torn."""
    kind, _, place = source.partition(":")
    if kind == "digits" and not place:
        return _digits()
    readers = {"mnist": _mnist, "cifar10": _cifar, "cifar100": _cifar, "npz": _npz}
    if kind not in readers or not place:
        raise InputError(f"expected --data as {FORMS}, got {source!r}")
    try:
        return readers[kind](kind, Path(place))
    except (OSError, EOFError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"expected {kind} in {place!r}, found no {str(error.filename)!r}") from None
        raise InputError(f"expected whole files of {kind} in {place!r}, got a torn one ({error})") from None


def _digits() -> Images:
    # the file behind sklearn.datasets.load_digits: importing all of scikit-learn for it would take seconds
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", np.float32, delimiter=",")
    table = table[np.random.RandomState(0).permutation(len(table))]
    images, labels = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1].astype(np.int32)
    images = (images - images[:1297].mean()) / images[:1297].std()
    return _make("digits", *_cut(images, labels, 1297), 10, None, None)


def _mnist(kind: str, folder: Path) -> Images:
    parts = {}
    for part in ("train", "t10k"):
        try:
            images, labels = _idx(folder, f"{part}-images-idx3-ubyte"), _idx(folder, f"{part}-labels-idx1-ubyte")
        except FileNotFoundError:
            continue
        parts[part] = (images[..., None], labels.astype(np.int32))
    if "t10k" not in parts:
        raise InputError(f"expected t10k-images-idx3-ubyte and its labels in {str(folder)!r}, found none")
    images, labels = parts["t10k"]
    # with the test file alone: 8,000 of its images to train on
    train, test = (parts["train"], parts["t10k"]) if "train" in parts else _cut(images, labels, 8000)
    return _make(kind, train, test, 10, _scale_grey, None)


def _idx(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    data = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    zero, kind, dimensions = struct.unpack(">HBB", data[:4])
    if zero != 0 or kind != 8:
        raise InputError(f"expected an idx file of bytes, got another file: {str(path)!r}")
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if body.size != np.prod(shape):
        raise InputError(f"expected {np.prod(shape)} bytes in {str(path)!r}, got {body.size}")
    return body.reshape(shape)


def _cifar(kind: str, folder: Path) -> Images:
    if kind == "cifar10":
        parts, labels = ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]), 1
    else:
        parts, labels = (["train.bin"], ["test.bin"]), 2
    for inner in ("cifar-10-batches-bin", "cifar-100-binary"):
        folder = folder / inner if (folder / inner).is_dir() else folder

    def read(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        chunks = []
        for name in names:
            raw = np.frombuffer((folder / name).read_bytes(), np.uint8)
            if raw.size % (3072 + labels) or not raw.size:
                raise InputError(f"expected records of {3072 + labels} bytes in {name}, got {raw.size} bytes")
            chunks.append(raw.reshape(-1, 3072 + labels))
        rows = np.concatenate(chunks)
        images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        # CIFAR-100 gives the coarse label first
        return np.ascontiguousarray(images), rows[:, labels - 1].astype(np.int32)

    classes = 10 if kind == "cifar10" else 100
    return _make(kind, read(parts[0]), read(parts[1]), classes, _scale_colour, augment_crop_flip)


def _npz(kind: str, path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
    except (ValueError, TypeError):  # text, Python objects, an array alone
        raise InputError(f"expected an npz file of plain arrays, got another file: {str(path)!r}") from None
    if not {"x", "y"} <= set(members):
        raise InputError(f"expected arrays x and y in {str(path)!r}, got {', '.join(members) or 'none'}")
    x, y = members["x"], members["y"]
    if x.dtype.kind not in "fiub":
        raise InputError(f"expected numbers as x in {str(path)!r}, got {x.dtype}")
    if x.ndim < 2 or not x.size or y.ndim != 1:
        raise InputError(f"expected x (n, ...) and y (n,) in {str(path)!r}, got shapes {x.shape} and {y.shape}")
    if len(x) != len(y) or len(y) < 10 or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        message = "expected x (n, ...) and whole numbers y (n,) from 0, 10 or more"
        raise InputError(f"{message}, got shapes {x.shape} and {y.shape}, {y.dtype}")
    if y.max() >= len(y):
        raise InputError(f"expected labels below the number of examples in {str(path)!r}, got {y.max()} of {len(y)}")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise InputError(f"expected finite x in {str(path)!r}, got NaN or infinity")
    order = np.random.RandomState(0).permutation(len(y))
    train, test = _cut(x[order], y[order].astype(np.int32), len(y) * 4 // 5)
    mean, std = train[0].mean(), train[0].std() + 1e-8
    scaled = [((part[0] - mean) / std, part[1]) for part in (train, test)]
    return _make(path.name, scaled[0], scaled[1], int(y.max()) + 1, None, None)


def _cut(x: np.ndarray, y: np.ndarray, count: int) -> tuple[Any, Any]:
    return (x[:count], y[:count]), (x[count:], y[count:])


def _make(name: str, train: Any, test: Any, classes: int, prepare: Any, augment: Any) -> Images:
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Images(name, train, test, classes, prepare, augment, digest.hexdigest())


def _scale_grey(images: Any) -> Array:
    return (jnp.asarray(images, jnp.float32) / 255 - 0.1307) / 0.3081


def _scale_colour(images: Any) -> Array:
    return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(CIFAR_MEAN)) / jnp.asarray(CIFAR_STD)


@functools.partial(jax.jit, static_argnames="pad")
def augment_crop_flip(key: Array, images: Array, pad: int = 4) -> Array:
    """Each image (n, h, w, c) reflected by `pad` pixels, cropped at random to its size, every second one flipped."""
    n, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    corners = jax.random.randint(crop_key, (n, 2), 0, 2 * pad + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    flipped = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)
