"""The environments: batched, with exact masks both ways; a state is a row of integers.

`envs.gym` wraps any of them for gymnasium, where that is installed.
"""

from isotone.opgfn.envs.base import Environment
from isotone.opgfn.envs.counts import Bag, NasCell
from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.envs.grid import Grid, HyperGrid, MOOGrid
from isotone.opgfn.envs.sequences import DNA, BindingTable, NGrams
from isotone.opgfn.envs.strings import StringEnv

__all__ = [
    "DNA",
    "Bag",
    "BindingTable",
    "Environment",
    "FragmentEnv",
    "Grid",
    "HyperGrid",
    "MOOGrid",
    "NGrams",
    "NasCell",
    "StringEnv",
]
