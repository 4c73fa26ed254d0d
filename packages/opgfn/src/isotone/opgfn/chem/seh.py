"""The proxy of binding to soluble epoxide hydrolase (Bengio et al., 2021): a message-passing network on atoms.

Legend: A atoms of all molecules of a batch, E directed bonds, 64 channels. 71 features an atom: its element (H, C, N,
O, F, other), three unused, aromatic, sp, sp2, sp3, hydrogens, one-hot atomic number up to 56, one unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.shared.data import local
from isotone.shared.errors import InputError

WEIGHTS = "molecules/seh_proxy.safetensors"
CHANNELS, ATOM_FEATURES, ELEMENTS, LAYERS, READS = 64, 71, 56, 12, 3
# the parameters' places in the published list of 22, of which 12 to 15 belong to heads that are not used
_PLACES = {
    **{"embed.weight": 0, "embed.bias": 1, "root": 2, "bias": 3},
    **{"edge.0.weight": 4, "edge.0.bias": 5, "edge.2.weight": 6, "edge.2.bias": 7},
    **{"gru.weight_ih": 8, "gru.weight_hh": 9, "gru.bias_ih": 10, "gru.bias_hh": 11},
    **{"lstm.weight_ih": 16, "lstm.weight_hh": 17, "lstm.bias_ih": 18, "lstm.bias_hh": 19},
    **{"out.weight": 20, "out.bias": 21},
}
_BATCH = 256


class SEHProxy(nn.Module):
    """Scores of SMILES, about 0 to 10: minus a docking energy, scaled by those who trained it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(ATOM_FEATURES, CHANNELS)
        self.edge = nn.Sequential(nn.Linear(4, 128), nn.LeakyReLU(), nn.Linear(128, CHANNELS * CHANNELS))
        self.root = nn.Parameter(torch.zeros(CHANNELS, CHANNELS))
        self.bias = nn.Parameter(torch.zeros(CHANNELS))
        self.gru = nn.GRUCell(CHANNELS, CHANNELS)
        self.lstm = nn.LSTMCell(2 * CHANNELS, CHANNELS)
        self.out = nn.Linear(2 * CHANNELS, 1)

    @classmethod
    def load(cls, path: str | Path | None = None) -> SEHProxy:
        """With the weights of a safetensors file: `path`, else the one that ISOTONE_DATA_DIR's folder holds.

        Raises `InputError` where there is none, or it holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found = Path(path) if path is not None else local(WEIGHTS)
        if found is None or not found.is_file():
            where = (
                f"at {str(path)!r}" if path is not None else f"as {WEIGHTS} in the folder that ISOTONE_DATA_DIR names"
            )
            raise InputError(f"expected the weights of the sEH proxy {where}, found none")
        proxy = cls()
        try:
            tensors = load_file(found)
            state = {name: tensors[f"{place:03d}"] for name, place in _PLACES.items()}
            proxy.load_state_dict(state)
        except (SafetensorError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(
                f"expected the weights of the sEH proxy in {str(found)!r}, got another file: {said}"
            ) from None
        return proxy.eval()

    @torch.no_grad()
    def __call__(self, smiles: Sequence[str]) -> np.ndarray:  # type: ignore[override]
        """Scores (n,) in float64. Raises `InputError` naming a SMILES that RDKit does not read."""
        scores = [
            self.forward(*featurize(smiles[start : start + _BATCH])).double().cpu().numpy()
            for start in range(0, len(smiles), _BATCH)
        ]
        return np.concatenate(scores) if scores else np.zeros(0)

    def forward(
        self,
        atoms: Float[Tensor, "A 71"],
        bonds: Int[Tensor, "2 E"],
        kinds: Float[Tensor, "E 4"],
        owner: Int[Tensor, " A"],
    ) -> Float[Tensor, " n"]:
        """Scores of the molecules that `owner` numbers."""
        source, target = bonds
        # an edge's matrix depends on its kind alone: one each, not one an edge
        distinct, which = torch.unique(kinds, dim=0, return_inverse=True)
        matrices = self.edge(distinct).view(-1, CHANNELS, CHANNELS)
        degree = torch.bincount(target, minlength=len(atoms)).clamp(min=1)[:, None]
        hidden = F.leaky_relu(self.embed(atoms))
        members = [(which == k).nonzero().squeeze(1) for k in range(len(distinct))]
        for _ in range(LAYERS):
            heard = torch.zeros_like(hidden)
            for k, edges in enumerate(members):
                heard.index_add_(0, target[edges], hidden[source[edges]] @ matrices[k])
            message = F.leaky_relu(heard / degree + F.linear(hidden, self.root) + self.bias)
            hidden = self.gru(message, hidden)
        return self._read(hidden, owner)

    def _read(self, hidden: Tensor, owner: Tensor) -> Tensor:
        """Set2Set: three times, attend over a molecule's atoms with what an LSTM asks."""
        n = int(owner.max()) + 1
        question = hidden.new_zeros(n, 2 * CHANNELS)
        state = (hidden.new_zeros(n, CHANNELS), hidden.new_zeros(n, CHANNELS))
        for _ in range(READS):
            state = self.lstm(question, state)
            match = (hidden * state[0][owner]).sum(1)
            top = hidden.new_full((n,), -torch.inf).scatter_reduce(0, owner, match, "amax")
            weight = (match - top[owner]).exp()
            weight = weight / hidden.new_zeros(n).index_add(0, owner, weight)[owner]
            read = torch.zeros_like(state[0]).index_add(0, owner, weight[:, None] * hidden)
            question = torch.cat([state[0], read], 1)
        return self.out(question).squeeze(1)


