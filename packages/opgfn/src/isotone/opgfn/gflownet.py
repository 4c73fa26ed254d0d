"""The GFlowNet: an environment, a policy, an objective; trained on values or on comparisons, sampled, saved.

The training loop is section 2.4 and listing 2.10. Killed at any moment, `fit(folder=...)` goes on to the same end:
bit for bit on a CPU at the same number of threads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from isotone.opgfn import distributed
from isotone.opgfn.conditional import Goal, LogZ, Preference, conditioner_of
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs.base import Environment
from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.memo import Memo
from isotone.opgfn.objective import Target, log_reward, training_loss
from isotone.opgfn.policies.base import Policy, PolicyOutput
from isotone.opgfn.policies.graph import GraphPolicy
from isotone.opgfn.policies.mlp import MLPPolicy
from isotone.opgfn.replay import ReplayBuffer, ReplayConfig
from isotone.opgfn.rollout import Trajectories, join
from isotone.opgfn.sampler import Sampler
from isotone.opgfn.scoring import evaluate
from isotone.opgfn.snapshot import load_weights, restore, snapshot, weights
from isotone.shared.checkpoint import CheckpointStore, atomic_write, load_latest
from isotone.shared.errors import InputError, check_count

TABLE_STATES = 4096
Callback = Callable[["GFlowNet", int, float], None]


class GFlowNet(Sampler):
    """A sampler of the terminal objects of `env`.

    `objective`: "op-tb" and its like need only an order; "tb" and the others a reward (`config.OBJECTIVES`).
    `policy`: an `MLPPolicy` with the heads that the objective needs where none is given. `table`: evaluate the
    policy on all states at once; by default where there are at most 4,096. `graph`: that table, if it is there.
    """

    def __init__(
        self,
        env: Environment,
        policy: Policy | None = None,
        objective: str | None = None,
        *,
        config: TrainConfig | None = None,
        replay: ReplayConfig | None = None,
        objectives: int | None = None,
        device: str = "cpu",
        table: bool | None = None,
        graph: StateGraph | None = None,
    ) -> None:
        config = config or TrainConfig()
        self.config = config if objective is None else dataclasses.replace(config, objective=objective)
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"expected a device such as cpu or cuda, got {device!r}") from None
        self.env, self.replay_config = env, replay or ReplayConfig()
        self.conditioner = self._conditioner(objectives)
        condition_dim = self.conditioner.dim if self.conditioner else 0
        if policy is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                policy = default_policy(env, self.config, condition_dim)
        if policy.condition_dim != condition_dim:
            raise ValueError(
                f"expected a policy with condition_dim {condition_dim} for {self.config.objective}, "
                f"got {policy.condition_dim}"
            )
        made_for = getattr(policy, "env", env)
        if made_for.cardinalities != env.cardinalities or made_for.num_actions != env.num_actions:
            raise ValueError(
                f"expected a policy for {type(env).__name__} of width {env.width} and {env.num_actions} actions, "
                f"got one for {type(made_for).__name__} of width {made_for.width} and {made_for.num_actions} actions"
            )
        self.policy = policy.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.log_z = LogZ(condition_dim, self.config.log_z).to(self.device)
        self.sampling_policy = copy.deepcopy(self.policy) if self.config.ema else self.policy
        self._world = torch.distributed.get_world_size() if distributed.active() else 1
        rank = torch.distributed.get_rank() if distributed.active() else 0
        self._check_ranks()
        self.generator = torch.Generator().manual_seed(self.config.seed + 1_000_003 * rank)
        self.shared_generator = torch.Generator().manual_seed(self.config.seed + 1)
        small = env.num_states is not None and env.num_states <= TABLE_STATES
        if table is None:
            table = (small or graph is not None) and not condition_dim and self.device.type == "cpu"
        if table and condition_dim:
            raise ValueError(f"expected no table for {self.config.objective}, whose network has a condition")
        self.graph = (graph or StateGraph(env)) if table else None
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.policy.parameters()), "lr": self.config.lr},
                {"params": list(self.log_z.parameters()), "lr": self.config.lr_log_z, "weight_decay": 0.0},
            ],
            weight_decay=self.config.weight_decay,
        )
        # L_OP gives log Z no gradient (softmax does not see a shift): it is fixed, a gauge
        self.log_z.requires_grad_(self.config.kind != "op")
        self.buffer = ReplayBuffer(self.replay_config, env.width)
        self.memo: Memo | None = None
        self.step = 0
        self.history: list[float] = []
        self._baseline = 0.0

    def _check_ranks(self) -> None:
        """Raise `ValueError` where a batch can not be dealt to the ranks in equal parts."""
        replay = self.replay_config
        parts = {"batch_size": self.config.batch_size}
        if replay.mode == "prioritized":
            parts["offline"] = replay.offline
        if replay.augment:
            parts["augment_batch"] = replay.augment_batch
        for name, size in parts.items():
            if size % self._world:
                raise ValueError(f"expected {name} to be a multiple of the {self._world} ranks, got {size}")

    def _conditioner(self, objectives: int | None) -> Preference | Goal | None:
        kind = self.config.kind
        if kind not in ("pc", "gc"):
            return None
        count = objectives or len(getattr(self.env, "objectives", ()))
        if not count:
            raise ValueError(f"expected objectives=, their number, for {self.config.objective}")
        return conditioner_of(kind, count, self.config.beta, self.config.beta_low, self.config.floor)

    # --- training ------------------------------------------------------------------------------------------

    def fit(
        self,
        objective_fn: Callable[[Any], Any] | None = None,
        steps: int = 1000,
        *,
        order_fn: Callable[[Any], Any] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = True,
    ) -> GFlowNet:
        """Train for `steps` steps in all and return self.

        `objective_fn`: objects (what `env.objects` returns) to their objectives (n, d) or (n,), maximised; the
        environment's own where none is given. `order_fn`: objects to a boolean (n, n) matrix, [i, j] saying that
        object i is preferred to j; then no value is ever asked for. `callbacks`: called as f(self, step, loss).
        `folder`: checkpoints are kept there, every `checkpoint_every` steps, and the newest is continued with
        `resume`. Raises `InputError` where that one is of another run.
        """
        if order_fn is not None and (objective_fn is not None or self.config.kind != "op"):
            raise ValueError(f"expected order_fn alone, with an op-* objective, got {self.config.objective}")
        check_count("steps", steps, 0)
        check_count("checkpoint_every", checkpoint_every)
        if order_fn is None:
            self._asks(objective_fn)
        else:
            replay = self.replay_config
            if replay.mode in ("prioritized", "offline") or replay.augment or replay.pareto_fraction:
                raise ValueError(
                    "expected replay off or uniform with order_fn: without values nothing seen is the best"
                )
            if self.config.family.startswith("fl-") or self.config.label in ("buffer", "rank"):
                raise ValueError(
                    f"expected values for {self.config.objective} with label {self.config.label}, got comparisons"
                )
            if self.memo is not None:
                self.memo, self.buffer = None, ReplayBuffer(replay, self.env.width)
        if folder is None:
            self._loop(steps, order_fn, callbacks, lambda: None)
            return self
        if distributed.active():
            folder = Path(folder) / f"rank-{torch.distributed.get_rank()}"
        with CheckpointStore(folder) as store:
            if not resume:
                store.clear()
            elif (saved := load_latest(folder, "torch")) is not None:
                restore(self, saved.arrays, saved.state, str(folder))
                if self.step > steps:
                    raise InputError(
                        f"expected steps of at least the {self.step} already in {str(folder)!r}, got {steps}"
                    )
            last = self.step

            def keep() -> None:
                nonlocal last
                if self.step > last and (self.step % checkpoint_every == 0 or self.step == steps):
                    store.save(self.step, *snapshot(self))
                    last = self.step

            self._loop(steps, order_fn, callbacks, keep)
        return self

    def _asks(self, objective_fn: Callable[[Any], Any] | None) -> Memo:
        """The memo of `objective_fn`, of the one before, or of the environment's own.

        What another objective said is forgotten, the buffer of its values too.
        """
        own = self.memo.objective if self.memo is not None else getattr(self.env, "objective", None)
        function = objective_fn if objective_fn is not None else own
        if function is None:
            raise ValueError("expected objective_fn or order_fn: this environment has no objective of its own")
        if not callable(function):
            raise ValueError(f"expected objective_fn to be a function of objects, got {function!r}")
        if self.memo is None or self.memo.objective != function:
            self.memo = Memo(self.env, function)
            self.buffer = ReplayBuffer(self.replay_config, self.env.width)
        return self.memo

    def _push(self, states: Tensor, u: Tensor | None, valid: Tensor | None = None) -> None:
        """Into the buffer, the objects of all ranks: every rank has the same buffer and archive."""
        states = distributed.gather_rows(states)
        u = None if u is None else distributed.gather_rows(u)
        self.buffer.push(states, u, None if valid is None else distributed.gather_rows(valid))

    def _loop(
        self, steps: int, order_fn: Callable | None, callbacks: Sequence[Callback], keep: Callable[[], None]
    ) -> None:
        while self.step < steps:
            loss = self._step(order_fn)
            self.step += 1
            self.history.append(loss)
            for callback in callbacks:
                callback(self, self.step, loss)
            keep()

    def _step(self, order_fn: Callable | None) -> float:
        if self.replay_config.mode == "offline":
            return self._offline_step()
        local = self.config.batch_size // self._world
        raw = None if self.conditioner is None else self.conditioner.sample(local, self.generator).to(self.device)
        output = self.policy(self.graph.states) if self.graph is not None and not self.config.ema else None
        fresh = self._sample(local, raw, self.config.epsilon, output)
        terminals = fresh.terminals()
        if self.memo is not None:
            self._push(terminals, *self.memo(terminals))
        else:
            self._push(terminals, None)
        batch, raw = self._select(fresh, raw)
        loss = 0.0
        for _ in range(self.config.updates):
            loss = self._update(batch, raw, order_fn, output)
            output = None
        for _ in range(self.replay_config.augment):
            drawn = self._augmented()
            more = None if self.conditioner is None else self.conditioner.sample(len(drawn), self.generator)
            self._update(drawn, more, order_fn, None)
        return loss

    def observe(
        self,
        states: Int[Tensor, "n width"],
        objective_fn: Callable[[Any], Any] | None = None,
        *,
        values: Any = None,
    ) -> Tensor:
        """Put objects into the buffer, evaluated, or with the `values` (n, d) or (n,) that were measured for them;
        returns their objectives (n, d): what offline replay trains on, as in rounds of proposals and measurements.

        Raises `ValueError` on rows that are no states of the environment.
        """
        self._check_states(states)
        if values is not None:
            if objective_fn is not None:
                raise ValueError("expected objective_fn or values, got both")
            if self.memo is None:
                self.memo = Memo(self.env, getattr(self.env, "objective", None) or _unknown)
            self.memo.tell(states, values)
        else:
            self._asks(objective_fn)
        assert self.memo is not None
        u, valid = self.memo(states)
        self.buffer.push(states, u, valid)
        return u

    def _check_states(self, states: Tensor) -> None:
        if states.ndim != 2 or states.shape[1] != self.env.width or states.is_floating_point():
            raise ValueError(
                f"expected states of whole numbers (n, {self.env.width}), got {states.dtype} {tuple(states.shape)}"
            )
        most = torch.tensor(self.env.cardinalities, device=states.device)
        if len(states) and bool(((states < 0) | (states >= most)).any()):
            row = int(((states < 0) | (states >= most)).any(1).nonzero()[0])
            raise ValueError(f"expected states of this environment, got {states[row].tolist()}")

    def _augmented(self) -> Trajectories:
        """Prioritised objects of the buffer, a rank's part of them."""
        return self._backward(self.buffer.prioritized(self.replay_config.augment_batch // self._world, self.generator))

    def _offline_step(self) -> float:
        if not len(self.buffer):
            raise ValueError("expected observed objects to train on, got none: call observe first")
        n, loss = self.config.batch_size // self._world, 0.0
        for _ in range(self.config.updates):
            batch = self._backward(self.buffer.uniform(n, self.generator))
            raw = None if self.conditioner is None else self.conditioner.sample(n, self.generator).to(self.device)
            loss = self._update(batch, raw, None, None)
        for _ in range(self.replay_config.augment):
            drawn = self._augmented()
            raw = None if self.conditioner is None else self.conditioner.sample(len(drawn), self.generator)
            self._update(drawn, raw, None, None)
        return loss

    def _select(self, fresh: Trajectories, raw: Tensor | None) -> tuple[Trajectories, Tensor | None]:
        """The batch to train on: fresh, drawn again from the buffer, or fresh and prioritised (section 2.4, 3-4)."""
        replay = self.replay_config
        if replay.mode == "uniform" and len(self.buffer) >= replay.warmup:
            batch = self._backward(self.buffer.uniform(len(fresh), self.generator))
        elif replay.mode == "prioritized":
            offline = replay.offline // self._world
            batch = join([fresh, self._backward(self.buffer.prioritized(offline, self.generator))])
        else:
            batch = fresh
        if raw is not None and self.conditioner is not None and len(batch) > len(raw):
            more = self.conditioner.sample(len(batch) - len(raw), self.generator).to(self.device)
            raw = torch.cat([raw, more])
        return batch, raw

    def _update(
        self, batch: Trajectories, raw: Tensor | None, order_fn: Callable | None, output: PolicyOutput | None
    ) -> float:
        target = self._target(batch, raw, order_fn)
        evaluation = evaluate(self.env, self.policy, batch, target.condition, self.graph, output)
        generators = self.generator, self.shared_generator
        loss = training_loss(self.config, evaluation, target, self.policy, self.log_z, *generators, self._baseline)
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"expected a finite loss, got {value} at step {self.step} with lr {self.config.lr}")
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        distributed.average_gradients(parameters)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip_norm)
        if self.config.lr_half_life is not None:
            factor = 0.5 ** (self.step / self.config.lr_half_life)
            rates = (self.config.lr, self.config.lr_log_z)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.step()
        if self.config.kind == "reinforce":
            reward = distributed.gather_rows(log_reward(self.config, target)).exp().mean()
            self._baseline += 0.1 * (float(reward) - self._baseline)
        if self.config.ema:
            with torch.no_grad():
                pairs = zip(self.sampling_policy.parameters(), self.policy.parameters(), strict=True)
                for slow, now in pairs:
                    slow.lerp_(now, 1 - self.config.ema)
        return value

    def _target(self, batch: Trajectories, raw: Tensor | None, order_fn: Callable | None) -> Target:
        terminals = batch.terminals()
        if self.memo is None:
            assert order_fn is not None
            valid = self.env.valid(terminals)
            better = torch.zeros(len(batch), len(batch), dtype=torch.bool, device=self.device)
            if bool(valid.any()):  # what is no object can not be compared: it loses to every one that is
                objects = valid.nonzero().squeeze(1).to(self.device)
                better[objects[:, None], objects] = self._compared(order_fn, terminals[valid])
            return Target(None, valid, better)
        u, valid = self.memo(terminals)
        condition = None
        if self.conditioner is not None and raw is not None:
            raw = self.conditioner.relabel(raw.to(u), u, self.generator)
            condition = self._encoded(raw)
        known = self.buffer.reference()
        reference = None if known is None else torch.from_numpy(known).to(u)
        partial = self._partial(batch, u) if self.config.family.startswith("fl-") else None
        return Target(u, valid, None, reference, raw, condition, self.conditioner, partial)

    def _compared(self, order_fn: Callable, terminals: Tensor) -> Tensor:
        given = order_fn(self.env.objects(terminals))
        said = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        n = len(terminals)
        if said.dtype != bool and not np.isin(said, (0, 1)).all():
            raise ValueError(f"expected order_fn to return booleans, got {said.dtype} with other values")
        if said.shape != (n, n):
            raise ValueError(f"expected order_fn to return ({n}, {n}), got {said.shape}")
        if np.diagonal(said).any():
            raise ValueError("expected order_fn to say who is better, > and not >=, got objects better than themselves")
        return torch.as_tensor(said, device=self.device).bool()

    def _partial(self, batch: Trajectories, u: Tensor) -> tuple[Tensor, Tensor]:
        """Objectives of the visited states that are objects themselves: those that may stop."""
        assert self.memo is not None
        known = batch.mask & self.env.forward_mask(batch.states.flatten(0, 1))[:, self.env.stop].view(batch.mask.shape)
        values = u.new_zeros(*batch.mask.shape, u.shape[1])
        some, valid = self.memo(batch.states[known])
        values[known] = some
        known = known.clone()
        known[known.clone()] = valid
        if not bool((known.sum(1) > 1).any()):
            raise ValueError(
                "expected partial objects with objectives for a forward-looking loss, this environment has none"
            )
        return values, known

    # --- saving --------------------------------------------------------------------------------------------

    def get_params(self) -> dict[str, Any]:
        """The settings as JSON can say them."""
        return {"config": dataclasses.asdict(self.config), "replay": dataclasses.asdict(self.replay_config)}

    def save(self, folder: str | Path, meta: dict[str, Any] | None = None) -> Path:
        """Write model.safetensors and config.json (with `meta`) into `folder`; returns the safetensors file."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps({**self.get_params(), "steps": self.step, "meta": meta or {}}, indent=1)
        tensors = {name: tensor.contiguous() for name, tensor in weights(self).items()}
        # each file is whole or the one before
        atomic_write(folder / "model.safetensors", save(tensors))
        atomic_write(folder / "config.json", document.encode())
        return folder / "model.safetensors"

    @classmethod
    def load(cls, folder: str | Path, env: Environment, policy: Policy | None = None, **options: Any) -> GFlowNet:
        """What `save` wrote, for `env`. Raises `InputError` where a file is missing, torn, or of another shape."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"expected {name} in {str(folder)!r}, found none")
        try:
            document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config, replay = TrainConfig(**document["config"]), ReplayConfig(**document["replay"])
            tensors = load_file(folder / "model.safetensors")
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"expected a saved GFlowNet in {str(folder)!r}, got {error}") from None
        found = cls(env, policy, config=config, replay=replay, **options)
        found.step = document.get("steps", 0)
        load_weights(found, tensors, str(folder))
        return found


def _unknown(objects: Any) -> Any:
    raise ValueError("expected values for every object: there is no objective_fn to ask")


def default_policy(env: Environment, config: TrainConfig, condition_dim: int = 0) -> Policy:
    """A policy with the heads that the objective needs: a graph transformer for molecules, else an MLP."""
    heads: dict[str, Any] = {
        "flow": config.needs_flow,
        "inter": config.family.startswith("fl-"),
        "condition_dim": condition_dim,
    }
    if isinstance(env, FragmentEnv):
        return GraphPolicy(env, backward=config.lambda_kl > 0, **heads)
    return MLPPolicy(env, backward=config.lambda_kl > 0, **heads)
