"""An optax wrapper that keeps a network sparse while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from isotone.concrete_tickets.layout import Masks, Params, check_masks, leaf_name
from isotone.concrete_tickets.objectives import ApplyFn
from isotone.concrete_tickets.ticket import Ticket, keep


def mask_optimizer(
    tx: optax.GradientTransformation, ticket: Ticket | Mapping[str, Array]
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the kept weights alone: its gradients, momentum, weight decay and norms see no other.

    After `optax.apply_updates` a weight that is not kept is exactly 0, whatever it was before; the kept ones follow
    the path they would in a network where the others do not exist. The optimizer state keeps `tx`'s shape, so it
    can be saved and sharded as before. The ticket may be traced. `init` and `update` raise `InputError` where a masked
    leaf is not among the parameters, or has another shape.
    """
    masks = ticket.masks if isinstance(ticket, Ticket) else ticket
    inner = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        check_masks(masks, params)
        return inner.init(keep(params, masks))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("expected params: update(gradients, state, params)")
        check_masks(masks, params)
        updates, state = inner.update(keep(updates, masks), state, keep(params, masks), **extra)

        # -w, not 0: w + (-w) is exactly 0, also where w was not 0 at the start
        def select(path: tuple[Any, ...], step: Array, weight: Array) -> Array:
            mask = masks.get(leaf_name(path))
            return step if mask is None else jnp.where(mask, step, -weight.astype(step.dtype))

        return jax.tree_util.tree_map_with_path(select, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def masked_apply(apply_fn: ApplyFn, ticket: Ticket | Masks) -> ApplyFn:
    """`apply_fn` at the kept weights: `masked_apply(f, ticket)(params, inputs)` is f(x; m * theta)."""
    masks = ticket.masks if isinstance(ticket, Ticket) else ticket

    def at_the_kept(params: Params, inputs: Any) -> Array:
        check_masks(masks, params)
        return apply_fn(keep(params, masks), inputs)

    return at_the_kept
