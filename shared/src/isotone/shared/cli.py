"""The `isotone` command, and what every package's own command is made of.

The dispatcher is plain Python: listing the installed papers imports none of them, nor typer or rich.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from isotone.shared.errors import USAGE_ERROR, InputError, run_app

if TYPE_CHECKING:
    import typer

GROUP = "isotone.papers"
SCALES = ("smoke", "cpu", "gpu", "paper")
RESULTS = Path("isotone-results")
HELP = """\
usage: isotone                                     list the installed papers
       isotone NAME VERB ...                       one paper's command (isotone NAME --help)
       isotone reproduce [NAME ...] [--scale smoke|cpu|gpu|paper] [--out DIR] [any option of reproduce]
                                                   measure the claims of several papers, end in one table
       isotone report [DIR ...] [--out FILE]       one HTML page of the results below DIR
       isotone report --readme README.md ...       rewrite the result tables of READMEs"""


# --- the command of the whole house ---------------------------------------------------------------------


def main() -> NoReturn:
    """Entry point of `isotone` and of `python -m isotone.shared`."""
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(argv: Sequence[str]) -> int:
    """Run the `isotone` command on `argv` and return its exit code."""
    if not argv:
        return _list_papers()
    name, rest = argv[0], list(argv[1:])
    if name in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if name == "--version":
        from isotone.shared import __version__

        print(f"isotone-shared {__version__}")
        return 0
    papers = installed_papers()
    if name in papers:
        return run_app(papers[name].load(), rest, f"isotone {name}")
    try:
        if name == "reproduce":
            return _reproduce(rest, list(papers))
        if name == "report":
            return _report(rest)
    except (InputError, OSError) as error:
        print(f"isotone: {error}", file=sys.stderr)
        return USAGE_ERROR
    known = ", ".join([*papers, "reproduce", "report"])
    print(f"isotone: expected an installed paper or command ({known}), got {name!r}", file=sys.stderr)
    return USAGE_ERROR


def installed_papers() -> dict[str, Any]:
    """The entry points of the installed papers by name, sorted; none is imported."""
    from importlib.metadata import entry_points

    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)}


def _list_papers() -> int:
    papers = installed_papers()
    if not papers:
        print("No paper is installed. One paper: uv pip install isotone-NAME (README, Install).")
    width = max(map(len, papers), default=0)
    for name, point in papers.items():
        metadata = point.dist.metadata
        print(f"{name:{width}}  {metadata['Version']}  {metadata['Summary']}")
    print(HELP if not papers else "\nisotone NAME --help, isotone reproduce, isotone report; isotone --help")
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Positional words, the options --scale, --out and --readme, and every other option as it came."""
    words: list[str] = []
    ours: dict[str, str] = {}
    passed: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.partition("=")
        if key in ("--scale", "--out"):
            if not equals and not queue:
                raise InputError(f"expected a value after {key}")
            ours[key] = value if equals else queue.pop(0)
        elif key in ("--seeds", "--device"):
            passed += [word] if equals else [word, *queue[:1]]
            queue = queue if equals else queue[1:]
        elif word == "--readme":
            ours[key] = ""
        elif word.startswith("-"):
            passed.append(word)
        else:
            words.append(word)
    return words, ours, passed


