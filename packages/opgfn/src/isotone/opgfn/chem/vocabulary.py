"""Molecular fragments and the atoms at which they may be joined (their stems).

The 72 fragments and 127 stems are those of Bengio et al., 2021 (published under the MIT licence), the 18 linear ones
those of Shen et al., 2023: facts of the two benchmarks. A line is a SMILES and the indices of its stem atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from isotone.shared.errors import InputError

_FULL = """\
Br 0
C 0
C#N 0
C1=CCCCC1 0,2,3
C1=CNC=CC1 0,2
C1CC1 0
C1CCCC1 0
C1CCCCC1 0,1,2,3,4,5
C1CCNC1 0,2,3,4
C1CCNCC1 0,1,3
C1CCOC1 0,1,2,4
C1CCOCC1 0,1,2,4,5
C1CNCCN1 2,5
C1COCCN1 5
C1COCC[NH2+]1 5
C=C 0,1
C=C(C)C 0
C=CC 0,1
C=N 0
C=O 0
CC 0,1
CC(C)C 1
CC(C)O 1
CC(N)=O 2
CC=O 1
CCC 1
CCO 1
CN 0,1
CNC 1
CNC(C)=O 0
CNC=O 0,2
CO 0,1
CS 0
C[NH3+] 0
C[SH2+] 1
Cl 0
F 0
FC(F)F 1
I 0
N 0
N=CN 1
NC=O 0,1
N[SH](=O)=O 1
O 0
O=CNO 1
O=CO 1
O=C[O-] 1
O=PO 1
O=P[O-] 1
O=S=O 1
O=[NH+][O-] 1
O=[PH](O)O 1
O=[PH]([O-])O 1
O=[SH](=O)O 1
O=[SH](=O)[O-] 1
O=c1[nH]cnc2[nH]cnc12 3,6
O=c1[nH]cnc2c1NCCN2 8,3
O=c1cc[nH]c(=O)[nH]1 2,4
O=c1nc2[nH]c3ccccc3nc-2c(=O)[nH]1 8,4,7
O=c1nccc[nH]1 3,6
S 0
c1cc[nH+]cc1 1,3
c1cc[nH]c1 0,2
c1ccc2[nH]ccc2c1 6
c1ccc2ccccc2c1 0,2
c1ccccc1 0,1,2,3,4,5
c1ccncc1 0,1,2,4,5
c1ccsc1 2,4
c1cn[nH]c1 0,1,3,4
c1cncnc1 0,1,3,5
c1cscn1 0,3
c1ncc2nc[nH]c2n1 2,6
"""
"""72 fragments, 127 stems, at most 6 each."""

_LINEAR = """\
CO 1,0
O=c1[nH]cnc2[nH]cnc12 3,6
S 0,0
C1CNCCN1 2,5
c1cc[nH+]cc1 3,1
c1ccccc1 0,2
C1CCCCC1 0,2
CC(C)C 1,2
C1CCOCC1 0,2
c1cn[nH]c1 4,0
C1CCNC1 2,0
c1cncnc1 0,1
O=c1nc2[nH]c3ccccc3nc-2c(=O)[nH]1 8,4
c1ccncc1 1,0
O=c1nccc[nH]1 6,3
O=c1cc[nH]c(=O)[nH]1 2,4
C1CCOC1 2,4
C1CCNCC1 1,0
"""
"""18 fragments with two stems each: chains, a space small enough to enumerate."""


@dataclass(frozen=True)
class Vocabulary:
    """Fragments as SMILES, and the stem atoms of each. An atom that is listed twice is two stems."""

    smiles: tuple[str, ...]
    stems: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.smiles or len(self.smiles) != len(self.stems):
            raise InputError(f"expected stems for each fragment, got {len(self.smiles)} and {len(self.stems)}")
        for smiles, stems in zip(self.smiles, self.stems, strict=True):
            if not stems or min(stems) < 0:
                raise InputError(f"expected stem atoms of fragment {smiles!r} by index, got {list(stems)}")

    def __len__(self) -> int:
        return len(self.smiles)

    @property
    def max_stems(self) -> int:
        """The most stems of a fragment."""
        return max(map(len, self.stems))

    @cached_property
    def molecules(self) -> tuple[Any, ...]:
        """The fragments as RDKit molecules. Raises `InputError` naming a SMILES or a stem that is not there."""
        from rdkit import Chem

        found = []
        for smiles, stems in zip(self.smiles, self.stems, strict=True):
            molecule = Chem.MolFromSmiles(smiles)
            if molecule is None:
                raise InputError(f"expected a fragment that RDKit reads, got {smiles!r}")
            if max(stems) >= molecule.GetNumAtoms():
                raise InputError(f"expected stems below {molecule.GetNumAtoms()} in {smiles!r}, got {max(stems)}")
            found.append(molecule)
        return tuple(found)

    @classmethod
    def parse(cls, text: str) -> Vocabulary:
        """Of lines "SMILES 0,2,3". Raises `InputError` naming a line that is not one."""
        smiles, stems = [], []
        for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
            name, _, atoms = line.partition(" ")
            try:
                stems.append(tuple(int(atom) for atom in atoms.split(",")))
            except ValueError:
                raise InputError(f"expected SMILES and stem atoms in line {number}, got {line!r}") from None
            smiles.append(name)
        return cls(tuple(smiles), tuple(stems))


def full() -> Vocabulary:
    """The 72 fragments."""
    return Vocabulary.parse(_FULL)


def linear() -> Vocabulary:
    """The 18 linear fragments."""
    return Vocabulary.parse(_LINEAR)


def subset(vocabulary: Vocabulary, indices: Sequence[int]) -> Vocabulary:
    """Some fragments of a vocabulary. Raises `InputError` naming an index that is not in it."""
    for index in indices:
        if not 0 <= index < len(vocabulary):
            raise InputError(f"expected a fragment index below {len(vocabulary)}, got {index}")
    return Vocabulary(tuple(vocabulary.smiles[i] for i in indices), tuple(vocabulary.stems[i] for i in indices))
