"""Concrete Ticket Search: logits over masks are trained at frozen weights, then cut to the exact top k.

The whole search is one jitted loop. Density and the controller's multiplier are traced, so one compile serves every
density; several densities and seeds are vmapped; over a mesh the batch is spread by shard_map, and the result is that
of one device. Legend: g logits, D densities and S seeds side by side (no axis where there is one), T steps.
"""

from __future__ import annotations

import dataclasses
import functools
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

from isotone.concrete_tickets import batches
from isotone.concrete_tickets.batches import AXIS, check_mesh
from isotone.concrete_tickets.concrete import TAU, check_relaxation, initial_logit, relaxed_mask
from isotone.concrete_tickets.controllers import expected_density, global_norm, grad_balance, lagrangian
from isotone.concrete_tickets.layout import Layout, Params, Where, default_kernels, leaf_name, masked
from isotone.concrete_tickets.noise import logistic_noise
from isotone.concrete_tickets.objectives import (
    ApplyFn,
    Batch,
    FeaturesFn,
    Network,
    Objective,
    resolve_objective,
)
from isotone.concrete_tickets.resume import fingerprint, program_text, run_epochs
from isotone.concrete_tickets.ticket import LayerCollapse, Ticket
from isotone.shared.errors import InputError, check_count

HISTORY = ("objective", "density", "multiplier", "gradient")


