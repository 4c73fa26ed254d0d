"""Real data: files from public addresses, each held to its SHA-256, and a corpus that is always there."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isotone.shared.errors import InputError
from isotone.shared.progress import Bar, bar

TIMEOUT_SECONDS = 30
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """A file of public data: `name` is where it lies in the cache, a relative path such as "text/a.txt"."""

    name: str
    url: str
    sha256: str
    licence: str = ""

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"expected name to be a relative path, got {self.name!r}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"expected sha256 as 64 lower-case hexadecimal digits, got {self.sha256!r}")


def fetch(source: Source, quiet: bool = False) -> Path:
    """The path of `source` on this machine: in ISOTONE_DATA_DIR, else in the cache, else downloaded into it.

    The file is hashed wherever it comes from. Raises `InputError` where its hash is another, or where it is
    not to be had.
    """
    if given := local(source.name):
        if (found := sha256(given)) != source.sha256:
            raise InputError(f"expected SHA-256 {source.sha256} of {str(given)!r} (ISOTONE_DATA_DIR), got {found}")
        return given
    return _download(source, quiet)


def local(name: str) -> Path | None:
    """The file `name` in the folder that ISOTONE_DATA_DIR names, or None where it is not there."""
    folder = os.environ.get("ISOTONE_DATA_DIR")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise InputError(f"expected ISOTONE_DATA_DIR to be a folder, got {folder!r}")
    path = Path(folder, name)
    return path if path.is_file() else None


def stdlib_text(max_bytes: int | None = None) -> str:
    """The Python source of the running interpreter's standard library, its tests left out, in a fixed order.

    `max_bytes`: at most so much of it, as UTF-8. About 11 MB in all; the same for the same Python.
    """
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    paths: dict[str, Path] = {}
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        for name in files:
            # site's own files and the build's settings are the machine's, not the library's
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize")):
                path = Path(folder, name)
                paths[path.relative_to(root).as_posix()] = path
    text = bytearray()
    for name in sorted(paths):
        if max_bytes is not None and len(text) >= max_bytes:
            break
        text += paths[name].read_bytes()
    if not text and max_bytes != 0:
        raise InputError(f"expected the source of Python's standard library in {str(root)!r}, found none")
    return text[:max_bytes].decode("utf-8", errors="ignore")


def sha256(content: str | os.PathLike[str] | bytes) -> str:
    """The SHA-256 of a file, or of `bytes`, in hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(name: str, content: str | os.PathLike[str] | bytes) -> dict[str, str]:
    """What the results say about a piece of data: its public name and its hash, never its path."""
    return {"name": name, "sha256": sha256(content)}


def _download(source: Source, quiet: bool) -> Path:
    import pooch

    cache = Path(pooch.os_cache("isotone"))
    where = f"put it at {cache / source.name}, or at {source.name} in the folder that ISOTONE_DATA_DIR names"
    pooch.get_logger().setLevel("WARNING")
    try:
        with bar(source.name, quiet=quiet) as shown:
            downloader = pooch.HTTPDownloader(_PoochBar(shown), chunk_size=2**16, timeout=TIMEOUT_SECONDS)
            known_hash = f"sha256:{source.sha256}"
            return Path(pooch.retrieve(source.url, known_hash, source.name, cache, downloader=downloader))
    except ValueError:
        raise InputError(
            f"expected SHA-256 {source.sha256} of {source.name} from {source.url}, got another file: {where}"
        ) from None
    except OSError as error:
        raise InputError(f"cannot get {source.name} from {source.url} ({_reason(error)}): {where}") from None


def _reason(error: OSError) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"status {status}" if status else error.strerror or type(error).__name__


class _PoochBar:
    """Our progress bar with the methods that pooch calls on its own."""

    total = 0

    def __init__(self, shown: Bar) -> None:
        self._bar = shown

    def update(self, size: int) -> None:
        if self.total:
            self._bar.resize(self.total)
        self._bar.advance(size)

    def reset(self) -> None:
        # pooch counts the whole file once more at its end
        self._bar = Bar()

    def close(self) -> None:
        pass
