"""What a run was started with, as digests of a few characters: a checkpoint of anything else is not continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.lighthgnn.structure import Structure

_ROWS = 2**16
"""Rows of a memory map that are in memory at once."""


def fingerprint(**parts: Any) -> dict[str, str]:
    """SHA-256 of the bytes of each part, its first 16 digits, by name.

    A part: a tensor, an array or a memory map, a `SparseMatrix`, a `Hypergraph` or `Graph`, or a tuple of such; a
    structure of another kind counts by its type alone.
    """
    return {name: _digest(part) for name, part in parts.items()}


def describe(model: nn.Module) -> dict[str, Any]:
    """A module's class, its constructor's arguments where it has them as `config`, and the shapes of its state."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    config = getattr(model, "config", None)
    made = config if isinstance(config, dict) else {"modules": repr(model)}
    return {"class": type(model).__name__, **made, "shapes": _hashed([str(shapes).encode()])}


def _digest(part: Any) -> str:
    return _hashed(_chunks(part))


def _hashed(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def _chunks(part: Any) -> Iterator[bytes]:
    if isinstance(part, Tensor):
        part = (part.float() if part.dtype == torch.bfloat16 else part).detach().cpu().numpy()
    if isinstance(part, np.ndarray):
        yield f"{part.dtype} {part.shape}".encode()
        rows = np.atleast_1d(part)
        for start in range(0, len(rows), _ROWS):
            yield rows[start : start + _ROWS].tobytes()
    elif isinstance(part, SparseMatrix):
        yield str(part.shape).encode()
        yield from _chunks((part.indptr, part.indices, part.values))
    elif isinstance(part, Structure):
        yield from _chunks((part.into_edges, part._edge_weight))
    elif isinstance(part, Graph):
        yield from _chunks(part.adjacency)
    elif isinstance(part, tuple):
        for one in part:
            yield from _chunks(one)
    else:
        yield type(part).__name__.encode()
