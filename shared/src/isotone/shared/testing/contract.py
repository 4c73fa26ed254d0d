"""The contract that every package keeps: one suite, run for each package in that package's environment.

`ISOTONE_PACKAGE` names the package's folder; the tests run from the workspace's root, with the package's
`tests` folder on the path (for its `contract.py`: JOB, BAD, files). `nox -s "tests(NAME)"` sets all of it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isotone.shared import claims
from isotone.shared.cli import dispatch
from isotone.shared.testing import Result, readme_blocks, run_cli
from isotone.shared.testing.cores import slowness

NAME = os.environ["ISOTONE_PACKAGE"]
MODULE = "isotone." + NAME.replace("-", "_")
ROOT = Path.cwd()
FOLDER = ROOT / "packages" / NAME
SOURCE = FOLDER / "src" / "isotone" / NAME.replace("-", "_")
PROJECT: dict[str, Any] = tomllib.loads((FOLDER / "pyproject.toml").read_text())
FRONT = {"cli", "reproduce", "bench", "__main__"}  # what may print, parse arguments and import the method
COMMON = {"--out", "--seeds", "--device", "--resume", "--json", "--quiet"}
SMOKE_SECONDS = 15
README_SECONDS = 20


@functools.cache
def package() -> Any:
    return importlib.import_module(MODULE)


@functools.cache
def app() -> Any:
    return importlib.import_module(MODULE + ".cli").app


def run(argv: list[str], folder: Path) -> Result:
    return run_cli(app(), argv, folder)


def trees(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# --- layout and metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "tests/contract.py"]
    + ["tests/reference.py", "benchmarks", "results", "src"],
)
def test_layout(path: str) -> None:
    assert (FOLDER / path).exists()


@pytest.mark.parametrize("path", ["__init__.py", "py.typed", "cli.py", "__main__.py", "reproduce.py"])
def test_source_layout(path: str) -> None:
    assert (SOURCE / path).is_file()
    assert not (SOURCE.parent / "__init__.py").exists(), "isotone is a namespace"


def test_metadata() -> None:
    project = PROJECT["project"]
    assert project["name"] == f"isotone-{NAME}"
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == root["requires-python"]
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project["entry-points"]["isotone.papers"] == {NAME: f"{MODULE}.cli:app"}
    assert project["scripts"] == {f"isotone-{NAME}": f"{MODULE}.cli:main"}
    assert PROJECT["tool"]["uv"]["build-backend"]["module-name"] == MODULE


def test_version_is_said_once() -> None:
    changelog = (FOLDER / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.M)
    assert newest and newest[1] == PROJECT["project"]["version"] == package().__version__
    citation = re.search(r"^version: *\"?([\d.]+)", (FOLDER / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert citation and citation[1] == package().__version__


def test_dependencies_have_tested_lower_bounds() -> None:
    shared = tomllib.loads((ROOT / "shared" / "pyproject.toml").read_text())["project"]["version"]
    major, minor = (int(part) for part in shared.split(".")[:2])
    dependencies = PROJECT["project"]["dependencies"]
    assert f"isotone-shared>={major}.{minor},<{major}.{minor + 1}" in dependencies
    for requirement in dependencies + sum(PROJECT["project"].get("optional-dependencies", {}).values(), []):
        assert ">=" in requirement or requirement.startswith("isotone-"), f"{requirement} has no lower bound"


def test_imports_are_declared() -> None:
    command = [sys.executable, "-m", "deptry", str(SOURCE), "--config", str(FOLDER / "pyproject.toml")]
    command += ["--known-first-party", "isotone", "--no-ansi"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert package().__doc__ and package().__all__
    for name in package().__all__:
        thing = getattr(package(), name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"


# --- the rules of the house -----------------------------------------------------------------------------


def test_no_other_paper_is_imported() -> None:
    for path, tree in trees(FOLDER):
        for name in imports(tree):
            if name.startswith("isotone."):
                assert name.startswith((MODULE, "isotone.shared")), f"{path.name} imports {name}"


def test_arrows_point_one_way() -> None:
    for path, tree in trees(SOURCE):
        front = path.relative_to(SOURCE).parts[0].removesuffix(".py") in FRONT
        for name in imports(tree):
            local = name.removeprefix(MODULE + ".").split(".")[0] if name.startswith(MODULE + ".") else ""
            assert front or local not in FRONT, f"{path.name} imports {name}"
            assert front or name.split(".")[0] not in {"argparse", "typer", "click"}, f"{path.name} imports {name}"
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        printed = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert front or not printed, f"{path.name} prints"


def test_nothing_is_unpickled_or_trusted() -> None:
    for path, tree in trees(SOURCE, FOLDER / "benchmarks"):
        assert not {n.split(".")[0] for n in imports(tree)} & {"pickle", "dill", "cloudpickle", "joblib"}, path.name
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call.func)
            options = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            assert options.get("trust_remote_code") is not True, f"{path.name}:{call.lineno}"
            assert options.get("allow_pickle") is not True, f"{path.name}:{call.lineno}"
            if text == "torch.load":
                assert options.get("weights_only") is True, f"{path.name}:{call.lineno}"


# --- the command ----------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    import typer.main

    return dict(typer.main.get_command(app()).commands)  # type: ignore[attr-defined]


def test_verbs() -> None:
    verbs = commands()
    assert {"reproduce", "bench", "info"} < set(verbs), "the three verbs and the package's own job"
    for name, command in verbs.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert name == "info" or COMMON <= options, f"{name} lacks {COMMON - options}"
        assert command.help, f"{name} has no help"
    reproduce = {option for parameter in verbs["reproduce"].params for option in parameter.opts}
    assert {"--scale", "--strict"} <= reproduce


def test_info(tmp_path: Path) -> None:
    result = run(["info", "--json"], tmp_path)
    facts = json.loads(result.stdout)
    assert result.code == 0 and facts["version"] == package().__version__
    assert {"paper", "python", "cpu"} <= set(facts) and ({"torch", "jax"} & set(facts))


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", MODULE, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"isotone {NAME}" in done.stdout


@functools.cache
def job() -> Any:
    return importlib.import_module("contract")


def test_job_runs(tmp_path: Path) -> None:
    job().files(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = run([*job().JOB], tmp_path)
    assert result.code == 0, result.stderr
    assert any(path.is_file() for path in set(tmp_path.rglob("*")) - before), "the job wrote nothing"


def bad_inputs() -> list[tuple[list[str], str]]:
    verb = job().JOB[0]
    return [([verb, "--no-such-option"], "--no-such-option"), (["reproduce", "--seeds", "a"], "--seeds"), *job().BAD]


def test_bad_inputs_name_a_missing_file_and_nan() -> None:
    said = [" ".join([*argv, words]).lower() for argv, words in job().BAD]
    assert any("missing" in text for text in said) and any("nan" in text for text in said)


@pytest.mark.parametrize("number", range(len(bad_inputs())))
def test_bad_input_is_one_sentence(number: int, tmp_path: Path) -> None:
    argv, words = bad_inputs()[number]
    job().files(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run(list(argv), tmp_path)
    assert result.code == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and words.lower() in lines[0].lower(), result.stderr
    assert {path: path.read_bytes() for path in before} == before, "something saved was changed"


# --- claims, results, README ----------------------------------------------------------------------------


def stopwatch() -> Callable[[], float]:
    """Seconds since on a reference core: by the clock or, where other tests have the cores, those that this process and
    its children computed. How slow these are is timed on either side: it changes while the tests run."""

    def now() -> tuple[float, float]:
        used = os.times()
        return time.perf_counter(), used.user + used.system + used.children_user + used.children_system

    before, begin = slowness(), now()

    def stop() -> float:
        passed = min(b - a for a, b in zip(begin, now(), strict=True))
        return passed / max(before, slowness())

    return stop


def test_smoke_reproduction(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "reproduce", "--scale", "smoke", "--device", "cpu", "--quiet"]
    stop = stopwatch()
    done = subprocess.run([*command, "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
    seconds = stop()
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), "--quiet prints nothing"
    report = claims.Report.load(tmp_path / "out" / "reproduce-smoke.json")
    assert report.measurements and (tmp_path / "out" / "report.html").exists()
    assert seconds < SMOKE_SECONDS, f"smoke took {seconds:.1f} s"


def results() -> list[Path]:
    return sorted((FOLDER / "results").glob("*.json"))


def test_results_keep_the_schema() -> None:
    for path in results():
        text = path.read_text(encoding="utf-8")
        claims.validate(json.loads(text))
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", text), f"{path.name} names a machine's path"
        assert path.stem.startswith(("reproduce-", "bench-"))


def test_readme_tables_equal_results() -> None:
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert re.search(r"<!-- (results|summary):results/reproduce-cpu\.json -->", text)
    assert claims.rewrite_readme(readme) == text, "run `isotone report --readme`"


def test_readme_sections() -> None:
    headings = re.findall(r"^## (.+)$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    expected = [
        "Install",
        "Use",
        "Command line",
        "Measured",
        "Guided tour",
        "Deviations from the paper",
        "Citation",
    ]
    assert [heading for heading in headings if heading in expected] == expected


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in readme_blocks(FOLDER / "README.md") if block.language in ("python", "console")]
    first = next(block for block in blocks if block.language == "python")
    assert first.skipped is None and len(first.code.strip().splitlines()) <= 10
    namespace: dict[str, Any] = {"__name__": "__main__"}
    stop = stopwatch()
    for block in blocks:
        if block.skipped is not None:
            assert block.skipped in ("network", "gpu", "extra"), block.skipped
        elif block.language == "python":
            exec(compile(block.code, f"README.md:{block.line}", "exec"), namespace)
            assert block is not first or capsys.readouterr().out.strip(), "the first example prints something"
        else:
            for line in block.code.splitlines():
                run_console_line(line.removeprefix("$ "), tmp_path)
    seconds = stop()
    assert seconds < README_SECONDS, f"the README took {seconds:.1f} s"


def run_console_line(line: str, folder: Path) -> None:
    if not line.startswith("isotone"):
        return  # what the command prints, or an installation
    words = shlex.split(line, comments=True)
    if words[0] == f"isotone-{NAME}" or words[:2] == ["isotone", NAME]:
        argv = words[1:] if words[0] != "isotone" else words[2:]
        result = run(argv, folder)
        assert result.code == 0, f"{line}\n{result.stderr}"
    else:
        assert dispatch(words[1:]) == 0, line
