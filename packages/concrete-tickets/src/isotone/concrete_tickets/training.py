"""Training a dense or a sparse network: one jitted loop over the data set on the device, the same for both.

One compile serves every mask and every span of epochs: masks, the first and the last epoch are traced. Recipe "sum"
is the authors': the gradient of the SUMMED cross-entropy, clipped to norm 2, which is nearly always active, so the
steps are close to normalised-gradient SGD; "mean" is ordinary SGD.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from isotone.concrete_tickets import batches
from isotone.concrete_tickets.batches import AXIS, check_mesh
from isotone.concrete_tickets.layout import Params
from isotone.concrete_tickets.objectives import ApplyFn
from isotone.concrete_tickets.optimizer import mask_optimizer
from isotone.concrete_tickets.resume import fingerprint, program_text, run_epochs
from isotone.concrete_tickets.ticket import Ticket
from isotone.shared.errors import InputError, check_count


@dataclass(frozen=True)
class Recipe:
    """One training. `milestones`: shares of the epochs at which the rate falls to a tenth; `warmup` epochs of a rate
    that rises linearly; `reduction`: "sum" or "mean" of the batch's cross-entropies; `clip`: global gradient norm
    (None: none), before weight decay, which falls on every parameter."""

    epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = 2.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: int = 0
    reduction: str = "sum"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"expected a finite {name} of at least 0, got {getattr(self, name)}")
        if self.lr == 0:
            raise InputError("expected lr above 0, got 0")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"expected clip above 0 or None, got {self.clip}")
        if self.reduction not in ("sum", "mean"):
            raise InputError(f"expected reduction to be sum or mean, got {self.reduction!r}")
        if any(not 0 <= m <= 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise InputError(f"expected milestones in [0, 1], rising, got {self.milestones}")

    def rate(self, epoch: Array | int) -> Array:
        """The learning rate of an epoch."""
        falls = [int(m * self.epochs) for m in self.milestones]
        rate = self.lr * 0.1 ** sum((jnp.asarray(epoch) >= fall).astype(jnp.float32) for fall in falls)
        return jnp.asarray(rate * (jnp.minimum(1.0, (epoch + 1) / self.warmup) if self.warmup else 1.0))

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """SGD as torch's: clip, add decay, momentum; `learning_rate` comes with each update."""
        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)

        def scale(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any) -> tuple[Any, Any]:
            return jax.tree.map(lambda u: -learning_rate * u, updates), state

        rate = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale)
        return optax.chain(clip, optax.add_decayed_weights(self.weight_decay), optax.trace(self.momentum), rate)


@dataclass(frozen=True)
class Trainer:
    """What is trained, and how: hashable, functions by identity.

    `prepare` is run on a batch's inputs inside jit (uint8 to float), `augment(key, inputs)` after it, in training
    alone. `mesh`: a one-axis mesh named "data" to spread batches over.
    """

    apply_fn: ApplyFn
    recipe: Recipe
    prepare: Callable[[Any], Any] | None = None
    augment: Callable[[Array, Any], Any] | None = None
    mesh: Mesh | None = None


@dataclass(frozen=True)
class Trained:
    """`params` after the last epoch; `optimizer`: its state, to go on with; `losses`: mean CE of each epoch run."""

    params: Params
    optimizer: Any
    losses: np.ndarray


