"""What a paper claims, what was measured, and the forms both are shown in: terminal, JSON, Markdown, HTML.

The JSON is schema 1, which `validate` defines. A results file names no path of the machine it was made on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isotone.shared._arms import ArmLog
from isotone.shared._origin import code
from isotone.shared._plot import figure, save_figure
from isotone.shared._schema import CLAIM, HEAD, RATIO, reaches, validate
from isotone.shared._words import duration, markdown_cell, quantity
from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = [
    "ArmLog",
    "Claim",
    "Measurement",
    "Ratio",
    "Report",
    "figure",
    "html_page",
    "is_result",
    "rewrite_readme",
    "validate",
]

SCHEMA = 1
_VERDICTS = {True: "held", False: "not held", None: "not at this scale"}
_RESULT = re.compile(r"(reproduce-(smoke|cpu|gpu|paper)|bench-(cpu|gpu))\.json")
_BLOCK = re.compile(r"(<!-- (results|summary):(\S+) -->\n)(.*?)(<!-- /\2 -->)", re.S)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that can be measured.

    `source`: where the paper says it ("Table 2"). `paper`: its own figure. `threshold`: what our figure must
    reach, at least ("min") or at most ("max"), for the claim to be held; None where this scale cannot tell.
    """

    id: str
    statement: str
    source: str
    unit: str
    paper: float | str | None
    threshold: float | None
    direction: Literal["min", "max"]

    def __post_init__(self) -> None:
        if self.direction not in ("min", "max"):
            raise ValueError(f"expected direction to be min or max, got {self.direction!r}")


@dataclass(frozen=True)
class Measurement:
    """The figure measured for a claim, None where not at this scale, with its spread over the seeds."""

    claim: Claim
    measured: float | None
    spread: float | None = None

    @property
    def held(self) -> bool | None:
        return reaches(self.measured, self.claim.threshold, self.claim.direction)

    @property
    def verdict(self) -> str:
        """ "held", "not held", "not at this scale", or "reported" where a figure has no threshold to reach."""
        return "reported" if self.held is None and self.measured is not None else _VERDICTS[self.held]


@dataclass(frozen=True)
class Ratio:
    """Ours beside a peer on the same work, in the same unit; `target` is the ratio to reach, if any."""

    id: str
    work: str
    ours: str
    peer: str
    peer_version: str
    ours_value: float
    peer_value: float
    unit: str
    target: float | None
    higher_is_better: bool = False

    @property
    def ratio(self) -> float:
        """How many times better ours is: above 1 ours is better, whatever the unit."""
        ours, peer = float(self.ours_value), float(self.peer_value)
        return ours / peer if self.higher_is_better else peer / ours

    @property
    def held(self) -> bool | None:
        return reaches(self.ratio, self.target, "min")

    @property
    def verdict(self) -> str:
        """ "held", "not held", or "reported" where there is no target to reach."""
        return "reported" if self.held is None else _VERDICTS[self.held]


