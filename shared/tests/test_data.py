"""Data is what its hash says, wherever it comes from; the network is a server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isotone.shared import data
from isotone.shared.data import Source
from isotone.shared.errors import InputError

CONTENT = b"To be, or not to be\n" * 9000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Site(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/missing.txt":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path != "/short.txt" else CONTENT[:100])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, no data folder, and no proxy between us and loopback."""
    monkeypatch.delenv("ISOTONE_DATA_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    Site.asked.clear()
    return tmp_path / "cache" / "isotone"


def test_download_once(address: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Source("text/play.txt", f"{address}/play.txt", DIGEST)
    for _ in range(2):
        assert data.fetch(source) == cache / "text" / "play.txt"
    assert (cache / "text" / "play.txt").read_bytes() == CONTENT
    assert Site.asked == ["/play.txt"]
    assert capsys.readouterr() == ("", "")


def test_damaged_cache_is_downloaded_again(address: str, cache: Path) -> None:
    source = Source("play.txt", f"{address}/play.txt", DIGEST)
    data.fetch(source).write_bytes(CONTENT[:-1])
    assert data.fetch(source).read_bytes() == CONTENT
    assert len(Site.asked) == 2


@pytest.mark.parametrize("page", ["play.txt", "short.txt"])
def test_wrong_hash_is_refused(address: str, cache: Path, page: str) -> None:
    wrong = "0" * 64 if page == "play.txt" else DIGEST
    with pytest.raises(InputError) as refusal:
        data.fetch(Source("a/b.txt", f"{address}/{page}", wrong))
    one_sentence(refusal, "a/b.txt", f"{address}/{page}", str(cache / "a/b.txt"), "ISOTONE_DATA_DIR")
    assert not (cache / "a" / "b.txt").exists() and not list((cache / "a").glob("*"))


def test_no_network_says_where_to_put_the_file(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: the connection is refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.txt"
        with pytest.raises(InputError) as refusal:
            data.fetch(Source("a/b.txt", url, DIGEST))
    one_sentence(refusal, "a/b.txt", url, str(cache / "a/b.txt"), "ISOTONE_DATA_DIR")


def test_missing_page(address: str, cache: Path) -> None:
    with pytest.raises(InputError) as refusal:
        data.fetch(Source("b.txt", f"{address}/missing.txt", DIGEST))
    one_sentence(refusal, "404", "b.txt")


def one_sentence(refusal: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    text = str(refusal.value)
    assert "\n" not in text and all(part in text for part in parts), text
    assert refusal.value.__cause__ is None and refusal.value.__suppress_context__


def test_data_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    (folder / "text").mkdir(parents=True)
    monkeypatch.setenv("ISOTONE_DATA_DIR", str(folder))
    source = Source("text/play.txt", "http://127.0.0.1:9/play.txt", DIGEST)
    assert data.local(source.name) is None
    (folder / source.name).write_bytes(CONTENT)
    assert data.fetch(source) == data.local(source.name) == folder / "text" / "play.txt"
    (folder / source.name).write_bytes(CONTENT + b"x")
    with pytest.raises(InputError, match=f"expected SHA-256 {DIGEST}.*ISOTONE_DATA_DIR.*got"):
        data.fetch(source)
    monkeypatch.setenv("ISOTONE_DATA_DIR", str(folder / "nowhere"))
    with pytest.raises(InputError, match="ISOTONE_DATA_DIR to be a folder"):
        data.fetch(source)


def test_progress_bar_follows_the_download(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {"total": 0, "done": 0}

    class Shown(data.Bar):
        def advance(self, n: float = 1, **fields: object) -> None:
            seen["done"] += n

        def resize(self, total: float) -> None:
            seen["total"] = total

    class Context:
        __enter__ = staticmethod(Shown)
        __exit__ = staticmethod(lambda *exception: None)

    monkeypatch.setattr(data, "bar", lambda *arguments, **options: Context())
    data.fetch(Source("play.txt", f"{address}/play.txt", DIGEST))
    assert seen["total"] == len(CONTENT) <= seen["done"] < len(CONTENT) + 2**16


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b"])
def test_names_stay_inside_the_cache(name: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        Source(name, "http://127.0.0.1/a", DIGEST)


def test_source_needs_a_hash() -> None:
    with pytest.raises(ValueError, match="sha256"):
        Source("a", "http://127.0.0.1/a", "md5:abc")


def test_stdlib_text() -> None:
    text = data.stdlib_text(2_000_000)
    assert len(text.encode()) <= 2_000_000 < len(text.encode()) + 4
    assert text.startswith(Path(__import__("__future__").__file__).read_text()[:200])
    assert data.stdlib_text(1000) == text.encode()[:1000].decode()
    assert data.stdlib_text(0) == ""
    whole = data.stdlib_text()
    assert whole.startswith(text) and len(whole) > 5_000_000
    assert "class JSONDecoder" in whole and "class IdleConfTest" not in whole and "class TestCase(" in whole
    assert "def fetch(source: Source" not in whole and "site-packages/pytest" not in whole


def test_stdlib_text_is_the_same_in_another_process() -> None:
    code = "from isotone.shared import data; print(data.sha256(data.stdlib_text().encode()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == data.sha256(data.stdlib_text().encode())


def test_provenance_names_no_path(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(CONTENT)
    expected = {"name": "the play", "sha256": DIGEST}
    assert data.provenance("the play", path) == data.provenance("the play", CONTENT) == expected
