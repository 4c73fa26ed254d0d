"""Training: spectra cached once, whole epochs as one scan, seeds side by side in one vmap, batches spread over devices.

Models of the frequency domain whose block is all they say (`direct`) train on blocks of modes: inputs and targets are
transformed once, and no transform is left in the loop. Others train on fields. Either way the loss is that of the
fields. An epoch's order comes from (seed, epoch) alone, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError, check_count
from isotone.transform_once import losses, metrics
from isotone.transform_once.operator import Operator, Unit
from isotone.transform_once.problem import check_pair, prepare

AXIS = "data"
SCHEDULES = ("step", "cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """The paper's recipe for Navier-Stokes (section 2.8): AdamW, the rate times `factor` after each `every` of the
    training; `schedule` "cosine" falls to 0 instead. `eps` of Adam stays at 1e-8: a head of 1e-8 has gradients of that
    size at first. `eval_every` epochs between two test errors (0: at the end alone)."""

    epochs: int = 500
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "step"
    every: float = 0.2
    factor: float = 0.5
    loss: str = "relative_l2"
    eps: float = 1e-8
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("eval_every", 0), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        losses.check_loss(self.loss)
        if self.schedule not in SCHEDULES:
            raise InputError(f"expected a schedule of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("lr", "every", "factor", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"expected a finite {name} above 0, got {getattr(self, name)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"expected a finite weight_decay of at least 0, got {self.weight_decay}")

    def rate(self, progress: Array) -> Array:
        """What `lr` is multiplied by when a share `progress` of the training is done."""
        if self.schedule == "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if self.schedule == "step":
            # the last epoch's share is below 1: 1e-6 keeps 0.6 / 0.2 at 3
            return self.factor ** jnp.floor(progress / self.every + 1e-6)
        return jnp.ones(())


@dataclass
class History:
    """`loss`: of each epoch; `tests`: (epoch, mean test relative L2, seconds of training until then); `seconds` of
    training without compiling; `compile_seconds`."""

    loss: list[float] = field(default_factory=list)
    tests: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0


def _copied(tree: Any) -> Any:
    # through the host: a copy on the device is a program for every shape
    return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), tree)


class _Loop(NamedTuple):
    """`params`, `rest` (statistics), `optimizer`: of one run, or stacked over runs."""

    params: Any
    rest: Any
    optimizer: Any


def _split(model: Operator) -> tuple[Any, Any, Any]:
    """Structure, weights, and the rest (statistics) of a module."""
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts


@functools.lru_cache(maxsize=32)
def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW but for the rate, which is traced."""
    return optax.chain(optax.scale_by_adam(eps=config.eps), optax.add_decayed_weights(config.weight_decay))


def _epoch(
    graph: Any,
    loss_fn: Callable[..., Array],
    config: TrainConfig,
    sharded: bool,
    loop: _Loop,
    arrays: dict[str, Array],
    rows: Array,
    lr: Array,
    epoch: Array,
    epochs: Array,
) -> tuple[_Loop, Array]:
    """One epoch over the batches of `rows` (batches, batch), a scan; on a mesh a share of each batch a device."""
    optimizer = _optimizer(config)
    if sharded:
        share = config.batch_size // jax.lax.axis_size(AXIS)
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * share, share, 1)

    def step(carry: _Loop, item: tuple[Array, Array]) -> tuple[_Loop, Array]:
        number, row = item
        batch = {name: array[row] for name, array in arrays.items()}

        def loss(params: Any) -> tuple[Array, Any]:
            model = nnx.merge(graph, params, carry.rest, copy=True)
            value = loss_fn(model, batch)
            return value, _split(model)[2]

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(carry.params)
        if sharded:
            gradient, value, rest = jax.lax.pmean((gradient, value, rest), AXIS)
        rate = lr * config.rate((epoch + number / rows.shape[0]) / epochs)
        updates, state = optimizer.update(gradient, carry.optimizer, carry.params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), carry.params, updates)
        return _Loop(params, rest, state), value

    loop, values = jax.lax.scan(step, loop, (jnp.arange(rows.shape[0]), rows))
    return loop, jnp.mean(values)


