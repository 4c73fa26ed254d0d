"""flax networks as the pure functions that the rest of the package takes.

Normalisation runs on batch statistics: running statistics belong to the dense network and are wrong for a sparse one.
"""

from __future__ import annotations

from typing import Any

import jax

from isotone.concrete_tickets.layout import Params
from isotone.concrete_tickets.objectives import ApplyFn


def from_nnx(model: Any) -> tuple[ApplyFn, Params]:
    """`(apply_fn, params)` of a flax nnx module: params is the pure dict of its `nnx.Param`s.

    The module is run with BatchNorm on the batch's statistics and without dropout; what it
    writes is dropped, and it stays as it is. Put parameters back with `nnx.update(model, params)`.
    """
    from flax import nnx

    model = nnx.clone(model)
    model.set_attributes(use_running_average=False, deterministic=True, raise_if_not_found=False)
    graph, params, others = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    # arrays, not the model's own variables: each call writes into variables of its own
    rest = nnx.to_pure_dict(others)

    def apply_fn(params: Params, inputs: Any) -> jax.Array:
        return nnx.merge(graph, params, rest)(inputs)

    return apply_fn, nnx.to_pure_dict(params)


def from_linen(module: Any, variables: Any, **kwargs: Any) -> tuple[ApplyFn, Params]:
    """`(apply_fn, params)` of a flax linen module with its variables; `kwargs` go to its call (`train=True`).

    Collections other than "params" (batch_stats) may be written by the call; what is written is dropped.
    """
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply_fn(params: Params, inputs: Any) -> jax.Array:
        found = module.apply({"params": params, **rest}, inputs, mutable=list(rest), **kwargs)
        return found[0]

    return apply_fn, variables["params"]
