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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.opgfn import distributed
from isotone.opgfn.conditional import Goal, LogZ, Preference
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs.base import Environment
from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.memo import Memo
from isotone.opgfn.objective import Target, log_reward, training_loss
from isotone.opgfn.pareto import nd_rank
from isotone.opgfn.policies.base import Policy, PolicyOutput
from isotone.opgfn.policies.graph import GraphPolicy
from isotone.opgfn.policies.mlp import MLPPolicy
from isotone.opgfn.replay import ReplayBuffer, ReplayConfig
from isotone.opgfn.rollout import Trajectories, join, sample_backward, sample_forward
from isotone.opgfn.scoring import evaluate
from isotone.opgfn.snapshot import load_weights, restore, snapshot, weights
from isotone.shared.checkpoint import CheckpointStore, load_latest
from isotone.shared.errors import InputError

TABLE_STATES = 4096
Callback = Callable[["GFlowNet", int, float], None]


@dataclass(frozen=True)
class Samples:
    """Terminal objects: as states (n, width), as what the environment makes of them, and the log-reward that the
    model has learned for each along the trajectory it was drawn by."""

    states: Int[Tensor, "n width"]
    objects: Any
    log_reward: Float[Tensor, " n"]


class GFlowNet:
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
        self.env, self.replay_config, self.device = env, replay or ReplayConfig(), torch.device(device)
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
        self.policy = policy.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.log_z = LogZ(condition_dim, self.config.log_z).to(self.device)
        self.sampling_policy = copy.deepcopy(self.policy) if self.config.ema else self.policy
        rank = torch.distributed.get_rank() if distributed.active() else 0
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

    def _conditioner(self, objectives: int | None) -> Preference | Goal | None:
        kind = self.config.kind
        if kind not in ("pc", "gc"):
            return None
        count = objectives or len(getattr(self.env, "objectives", ()))
        if not count:
            raise ValueError(f"expected objectives=, their number, for {self.config.objective}")
        if kind == "pc":
            return Preference(count, self.config.beta, self.config.beta_low, floor=self.config.floor)
        return Goal(count, self.config.beta)

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
        if order_fn is None:
            function = objective_fn if objective_fn is not None else getattr(self.env, "objective", None)
            if function is None:
                raise ValueError("expected objective_fn or order_fn: this environment has no objective of its own")
            if self.memo is None:
                self.memo = Memo(self.env, function)
            self.memo.objective = function
        if folder is None:
            self._loop(steps, order_fn, callbacks, lambda: None)
            return self
        with CheckpointStore(folder) as store:
            if not resume:
                store.clear()
            elif (saved := load_latest(folder, "torch")) is not None:
                restore(self, saved.arrays, saved.state, str(folder))
            last = self.step

            def keep() -> None:
                nonlocal last
                if self.step > last and (self.step % checkpoint_every == 0 or self.step == steps):
                    store.save(self.step, *snapshot(self))
                    last = self.step

            self._loop(steps, order_fn, callbacks, keep)
        return self

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
        local = self.config.batch_size // (torch.distributed.get_world_size() if distributed.active() else 1)
        raw = None if self.conditioner is None else self.conditioner.sample(local, self.generator).to(self.device)
        output = self.policy(self.graph.states) if self.graph is not None and not self.config.ema else None
        fresh = self._sample(local, raw, self.config.epsilon, output)
        terminals = fresh.terminals()
        if self.memo is not None:
            u, valid = self.memo(terminals)
            self.buffer.push(terminals, u, valid)
        else:
            self.buffer.push(terminals, None)
        batch, raw = self._select(fresh, raw)
        loss = 0.0
        for _ in range(self.config.updates):
            loss = self._update(batch, raw, order_fn, output)
            output = None
        for _ in range(self.replay_config.augment):
            drawn = self._backward(self.buffer.prioritized(self.replay_config.augment_batch, self.generator))
            more = None if self.conditioner is None else self.conditioner.sample(len(drawn), self.generator)
            self._update(drawn, more, order_fn, None)
        return loss

    def observe(self, states: Int[Tensor, "n width"], objective_fn: Callable[[Any], Any] | None = None) -> Tensor:
        """Evaluate objects, put them into the buffer and return their objectives (n, d): what offline replay trains
        on, as in rounds of proposals and measurements."""
        function = objective_fn or (self.memo.objective if self.memo else getattr(self.env, "objective", None))
        if function is None:
            raise ValueError("expected objective_fn: this environment has no objective of its own")
        self.memo = self.memo or Memo(self.env, function)
        u, valid = self.memo(states)
        self.buffer.push(states, u, valid)
        return u

    def _offline_step(self) -> float:
        if not len(self.buffer):
            raise ValueError("expected observed objects to train on, got none: call observe first")
        n, loss = self.config.batch_size, 0.0
        for _ in range(self.config.updates):
            batch = self._backward(self.buffer.uniform(n, self.generator))
            raw = None if self.conditioner is None else self.conditioner.sample(n, self.generator).to(self.device)
            loss = self._update(batch, raw, None, None)
        for _ in range(self.replay_config.augment):
            drawn = self._backward(self.buffer.prioritized(self.replay_config.augment_batch, self.generator))
            raw = None if self.conditioner is None else self.conditioner.sample(len(drawn), self.generator)
            self._update(drawn, raw, None, None)
        return loss

    def _select(self, fresh: Trajectories, raw: Tensor | None) -> tuple[Trajectories, Tensor | None]:
        """The batch to train on: fresh, drawn again from the buffer, or fresh and prioritised (section 2.4, 3-4)."""
        replay = self.replay_config
        if replay.mode == "uniform" and len(self.buffer) >= replay.warmup:
            batch = self._backward(self.buffer.uniform(len(fresh), self.generator))
        elif replay.mode == "prioritized":
            batch = join([fresh, self._backward(self.buffer.prioritized(replay.offline, self.generator))])
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
            self._baseline += 0.1 * (float(log_reward(self.config, target).exp().mean()) - self._baseline)
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
            better = torch.as_tensor(np.asarray(order_fn(self.env.objects(terminals))), device=self.device).bool()
            if better.shape != (len(batch), len(batch)):
                raise ValueError(f"expected order_fn to return ({len(batch)}, {len(batch)}), got {tuple(better.shape)}")
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

    # --- sampling ------------------------------------------------------------------------------------------

    def _sample(
        self,
        n: int,
        raw: Tensor | None,
        epsilon: float,
        output: PolicyOutput | None = None,
        temperature: float = 1.0,
        policy: Policy | None = None,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        policy = policy or self.sampling_policy
        generator = generator or self.generator
        if self.graph is not None:
            with torch.no_grad():
                logits = (output or policy(self.graph.states)).logits.detach()
            return self.graph.sample_forward(logits, n, epsilon=epsilon, temperature=temperature, generator=generator)
        condition = self._encoded(raw)

        def logits_of(states: Tensor, members: Tensor) -> Tensor:
            return (policy(states) if condition is None else policy(states, condition[members])).logits

        options: dict[str, Any] = {"epsilon": epsilon, "temperature": temperature, "generator": generator}
        return sample_forward(self.env, logits_of, n, device=self.device, **options)

    def _encoded(self, raw: Tensor | None) -> Tensor | None:
        """Preferences or goals as the network is given them."""
        return None if raw is None or self.conditioner is None else self.conditioner.encode(raw).to(self.device)

    def _backward(self, states: Tensor) -> Trajectories:
        """Trajectories into given objects from the policy's own P_B, learned or uniform."""
        states = states.to(self.device)
        if self.graph is not None:
            with torch.no_grad():
                learned = self.policy(self.graph.states[:1]).backward_logits is not None
                table = self.policy(self.graph.states).backward_logits if learned else None
            return self.graph.sample_backward(self.graph.index(states), table, generator=self.generator)
        if self.conditioner is None:
            with torch.no_grad():
                if self.policy(self.env.reset(1, self.device)).backward_logits is not None:
                    return sample_backward(
                        self.env,
                        states,
                        lambda rows, members: self.policy(rows).backward_logits,  # type: ignore[arg-type,return-value]
                        generator=self.generator,
                    )
        return sample_backward(self.env, states, generator=self.generator)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        condition: Float[Tensor, "n c"] | None = None,
        seed: int | None = None,
    ) -> Samples:
        """n objects from the trained policy, without exploration.

        `condition`: preferences (w and beta) or goals of the conditional baselines, drawn where none is given.
        `seed`: draw from a generator of its own, so that training goes on as if nothing had been sampled.
        """
        generator = self.generator if seed is None else torch.Generator().manual_seed(seed)
        raw = condition
        if self.conditioner is not None and raw is None:
            raw = self.conditioner.sample(n, generator)
        batch = self._sample(n, raw, 0.0, None, temperature, self.policy, generator)
        return Samples(batch.terminals(), self.env.objects(batch.terminals()), self.learned_log_reward(batch, raw))

    @torch.no_grad()
    def candidates(self, n: int, *, temperature: float = 1.0, seed: int = 0) -> Samples:
        """The distinct objects among n samples, best first: by non-domination rank of their objectives (where they
        are known), then by learned log-reward."""
        drawn = self.sample(n, temperature=temperature, seed=seed)
        _, first = np.unique(drawn.states.cpu().numpy(), axis=0, return_index=True)
        index = torch.from_numpy(np.sort(first)).to(drawn.states.device)
        states, log_r = drawn.states[index], drawn.log_reward[index]
        order = torch.argsort(-log_r, stable=True)
        if self.memo is not None:
            u, valid = self.memo(states[order])
            order = order[torch.argsort(nd_rank(u, valid), stable=True)]
        return Samples(states[order], self.env.objects(states[order]), log_r[order])

    @torch.no_grad()
    def learned_log_reward(self, batch: Trajectories, raw: Tensor | None = None) -> Float[Tensor, " B"]:
        """log R-hat along given trajectories: log Z + sum log P_F - sum log P_B, or the flow into the sink."""
        condition = self._encoded(raw)
        evaluation = evaluate(self.env, self.policy, batch, condition, self.graph)
        scores = evaluation.scores(idempotent=self.config.idempotent)
        start = self.log_z(condition).double()
        if self.config.needs_flow:
            start = scores.flows()[:, 0]
            if self.config.family.startswith("fl-"):
                start = start + evaluation.log_inter()[:, 0]
        elif self.config.family == "fm":
            source = evaluation.output.logits.double().masked_fill(~evaluation.forward_mask, -torch.inf)
            start = torch.logsumexp(source[evaluation.position[:, 0]], 1)
        return start + scores.ratio().sum(1)

    @torch.no_grad()
    def terminal_distribution(self) -> Float[Tensor, " S"]:
        """The exact P(x) over the states of an enumerable environment, in float64."""
        if self.graph is None:
            raise ValueError("expected an enumerated environment for exact distributions (table=True)")
        return self.graph.terminal_distribution(self.policy(self.graph.states).logits)

    # --- saving --------------------------------------------------------------------------------------------

    def get_params(self) -> dict[str, Any]:
        """The settings as JSON can say them."""
        return {"config": dataclasses.asdict(self.config), "replay": dataclasses.asdict(self.replay_config)}

    def save(self, folder: str | Path, meta: dict[str, Any] | None = None) -> Path:
        """Write model.safetensors and config.json (with `meta`) into `folder`; returns the safetensors file."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in weights(self).items()}
        save_file(tensors, folder / "model.safetensors")
        document = {**self.get_params(), "steps": self.step, "meta": meta or {}}
        (folder / "config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
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