@functools.partial(jax.jit, static_argnums=0)
def _begun(config: TrainConfig, params: Any) -> Any:
    """The optimizer's state, by one program: by itself every leaf's zeros would be one."""
    return _optimizer(config).init(params)


@functools.lru_cache(maxsize=64)
def _program(
    graph: Any, loss: Any, recipe: TrainConfig, many: bool, mesh: Mesh | None, tree: Any, shapes: tuple[Any, ...]
) -> Any:
    """`_epoch`, compiled for arguments of these shapes; Trainers of equal models share it."""
    run: Callable[..., Any] = functools.partial(_epoch, graph, loss, recipe, mesh is not None)
    if many:
        run = jax.vmap(run, (0, None, 0, 0, None, None))
    if mesh is not None:
        none = PartitionSpec()
        run = jax.shard_map(run, mesh=mesh, in_specs=none, out_specs=none, check_vma=False)
    return jax.jit(run, donate_argnums=0).lower(*jax.tree.unflatten(tree, shapes)).compile()


class Trainer:
    """Trains one model, or the same model from several seeds at once (`seeds`), epoch by epoch.

    `rates`: a rate for each seed in place of the config's (a sweep in one vmap). `mesh`: one axis named "data"; not
    together with several seeds. Raises `InputError` on a batch larger than the data or that a mesh does not divide.
    """

    def __init__(
        self,
        model: Operator,
        inputs: np.ndarray,
        targets: np.ndarray,
        config: TrainConfig,
        *,
        seeds: Sequence[int] | None = None,
        rates: Sequence[float] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        # what is compiled in: the rest of the recipe is given to the program
        self.recipe = dataclasses.replace(config, epochs=1, lr=1.0, eval_every=0, seed=0)
        if len(inputs) < config.batch_size:
            raise InputError(f"expected a batch_size of at most {len(inputs)} samples, got {config.batch_size}")
        self.problem = prepare(model, inputs, targets, config.loss)
        self.batches = len(inputs) // config.batch_size
        self.many = seeds is not None
        self.seeds = list(seeds) if seeds is not None else [config.seed]
        self.rates = list(rates) if rates is not None else [config.lr] * len(self.seeds)
        if len(self.rates) != len(self.seeds) or not self.seeds:
            raise InputError(f"expected a rate for each of {len(self.seeds)} seeds, got {len(self.rates)}")
        if mesh is not None:
            self._check_mesh(mesh)
        copy = nnx.clone(model)
        copy.train()
        for _, module in nnx.iter_modules(copy):
            if isinstance(module, nnx.BatchNorm):
                module.axis_name = AXIS if mesh is not None else None
        self.graph, params, rest = _split(copy)
        self.loop = self._start(params, rest)
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            self.loop, arrays = jax.device_put((self.loop, self.problem.arrays), everywhere)
            self.problem = self.problem._replace(arrays=arrays)
        self.epoch = 0
        self._compiled: Callable[..., tuple[_Loop, Array]] | None = None

    def _check_mesh(self, mesh: Mesh) -> None:
        if self.many or mesh.axis_names != (AXIS,):
            raise InputError(f"expected one seed and a mesh of one axis named {AXIS}, got {mesh.axis_names}")
        if self.config.batch_size % mesh.size:
            raise InputError(f"expected a batch_size that {mesh.size} devices divide, got {self.config.batch_size}")

    def _start(self, params: Any, rest: Any) -> _Loop:
        init = functools.partial(_begun, self.recipe)
        if not self.many:
            # a copy: the program takes what it is given for its own
            params, rest = _copied((params, rest))
            return _Loop(params, rest, init(params))
        from isotone.transform_once.models import make_model

        parts = []
        for seed in self.seeds:
            made = make_model(self.model.config, seed)
            # the data's units, which are the same for all
            nnx.update(made, nnx.state(self.model, Unit))
            made.train()
            _, own, other = _split(made)
            parts.append(_Loop(own, other, init(own)))
        return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *parts)

    def run(self, epochs: int, total: int | None = None) -> np.ndarray:
        """Train `epochs` more of `total` (None: the config's): the loss of each, (epochs,) or (seeds, epochs)."""
        self.warm_up()
        assert self._compiled is not None
        found = []
        for _ in range(epochs):
            self.loop, loss = self._compiled(*self._arguments(total))
            self.epoch += 1
            found.append(loss)
        return np.stack(jax.device_get(found), -1) if found else np.zeros(0)

    def order(self, seed: int) -> np.ndarray:
        """The samples of each batch of this epoch, (batches, batch): from (seed, epoch) alone."""
        order = np.random.default_rng((seed, self.epoch)).permutation(len(self.problem.arrays["x"]))
        return order[: self.batches * self.config.batch_size].reshape(self.batches, -1).astype(np.int32)

    def _arguments(self, total: int | None) -> tuple[Any, ...]:
        total = self.config.epochs if total is None else total
        orders = [self.order(seed) for seed in self.seeds]
        return (
            *(self.loop, self.problem.arrays),
            np.stack(orders) if self.many else orders[0],
            np.asarray(self.rates if self.many else self.rates[0], np.float32),
            *(np.asarray(self.epoch, np.int32), np.asarray(total, np.float32)),
        )

    def warm_up(self) -> float:
        """Compile; the seconds that took, 0 the second time."""
        start = time.perf_counter()
        if self._compiled is None:
            leaves, tree = jax.tree.flatten(self._arguments(None))
            where = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
            shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for leaf in leaves)
            self._compiled = _program(self.graph, self.problem.loss, self.recipe, self.many, self.mesh, tree, shapes)
        return time.perf_counter() - start

    def memory(self) -> int:
        """Bytes that an epoch's program works in beside its arguments and results, as XLA plans them."""
        self.warm_up()
        plan: Any = self._compiled
        return int(plan.memory_analysis().temp_size_in_bytes)

    def seconds_per_epoch(self, seconds: float = 0.3) -> float:
        """Of epochs run for `seconds` or more, on a copy; the first of them does not count."""
        kept, epoch = jax.tree.map(lambda leaf: np.array(leaf), self.loop), self.epoch
        where = jax.tree.map(lambda leaf: leaf.sharding, self.loop)
        found = timed_epochs(self.run, seconds)
        self.loop, self.epoch = jax.device_put(kept, where), epoch
        return found

    def models(self) -> list[Operator]:
        """The trained models as they are now, one a seed."""
        if not self.many:
            return [nnx.merge(self.graph, *_copied((self.loop.params, self.loop.rest)))]
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], self.loop) for i in range(len(self.seeds))]
        return [nnx.merge(self.graph, loop.params, loop.rest) for loop in each]

    def check_loss(self, loss: np.ndarray) -> None:
        """Raises `InputError` where the loss is not finite."""
        if not np.isfinite(loss).all():
            raise InputError(f"expected a finite loss, got {float(loss.ravel()[-1])} in epoch {self.epoch}: lower lr")


