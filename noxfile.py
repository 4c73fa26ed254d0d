"""Every check that a contributor or CI runs, parametrised by package. `nox --list` shows them.

Default: lint, types, tests, wheels, workspace. `ISOTONE_CHANGED=REV` keeps the packages that differ from REV.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = "constraints.txt"
FAIL_SECONDS = 150  # tests(NAME) aims at 100 s on two reference cores, CORES tells how slow these are
CORES = ROOT / "shared/src/isotone/shared/testing/cores.py"
COVERAGE = 90
FAST = "not slow and not gpu and not network"
FRAMEWORKS = {  # what stands for the template's words in a package of either framework
    "torch": {
        "__LIBRARY__": "torch>=2.11",
        "__IMPORT__": "import torch",
        "__ARRAY_IMPORT__": "from torch import Tensor",
        "__ARRAY__": "Tensor",
        "__MAKE__": "torch.tensor",
        "__FINITE__": "torch.isfinite(values).all()",
        "__SORT__": "torch.sort(values).values",
    },
    "jax": {
        "__LIBRARY__": "jax>=0.10.2",
        "__IMPORT__": "import jax.numpy as jnp",
        "__ARRAY_IMPORT__": "from jax import Array",
        "__ARRAY__": "Array",
        "__MAKE__": "jnp.array",
        "__FINITE__": "jnp.isfinite(values).all()",
        "__SORT__": "jnp.sort(values)",
    },
}
EXPORT = "uv export --all-packages --all-groups --all-extras --no-emit-workspace --no-header --no-annotate"

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True


def _packages() -> list[str]:
    names = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    revision = os.environ.get("ISOTONE_CHANGED")
    if not revision:
        return names
    command = ["git", "diff", "--name-only", revision, "--"]
    changed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    touched = {path.split("/")[1] for path in changed if path.startswith("packages/")}
    everything = any(not path.startswith("packages/") for path in changed)
    return names if everything else [name for name in names if name in touched]


PACKAGES = _packages()
# peers that pull the lock back: installed over it where they are timed, and nowhere else
PEERS = {"opgfn": ["torchgfn==2.4.1"], "sketching": ["flwr[simulation]==1.42.0", "dp-accounting==0.6.0"]}
# the same for what a reproduction is held against
RULERS = {"sketching": ["dp-accounting==0.6.0"]}
# not finished: their tests are run by `nox -s "tests(NAME)"` alone
IN_PROGRESS: set[str] = {"quamba2"}
DEFAULT_TESTS = [f"tests({name})" for name in ["shared", *PACKAGES] if name not in IN_PROGRESS]
nox.options.sessions = ["lint", "types", *DEFAULT_TESTS, "wheels", "workspace"]
package = nox.parametrize("name", [nox.param(name, id=name) for name in PACKAGES])
member = nox.parametrize("name", [nox.param(name, id=name) for name in ["shared", *PACKAGES]])


def _folder(name: str) -> str:
    return "shared" if name == "shared" else f"packages/{name}"


def _module(name: str) -> str:
    return "isotone." + name.replace("-", "_")


def _sync(session: nox.Session, name: str, *more: str) -> None:
    """`uv sync` of one package into the session's own environment."""
    session.run_install(
        "uv",
        "sync",
        "--quiet",
        "--package",
        f"isotone-{name}",
        *more,
        env=_environment(session),
        external=True,
    )


def _environment(session: nox.Session) -> dict[str, str]:
    # bytecode is written even where the caller forbids it: torch without it takes seconds longer to import
    return {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location, "PYTHONDONTWRITEBYTECODE": ""}


def _pytest(session: nox.Session, name: str, *arguments: str) -> None:
    """The tests of one package, with the plugins' flags that `addopts` leaves out."""
    # shared has no arrays, and takes what has the shape of its arguments: the types are mypy's there
    hook = [] if name == "shared" else [f"--jaxtyping-packages={_module(name)},beartype.beartype"]
    session.run(
        *("python", "-m", "pytest", *arguments, "-o", f"pythonpath={_folder(name)}/tests", *hook),
        *("--timeout=300", "--durations=8", *session.posargs),
        # one thread each: ranks and subprocesses share the cores, and spinning threads on busy ones are far slower
        env={
            **_environment(session),
            "ISOTONE_PACKAGE": name,
            "OMP_NUM_THREADS": "1",
        },
    )


