"""What is refused at the door: objectives, predicted rewards and masks that no loss can mean anything for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_objectives(u: Any, rows: int | None = None) -> None:
    """Raise `ValueError` unless `u` is a finite (n, d) array, with n = `rows` where that is given."""
    if u.ndim != 2 or u.shape[1] < 1:
        raise ValueError(f"expected objectives of shape (batch, objectives), got {tuple(u.shape)}")
    if rows is not None and u.shape[0] != rows:
        raise ValueError(f"expected objectives for {rows} objects, got {u.shape[0]}")
    finite = torch.isfinite(u) if isinstance(u, Tensor) else np.isfinite(u)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0]) if isinstance(u, Tensor) else np.argwhere(~finite)[0]
        raise ValueError(
            f"expected finite objectives, got {float(u[row, column])} for object {row}, objective {column}"
        )


def check_log_rewards(log_r: Tensor, objects: int) -> None:
    """Raise `ValueError` unless `log_r` is a vector of `objects` >= 2 predicted log-rewards."""
    if log_r.ndim != 1 or log_r.shape[0] != objects:
        raise ValueError(f"expected one log-reward for each of {objects} objects, got shape {tuple(log_r.shape)}")
    if not bool(torch.isfinite(log_r.detach()).all()):
        row = int((~torch.isfinite(log_r.detach())).nonzero()[0])
        raise ValueError(f"expected finite log-rewards, got {float(log_r[row])} for object {row}")
    if objects < 2:
        raise ValueError(f"expected a batch of at least 2 objects to compare, got {objects}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise `ValueError` naming the devices where the tensors are not on one."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        said = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {said}")
