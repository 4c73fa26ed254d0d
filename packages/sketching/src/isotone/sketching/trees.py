"""Sketches of pytrees: one sketch of all leaves laid end to end, or one of each block of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isotone.shared.errors import InputError
from isotone.sketching.sketches import Sketch, make_sketch, on_gpu


@dataclass(frozen=True)
class TreeSketch:
    """`blocks`: sketches of consecutive stretches of the flattened tree, d numbers in all into s.

    `structure`, `shapes`, `dtypes`: of the tree it is for. Another tree is refused.
    """

    blocks: tuple[Sketch, ...]
    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @property
    def d(self) -> int:
        """Numbers in the tree."""
        return sum(block.d for block in self.blocks)

    @property
    def s(self) -> int:
        """Numbers sent."""
        return sum(block.s for block in self.blocks)

    @property
    def alpha(self) -> float:
        """The largest of the blocks': E|desk(sk(x))|^2 is at most (1 + alpha)|x|^2."""
        return max(block.alpha for block in self.blocks)

    @property
    def eta_g(self) -> float:
        """1 / (1 + alpha)."""
        return 1 / (1 + self.alpha)

    def flatten(self, tree: Any) -> Float[Array, " d"]:
        """The leaves end to end, in float32. Raises `InputError` on another tree."""
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure or tuple(tuple(leaf.shape) for leaf in leaves) != self.shapes:
            found = [tuple(leaf.shape) for leaf in leaves]
            raise InputError(f"expected a tree with leaves of shapes {list(self.shapes)}, got {found}")
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])

    def unflatten(self, flat: Float[Array, " d"]) -> Any:
        """The tree of `flat`, its leaves in their own types."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        leaves = [part.reshape(shape).astype(dtype) for part, shape, dtype in
                  zip(parts, self.shapes, self.dtypes, strict=True)]  # fmt: skip
        return jax.tree.unflatten(self.structure, leaves)

    def sk(self, t: Array | int, flat: Float[Array, " d"]) -> Float[Array, " s"]:
        """R_t x, block by block."""
        if flat.shape != (self.d,):
            raise InputError(f"expected {self.d} numbers to sketch, got shape {flat.shape}")
        ends = np.cumsum([block.d for block in self.blocks])[:-1]
        parts = zip(self.blocks, jnp.split(flat, ends), strict=True)
        return jnp.concatenate([block.sk(t, part) for block, part in parts])

    def desk(self, t: Array | int, y: Float[Array, " s"]) -> Float[Array, " d"]:
        """R_t^T y, block by block."""
        if y.shape != (self.s,):
            raise InputError(f"expected {self.s} numbers to desketch, got shape {y.shape}")
        ends = np.cumsum([block.s for block in self.blocks])[:-1]
        parts = zip(self.blocks, jnp.split(y, ends), strict=True)
        return jnp.concatenate([block.desk(t, part) for block, part in parts])


def tree_sketch(
    tree: Any,
    kind: str = "srht",
    *,
    ratio: float = 10.0,
    s: int | None = None,
    seed: int = 0,
    per_leaf: bool = False,
    q: int = 4,
    ordered: bool | None = None,
) -> TreeSketch:
    """A sketch for trees like `tree`: of everything at once into `s` numbers or d / `ratio`, or of each leaf. `q`,
    `ordered`: as `Sketch`; not given, sums are ordered where JAX computes on a GPU.

    Raises `InputError` on a tree without leaves, leaves that are not floating point, and s together with per_leaf.
    """
    leaves = _checked_leaves(tree)
    if s is not None and per_leaf:
        raise InputError("expected a ratio for sketches of each leaf, got s")
    sizes = [int(leaf.size) for leaf in leaves] if per_leaf else [sum(int(leaf.size) for leaf in leaves)]
    ordered = on_gpu() if ordered is None else ordered
    blocks = [
        make_sketch(
            kind, size, s, block_seed(seed, number), ratio=None if s is not None else ratio, q=q, ordered=ordered
        )
        for number, size in enumerate(sizes)
    ]
    return _of_blocks(tree, tuple(blocks))


def tree_of(tree: Any, sketch: Sketch) -> TreeSketch:
    """`sketch` for trees like `tree`, of everything at once. Raises `InputError` as `tree_sketch`, and where the tree
    has another number of numbers."""
    d = sum(int(leaf.size) for leaf in _checked_leaves(tree))
    if d != sketch.d:
        raise InputError(f"expected a sketch of the tree's {d} numbers, got one of {sketch.d}")
    return _of_blocks(tree, (sketch,))


def _of_blocks(tree: Any, blocks: tuple[Sketch, ...]) -> TreeSketch:
    leaves, structure = jax.tree.flatten(tree)
    shapes, dtypes = zip(*((tuple(leaf.shape), leaf.dtype) for leaf in leaves), strict=True)
    return TreeSketch(blocks, structure, tuple(shapes), tuple(dtypes))


def _checked_leaves(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise InputError("expected a tree with leaves to sketch, got none")
    for leaf in leaves:
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise InputError(f"expected leaves of floating point, got {getattr(leaf, 'dtype', type(leaf).__name__)}")
    return list(leaves)


def block_seed(seed: int, number: int) -> int:
    """Each block has rounds of its own."""
    return seed if number == 0 else (seed + number * 0x9E3779B97F4A7C15) % 2**64