@nox.session
def lint(session: nox.Session) -> None:
    """ruff check and format. (deptry runs in each package's contract, where its libraries are installed.)"""
    session.install("ruff", "-c", CONSTRAINTS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
@member
def types(session: nox.Session, name: str) -> None:
    """mypy over one package, in its environment."""
    _sync(session, name, "--group", "test")
    session.run("python", "-m", "mypy", "-p", _module(name), env=_environment(session))


@nox.session
@member
def tests(session: nox.Session, name: str) -> None:
    """One package's tests and its contract, in its environment."""
    _sync(session, name, "--group", "test")
    targets = [f"{_folder(name)}/tests"]
    more = []
    if name != "shared":  # shared's own tests time things, and are few
        targets.append("shared/src/isotone/shared/testing/contract.py")
        more = [f"--cov={_module(name)}", "--cov-report=term", f"--cov-fail-under={COVERAGE}"]
        more += ["--numprocesses=2", "--dist=worksteal"]
    slowness = _slowness()
    start, used = time.monotonic(), _computed()
    _pytest(session, name, *targets, "-m", FAST, *more)
    # where something else has the cores, what two of them computed
    seconds = min(time.monotonic() - start, (_computed() - used) / 2)
    limit = FAIL_SECONDS * max(slowness, _slowness())
    session.log(f"tests({name}): {seconds:.0f} s (aim 100, limit {limit:.0f} on these cores)")
    if seconds > limit:
        session.error(f"tests({name}) took {seconds:.0f} s, the limit is {limit:.0f} on these cores")


def _slowness() -> float:
    """How many times longer than the reference two cores at work compute for a loop, the slower of them."""
    both = [subprocess.Popen([sys.executable, CORES], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return max(float(one.communicate()[0]) for one in both)


def _computed() -> float:
    """CPU seconds of all that this process ran and waited for."""
    used = os.times()
    return used.children_user + used.children_system


@nox.session
@member
def slow(session: nox.Session, name: str) -> None:
    """The tests marked slow, those beside a peer's library too."""
    _sync(session, name, "--group", "test", "--group", "bench")
    if name in PEERS:
        session.install(*PEERS[name])
    _pytest(session, name, f"{_folder(name)}/tests", "-m", "slow and not gpu and not network")


@nox.session
@package
def gpu(session: nox.Session, name: str) -> None:
    """The tests that need a GPU."""
    _sync(session, name, "--group", "test")
    _pytest(session, name, f"{_folder(name)}/tests", "-m", "gpu")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel, install each alone into a clean environment, run `isotone-NAME info`."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    environment = {"PYTHONDONTWRITEBYTECODE": ""}
    session.run("uv", "build", "--quiet", "--all-packages", "--wheel", "--out-dir", "dist", external=True)
    for name in PACKAGES:
        clean = Path(session.create_tmp()) / name
        shutil.rmtree(clean, ignore_errors=True)
        session.run("uv", "venv", "--quiet", str(clean), external=True)
        (wheel,) = (ROOT / "dist").glob(f"isotone_{name.replace('-', '_')}-*.whl")
        # the version of isotone-shared may be an earlier build's: what uv keeps of that is not what was built here
        fresh = ["--find-links", "dist", "--refresh-package", "isotone-shared"]
        install = ["uv", "pip", "install", "--quiet", "--python", str(clean), *fresh]
        session.run(*install, "-c", CONSTRAINTS, str(wheel), external=True)
        session.run(str(clean / "bin" / f"isotone-{name}"), "info", external=True, env=environment)
        shutil.rmtree(clean)


@nox.session
def workspace(session: nox.Session) -> None:
    """What needs several packages at once: the `isotone` command, the lock, the root README."""
    session.run_install(
        *("uv", "sync", "--quiet", "--all-packages", "--group", "test"),
        env=_environment(session),
        external=True,
    )
    session.run("python", "-m", "pytest", "tests", "--timeout=300", *session.posargs, env=_environment(session))


@nox.session
@package
def lowest(session: nox.Session, name: str) -> None:
    """One package's tests with the lowest versions of its direct dependencies."""
    install = ["uv", "pip", "install", "--quiet", "--resolution", "lowest-direct", "--upgrade"]
    extras = f"packages/{name}" + (f"[{','.join(_extras(name))}]" if _extras(name) else "")
    session.run_install(*install, "./shared[testing]", f"./{extras}", external=True)
    _pytest(session, name, f"packages/{name}/tests", "-m", FAST)


def _extras(name: str) -> list[str]:
    project = nox.project.load_toml(ROOT / "packages" / name / "pyproject.toml")["project"]
    return [extra for extra in project.get("optional-dependencies", {}) if extra != "cuda"]


@nox.session
@package
def reproduce(session: nox.Session, name: str) -> None:
    """Measure one paper's claims (`-- --scale gpu` for another scale) and keep the results."""
    # the peers too: some claims are held against them
    _sync(session, name, "--group", "test", "--group", "bench")
    if name in RULERS:
        session.install(*RULERS[name])
    _keep(session, name, "reproduce", *(session.posargs or ["--scale", "cpu"]))


@nox.session
@package
def bench(session: nox.Session, name: str) -> None:
    """Time one package beside its peers and keep the results."""
    _sync(session, name, "--group", "test", "--group", "bench")
    if name in PEERS:
        session.install(*PEERS[name])
    _keep(session, name, "bench", *session.posargs)


def _keep(session: nox.Session, name: str, verb: str, *arguments: str) -> None:
    """Run a verb, copy its JSON and plots into packages/NAME/results, rewrite the README tables."""
    out = ROOT / "isotone-results" / name
    environment = _environment(session)
    command = ["python", "-m", _module(name), verb, "--out", str(out), *arguments]
    session.run(*command, env=environment)
    for path in [*out.glob(f"{verb}-*.json"), *out.glob(f"{verb}-*.png")]:
        if not path.name.startswith("reproduce-smoke"):
            shutil.copy(path, ROOT / "packages" / name / "results")
    readmes = [f"packages/{name}/README.md", "README.md"]
    session.run("python", "-m", "isotone.shared", "report", "--readme", *readmes, env=environment)


@nox.session(venv_backend="none")
def lock(session: nox.Session) -> None:
    """Upgrade the lock within the date of `exclude-newer` and rewrite constraints.txt."""
    session.run("uv", "lock", "--upgrade", external=True)
    export = subprocess.run([*EXPORT.split(), "--no-hashes"], cwd=ROOT, check=True, capture_output=True, text=True)
    (ROOT / CONSTRAINTS).write_text(export.stdout)


@nox.session(venv_backend="none")
def new(session: nox.Session) -> None:
    """`nox -s new -- NAME [torch|jax]`: a package that keeps its contract, with an empty method to fill in."""
    if not session.posargs:
        session.error("expected a name: nox -s new -- NAME [torch|jax]")
    name, framework, *_ = [*session.posargs, "torch"]
    target = ROOT / "packages" / name
    if not name.replace("-", "").isalnum() or name != name.lower() or framework not in FRAMEWORKS:
        session.error(f"expected a lower-case name with hyphens and torch or jax, got {session.posargs}")
    if target.exists():
        session.error(f"expected a new name, got {name!r}: packages/{name} is there")
    words = {"__NAME__": name, "__MODULE__": name.replace("-", "_"), "__FRAMEWORK__": framework}
    words |= FRAMEWORKS[framework] | {"__DATE__": time.strftime("%Y-%m-%d")}
    for source in sorted(path for path in (ROOT / "template").rglob("*") if path.is_file()):
        path = target / str(source.relative_to(ROOT / "template")).replace("__MODULE__", words["__MODULE__"])
        path.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        path.write_text(text)
    shutil.copy(ROOT / "LICENSE", target)
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    text = text.replace("dependencies = [\n", f'dependencies = [\n    "isotone-{name}",\n', 1)
    text = text.replace("[tool.uv.sources]\n", f"[tool.uv.sources]\nisotone-{name} = {{ workspace = true }}\n", 1)
    project.write_text(text)
    for tidy in (["check", "--quiet", "--fix"], ["format", "--quiet"]):
        session.run(sys.executable, "-m", "ruff", *tidy, str(target), external=True)
    session.log(f"packages/{name} is there. Fill in what `grep -rn FILL packages/{name}` names; then `nox -s lock`.")
