"""The naive forms, written from the paper's equations one object, pair and subtrajectory at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np


def dominates(a, b) -> bool:
    """x dominates x' iff u >= u' everywhere and > somewhere."""
    return all(p >= q for p, q in zip(a, b, strict=True)) and any(p > q for p, q in zip(a, b, strict=True))


def non_dominated(u) -> list[bool]:
    return [not any(dominates(other, mine) for other in u) for mine in u]


def nd_rank(u) -> list[int]:
    rank, left, current = [-1] * len(u), set(range(len(u))), 0
    while left:
        front = {i for i in left if not any(dominates(u[j], u[i]) for j in left)}
        for i in front:
            rank[i] = current
        left -= front
        current += 1
    return rank


def softmax_cross_entropy(r, q) -> float:
    norm = math.log(sum(math.exp(x) for x in r))
    return -sum(p / sum(q) * (x - norm) for x, p in zip(r, q, strict=True))


def pair_loss(r_i, r_j, u_i, u_j) -> float:
    """CE of softmax([r_i, r_j]) with y = 1, 1/2 or 0."""
    y = 1.0 if u_i > u_j else 0.0 if u_i < u_j else 0.5
    return softmax_cross_entropy([r_i, r_j], [y, 1 - y])


def subtb(log_pf, log_pb, log_flow, log_reward, lam) -> float:
    """SubTB(lambda) of one trajectory, by a triple loop over start, end and action."""
    n = len(log_pf)
    flow = [*log_flow, log_reward]
    weighted = norm = 0.0
    for start in range(n):
        for end in range(start + 1, n + 1):
            residual = flow[start] - flow[end]
            for t in range(start, end):
                residual += log_pf[t] - log_pb[t]
            weighted += lam ** (end - start) * residual**2
            norm += lam ** (end - start)
    return weighted / norm


def op_subtb(trajectories, order, lambda_op, lam) -> float:
    """sum_k w_k (mean of squared non-terminal residuals of length k + lambda_OP L_OP of predicted rewards)."""
    longest = max(len(t[0]) for t in trajectories)
    loss = 0.0
    for k in range(1, longest + 1):
        weight = (1 - lam) * lam ** (k - 1) / (1 - lam**longest)
        squares, predicted, members = [], [], []
        for index, (log_pf, log_pb, flow) in enumerate(trajectories):
            n = len(log_pf)
            for start in range(n - k):
                residual = flow[start] - flow[start + k]
                residual += sum(log_pf[t] - log_pb[t] for t in range(start, start + k))
                squares.append(residual**2)
            if n >= k:
                start = n - k
                predicted.append(flow[start] + sum(log_pf[t] - log_pb[t] for t in range(start, n)))
                members.append(index)
        loss += weight * (sum(squares) / len(squares) if squares else 0.0)
        loss += weight * lambda_op * order(predicted, members)
    return loss


def hypervolume(u) -> float:
    """By inclusion and exclusion over the boxes [0, u]: for a handful of points only."""
    total = 0.0
    for size in range(1, len(u) + 1):
        for subset in itertools.combinations(u, size):
            total -= (-1) ** size * float(np.prod(np.clip(np.min(subset, axis=0), 0, None)))
    return total


def igd_plus(front, reference) -> float:
    """mean over p of min over a of the length of max(p - a, 0)."""
    return sum(
        min(math.sqrt(sum(max(p - a, 0.0) ** 2 for p, a in zip(point, candidate, strict=True))) for candidate in front)
        for point in reference
    ) / len(reference)


def r2(front, weights, ideal) -> float:
    """Sum over v of min over a of max_j v_j |z_j - a_j|, not normalised."""
    return sum(
        min(max(w * abs(z - a) for w, z, a in zip(v, ideal, candidate, strict=True)) for candidate in front)
        for v in weights
    )


def max_base_pairs(sequence: str, loop: int) -> int:
    """Nussinov's recursion by plain recursion over intervals, for short sequences."""
    from functools import cache

    pairs = {"AT", "TA", "CG", "GC"}

    @cache
    def best(i: int, j: int) -> int:
        if j - i <= loop:
            return 0
        found = best(i + 1, j)
        for k in range(i + loop + 1, j + 1):
            if sequence[i] + sequence[k] in pairs:
                found = max(found, 1 + best(i + 1, k - 1) + best(k + 1, j))
        return found

    return best(0, len(sequence) - 1) if sequence else 0