def fit(
    model: Operator,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    config: TrainConfig | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    standardize: bool = True,
    progress: Callable[[int, float], None] | None = None,
    **settings: Any,
) -> History:
    """Train `model` in place on fields; `settings` are fields of `TrainConfig` where no `config` is given. What is
    left of an epoch's order when whole batches are taken is not used in that epoch.

    `standardize`: each channel by its mean and deviation in these fields from now on (`Operator.set_units`); without,
    the model sees the fields as they are, as the paper's runs do. `test`: fields to measure the relative L2 on, every
    `eval_every` epochs and at the end. `checkpoint`: a folder saved to every `checkpoint_every` epochs and, with
    `resume`, gone on from, to the bit on CPU. `progress(epoch, loss)`. Raises `InputError` as `Trainer` and `prepare`,
    on unknown settings, a loss that is not finite, a `test` that does not fit, and a checkpoint of another run; the
    model is then as it was.
    """
    config = config or train_config(**settings)
    check_count("checkpoint_every", checkpoint_every)
    check_pair(model, inputs, targets)
    if test is not None:
        check_pair(model, *test, what="test ")
    given = model
    if standardize:
        model = nnx.clone(model)
        model.set_units(inputs, targets)
    trainer = Trainer(model, inputs, targets, config, mesh=mesh)
    history = History()
    store = CheckpointStore(checkpoint) if checkpoint is not None else None
    if store is None:
        _train(trainer, history, test, checkpoint_every, None, "", progress)
    else:
        identity = run_identity(model, inputs, targets, config)
        with store:
            if resume:
                _restore(trainer, history, store, identity)
            else:
                store.clear()
            _train(trainer, history, test, checkpoint_every, store, identity, progress)
    trained = trainer.models()[0]
    for _, module in nnx.iter_modules(trained):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = None
    nnx.update(given, nnx.state(trained))
    return history


