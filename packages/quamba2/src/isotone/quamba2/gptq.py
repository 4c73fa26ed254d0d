"""GPTQ: 4-bit weights whose rounding errors are made up for by the columns that are still to be rounded.

H = (2/n) sum x x^T over the inputs x of a layer. Columns are rounded in their order; with U the upper Cholesky factor
of H^-1, the error (w_j - q_j) / U_jj is taken from the later columns along U_j (section 2, "GPTQ").
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.quamba2.packing import dequantize_groups, group_scales, quantize_groups
from isotone.quamba2.weights import GroupedWeight, round_to_nearest
from isotone.shared.errors import InputError


class GPTQ:
    """The Hessian of a layer with `columns` inputs, and the weight it gives.

    `hessian` (columns, columns), float32; `count`: inputs taken in.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.hessian = torch.zeros(columns, columns, device=device)
        self.count = 0

    def add(self, inputs: Float[Tensor, "... columns"]) -> None:
        """Take in `inputs`. Raises `InputError` where one is NaN or infinite."""
        rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
        if not bool(rows.isfinite().all()):
            raise InputError("expected finite inputs for GPTQ, got NaN or infinity")
        total = self.count + len(rows)
        self.hessian.mul_(self.count / total).addmm_(rows.T, rows, alpha=2 / total)
        self.count = total

    def quantize(
        self, weight: Float[Tensor, "out columns"], group: int = 128, dampening: float = 0.01
    ) -> GroupedWeight:
        """`weight` in 4 bits, a scale for each `group` inputs taken from the already updated weights.

        `dampening`: part of the mean of H's diagonal that is added to it. Inputs that were always 0 get weights of 0.
        Costs columns^3 + out columns^2. Raises `InputError` before any input.
        """
        if not self.count:
            raise InputError("expected inputs before GPTQ quantises, got none")
        work, hessian = weight.detach().float().clone(), self.hessian.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        work[:, dead] = 0
        factor = _inverse_factor(hessian, dampening)
        codes, scales = torch.empty_like(work, dtype=torch.uint8), []
        for start in range(0, work.shape[1], group):
            block = work[:, start : start + group]
            scales.append(group_scales(block, group, torch.float16))
            errors = torch.empty_like(block)
            for j in range(group):
                column = block[:, j : j + 1]
                q = quantize_groups(column, scales[-1])
                codes[:, start + j] = q[:, 0]
                errors[:, j] = (column - dequantize_groups(q, scales[-1]))[:, 0] / factor[start + j, start + j]
                block -= errors[:, j, None] * factor[start + j, start : start + group]
            work[:, start + group :] -= errors @ factor[start : start + group, start + group :]
        return GroupedWeight(codes, torch.cat(scales, 1))


def _inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """The upper Cholesky factor of H^-1, with more dampening where rounding makes H indefinite."""
    mean = hessian.diagonal().mean()
    for step in range(8):
        damped = hessian.clone()
        damped.diagonal().add_(dampening * 10**step * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(upper.isfinite().all()):
                return upper
    raise InputError("expected a Hessian of finite inputs for GPTQ, got one that dampening does not make definite")


def quantize_weight(weight: Tensor, group: int, hessian: GPTQ | None, dampening: float) -> GroupedWeight:
    """`weight` by GPTQ where there is a `hessian`, else every number by itself."""
    if hessian is None:
        return round_to_nearest(weight, group)
    return hessian.quantize(weight.to(hessian.hessian.device), group, dampening)
