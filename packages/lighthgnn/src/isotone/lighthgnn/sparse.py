"""Sparse times dense: the one kernel under incidence operators, sparse features and their gradients.

A product with a CSR matrix is a bag of gathered rows, which `embedding_bag` does several times faster than
torch's CSR product on a CPU, and on a GPU without atomics. The gradient is the same product with the transpose.

Dimensions: R rows, K columns, Z stored entries, c columns of the dense operand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from isotone.shared.errors import InputError


class SparseMatrix:
    """A constant CSR matrix (R x K) that multiplies dense matrices with gradients to the dense side.

    `indptr` (R + 1) and `indices` (Z): int64, so that a billion flattened incidences do not overflow. `values` (Z)
    or None for a matrix of ones. Columns within a row may come in any order. `transpose` is made at its first
    use and kept: twice the memory, for backward passes as fast as forward ones.
    """

    def __init__(
        self,
        indptr: Int[Tensor, " R_plus_1"],
        indices: Int[Tensor, " Z"],
        values: Float[Tensor, " Z"] | None,
        num_columns: int,
    ) -> None:
        self.indptr, self.indices, self.values = indptr.long(), indices.long(), values
        self.shape = (indptr.shape[0] - 1, num_columns)
        self._transpose: SparseMatrix | None = None

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: torch.dtype = torch.float32) -> SparseMatrix:
        """From any scipy sparse matrix or array; duplicates are summed. Raises `InputError` on NaN or infinity."""
        csr = scipy.sparse.csr_matrix(matrix, copy=True)
        csr.sum_duplicates()
        values = torch.from_numpy(np.asarray(csr.data)).to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise InputError("expected finite values in the sparse matrix, got NaN or infinity")
        return cls(torch.from_numpy(csr.indptr), torch.from_numpy(csr.indices), values, csr.shape[1])

    def to_scipy(self) -> Any:
        """The same matrix as a scipy CSR matrix (ones where `values` is None)."""
        values = torch.ones(self.nnz) if self.values is None else self.values.cpu()
        parts = (values.numpy(), self.indices.cpu().numpy(), self.indptr.cpu().numpy())
        return scipy.sparse.csr_matrix(parts, self.shape)

    @property
    def nnz(self) -> int:
        """Stored entries Z."""
        return self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the arrays lie."""
        return self.indices.device

    def row_counts(self) -> Int[Tensor, " R"]:
        """Stored entries of each row."""
        return self.indptr.diff()

    def row_ids(self) -> Int[Tensor, " Z"]:
        """The row of each stored entry."""
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(self.row_counts(), output_size=self.nnz)

    @property
    def T(self) -> SparseMatrix:
        """The transpose (K x R), entries of a row in ascending order."""
        if self._transpose is None:
            self._transpose = _transposed(self)
            self._transpose._transpose = self
        return self._transpose

    def rows(self, index: Int[Tensor, " B"]) -> SparseMatrix:
        """The rows `index`, in that order (B x K)."""
        positions, indptr = row_positions(self.indptr, index)
        values = None if self.values is None else self.values[positions]
        return SparseMatrix(indptr, self.indices[positions], values, self.shape[1])

    def with_values(self, values: Float[Tensor, " Z"]) -> SparseMatrix:
        """The same pattern with other values."""
        return SparseMatrix(self.indptr, self.indices, values, self.shape[1])

    def to(self, device: str | torch.device) -> SparseMatrix:
        """The same matrix on `device`."""
        values = None if self.values is None else self.values.to(device)
        return SparseMatrix(self.indptr.to(device), self.indices.to(device), values, self.shape[1])

    def to_dense(self) -> Float[Tensor, "R K"]:
        """The dense matrix; entries listed twice are summed."""
        values = torch.ones(self.nnz, device=self.device) if self.values is None else self.values
        dense = torch.zeros(self.shape, dtype=values.dtype, device=self.device)
        return dense.index_put_((self.row_ids(), self.indices), values, accumulate=True)

    def __matmul__(self, dense: Tensor) -> Tensor:
        """The product with a dense (K x c) matrix: 2 Z c FLOP, Z c gathered numbers."""
        if dense.ndim != 2 or dense.shape[0] != self.shape[1]:
            raise ValueError(f"expected {self.shape[1]} rows to multiply with, got {tuple(dense.shape)}")
        return _MatMul.apply(self, dense)


def _bag(matrix: SparseMatrix, dense: Tensor) -> Tensor:
    values = matrix.values
    if values is not None and values.dtype != dense.dtype:
        values = values.to(dense.dtype)
    if matrix.nnz == 0:
        return dense.new_zeros(matrix.shape[0], dense.shape[1])
    return F.embedding_bag(
        matrix.indices, dense, matrix.indptr, mode="sum", per_sample_weights=values, include_last_offset=True
    )


class _MatMul(torch.autograd.Function):
    """The product with a gradient, and with a batch of dense matrices under `torch.func.vmap`."""

    @staticmethod
    def forward(matrix: SparseMatrix, dense: Tensor) -> Tensor:
        return _bag(matrix, dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[SparseMatrix, Tensor], output: Tensor) -> None:
        ctx.matrix = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _MatMul.apply(ctx.matrix.T, grad.contiguous())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[None, int | None], matrix: SparseMatrix, dense: Tensor) -> tuple[Tensor, int]:
        # S matrices side by side are one product with S c columns
        stacked = dense.movedim(in_dims[1] or 0, 1)
        product = _MatMul.apply(matrix, stacked.flatten(1))
        return product.unflatten(1, stacked.shape[1:]), 1


def _transposed(matrix: SparseMatrix) -> SparseMatrix:
    rows, columns = matrix.shape
    if matrix.device.type == "cpu":
        order_as_data = np.arange(matrix.nnz)  # scipy's conversion is a counting sort: linear in Z
        csr = scipy.sparse.csr_matrix((order_as_data, matrix.indices.numpy(), matrix.indptr.numpy()), (rows, columns))
        csc = csr.tocsc()
        order = torch.from_numpy(csc.data)
        indptr, indices = torch.from_numpy(csc.indptr).long(), torch.from_numpy(csc.indices).long()
    else:  # pragma: no cover - needs a GPU
        order = matrix.indices.argsort(stable=True)
        indices = matrix.row_ids()[order]
        indptr = F.pad(torch.bincount(matrix.indices, minlength=columns).cumsum(0), (1, 0))
    return SparseMatrix(indptr, indices, None if matrix.values is None else matrix.values[order], rows)


def row_positions(indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the entries of the CSR rows `index`, one row after another, and the new `indptr`.

    Vectorised: no loop over rows; the cost is that of the entries taken.
    """
    starts = indptr[index]
    counts = indptr[index + 1] - starts
    new_indptr = F.pad(counts.cumsum(0), (1, 0))
    total = int(new_indptr[-1])
    shift = (starts - new_indptr[:-1]).repeat_interleave(counts, output_size=total)
    return shift + torch.arange(total, device=indptr.device), new_indptr


class SparseLinear(nn.Linear):
    """`nn.Linear` that also takes a `SparseMatrix` (R x in): the first layer over bag-of-words features.

    The cost falls from 2 R in out to 2 Z out FLOP, in the backward pass too.
    """

    def forward(self, features: Tensor | SparseMatrix) -> Tensor:  # noqa: D102
        if not isinstance(features, SparseMatrix):
            return super().forward(features)
        product = features @ self.weight.t().contiguous()
        return product if self.bias is None else product + self.bias