def train_config(**settings: Any) -> TrainConfig:
    """A `TrainConfig`. Raises `InputError` on a name that it does not have."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(settings) - known):
        raise InputError(f"expected settings of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return TrainConfig(**settings)


def _train(
    trainer: Trainer,
    history: History,
    test: tuple[np.ndarray, np.ndarray] | None,
    every: int,
    store: CheckpointStore | None,
    identity: str,
    progress: Callable[[int, float], None] | None,
) -> None:
    config = trainer.config
    if trainer.epoch < config.epochs:
        history.compile_seconds += trainer.warm_up()
    while trainer.epoch < config.epochs:
        start = time.perf_counter()
        loss = trainer.run(1)
        history.seconds += time.perf_counter() - start
        trainer.check_loss(loss)
        history.loss.append(float(loss[-1]))
        if progress is not None:
            progress(trainer.epoch, history.loss[-1])
        last = trainer.epoch == config.epochs
        if test is not None and (last or (config.eval_every and trainer.epoch % config.eval_every == 0)):
            error = float(metrics.relative_l2(trainer.models()[0].predict(test[0]), np.asarray(test[1])).mean())
            history.tests.append((trainer.epoch, error, history.seconds))
        if store is not None and (last or trainer.epoch % every == 0):
            state = {"identity": identity, "history": dataclasses.asdict(history), "epoch": trainer.epoch}
            store.save(trainer.epoch, _flat(trainer.loop), state)


def timed_epochs(run: Callable[[int], Any], seconds: float) -> float:
    """Seconds an epoch of `run(epochs)`, after one that does not count: twice as many each time until they fill
    `seconds`."""
    run(1)
    epochs = 1
    while True:
        start = time.perf_counter()
        run(epochs)
        spent = time.perf_counter() - start
        if spent >= seconds:
            return spent / epochs
        epochs *= 2


def _restore(trainer: Trainer, history: History, store: CheckpointStore, identity: str) -> None:
    saved = load_latest(store.directory)
    if saved is None:
        return
    if saved.state.get("identity") != identity:
        raise InputError(
            f"expected a checkpoint of this model, data and recipe in {str(store.directory)!r}, found another's"
        )
    trainer.loop = _unflat(trainer.loop, saved.arrays)
    trainer.epoch = saved.step
    old = saved.state["history"]
    history.loss, history.seconds = list(old["loss"]), old["seconds"]
    history.tests = [tuple(row) for row in old["tests"]]
    history.compile_seconds = old["compile_seconds"]


def run_identity(model: Operator, inputs: np.ndarray, targets: np.ndarray, config: TrainConfig) -> str:
    """A hash of what a run is made of: config, starting weights, data, recipe."""
    found = hashlib.sha256(repr((model.config, config)).encode())
    leaves = [*jax.tree.leaves(nnx.state(model)), inputs, targets]
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        found.update(repr((array.shape, str(array.dtype))).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _flat(loop: _Loop) -> dict[str, np.ndarray]:
    return {f"{number:05d}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(loop))}


def _unflat(loop: _Loop, arrays: dict[str, Any]) -> _Loop:
    leaves, tree = jax.tree.flatten(loop)
    if len(leaves) != len(arrays):
        raise InputError(f"expected a checkpoint of {len(leaves)} arrays, got {len(arrays)}")
    found = [jnp.asarray(arrays[f"{number:05d}"]).astype(leaf.dtype) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, found)
