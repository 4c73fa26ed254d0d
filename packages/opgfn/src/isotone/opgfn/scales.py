"""What changes from one scale of the reproduction to the next: sizes, seeds, what is tried; never the path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isotone.opgfn.experiments.grids import HyperSetting, MOOSetting
from isotone.opgfn.experiments.molecules import MoleculeSetting
from isotone.opgfn.experiments.strings import NasSetting, StringSetting

TUNING_SEEDS = (1000, 1001, 1002)
SINGLE_LABELS = ("pairwise", "all-pairs", "pareto", "buffer", "rank", "bce")
MOLECULE_LABELS = {"op-tb": "OP-TB", "pc-tb": "PC-GFN", "gc-tb": "GC-GFN", "genetic": "genetic (NSGA-II)"}
TABLES = ("moo-grid", "hypergrid", "nas", "strings", "fragments")


@dataclass(frozen=True)
class Scale:
    """What changes from one scale to the next: sizes, seeds, the grids of beta; never the path."""

    seeds: tuple[int, ...]
    moo: MOOSetting
    hyper: HyperSetting
    nas: NasSetting
    strings: StringSetting
    molecules: tuple[MoleculeSetting, ...]
    pc_betas: tuple[float, ...] = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
    hyper_betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    nas_betas: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    string_betas: tuple[float, ...] = (1.0, 3.0, 8.0, 16.0, 32.0, 64.0)
    molecule_betas: tuple[float, ...] = (8.0, 24.0, 60.0)
    # as many labels of OP as exponents of the baselines
    nas_labels: tuple[str, ...] = SINGLE_LABELS
    string_labels: tuple[str, ...] = SINGLE_LABELS
    molecule_labels: tuple[str, ...] = ("pareto", "buffer", "rank")
    tables: tuple[str, ...] = TABLES
    needs_gpu: bool = False
    measured: bool = True


def _pairs(**options: Any) -> tuple[MoleculeSetting, ...]:
    names = ("seh", "qed", "sa", "mw")
    return tuple(MoleculeSetting(objectives=(a, b), **options) for i, a in enumerate(names) for b in names[i + 1 :])


_FULL = {"max_fragments": 9, "lr": 1e-4, "channels": 128, "layers": 4, "workers": 15, "warmup": 1000}
SCALES = {
    "smoke": Scale(
        (0,),
        MOOSetting(side=8, steps=12, batch=16, samples=64, preferences=4),
        HyperSetting(side=8, steps=6, batch=8, offline=8, samples=32, points=2),
        NasSetting(initial=12, rounds=1, proposals=4, steps=2, batch=8, width=16),
        StringSetting(budget=60, steps=2, batch=8, offline=8, width=16, top=10),
        (MoleculeSetting(max_fragments=2, budget=24, steps=2, batch=8, channels=16, layers=1, warmup=8, samples=8),),
        *((4.0,), (1.0, 4.0), (8.0,), (3.0,), (8.0,)),
        *(("pairwise",), ("pairwise",), ("pareto",)),
        measured=False,
    ),
    "cpu": Scale((0, 1, 2), MOOSetting(), HyperSetting(), NasSetting(), StringSetting(), (MoleculeSetting(),)),
    # section 6 (b): fragments on a GPU, the pairs that need no weights first
    "gpu": Scale(
        (0, 1, 2),
        *(MOOSetting(), HyperSetting(), NasSetting(), StringSetting()),
        _pairs(budget=400_000, steps=3000, batch=256, samples=3200, **_FULL),
        molecule_betas=(60.0,),
        molecule_labels=("pareto",),
        tables=("fragments",),
        needs_gpu=True,
    ),
    # section 6 (c): the recipe of the paper, apart from the data that can not be had
    "paper": Scale(
        (0, 1, 2),
        MOOSetting(steps=1000),
        HyperSetting(steps=2000),
        NasSetting(rounds=50, steps=200),
        StringSetting(budget=60_000, steps=2000),
        _pairs(budget=1_300_000, steps=20_000, batch=64, samples=3200, **_FULL),
        needs_gpu=True,
    ),
}
