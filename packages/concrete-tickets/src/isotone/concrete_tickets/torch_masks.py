"""Tickets to and from PyTorch: masks of `torch.nn.utils.prune`, whose weights lie the other way round.

flax keeps a kernel as (inputs, outputs) or (height, width, inputs, outputs), torch as (outputs, inputs) or (outputs,
inputs, height, width). torch is imported when used (extra `torch`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from isotone.concrete_tickets.ticket import Ticket
from isotone.shared.errors import InputError


def torch_name(name: str) -> str:
    """ "layers/0/kernel" as torch calls it: "layers.0.weight"; so is a norm's scale."""
    parent, _, leaf = name.rpartition("/")
    return ".".join([*parent.split("/"), "weight" if leaf in ("kernel", "scale") else leaf]).lstrip(".")


def torch_state(
    arrays: Mapping[str, np.ndarray], masks: Mapping[str, Any], flattened: Mapping[str, tuple[int, int, int]]
) -> dict[str, np.ndarray]:
    """Weights and masks with the names and axes of a module under `torch.nn.utils.prune`: weight_orig, weight_mask.

    `flattened`: for each dense kernel that takes a picture laid flat, the picture's (height, width, channels), as a
    `Model` has them: torch lays pictures flat channels first.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        parts = {"_orig": array, "_mask": np.asarray(masks[name], np.float32)} if name in masks else {"": array}
        for suffix, part in parts.items():
            kernel = name.endswith("kernel")
            found[torch_name(name) + suffix] = to_torch_order(part, flattened.get(name)) if kernel else part
    return found


def to_torch_order(array: Any, flat: tuple[int, int, int] | None = None) -> np.ndarray:
    """A flax kernel's array in torch's order of axes (2 dimensions: transposed; more: outputs, inputs, the rest).

    `flat`: (height, width, channels) of the picture whose pixels are the kernel's inputs.
    """
    array = np.asarray(array)
    array = array if flat is None else array[_channels_first(flat, len(array))]
    return np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))


def from_torch_order(array: Any, flat: tuple[int, int, int] | None = None) -> np.ndarray:
    """The inverse of `to_torch_order`."""
    array = np.moveaxis(np.asarray(array), (0, 1), (-1, -2))
    array = array if flat is None else array[np.argsort(_channels_first(flat, len(array)))]
    return np.ascontiguousarray(array)


def _channels_first(flat: tuple[int, int, int], rows: int) -> np.ndarray:
    if math.prod(flat) != rows:
        raise InputError(f"expected a kernel of a picture of {flat}, got one of {rows} inputs")
    return np.arange(math.prod(flat)).reshape(flat).transpose(2, 0, 1).reshape(-1)


def prune_torch(
    module: Any,
    ticket: Ticket,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, int, int]] | None = None,
) -> Any:
    """Put the ticket on a `torch.nn.Module` by `prune.custom_from_mask`; returns the module.

    `names`: the module's parameter for each leaf ("layers.0.weight"); by default those of `torch_name`.
    `flattened`: as in `torch_state`. Raises `InputError` where the module has no such parameter, or one of another
    shape; the module is then as it was.
    """
    import torch
    from torch.nn.utils import prune

    plan = []
    for name, mask in ticket.masks.items():
        target = (names or {}).get(name, torch_name(name))
        parent, _, leaf = target.rpartition(".")
        try:
            owner = module.get_submodule(parent)
            parameter = getattr(owner, leaf)
        except AttributeError:
            raise InputError(f"expected a parameter {target!r} for {name}, the module has none") from None
        turned = torch.from_numpy(to_torch_order(mask, (flattened or {}).get(name)))
        if tuple(parameter.shape) != tuple(turned.shape):
            raise InputError(f"expected {target} of shape {tuple(turned.shape)}, got {tuple(parameter.shape)}")
        plan.append((owner, leaf, turned))
    for owner, leaf, turned in plan:
        prune.custom_from_mask(owner, leaf, turned)
    return module


def from_torch(
    module: Any, names: Mapping[str, str] | None = None, flattened: Mapping[str, tuple[int, int, int]] | None = None
) -> Ticket:
    """The ticket of a module pruned by `torch.nn.utils.prune`: its `*_mask` buffers.

    `names`: the leaf for each torch parameter ("layers.0.weight": "layers/0/kernel"); by default the inverse of
    `torch_name`. `flattened`: as in `torch_state`. Raises `InputError` where there is no mask.
    """
    masks = {}
    for name, buffer in module.named_buffers():
        if not name.endswith("_mask"):
            continue
        parameter = name.removesuffix("_mask")
        leaf = (names or {}).get(parameter, parameter.removesuffix("weight").replace(".", "/") + "kernel")
        mask = from_torch_order(buffer.detach().cpu().numpy(), (flattened or {}).get(leaf))
        masks[leaf] = jax.device_put(mask.astype(bool))
    if not masks:
        raise InputError("expected a module pruned by torch.nn.utils.prune, got one without a mask")
    return Ticket(masks)