@dataclass
class Report:
    """What one run of `reproduce` (`measurements`) or of `bench` (`ratios`) came to.

    `data`: what `data.provenance` says of each piece of data. `figures`: matplotlib figures by name.
    """

    package: str
    kind: Literal["reproduce", "bench"]
    scale: str
    seeds: Sequence[int]
    framework: Literal["torch", "jax"]
    measurements: Sequence[Measurement] = ()
    ratios: Sequence[Ratio] = ()
    data: Sequence[Mapping[str, str]] = ()
    seconds: float = 0.0
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stem of its files: "reproduce-cpu", "bench-gpu"."""
        return f"{self.kind}-{self.scale}"

    @property
    def all_held(self) -> bool:
        """Whether nothing is "not held"; what this scale cannot tell does not count."""
        return all(item.held is not False for item in self.items)

    @property
    def items(self) -> list[Measurement | Ratio]:
        """Everything that has a verdict."""
        return [*self.measurements, *self.ratios]

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Code and machine the figures come from: version, commit, dirty, date, command, machine."""
        from isotone.shared.device import machine

        option = f"--scale {self.scale}" if self.kind == "reproduce" else "--device "
        option += {"cpu": "cpu", "gpu": "cuda"}[self.scale] if self.kind == "bench" else ""
        return {
            **code(self.package),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": f"isotone {self.package} {self.kind} {option}",
            "machine": machine(self.framework),
        }

    def to_json(self) -> dict[str, Any]:
        """The report as a schema 1 document; `InputError` where it is not one (a NaN, a scale unknown)."""
        if self.ratios if self.kind == "reproduce" else self.measurements:
            raise ValueError("expected measurements in a reproduce report and ratios in a bench report")
        own: dict[str, Any] = {
            "schema": SCHEMA,
            "package": self.package,
            "scale": self.scale,
            "seeds": [int(seed) for seed in self.seeds],
            "data": [dict(item) for item in self.data],
            "seconds": round(float(self.seconds), 3),
        }
        head = {**own, **self.origin}
        items = {
            "ratios": [_flat(RATIO, item, item) for item in self.ratios],
            "claims": [_flat(CLAIM, item, item.claim) for item in self.measurements],
        }
        listed = "ratios" if self.kind == "bench" else "claims"
        document = {**{name: head[name] for name in HEAD}, listed: items[listed]}
        validate(document)
        return document

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the JSON and, beside it, each figure as `NAME-FIGURE.png`; returns the JSON's path."""
        folder = Path(folder)
        document = self.to_json()
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in self.figures.items():
            save_figure(drawing, folder / f"{self.name}-{name}.png")
        for old in set(_plots(folder, self.name)) - {folder / f"{self.name}-{name}.png" for name in self.figures}:
            old.unlink()
        path = folder / f"{self.name}.json"
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write(path, (text + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """The report in a results file; `InputError` naming file and field where anything is off."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
            validate(document)
        except FileNotFoundError:
            raise InputError(f"expected results in {str(path)!r}, found no such file") from None
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        machine = document["machine"]
        report = cls(
            package=document["package"],
            kind="bench" if "ratios" in document else "reproduce",
            scale=document["scale"],
            seeds=tuple(document["seeds"]),
            framework="torch" if "torch" in machine else "jax",
            measurements=tuple(_measurement(item) for item in document.get("claims", ())),
            ratios=tuple(_ratio(item) for item in document.get("ratios", ())),
            data=document["data"],
            seconds=document["seconds"],
        )
        own = {"schema", "package", "scale", "seeds", "data", "seconds"}
        report.origin = {name: document[name] for name in HEAD if name not in own}
        return report

    def table(self) -> Table:
        """The table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        colours = {"held": "green", "not held": "bold red", "not at this scale": "dim", "reported": "dim"}
        header, rows = self.rows()
        table = Table(title=f"{self.package}: {self.kind}, {self.scale}", title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for *cells, verdict, _ in rows:
            table.add_row(*map(Text, cells), Text(verdict, colours[verdict]))
        return table

    def markdown(self, summary: bool = False) -> str:
        """The table for a README, with a line on where the figures come from below it.

        `summary`: without the rows that have no threshold to reach.
        """
        header, rows = self.rows()
        lines = [header, ["---"] * len(header)]
        for *cells, verdict, needed in rows:
            if summary and verdict == "reported":
                continue
            verdict = f"**{verdict}**" if verdict == "not held" else verdict
            lines.append([*cells, f"{verdict} ({needed})" if needed else verdict])
        table = "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)
        return f"{table}\n\n`{self.origin['command']}`: {self.conditions()}."

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Column names, and a row each: its cells, the verdict, and what the verdict asks for ("≥ 2")."""
        if self.kind == "bench":
            header = ["work", "ours", "peer", "ratio", "verdict"]
            return header, [
                [
                    item.work,
                    f"{item.ours}: {quantity(item.ours_value, unit=item.unit)}",
                    f"{item.peer} {item.peer_version}: {quantity(item.peer_value, unit=item.unit)}",
                    quantity(item.ratio) + " ×",
                    item.verdict,
                    "" if item.target is None else f"≥ {quantity(item.target)}",
                ]
                for item in self.ratios
            ]
        return ["claim", "paper", "measured", "verdict"], [
            [
                f"{item.claim.statement} ({item.claim.source})",
                quantity(item.claim.paper, unit=item.claim.unit),
                quantity(item.measured, item.spread, item.claim.unit),
                item.verdict,
                _threshold(item) if item.held is not None else "",
            ]
            for item in self.measurements
        ]

    def conditions(self) -> str:
        """Seeds, time and machine in a line."""
        machine = self.origin["machine"]
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}" if self.seeds else ""
        where = machine["gpu"] if self.scale == "gpu" and machine["gpu"] else machine["cpu"] or "unknown CPU"
        cores = f"{machine['cores']} cores of " if where == machine["cpu"] and machine["cores"] else ""
        parts = [seeds, duration(self.seconds), cores + where, f"{self.framework} {machine[self.framework]}"]
        return ", ".join(part for part in parts if part)


def is_result(path: str | os.PathLike[str]) -> bool:
    """Whether the file is named as results are: reproduce-SCALE.json or bench-DEVICE.json."""
    return bool(_RESULT.fullmatch(Path(path).name))


def rewrite_readme(path: str | os.PathLike[str]) -> str:
    """The text of the README at `path`, each block from results:FILE to /results filled in anew.

    FILE is relative to the README's folder; where it is absent the block says "not measured yet". A block from
    summary:FILE to /summary leaves out the rows that are only reported.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        start, kind, file, inside, end = match.groups()
        if "<!-- results:" in inside or "<!-- summary:" in inside:
            raise InputError(f"{path}: expected <!-- /{kind} --> after the block of {file}")
        results = path.parent / file
        body = Report.load(results).markdown(kind == "summary") if results.exists() else "not measured yet"
        return f"{start}\n{body}\n\n{end}"

    filled = _BLOCK.sub(fill, text)
    opened = len(re.findall(r"^<!-- (?:results|summary):", text, re.M))
    if opened != len(_BLOCK.findall(text)):
        raise InputError(f"{path}: expected <!-- /results --> after every <!-- results:FILE -->")
    return filled


def html_page(folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """One page at `path` of all results in `folders`, plots inside; it needs no other file, network or script."""
    from isotone.shared._page import page

    folders = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    files = (file for folder in map(Path, folders) for file in sorted(folder.glob("*.json"), reverse=True))
    reports = [(Report.load(file), _plots(file.parent, file.stem)) for file in files if is_result(file)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page(reports).encode())
    return path


def _flat(fields: Iterable[str], item: Measurement | Ratio, claim: Claim | Ratio) -> dict[str, Any]:
    """The fields of a claim or ratio in the schema's order, NumPy's scalars as Python's."""
    values = (getattr(item, name) if hasattr(item, name) else getattr(claim, name) for name in fields)
    return dict(zip(fields, map(_python_scalar, values), strict=True))


def _measurement(item: Mapping[str, Any]) -> Measurement:
    claim = Claim(**{part.name: item[part.name] for part in dataclasses.fields(Claim)})
    return Measurement(claim, item["measured"], item["spread"])


def _ratio(item: Mapping[str, Any]) -> Ratio:
    lower = math.isclose(item["ratio"] * item["ours_value"], item["peer_value"], rel_tol=1e-6)
    stored = [part.name for part in dataclasses.fields(Ratio) if part.name in item]
    return Ratio(**{name: item[name] for name in stored}, higher_is_better=not lower)


def _python_scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _no_constant(name: str) -> None:
    raise ValueError(f"expected strict JSON, got {name}")


def _plots(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.png"))


def _threshold(item: Measurement) -> str:
    sign = "≥" if item.claim.direction == "min" else "≤"
    return f"{sign} {quantity(item.claim.threshold, unit=item.claim.unit)}"
