"""What changes from one scale of the reproduction to the next: sizes, seeds, rates; never the path."""

from __future__ import annotations

from dataclasses import dataclass, field

from isotone.distzo2.tasks import KeywordTask

TUNING_SEED = 1000
"""Of the runs that choose a learning rate; none of them is evaluated."""


@dataclass(frozen=True)
class SweepSetting:
    """The throttled link: ratios of compute to upload, blocks, seconds an upload takes, rounds."""

    ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    layers: int = 12
    transfer: float = 0.03
    rounds: int = 5


@dataclass(frozen=True)
class SlicedSetting:
    """Four ranks, transfer-bound: seconds of a block's upload and dual forward on one rank; `exchange`: how many times
    faster than its own link ranks exchange."""

    layers: int = 12
    width: int = 64
    transfer: float = 0.1
    compute: float = 0.02
    exchange: float = 6.0
    rounds: int = 5


@dataclass(frozen=True)
class AblationSetting:
    """One rank, transfer-bound: seconds of a block's upload and dual forward, with parts of the method left out."""

    layers: int = 12
    width: int = 64
    transfer: float = 0.03
    compute: float = 0.006
    rounds: int = 3


@dataclass(frozen=True)
class PertSetting:
    """The model whose step is timed on one and two ranks."""

    hidden: int = 256
    layers: int = 4
    length: int = 128
    rows: int = 8
    rounds: int = 12

    @property
    def shape(self) -> dict[str, int]:
        """What timing.lm_engine takes."""
        return {"hidden": self.hidden, "layers": self.layers, "length": self.length, "rows": self.rows}


@dataclass(frozen=True)
class Scale:
    """`steps` of the keyword task; `tuning_steps` of each run that chooses a rate; `equal_steps` of the equivalences.
    `ranks`: whether processes are started. `shapes`: of the offload measurements on a GPU. `device`: where it runs if
    nothing else is said; what is small, or a model of hardware, has nothing to gain from a GPU."""

    seeds: tuple[int, ...]
    task: KeywordTask = KeywordTask()
    steps: int = 3000
    tuning_steps: int = 1500
    equal_steps: int = 200
    zo_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    adamw_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    lora_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    sweep: SweepSetting = SweepSetting()
    sliced: SlicedSetting = SlicedSetting()
    pert: PertSetting = PertSetting()
    ablation: AblationSetting = AblationSetting()
    ranks: bool = True
    learns: bool = True
    shapes: tuple[str, ...] = ()
    needs_gpu: bool = False
    device: str = "cpu"
    needs_model: bool = False
    paper_rates: tuple[float, ...] = field(default=())


SCALES = {
    "smoke": Scale(
        (0,),
        steps=20,
        tuning_steps=5,
        equal_steps=10,
        zo_rates=(1e-3,),
        adamw_rates=(3e-3,),
        lora_rates=(),
        sweep=SweepSetting((0.5, 2.0), layers=4, transfer=0.02, rounds=2),
        ablation=AblationSetting(layers=3, transfer=0.01, compute=0.002, rounds=1),
        ranks=False,
        learns=False,
    ),
    "cpu": Scale((0, 1, 2)),
    # section 6 (b)
    "gpu": Scale(
        (0,),
        zo_rates=(1e-3,),
        shapes=("opt-1.3b", "opt-6.7b", "opt-13b"),
        learns=False,
        needs_gpu=True,
        device="auto",
    ),
    # section 6 (c), on the user's OPT and examples
    "paper": Scale(
        (0,), learns=False, ranks=False, needs_model=True, needs_gpu=True, device="auto", paper_rates=(1e-7, 1e-6)
    ),
}
