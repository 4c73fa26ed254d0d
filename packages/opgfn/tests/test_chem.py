"""Objectives of molecules against RDKit's own, the worker pool, the sEH proxy against a naive reference."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import reference
import torch
from rdkit import Chem
from rdkit.Chem import QED, Crippen, Descriptors
from safetensors.torch import save_file

from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.chem.pool import WorkerPool
from isotone.opgfn.chem.seh import _PLACES, WEIGHTS, SEHProxy, featurize
from isotone.shared.data import local
from isotone.shared.errors import InputError

SMILES = ["CCO", "c1ccccc1", "CC(=O)Nc1ccc(O)cc1", "C1CNCCN1", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "C#N"]


def test_values_are_rdkits() -> None:
    found = Objectives(["qed", "mw", "logp"])(SMILES)
    for row, text in zip(found, SMILES, strict=True):
        molecule = Chem.MolFromSmiles(text)
        weight = Descriptors.MolWt(molecule)
        expected = [QED.qed(molecule), min(1.0, max(0.0, 1 + (300 - weight) / 700))]
        expected.append(math.exp(-((Crippen.MolLogP(molecule) - 2.5) ** 2) / 2))
        assert row == pytest.approx(expected)


def test_accessibility_and_naturalness_have_their_order() -> None:
    simple, hard = "CCO", "CC1(C)C2CCC1(C)C(=O)C2C1CC2(C)C(O)CC3C4CCC(=O)C=C4CCC3C12"
    found = Objectives(["sa", "np"])([simple, hard, "Clc1ccc(Cl)cc1S(=O)(=O)Nc1ccc(F)cc1"])
    assert ((0 <= found) & (found <= 1)).all()
    assert found[0, 0] > found[1, 0], "ethanol is easier to make"
    assert found[1, 1] > found[2, 1], "a steroid is more of nature than a sulphonamide"


def test_each_smiles_is_computed_once() -> None:
    with Objectives(["qed"]) as objectives:
        objectives(SMILES)
        again = objectives([*SMILES, *SMILES, Chem.MolFromSmiles("OCC")])
        assert len(objectives.memo) == len(SMILES) and objectives.lookups == 3 * len(SMILES) + 1
        assert again[0] == again[-1] == again[len(SMILES)]
        assert objectives([]).shape == (0, 1)


def test_workers_return_what_this_process_would() -> None:
    here = Objectives(["qed", "sa", "logp"])
    with Objectives(["qed", "sa", "logp"], workers=2) as there:
        assert np.array_equal(here(SMILES), there(SMILES))
        with pytest.raises(InputError, match="'nonsense'"):
            there(["CC", "nonsense"])
    with pytest.raises(ValueError, match="closed"):
        there(["CCC"])


def test_objectives_refuse() -> None:
    for call, words in [
        (lambda: Objectives(["qed", "beauty"]), "qed, beauty"),
        (lambda: Objectives([]), "got none"),
        (lambda: Objectives(["qed", "qed"]), "distinct"),
        (lambda: Objectives(["qed"])(["nonsense"]), "'nonsense'"),
        (lambda: Objectives(["qed"])([3]), "got 3"),
        (lambda: Objectives(["seh"], seh_weights="missing.safetensors"), "missing.safetensors"),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert words in str(error.value)
    with pytest.raises(ValueError, match="got 0"):
        WorkerPool(0, len, None)


# --- the sEH proxy ------------------------------------------------------------------------------------------


def random_proxy(tmp_path) -> tuple[SEHProxy, dict[str, torch.Tensor]]:
    shapes = {name: tensor.shape for name, tensor in SEHProxy().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i:03d}": torch.zeros(1) for i in range(22)}
    for name, place in _PLACES.items():
        tensors[f"{place:03d}"] = 0.15 * torch.randn(shapes[name], generator=generator)
    save_file(tensors, tmp_path / "weights.safetensors")
    return SEHProxy.load(tmp_path / "weights.safetensors"), tensors


def test_proxy_is_the_message_passing_network(tmp_path) -> None:
    proxy, tensors = random_proxy(tmp_path)
    weights = {name: tensors[f"{place:03d}"].double().numpy() for name, place in _PLACES.items()}
    found = proxy([*SMILES, "C", "[Na+].[Cl-]"])
    for score, text in zip(found, [*SMILES, "C"], strict=False):
        assert score == pytest.approx(reference.seh(weights, text), abs=1e-4)
    assert np.isfinite(found).all() and len(proxy([])) == 0


def test_proxy_scores_do_not_depend_on_the_batch(tmp_path) -> None:
    proxy, _ = random_proxy(tmp_path)
    together = proxy(SMILES)
    assert together == pytest.approx([float(proxy([text])[0]) for text in SMILES], abs=1e-4)
    assert proxy(["OCC"])[0] == pytest.approx(proxy(["CCO"])[0], abs=1e-4)
    objectives = Objectives(["seh", "qed"], seh_weights=tmp_path / "weights.safetensors")
    assert objectives(SMILES)[:, 0] == pytest.approx(np.clip(together / 8, 1e-4, 100))


def test_atom_features() -> None:
    atoms, bonds, kinds, owner = featurize(["C=O", "c1ccccc1", "F"])
    assert atoms.shape == (9, 71) and owner.tolist() == [0] * 2 + [1] * 6 + [2]
    assert atoms[0, 1] == 1 and atoms[1, 3] == 1 and atoms[8, 4] == 1
    assert atoms[0, 13] == 2 and atoms[0, 14 + 5] == 1 and atoms[1, 14 + 7] == 1
    assert (atoms[2:8, 9] == 1).all() and (atoms[2:8, 11] == 1).all()
    assert kinds[:2].tolist() == [[0, 1, 0, 0]] * 2 and (kinds[2:14, 3] == 1).all() and kinds[14].sum() == 0
    assert bonds[:, 14].tolist() == [8, 8], "a lone atom speaks to itself"


def test_proxy_refuses(tmp_path) -> None:
    proxy, tensors = random_proxy(tmp_path)
    with pytest.raises(InputError, match="'nonsense'"):
        proxy(["nonsense"])
    with pytest.raises(InputError, match="Ra"):
        proxy(["[Ra]"])
    save_file({"000": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("other", "missing"):
        with pytest.raises(InputError, match=name):
            SEHProxy.load(tmp_path / f"{name}.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="torn"):
        SEHProxy.load(tmp_path / "torn.safetensors")


def test_real_weights_score_known_inhibitors_above_fragments() -> None:
    if local(WEIGHTS) is None or local("molecules/seh_chembl.csv") is None:
        pytest.skip(f"needs {WEIGHTS} and molecules/seh_chembl.csv in ISOTONE_DATA_DIR")
    with open(local("molecules/seh_chembl.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";"))[:120]
    known = [row["Smiles"] for row in rows if row["Smiles"] and Chem.MolFromSmiles(row["Smiles"])]
    scores = SEHProxy.load()(known)
    assert 3 < scores.mean() < 8 and scores.mean() > SEHProxy.load()(SMILES).mean() + 2
