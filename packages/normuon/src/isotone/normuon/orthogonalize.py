"""Orthogonalisation: the polar factor U Vᵀ of a matrix U S Vᵀ, by odd polynomials that never form an SVD.

Every step maps each singular value s to a s + b s³ + c s⁵ and keeps both sets of singular vectors
(arXiv 2510.05491, algorithm 1, NewtonSchulz5). Cost with k = min(m, n), l = max(m, n): 4 k² l + 2 k³ FLOPs a
step, of which the two symmetric products need only half (`kernels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.normuon import kernels

Coefficients = tuple[float, float, float]
Method = str | Callable[[Tensor], Tensor]

# Keller Jordan's fixed polynomial: f(1) = 0.70, values in [0.68, 1.14] after five steps for s in [0.01, 1]
JORDAN: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),)
# one polynomial a step, as dion uses without Polar Express
TABLE: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Polar Express (arXiv 2505.16932): minimax for five steps, with a safety factor of 1.02
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_TABLES = {"ns5": JORDAN, "ns5-table": TABLE, "polar_express": POLAR_EXPRESS}
METHODS = (*_TABLES, "svd")
# up to this many rows a batched product is faster on a CPU than one product a matrix
_CPU_BATCH_ROWS = 192


def coefficients(method: str, steps: int) -> list[Coefficients]:
    """The polynomial of each of `steps` steps; a table that is too short goes on with its last row."""
    table = _TABLES[method]
    return [table[min(i, len(table) - 1)] for i in range(steps)]


def check_method(method: Any, steps: Any) -> None:
    """Raise `ValueError` on an unknown method or a number of steps outside [1, 100)."""
    if not callable(method) and method not in METHODS:
        raise ValueError(f"expected orthogonalize to be one of {', '.join(METHODS)} or a callable, got {method!r}")
    if not (isinstance(steps, int) and 1 <= steps < 100):
        raise ValueError(f"expected 1 <= ns_steps < 100, got {steps}")


def zeropower(
    updates: Float[Tensor, "*batch m n"],
    method: Method = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> Float[Tensor, "*batch m n"]:
    """The (approximate) polar factor of each matrix of `updates`; its dtype is that of `updates`.

    `method`: "ns5" (Jordan), "ns5-table", "polar_express", "svd" (exact) or a callable on a (batch, m, n)
    tensor. `dtype`: what the products run in; None means bfloat16 on a GPU and the input's own on a CPU
    (bfloat16 and float16 inputs run in float32 there). Zero matrices and zero rows stay zero; a Frobenius norm
    beyond float32's range (entries of some 1e19) gives zero, and one below 1e-6 a smaller factor. Raises
    `ValueError` on an unknown method or `steps` outside [1, 100).
    """
    check_method(method, steps)
    if updates.numel() == 0:
        return torch.zeros_like(updates)
    matrices = updates.reshape(-1, *updates.shape[-2:])
    if callable(method):
        result = method(matrices)
    elif method == "svd":
        result = _polar_svd(matrices)
    else:
        working = matrices.to(dtype or default_dtype(updates))
        iterate = _compiled() if compile else _iterate
        safety, eps = (1.02, 1e-6) if method == "polar_express" else (1.0, 1e-7)
        rows = coefficients(method, steps)
        if _one_by_one(working):
            result = torch.stack([iterate(matrix[None], rows, safety, eps)[0] for matrix in working])
        else:
            result = iterate(working, rows, safety, eps)
    return result.to(updates.dtype).reshape(updates.shape)


def default_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 on a GPU; on a CPU, where bfloat16 products are slow, at least float32."""
    if tensor.is_cuda:  # pragma: no cover - needs a GPU
        return torch.bfloat16
    return torch.promote_types(tensor.dtype, torch.float32)


def _iterate(x: Tensor, rows: list[Coefficients], safety: float, eps: float) -> Tensor:
    """x: (batch, m, n) -> the same shape. Section 2.4: A = X Xᵀ, B = b A + c A², X <- a X + B X."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (safety * torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in rows:
        gram = kernels.symmetric_product(x)
        inner = kernels.symmetric_product(gram, alpha=c, add=gram, beta=b)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x.mT if tall else x


_COMPILED: dict[str, Callable[..., Tensor]] = {}


def _compiled() -> Callable[..., Tensor]:
    if "iterate" not in _COMPILED:
        _COMPILED["iterate"] = torch.compile(_iterate)
    return _COMPILED["iterate"]


def _one_by_one(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[0] > 1 and min(x.shape[-2:]) > _CPU_BATCH_ROWS


def _polar_svd(x: Tensor) -> Tensor:
    """The exact factor; singular values that are zero to rounding stay zero, so that zero rows do."""
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(working, full_matrices=False)
    tolerance = s[..., :1] * max(x.shape[-2:]) * torch.finfo(working.dtype).eps
    return (u * (s > tolerance).to(u.dtype)[..., None, :]) @ vh
