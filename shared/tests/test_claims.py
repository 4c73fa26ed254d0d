"""What a results file may say, and the forms it is shown in."""

from __future__ import annotations

import copy
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotone.shared import checkpoint, claims
from isotone.shared._words import quantity
from isotone.shared.claims import Claim, Measurement, Ratio, Report
from isotone.shared.errors import InputError

HELD = Claim("steps", "Fewer steps [than] Muon | <b>", "Table 2", "%", 21.74, 5.0, "min")
MISSED = Claim("memory", "Memory over Muon", "section 4", "%", "2.9 % at 1.1 B", 3.0, "max")
OPEN = Claim("nodes", "Iteration time on 16 GPUs", "Table 4", "ms", 912.5, 950.0, "max")
SHA256 = "a" * 64


def reproduce(**changes: Any) -> Report:
    measurements = [Measurement(HELD, 14.23, 1.31), Measurement(MISSED, 3.5), Measurement(OPEN, None)]
    options: dict[str, Any] = {"seeds": (0, 1), "seconds": 12.5, "measurements": measurements}
    options["data"] = [{"name": "stdlib", "sha256": SHA256}]
    return Report("example", "reproduce", "cpu", framework="torch", **{**options, **changes})


def bench(**changes: Any) -> Report:
    ratios = [
        Ratio("step", "one step", "ours", "Muon", "2.11", 0.02, 0.05, "s", 1.5),
        Ratio("rate", "tokens", "ours", "Muon", "2.11", 900.0, 1000.0, "tokens/s", 1.0, higher_is_better=True),
        Ratio("size", "bytes", "ours", "Muon", "2.11", 10, 20, "bytes", None),
    ]
    return Report("example", "bench", "cpu", (0,), "torch", **{"ratios": ratios, **changes})


def plot(title: str = "Loss") -> Any:
    drawing, axes = claims.figure(title, "step", "loss (nats)")
    axes.plot([1, 2, 3], [3, 2, 1], label="NorMuon")
    axes.legend(frameon=False)
    return drawing


def test_document_has_the_fields_of_schema_1() -> None:
    document = reproduce().to_json()
    head = "schema package version commit dirty date command scale seeds data machine seconds".split()
    assert list(document) == [*head, "claims"] and list(bench().to_json()) == [*head, "ratios"]
    assert document["schema"] == 1 and document["command"] == "isotone example reproduce --scale cpu"
    assert bench().to_json()["command"] == "isotone example bench --device cpu"
    names = "id statement source unit paper measured spread threshold direction held"
    assert list(document["claims"][0]) == names.split()
    names = "id work ours peer peer_version ours_value peer_value unit ratio target held"
    assert list(bench().to_json()["ratios"][0]) == names.split()
    assert list(document["machine"]) == ["cpu", "cores", "threads", "memory_gib", "gpu", "python", "torch"]


def test_held_and_ratio() -> None:
    assert [item["held"] for item in reproduce().to_json()["claims"]] == [True, False, None]
    assert [m.verdict for m in reproduce().measurements] == ["held", "not held", "not at this scale"]
    assert [item["held"] for item in bench().to_json()["ratios"]] == [True, False, None]
    assert [item["ratio"] for item in bench().to_json()["ratios"]] == [2.5, 0.9, 2.0]
    assert not reproduce().all_held and not bench().all_held
    assert reproduce(measurements=[Measurement(HELD, 5.0), Measurement(OPEN, None)]).all_held
    for claim, edge in ((HELD, 5.0), (MISSED, 3.0)):
        better = 1 if claim.direction == "min" else -1
        assert Measurement(claim, edge).held is True
        assert Measurement(claim, math.nextafter(edge, -better * math.inf)).held is False
    free = Claim("a", "b", "c", "", None, None, "min")
    assert Measurement(free, 1.0).held is None
    with pytest.raises(ValueError, match="min or max"):
        Claim("a", "b", "c", "", None, None, "up")


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    for report in (reproduce(), bench()):
        path = report.save(tmp_path)
        assert path == tmp_path / f"{report.name}.json"
        loaded = Report.load(path)
        assert loaded.to_json() == report.to_json() == json.loads(path.read_text())
        assert loaded.markdown() == report.markdown()
        assert [item.held for item in loaded.ratios] == [item.held for item in report.ratios]


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    measured = [Measurement(HELD, np.float32(7.5), np.float64(0.5)), Measurement(OPEN, np.int64(900))]
    path = reproduce(measurements=measured, seeds=np.arange(2)).save(tmp_path)
    stored = json.loads(path.read_text())
    assert [item["measured"] for item in stored["claims"]] == [7.5, 900] and stored["seeds"] == [0, 1]


