"""Concrete Ticket Search: logits over masks are trained at frozen weights, then cut to the exact top k.

The whole search is one jitted scan. Density and the controller's multiplier are traced, so one compile serves every
density; several densities and seeds are one vmapped scan; over a mesh the batch is spread by shard_map, and the result
is that of one device. Legend: g logits, B searches side by side, T steps.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from isotone.concrete_tickets import batches
from isotone.concrete_tickets.concrete import TAU, check_relaxation, initial_logit, logistic_noise, relaxed_mask
from isotone.concrete_tickets.controllers import grad_balance, lagrangian
from isotone.concrete_tickets.layout import Layout, Params, Where, default_kernels, kept_count, masked
from isotone.concrete_tickets.objectives import (
    ApplyFn,
    Batch,
    FeaturesFn,
    Network,
    Objective,
    resolve_objective,
)
from isotone.concrete_tickets.ticket import LayerCollapse, Ticket
from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError

AXIS = "data"
"""The mesh axis that a network's own means over the batch run over (`axis_name`), when searched on a mesh."""


@dataclass(frozen=True)
class SearchConfig:
    """How to search; the defaults are the paper's.

    `epochs` over the data in batches of `batch_size`. `lr`: Adam's, times 0.1 from `decay_at` of the epochs on.
    `tau`: the relaxation's temperature; `parametrization`: "scaled" or "standard" (concrete.py). `controller`:
    "grad_balance", "lagrangian", or an optax transformation that takes `density` and `sizes`. `structure`: "weight",
    "input", "output" or "N:M" (layout.py). `ranking`: "last" ranks by the final logits, "averaged" by their mean
    since `decay_at` (beyond the paper; less noise where good logits saturate alike). `cache_dense`: fix the batches
    and compute the dense outputs once. `eps`: Adam's; the gradients of single logits are tiny.
    """

    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    decay_at: float = 0.88
    tau: float = TAU
    parametrization: str = "scaled"
    controller: str | optax.GradientTransformationExtraArgs = "grad_balance"
    structure: str = "weight"
    ranking: str = "last"
    cache_dense: bool = False
    eps: float = 1e-15

    def __post_init__(self) -> None:
        check_relaxation(self.tau, self.parametrization)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        for name in ("lr", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"expected a finite {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.decay_at <= 1:
            raise InputError(f"expected decay_at in [0, 1], got {self.decay_at}")
        if self.ranking not in ("last", "averaged"):
            raise InputError(f"expected ranking to be last or averaged, got {self.ranking!r}")
        if isinstance(self.controller, str) and self.controller not in ("grad_balance", "lagrangian"):
            message = "expected controller to be grad_balance, lagrangian or an optax transformation"
            raise InputError(f"{message}, got {self.controller!r}")


class SearchState(NamedTuple):
    """Everything that changes in a search. `averaged` (g): the mean of the logits since the rate fell."""

    logits: Float[Array, "*B g"]
    optimizer: Any
    averaged: Float[Array, "*B g"]
    step: Array


@dataclass(frozen=True)
class SearchResult:
    """`ticket`; `logits` by leaf, as they were ranked; `history` by step (T,): objective, density (expected, of all
    weights), multiplier, gradient (the objective's norm)."""

    ticket: Ticket
    logits: dict[str, Array]
    history: dict[str, np.ndarray]

    def inverted(self) -> Ticket:
        """The ticket of as many weights with the LOWEST logits."""
        return self.ticket.invert(self.logits)


@dataclass(frozen=True, eq=True)
class SearchSpec:
    """What is compiled: the network, the objective and the configuration. Hashable; functions by identity."""

    apply_fn: ApplyFn
    objective: str | Objective
    layout: Layout
    config: SearchConfig
    steps_per_epoch: int
    features_fn: FeaturesFn | None = None
    prepare: Any = None
    mesh: Mesh | None = None

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Controller, then Adam whose rate falls to a tenth at int(decay_at * epochs)."""
        controller = self.config.controller
        if controller == "grad_balance":
            controller = grad_balance()
        elif controller == "lagrangian":
            tenth = 0.1 if self.objective == "feature_mse" else 1.0
            controller = lagrangian(0.01 * self.config.lr * tenth)
        rate = optax.piecewise_constant_schedule(self.config.lr, {self.decay_step: 0.1})
        return optax.chain(controller, optax.adam(rate, eps=self.config.eps))

    @property
    def decay_step(self) -> int:
        return int(self.config.decay_at * self.config.epochs) * self.steps_per_epoch


def init_state(spec: SearchSpec, density: Array | float) -> SearchState:
    """All logits at logit(density)."""
    logits = jnp.full(spec.layout.groups, initial_logit(density))
    return SearchState(logits, spec.optimizer().init(logits), logits, jnp.zeros((), jnp.int32))


def search_step(
    spec: SearchSpec,
    params: Params,
    state: SearchState,
    batch: Batch,
    key: Array,
    density: Array | float,
    dense_logits: Array | None = None,
) -> tuple[SearchState, dict[str, Array]]:
    """One step (sections 2.1 to 2.3): sample a mask, differentiate the objective, balance, Adam.

    `key`: of the whole search; the step's noise is a function of it and `state.step`. `dense_logits`: the dense
    network's, where they are known. Returns the next state and the step's entries of the history. For loops of your
    own; `search` scans it.
    """
    config, layout = spec.config, spec.layout
    objective, scale = resolve_objective(spec.objective)
    step_key = jax.random.fold_in(key, state.step)
    noise = logistic_noise(step_key, state.logits.shape)
    axis = None if spec.mesh is None else AXIS
    inputs = batch.inputs if spec.prepare is None else spec.prepare(batch.inputs)
    batch = Batch(inputs, batch.labels)
    make = functools.partial(Network, spec.apply_fn, names=layout.names, features_fn=spec.features_fn, axis_name=axis)
    dense = make(params, cached=dense_logits)

    def value(logits: Array) -> Array:
        mask = relaxed_mask(logits, noise, config.tau, config.parametrization)
        sparse = make(masked(params, layout.expand(mask)))
        return scale * objective(sparse, dense, batch, jax.random.fold_in(step_key, 1))

    loss, gradient = jax.value_and_grad(value)(state.logits)
    sizes = layout.sizes()
    updates, optimizer = spec.optimizer().update(gradient, state.optimizer, state.logits, density=density, sizes=sizes)
    logits = optax.apply_updates(state.logits, updates)
    since = (state.step - spec.decay_step + 1).astype(jnp.float32)
    averaged = jnp.where(since <= 1, logits, state.averaged + (logits - state.averaged) / jnp.maximum(since, 1))
    metrics = {
        "objective": loss / scale,
        "density": jnp.sum(jax.nn.sigmoid(logits) * sizes) / layout.total,
        "multiplier": getattr(optimizer[0], "multiplier", jnp.zeros(())),
        "gradient": jnp.sqrt(jnp.sum(jnp.square(gradient))) / scale,
    }
    return SearchState(logits, optimizer, averaged, state.step + 1), metrics


def search(
    apply_fn: ApplyFn,
    params: Params,
    data: Any,
    density: float | Sequence[float] | None,
    objective: str | Objective = "kl",
    *,
    key: Array | None = None,
    config: SearchConfig | None = None,
    where: Where = default_kernels,
    features_fn: FeaturesFn | None = None,
    prepare: Any = None,
    mesh: Mesh | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    **settings: Any,
) -> Any:
    """A ticket for `params`, which stay as they are: a `SearchResult`.

    `apply_fn(params, inputs) -> logits (n, classes)`; `data`: (inputs, labels), whole on the device. `density`: the
    share of prunable weights to keep, or several; `key`: one key, or an array of several (seeds). With several of
    either the searches run side by side, and a list is returned, a seed after another for each density. `objective`:
    a name of `OBJECTIVES` or a function. `config`, or any of its fields as keywords (`epochs=80`). `where(name,
    leaf)` chooses the prunable leaves; `prepare` is run on a batch's inputs inside jit; `features_fn` is needed for
    feature_mse. `mesh`: a one-axis mesh named "data" to spread batches over. `checkpoint`: a folder, in which the
    search is saved every `checkpoint_every` epochs and, with `resume`, continued.

    Raises `InputError` on a density not in (0, 1], no prunable leaf, an unknown objective, data that does not fit,
    an objective that is NaN (naming the batch) or that does not depend on the mask, and a checkpoint of another
    search. Warns with `LayerCollapse` where a layer keeps nothing.
    """
    config = dataclasses.replace(config or SearchConfig(), **settings)
    resolve_objective(objective)
    layout = Layout.of(params, where, config.structure)
    several = isinstance(density, (list, tuple)) or (key is not None and _stacked(key))
    wanted_densities: Sequence[Any] = density if isinstance(density, (list, tuple)) else [density]
    targets = [_target(layout, d) for d in wanted_densities]
    keys = jax.random.key(0) if key is None else key
    keys = keys if _stacked(keys) else keys[None]
    inputs, labels = batches.check_data(data, config.batch_size, _classes(apply_fn, params, data, prepare, mesh))
    if mesh is not None and (mesh.axis_names != (AXIS,) or config.batch_size % mesh.size):
        message = f"expected a mesh with one axis {AXIS!r} whose devices divide the batch of {config.batch_size}"
        raise InputError(f"{message}, got {dict(mesh.shape)}")
    steps = len(labels) // config.batch_size
    spec = SearchSpec(apply_fn, objective, layout, config, steps, features_fn, prepare, mesh)
    pairs = [(target, k) for target in targets for k in keys]
    open_pairs = [(target, k) for target, k in pairs if target < 1]
    found: list[SearchResult] = []
    if open_pairs:
        wanted = jnp.asarray([target for target, _ in open_pairs], jnp.float32)
        stacked = jnp.stack([k for _, k in open_pairs])
        state = jax.vmap(functools.partial(init_state, spec))(wanted)
        identity = _identity(spec, params, inputs, labels, wanted, stacked) if checkpoint is not None else {}
        with _Chunks(checkpoint, identity, resume, state) as chunks:
            every = checkpoint_every if checkpoint is not None else config.epochs
            for first in range(chunks.epoch, config.epochs, every):
                count = min(every, config.epochs - first)
                state, history = _run(
                    spec, count, params, inputs, labels, chunks.state, stacked, wanted, jnp.asarray(first)
                )
                _check_history(history, first * steps, steps)
                chunks.add(first + count, state, history)
        for b, (target, _) in enumerate(open_pairs):
            ranked = (chunks.state.averaged if config.ranking == "averaged" else chunks.state.logits)[b]
            given = None if layout.n_of_m else target
            mask = layout.select(ranked, given)
            found.append(
                SearchResult(
                    Ticket(layout.expand_eagerly(mask)),
                    layout.expand_eagerly(ranked),
                    {name: values[b] for name, values in chunks.history.items()},
                )
            )
    whole = SearchResult(Ticket.dense(params, where), {}, {})
    queue = iter(found)
    results = [next(queue) if target < 1 else whole for target, _ in pairs]
    for result in results:
        if empty := result.ticket.collapsed():
            message = f"no weight is kept in {', '.join(empty)} at density {result.ticket.density:.3g}"
            warnings.warn(message, LayerCollapse, stacklevel=2)
    return results if several else results[0]


def _target(layout: Layout, density: float | None) -> float:
    """The density to hold. For "N:M" it is N/M, which may also be given."""
    if layout.n_of_m is not None:
        n, m = layout.n_of_m
        if density is not None and not math.isclose(density, n / m):
            raise InputError(f"expected density {n / m:g} for structure {layout.structure}, got {density}")
        return n / m
    if density is None:
        raise InputError(f"expected a density for structure {layout.structure!r}, got None")
    kept_count(density, layout.total)
    return float(density)


def _stacked(key: Array) -> bool:
    return key.ndim == 1 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.ndim == 2


def _classes(apply_fn: ApplyFn, params: Params, data: Any, prepare: Any, mesh: Mesh | None) -> int | None:
    """How many classes the network tells apart; None on a mesh, whose axis only exists inside shard_map."""
    if mesh is not None or not (isinstance(data, (tuple, list)) and len(data) == 2):
        return None
    inputs = jnp.asarray(data[0][:1])
    shape = jax.eval_shape(lambda p, x: apply_fn(p, x if prepare is None else prepare(x)), params, inputs).shape
    if len(shape) != 2:
        raise InputError(f"expected apply_fn to give logits (n, classes), got shape {shape}")
    return shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    spec: SearchSpec,
    epochs: int,
    params: Params,
    inputs: Any,
    labels: Array,
    state: SearchState,
    keys: Array,
    densities: Array,
    first_epoch: Array,
) -> tuple[SearchState, dict[str, Array]]:
    """`epochs` epochs of the B searches; history (B, T)."""
    one = functools.partial(_scan, spec, epochs)
    # a batch dimension of 1 costs the products their plain form
    if keys.shape[0] == 1:

        def many(params, inputs, labels, state, keys, densities, first):
            state, key = jax.tree.map(lambda x: x[0], state), keys[0]
            return jax.tree.map(lambda x: x[None], one(params, inputs, labels, state, key, densities[0], first))
    else:
        many = jax.vmap(one, (None, None, None, 0, 0, 0, None))
    if spec.mesh is not None:
        # everything is the same on every device but the share of the batch that it takes
        many = jax.shard_map(many, mesh=spec.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return many(params, inputs, labels, state, keys, densities, first_epoch)


def _scan(spec, epochs, params, inputs, labels, state, key, density, first_epoch):
    config, n = spec.config, labels.shape[0]
    axis, devices = (None, 1) if spec.mesh is None else (AXIS, spec.mesh.size)
    order_key, noise_key = jax.random.split(key)
    fixed, table = None, None
    if config.cache_dense:
        # batch statistics make a dense output depend on its batch: the batches stay, their order changes
        fixed = batches.epoch_order(order_key, 0, n, config.batch_size)

        def dense(index):
            batch = batches.take(inputs, labels, index, axis, devices)
            return spec.apply_fn(params, batch.inputs if spec.prepare is None else spec.prepare(batch.inputs))

        table = jax.lax.map(dense, fixed)

    def step(state, item):
        if fixed is None:
            batch, cached = batches.take(inputs, labels, item, axis, devices), None
        else:
            batch, cached = batches.take(inputs, labels, fixed[item], axis, devices), table[item]
        return search_step(spec, params, state, batch, noise_key, density, cached)

    def epoch(state, number):
        if fixed is None:
            items = batches.epoch_order(order_key, number, n, config.batch_size)
        else:
            items = jax.random.permutation(jax.random.fold_in(order_key, number), spec.steps_per_epoch)
        return jax.lax.scan(step, state, items)

    state, history = jax.lax.scan(epoch, state, first_epoch + jnp.arange(epochs))
    return state, jax.tree.map(lambda x: x.reshape(-1), history)


def _check_history(history: dict[str, Array], first_step: int, steps_per_epoch: int) -> None:
    objective, gradient = np.asarray(history["objective"]), np.asarray(history["gradient"])
    bad = ~(np.isfinite(objective) & np.isfinite(gradient)).all(axis=0)
    if bad.any():
        step = first_step + int(np.argmax(bad))
        epoch, batch = divmod(step, steps_per_epoch)
        message = f"batch {batch} of epoch {epoch} (step {step})"
        value = objective[:, step - first_step].tolist()
        raise InputError(f"expected a finite objective and gradient, got {value} at {message}")
    if first_step == 0 and (gradient[:, 0] == 0).any():
        raise InputError("expected an objective that depends on the mask, got a gradient of 0 at the first step")


def _identity(spec: SearchSpec, *arrays: Any) -> dict[str, Any]:
    """What a checkpoint belongs to: a change of any of it is another search."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    config = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(spec.config)}
    config["controller"] = config["controller"] if isinstance(config["controller"], str) else "custom"
    name = spec.objective if isinstance(spec.objective, str) else getattr(spec.objective, "__qualname__", "custom")
    layout = dataclasses.asdict(spec.layout)
    return json.loads(json.dumps({"objective": name, "layout": layout, "arrays": digest.hexdigest(), **config}))


class _Chunks:
    """State and history so far; with a folder, on the disk after each chunk."""

    def __init__(self, folder: str | Path | None, identity: dict[str, Any], resume: bool, state: SearchState) -> None:
        self.folder, self.identity, self.resume = folder, identity, resume
        self.state, self.epoch = state, 0
        self.history: dict[str, np.ndarray] = {}
        self._store = None if folder is None else CheckpointStore(folder)

    def __enter__(self) -> _Chunks:
        if self._store is None:
            return self
        self._store.__enter__()
        try:
            if not self.resume:
                self._store.clear()
            elif self.folder is not None and (saved := load_latest(self.folder)) is not None:
                self._restore(saved)
        except BaseException:
            self._store.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._store is not None:
            self._store.__exit__(*exception)

    def _restore(self, saved: Any) -> None:
        if saved.state["identity"] != self.identity:
            theirs = saved.state["identity"]
            other = next((n for n in self.identity if self.identity[n] != theirs.get(n)), "version")
            what = "weights, data, densities or keys" if other == "arrays" else f"{other} {theirs.get(other)!r}"
            raise InputError(f"expected a checkpoint of this search in {str(self.folder)!r}, got one of other {what}")
        leaves, tree = jax.tree.flatten(self.state)
        restored = [jnp.asarray(saved.arrays[f"state-{i}"]) for i in range(len(leaves))]
        self.state = jax.tree.unflatten(tree, restored)
        self.history = {n.removeprefix("history-"): a for n, a in saved.arrays.items() if n.startswith("history-")}
        self.epoch = saved.step

    def add(self, epoch: int, state: SearchState, history: dict[str, Array]) -> None:
        self.state, self.epoch = state, epoch
        new = {name: np.asarray(values) for name, values in history.items()}
        joined = {n: np.concatenate([self.history[n], v], 1) for n, v in new.items()} if self.history else new
        self.history = joined
        if self._store is not None:
            arrays = {f"state-{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            arrays |= {f"history-{name}": values for name, values in joined.items()}
            self._store.save(epoch, arrays, {"identity": self.identity})
