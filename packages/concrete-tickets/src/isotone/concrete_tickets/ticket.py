"""The ticket: which weights are kept. Masks by name, with what one does to tickets: apply, shuffle, invert, save."""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isotone.concrete_tickets.layout import (
    Layout,
    Masks,
    Params,
    Where,
    check_masks,
    default_kernels,
    leaf_name,
    named_weights,
)
from isotone.concrete_tickets.noise import host_generator
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

_FORMAT = "isotone-ticket-1"


class LayerCollapse(UserWarning):
    """A layer keeps no weight: whatever runs through it alone is cut, and accuracy falls to chance."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks"], meta_fields=["structure"])
@dataclass(frozen=True)
class Ticket:
    """`masks`: a bool array for each prunable leaf, by the leaf's name ("layers/0/kernel"). `structure`: what is kept
    or dropped together ("weight": each by itself; layout.py).

    A pytree: it can be passed into jit.
    """

    masks: dict[str, Array]
    structure: str = "weight"

    @classmethod
    def from_scores(
        cls,
        scores: Masks,
        density: float | None,
        structure: str = "weight",
        lowest: bool = False,
        warn: bool = True,
        count: int | None = None,
    ) -> Ticket:
        """Keep the floor(density * d) weights with the largest scores, over all leaves together.

        `scores`: an array for each leaf, by name. `lowest` keeps the smallest instead (the inverted ticket); `count`
        is the number of weights, where it is known better than the density. Warns
        with `LayerCollapse` and the layers' names where a layer keeps nothing. Raises `InputError` on NaN, and on a
        density that is not in (0, 1] or keeps nothing.
        """
        layout = Layout(tuple(scores), tuple(tuple(np.shape(s)) for s in scores.values()), structure)
        flat = layout.flatten({name: np.asarray(score) for name, score in scores.items()})
        return cls._of(layout, layout.select(-flat if lowest else flat, density, count), warn)

    @classmethod
    def _of(cls, layout: Layout, mask: np.ndarray, warn: bool = True) -> Ticket:
        ticket = cls(layout.expand_eagerly(mask), layout.structure)
        return ticket.warn_collapse() if warn else ticket

    def warn_collapse(self) -> Ticket:
        """The ticket, after a `LayerCollapse` warning where a layer keeps nothing."""
        if empty := self.collapsed():
            message = f"no weight is kept in {', '.join(empty)}: the layer is cut"
            warnings.warn(message, LayerCollapse, stacklevel=4)
        return self

    @classmethod
    def dense(cls, params: Params, where: Where = default_kernels) -> Ticket:
        """The ticket that keeps everything."""
        return cls({name: jax.device_put(np.ones(w.shape, bool)) for name, w in named_weights(params, where).items()})

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return sum(int(np.sum(np.asarray(mask))) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """d: how many weights could have been."""
        return sum(mask.size for mask in self.masks.values())

    @property
    def density(self) -> float:
        """kept / d."""
        return self.kept / self.total

    def layer_densities(self) -> dict[str, float]:
        """The share kept in each leaf."""
        return {name: int(np.sum(np.asarray(mask))) / mask.size for name, mask in self.masks.items()}

    def collapsed(self) -> list[str]:
        """The leaves in which nothing is kept."""
        return [name for name, mask in self.masks.items() if not np.asarray(mask).any()]

    def check(self, params: Params) -> None:
        """Raise `InputError` where a masked leaf is missing from `params` or has another shape."""
        check_masks(self.masks, params)

    def apply(self, params: Params) -> Params:
        """`params` with the weights that are not kept at exactly 0. Raises `InputError` as `check`."""
        self.check(params)
        return _keep(params, self.masks)

    def tree(self, params: Params) -> Any:
        """A bool pytree like `params`, True all over where a leaf is not prunable."""
        self.check(params)

        def mask(path: tuple[Any, ...], leaf: Any) -> Array:
            return self.masks.get(leaf_name(path), jnp.ones(jnp.shape(leaf), bool))

        return jax.tree_util.tree_map_with_path(mask, params)

    def shuffle_layers(self, key: Array) -> Ticket:
        """Each leaf's mask in random order: the layers' counts stay, which weights does not (sanity check a).

        Groups stay whole; of N:M the N kept of each M are drawn again.
        """
        source, layout = host_generator(key), self._layout()
        shuffled = {}
        for (name, mask), group in zip(self.masks.items(), layout.group_shapes, strict=True):
            kept = np.asarray(mask)
            if layout.n_of_m is not None:
                blocks = np.moveaxis(kept, -2, -1).reshape(-1, layout.n_of_m[1])
                drawn = source.permuted(blocks, axis=1).reshape(*kept.shape[:-2], kept.shape[-1], kept.shape[-2])
                shuffled[name] = jax.device_put(np.moveaxis(drawn, -1, -2))
                continue
            one = kept[tuple(slice(None) if a == b else slice(0, 1) for a, b in zip(kept.shape, group, strict=True))]
            order = source.permutation(one.reshape(-1)).reshape(group)
            shuffled[name] = jax.device_put(np.broadcast_to(order, kept.shape))
        return Ticket(shuffled, self.structure)

    def _layout(self) -> Layout:
        return Layout(tuple(self.masks), tuple(tuple(mask.shape) for mask in self.masks.values()), self.structure)

    def invert(self, scores: Masks) -> Ticket:
        """As many weights, those with the LOWEST scores (sanity check b); of whole groups at most as many, by the mean
        of their scores; of N:M the N lowest of each M. Raises `InputError` on scores of others."""
        layout = self._layout()
        means = layout.flatten({name: np.asarray(score) for name, score in scores.items()}) / np.asarray(layout.sizes())
        return Ticket._of(layout, layout.select(-means, None, self.kept), warn=False)

    def to_bcoo(self, params: Params) -> dict[str, Any]:
        """The kept weights of each leaf as `jax.experimental.sparse.BCOO`, with exactly as many entries."""
        from jax.experimental import sparse

        self.check(params)
        found = {}
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        for name, mask in self.masks.items():
            indices = jnp.argwhere(mask)
            data = leaves[name][tuple(indices.T)]
            found[name] = sparse.BCOO((data, indices), shape=mask.shape, indices_sorted=True, unique_indices=True)
        return found

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with one bit a weight; a crash leaves the old file or the new one."""
        from safetensors.numpy import save

        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        packed = {name: np.packbits(np.asarray(mask).reshape(-1)) for name, mask in self.masks.items()}
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"format": _FORMAT, "shapes": shapes, "structure": self.structure}
            # in one entry: several are written in an order of their own in every process
            atomic_write(path, save(packed, {"ticket": json.dumps(facts)}))
        except OSError as error:
            raise InputError(f"expected to write a ticket to {str(path)!r}, got {error.strerror}") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """The ticket in the file. Raises `InputError` where it is missing, torn, or another kind of file."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise InputError(f"expected a ticket at {str(path)!r}, found no such file")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                # files of before: an entry for each fact, and no structure
                old = {**metadata, "shapes": json.loads(metadata.get("shapes", "{}"))}
                facts = json.loads(metadata["ticket"]) if "ticket" in metadata else old
                if facts.get("format") != _FORMAT:
                    raise InputError(f"expected a ticket ({_FORMAT}), got another file: {str(path)!r}")
                shapes, structure = facts["shapes"], facts.get("structure", "weight")
                bits = {name: np.unpackbits(file.get_tensor(name)) for name in shapes}
                masks = {
                    name: jax.device_put(bits[name][: math.prod(shape)].astype(bool).reshape(shape))
                    for name, shape in shapes.items()
                }
        except InputError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"expected a whole ticket, got a torn or corrupted one: {str(path)!r} ({error})") from None
        ticket = cls(masks, structure)
        ticket._layout()
        return ticket


def keep(params: Params, masks: Masks) -> Params:
    """`params` with exact zeros where a mask is False; unlike a product it also clears NaN and -0."""

    def select(path: tuple[Any, ...], leaf: Any) -> Any:
        mask = masks.get(leaf_name(path))
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(select, params)


_keep = jax.jit(keep)


def random_reinitialise(params: Params, masks: Masks, key: Array) -> Params:
    """`params` with each masked leaf drawn again from N(0, its own variance) (sanity check c)."""
    source = host_generator(key)

    def draw(path: tuple[Any, ...], leaf: Any) -> Any:
        if leaf_name(path) not in masks:
            return leaf
        values = np.asarray(leaf, np.float32).std() * source.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, params)