def set_in(document: Any, path: str, value: Any) -> Any:
    document = copy.deepcopy(document)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = document
    for part in parents:
        place = place[part]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return document


SPOILT = [
    ("schema", 2),
    ("schema", True),
    ("package", "Nor Muon"),
    ("version", KeyError),
    ("commit", "abc"),
    ("dirty", True),
    ("date", "yesterday"),
    ("command", "python3 reproduce.py"),
    ("scale", "huge"),
    ("seeds", [0, -1]),
    ("seeds", [True]),
    ("data.0.sha256", "A" * 64),
    ("data.0.url", "a"),
    ("machine", {"cpu": None}),
    ("machine.torch", KeyError),
    ("machine.memory_gib", "a lot"),
    ("seconds", -1),
    ("seconds", math.inf),
    ("claims", {}),
    ("claims", [1]),
    ("claims.0.id", "memory"),
    ("claims.0.paper", [1]),
    ("claims.0.paper", math.nan),
    ("claims.0.measured", math.nan),
    ("claims.0.measured", True),
    ("claims.0.measured", None),
    ("claims.0.measured", 4.9),
    ("claims.0.spread", -0.1),
    ("claims.0.threshold", 14.24),
    ("claims.0.direction", "max"),
    ("claims.0.held", None),
    ("claims.1.held", True),
    ("claims.2.held", False),
    ("claims.2.spread", 1.0),
    ("claims.0.note", "more"),
    ("more", 1),
    ("command", "isotone example reproduce --out /root/results"),
    ("claims.0.source", "~/paper.pdf"),
    ("data.0.name", "/home/me/data.txt"),
    ("claims.0.statement", "from file:///a"),
    ("machine.cpu", "C:\\cpu"),
]


@pytest.mark.parametrize(("path", "value"), SPOILT, ids=[f"{path}={value}"[:40] for path, value in SPOILT])
def test_a_spoilt_document_is_refused(path: str, value: Any) -> None:
    document = reproduce().to_json()
    document["commit"] = document["dirty"] = None
    claims.validate(document)
    with pytest.raises(InputError) as refusal:
        claims.validate(set_in(document, path, value))
    named = re.sub(r"\.(\d+)", r"[\1]", path)
    pairs = {"claims[0].id": "claims[1].id"}
    field = str(refusal.value).split(":")[0]
    assert field in (named, pairs.get(named), re.sub(r"\.\w+$", ".held", named), named.split(".")[0])


@pytest.mark.parametrize(("field", "value"), [("ratio", 2.4), ("ratio", -1.0), ("held", False), ("target", 3.0)])
def test_a_spoilt_ratio_is_refused(field: str, value: Any) -> None:
    document = bench().to_json()
    with pytest.raises(InputError, match=r"ratios\[0\]\.(ratio|held)"):
        claims.validate(set_in(document, f"ratios.0.{field}", value))
    with pytest.raises(InputError, match="scale"):
        claims.validate(set_in(document, "scale", "smoke"))


@given(st.floats(), st.floats() | st.none(), st.sampled_from(["min", "max"]), st.floats() | st.none())
def test_what_is_written_is_valid_or_refused(measured: float, threshold: Any, direction: Any, spread: Any) -> None:
    """No float, however odd, gets a false verdict or a NaN into a results file."""
    measurement = Measurement(Claim("a", "b", "c", "", None, threshold, direction), measured, spread)
    report = reproduce(measurements=[measurement])
    report.origin = ORIGIN
    odd = any(value is not None and not math.isfinite(value) for value in (measured, threshold, spread))
    if odd or (spread is not None and spread < 0):
        with pytest.raises(InputError, match=r"claims\[0\]"):
            report.to_json()
    else:
        json.dumps(report.to_json(), allow_nan=False)
        assert report.markdown() and report.table()


