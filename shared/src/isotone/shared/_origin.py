"""Which code a figure comes from: version and commit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def code(package: str) -> dict[str, Any]:
    """Version, commit and dirty of the installed package.

    The commit is null where the package's files are not git's (a wheel installed inside some checkout is in a
    folder that git has, but is not tracked). Dirty means that source differs from the commit: the package's, or
    that of isotone.shared beside it.
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version
    from importlib.util import find_spec

    module = "isotone." + package.replace("-", "_")
    version = getattr(sys.modules.get(module), "__version__", None)
    if version is None:
        try:
            version = installed_version(f"isotone-{package}")
        except PackageNotFoundError:
            pass
    spec = find_spec(module)
    if spec is None or not spec.origin:
        return {"version": version, "commit": None, "dirty": None}
    source, shared = Path(spec.origin).resolve(), Path(__file__).resolve()
    commit = _git(source.parent, "rev-parse", "--verify", "HEAD")
    if not commit or not _git(source.parent, "ls-files", source.name):
        return {"version": version, "commit": None, "dirty": None}
    folders = [folder for folder in (source.parent, shared.parent) if _git(folder, "rev-parse", "HEAD") == commit]
    dirty = any(_git(folder, "status", "--porcelain", ".") != "" for folder in folders)
    return {"version": version, "commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints in `folder`, or None where it fails or is not there."""
    # inside a hook, git's own variables would name another repository
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
