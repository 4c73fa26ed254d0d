"""What needs several packages at once."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
NINETEEN = """opgfn preroutgnn quamba2 seca lighthgnn logicere concrete-tickets distzo2 swing-distillation
dependency-hypernet normuon transform-once rl100 vat ap-boltzmann swiftkv group-position-encoding sketching
biomed-adaptation""".split()
UV = shutil.which("uv")
built = pytest.mark.skipif(not PACKAGES, reason="no package is built yet")


def isotone(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "isotone.shared", *argv], capture_output=True, text=True)


def test_the_root_depends_on_every_member():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {f"isotone-{path.name}" for path in PACKAGES} | {"isotone-shared"}
    assert set(project["project"]["dependencies"]) == names == set(project["tool"]["uv"]["sources"])


def test_the_namespace_has_no_init():
    assert not list(ROOT.glob("**/isotone/__init__.py"))


def test_no_package_imports_another():
    modules = {path.name.replace("-", "_") for path in PACKAGES}
    for package in PACKAGES:
        others = modules - {package.name.replace("-", "_")}
        for path in package.rglob("*.py"):
            for name in re.findall(r"^\s*(?:from|import) isotone\.(\w+)", path.read_text(), re.M):
                assert name not in others, f"{path} imports {name}"


@built
def test_the_command_lists_every_package():
    done = isotone()
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line and not line.startswith("isotone")]
    assert listed == [path.name for path in PACKAGES]


@built
def test_the_command_reaches_a_paper():
    done = isotone(PACKAGES[0].name, "info", "--json")
    assert json.loads(done.stdout)["version"]


@built
def test_reproduce_several_papers_into_one_page(tmp_path):
    done = isotone("reproduce", *[path.name for path in PACKAGES[:2]], "--out", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "not held" in done.stdout and (tmp_path / "report.html").exists()
    page = (tmp_path / "report.html").read_text()
    assert all(path.name in page for path in PACKAGES[:2])


def test_constraints_are_the_lock(tmp_path):
    """Locks a copy without uv.lock, holding to constraints.txt, and compares what comes out."""
    if UV is None:
        pytest.skip("uv is not on PATH")
    for path in [
        ROOT / "pyproject.toml",
        *ROOT.glob("*/pyproject.toml"),
        *ROOT.glob("packages/*/pyproject.toml"),
    ]:
        if path.parent.name == "template":
            continue
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    done = subprocess.run([UV, "lock"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    if done.returncode and re.search(r"error sending request|Failed to fetch|dns error|connect", done.stderr):
        pytest.skip("the package index can not be reached")
    assert done.returncode == 0, done.stderr
    options = "--all-packages --all-groups --all-extras --no-emit-workspace --no-header --no-annotate --no-hashes"
    export = subprocess.run([UV, "export", *options.split()], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert export.stdout == (ROOT / "constraints.txt").read_text(), "run `nox -s lock`"


def test_the_lock_is_not_committed_and_no_registry_is_named():
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert "uv.lock" not in listed.stdout.split()
    hosts = re.compile(r"files\.python" + r"hosted|pypi\.(?:or" + r"g|python)")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix in {".md", ".py", ".toml", ".txt", ".yml", ".json", ".cff", ""}:
            assert not hosts.search(path.read_text(encoding="utf-8")), name


def test_the_readme_names_the_nineteen_and_both_commands():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?:\[)?([\w-]+)(?:\]\([^)]*\))? \|", text, re.M)
    assert sorted(row for row in rows if row in NINETEEN) == sorted(NINETEEN)
    for path in PACKAGES:
        if path.name in NINETEEN:
            assert f"[{path.name}](packages/{path.name}/README.md)" in text
    assert "pip install uv && uv run isotone reproduce" in text
    assert "pip install uv && uv run --only-group dev nox" in text


def test_the_root_readme_equals_the_results():
    from isotone.shared.claims import rewrite_readme

    assert rewrite_readme(ROOT / "README.md") == (ROOT / "README.md").read_text()


def test_the_nox_matrix():
    pytest.importorskip("nox")
    listed = run("nox", "--list", "--json", "-s", "tests", cwd=ROOT)
    sessions = {entry["session"] for entry in json.loads(listed.stdout)}
    assert {f"tests({path.name})" for path in PACKAGES} <= sessions


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_new_package_keeps_its_contract(framework, tmp_path):
    """`nox -s new` in a copy of the workspace; then the package's tests and its contract, from the source tree."""
    pytest.importorskip("nox")
    pytest.importorskip(framework)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "noxfile.py", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("shared", "template"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    made = run("nox", "-s", "new", "--", "throw-away", framework, cwd=copy)
    assert made.returncode == 0, made.stdout + made.stderr
    assert run("nox", "-s", "new", "--", "throw-away", cwd=copy).returncode, "a name that is taken is refused"
    sources = [str(copy / "packages/throw-away/src"), str(copy / "shared/src")]
    environment = {"ISOTONE_PACKAGE": "throw-away", "PYTHONPATH": os.pathsep.join(sources)}
    tests = ["packages/throw-away/tests", "shared/src/isotone/shared/testing/contract.py"]
    options = ["-q", "-o", "pythonpath=packages/throw-away/tests", "-p", "no:cacheprovider"]
    done = run("pytest", *tests, *options, cwd=copy, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout
    assert "FILL" in (copy / "packages/throw-away/README.md").read_text()
    assert "isotone-throw-away = { workspace = true }" in (copy / "pyproject.toml").read_text()


def run(module, *argv, **options):
    return subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True, **options)