def train(
    trainer: Trainer,
    params: Params,
    data: Any,
    *,
    key: Array | None = None,
    ticket: Ticket | None = None,
    first: int = 0,
    last: int | None = None,
    optimizer: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
) -> Trained:
    """Train epochs `first` to `last` (left out; None: the recipe's end) of the recipe's schedule.

    With a `ticket` only its weights live: the others are exactly 0 throughout. `optimizer`: state to go on with; a
    fresh one otherwise. `checkpoint`: a folder in which the training is saved every `checkpoint_every` epochs and,
    with `resume`, continued to the bit-identical end (CPU). Raises `InputError` on a ticket or data that does not
    fit, a loss that is not finite (naming the epoch), and a checkpoint of another training.
    """
    recipe = trainer.recipe
    last = recipe.epochs if last is None else last
    if not 0 <= first <= last <= recipe.epochs:
        raise InputError(f"expected epochs within 0 to {recipe.epochs}, got {first} to {last}")
    check_mesh(trainer.mesh, recipe.batch_size)
    classes = batches.count_classes(trainer.apply_fn, params, data, trainer.prepare, trainer.mesh)
    inputs, labels = batches.check_data(data, recipe.batch_size, classes)
    if trainer.mesh is not None:
        batches.check_spread(trainer.apply_fn, params, inputs, trainer.prepare, trainer.mesh)
    key = jax.random.key(0) if key is None else key
    masks = {}
    if ticket is not None:
        params, masks = ticket.apply(params), ticket.masks
    if optimizer is None:
        optimizer = _init(recipe, params)

    # only the rows of the epochs to run are filled: the shape is that of every span
    order = np.zeros((recipe.epochs, len(labels) // recipe.batch_size, recipe.batch_size), np.int32)

    def advance(state: Any, epoch: int, stop: int) -> Any:
        for number in range(epoch, stop):
            order[number] = batches.epoch_order(key, number, len(labels), recipe.batch_size)
        state = _run(trainer, state, masks, inputs, labels, order, key, epoch, stop)
        _check_losses(state[2], epoch, stop)
        return state

    def identity() -> dict[str, Any]:
        arrays = {"weights, ticket, optimizer, data or key": fingerprint(params, masks, optimizer, inputs, labels, key)}
        losses = np.zeros(recipe.epochs, np.float32)
        text = program_text(
            functools.partial(_run, trainer),
            (params, optimizer, losses),
            masks,
            inputs,
            labels,
            order,
            key,
            first,
            last,
        )
        return {**dataclasses.asdict(recipe), "epochs to run": [first, last], **arrays, "network or functions": text}

    params, optimizer, losses = run_epochs(
        advance,
        (params, optimizer, np.zeros(recipe.epochs, np.float32)),
        *(first, last),
        identity=identity,
        folder=checkpoint,
        every=checkpoint_every,
        resume=resume,
    )
    return Trained(params, optimizer, np.asarray(losses)[first:last])


@functools.partial(jax.jit, static_argnums=0)
def _init(recipe, params):
    return recipe.optimizer().init(params)


def _check_losses(losses: Array, first: int, last: int) -> None:
    """Refuse losses of the epochs from `first` to `last` that are not finite."""
    for epoch, loss in enumerate(np.asarray(losses)[first:last], first):
        if not np.isfinite(loss):
            raise InputError(f"expected a finite loss, got {loss} in epoch {epoch}")


@functools.partial(jax.jit, static_argnums=0)
def _run(trainer, state, masks, inputs, labels, order, key, first, last):
    many = functools.partial(_epochs, trainer)
    if trainer.mesh is not None:
        many = jax.shard_map(many, mesh=trainer.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    return many(state, masks, inputs, labels, order, key, first, last)


def _epochs(trainer, state, masks, inputs, labels, order, key, first, last):
    recipe, steps = trainer.recipe, order.shape[1]
    axis = None if trainer.mesh is None else AXIS
    tx = mask_optimizer(recipe.optimizer(), masks)

    def loss(params, x, y):
        values = optax.softmax_cross_entropy_with_integer_labels(trainer.apply_fn(params, x), y)
        total = jnp.sum(values) if axis is None else jax.lax.psum(jnp.sum(values), axis)
        return total if recipe.reduction == "sum" else total / recipe.batch_size

    def prepared(x):
        return x if trainer.prepare is None else trainer.prepare(x)

    def epoch(number, carry):
        params, optimizer, losses = carry
        rate = recipe.rate(number)

        def step(carry, item):
            params, optimizer, total = carry
            index = order[number, item]
            index = index if axis is None else batches.share(index, axis, trainer.mesh.size)
            if trainer.augment is None:
                x = prepared(inputs[index])
            else:
                noise = jax.random.fold_in(jax.random.fold_in(key, 1_000_000 + number), item)
                # drawn for the whole batch, whatever number of devices it is spread over
                x = trainer.augment(noise, prepared(inputs[order[number, item]]))
                x = x if axis is None else batches.share(x, axis, trainer.mesh.size)
            value, gradient = jax.value_and_grad(loss)(params, x, labels[index])
            updates, optimizer = tx.update(gradient, optimizer, params, learning_rate=rate)
            return (optax.apply_updates(params, updates), optimizer, total + value), None

        start = (params, optimizer, jnp.zeros(()))
        (params, optimizer, total), _ = jax.lax.scan(step, start, jnp.arange(steps))
        examples = steps * recipe.batch_size if recipe.reduction == "sum" else steps
        return params, optimizer, losses.at[number].set(total / examples)

    return jax.lax.fori_loop(first, last, epoch, state)
