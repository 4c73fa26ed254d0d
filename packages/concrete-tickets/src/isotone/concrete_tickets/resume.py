"""A loop over epochs that can be killed at any moment and goes on to the same end.

Its state is one pytree of arrays, the history of the run included, and lies on the disk after every few epochs beside
the run's identity: settings, and a digest of the arrays that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError

Advance = Callable[[Any, int, int], Any]
"""`advance(state, first, last)`: the state after the epochs from `first` to `last` (left out)."""


def run_epochs(
    advance: Advance,
    state: Any,
    first: int,
    last: int,
    *,
    identity: Callable[[], Mapping[str, Any]],
    folder: str | Path | None = None,
    every: int = 10,
    resume: bool = True,
) -> Any:
    """The state after `advance` has gone from epoch `first` to `last`, at once where there is no `folder`.

    With a `folder` the state is saved every `every` epochs and, with `resume`, what is saved there is continued; else
    it is cleared. Raises `InputError` where the folder holds a run of another `identity()`, naming what differs.
    """
    if folder is None:
        return advance(state, first, last)
    if every < 1:
        raise InputError(f"expected checkpoint_every to be at least 1, got {every}")
    # the text of a program, which identities hold, is that of one version
    mine = json.loads(json.dumps({"jax version": jax.__version__, **identity()}))
    leaves, tree = jax.tree.flatten(state)
    with CheckpointStore(folder) as store:
        if not resume:
            store.clear()
        elif (saved := load_latest(folder)) is not None:
            if saved.state != mine:
                other = next((name for name in mine if mine[name] != saved.state.get(name)), "version")
                raise InputError(f"expected a checkpoint of this run in {str(folder)!r}, got one of other {other}")
            state = jax.tree.unflatten(tree, [jax.device_put(saved.arrays[str(i)]) for i in range(len(leaves))])
            first = saved.step
        for epoch in range(first, last, every):
            stop = min(epoch + every, last)
            state = advance(state, epoch, stop)
            store.save(stop, {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}, mine)
    return state


def program_text(function: Any, *arguments: Any) -> str:
    """SHA-256 of what jit compiles of `function` for these arguments: the network, objective, controller and all.

    Two functions of one name, or one function over other numbers, are other programs.
    """
    return hashlib.sha256(jax.jit(function).lower(*arguments).as_text().encode()).hexdigest()


def fingerprint(*trees: Any) -> str:
    """SHA-256 of the leaves' bytes: arrays, and keys of random numbers."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()
