"""Federated data: the digits, one's own arrays, and how they are dealt to clients; and problems with known answers.

Clients are one array with a leading axis, padded to the largest, so that all of them run in one vmap.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isotone.shared.data import sha256
from isotone.shared.errors import InputError


@dataclass(frozen=True)
class ClientData:
    """`x` (clients, most, *shape), `y` (clients, most), `size` (clients,): how many of each are there; the rest of a
    row repeats its first examples and is never counted. A pytree, so that rounds are jitted with it as an argument."""

    x: Float[Array, "clients most ..."]
    y: Int[Array, "clients most"]
    size: Int[Array, " clients"]

    def __len__(self) -> int:
        return len(self.size)


def _client_data(names: Any, leaves: Iterable[Any]) -> ClientData:
    # not through __init__: what JAX puts in the leaves' place is not always an array
    made = object.__new__(ClientData)
    made.__dict__.update(zip(("x", "y", "size"), leaves, strict=True))
    return made


jax.tree_util.register_pytree_node(ClientData, lambda data: ((data.x, data.y, data.size), None), _client_data)


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, floats and whole-number labels."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    name: str = "data"

    @property
    def digest(self) -> str:
        """SHA-256 of all examples and labels."""
        arrays = (self.x, self.y, self.test_x, self.test_y)
        return sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))


def digits() -> Dataset:
    """scikit-learn's digits, 1,297 to train on and 500 to test, pixels in [0, 1], (n, 8, 8, 1)."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError("expected scikit-learn for the digits, it is not installed")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", np.float32, delimiter=",")
    table = table[np.random.RandomState(0).permutation(len(table))]
    x, y = table[:, :-1].reshape(-1, 8, 8, 1) / 16, table[:, -1].astype(np.int32)
    return Dataset(x[:1297], y[:1297], x[1297:], y[1297:], 10, "digits")


def load(source: str) -> Dataset:
    """ "digits", or an .npz file with `x` (n, ...) and `y` (n,), a fifth of it to test.

    Raises `InputError` on another name, a missing or torn file, NaN, or labels that are not whole numbers from 0.
    """
    if source == "digits":
        return digits()
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        raise InputError(f"expected --data digits or an .npz file that is there, got {source!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y = np.asarray(file["x"], np.float32), np.asarray(file["y"])
    except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"expected arrays x and y in {source!r}: {error}") from None
    if x.ndim < 2 or y.ndim != 1:
        raise InputError(f"expected x (n, ...) and y (n,) in {source!r}, got shapes {x.shape} and {y.shape}")
    if len(x) != len(y) or len(x) < 10:
        raise InputError(f"expected as many labels as examples, 10 or more, in {source!r}, got {len(y)} and {len(x)}")
    if not np.isfinite(x).all():
        raise InputError(f"expected finite examples in {source!r}, got NaN or infinity")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise InputError(f"expected labels as whole numbers from 0 in {source!r}, got {y.dtype} from {y.min()}")
    order = np.random.RandomState(0).permutation(len(x))
    x, y = x[order], y[order].astype(np.int32)
    cut = len(x) * 4 // 5
    return Dataset(x[:cut], y[:cut], x[cut:], y[cut:], int(y.max()) + 1, path.name)


def deal(x: np.ndarray, y: np.ndarray, clients: int, concentration: float | None = 0.5, seed: int = 0) -> ClientData:
    """Deal examples to clients: of each class by a Dirichlet draw of that `concentration`, or, None, evenly at random.

    Every client has at least one. Raises `InputError` on fewer examples than clients.
    """
    if clients < 1 or len(x) < clients:
        raise InputError(f"expected from 1 to {len(x)} clients, got {clients}")
    if concentration is not None and not concentration > 0:
        raise InputError(f"expected a concentration above 0, got {concentration}")
    rng = np.random.default_rng(seed)
    owned: list[list[int]] = [[] for _ in range(clients)]
    if concentration is None:
        for place, index in enumerate(rng.permutation(len(x))):
            owned[place % clients].append(int(index))
    else:
        for label in np.unique(y):
            members = rng.permutation(np.flatnonzero(y == label))
            shares = rng.dirichlet(np.full(clients, concentration))
            ends = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in enumerate(np.split(members, ends)):
                owned[client].extend(part.tolist())
        for client in range(clients):
            if not owned[client]:
                richest = max(range(clients), key=lambda c: len(owned[c]))
                owned[client].append(owned[richest].pop())
    sizes = np.array([len(indices) for indices in owned], np.int32)
    rows = np.array([np.resize(np.array(indices), sizes.max()) for indices in owned])
    return ClientData(jnp.asarray(x[rows]), jnp.asarray(y[rows]), jnp.asarray(sizes))


@dataclass(frozen=True)
class Quadratic:
    """f_c(w) = |A^{1/2} (w - w_c)|^2 / 2 for each client: f has smoothness L, strong convexity mu, and its minimum at
    the mean of the w_c. `matrix` A (d, d), `centres` (clients, d)."""

    matrix: Float[Array, "d d"]
    centres: Float[Array, "clients d"]
    smoothness: float
    strong_convexity: float

    @property
    def best(self) -> Float[Array, " d"]:
        """The minimiser of the mean."""
        return jnp.mean(self.centres, 0)

    def gap(self, w: Float[Array, " d"]) -> Array:
        """f(w) - f*."""
        off = w - self.best
        return off @ self.matrix @ off / 2

    def gradient(self, w: Float[Array, " d"]) -> Float[Array, "clients d"]:
        """Each client's."""
        return (w - self.centres) @ self.matrix


def quadratic(
    d: int = 128, clients: int = 10, condition: float = 10.0, spread: float = 1.0, seed: int = 0
) -> Quadratic:
    """A random quadratic with eigenvalues from 1 / `condition` to 1; the clients' minima lie `spread` apart (each
    coordinate normal with that deviation)."""
    if not condition >= 1:
        raise InputError(f"expected a condition number of at least 1, got {condition}")
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
    values = np.linspace(1 / condition, 1, d) if d > 1 else np.ones(1)
    centres = rng.standard_normal(d) + spread * rng.standard_normal((clients, d))
    return Quadratic(
        *(jnp.asarray(basis * values @ basis.T, jnp.float32), jnp.asarray(centres, jnp.float32)),
        *(1.0, 1 / condition),
    )


def batch_of(data: ClientData, key: Array, client: Array | int, n: int) -> tuple[Array, Array]:
    """n examples of one client, with replacement."""
    places = jax.random.randint(key, (n,), 0, data.size[client])
    return data.x[client, places], data.y[client, places]
