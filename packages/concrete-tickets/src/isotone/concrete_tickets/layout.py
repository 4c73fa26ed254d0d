"""Which weights can be pruned, and how one flat vector of logits covers them.

`d` prunable weights in all, `g` groups of weights that share one logit (`g` = `d` where every weight has its own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from isotone.shared.errors import InputError

Params = Any
"""Any pytree of arrays: a flax nnx State or its pure dict, linen's `variables["params"]`, or plain containers."""
Where = Callable[[str, Any], bool]
"""`where(name, leaf) -> bool`: whether the leaf called `name` ("layers/0/kernel") may be pruned."""
Masks = Mapping[str, Array | np.ndarray]
"""For each prunable leaf, by name, a mask of its shape."""

_NOT_KERNEL = re.compile(r"(^|[^a-z])(bias|scale|norm\w*|\w*norm|bn\d*)([^a-z]|$)", re.I)
_EMBEDDING = re.compile(r"(^|[^a-z])embed\w*([^a-z]|$)", re.I)
STRUCTURES = "weight, input, output or N:M (such as 2:4)"


def default_kernels(name: str, leaf: Any) -> bool:
    """Floating-point matrices and convolution kernels; never biases, norms or embeddings.

    A leaf called "kernel" is a layer's, whatever the layer is called: that of `patch_embed` is a convolution's.
    """
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    table = _EMBEDDING.search(name) and not name.endswith("kernel")
    return bool(floating and leaf.ndim >= 2 and not _NOT_KERNEL.search(name) and not table)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: its path's keys joined by "/"; the `.value` of an nnx variable is left out."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def prunable(params: Params, where: Where = default_kernels) -> Any:
    """A pytree like `params` with True at each leaf that may be pruned.

    Raises `InputError` where `where` matches no leaf.
    """
    found = jax.tree_util.tree_map_with_path(lambda path, leaf: bool(where(leaf_name(path), leaf)), params)
    if not any(jax.tree.leaves(found)):
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise InputError(f"expected a leaf that may be pruned, got none among {', '.join(names) or 'no leaves'}")
    return found


def named_weights(params: Params, where: Where = default_kernels) -> dict[str, Any]:
    """The prunable leaves of `params`, arrays or their shapes, by name, in the tree's order."""
    flags = jax.tree.leaves(prunable(params, where))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_name(path): leaf for (path, leaf), flag in zip(leaves, flags, strict=True) if flag}


def masked(params: Params, masks: Masks) -> Params:
    """`params` with each masked leaf multiplied by its mask, in the leaf's dtype: m * theta."""

    def multiply(path: tuple[Any, ...], leaf: Any) -> Any:
        mask = masks.get(leaf_name(path))
        return leaf if mask is None else leaf * mask.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(multiply, params)


