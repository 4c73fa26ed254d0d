"""What an update, or a weight, looks like: its singular values and how uneven its rows are."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.normuon.layout import layout_of
from isotone.normuon.normalize import inverse_root, shape_factor
from isotone.normuon.optimizer import Muon
from isotone.normuon.orthogonalize import zeropower


def matrix_stats(matrix: Float[Tensor, "m n"]) -> dict[str, float]:
    """Extreme singular values and their ratio, stable rank, RMS, coefficients of variation of row and column norms.

    A row (column) norm that is zero counts. Computed in float64.
    """
    working = matrix.detach().double()
    singular = torch.linalg.svdvals(working)
    largest, smallest = singular[0].item(), singular[-1].item()
    return {
        "sigma_max": largest,
        "sigma_min": smallest,
        "condition": largest / smallest if smallest > 0 else float("inf"),
        "stable_rank": (singular.square().sum() / singular[0].square()).item() if largest > 0 else 0.0,
        "rms": working.square().mean().sqrt().item(),
        "row_cv": _variation(torch.linalg.vector_norm(working, dim=1)),
        "column_cv": _variation(torch.linalg.vector_norm(working, dim=0)),
    }


def update_stats(optimizer: Muon) -> dict[str, dict[str, float]]:
    """Of each matrix the optimizer has stepped: the orthogonalised momentum before and after normalisation.

    Keys are parameter names, or their position; blocks of one parameter get "[0]", "[1]", ... Values:
    `sigma_max`, `sigma_min`, `row_cv` before; `sigma_max_after`, `sigma_min_after`, `row_cv_after`; `step_rms`,
    the RMS of the step at the group's rate without weight decay. Nothing is changed.
    """
    found: dict[str, dict[str, float]] = {}
    position = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [str(position + i) for i in range(len(group["params"]))]
        position += len(group["params"])
        if group["kind"] != "matrix":
            continue
        for name, parameter in zip(names, group["params"], strict=True):
            if "momentum_buffer" in optimizer.state.get(parameter, {}):
                found |= _parameter_stats(optimizer, group, name, parameter)
    return found


@torch.no_grad()
def _parameter_stats(
    optimizer: Muon, group: dict[str, Any], name: str, parameter: Tensor
) -> dict[str, dict[str, float]]:
    state = {key: _full(value) for key, value in optimizer.state[parameter].items()}
    layout = layout_of(parameter.shape, group)
    blocks = state["momentum_buffer"].reshape(layout.shape).split(list(layout.blocks))
    second = state.get("second_moment")
    moments: Any = [None] * len(blocks)
    if second is not None:
        moments = second.reshape(-1, 1).split(list(layout.blocks)) if layout.axis == "row" else second.flatten(1)
    found = {}
    for i, (block, moment) in enumerate(zip(blocks, moments, strict=True)):
        orthogonal = zeropower(block, optimizer._orthogonalize, group["ns_steps"], optimizer._ns_dtype).double()
        inverse = 1.0 if moment is None else inverse_root(moment, group["eps"]).double()
        after = orthogonal * inverse
        before_stats, after_stats = matrix_stats(orthogonal), matrix_stats(after)
        m, n = block.shape
        norm = 1.0 if group["scale"] == "rms" else torch.linalg.vector_norm(orthogonal).item()
        alive = bool(after.any())
        found[name if len(blocks) == 1 else f"{name}[{i}]"] = {
            **{key: before_stats[key] for key in ("sigma_max", "sigma_min", "row_cv")},
            **{key + "_after": after_stats[key] for key in ("sigma_max", "sigma_min", "row_cv")},
            "step_rms": float(group["lr"]) * shape_factor(group["scale"], m, n) * norm / (m * n) ** 0.5 * alive,
        }
    return found


def _full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _variation(norms: Tensor) -> float:
    """Standard deviation over mean; 0 for a zero matrix."""
    mean = norms.mean()
    return (norms.std(correction=0) / mean).item() if mean > 0 else 0.0
