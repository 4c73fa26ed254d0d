"""Drawing from a trained model: samples, the best of them, what it has learned of each, exact distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.opgfn.conditional import Goal, LogZ, Preference
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs.base import Environment
from isotone.opgfn.exact import StateGraph
from isotone.opgfn.memo import Memo
from isotone.opgfn.pareto import nd_rank
from isotone.opgfn.policies.base import Policy, PolicyOutput
from isotone.opgfn.rollout import Trajectories, sample_backward, sample_forward
from isotone.opgfn.scoring import evaluate
from isotone.shared.errors import check_count


@dataclass(frozen=True)
class Samples:
    """Terminal objects: as states (n, width), as what the environment makes of them, and the log-reward that the
    model has learned for each along the trajectory it was drawn by."""

    states: Int[Tensor, "n width"]
    objects: Any
    log_reward: Float[Tensor, " n"]


class Sampler:
    """What a `GFlowNet` draws with; it sets the attributes."""

    env: Environment
    config: TrainConfig
    policy: Policy
    sampling_policy: Policy
    log_z: LogZ
    conditioner: Preference | Goal | None
    graph: StateGraph | None
    memo: Memo | None
    generator: torch.Generator
    device: torch.device

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
        check_count("n", n)
        if not 0 < temperature < math.inf:
            raise ValueError(f"expected a finite temperature above 0, got {temperature}")
        if condition is not None and len(condition) != n:
            raise ValueError(f"expected a condition for each of {n} objects, got {len(condition)}")
        generator = self.generator if seed is None else torch.Generator().manual_seed(seed)
        raw = condition
        if self.conditioner is not None and raw is None:
            raw = self.conditioner.sample(n, generator)
        batch = self._sample(n, raw, 0.0, None, temperature, self.policy, generator)
        return Samples(batch.terminals(), self.env.objects(batch.terminals()), self.learned_log_reward(batch, raw))

    @torch.no_grad()
    def candidates(self, n: int, *, temperature: float = 1.0, seed: int = 0, evaluate: bool = True) -> Samples:
        """The distinct objects among n samples, best first: by non-domination rank of their objectives, then by
        learned log-reward.

        Objects that were not evaluated yet are, once each, where there is an objective; with `evaluate` false it is not
        asked, and they come after those that are known.
        """
        drawn = self.sample(n, temperature=temperature, seed=seed)
        first = {key: i for i, key in reversed(list(enumerate(self.env.identities(drawn.states))))}
        index = torch.tensor(sorted(first.values()), device=drawn.states.device)
        states, log_r = drawn.states[index], drawn.log_reward[index]
        order = torch.argsort(-log_r, stable=True)
        if self.memo is not None:
            known = [evaluate or self.memo.has(key) for key in self.env.identities(states[order])]
            asked = torch.tensor(known, device=order.device)
            ranked = order[asked]
            if len(ranked):
                ranked = ranked[torch.argsort(nd_rank(*self.memo(states[ranked])), stable=True)]
            order = torch.cat([ranked, order[~asked]])
        return Samples(states[order], self.env.objects(states[order]), log_r[order])

    @torch.no_grad()
    def learned_log_reward(self, batch: Trajectories, raw: Tensor | None = None) -> Float[Tensor, " B"]:
        """log R-hat of the objects that trajectories end in: under trajectory balance log Z + sum log P_F - sum log P_B
        along each, else the flow into the sink, which is the object's alone."""
        condition = self._encoded(raw)
        evaluation = evaluate(self.env, self.policy, batch, condition, self.graph)
        scores = evaluation.scores(idempotent=self.config.idempotent)
        last = (batch.lengths - 1)[:, None]
        if self.config.family == "fm":
            rows = evaluation.position.gather(1, last).squeeze(1)
            return evaluation.output.logits.double()[rows, self.env.stop]
        if self.config.needs_flow:
            flow = scores.flows()
            if self.config.family.startswith("fl-"):
                flow = flow + torch.where(scores.mask, evaluation.log_inter(), 0.0)
            return (flow + scores.ratio()).gather(1, last).squeeze(1)
        return self.log_z(condition).double() + scores.ratio().sum(1)

    @torch.no_grad()
    def terminal_distribution(self) -> Float[Tensor, " S"]:
        """The exact P(x) over the states of an enumerable environment, in float64."""
        if self.graph is None:
            raise ValueError("expected an enumerated environment for exact distributions (table=True)")
        return self.graph.terminal_distribution(self.policy(self.graph.states).logits)