def featurize(smiles: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Atom features (A, 71), directed bonds (2, E), their kinds one-hot (E, 4), each atom's molecule (A,)."""
    from rdkit import Chem
    from rdkit.Chem.rdchem import BondType, HybridizationType

    orders = {BondType.SINGLE: 0, BondType.DOUBLE: 1, BondType.TRIPLE: 2, BondType.AROMATIC: 3}
    hybrids = {HybridizationType.SP: 10, HybridizationType.SP2: 11, HybridizationType.SP3: 12}
    elements = {"H": 0, "C": 1, "N": 2, "O": 3, "F": 4}
    ones: list[tuple[int, int]] = []
    hydrogens: list[int] = []
    owner: list[int] = []
    bonds: list[tuple[int, int, int]] = []
    for number, text in enumerate(smiles):
        molecule = Chem.MolFromSmiles(text)
        if molecule is None or molecule.GetNumAtoms() == 0:
            raise InputError(f"expected a SMILES that RDKit reads, got {text!r}")
        first = len(owner)
        for atom in molecule.GetAtoms():
            row = len(owner)
            if not 1 <= atom.GetAtomicNum() <= ELEMENTS:
                raise InputError(f"expected elements up to number {ELEMENTS}, got {atom.GetSymbol()} in {text!r}")
            ones.append((row, elements.get(atom.GetSymbol(), 5)))
            ones.append((row, 14 + atom.GetAtomicNum() - 1))
            if atom.GetIsAromatic():
                ones.append((row, 9))
            if (column := hybrids.get(atom.GetHybridization())) is not None:
                ones.append((row, column))
            hydrogens.append(atom.GetTotalNumHs(includeNeighbors=True))
            owner.append(number)
        for bond in molecule.GetBonds():
            a, b = first + bond.GetBeginAtomIdx(), first + bond.GetEndAtomIdx()
            kind = orders.get(bond.GetBondType(), 0)
            bonds += [(a, b, kind), (b, a, kind)]
        if not molecule.GetNumBonds():
            bonds.append((first, first, -1))  # a lone atom speaks to itself over an edge of no kind
    atoms = torch.zeros(len(owner), ATOM_FEATURES)
    rows, columns = torch.tensor(ones).T
    atoms[rows, columns] = 1.0
    atoms[:, 13] = torch.tensor(hydrogens, dtype=torch.float32)
    table = torch.tensor(bonds)
    kinds = torch.cat([torch.eye(4), torch.zeros(1, 4)])[table[:, 2]]
    return atoms, table[:, :2].T.contiguous(), kinds, torch.tensor(owner)
