"""Fragment trees: exact masks both ways, identity up to node order, molecules (section 7, invariants 10 and 11)."""

from __future__ import annotations

from collections import defaultdict

import pytest
import reference
import torch
from rdkit import Chem

from isotone.opgfn.chem import mol_from_state, vocabulary
from isotone.opgfn.chem.decode import assemble, smiles_of
from isotone.opgfn.chem.vocabulary import Vocabulary
from isotone.opgfn.envs import FragmentEnv
from isotone.opgfn.exact import StateGraph, reward_distribution
from isotone.opgfn.memo import Memo
from isotone.opgfn.rollout import sample_backward, sample_forward
from isotone.shared.errors import InputError

# three fragments with one, two and three stems: every kind of tree, few enough to enumerate
TINY = Vocabulary(("Br", "C=C", "C1=CCCCC1"), ((0,), (0, 1), (0, 2, 3)))


def rollouts(env: FragmentEnv, n: int, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)

    def logits(states: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        random = scale * torch.randn(len(states), env.num_actions, generator=generator)
        random[:, env.stop] -= 4.0 * scale  # large molecules
        return random

    return sample_forward(env, logits, n, generator=generator)


def children(env: FragmentEnv, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = env.forward_mask(row[None])[0]
    mask[env.stop] = False
    actions = mask.nonzero().squeeze(1)
    states, undo = env.step(row.repeat(len(actions), 1), actions)
    return states, undo, actions


def enumerate_classes(env: FragmentEnv) -> dict[tuple, torch.Tensor]:
    """One row for each isomorphism class, by the naive canonical form."""
    classes = {reference.tree_of(env, env.reset(1)[0].tolist()).canonical(): env.reset(1)[0]}
    queue = list(classes.values())
    while queue:
        for child in children(env, queue.pop())[0]:
            key = reference.tree_of(env, child.tolist()).canonical()
            if key not in classes:
                classes[key] = child
                queue.append(child)
    return classes


@pytest.fixture(scope="module")
def tiny() -> tuple[FragmentEnv, dict[tuple, torch.Tensor]]:
    env = FragmentEnv(TINY, 3)
    return env, enumerate_classes(env)


def test_sizes_of_the_vocabularies() -> None:
    full = vocabulary.full()
    assert len(full) == 72 and sum(map(len, full.stems)) == 127 and full.max_stems == 6
    assert sum(len(stems) == 1 for stems in full.stems) == 42
    linear = vocabulary.linear()
    assert len(linear) == 18 and all(len(stems) == 2 for stems in linear.stems)
    assert all(Chem.MolToSmiles(m) for m in full.molecules + linear.molecules)
    assert FragmentEnv().num_actions == 9 * 72 + 8 * 2 * 6 + 1 and FragmentEnv().max_length == 26


def test_masks_are_the_naive_ones_over_the_whole_space(tiny) -> None:
    env, classes = tiny
    assert len(classes) > 500
    for row in classes.values():
        tree = reference.tree_of(env, row.tolist())
        expected = sorted(child.canonical() for action, child in tree.forward(TINY.stems, 3) if action != ("stop",))
        states, undo, _ = children(env, row)
        found = sorted(reference.tree_of(env, child.tolist()).canonical() for child in states)
        assert found == expected
        stops = any(action == ("stop",) for action, _ in tree.forward(TINY.stems, 3))
        assert bool(env.forward_mask(row[None])[0, env.stop]) is stops
        backward = env.backward_mask(row[None])[0].nonzero().squeeze(1)
        parents, redo = env.backward_step(row.repeat(len(backward), 1), backward)
        found = sorted(reference.tree_of(env, parent.tolist()).canonical() for parent in parents)
        assert found == sorted(parent.canonical() for _, parent in tree.backward())
        # forward after backward is the identity up to the order of nodes, and so is backward after forward
        if len(parents):
            assert env.forward_mask(parents).gather(1, redo[:, None]).all()
            assert (env.keys(env.step(parents, redo)[0]) == env.keys(row[None])).all()
        if len(states):
            assert env.backward_mask(states).gather(1, undo[:, None]).all()
            assert (env.backward_step(states, undo)[0] == row).all()


def test_edges_between_classes_balance_up_to_symmetry(tiny) -> None:
    """Actions from p to s times |Aut(s)| = backward actions from s to p times |Aut(p)|; without symmetry the number
    of legal parents is that of the (state, action) pairs pointing here."""
    env, classes = tiny
    forward, backward, symmetry = defaultdict(int), defaultdict(int), {}
    for key, row in classes.items():
        tree = reference.tree_of(env, row.tolist())
        symmetry[key] = tree.automorphisms()
        for child in children(env, row)[0]:
            forward[key, reference.tree_of(env, child.tolist()).canonical()] += 1
        legal = env.backward_mask(row[None])[0].nonzero().squeeze(1)
        for parent in env.backward_step(row.repeat(len(legal), 1), legal)[0]:
            backward[reference.tree_of(env, parent.tolist()).canonical(), key] += 1
    assert forward.keys() == backward.keys() and len(forward) > 1000
    for p, s in forward:
        assert forward[p, s] * symmetry[s] == backward[p, s] * symmetry[p]
    plain = [(p, s) for p, s in forward if symmetry[p] == symmetry[s] == 1]
    assert len(plain) > 500 and all(forward[edge] == backward[edge] for edge in plain)


def test_hash_is_the_isomorphism_class(tiny) -> None:
    env, classes = tiny
    rows = torch.stack(list(classes.values()))
    assert len(torch.unique(env.keys(rows))) == len(rows), "different classes have different hashes"
    # the same trees, rebuilt from the empty state along other orders, have other rows and the same hashes
    rows = rows[::4]
    walk = sample_backward(env, rows, generator=torch.Generator().manual_seed(0))
    states = env.reset(len(rows))
    for t in range(walk.actions.shape[1]):
        going = (walk.lengths - 1) > t
        states[going] = env.step(states[going], renamed(env, walk, states, t)[going])[0]
    assert (env.keys(states) == env.keys(rows)).all()
    assert (states != rows).any(1).sum() > 25


def renamed(env: FragmentEnv, walk, states: torch.Tensor, t: int) -> torch.Tensor:
    """An action that leads from `states` to the class of the walk's next state."""
    target = env.keys(walk.states[:, min(t + 1, walk.states.shape[1] - 1)])
    chosen = torch.zeros(len(states), dtype=torch.int64)
    for i, row in enumerate(states):
        if t < int(walk.lengths[i]) - 1:
            found, _, actions = children(env, row)
            chosen[i] = actions[(env.keys(found) == target[i]).nonzero()[0, 0]]
    return chosen


def test_orbits_are_the_actions_with_isomorphic_children(tiny) -> None:
    env, classes = tiny
    for row in list(classes.values())[::5]:
        states, _, actions = children(env, row)
        if len(actions):
            orbit, key = env.orbits(row[None])[0, actions], env.keys(states)
            assert ((orbit[:, None] == orbit) == (key[:, None] == key)).all()


def test_a_long_walk_takes_legal_actions_only() -> None:
    """At least 10^5 actions of the full environment."""
    env, steps = FragmentEnv(), 0
    for seed in range(12):
        batch = rollouts(env, 800, seed, scale=5.0)
        rows = batch.states[batch.mask]
        env.check_actions(rows, batch.actions[batch.mask])
        steps += len(rows)
        sizes = env.sizes(batch.terminals())
        assert sizes.max() <= 9 and (batch.lengths == 3 * sizes - 1).all()
    assert steps > 100_000 and sizes.double().mean() > 4, (steps, sizes.double().mean())


def test_backward_walks_end_at_nothing_and_come_back() -> None:
    env = FragmentEnv()
    ends = rollouts(env, 200).terminals()
    walk = sample_backward(env, ends, generator=torch.Generator().manual_seed(1))
    assert (walk.terminals() == ends).all()
    assert env.is_source(walk.states[:, 0]).all()
    for t in range(walk.actions.shape[1] - 1):
        going = walk.lengths - 1 > t
        rows, actions = walk.states[going, t], walk.actions[going, t]
        env.check_actions(rows, actions)
        assert (env.keys(env.step(rows, actions)[0]) == env.keys(walk.states[going, t + 1])).all()
        back = walk.backward_actions[going, t]
        assert (env.backward_step(walk.states[going, t + 1], back)[0] == rows).all()


def test_molecules_add_up() -> None:
    """Atoms are those of the fragments, bonds theirs and one an edge; what does not sanitise is flagged."""
    env = FragmentEnv()
    states = rollouts(env, 300, 3).terminals()
    texts, valid = env.decode(states), env.valid(states)
    assert valid.double().mean() > 0.5
    for row, text, good in zip(states.tolist(), texts, valid.tolist(), strict=True):
        fragments, bonds = env.tree(row)
        assert good is (text is not None)
        if text is None:
            continue
        molecule = Chem.MolFromSmiles(text)
        assert molecule is not None
        parts = [env.vocabulary.molecules[f] for f in fragments]
        assert molecule.GetNumAtoms() == sum(m.GetNumAtoms() for m in parts)
        assert molecule.GetNumBonds() == sum(m.GetNumBonds() for m in parts) + len(bonds)
        assert Chem.MolToSmiles(molecule) == text


def test_smiles_does_not_depend_on_the_order_of_nodes() -> None:
    env = FragmentEnv()
    for row in rollouts(env, 60, 4).terminals().tolist():
        fragments, bonds = env.tree(row)
        order = torch.randperm(len(fragments), generator=torch.Generator().manual_seed(len(row))).tolist()
        place = {old: new for new, old in enumerate(order)}
        other = [(place[a], s, place[b], t) for a, s, b, t in reversed(bonds)]
        shuffled = [fragments[i] for i in order]
        assert smiles_of(env.vocabulary, shuffled, other) == smiles_of(env.vocabulary, fragments, bonds)


def test_an_incomplete_molecule_is_not_one() -> None:
    env = FragmentEnv(max_fragments=2)
    state, _ = env.step(env.reset(1), torch.tensor([5]))
    assert env.valid(state).item() and env.objects(state) == [env.vocabulary.smiles[5]]
    open_edge, _ = env.step(state, torch.tensor([0]))
    assert mol_from_state(env, state[0]).GetNumAtoms() > 1 and mol_from_state(env, open_edge[0]) is None
    assert not env.valid(open_edge).item() and not env.valid(env.reset(1)).item()


def test_vocabularies_refuse() -> None:
    for call, words in [
        (lambda: Vocabulary((), ()), "got 0 and 0"),
        (lambda: Vocabulary(("C",), ((),)), "'C' by index"),
        (lambda: Vocabulary.parse("C zero"), "'C zero'"),
        (lambda: Vocabulary(("C",), ((3,),)).molecules, "below 1 in 'C', got 3"),
        (lambda: Vocabulary(("nonsense",), ((0,),)).molecules, "'nonsense'"),
        (lambda: vocabulary.subset(vocabulary.full(), [72]), "below 72, got 72"),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert words in str(error.value)
    with pytest.raises(ValueError, match="below 3, got 9"):
        assemble(TINY, [9], [])
    with pytest.raises(ValueError, match="below 1 of 'Br', got 4"):
        assemble(TINY, [0, 1], [(0, 4, 1, 0)])
    with pytest.raises(ValueError, match="got 0"):
        FragmentEnv(max_fragments=0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_exact_flows_of_trees_end_in_their_rewards(size: int, learned: bool) -> None:
    """Classes of isomorphic trees are states; the forward policy of their flows ends in R / Z, for any P_B."""
    env = FragmentEnv(TINY, size)
    graph = StateGraph(env)
    assert len(graph) == len(enumerate_classes(env))
    generator = torch.Generator().manual_seed(0)
    log_reward = torch.randn(len(graph), dtype=torch.float64, generator=generator)
    back = torch.randn(graph.backward_mask.shape, dtype=torch.float64, generator=generator) if learned else None
    flow, edges = graph.exact_flows(log_reward, back)
    wanted = reward_distribution(graph, log_reward)
    found = graph.terminal_distribution(torch.where(graph.forward_mask, edges, 0.0))
    assert 0.5 * (found - wanted).abs().sum() < 1e-12 and graph.terminal.sum() > 10
    assert flow[0].item() == pytest.approx(torch.logsumexp(log_reward[graph.terminal], 0).item())
    # what the tables say of an edge: the parent's action leads here, the undoing one leads back
    row, action = (graph.child >= 0).nonzero().T
    reached = env.step(graph.states[row], action)[0]
    assert (graph.index(reached) == graph.child[row, action]).all()
    child, undo = graph.child[row, action], graph.undo[row, action]
    assert (graph.parent[child, undo] == row).all()
    child, undo = graph.backward_mask.nonzero().T
    assert (graph.child[graph.parent[child, undo], graph.redo[child, undo]] == child).all()
    parents = env.backward_step(graph.states[child], undo)[0]
    assert (graph.index(parents) == graph.parent[child, undo]).all()


def test_molecules_that_several_trees_spell_are_asked_once() -> None:
    env = FragmentEnv(TINY, 2)
    states = rollouts(env, 300).terminals()
    rows = torch.unique(states, dim=0)
    asked: list[str] = []

    def objective(smiles: list[str]) -> list[float]:
        asked.extend(smiles)
        return [float(len(text)) for text in smiles]

    memo = Memo(env, objective)
    u, valid = memo(states)
    distinct = {text for text in env.decode(states) if text is not None}
    assert len(asked) == len(set(asked)) == len(distinct) < int(env.valid(rows).sum())
    assert memo.evaluations == len(distinct) + int((~env.valid(rows)).sum())
    assert u[:, 0].tolist() == [float(len(text or "")) for text in env.decode(states)]
    again = Memo(env, objective)
    again.restore(*memo.state())
    assert torch.equal(again(states)[0], u) and again.evaluations == memo.evaluations and len(asked) == len(distinct)
