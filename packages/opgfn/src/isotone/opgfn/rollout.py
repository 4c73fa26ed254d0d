"""Trajectories, sampled forwards from the source or backwards from given objects, all alive ones in one step.

A trajectory of n actions is its states s_0 .. s_{n-1} = x, n - 1 actions between them and a final stop. Forward and
backward sampling, stepping the network or looking up its table (`exact.py`), draw from one stream of uniform
numbers by the same inverse-CDF rule: the same numbers give the same trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment, check_no_dead_end


@dataclass(frozen=True)
class Trajectories:
    """B trajectories, padded to the longest, T.

    `states[:, t]` is what action t leaves; `backward_actions[:, t]` undoes action t from the state at t + 1 (-1
    for stop). Entries past `lengths` mean nothing. `ids`: the states' numbers where the space is enumerated.
    """

    states: Int[Tensor, "B T width"]
    actions: Int[Tensor, "B T"]
    backward_actions: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    ids: Int[Tensor, "B T"] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """Which entries are actions."""
        return torch.arange(self.actions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def terminals(self) -> Int[Tensor, "B width"]:
        """The objects x that the trajectories end in."""
        return self.states[torch.arange(len(self), device=self.lengths.device), self.lengths - 1]


def join(parts: list[Trajectories]) -> Trajectories:
    """Several batches as one, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.actions.shape[1] for part in parts)

    def pad(tensor: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        if not missing:
            return tensor
        return torch.cat([tensor, tensor[:, -1:].expand(-1, missing, *tensor.shape[2:])], 1)

    ids = [part.ids for part in parts]
    return Trajectories(
        torch.cat([pad(part.states) for part in parts]),
        torch.cat([pad(part.actions) for part in parts]),
        torch.cat([pad(part.backward_actions) for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([pad(i) for i in ids if i is not None]) if all(i is not None for i in ids) else None,
    )


Logits = Callable[[Tensor, Tensor], Tensor]
"""States (m, width) and the trajectories' numbers (m,) they belong to, to logits (m, actions)."""


def masked_probabilities(
    logits: Float[Tensor, "m actions"], mask: Bool[Tensor, "m actions"], epsilon: float = 0.0, temperature: float = 1.0
) -> Float[Tensor, "m actions"]:
    """(1 - epsilon) softmax of the legal logits / temperature + epsilon uniform over the legal, in float64."""
    scaled = (logits.double() / temperature).masked_fill(~mask, -torch.inf)
    probabilities = torch.softmax(scaled, 1)
    if epsilon:
        probabilities = (1 - epsilon) * probabilities + epsilon * mask / mask.sum(1, keepdim=True)
    return probabilities


def cumulative(probabilities: Float[Tensor, "m actions"]) -> Float[Tensor, "m actions"]:
    """The distribution function, exactly 1 from the last possible action on. Raises `ValueError` on NaN."""
    sums = probabilities.cumsum(-1)
    cdf = sums / sums[..., -1:]
    if not bool((cdf[..., -1] == 1).all()):
        raise ValueError("expected finite logits, got NaN or infinity from the policy")
    return cdf


def draw(cdf: Float[Tensor, "m actions"], uniform: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
    """The first action whose distribution function is above the uniform number: never one of probability 0."""
    return (uniform[:, None] >= cdf).sum(1)


def uniforms(
    length: int, n: int, generator: torch.Generator | None, device: torch.device | str
) -> Float[Tensor, "length n"]:
    """The numbers that trajectories are drawn with, from the generator's device."""
    source = "cpu" if generator is None else generator.device
    return torch.rand(length, n, dtype=torch.float64, generator=generator, device=source).to(device)


@torch.no_grad()
def sample_forward(
    env: Environment,
    logits: Logits,
    n: int,
    *,
    epsilon: float = 0.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """n trajectories from (1 - epsilon) P_F + epsilon uniform; the network sees only those still alive.

    Raises `ValueError` on a dead end, or a trajectory longer than the environment says.
    """
    if n < 1 or not 0 <= epsilon <= 1 or not temperature > 0:
        raise ValueError(f"expected n >= 1, epsilon in [0, 1], temperature > 0, got {n}, {epsilon}, {temperature}")
    length = env.max_length
    numbers = uniforms(length, n, generator, device)
    states = env.reset(n, device)
    alive = torch.arange(n, device=device)
    walked: list[tuple[Tensor, Tensor, Tensor]] = []
    undone: list[tuple[Tensor, Tensor]] = []
    for t in range(length):
        mask = env.forward_mask(states)
        probabilities = masked_probabilities(logits(states, alive), mask, epsilon, temperature)
        try:
            cdf = cumulative(probabilities)
        except ValueError:
            check_no_dead_end(mask, states)
            raise
        chosen = draw(cdf, numbers[t, alive])
        walked.append((alive, states, chosen))
        going = ~env.is_done(chosen)
        alive = alive[going]
        if not len(alive):
            break
        states, undo = env.step(states[going], chosen[going])
        undone.append((alive, undo))
    else:
        raise ValueError(f"expected trajectories of at most {length} actions, got a longer one")
    return _padded(env, n, walked, undone)


def _padded(
    env: Environment, n: int, walked: list[tuple[Tensor, Tensor, Tensor]], undone: list[tuple[Tensor, Tensor]]
) -> Trajectories:
    """What each step left, as (trajectories, states, actions) and (those that went on, backward actions)."""
    rows, states, actions = (torch.cat(part) for part in zip(*walked, strict=True))
    time = torch.repeat_interleave(torch.tensor([len(step[0]) for step in walked], device=rows.device))
    trace = states.new_zeros(n, len(walked), env.width)
    taken, backward = states.new_full((n, len(walked)), env.stop), states.new_full((n, len(walked)), -1)
    trace[rows, time], taken[rows, time] = states, actions
    if undone:
        on, undo = (torch.cat(part) for part in zip(*undone, strict=True))
        backward[on, torch.repeat_interleave(torch.tensor([len(step[0]) for step in undone], device=on.device))] = undo
    return Trajectories(trace, taken, backward, torch.bincount(rows, minlength=n))


@torch.no_grad()
def sample_backward(
    env: Environment,
    terminals: Int[Tensor, "B width"],
    logits: Logits | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Trajectories:
    """A trajectory into each given object, drawn backwards from P_B: uniform, or softmax of backward `logits`."""
    n, device = len(terminals), terminals.device
    numbers = uniforms(env.max_length, n, generator, device)
    states = terminals
    trace = states.new_zeros(n, env.max_length, env.width)
    actions = states.new_full((n, env.max_length), env.stop)
    backward = states.new_full((n, env.max_length), -1)
    trace[:, 0] = states
    lengths = torch.ones(n, dtype=torch.int64, device=device)
    alive = (~env.is_source(states)).nonzero().squeeze(1)
    states = states[alive]
    k = 0
    while len(alive):
        k += 1
        if k >= env.max_length:
            raise ValueError(f"expected trajectories of at most {env.max_length} actions, got a longer one")
        mask = env.backward_mask(states)
        if not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"expected a parent of every state but the source, got none of {states[row].tolist()}")
        scores = torch.zeros_like(mask, dtype=torch.float64) if logits is None else logits(states, alive)
        chosen = draw(cumulative(masked_probabilities(scores, mask)), numbers[k, alive])
        states, redo = env.backward_step(states, chosen)
        trace[alive, k], actions[alive, k], backward[alive, k] = states, redo, chosen
        lengths[alive] = k + 1
        going = ~env.is_source(states)
        alive, states = alive[going], states[going]
    return _reversed(trace, actions, backward, lengths)


def _reversed(trace: Tensor, actions: Tensor, backward: Tensor, lengths: Tensor) -> Trajectories:
    """Entry k of the walk is k steps before the end; entry 0 is x and its stop."""
    longest = int(lengths.max())
    back = (lengths[:, None] - 1 - torch.arange(longest, device=lengths.device)).clamp(min=0)
    states = trace.gather(1, back[..., None].expand(-1, -1, trace.shape[2]))
    return Trajectories(states, actions.gather(1, back), backward.gather(1, back), lengths)
