"""Objectives of molecules, all maximised and, but for seh, in [0, 1]: by RDKit alone (section 2.6) or the sEH proxy.

qed: quantitative estimate of drug-likeness. sa: (10 - synthetic accessibility score) / 9. np: natural-product
likeness from [-5, 5]. mw: clip(1 + (300 - weight) / 700). logp: exp(-(logP - 2.5)^2 / 2), our own window. seh: the
proxy's score / 8, clipped to [1e-4, 100].
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from isotone.opgfn.chem.decode import silence_rdkit
from isotone.opgfn.chem.pool import WorkerPool
from isotone.shared.errors import InputError

NAMES = ("qed", "sa", "np", "mw", "logp", "seh")


class Objectives:
    """Objectives by name, of SMILES or RDKit molecules, each distinct SMILES computed once.

    `workers`: processes that share the work; 0 computes here. `seh_weights`: the file of the proxy's weights, else
    molecules/seh_proxy.safetensors in the folder that ISOTONE_DATA_DIR names. Close it, or use it in a `with`, where
    it has workers. Raises `InputError` on an unknown name, or a SMILES that RDKit does not read.
    """

    def __init__(
        self, names: Sequence[str] = ("qed", "sa"), *, workers: int = 0, seh_weights: str | Path | None = None
    ) -> None:
        unknown = [name for name in names if name not in NAMES]
        if unknown or not names or len(set(names)) < len(names):
            raise InputError(f"expected distinct objectives of {', '.join(NAMES)}, got {', '.join(names) or 'none'}")
        self.names = tuple(names)
        self.proxy: Any = None
        if "seh" in names:
            from isotone.opgfn.chem.seh import SEHProxy

            self.proxy = SEHProxy.load(seh_weights)
        self.rdkit_names = tuple(name for name in self.names if name != "seh")
        self.memo: dict[str, tuple[float, ...]] = {}
        self.lookups = 0
        self.pool = WorkerPool(workers, evaluate, self.rdkit_names) if workers else None

    def __call__(self, molecules: Sequence[Any]) -> np.ndarray:
        """(n, objectives) of n SMILES or molecules. Raises `InputError` on a single one that is no list."""
        if isinstance(molecules, str):
            raise InputError(f"expected a list of SMILES, got one: {molecules!r}")
        texts = [_smiles(molecule) for molecule in molecules]
        self.lookups += len(texts)
        fresh = list(dict.fromkeys(text for text in texts if text not in self.memo))
        if fresh:
            values = np.asarray(self.pool(fresh) if self.pool else evaluate(self.rdkit_names, fresh), dtype=np.float64)
            values = values.reshape(len(fresh), len(self.rdkit_names))
            columns = dict(zip(self.rdkit_names, values.T, strict=True))
            if self.proxy is not None:
                columns["seh"] = np.clip(self.proxy(fresh) / 8, 1e-4, 100.0)
            rows = np.stack([columns[name] for name in self.names], 1)
            self.memo.update(zip(fresh, map(tuple, rows.tolist()), strict=True))
        return np.array([self.memo[text] for text in texts]).reshape(len(texts), len(self.names))

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> Objectives:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def evaluate(names: tuple[str, ...], smiles: Sequence[str]) -> list[tuple[float, ...]]:
    """The RDKit objectives of some SMILES: what a worker runs; SMILES go in, numbers come out."""
    from rdkit import Chem

    silence_rdkit()
    rows = []
    for text in smiles:
        # a new molecule each time: descriptors are cached on it
        molecule = Chem.MolFromSmiles(text)
        if molecule is None or molecule.GetNumAtoms() == 0:
            raise InputError(f"expected a SMILES that RDKit reads, got {text!r}")
        rows.append(tuple(float(_FUNCTIONS[name](molecule)) for name in names))
    return rows


def _smiles(molecule: Any) -> str:
    if isinstance(molecule, str):
        return molecule
    from rdkit import Chem

    if not isinstance(molecule, Chem.Mol):
        raise InputError(f"expected SMILES or RDKit molecules, got {molecule!r}")
    return Chem.MolToSmiles(molecule)


def _qed(molecule: Any) -> float:
    from rdkit.Chem import QED

    return QED.qed(molecule)


def _sa(molecule: Any) -> float:
    return (10.0 - _contrib("SA_Score", "sascorer").calculateScore(molecule)) / 9.0


def _np(molecule: Any) -> float:
    score = _contrib("NP_Score", "npscorer").scoreMol(molecule, _np_model())
    return min(1.0, max(0.0, (score + 5.0) / 10.0))


def _mw(molecule: Any) -> float:
    from rdkit.Chem import Descriptors

    return min(1.0, max(0.0, 1.0 + (300.0 - Descriptors.MolWt(molecule)) / 700.0))  # type: ignore[attr-defined]


def _logp(molecule: Any) -> float:
    from rdkit.Chem import Crippen

    octanol: float = Crippen.MolLogP(molecule)  # type: ignore[attr-defined]
    return math.exp(-((octanol - 2.5) ** 2) / 2)


_FUNCTIONS: dict[str, Callable[[Any], float]] = {"qed": _qed, "sa": _sa, "np": _np, "mw": _mw, "logp": _logp}


@functools.cache
def _contrib(folder: str, name: str) -> ModuleType:
    """A module of RDKit's Contrib folder, which ships in its wheel but is no package."""
    from rdkit import RDConfig

    path = Path(RDConfig.RDContribDir, folder, f"{name}.py")
    if not path.is_file():
        raise InputError(f"expected RDKit's Contrib/{folder}/{name}.py, found none: install rdkit from PyPI")
    spec = importlib.util.spec_from_file_location(f"rdkit_contrib_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def _np_model() -> Any:
    import contextlib
    import io

    # it announces on stderr that it reads its table
    with contextlib.redirect_stderr(io.StringIO()):
        return _contrib("NP_Score", "npscorer").readNPModel()