def _reproduce(argv: Sequence[str], installed: list[str]) -> int:
    """Each paper in a process of its own, so that no paper's memory or failure touches the next."""
    import subprocess

    names, ours, passed = _split(argv)
    scale = ours.get("--scale", "smoke")
    out = Path(ours.get("--out", RESULTS))
    unknown = [name for name in names if name not in installed]
    if unknown:
        raise InputError(f"expected installed papers ({', '.join(installed) or 'none'}), got {unknown[0]!r}")
    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    as_json = "--json" in passed
    passed = ["--quiet" if word == "--json" else word for word in passed]
    quiet = "--quiet" in passed
    chosen = names or installed
    codes: dict[str, int] = {}
    for number, name in enumerate(chosen, 1):
        if not quiet:
            print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        module = "isotone." + name.replace("-", "_")
        command = [
            sys.executable,
            "-m",
            module,
            "reproduce",
            "--scale",
            scale,
            "--out",
            str(out / name),
            *passed,
        ]
        codes[name] = subprocess.run(command).returncode
    from isotone.shared import claims

    page = claims.html_page([out / name for name in chosen], out / "report.html")
    if as_json:
        import json

        found = [path for name in chosen if (path := out / name / f"reproduce-{scale}.json").exists()]
        print(json.dumps([json.loads(path.read_text(encoding="utf-8")) for path in found], indent=1))
    elif not quiet:
        _print_summary(chosen, codes, out, scale)
        print(f"report: {page}")
    return max(codes.values(), default=0)


def _print_summary(names: Sequence[str], codes: Mapping[str, int], out: Path, scale: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from isotone.shared.claims import Report

    verdicts = ("held", "not held", "reported", "not at this scale")
    table = Table("paper", *verdicts, "seconds", title=f"reproduce --scale {scale}")
    for name in names:
        path = out / name / f"reproduce-{scale}.json"
        if codes[name] and not path.exists():
            table.add_row(name, f"failed, exit code {codes[name]}")
            continue
        report = Report.load(path)
        found = [measurement.verdict for measurement in report.measurements]
        counts = [str(found.count(verdict)) for verdict in verdicts]
        table.add_row(name, *counts, f"{report.seconds:.0f}" + (" (failed since)" if codes[name] else ""))
    Console().print(table)


def _report(argv: Sequence[str]) -> int:
    from isotone.shared import claims

    words, ours, passed = _split(argv)
    if passed:
        raise InputError(f"expected --out or --readme, got {passed[0]!r}")
    if "--readme" in ours:
        for path in map(Path, words or ["README.md"]):
            text = claims.rewrite_readme(path)
            if text != path.read_text(encoding="utf-8"):
                path.write_text(text, encoding="utf-8")
        return 0
    folders = [Path(word) for word in words or [str(RESULTS)]]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"expected a folder of results, got {str(folder)!r}")
    found = sorted({path.parent for folder in folders for path in folder.rglob("*.json") if claims.is_result(path)})
    if not found:
        raise InputError(f"expected reproduce-*.json or bench-*.json below {str(folders[0])!r}, found none")
    print(claims.html_page(found, Path(ours.get("--out", folders[0] / "report.html"))))
    return 0


