"""From a tree of fragments to a molecule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotone.opgfn.chem.vocabulary import Vocabulary


def silence_rdkit() -> None:
    """Keep RDKit's remarks about molecules that do not sanitise off stderr, in this process."""
    from rdkit import RDLogger

    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]


def assemble(
    vocabulary: Vocabulary, fragments: Sequence[int], bonds: Sequence[tuple[int, int, int, int]]
) -> Any | None:
    """The molecule of `fragments` joined by single `bonds` (node a, stem of a, node b, stem of b), sanitised.

    A bonded atom that carries explicit hydrogens gives one up. None where RDKit does not accept the molecule.
    Raises `ValueError` naming a fragment or stem index that is not in the vocabulary.
    """
    from rdkit import Chem

    for fragment in fragments:
        if not 0 <= fragment < len(vocabulary):
            raise ValueError(f"expected a fragment index below {len(vocabulary)}, got {fragment}")
    molecule, first = Chem.RWMol(), []
    for fragment in fragments:
        first.append(molecule.GetNumAtoms())
        molecule.InsertMol(vocabulary.molecules[fragment])
    for a, stem_a, b, stem_b in bonds:
        ends = []
        for node, stem in ((a, stem_a), (b, stem_b)):
            stems = vocabulary.stems[fragments[node]]
            if not 0 <= stem < len(stems):
                name = vocabulary.smiles[fragments[node]]
                raise ValueError(f"expected a stem index below {len(stems)} of {name!r}, got {stem}")
            ends.append(first[node] + stems[stem])
        molecule.AddBond(ends[0], ends[1], Chem.BondType.SINGLE)
        for end in ends:
            atom = molecule.GetAtomWithIdx(end)
            if atom.GetNumExplicitHs():
                atom.SetNumExplicitHs(atom.GetNumExplicitHs() - 1)
    try:
        Chem.SanitizeMol(molecule)
    except (Chem.rdchem.MolSanitizeException, ValueError):
        return None
    return molecule.GetMol()


def mol_from_state(env: Any, state: Any) -> Any | None:
    """The RDKit molecule of one state (width,) of a `FragmentEnv`; None where it is not whole or does not sanitise."""
    if tuple(state.shape) != (env.width,):
        raise ValueError(f"expected one state of shape ({env.width},), got {tuple(state.shape)}")
    if not bool(env.forward_mask(state[None])[0, env.stop]):
        return None
    return assemble(env.vocabulary, *env.tree(state.tolist()))


def smiles_of(
    vocabulary: Vocabulary, fragments: Sequence[int], bonds: Sequence[tuple[int, int, int, int]]
) -> str | None:
    """The canonical SMILES of `assemble`'s molecule, or None."""
    from rdkit import Chem

    molecule = assemble(vocabulary, fragments, bonds)
    return None if molecule is None else Chem.MolToSmiles(molecule)
