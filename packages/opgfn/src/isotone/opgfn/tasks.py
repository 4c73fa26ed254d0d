"""The environments by name, with the objectives and the paper's hyper-parameters of each (section 2.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotone.opgfn.chem.objectives import NAMES, Objectives
from isotone.opgfn.chem.vocabulary import Vocabulary, full, linear
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import DNA, Bag, BindingTable, Environment, FragmentEnv, HyperGrid, MOOGrid, NasCell, NGrams
from isotone.opgfn.policies import GraphPolicy, MLPPolicy, Policy, SetPolicy
from isotone.opgfn.replay import ReplayConfig
from isotone.shared.errors import InputError

ENVIRONMENTS = ("hypergrid", "moo-grid", "bag", "binding", "ngrams", "dna", "nas", "fragments")


@dataclass(frozen=True)
class TaskSpec:
    """What names a task, as JSON can say it. Options that an environment does not have are not looked at.

    `objectives`: names, the environment's usual ones where empty. `vocabulary`: "full", "linear" or a file of lines
    "SMILES 0,2,3". `channels`, `layers`: of the graph policy.
    """

    env: str = "moo-grid"
    objectives: tuple[str, ...] = ()
    side: int = 32
    dim: int = 2
    r0: float = 0.1
    length: int | None = None
    max_fragments: int = 9
    vocabulary: str = "full"
    channels: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        if self.env not in ENVIRONMENTS:
            raise InputError(f"expected an environment of {', '.join(ENVIRONMENTS)}, got {self.env!r}")
        if self.length is not None and self.length < 1:
            raise InputError(f"expected a length of at least 1, got {self.length}")


@dataclass(frozen=True)
class Task:
    """An environment, what is maximised there, and the settings to start from."""

    spec: TaskSpec
    env: Environment
    objective: Callable[[Any], Any]
    names: tuple[str, ...]
    config: TrainConfig
    replay: ReplayConfig

    def policy(self, config: TrainConfig, condition_dim: int = 0) -> Policy:
        """A policy with the heads that `config.objective` needs."""
        heads: dict[str, Any] = {
            "backward": config.lambda_kl > 0,
            "flow": config.needs_flow,
            "inter": config.family.startswith("fl-"),
            "condition_dim": condition_dim,
        }
        if isinstance(self.env, FragmentEnv):
            return GraphPolicy(self.env, self.spec.channels, self.spec.layers, **heads)
        if self.spec.env == "bag":
            return SetPolicy(self.env, (64, 64), **heads)
        hidden = {"binding": (128, 128), "nas": (256, 256)}.get(self.spec.env, (64, 64, 64))
        return MLPPolicy(self.env, hidden, **heads)


_GRID = TrainConfig(lr=1e-2, lr_log_z=1e-2, weight_decay=1e-4, batch_size=128, epsilon=0.01)
_STRINGS = TrainConfig(lr=1e-3, lr_log_z=1e-2, batch_size=32, epsilon=0.01)
_PRT = ReplayConfig("prioritized", offline=32)
_CONFIGS: dict[str, tuple[TrainConfig, ReplayConfig]] = {
    "hypergrid": (TrainConfig(lr=1e-3, batch_size=64, epsilon=0.05), ReplayConfig("prioritized", offline=64)),
    "moo-grid": (_GRID, ReplayConfig()),
    "bag": (dataclasses.replace(_STRINGS, epsilon=0.1), _PRT),
    "binding": (_STRINGS, _PRT),
    "ngrams": (dataclasses.replace(_STRINGS, batch_size=128), ReplayConfig()),
    "dna": (dataclasses.replace(_STRINGS, batch_size=64), ReplayConfig()),
    "nas": (TrainConfig(lr=1e-3, lr_log_z=1e-1, batch_size=64, epsilon=0.01), _PRT),
    "fragments": (
        TrainConfig(lr=5e-4, lr_log_z=1e-3, batch_size=64, epsilon=0.01, weight_decay=1e-8, lr_half_life=20_000),
        ReplayConfig(),
    ),
}


def make_task(spec: TaskSpec, *, workers: int = 0, seh_weights: Path | None = None) -> Task:
    """The task that `spec` names. Raises `InputError` naming what it can not be made of.

    `workers`, `seh_weights`: of the objectives of molecules.
    """
    config, replay = _CONFIGS[spec.env]
    try:
        env, objective, names = _make(spec, workers, seh_weights)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Task(spec, env, objective, names, config, replay)


def _make(spec: TaskSpec, workers: int, seh_weights: Path | None) -> tuple[Environment, Callable[[Any], Any], tuple]:
    given = spec.objectives
    if len(set(given)) < len(given):
        raise InputError(f"expected each objective once, got {', '.join(given)}")
    if spec.env == "fragments":
        molecules = FragmentEnv(read_vocabulary(spec.vocabulary), spec.max_fragments)
        names = given or ("qed", "sa")
        return molecules, Objectives(names, workers=workers, seh_weights=seh_weights), names
    env: Any
    if spec.env == "moo-grid":
        env = MOOGrid(given or ("branin", "currin"), spec.side)
    elif spec.env == "ngrams":
        env = NGrams(given or ("AC", "CV", "VA"), spec.length or 18)
    elif spec.env == "dna":
        env = DNA(given or ("pairs", "length"), spec.length or 30)
    else:
        if given:
            raise InputError(f"expected no --objectives for {spec.env}, which has its own, got {', '.join(given)}")
        simple: dict[str, Callable[[], Any]] = {
            "hypergrid": lambda: HyperGrid(spec.dim, spec.side, spec.r0),
            "bag": Bag,
            "binding": lambda: BindingTable(spec.length or 8),
            "nas": NasCell,
        }
        env = simple[spec.env]()
    return env, env.objective, tuple(getattr(env, "objectives", ("value",)))


def read_vocabulary(name: str) -> Vocabulary:
    """The vocabulary "full" or "linear", or that of a file. Raises `InputError` where there is no such file."""
    if name in ("full", "linear"):
        return full() if name == "full" else linear()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"expected a vocabulary full, linear or a file, got {name!r}")
    vocabulary = Vocabulary.parse(read_text(path))
    _ = vocabulary.molecules  # refused here, not in the middle of a run
    return vocabulary


def read_text(path: Path) -> str:
    """The text of a file. Raises `InputError` where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {str(path)!r}") from None


def spec_from(document: dict[str, Any], where: str) -> TaskSpec:
    """The task that a saved model names. Raises `InputError` where it names none."""
    try:
        fields = dict(document["meta"]["task"])
        return TaskSpec(**{**fields, "objectives": tuple(fields["objectives"])})
    except (KeyError, TypeError):
        raise InputError(f"expected a model saved by `isotone opgfn train` in {where!r}") from None


def check_molecule_objectives(names: Sequence[str]) -> None:
    """Raise `InputError` on an objective of molecules that there is not."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise InputError(f"expected objectives of {', '.join(NAMES)}, got {', '.join(names) or 'none'}")
