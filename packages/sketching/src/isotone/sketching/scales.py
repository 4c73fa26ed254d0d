"""What changes from one scale of the reproduction to the next: sizes, arms, seeds; never the path."""

from __future__ import annotations

from dataclasses import dataclass

from isotone.sketching.attack import AttackConfig
from isotone.sketching.audit import AuditConfig
from isotone.sketching.convergence import CONVEX, PROBLEMS
from isotone.sketching.private_study import TRUSTS, PrivateSetting
from isotone.sketching.study import KINDS as SKETCHES
from isotone.sketching.study import OTHERS, Setting

KINDS = ("gaussian", "ams", "countsketch", "countsketch-blocks", "sparse", "srht-replace", "srht")
"""Of the table of 1 + alpha."""
ARMS = ("fedavg", *SKETCHES, *OTHERS)
_FREE = AttackConfig(restarts=2, bounded=False)
"""The specification's attack: it does not know that pixels lie in [0, 1]."""


@dataclass(frozen=True)
class Scale:
    """`setting` of the federated problem and its `arms`; `draws` of the embedding of each of `kinds`; `curves`: (kind,
    s) beside the bounds of `problems`, each the mean of `curve_draws`; `local_curves`: (problem, kind, s) of several
    local steps; `sent`: sketches whose numbers are counted;
    `ablations`: whether to show what a fixed sketch and too large a step do;
    `audits` of plain messages and the `private_audit`, in which `control` is a noise that hides little; `private`
    training by each of `trusts` (where "local" is none of them the attacked noise is that of the last of its rounds).
    `judged`: whether the scale is large enough to say what holds. `hidden`: units of the MLP that is attacked, whose
    weights are not trained."""

    setting: Setting = Setting()
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = KINDS
    draws: int = 20_000
    problems: tuple[str, ...] = PROBLEMS
    curves: tuple[tuple[str, int], ...] = (("countsketch", 8), ("srht", 16), ("gaussian", 32), ("srht", 64))
    local_curves: tuple[tuple[str, str, int], ...] = tuple(
        (problem, kind, 32) for problem in CONVEX for kind in ("srht", "countsketch")
    )
    sent: tuple[tuple[str, int], ...] = curves
    curve_draws: int = 20
    ablations: bool = True
    hidden: int = 32
    audits: tuple[tuple[str, AuditConfig], ...] = (
        ("single", AuditConfig((None, 1024, 512, 256, 128, 64, 32), (1,), (1,), 4, attack=_FREE)),
        ("bounded", AuditConfig((64, 48, 32), (1,), (1,), 4, attack=AttackConfig(restarts=2))),
        ("steps", AuditConfig((None, 1024, 256, 128, 64), (1,), (5,), 4, attack=_FREE)),
        ("batches", AuditConfig((None, 1024, 512), (8,), (1, 5), 2, attack=AttackConfig(steps=1000, restarts=2))),
    )
    private_audit: AuditConfig = AuditConfig((), (), (), private_messages=25, private_sizes=(None, 241))
    control: float = 0.02
    private: PrivateSetting = PrivateSetting()
    trusts: tuple[str, ...] = TRUSTS
    judged: bool = True


_PICTURES = Setting(model="cnn", plain_rounds=200)
SCALES = {
    "smoke": Scale(
        setting=Setting("linear", plain_rounds=10, looks=5, rates=(1.0,), clients=10),
        arms=("fedavg", "srht"),
        seeds=(0,),
        kinds=(),
        curves=(),
        local_curves=(),
        sent=(),
        curve_draws=5,
        ablations=False,
        hidden=8,
        audits=(),
        private_audit=AuditConfig(
            (), (), (), private_messages=4, private_attack=AttackConfig(steps=30, restarts=2), private_sizes=(None,)
        ),
        private=PrivateSetting(epsilons=(8.0,), rounds=(5,), rates=(0.5,)),
        trusts=(),
        judged=False,
    ),
    "cpu": Scale(),
    "gpu": Scale(setting=_PICTURES, curve_draws=200),
    "paper": Scale(setting=Setting(model="cnn", plain_rounds=400), seeds=tuple(range(8)), curve_draws=1000),
}
