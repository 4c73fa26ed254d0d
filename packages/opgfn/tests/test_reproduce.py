"""The reproduction at tiny sizes: every arm, resumed, and the scales that need what is not here."""

from __future__ import annotations

import dataclasses
import json

import pytest

from isotone.opgfn import bench as benchmark
from isotone.opgfn import reproduce as reproduction
from isotone.opgfn.cli import app
from isotone.opgfn.experiments.strings import NAS_ARMS, NasSetting, nas_arm
from isotone.shared.claims import Report
from isotone.shared.cli import Run
from isotone.shared.errors import InputError
from isotone.shared.testing import run_cli

TINY = dataclasses.replace(reproduction.SCALES["smoke"], seeds=(0, 1), measured=True)


def test_every_claim_is_measured_once_it_may_be(tmp_path, monkeypatch) -> None:
    run = Run(out=tmp_path, quiet=True)
    report = reproduction.measure(TINY, "cpu", run, reproduction.TABLES, "cpu")
    claims = [m.claim.id for m in report.measurements]
    assert claims[: len(reproduction.CLAIMS)] == list(reproduction.CLAIMS) and len(set(claims)) == len(claims)
    arms = {"hyper-beta-4", "nas-value-random", "string-top-0", "volume-qed-sa-genetic", "diversity-qed-sa-op-tb"}
    assert arms <= set(claims)
    assert all(m.measured is not None for m in report.measurements)
    spread = [m.claim.id for m in report.measurements if m.spread is None and "tried" not in m.claim.id]
    assert spread == ["hyper-order"]
    assert {"mass", "front", "hypergrid", "entropy", "nas", "fragments-front", "molecules"} <= set(report.figures)
    assert next(m.measured for m in report.measurements if m.claim.id == "hyper-order") == 0.0
    report.save(tmp_path / "saved")
    assert Report.load(tmp_path / "saved" / "reproduce-cpu.json").measurements
    # a second run takes every arm from the log
    import isotone.opgfn.tables as module

    for name in ("moo_arm", "hypergrid_arm", "nas_arm", "string_arm", "molecule_arm"):
        monkeypatch.setattr(module, name, None)
    again = reproduction.measure(TINY, "cpu", run, reproduction.TABLES, "cpu")
    assert [m.measured for m in again.measurements] == [m.measured for m in report.measurements]


def test_molecules_of_the_gpu_scale_at_a_tiny_size(tmp_path) -> None:
    full = reproduction.SCALES["gpu"]
    small = {"budget": 20, "steps": 2, "batch": 6, "max_fragments": 2, "channels": 8, "layers": 1, "workers": 0}
    pairs = tuple(
        dataclasses.replace(m, warmup=6, samples=6, **small) for m in full.molecules if "seh" not in m.objectives
    )
    setting = dataclasses.replace(full, molecules=pairs, seeds=(0, 1))
    assert len(full.molecules) == 6 and len(pairs) == 3
    report = reproduction.measure(setting, "gpu", Run(out=tmp_path, quiet=True), setting.tables, "cpu")
    measured = {m.claim.id for m in report.measurements if m.measured is not None}
    kinds = ("fragments-", "volume-", "diversity-", "igd-", "r2-", "pc-ent-", "top-", "tried-")
    assert measured and all(name.startswith(kinds) for name in measured)


def test_without_the_proxys_weights_its_pairs_are_left_out(monkeypatch) -> None:
    monkeypatch.delenv("ISOTONE_DATA_DIR", raising=False)
    left = reproduction.available(reproduction.SCALES["gpu"].molecules)
    assert len(left) == 3 and all("seh" not in setting.objectives for setting in left)


@pytest.mark.parametrize("arm", NAS_ARMS)
def test_architecture_search_keeps_to_its_budget(arm: str) -> None:
    setting = NasSetting(initial=16, rounds=2, proposals=5, steps=3, batch=8, width=16)
    found = nas_arm(setting, arm, 8.0, None, 0)
    assert found["evaluations"] > setting.initial and len(found["incumbent"]) <= setting.budget
    assert 0 <= found["final"] <= 1


def test_bench_runs_and_checks_its_peers(tmp_path) -> None:
    pytest.importorskip("pymoo")
    result = run_cli(app, ["bench", "--small", "--json", "--device", "cpu", "--out", str(tmp_path)])
    assert result.code == 0, result.stderr
    ratios = {item["id"] for item in json.loads(result.stdout)["ratios"]}
    assert {"fragment-trajectories", "hypervolume-3"} <= ratios


def test_bench_without_a_peer_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install torchgfn"):
        benchmark.bench(Run(out=tmp_path, device="cpu", quiet=True), small=True)
