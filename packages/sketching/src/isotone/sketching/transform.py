"""`sketched(tx, ...)`: an optax transformation whose updates have gone through a sketch and back.

In one process it does what a thin channel would: u -> R_t^T R_t u / (1 + alpha), with a fresh R_t at every step, so
that the loss of an optimizer behind a channel is known before there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from isotone.sketching.rounding import payload, round_to
from isotone.sketching.sketches import Sketch
from isotone.sketching.trees import TreeSketch, tree_of, tree_sketch


class SketchState(NamedTuple):
    """`step`: steps taken, which is the round of the next sketch."""

    step: Array


def sketch_compress(
    kind: str | Sketch | TreeSketch = "srht",
    *,
    ratio: float = 10.0,
    s: int | None = None,
    seed: int = 0,
    per_leaf: bool = False,
    scale: str | float = "auto",
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Updates u to `scale` * desk_t(sk_t(u)), t the number of the step.

    `kind`: of a sketch made for the updates' tree, or a sketch of all its numbers that was made already. `scale`
    "auto": 1 / (1 + alpha), with which a step that is safe without a sketch is safe with it (section 2.4); 1.0 leaves
    the update unbiased. `ratio`, `s`, `seed`, `per_leaf`: as `tree_sketch`. `dtype`: of the numbers in the channel, see
    `rounding`.
    """
    payload(dtype, 1)  # its own check

    def make(tree: Any) -> TreeSketch:
        if isinstance(kind, TreeSketch):
            return kind
        if isinstance(kind, Sketch):
            return tree_of(tree, kind)
        return tree_sketch(tree, kind, ratio=ratio, s=s, seed=seed, per_leaf=per_leaf)

    def init(params: Any) -> SketchState:
        make(params)  # refuses here what can not be sketched
        return SketchState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: SketchState, params: Any = None) -> tuple[Any, SketchState]:
        sketch = make(updates)
        factor = sketch.eta_g if scale == "auto" else float(scale)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        sent = round_to(dtype, key, sketch.sk(state.step, sketch.flatten(updates)))
        flat = sketch.desk(state.step, sent)
        return sketch.unflatten(factor * flat), SketchState(state.step + 1)

    return optax.GradientTransformation(init, update)


def sketched(
    tx: optax.GradientTransformation, sketch: str | Sketch | TreeSketch = "srht", **options: Any
) -> optax.GradientTransformation:
    """`tx` on gradients that went through `sketch_compress(sketch, **options)`: what a server sees that is sent
    sketches."""
    return optax.chain(sketch_compress(options.pop("kind", sketch), **options), tx)
