"""Federated training: local steps, what is sent, one global step; a round is one pure function (section 2.3).

`FedAlgorithm` is a pair (init, round) over any pytree. All clients run in one vmap; who takes part, who straggles and
whose numbers are not finite is decided inside, by weights, so that one compile serves every round. Legend: N clients, m
of them in a round, K local steps, eta_l the clients' rate, eta_g the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int

from isotone.shared.errors import InputError, check_count
from isotone.sketching.compressors import Compressor, Result, Sketched, mean, told
from isotone.sketching.data import ClientData, batch_of
from isotone.sketching.integer import IntegerSketch
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.trees import TreeSketch, tree_sketch

LossFn = Callable[[Any, Any, Any], Array]
"""`loss_fn(params, x, y) -> scalar`, the mean over a batch."""


class FedState(NamedTuple):
    """`params`; `round`, from 0; the compressor's states of clients and server; the server optimizer's."""

    params: Any
    round: Array
    clients: Any
    server: Any
    optimizer: Any


class RoundInfo(NamedTuple):
    """`loss`: mean of the participants' first local batches; `taken`: who took part (m,), by number; `heard`: whose
    update was counted; `norm` of the update; `down`: bytes that each client is told of it."""

    loss: Array
    taken: Int[Array, " m"]
    heard: Array
    norm: Array
    down: Int[Array, ""]


@dataclass(frozen=True)
class FedConfig:
    """`local_steps` K on batches of `batch` (0: all of the client's data); `rate` eta_l; `participants` m (None: all);
    `straggle`: the chance that a participant is not heard in a round; `eta_g`: "auto", the compressor's own, or a
    number. `weigh`: "equal", the paper's 1/N, or "size"."""

    local_steps: int = 5
    batch: int = 32
    rate: float = 0.5
    participants: int | None = None
    straggle: float = 0.0
    eta_g: str | float = "auto"
    weigh: str = "equal"

    def __post_init__(self) -> None:
        for name, least in (("local_steps", 1), ("batch", 0)):
            check_count(name, getattr(self, name), least)
        if not 0 < self.rate < float("inf"):
            raise InputError(f"expected a finite rate above 0, got {self.rate}")
        if self.participants is not None and self.participants < 1:
            raise InputError(f"expected at least 1 participant, got {self.participants}")
        if not 0 <= self.straggle < 1:
            raise InputError(f"expected straggle in [0, 1), got {self.straggle}")
        if self.eta_g != "auto" and not (isinstance(self.eta_g, (int, float)) and 0 < self.eta_g < float("inf")):
            raise InputError(f"expected eta_g to be auto or a number above 0, got {self.eta_g!r}")
        if self.weigh not in ("equal", "size"):
            raise InputError(f"expected weigh to be equal or size, got {self.weigh!r}")


@dataclass(frozen=True)
class FedAlgorithm:
    """`init(params, clients) -> FedState`; `round(state, key, data) -> (FedState, RoundInfo)`, to be jitted."""

    loss_fn: LossFn
    compressor: Compressor
    tree: TreeSketch
    config: FedConfig
    server_opt: optax.GradientTransformation
    local_update: Callable[..., Any] | None = None
    """`local_update(params, key, data, client) -> (delta, loss)` in place of plain local steps (private ones)."""
    client_opt: optax.GradientTransformation | None = None
    """Of the local steps, its state new in every round; SGD of `config.rate` where there is none."""
    mesh: Mesh | None = None
    """Devices that the participants of a round are split over. Each holds the weights and all examples; of a sketched
    round s numbers pass between them, one sum, and of other arms the updates. The same round as without, up to the
    order of that sum."""

    def init(self, params: Any, clients: int) -> FedState:
        """The state before the first round."""
        if self.config.participants is not None and self.config.participants > clients:
            raise InputError(f"expected at most {clients} participants, got {self.config.participants}")
        own, server = self.compressor.init(clients)
        return FedState(params, jnp.zeros((), jnp.int32), own, server, self.server_opt.init(params))

    @property
    def eta_g(self) -> float:
        """The global step."""
        return self.compressor.scale if self.config.eta_g == "auto" else float(self.config.eta_g)

    def local(self, params: Any, key: Array, data: ClientData, client: Array) -> tuple[Any, Array]:
        """K steps on one client: the difference they made, and the first batch's loss."""
        config, tx = self.config, self.client_opt or optax.sgd(self.config.rate)

        def step(carry: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], Array]:
            now, state = carry
            if config.batch:
                x, y = batch_of(data, jax.random.fold_in(key, number), client, config.batch)
                loss, gradient = jax.value_and_grad(self.loss_fn)(now, x, y)
            else:
                loss, gradient = jax.value_and_grad(_whole(self.loss_fn))(now, data, client)
            updates, state = tx.update(gradient, state, now)
            return (optax.apply_updates(now, updates), state), loss

        (after, _), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(config.local_steps))
        return jax.tree.map(jnp.subtract, after, params), losses[0]

    def round(self, state: FedState, key: Array, data: ClientData) -> tuple[FedState, RoundInfo]:
        """One round. A participant whose update is not finite is left out, and so are stragglers; where nobody is
        heard the weights stay."""
        clients, config = len(data), self.config
        m = config.participants or clients
        chosen, late, local_key, wire_key = round_keys(key, state.round)
        taken = jnp.arange(clients) if m == clients else jax.random.choice(chosen, clients, (m,), replace=False)
        update_fn = self.local_update or self.local

        def one(client: Array) -> tuple[Array, Array]:
            delta, loss = update_fn(state.params, jax.random.fold_in(local_key, client), data, client)
            return self.tree.flatten(delta), loss

        # as many to each device: who is there twice is not heard the second time
        extra = 0 if self.mesh is None else -m % self.mesh.size
        deltas, losses = self._split(jax.vmap(one), True)(jnp.pad(taken, (0, extra), mode="edge"))
        on_time = jnp.pad(jax.random.uniform(late, (m,)) >= config.straggle, (0, extra))
        heard = jnp.all(jnp.isfinite(deltas), 1) & on_time
        sizes = data.size[taken] if config.weigh == "size" else jnp.ones(m)
        weights = heard * jnp.pad(sizes, (0, extra))
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-30)
        losses, heard = losses[:m], heard[:m]
        own = jax.tree.map(lambda leaf: leaf[taken], state.clients)
        if self.mesh is not None and isinstance(self.compressor, Sketched):
            found = Result(self._added(self.compressor, state.round, deltas, weights), own, state.server)
        else:
            found = self.compressor.combine(state.round, wire_key, deltas[:m], weights[:m], own, state.server)
        kept = jax.tree.map(lambda whole, part: whole.at[taken].set(part), state.clients, found.clients)
        update = self.tree.unflatten(self.eta_g * found.update)
        # optax takes gradients: minus the update
        step, optimizer = self.server_opt.update(jax.tree.map(jnp.negative, update), state.optimizer, state.params)
        params = optax.apply_updates(state.params, step)
        loss = jnp.sum(jnp.where(heard, losses, 0.0)) / jnp.maximum(jnp.sum(heard), 1)
        down = jnp.asarray(told(self.compressor, found.server), jnp.int32)
        info = RoundInfo(loss, taken, heard, jnp.linalg.norm(found.update), down)
        return FedState(params, state.round + 1, kept, found.server, optimizer), info

    def _split(self, function: Callable[..., Any], rows: bool) -> Callable[..., Any]:
        """`function` of arrays with a row for each participant, on the mesh: each device has its rows. `rows`: so has
        what it returns, which else is alike on all."""
        if self.mesh is None:
            return function
        split = PartitionSpec(self.mesh.axis_names)
        whole = split if rows else PartitionSpec()
        return jax.shard_map(function, mesh=self.mesh, in_specs=split, out_specs=whole, check_vma=False)

    def _added(self, compressor: Sketched, t: Array, deltas: Array, weights: Array) -> Array:
        """`compressor.combine`'s update: sketched where the updates are, and then added."""
        assert self.mesh is not None
        names, sketch = self.mesh.axis_names, compressor.sketch

        def share(deltas: Array, weights: Array) -> Array:
            return jax.lax.psum(sketch.sk(t, mean(deltas, weights)), names)

        return sketch.desk(t, self._split(share, False)(deltas, weights))