ORIGIN = {key: value for key, value in reproduce().to_json().items() if key in reproduce().origin}


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = reproduce().save(tmp_path)
    text = path.read_text()
    for spoilt, words in (
        (text.replace("14.23", "NaN"), "NaN"),
        (text.replace("14.23", "1e999"), "finite"),
        (text[: len(text) // 2], "reproduce-cpu.json"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
    ):
        path.write_text(spoilt)
        with pytest.raises(InputError, match=words) as refusal:
            Report.load(path)
        assert "reproduce-cpu.json" in str(refusal.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"reproduce-cpu\.json"):
        Report.load(path)
    with pytest.raises(InputError, match="found no such file"):
        Report.load(tmp_path / "bench-cpu.json")


def test_nothing_is_written_where_a_report_is_not_valid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measured"):
        reproduce(measurements=[Measurement(HELD, float("nan"))], figures={"loss": plot()}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="ratios in a bench report"):
        reproduce(ratios=bench().ratios).to_json()


def test_failed_save_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reproduce().save(tmp_path)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        reproduce(seconds=1.0).save(tmp_path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def shown(report: Report, width: int = 120) -> str:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width).print(report.table())
    return stream.getvalue()


def test_terminal_table() -> None:
    text = shown(reproduce())
    assert "Fewer steps [than] Muon | <b> (Table 2)" in text
    assert all(part in text for part in ("21.74 %", "14.2 ± 1.3 %", "2.9 % at 1.1 B", "3.5 %", "912.5 ms"))
    assert all(f"│ {verdict} " in text for verdict in ("held", "not held", "not at this scale"))
    text = shown(bench())
    assert all(part in text for part in ("Muon 2.11: 0.05 s", "2.5 ×", "0.9 ×", "not held"))
    assert "…" not in shown(bench(), width=60)


@pytest.mark.parametrize(
    ("value", "spread", "expected"),
    [
        (None, None, "–"),
        ("about 3", None, "about 3"),
        (0, None, "0"),
        (12345, None, "12,345"),
        (1234.56, None, "1,235"),
        (0.123456, None, "0.1235"),
        (1.5e-7, None, "1.5e-07"),
        (-3.14159, 0.0421, "-3.142 ± 0.042"),
        (1234.5, 120.0, "1,234 ± 120"),
        (2.0, 0.0, "2 ± 0"),
        (1e-8, 1e-9, "1e-08 ± 1e-09"),
    ],
)
def test_figures_are_rounded_for_readers(value: Any, spread: Any, expected: str) -> None:
    assert quantity(value, spread) == expected


def test_markdown() -> None:
    lines = reproduce().markdown().splitlines()
    assert lines[0] == "| claim | paper | measured | verdict |"
    assert lines[2] == "| Fewer steps [than] Muon \\| &lt;b> (Table 2) | 21.74 % | 14.2 ± 1.3 % | held (≥ 5 %) |"
    assert lines[3].endswith("| 3.5 % | **not held** (≤ 3 %) |")
    assert lines[4].endswith("| 912.5 ms | – | not at this scale |")
    assert lines[6].startswith("`isotone example reproduce --scale cpu`: seeds 0, 1, 12 s, ")


def test_readme_blocks_are_rewritten(tmp_path: Path) -> None:
    reproduce().save(tmp_path / "results")
    readme = tmp_path / "README.md"
    block = "<!-- results:results/{}.json -->\n{}<!-- /results -->"
    parts = ["# A\n", block.format("reproduce-cpu", "old\n"), "\nbetween\n", block.format("bench-gpu", ""), "\nend\n"]
    readme.write_text("".join(parts))
    text = claims.rewrite_readme(readme)
    assert reproduce().markdown() in text and "old" not in text and text.count("not measured yet") == 1
    assert text.startswith("# A\n<!-- results") and "\nbetween\n" in text and text.endswith("\nend\n")
    readme.write_text(text)
    assert claims.rewrite_readme(readme) == text
    for spoilt in (parts[1][:-10], parts[1][:-20] + parts[3]):
        readme.write_text(spoilt)
        with pytest.raises(InputError, match="expected <!-- /results -->"):
            claims.rewrite_readme(readme)


def test_plots_lie_beside_the_results(tmp_path: Path) -> None:
    reproduce(figures={"loss": plot(), "old": plot("Old")}).save(tmp_path)
    first = (tmp_path / "reproduce-cpu-loss.png").read_bytes()
    reproduce(figures={"loss": plot()}).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reproduce-cpu-loss.png", "reproduce-cpu.json"]
    assert first == (tmp_path / "reproduce-cpu-loss.png").read_bytes(), "the same plot is the same file"
    assert first.startswith(b"\x89PNG") and b"matplotlib" not in first


def test_house_style_is_no_global_state() -> None:
    code = (
        "import matplotlib, sys\nbefore = matplotlib.rcParams.copy()\nfrom isotone.shared import claims\n"
        "drawing, axes = claims.figure('a', 'b', 'c')\naxes.plot([1])\n"
        "assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules\n"
        "assert axes.get_title('left') == 'a' and axes.lines[0].get_color() == '#0072B2'\n"
        "assert not axes.spines['top'].get_visible()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class Page(html.parser.HTMLParser):
    """The tags of a page, and every address that it would ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "absent"]
    reproduce(figures={"loss": plot(), "<b>": plot()}).save(folders[0])
    bench().save(folders[0])
    other = reproduce()
    other.package = "other-one"
    other.save(folders[1])
    (folders[1] / "notes.json").write_text("{}")
    return claims.html_page(folders, tmp_path / "site" / "report.html")


def test_page_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parsed.addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert parsed.tags.count("table") == 4 and parsed.tags.count("img") == 2
    assert "b" not in parsed.tags, "what a claim says is text"
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert all(words in text for words in ("14.2 ± 1.3 %", "not held", "not at this scale", "other-one"))
    assert str(page.parent.parent) not in text


def test_page_of_one_folder_and_of_none(tmp_path: Path) -> None:
    assert "No results yet" in claims.html_page(tmp_path / "absent", tmp_path / "a.html").read_text()
    reproduce().save(tmp_path)
    assert "example: measured claims" in claims.html_page(tmp_path, tmp_path / "a.html").read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


LOOK = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  images: [...document.images].map(image => image.naturalWidth > 300 && image.clientWidth > 200),
  tables: document.querySelectorAll("table").length,
  rows: document.querySelectorAll("tbody tr").length,
  pills: [...document.querySelectorAll("td .verdict")].map(pill => pill.textContent),
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth}), "*"))</script>"""
# a headless window is never as narrow as a phone, a frame can be
FRAME = """<title></title><script>addEventListener("message", event => document.title = event.data)</script>
<iframe src="{}" width="{}" height="800" frameborder="0"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on PATH")
@pytest.mark.parametrize("width", [360, 1100])
def test_page_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    """A copy of the page, with a script that tells the frame around it what the browser made of it."""
    text = page.read_text(encoding="utf-8").replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    page.with_name("copy.html").write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format("copy.html", width), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *QUIET.split(), profile, "--window-size=1200,900", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=90)
    title = re.search(r"<title>(.+?)</title>", done.stdout, re.S)
    assert title, done.stdout + done.stderr
    seen = json.loads(html.unescape(title[1]))
    assert seen["images"] == [True, True] and seen["tables"] == 4 and seen["rows"] == 3 + 3 + 3 + 3
    verdicts = ["held", "not held", "not at this scale"]
    assert sorted(seen["pills"]) == sorted([*verdicts * 2, "held", "not held", "reported"])
    assert seen["width"] == width and seen["overflow"] <= 0, "nothing is wider than the screen"


MODULES = "claims data checkpoint bench seeding progress device errors cli".split()
HEAVY = "torch jax typer rich matplotlib pooch numpy safetensors requests scipy pandas".split()


def test_importing_shared_imports_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {MODULES}:\n    importlib.import_module('isotone.shared.' + name)\n"
        f"print(*sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_figure_without_a_threshold_is_reported():
    claim = Claim("id", "words", "source", "s", None, None, "min")
    assert Measurement(claim, 1.0).verdict == "reported" and Measurement(claim, None).verdict == "not at this scale"
    assert Ratio("id", "work", "ours", "peer", "1", 1.0, 2.0, "s", None).verdict == "reported"


def test_a_summary_leaves_out_what_is_only_reported(tmp_path: Path) -> None:
    bench().save(tmp_path)
    readme = tmp_path / "README.md"
    name = "bench-cpu.json"
    readme.write_text(f"<!-- summary:{name} -->\n<!-- /summary -->\n<!-- results:{name} -->\n<!-- /results -->\n")
    short, whole = claims.rewrite_readme(readme).split("<!-- results:")
    assert "reported" in whole and "reported" not in short and short.count("held") == 2