def check_masks(masks: Masks, params: Params) -> None:
    """Raise `InputError` where a masked leaf is missing from `params` or has another shape."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    Layout(tuple(masks), tuple(tuple(m.shape) for m in masks.values())).check(leaves)


def kept_count(density: Any, total: int) -> int:
    """floor(density * total), exact: the density is read as the decimal it is written as (0.29 of 100 is 29).

    Raises `InputError` where the density is not in (0, 1], or keeps nothing.
    """
    number = isinstance(density, Real) and not isinstance(density, (bool, np.bool_))
    if not (number and math.isfinite(density) and 0 < density <= 1):
        raise InputError(f"expected a density in (0, 1], got {density!r}")
    count = math.floor(Fraction(str(density)) * total)
    if count == 0:
        raise InputError(f"expected a density that keeps a weight of {total}, got {density}")
    return count


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the prunable leaves, and how a flat vector of logits maps onto their weights.

    `structure`: "weight" (a logit a weight), "output" or "input" (a logit for each slice along the last or the
    last-but-one axis: a unit or channel of the next or the previous layer), or "N:M" (a logit a weight; of each M
    consecutive ones along the last-but-one axis exactly N are kept).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    structure: str = "weight"

    def __post_init__(self) -> None:
        if self.structure not in ("weight", "input", "output"):
            match = re.fullmatch(r"(\d+):(\d+)", self.structure)
            if not match or not 0 < int(match[1]) < int(match[2]):
                raise InputError(f"expected structure to be {STRUCTURES}, got {self.structure!r}")
            for name, shape in zip(self.names, self.shapes, strict=True):
                if shape[-2] % int(match[2]):
                    message = f"expected {name} to have inputs divisible by {match[2]} for {self.structure}"
                    raise InputError(f"{message}, got shape {shape}")

    @classmethod
    def of(cls, params: Params, where: Where = default_kernels, structure: str = "weight") -> Layout:
        """The layout of the prunable leaves of `params`. Raises `InputError` where there is none."""
        weights = named_weights(params, where)
        return cls(tuple(weights), tuple(tuple(w.shape) for w in weights.values()), structure)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of the structure "N:M", else None."""
        if ":" not in self.structure:
            return None
        n, m = self.structure.split(":")
        return int(n), int(m)

    @property
    def total(self) -> int:
        """d: the prunable weights."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def group_shapes(self) -> tuple[tuple[int, ...], ...]:
        """For each leaf the shape of its logits, which broadcasts against the leaf's."""
        axis = {"output": -1, "input": -2}.get(self.structure)
        if axis is None:
            return self.shapes
        return tuple(
            tuple(size if i == len(shape) + axis else 1 for i, size in enumerate(shape)) for shape in self.shapes
        )

    @property
    def groups(self) -> int:
        """g: the logits."""
        return sum(math.prod(shape) for shape in self.group_shapes)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """For each leaf, how many weights one of its logits stands for."""
        pairs = zip(self.group_shapes, self.shapes, strict=True)
        return tuple(math.prod(shape) // math.prod(group) for group, shape in pairs)

    def sizes(self) -> Float[Array, " groups"]:
        """How many weights each logit stands for."""
        pairs = [(math.prod(g), math.prod(s)) for g, s in zip(self.group_shapes, self.shapes, strict=True)]
        return jnp.concatenate([jnp.full(count, weights // count, jnp.float32) for count, weights in pairs])

    def cut(self, flat: Array | np.ndarray) -> dict[str, Any]:
        """The flat vector (g,) cut into one array for each leaf, of its `group_shapes`."""
        found, start = {}, 0
        for name, group in zip(self.names, self.group_shapes, strict=True):
            found[name] = flat[start : start + math.prod(group)].reshape(group)
            start += math.prod(group)
        return found

    def expand(self, flat: Array) -> dict[str, Array]:
        """`cut`, each array broadcast to its leaf's shape."""
        parts = self.cut(flat)
        return {n: jnp.broadcast_to(parts[n], shape) for n, shape in zip(self.names, self.shapes, strict=True)}

    def expand_eagerly(self, flat: Array | np.ndarray) -> dict[str, Array]:
        """`expand` outside jit: cut on the host, where no slice has to be compiled."""
        parts = self.cut(np.asarray(flat))
        shapes = zip(self.names, self.shapes, strict=True)
        return {name: jax.device_put(np.broadcast_to(parts[name], shape)) for name, shape in shapes}

    def flatten(self, scores: Mapping[str, Any]) -> Any:
        """The inverse of `expand`: one entry a group, the sum of its weights' scores, of NumPy where they are.

        Raises `InputError` on other shapes.
        """
        self.check(scores)
        parts = []
        for name, shape, group in zip(self.names, self.shapes, self.group_shapes, strict=True):
            axes = tuple(i for i, (a, b) in enumerate(zip(shape, group, strict=True)) if a != b)
            parts.append((scores[name].sum(axis=axes) if axes else scores[name]).reshape(-1))
        return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else jnp.concatenate(parts)

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Raise `InputError` naming the first leaf of this layout that `leaves` has not, or in another shape."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in leaves:
                raise InputError(f"expected a leaf {name!r}, got {', '.join(leaves) or 'none'}")
            if tuple(leaves[name].shape) != shape:
                raise InputError(f"expected {name} of shape {shape}, got {tuple(leaves[name].shape)}")

    def check_density(self, density: Any) -> float:
        """The density to hold: for "N:M" it is N/M, which may also be given.

        Raises `InputError` on one that is not in (0, 1], that keeps no weight, or no group of several.
        """
        if self.n_of_m is not None:
            n, m = self.n_of_m
            if density is not None and not math.isclose(density, n / m):
                raise InputError(f"expected density {n / m:g} for structure {self.structure}, got {density}")
            return n / m
        if density is None:
            raise InputError(f"expected a density for structure {self.structure!r}, got None")
        count = kept_count(density, self.total)
        if (smallest := min(self.group_sizes)) > count:
            raise InputError(f"expected a density that keeps a group of {smallest} weights, got room for {count}")
        return float(density)

    def select(
        self, scores: Array | np.ndarray, density: float | None, count: int | None = None
    ) -> Bool[np.ndarray, " groups"]:
        """The mask of the groups with the largest scores.

        Exactly floor(density * d) weights for "weight", exactly N of each M for "N:M" (`density` is then N/M or
        None), at most floor(density * d) for groups of several weights: of those that fit at all, from the top until
        the next does not. `count` weights instead, where given. Ties go to the lower index. Raises `InputError` on NaN.
        """
        if bad := int(np.isnan(np.asarray(scores)).sum()):
            raise InputError(f"expected scores without NaN, got {bad} of {scores.size}")
        if self.n_of_m is not None:
            self.check_density(density)
            return self._select_blocks(scores, *self.n_of_m)
        if count is None:
            self.check_density(density)
            count = kept_count(density, self.total)
        if self.structure == "weight":
            return top_k(scores, count)
        sizes = np.asarray(self.sizes()).astype(np.int64)
        order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
        order = order[sizes[order] <= count]
        if not order.size:
            raise InputError(f"expected a density that keeps a group of {sizes.min()} weights, got room for {count}")
        fits = np.cumsum(sizes[order]) <= count
        mask = np.zeros(self.groups, bool)
        mask[order] = fits
        return mask

    def _select_blocks(self, scores: Array | np.ndarray, n: int, m: int) -> np.ndarray:
        parts = []
        for leaf in self.cut(np.asarray(scores, np.float32)).values():
            blocks = np.moveaxis(leaf, -2, -1).reshape(-1, m)
            kept = np.zeros(blocks.shape, bool)
            np.put_along_axis(kept, np.argsort(-blocks, axis=1, kind="stable")[:, :n], True, axis=1)
            back = kept.reshape(*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2])
            parts.append(np.moveaxis(back, -1, -2).reshape(-1))
        return np.concatenate(parts)


def top_k(scores: Array | np.ndarray, k: int) -> Bool[np.ndarray, " n"]:
    """True at exactly the `k` largest of the scores (n), compared as float32, ties to the lower index.

    On the host: one partial sort there costs less than any sort that a compiler makes, and nothing is compiled.
    """
    values = np.asarray(scores, np.float32)
    if k == 0:
        return np.zeros(values.size, bool)
    score = np.partition(values, values.size - k)[values.size - k]
    kept = values > score
    kept[np.flatnonzero(values == score)[: k - np.count_nonzero(kept)]] = True
    return kept
