"""The HTML page of results: one file, readable on a phone and in the dark, asking nothing of the network."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isotone.shared.claims import Report

VERDICTS = {"held": "held", "not held": "missed", "not at this scale": "open", "reported": "open"}

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #646a73;
  --line: #e4e5e7; --held: #0b6b4c; --held-bg: #dff3ea; --missed: #a3310f; --missed-bg: #fde6dd;
  --open: #5a616b; --open-bg: #eceef0; }
@media (prefers-color-scheme: dark) { :root { --page: #141619; --card: #1c1f23; --ink: #e8e9eb;
  --soft: #9aa1ab; --line: #30343a; --held: #7fdcb5; --held-bg: #12382b; --missed: #ffb199;
  --missed-bg: #472015; --open: #b4bac3; --open-bg: #2b2f35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 3.2rem 0 .2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .6rem; }
p { margin: .2rem 0 .8rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--soft); }
.soft, summary { color: var(--soft); font-size: .9rem; }
.scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .94rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: .78rem; color: var(--soft); padding: .7rem 1rem .5rem;
  white-space: nowrap; }
td { padding: .65rem 1rem; border-top: 1px solid var(--line); vertical-align: top; }
td.figure { white-space: nowrap; }
.verdict { display: inline-block; padding: .05rem .6rem; border-radius: 99px; font-size: .82rem;
  font-weight: 600; white-space: nowrap; color: var(--open); background: var(--open-bg); }
.held { color: var(--held); background: var(--held-bg); }
.missed { color: var(--missed); background: var(--missed-bg); }
.needed { display: block; color: var(--soft); font-size: .82rem; margin: .15rem 0 0 .6rem;
  white-space: nowrap; }
.tally { display: flex; flex-wrap: wrap; gap: .5rem; margin: .9rem 0 1.4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
figure { margin: 0; max-width: 44rem; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: .5rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .7rem 0 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
code { font: .88em ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding-top: 1.8rem; }
  thead { display: none; }
  tr { display: block; padding: .7rem .9rem; border-top: 1px solid var(--line); }
  tbody tr:first-child { border-top: 0; }
  td, td.figure { display: grid; grid-template-columns: 6.2rem 1fr; gap: .6rem; padding: .15rem 0; border: 0;
    white-space: normal; }
  td::before { content: attr(data-label); color: var(--soft); font-size: .85rem; }
  td.lead { display: block; font-weight: 500; padding-bottom: .35rem; }
  td.lead::before { content: none; }
  .needed { display: inline; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print { body { background: #fff; } .scroll, figure, tr { break-inside: avoid; } }
"""


def page(reports: Sequence[tuple[Report, Sequence[Path]]]) -> str:
    """The page of `reports`, each with the paths of its PNG plots."""
    packages = list(dict.fromkeys(report.package for report, _ in reports))
    title = f"{packages[0]}: measured claims" if len(packages) == 1 else "Isotone: measured claims"
    parts = [f"<h1>{escape(title)}</h1>"]
    if not reports:
        parts.append('<p class="soft">No results yet.</p>')
    else:
        parts += [_lead(reports), _tally([report for report, _ in reports])]
    if len(reports) > 1:
        parts.append(_overview([report for report, _ in reports]))
    for package in packages:
        mine = [(report, plots) for report, plots in reports if report.package == package]
        parts.append(f'<section id="{escape(package)}">')
        if len(packages) > 1:
            parts.append(f"<h2>{escape(package)}</h2>")
        parts += [_section(report, plots) for report, plots in mine]
        parts.append("</section>")
    body = "\n".join(parts)
    # the policy makes a browser refuse whatever is not in this file
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _lead(reports: Sequence[tuple[Report, Sequence[Path]]]) -> str:
    dates = sorted(report.origin["date"][:10] for report, _ in reports)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f'<p class="soft">What the paper says beside what was measured here, {when}.</p>'


def _tally(reports: Sequence[Report]) -> str:
    counts = Counter(item.verdict for report in reports for item in report.items)
    pills = [_pill(verdict, f"{counts[verdict]} {verdict}") for verdict in VERDICTS if counts[verdict]]
    return f'<div class="tally">{"".join(pills)}</div>'


def _overview(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        counts = Counter(item.verdict for item in report.items)
        link = f'<a href="#{_anchor(report)}">{escape(report.package)}, {report.kind} {report.scale}</a>'
        rows.append([link, *(str(counts[verdict]) for verdict in VERDICTS), f"{report.seconds:,.0f}"])
    return _table(["run", *VERDICTS, "seconds"], rows)


def _section(report: Report, plots: Sequence[Path]) -> str:
    header, rows = report.rows()
    cells = [
        [
            *map(escape, texts),
            _pill(verdict) + (f'<span class="needed">{escape(needed)}</span>' if needed else ""),
        ]
        for *texts, verdict, needed in rows
    ]
    parts = [f'<h3 id="{_anchor(report)}">{report.kind}, {report.scale}</h3>', _table(header, cells)]
    if plots:
        parts.append(f'<div class="plots">{"".join(_plot(path, report.name) for path in plots)}</div>')
    return "\n".join([*parts, _origin(report)])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; each cell knows its column's name, for narrow screens."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = []
    for row in rows:
        kinds = ["lead"] + ["figure" if len(cell) < 40 or "<span" in cell else "text" for cell in row[1:]]
        cells = zip(header, kinds, row, strict=True)
        body.append("".join(f'<td class="{k}" data-label="{escape(n)}"><div>{c}</div></td>' for n, k, c in cells))
    lines = "".join(f"<tr>{cells}</tr>\n" for cells in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _pill(verdict: str, text: str = "") -> str:
    return f'<span class="verdict {VERDICTS[verdict]}">{text or verdict}</span>'


def _plot(path: Path, stem: str) -> str:
    name = escape(path.stem.removeprefix(stem + "-").replace("-", " ").replace("_", " "))
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _origin(report: Report) -> str:
    origin = report.origin
    machine = {key: value for key, value in origin["machine"].items() if value is not None}
    commit = f", commit {origin['commit'][:12]}" if origin["commit"] else ""
    facts = {
        "command": f"<code>{escape(origin['command'])}</code>",
        "version": escape(f"{origin['version'] or 'unknown'}{commit}{' with changes' if origin['dirty'] else ''}"),
        "date": escape(origin["date"]),
        "seeds": ", ".join(map(str, report.seeds)) or "none",
        "machine": escape(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())),
        "data": "<br>".join(f"{escape(item['name'])} <code>sha256:{item['sha256']}</code>" for item in report.data),
    }
    lines = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items() if value)
    return f"<details><summary>{escape(report.conditions())}</summary><dl>{lines}</dl></details>"


def _anchor(report: Report) -> str:
    return escape(f"{report.package}-{report.name}")
