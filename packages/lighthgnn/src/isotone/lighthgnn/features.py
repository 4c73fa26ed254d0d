"""Vertex features as the models take them: a dense float tensor or a `SparseMatrix`, checked once on entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from isotone.lighthgnn.sparse import SparseMatrix
from isotone.shared.errors import InputError

Features = Tensor | SparseMatrix
SPARSE_BELOW = 0.05
"""Dense features with fewer nonzeros than this share are taken as CSR by `as_features`."""


def as_features(X: Any, name: str = "X") -> Features:
    """A NumPy array, scipy sparse matrix, tensor or `SparseMatrix` (N x d) as float32 features.

    scipy input stays sparse, and dense input of which less than `SPARSE_BELOW` is nonzero becomes sparse. Raises
    `InputError` where it is not two-dimensional, empty, or not finite.
    """
    if isinstance(X, SparseMatrix):
        return X
    if scipy.sparse.issparse(X):
        return SparseMatrix.from_scipy(X)
    try:
        dense = X if isinstance(X, Tensor) else torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
    except (TypeError, ValueError):
        raise InputError(f"expected {name} as an N x d array of numbers, got {type(X).__name__}") from None
    if dense.layout != torch.strided:
        coo = dense.to_sparse_coo().coalesce().cpu()
        index = coo.indices().numpy()
        return SparseMatrix.from_scipy(scipy.sparse.coo_matrix((coo.values().numpy(), index), tuple(coo.shape)))
    if dense.ndim != 2 or 0 in dense.shape:
        raise InputError(f"expected {name} as an N x d array that is not empty, got shape {tuple(dense.shape)}")
    dense = dense.float()
    if not bool(torch.isfinite(dense).all()):
        row = int((~torch.isfinite(dense)).any(1).nonzero()[0])
        raise InputError(f"expected finite numbers in {name}, got NaN or infinity in row {row}")
    if dense.device.type == "cpu" and int(dense.count_nonzero()) < SPARSE_BELOW * dense.numel():
        return SparseMatrix.from_scipy(scipy.sparse.csr_matrix(dense.numpy()))
    return dense


def take_rows(X: Features, index: Int[Tensor, " B"]) -> Features:
    """The rows `index` of the features."""
    return X.rows(index) if isinstance(X, SparseMatrix) else X[index]


def l1_normalize(X: Features) -> Features:
    """Rows divided by their absolute sum, as dhg's loaders do for bags of words; rows of zeros stay."""
    if not isinstance(X, SparseMatrix):
        return F.normalize(X, p=1, dim=1)
    values = torch.ones(X.nnz) if X.values is None else X.values
    sums = X.with_values(values.abs()) @ torch.ones(X.shape[1], 1, device=X.device)
    return X.with_values(values / sums.clamp(min=1e-12).squeeze(1)[X.row_ids()])


def to_numpy(X: Features) -> Any:
    """A NumPy array, or a scipy CSR matrix where the features are sparse: what scikit-learn takes."""
    return X.to_scipy() if isinstance(X, SparseMatrix) else X.cpu().numpy()


def perturb(X: Features, noise: str, level: float, generator: torch.Generator | None = None) -> Features:
    """Features under noise (section 2.5, step 2), g ~ N(0, 1) for each element.

    "multiplicative": X (1 + level g), which leaves the zeros of sparse features zero. "additive": X + level g,
    dense. "official": X (1 + g) level, the authors' code, where level scales the features themselves too.
    Level 0 leaves X as it is, except "official", where it gives zeros.
    """
    if noise not in ("multiplicative", "additive", "official"):
        raise InputError(f"expected noise to be multiplicative, additive or official, got {noise!r}")
    if not (level >= 0 and np.isfinite(level)):
        raise InputError(f"expected a finite noise level, 0 or more, got {level}")
    if noise == "additive":
        dense = X.to_dense() if isinstance(X, SparseMatrix) else X
        return dense + level * _gaussian(dense, generator)
    values = X if isinstance(X, Tensor) else X.values if X.values is not None else torch.ones(X.nnz, device=X.device)
    g = _gaussian(values, generator)
    noisy = values * (1 + level * g) if noise == "multiplicative" else values * (1 + g) * level
    return X.with_values(noisy) if isinstance(X, SparseMatrix) else noisy


def blend_noise(X: Features, share: float, generator: torch.Generator | None = None) -> Float[Tensor, "N d"]:
    """(1 - share) X + share N(0, 1): the paper's test of robustness to feature noise (section 2.8)."""
    if not 0 <= share <= 1:
        raise InputError(f"expected a share of noise from 0 to 1, got {share}")
    dense = X.to_dense() if isinstance(X, SparseMatrix) else X
    return (1 - share) * dense + share * _gaussian(dense, generator)


def dropout(X: Features, p: float, training: bool) -> Features:
    """Dropout of input features; of the stored values where they are sparse."""
    if not training or p == 0:
        return X
    if isinstance(X, SparseMatrix):
        values = torch.ones(X.nnz, device=X.device) if X.values is None else X.values
        return X.with_values(F.dropout(values, p))
    return F.dropout(X, p)


def _gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # drawn on the generator's device, so that a CPU generator gives the same noise to a GPU
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
