"""Molecules as trees of fragments, built by adding fragments and choosing where they are joined (section 2.6).

Legend: N nodes at most, V fragments, K stems at most. A state is four columns of N integers: the fragment of each
node (V: none), its parent (N: none), the stem it is joined by at the parent and its own (K: not chosen). Parents
come before children; apart from that the order of nodes means nothing, and no network may see it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from isotone.opgfn.chem.decode import silence_rdkit, smiles_of
from isotone.opgfn.chem.vocabulary import Vocabulary, full
from isotone.opgfn.envs.base import Environment

_CACHE = 500_000


class FragmentEnv(Environment):
    """Trees of up to `max_fragments` fragments.

    Actions: AddNode(i, v) = i V + v joins a new fragment v to node i, both ends of the edge not chosen (from the
    empty state, i = 0); SetEdge(j, end, k) = N V + (j - 1) 2 K + end K + k chooses stem k at the parent's end (0) or
    the child's (1) of the edge above node j; stop. Backward: RemoveNode(i) = i, RemoveChoice(j, end) =
    N + 2 (j - 1) + end.

    `masks`: AddNode where there is room and node i has a free stem; SetEdge where the end is not chosen and no
    other edge at that node has stem k; stop where all ends are chosen. RemoveNode where the node has at most one
    edge, not chosen at either end. Terminal objects are SMILES; those that do not sanitise are invalid.
    """

    def __init__(self, vocabulary: Vocabulary | None = None, max_fragments: int = 9) -> None:
        if max_fragments < 1:
            raise ValueError(f"expected max_fragments of at least 1, got {max_fragments}")
        self.vocabulary = vocabulary or full()
        self.n, self.v, self.k = max_fragments, len(self.vocabulary), self.vocabulary.max_stems
        n, v, k = self.n, self.v, self.k
        self.cardinalities = (*[v + 1] * n, *[n + 1] * n, *[k + 1] * n, *[k + 1] * n)
        self.first_set = n * v
        self.num_actions = n * v + (n - 1) * 2 * k + 1
        self.num_backward_actions = n + 2 * (n - 1)
        self.max_length = n + 2 * (n - 1) + 1
        self.stem_count = torch.tensor([*map(len, self.vocabulary.stems), 0])
        self._smiles: dict[bytes, str | None] = {}
        silence_rdkit()

    def split(self, states: Int[Tensor, "B width"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fragment, parent, stem at the parent, own stem: each (B, N)."""
        fragment, parent, upper, lower = states.split(self.n, 1)
        return fragment, parent, upper, lower

    def reset(self, n: int, device: torch.device | str = "cpu") -> Int[Tensor, "n width"]:
        empty = torch.tensor([self.v] * self.n + [self.n] * self.n + [self.k] * (2 * self.n), device=device)
        return empty.repeat(n, 1)

    def sizes(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """The number of fragments."""
        return (states[:, : self.n] < self.v).sum(1)

    def degrees(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B N"]:
        """The number of edges at each node."""
        parent = self.split(states)[1]
        joined = parent < self.n
        count = torch.zeros(len(states), self.n + 1, dtype=torch.int64, device=states.device)
        count.scatter_add_(1, parent, joined.long())
        return count[:, : self.n] + joined

    def used_stems(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B N K"]:
        """Which stems of each node are chosen by an edge."""
        _, parent, upper, lower = self.split(states)
        width = self.k + 1  # the last place takes what is not chosen
        used = torch.zeros(len(states), (self.n + 1) * width, dtype=torch.bool, device=states.device)
        used.scatter_(1, parent * width + upper, True)
        node = torch.arange(self.n, device=states.device)
        used.scatter_(1, node * width + lower, True)
        return used.view(len(states), self.n + 1, width)[:, : self.n, : self.k]

    def forward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B actions"]:
        n, k, rows = self.n, self.k, len(states)
        fragment, parent, upper, lower = self.split(states)
        stems = self.stem_count.to(states.device)[fragment]
        size = (fragment < self.v).sum(1, keepdim=True)
        room = (self.degrees(states) < stems) & (size < n)
        room[:, 0] |= size[:, 0] == 0
        add = room[:, :, None].expand(-1, -1, self.v).reshape(rows, -1)
        joined = (parent < n)[:, 1:]
        stem = torch.arange(k, device=states.device)
        free = (stem < stems[:, :, None]) & ~self.used_stems(states)
        above = parent[:, 1:].clamp(max=n - 1)
        free_above = free.gather(1, above[:, :, None].expand(-1, -1, k))
        open_upper, open_lower = joined & (upper[:, 1:] == k), joined & (lower[:, 1:] == k)
        choose = torch.stack([free_above & open_upper[:, :, None], free[:, 1:] & open_lower[:, :, None]], 2)
        stop = (size[:, 0] > 0) & ~(open_upper | open_lower).any(1)
        return torch.cat([add, choose.reshape(rows, -1), stop[:, None]], 1)

    def backward_mask(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, "B backward"]:
        fragment, parent, upper, lower = self.split(states)
        joined = (parent < self.n)[:, 1:]
        chosen = torch.stack([upper[:, 1:] < self.k, lower[:, 1:] < self.k], 2)
        # the edge of a leaf is the one above it; of a root with one child, the child's, which is node 1's
        bare = torch.ones_like(fragment, dtype=torch.bool)
        bare[:, 1:] = ~chosen.any(2)
        if self.n > 1:
            bare[:, 0] = ~(joined[:, 0] & chosen[:, 0].any(1))
        remove = (fragment < self.v) & (self.degrees(states) <= 1) & bare
        return torch.cat([remove, (chosen & joined[:, :, None]).flatten(1)], 1)

    def step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        n, k = self.n, self.k
        rows = torch.arange(len(states), device=states.device)
        children = states.clone()
        undo = torch.full_like(actions, -1)
        size = self.sizes(states)
        add = actions < self.first_set
        row, place, action = rows[add], size[add], actions[add]
        children[row, place] = action % self.v
        children[row, n + place] = torch.where(place == 0, n, action // self.v)
        undo[add] = place
        choose = ~add & (actions != self.stop)
        row, action = rows[choose], actions[choose] - self.first_set
        edge, end, stem = action // (2 * k) + 1, action // k % 2, action % k
        children[row, (2 + end) * n + edge] = stem
        undo[choose] = n + 2 * (edge - 1) + end
        return children, undo

    def backward_step(
        self, states: Int[Tensor, "B width"], actions: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B width"], Int[Tensor, " B"]]:
        n, k = self.n, self.k
        rows = torch.arange(len(states), device=states.device)
        parents = states.clone()
        redo = torch.empty_like(actions)
        remove = actions < n
        row, action = rows[~remove], actions[~remove] - n
        edge, end = action // 2 + 1, action % 2
        column = (2 + end) * n + edge
        redo[~remove] = self.first_set + (edge - 1) * 2 * k + end * k + states[row, column]
        parents[row, column] = k
        row, node = rows[remove], actions[remove]
        if len(row):
            parents[row], neighbour = self._without(states[row], node)
            redo[remove] = neighbour * self.v + states[row, node]
        return parents, redo

    def _without(self, states: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """The states without a leaf (or a root of one child), and the new number of what it was joined to."""
        n = self.n
        fragment, parent, upper, lower = self.split(states)
        above = parent.gather(1, node[:, None]).squeeze(1)
        # a root's only child is node 1, which becomes node 0; a lone node was joined to nothing: 0 by convention
        neighbour = torch.where(above < n, above, 0)
        place = torch.arange(n, device=states.device)
        source = place + (place >= node[:, None])  # every later node moves up by one
        past = source == n
        source = source.clamp(max=n - 1)
        fragment = fragment.gather(1, source).masked_fill(past, self.v)
        parent = parent.gather(1, source).masked_fill(past, n)
        orphan = parent == node[:, None]
        parent = torch.where((parent > node[:, None]) & (parent < n), parent - 1, parent)
        parent = parent.masked_fill(orphan, n)
        upper = upper.gather(1, source).masked_fill(past | orphan, self.k)
        lower = lower.gather(1, source).masked_fill(past | orphan, self.k)
        return torch.cat([fragment, parent, upper, lower], 1), neighbour

    def is_source(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, " B"]:
        return states[:, 0] == self.v

    # --- identity up to the order of nodes -------------------------------------------------------------------

    def colours(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B N"]:
        """A 64-bit colour of each node, equal for nodes that some automorphism maps to each other; 0 where none.

        Weisfeiler and Leman's refinement, which on trees tells apart whatever is not isomorphic.
        """
        fragment, parent, upper, lower = self.split(states)
        there, joined = fragment < self.v, parent < self.n
        above = parent.clamp(max=self.n - 1)
        colour = _mix(fragment + 1)
        for _ in range(self.n - 1):
            up = _mix(_mix(colour * 3 + upper) + lower).masked_fill(~joined, 0)
            down = _mix(_mix(colour.gather(1, above) * 3 + lower) + upper).masked_fill(~joined, 0)
            heard = torch.zeros_like(colour).scatter_add(1, above, up) + down
            colour = _mix(colour * 5 + heard)
        return colour.masked_fill(~there, 0)

    def keys(self, states: Int[Tensor, "B width"]) -> Int[Tensor, " B"]:
        """A 64-bit hash, equal for isomorphic states; for different ones but with a chance of 2^-64 a pair."""
        colour = self.colours(states)
        return _mix(_mix(colour).masked_fill(colour == 0, 0).sum(1) + self.sizes(states))

    def orbits(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B actions"]:
        """A number for each action, equal where two actions of a state lead to isomorphic children."""
        n, k = self.n, self.k
        colour = self.colours(states)
        fragment = torch.arange(self.v, device=states.device)
        add = _mix(colour[:, :, None] * 7 + fragment).flatten(1)
        _, parent, upper, lower = self.split(states)
        above = colour.gather(1, parent.clamp(max=n - 1))[:, 1:]
        own = colour[:, 1:]
        # the end where a stem is chosen, the other end, and what is chosen at either
        ends = torch.stack(
            [_mix(_mix(above * 11 + lower[:, 1:]) + own), _mix(_mix(own * 11 + upper[:, 1:]) + above)], 2
        )
        stem = torch.arange(k, device=states.device)
        choose = _mix(ends[..., None] * 13 + stem).flatten(1)
        return torch.cat([add, choose, torch.zeros_like(add[:, :1])], 1)

    def backward_orbits(self, states: Int[Tensor, "B width"]) -> Int[Tensor, "B backward"]:
        """A number for each backward action, equal where two of a state lead to isomorphic parents."""
        colour = self.colours(states)
        _, parent, upper, lower = self.split(states)
        above = colour.gather(1, parent.clamp(max=self.n - 1))[:, 1:]
        own = colour[:, 1:]
        ends = torch.stack(
            [_mix(_mix(above * 17 + upper[:, 1:]) + own), _mix(_mix(own * 17 + lower[:, 1:]) + above)], 2
        )
        return torch.cat([_mix(colour), ends.flatten(1)], 1)

    # --- molecules --------------------------------------------------------------------------------------------

    def decode(self, states: Int[Tensor, "B width"]) -> list[str | None]:
        """Canonical SMILES, None where a molecule is not complete or does not sanitise."""
        complete = self.forward_mask(states)[:, self.stop].tolist()
        rows = states.cpu().numpy()
        if len(self._smiles) > _CACHE:
            self._smiles.clear()
        found = []
        for row, whole in zip(rows, complete, strict=True):
            key = row.tobytes()
            if key not in self._smiles:
                self._smiles[key] = smiles_of(self.vocabulary, *self.tree(row.tolist())) if whole else None
            found.append(self._smiles[key])
        return found

    def identities(self, states: Int[Tensor, "B width"]) -> list[bytes]:
        """The canonical SMILES, which several trees may spell; of an invalid object its row."""
        rows = super().identities(states)
        return [row if text is None else text.encode() for row, text in zip(rows, self.decode(states), strict=True)]

    def tree(self, row: list[int]) -> tuple[list[int], list[tuple[int, int, int, int]]]:
        """Fragments, and bonds (parent, its stem, child, its stem), of one state's row."""
        n = self.n
        size = sum(value < self.v for value in row[:n])
        bonds = [(row[n + j], row[2 * n + j], j, row[3 * n + j]) for j in range(1, size)]
        return row[:size], bonds

    def valid(self, states: Int[Tensor, "B width"]) -> Bool[Tensor, " B"]:
        return torch.tensor([text is not None for text in self.decode(states)], dtype=torch.bool, device=states.device)

    def objects(self, states: Int[Tensor, "B width"]) -> list[str | None]:
        """The SMILES."""
        return self.decode(states)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that spreads every bit (splitmix64's finaliser; the product wraps)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) + -7046029254386353131