class Tree:
    """A fragment tree as an object per state: nodes with fragments, edges with a stem or None at each end."""

    def __init__(self, nodes, edges) -> None:
        self.nodes, self.edges = dict(nodes), {frozenset(e): dict(ends) for e, ends in edges.items()}

    def degree(self, i) -> int:
        return sum(i in edge for edge in self.edges)

    def used(self, i) -> set:
        return {ends[i] for edge, ends in self.edges.items() if i in edge and ends[i] is not None}

    def forward(self, stems, most):
        """All (action, child), actions as words."""
        found = []
        fragments = range(len(stems))
        if not self.nodes:
            return [(("add", 0, v), Tree({0: v}, {})) for v in fragments]
        new = max(self.nodes) + 1
        if len(self.nodes) < most:
            for i, fragment in self.nodes.items():
                if self.degree(i) < len(stems[fragment]):
                    for v in fragments:
                        child = Tree({**self.nodes, new: v}, self.edges)
                        child.edges[frozenset((i, new))] = {i: None, new: None}
                        found.append((("add", i, v), child))
        for edge, ends in self.edges.items():
            for i, stem in ends.items():
                if stem is None:
                    for k in range(len(stems[self.nodes[i]])):
                        if k not in self.used(i):
                            child = Tree(self.nodes, self.edges)
                            child.edges[edge][i] = k
                            found.append((("set", edge, i, k), child))
        if all(stem is not None for ends in self.edges.values() for stem in ends.values()):
            found.append((("stop",), self))
        return found

    def backward(self):
        """All (action, parent)."""
        found = []
        for i in self.nodes:
            mine = [edge for edge in self.edges if i in edge]
            if len(mine) <= 1 and all(stem is None for edge in mine for stem in self.edges[edge].values()):
                nodes = {j: v for j, v in self.nodes.items() if j != i}
                found.append((("remove", i), Tree(nodes, {e: x for e, x in self.edges.items() if i not in e})))
        for edge, ends in self.edges.items():
            for i, stem in ends.items():
                if stem is not None:
                    parent = Tree(self.nodes, self.edges)
                    parent.edges[edge][i] = None
                    found.append((("unset", edge, i), parent))
        return found

    def relabelled(self, order):
        name = dict(zip(self.nodes, order, strict=True))
        nodes = tuple(sorted((name[i], v) for i, v in self.nodes.items()))
        edges = tuple(
            sorted(
                tuple(sorted((name[i], -1 if s is None else s) for i, s in ends.items()))
                for ends in self.edges.values()
            )
        )
        return nodes, edges

    def canonical(self):
        """The least relabelling: equal for isomorphic trees only. For a handful of nodes."""
        return min(self.relabelled(order) for order in itertools.permutations(range(len(self.nodes))))

    def automorphisms(self) -> int:
        same = self.relabelled(range(len(self.nodes)))
        return sum(self.relabelled(order) == same for order in itertools.permutations(range(len(self.nodes))))


def tree_of(env, row) -> Tree:
    """The object of a row of integers."""
    n = env.n
    size = sum(value < env.v for value in row[:n])
    edges = {}
    for j in range(1, size):
        i, upper, lower = row[n + j], row[2 * n + j], row[3 * n + j]
        edges[frozenset((i, j))] = {i: None if upper == env.k else upper, j: None if lower == env.k else lower}
    return Tree(dict(enumerate(row[:size])), edges)


def seh(weights, smiles: str) -> float:
    """The sEH proxy of one molecule, an atom and a bond at a time, in float64 NumPy."""
    from rdkit import Chem

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def leaky(x):
        return np.where(x > 0, x, 0.01 * x)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    molecule = Chem.MolFromSmiles(smiles)
    features = []
    for atom in molecule.GetAtoms():
        x = np.zeros(71)
        x[{"H": 0, "C": 1, "N": 2, "O": 3, "F": 4}.get(atom.GetSymbol(), 5)] = 1
        x[9] = atom.GetIsAromatic()
        x[10:13] = [str(atom.GetHybridization()) == kind for kind in ("SP", "SP2", "SP3")]
        x[13] = atom.GetTotalNumHs(includeNeighbors=True)
        x[13 + atom.GetAtomicNum()] = 1
        features.append(x)
    bonds = []
    for bond in molecule.GetBonds():
        kind = np.zeros(4)
        kind[{"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2, "AROMATIC": 3}[str(bond.GetBondType())]] = 1
        bonds += [
            (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), kind),
            (bond.GetEndAtomIdx(), bond.GetBeginAtomIdx(), kind),
        ]
    bonds = bonds or [(0, 0, np.zeros(4))]
    hidden = [leaky(linear(x, "embed")) for x in features]
    for _ in range(12):
        new = []
        for i, h in enumerate(hidden):
            heard = []
            for a, b, kind in bonds:
                if b == i:
                    matrix = linear(leaky(linear(kind, "edge.0")), "edge.2").reshape(64, 64)
                    heard.append(hidden[a] @ matrix)
            mean = sum(heard) / len(heard) if heard else np.zeros(64)
            x = leaky(mean + weights["root"] @ h + weights["bias"])
            r_x, z_x, n_x = np.split(weights["gru.weight_ih"] @ x + weights["gru.bias_ih"], 3)
            r_h, z_h, n_h = np.split(weights["gru.weight_hh"] @ h + weights["gru.bias_hh"], 3)
            r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
            new.append((1 - z) * np.tanh(n_x + r * n_h) + z * h)
        hidden = new
    nodes, question, h, c = np.array(hidden), np.zeros(128), np.zeros(64), np.zeros(64)
    for _ in range(3):
        gates = weights["lstm.weight_ih"] @ question + weights["lstm.bias_ih"]
        i, f, g, o = np.split(gates + weights["lstm.weight_hh"] @ h + weights["lstm.bias_hh"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        match = np.exp(nodes @ h - (nodes @ h).max())
        question = np.concatenate([h, (match / match.sum()) @ nodes])
    return float(linear(question, "out")[0])