def round_keys(key: Array, t: int | Array) -> Array:
    """The four keys of round t: who takes part, who is late, local steps, wire."""
    return jax.random.split(jax.random.fold_in(key, t), 4)


def run(algorithm: FedAlgorithm, state: FedState, key: Array, data: ClientData, rounds: int) -> Any:
    """`(state, infos)` after so many rounds, one scan: keys come from `key` and the state's round, so that rounds run
    in two calls are those of one."""
    return jax.lax.scan(lambda s, _: algorithm.round(s, key, data), state, length=rounds)


def fed_algorithm(
    loss_fn: LossFn,
    params: Any,
    compressor: Compressor | None = None,
    *,
    kind: str = "srht",
    ratio: float = 10.0,
    seed: int = 0,
    per_leaf: bool = False,
    ordered: bool | None = None,
    dtype: str = "float32",
    one_way: bool = False,
    mesh: Mesh | None = None,
    server_opt: optax.GradientTransformation | None = None,
    client_opt: optax.GradientTransformation | None = None,
    local_update: Callable[..., Any] | None = None,
    **settings: Any,
) -> FedAlgorithm:
    """Federated averaging through a channel: `compressor`, or a sketch of `kind` and `ratio` in numbers of `dtype`,
    both ways or, `one_way`, up only.

    `settings`: fields of `FedConfig`. `server_opt`: SGD of rate 1 where none is given, which is the paper's.
    `client_opt`: of the local steps, SGD of `rate` where none is given. `mesh`: see `FedAlgorithm`. `ordered`: of that
    sketch, as `tree_sketch`. Raises `InputError` where the compressor is for another number of weights, on a dtype
    beside one, and on whole numbers that are to be weighed by size.
    """
    tree = tree_sketch(params, kind, ratio=ratio, seed=seed, per_leaf=per_leaf, ordered=ordered)
    if compressor is not None and (dtype != "float32" or one_way):
        raise InputError(f"expected a compressor or how to send a sketch, got {type(compressor).__name__} and "
                         f"{'one way' if one_way else dtype}")  # fmt: skip
    sketched: Compressor = Sketched(tree, one_way=one_way)
    if dtype != "float32":
        sketched = RoundedSketch(tree, dtype, one_way=one_way)
    channel = sketched if compressor is None else compressor
    if channel.d != tree.d:
        raise InputError(f"expected a compressor for {tree.d} numbers, got one for {channel.d}")
    config = FedConfig(**settings)
    if isinstance(channel, IntegerSketch) and config.weigh != "equal":
        raise InputError(f"expected clients that weigh alike for sums of whole numbers, got weigh {config.weigh!r}")
    return FedAlgorithm(loss_fn, channel, tree, config, server_opt or optax.sgd(1.0), local_update, client_opt, mesh)


def _whole(loss_fn: LossFn) -> Callable[..., Array]:
    """The mean loss over all of a client's examples: padding counts for nothing."""

    def loss(params: Any, data: ClientData, client: Array) -> Array:
        each = jax.vmap(lambda x, y: loss_fn(params, x[None], y[None]))(data.x[client], data.y[client])
        there = jnp.arange(each.shape[0]) < data.size[client]
        return jnp.sum(jnp.where(there, each, 0.0)) / data.size[client]

    return loss