@dataclass(frozen=True)
class SearchConfig:
    """How to search; the defaults are the paper's.

    `epochs` over the data in batches of `batch_size`. `lr`: Adam's, times 0.1 from `decay_at` of the epochs on.
    `tau`: the relaxation's temperature; `parametrization`: "scaled" or "standard" (concrete.py). `controller`:
    "grad_balance", "lagrangian", or an optax transformation that takes `density` and `sizes`. `structure`: "weight",
    "input", "output" or "N:M" (layout.py). `ranking`: "last" ranks by the final logits, "averaged" by their mean
    since `decay_at` (beyond the paper; less noise where good logits saturate alike). `cache_dense`: compute the dense
    logits once, "examples": of each example, for networks that see each alone, or "batches": of batches that stay the
    same, their order changing, for those that normalise over a batch. `eps`: Adam's; the gradients of single logits
    are tiny.
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
    cache_dense: str = "none"
    eps: float = 1e-15

    def __post_init__(self) -> None:
        check_relaxation(self.tau, self.parametrization)
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("lr", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"expected a finite {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.decay_at <= 1:
            raise InputError(f"expected decay_at in [0, 1], got {self.decay_at}")
        if self.ranking not in ("last", "averaged"):
            raise InputError(f"expected ranking to be last or averaged, got {self.ranking!r}")
        if self.cache_dense not in ("none", "examples", "batches"):
            raise InputError(f"expected cache_dense to be none, examples or batches, got {self.cache_dense!r}")
        if isinstance(self.controller, str) and self.controller not in ("grad_balance", "lagrangian"):
            message = "expected controller to be grad_balance, lagrangian or an optax transformation"
            raise InputError(f"{message}, got {self.controller!r}")


class SearchState(NamedTuple):
    """Everything that changes in a search. `logits`: by leaf, of the layout's group shapes, for each of the searches;
    `averaged`: their mean since the rate fell, for that ranking."""

    logits: dict[str, Array]
    optimizer: Any
    averaged: dict[str, Array] | None
    step: Array


@dataclass(frozen=True)
class SearchResult:
    """`ticket`; `logits` by leaf, as they were ranked; `history` by step (T,): objective, density (expected, of all
    weights), multiplier, gradient (the objective's norm), each as it was before the step."""

    ticket: Ticket
    logits: dict[str, Array]
    history: dict[str, np.ndarray]
    structure: str = "weight"

    def inverted(self) -> Ticket:
        """The ticket of as many weights with the LOWEST logits (of whole groups: at most as many)."""
        return self.ticket.invert(self.logits) if self.logits else self.ticket


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

    def share(self, index: Array) -> Array:
        """What of a batch (batch,) this device takes: all of it without a mesh."""
        return index if self.mesh is None else batches.share(index, AXIS, self.mesh.size)

    def inputs(self, inputs: Any) -> Any:
        """As the network takes them."""
        return inputs if self.prepare is None else self.prepare(inputs)


def init_state(spec: SearchSpec, density: Array | float) -> SearchState:
    """All logits at logit(density)."""
    shapes = zip(spec.layout.names, spec.layout.group_shapes, strict=True)
    logits = {name: jnp.full(shape, initial_logit(density)) for name, shape in shapes}
    averaged = logits if spec.config.ranking == "averaged" else None
    return SearchState(logits, spec.optimizer().init(logits), averaged, jnp.zeros((), jnp.int32))


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

    `batch`: as the network takes it. `key`: of the whole search; the step's noise is a function of it and
    `state.step`. `dense_logits`: the dense network's, where they are known. Returns the next state and the step's
    entries of the history. For loops of your own; `search` compiles them whole.
    """
    config, layout = spec.config, spec.layout
    objective, scale = resolve_objective(spec.objective)
    step_key = jax.random.fold_in(key, state.step)
    noise = layout.cut(logistic_noise(step_key, (layout.groups,)))
    axis = None if spec.mesh is None else AXIS
    make = functools.partial(Network, spec.apply_fn, names=layout.names, features_fn=spec.features_fn, axis_name=axis)
    dense = make(params, cached=dense_logits, known=batch.inputs)

    def value(logits: dict[str, Array]) -> Array:
        masks = {n: relaxed_mask(logits[n], noise[n], config.tau, config.parametrization) for n in layout.names}
        return scale * objective(make(masked(params, masks)), dense, batch, jax.random.fold_in(step_key, 1))

    loss, gradient = jax.value_and_grad(value)(state.logits)
    sizes = layout.cut(layout.sizes()) if layout.groups < layout.total else None
    updates, optimizer = spec.optimizer().update(gradient, state.optimizer, state.logits, density=density, sizes=sizes)
    logits = optax.apply_updates(state.logits, updates)
    averaged = state.averaged
    if averaged is not None:
        since = (state.step - spec.decay_step + 1).astype(jnp.float32)
        share = 1 / jnp.maximum(since, 1)
        averaged = jax.tree.map(lambda mean, new: mean + share * (new - mean), averaged, logits)
    metrics = {
        "objective": loss / scale,
        "density": expected_density(state.logits, sizes),
        "multiplier": getattr(optimizer[0], "multiplier", jnp.zeros(())),
        "gradient": global_norm(gradient) / scale,
    }
    return SearchState(logits, optimizer, averaged, state.step + 1), metrics


def search(
    apply_fn: ApplyFn,
    params: Params,
    data: Any,
    density: float | Sequence[float] | np.floating | np.ndarray | None,
    objective: str | Objective = "kl",
    *,
    key: Array | None = None,
    params_per_key: bool = False,
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
    share of prunable weights to keep, or several; `key`: one key, or an array (S,) of several (seeds). With several of
    either the searches run side by side, and a list is returned, a seed after another for each density; with
    `params_per_key` the leaves of `params` have a leading axis S, and each seed searches weights of its own.
    `objective`: a name of `OBJECTIVES` or a function. `config`, or any of its fields as keywords (`epochs=80`).
    `where(name, leaf)` chooses the prunable leaves; `prepare` is run on a batch's inputs inside jit; `features_fn` is
    needed for feature_mse. `mesh`: a one-axis mesh named "data" to spread batches over. `checkpoint`: a folder, in
    which the search is saved every `checkpoint_every` epochs and, with `resume`, continued.

    Raises `InputError` on a density not in (0, 1], no prunable leaf, an unknown objective, data that does not fit,
    an objective that is NaN (naming the batch) or that does not depend on the mask, and a checkpoint of another
    search. Warns with `LayerCollapse` where a layer keeps nothing.
    """
    known = [field.name for field in dataclasses.fields(SearchConfig)]
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(f"expected settings of {', '.join(known)}, got {', '.join(unknown)}")
    config = dataclasses.replace(config or SearchConfig(), **settings)
    resolve_objective(objective)
    keys = _typed(jax.random.key(0) if key is None else key)
    one = _of_one_key(params, keys) if params_per_key else params
    layout = Layout.of(one, where, config.structure)
    many_densities = isinstance(density, (list, tuple, np.ndarray)) and np.ndim(density) == 1
    if many_densities and not len(density):  # type: ignore[arg-type]
        raise InputError("expected a density, got none")
    targets = [layout.check_density(d) for d in (density if many_densities else [density])]  # type: ignore[union-attr,arg-type]
    check_mesh(mesh, config.batch_size)
    classes = batches.count_classes(apply_fn, one, data, prepare, mesh)
    inputs, labels = batches.check_data(data, config.batch_size, classes)
    steps = len(labels) // config.batch_size
    spec = SearchSpec(apply_fn, objective, layout, config, steps, features_fn, prepare, mesh)
    first = jax.tree.map(lambda leaf: leaf[0], params) if params_per_key else params
    if mesh is not None:
        batches.check_spread(apply_fn, first, inputs, prepare, mesh)
    if config.cache_dense == "examples":
        _check_alone(spec, first, inputs)
    _check_objective(spec, first, inputs, labels)

    sparse = [target for target in targets if target < 1]
    dense = SearchResult(Ticket(layout.expand_eagerly(np.ones(layout.groups, bool)), config.structure), {}, {})
    found: list[SearchResult] = []
    if sparse:
        each = [_batches(spec, k, len(labels)) for k in keys.reshape(-1)]
        order = jax.tree.map(lambda *parts: np.stack(parts) if keys.ndim else parts[0], *each)
        densities = np.asarray(sparse[0] if len(sparse) == 1 else sparse, np.float32)

        def advance(carry: Any, first: int, last: int) -> Any:
            state, history = _run(
                *(spec, params_per_key, params, inputs, labels, *carry, order, keys, densities),
                *(first, last),
            )
            _check_history(history, first * steps, last * steps, steps)
            return state, history

        def identity() -> dict[str, Any]:
            named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            named["controller"] = config.controller if isinstance(config.controller, str) else "custom"
            named["objective"] = objective if isinstance(objective, str) else "custom"
            arrays = {"weights, data, densities or keys": fingerprint(params, inputs, labels, densities, keys)}
            text = program_text(
                functools.partial(_run, spec, params_per_key),
                *(params, inputs, labels, *begun, order, keys, densities, 0, config.epochs),
            )
            return {**named, **dataclasses.asdict(layout), **arrays, "network, objective or controller": text}

        begun = _begin(spec, keys, densities)
        state, history = run_epochs(
            advance,
            begun,
            *(0, config.epochs),
            identity=identity,
            folder=checkpoint,
            every=checkpoint_every,
            resume=resume,
        )
        found = _results(spec, state, history, np.repeat(sparse, keys.size))
    queue = iter(found)
    results = [next(queue) if target < 1 else dense for target in targets for _ in range(keys.size)]
    for result in results:
        if empty := result.ticket.collapsed():
            message = f"no weight is kept in {', '.join(empty)} at density {result.ticket.density:.3g}"
            warnings.warn(message, LayerCollapse, stacklevel=2)
    return results if many_densities or keys.ndim else results[0]


def _results(spec: SearchSpec, state: SearchState, history: Any, targets: Any) -> list[SearchResult]:
    """A result for each search, in the order of `targets`."""
    leaves = state.logits if state.averaged is None else state.averaged
    ranked = np.concatenate([np.asarray(leaves[n]).reshape(len(targets), -1) for n in spec.layout.names], axis=1)
    history = {name: np.asarray(values).reshape(len(ranked), -1) for name, values in history.items()}
    found = []
    for number, target in enumerate(targets):
        mask = spec.layout.select(ranked[number], None if spec.layout.n_of_m else float(target))
        logits = spec.layout.expand_eagerly(ranked[number])
        steps = {name: values[number] for name, values in history.items()}
        ticket = Ticket(spec.layout.expand_eagerly(mask), spec.layout.structure)
        found.append(SearchResult(ticket, logits, steps, spec.layout.structure))
    return found


def _typed(key: Array) -> Array:
    """A key () or several (S,), also where they came as raw numbers."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise InputError(f"expected a key such as jax.random.key(0), got {key!r}")
    keys = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if keys.ndim > 1 or keys.size == 0:
        raise InputError(f"expected a key or an array of keys, got keys of shape {keys.shape}")
    return keys


def _of_one_key(params: Params, keys: Array) -> Params:
    """The shapes of one seed's weights."""

    def cut(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        if keys.ndim == 0 or leaf.ndim == 0 or leaf.shape[0] != keys.size:
            message = f"expected {leaf_name(path)} with a leading axis of {keys.size}, a key each"
            raise InputError(f"{message}, got shape {leaf.shape} and keys of shape {keys.shape}")
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return jax.tree_util.tree_map_with_path(cut, params)


def _check_alone(spec: SearchSpec, params: Params, inputs: Any) -> None:
    """Refuse to cache by example what depends on the rest of the batch."""
    together, alone = (
        np.asarray(logits) for logits in _together_and_alone(spec.apply_fn, spec.prepare, params, inputs)
    )
    if np.abs(together - alone).max() > 1e-3 * (1 + np.abs(alone).max()):
        raise InputError('expected cache_dense="batches": the logits of an example depend on the others of its batch')


def _check_objective(spec: SearchSpec, params: Params, inputs: Any, labels: Array) -> None:
    """Refuse an objective that is no scalar, or that each device of a mesh has another of."""
    objective, _ = resolve_objective(spec.objective)
    if isinstance(spec.objective, str):
        return
    axis = None if spec.mesh is None else AXIS
    names, shapes = spec.layout.names, spec.layout.shapes
    # at masks of a half: a distance to the dense network is 0 at the dense one, on every device
    half = {name: np.full(shape, 0.5, np.float32) for name, shape in zip(names, shapes, strict=True)}

    def values(params: Params, inputs: Any, labels: Array) -> Array:
        batch = Batch(spec.inputs(inputs), labels)
        weights = masked(params, half), params
        made = [Network(spec.apply_fn, w, names, spec.features_fn, axis) for w in weights]
        value = objective(made[0], made[1], batch, jax.random.key(0))
        if not (hasattr(value, "shape") or isinstance(value, (int, float))):
            raise InputError(f"expected an objective that gives a scalar, got {type(value).__name__}")
        return jnp.asarray(value)[None]

    size = spec.config.batch_size
    arguments = params, inputs[:size], labels[:size]
    if spec.mesh is None:
        shape = jax.eval_shape(values, *arguments).shape
        if shape != (1,):
            raise InputError(f"expected an objective that gives a scalar, got shape {shape[1:]}")
        return
    mesh = spec.mesh

    def gathered(params: Params, inputs: Any, labels: Array) -> Array:
        mine = values(params, *(batches.share(part, AXIS, mesh.size) for part in (inputs, labels)))
        return jax.lax.all_gather(mine, AXIS, tiled=True)

    found = np.asarray(jax.jit(batches.everywhere(gathered, mesh))(*arguments))
    if found.shape != (spec.mesh.size,):
        raise InputError(f"expected an objective that gives a scalar, got shape {found.shape[1:]}")
    if not np.allclose(found, found[0], rtol=1e-5, equal_nan=True):
        message = "expected an objective that is one number on a mesh (means by `masked.mean`, or pmean over data)"
        raise InputError(f"{message}, got {found.tolist()}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _together_and_alone(apply_fn: ApplyFn, prepare: Any, params: Params, inputs: Any) -> tuple[Array, Array]:
    """The first example's logits in a batch of two, and alone."""
    two = inputs[:2] if prepare is None else prepare(inputs[:2])
    return apply_fn(params, two)[:1], apply_fn(params, two[:1])


def _batches(spec: SearchSpec, key: Array, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches (R, batch_size) of examples, and which of them each epoch takes (epochs, steps).

    Batch statistics make a dense output depend on its batch: where batches are cached, each epoch takes those of the
    first in another order.
    """
    epochs, steps = spec.config.epochs, spec.steps_per_epoch
    if spec.config.cache_dense == "batches":
        order = np.concatenate([batches.epoch_order(key, epoch, steps, 1).T for epoch in range(1, epochs + 1)])
        return batches.epoch_order(key, 0, examples, spec.config.batch_size), order
    rows = [batches.epoch_order(key, epoch, examples, spec.config.batch_size) for epoch in range(epochs)]
    return np.concatenate(rows), np.arange(epochs * steps, dtype=np.int32).reshape(epochs, steps)


@functools.partial(jax.jit, static_argnums=0)
def _begin(spec: SearchSpec, keys: Array, densities: Array) -> tuple[SearchState, dict[str, Array]]:
    """The states at the start, and a history to be filled."""
    init = functools.partial(init_state, spec)
    if keys.ndim:
        init = jax.vmap(init, None, axis_size=keys.size)
    if densities.ndim:
        init = jax.vmap(init)
    shape = (*densities.shape, *keys.shape, spec.config.epochs * spec.steps_per_epoch)
    return init(densities), {name: jnp.zeros(shape) for name in HISTORY}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    spec: SearchSpec,
    params_per_key: bool,
    params: Params,
    inputs: Any,
    labels: Array,
    state: SearchState,
    history: dict[str, Array],
    order: tuple[Array, Array],
    keys: Array,
    densities: Array,
    first: Array,
    last: Array,
) -> tuple[SearchState, dict[str, Array]]:
    """Epochs `first` to `last` of all searches; history (*DS, T)."""
    many = functools.partial(_epochs, spec)
    if keys.ndim:
        many = jax.vmap(many, (0 if params_per_key else None, None, None, 0, 0, 0, 0, None, None, None))
    if densities.ndim and not (keys.ndim and spec.mesh is not None):
        many = jax.vmap(many, (None, None, None, 0, 0, None, None, 0, None, None))
    elif densities.ndim:
        many = functools.partial(_in_turn, many)  # JAX knows no convolution of two batched axes on a mesh
    if spec.mesh is not None:
        # everything is the same on every device but the share of the batch that it takes
        many = jax.shard_map(many, mesh=spec.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return many(params, inputs, labels, state, history, order, keys, densities, first, last)


def _in_turn(one, params, inputs, labels, state, history, order, keys, densities, first, last):
    """`one` for each density, one after another in the same program."""

    def run(item):
        state, history, density = item
        return one(params, inputs, labels, state, history, order, keys, density, first, last)

    return jax.lax.map(run, (state, history, densities))


def _epochs(spec, params, inputs, labels, state, history, rows_and_order, key, density, first, last):
    rows, order = rows_and_order
    table = None

    def dense(index):
        return spec.apply_fn(params, spec.inputs(inputs[index]))

    if spec.config.cache_dense == "batches":
        table = jax.lax.map(lambda index: dense(spec.share(index)), rows)
    elif spec.config.cache_dense == "examples":
        every, size = jnp.arange(labels.shape[0]), spec.config.batch_size
        table = jax.lax.map(lambda example: dense(example[None])[0], every, batch_size=size)

    def step(state, row):
        index = spec.share(rows[row])
        batch = Batch(spec.inputs(inputs[index]), labels[index])
        cached = None if table is None else table[row if spec.config.cache_dense == "batches" else index]
        return search_step(spec, params, state, batch, key, density, cached)

    def epoch(number, carry):
        state, history = carry
        state, metrics = jax.lax.scan(step, state, order[number])

        def put(whole, part):
            return jax.lax.dynamic_update_slice(whole, part, (number * spec.steps_per_epoch,))

        return state, jax.tree.map(put, history, metrics)

    return jax.lax.fori_loop(first, last, epoch, (state, history))


def _check_history(history: dict[str, Array], first: int, last: int, steps_per_epoch: int) -> None:
    """Refuse what is not finite in the steps from `first` to `last`, and a first gradient of 0."""
    objective, gradient = (
        np.asarray(history[name]).reshape(-1, history[name].shape[-1])[:, first:last]
        for name in ("objective", "gradient")
    )
    bad = ~(np.isfinite(objective) & np.isfinite(gradient)).all(axis=0)
    if bad.any():
        step = first + int(np.argmax(bad))
        epoch, batch = divmod(step, steps_per_epoch)
        message = f"batch {batch} of epoch {epoch} (step {step})"
        value = objective[:, step - first].tolist()
        raise InputError(f"expected a finite objective and gradient, got {value} at {message}")
    if first == 0 and (gradient[:, 0] == 0).any():
        raise InputError("expected an objective that depends on the mask, got a gradient of 0 at the first step")
