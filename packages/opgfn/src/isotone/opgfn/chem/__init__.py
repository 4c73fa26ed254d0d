"""Molecules: the fragment vocabulary, decoding, objectives on RDKit, the sEH proxy, a pool of workers."""

from isotone.opgfn.chem.decode import mol_from_state
from isotone.opgfn.chem.objectives import Objectives

__all__ = ["Objectives", "mol_from_state"]