# --- what a package's command is made of ----------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The options that every working verb has.

    `out`: folder of everything written. `seeds`: None for the scale's own. `device`: "auto", "cpu" or "cuda".
    `resume`: continue what is in `out` (the default) or start fresh. `json`: one JSON document on stdout.
    `quiet`: print nothing but errors.
    """

    out: Path
    seeds: tuple[int, ...] | None = None
    device: str = "auto"
    resume: bool = True
    json: bool = False
    quiet: bool = False

    @property
    def silent(self) -> bool:
        """Whether tables, progress bars and remarks stay away."""
        return self.quiet or self.json


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """`"0,3,5"` or `"0:5"` (5 left out) to a tuple of distinct seeds; None stays None."""
    if text is None:
        return None
    try:
        if ":" in text:
            first, last = (int(part) for part in text.split(":"))
            seeds = tuple(range(first, last))
        else:
            seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise InputError(f"expected --seeds as distinct numbers below 2**32 such as 0,1,2 or 0:5, got {text!r}")
    return seeds


def paper_app(name: str, *, framework: str) -> typer.Typer:
    """The typer application of paper `name` (the folder's name), with the verb `info`.

    `framework` is "torch" or "jax".
    """
    import typer

    app = typer.Typer(name=name, no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=_summary(name))

    @app.callback()
    def root() -> None: ...

    @app.command(help="Paper, version, framework and the devices seen.")
    def info(as_json: bool = typer.Option(False, "--json", help="print JSON")) -> None:
        import importlib

        from isotone.shared import device

        module = importlib.import_module("isotone." + name.replace("-", "_"))
        facts = {"paper": _summary(name) or (module.__doc__ or name).splitlines()[0], "version": module.__version__}
        _print_mapping({**facts, **device.machine(framework)}, as_json)

    return app


def verb(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make `function(run: Run, ...)` a verb of `app` with the common options.

    The function's other parameters are its own typer options. A returned `Report` is saved into `run.out`,
    printed as a table (`--json`: as JSON) and made into `run.out/report.html`; such a verb, annotated
    `-> Report`, also gets `--strict`. A returned mapping is printed as lines, or as JSON.
    """
    import inspect
    import typing

    import typer

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        hints = typing.get_type_hints(function, include_extras=True)
        reports = getattr(hints.get("return"), "__name__", "") == "Report"

        def command(**options: Any) -> None:
            strict = options.pop("strict", False)
            common = {key: options.pop(key) for key in ("device", "resume", "json", "quiet")}
            out = Path(options.pop("out"))
            if out.exists() and not out.is_dir():
                raise InputError(f"expected --out to be a folder, got the file {str(out)!r}")
            run = Run(out=out, seeds=parse_seeds(options.pop("seeds")), **common)
            result = function(run, **options)
            if isinstance(result, Mapping):
                if not run.quiet or run.json:
                    _print_mapping(result, run.json)
            elif result is not None:
                _finish(result, run)
                if strict and not result.all_held:
                    raise typer.Exit(1)

        default = RESULTS / str(app.info.name)
        Option = typer.Option
        common: dict[str, tuple[Any, Any]] = {
            "out": (Path, Option(default, "--out", help="folder of everything written")),
            "seeds": (str | None, Option(None, "--seeds", help="0,1,2 or 0:3; the scale's own if not given")),
            "device": (str, Option("auto", "--device", help="auto, cpu or cuda")),
            "resume": (
                bool,
                Option(True, "--resume/--fresh", help="continue what is in --out, or start anew"),
            ),
            "json": (bool, Option(False, "--json", help="print one JSON document")),
            "quiet": (bool, Option(False, "--quiet", help="print nothing but errors")),
        }
        if reports:
            common["strict"] = (bool, Option(False, "--strict", help="exit 1 when a claim is not held"))
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [
            p.replace(annotation=hints.get(p.name, p.annotation), kind=kind)
            for p in list(inspect.signature(function).parameters.values())[1:]
        ]
        added = [inspect.Parameter(k, kind, default=d, annotation=a) for k, (a, d) in common.items()]
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        command.__doc__ = function.__doc__
        app.command(name or function.__name__.replace("_", "-"))(command)
        return function

    return decorate


def run_main(app: typer.Typer, name: str) -> NoReturn:
    """What a package's own `main` calls: run `app` on the process's arguments and exit."""
    sys.exit(run_app(app, sys.argv[1:], f"isotone {name}"))


def _finish(report: Any, run: Run) -> None:
    import json

    from isotone.shared import claims

    report.save(run.out)
    page = claims.html_page(run.out, run.out / "report.html")
    if run.json:
        print(json.dumps(report.to_json(), indent=1, allow_nan=False))
    elif not run.quiet:
        from rich.console import Console

        Console().print(report.table())
        print(f"report: {page}")


def _print_mapping(mapping: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(dict(mapping), indent=1, allow_nan=False, default=str))
        return
    width = max(map(len, mapping), default=0)
    for key, value in mapping.items():
        print(f"{key:{width}}  {value}")


def _summary(name: str) -> str:
    """The distribution's one-line summary; empty where the package runs from a source tree, not installed."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        return metadata(f"isotone-{name}")["Summary"]
    except PackageNotFoundError:
        return ""
