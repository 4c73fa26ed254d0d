"""What a user would try instead: random search, regularised evolution of cells, a genetic algorithm on fragments.

The genetic algorithm selects by pymoo's NSGA-II.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from isotone.opgfn.envs.base import Environment
from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.memo import Memo
from isotone.opgfn.rollout import sample_forward


def random_objects(env: Environment, n: int, generator: torch.Generator) -> Int[Tensor, "n width"]:
    """Terminal objects of uniformly random legal actions."""
    batch = sample_forward(env, lambda states, _: torch.zeros(len(states), env.num_actions), n, generator=generator)
    return batch.terminals()


def random_search(env: Environment, memo: Memo, budget: int, generator: torch.Generator, batch: int = 64) -> None:
    """Evaluate random objects until `budget` distinct ones are in the memo, or a long while brings none."""
    idle = 0
    while memo.evaluations < budget and idle < 200:
        before = memo.evaluations
        memo(within(memo, random_objects(env, batch, generator), budget))
        idle = idle + 1 if memo.evaluations == before else 0


def within(memo: Memo, states: Int[Tensor, "n width"], budget: int) -> Int[Tensor, "m width"]:
    """The first of `states` whose evaluation keeps the memo within its budget of distinct objects."""
    left = budget - memo.evaluations
    seen: set[bytes] = set()
    kept = []
    for i, key in enumerate(memo.env.identities(states)):
        if not memo.has(key) and key not in seen:
            if len(seen) >= left:
                continue
            seen.add(key)
        kept.append(i)
    return states[kept]


def regularised_evolution(
    initial: Int[Tensor, "n width"],
    memo: Memo,
    budget: int,
    generator: torch.Generator,
    *,
    operations: int,
    population: int = 50,
    tournament: int = 10,
) -> None:
    """Real et al., 2019: change one slot of the best of a random tournament, drop the oldest.

    States are rows of `operations` choices a slot. Each new cell is one evaluation of the first objective.
    """
    u, _ = memo(initial)
    members = [(row, float(value)) for row, value in zip(initial, u[:, 0], strict=True)][-population:]
    idle = 0
    while memo.evaluations < budget and idle < 1000:
        picks = torch.randint(len(members), (tournament,), generator=generator).tolist()
        parent = max((members[i] for i in picks), key=lambda member: member[1])[0]
        child = parent.clone()
        slot = int(torch.randint(len(child), (1,), generator=generator))
        shift = int(torch.randint(1, operations, (1,), generator=generator))
        child[slot] = (child[slot] + shift) % operations
        before = memo.evaluations
        value, _ = memo(child[None])
        idle = idle + 1 if memo.evaluations == before else 0
        members.append((child, float(value[0, 0])))
        members = members[-population:]


class NSGA2:
    """pymoo's NSGA-II selection: survival by rank and crowding distance, parents by binary tournament.

    Invalid members are pymoo's infeasible ones, who survive and win where no valid one is at hand.
    """

    def __init__(self, generator: torch.Generator) -> None:
        from pymoo.algorithms.moo.nsga2 import binary_tournament
        from pymoo.operators.selection.tournament import TournamentSelection
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        self.random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        self.survival, self.tournament = RankAndCrowding(), TournamentSelection(func_comp=binary_tournament)
        self.algorithm = SimpleNamespace(tournament_type="comp_by_rank_and_crowding", random_state=self.random)

    def __call__(self, u: np.ndarray, valid: np.ndarray, survive: int, parents: int) -> tuple[np.ndarray, np.ndarray]:
        """Of members with objectives `u` (n, d), maximised, and `valid` (n,): the indices of the survivors, and the
        places (parents, 2) among them of as many pairs of parents."""
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem

        problem = Problem(n_var=1, n_obj=u.shape[1], n_ieq_constr=1)
        broken = (~valid).astype(float)[:, None]
        members = Population.new("F", np.where(broken > 0, 0.0, -u), "G", broken, "place", np.arange(len(u)))
        # infeasible members are ranked by nothing else
        members.set("rank", np.zeros(len(u)), "crowding", np.zeros(len(u)))
        kept = self.survival.do(problem, members, n_survive=survive, random_state=self.random)
        options = {"to_pop": False, "random_state": self.random, "algorithm": self.algorithm}
        pairs = self.tournament.do(problem, kept, parents, 2, **options)
        return kept.get("place").astype(int), np.asarray(pairs)


def fragment_ga(
    env: FragmentEnv,
    memo: Memo,
    budget: int,
    generator: torch.Generator,
    *,
    population: int = 100,
    mutation: float = 0.5,
) -> None:
    """A genetic algorithm on trees of fragments, selected by NSGA-II, until `budget` distinct ones are evaluated.

    A child goes some random steps back from one parent; a crossover then grafts a branch of another onto what is left;
    random actions complete the molecule.
    """
    members = within(memo, random_objects(env, population, generator), budget)
    u, valid = memo(members)
    select = NSGA2(generator)
    idle = 0
    while memo.evaluations < budget and idle < 50:
        n = population
        keep, pairs = select(u.numpy(), valid.numpy(), population, n)
        members, u, valid = members[keep], u[keep], valid[keep]
        parents = torch.from_numpy(pairs.T.copy())
        mutate = torch.rand(n, generator=generator) < mutation
        children = mutated(env, members[parents[0]], generator)
        for i in (~mutate).nonzero().squeeze(1).tolist():
            children[i] = grafted(env, children[i], members[parents[1, i]], generator)
        children = completed(env, children, generator)
        before = memo.evaluations
        children = within(memo, children, budget)
        if len(children):
            more, good = memo(children)
            members, u, valid = torch.cat([members, children]), torch.cat([u, more]), torch.cat([valid, good])
            _, first = np.unique(members.numpy(), axis=0, return_index=True)
            first = np.sort(first)
            members, u, valid = members[first], u[first], valid[first]
        idle = idle + 1 if memo.evaluations == before else 0


def mutated(env: FragmentEnv, states: Int[Tensor, "B width"], generator: torch.Generator) -> Int[Tensor, "B width"]:
    """Up to eight random steps back; an empty tree stays."""
    steps = torch.randint(1, 9, (len(states),), generator=generator)
    for t in range(8):
        mask = env.backward_mask(states)
        going = (steps > t) & mask.any(1) & (env.sizes(states) > 1)
        if not bool(going.any()):
            break
        chosen = torch.multinomial(mask[going].double(), 1, generator=generator).squeeze(1)
        states = states.clone()
        states[going] = env.backward_step(states[going], chosen)[0]
    return states


def completed(env: FragmentEnv, states: Int[Tensor, "B width"], generator: torch.Generator) -> Int[Tensor, "B width"]:
    """Random legal actions until each molecule could stop, and stops with a chance of a third each time."""
    states = states.clone()
    for _ in range(env.max_length):
        mask = env.forward_mask(states)
        whole = mask[:, env.stop]
        rest = whole & (torch.rand(len(states), generator=generator) < 1 / 3)
        mask[:, env.stop] = False
        going = ~rest & mask.any(1)
        if not bool((going & ~whole).any()) and bool(whole.all()):
            break
        chosen = torch.multinomial(mask[going].double(), 1, generator=generator).squeeze(1)
        states[going] = env.step(states[going], chosen)[0]
    return states


def grafted(env: FragmentEnv, base: Tensor, donor: Tensor, generator: torch.Generator) -> Int[Tensor, " width"]:
    """`base` with a branch of `donor` joined to a node with a free stem, as far as there is room."""
    row, n = donor.tolist(), env.n
    size = int(env.sizes(donor[None]))
    start = int(torch.randint(max(1, size), (1,), generator=generator))
    branch = [start]
    for j in range(start + 1, size):
        if row[n + j] in branch:
            branch.append(j)
    mask = env.forward_mask(base[None])[0, : env.first_set].view(n, env.v).any(1)
    free = mask.nonzero().squeeze(1)
    if not len(free):
        return base
    at = int(free[int(torch.randint(len(free), (1,), generator=generator))])
    place: dict[int, int] = {}
    state = base[None]
    for j in branch:
        if int(env.sizes(state)) >= n:
            break
        place[j] = int(env.sizes(state))
        source = at if j == start else place[row[n + j]]
        action = source * env.v + row[j]
        if not bool(env.forward_mask(state)[0, action]):
            break
        state, _ = env.step(state, torch.tensor([action]))
        if j != start:
            # the donor's own stems, where they are still free
            for end, stem in ((0, row[2 * n + j]), (1, row[3 * n + j])):
                if stem < env.k:
                    choose = env.first_set + (place[j] - 1) * 2 * env.k + end * env.k + stem
                    if bool(env.forward_mask(state)[0, choose]):
                        state, _ = env.step(state, torch.tensor([choose]))
    return state[0]
