"""The plots of `reproduce` and `bench`."""

from __future__ import annotations

import statistics
from typing import Any

from isotone.shared.claims import figure


def plots(results: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Accuracy bars a data set, the three settings (observed, unseen, all test vertices), reliability, signal."""
    found: dict[str, Any] = {}
    for kind in ("hypergraph", "graph"):
        for name, runs in results.get(kind, {}).items():
            columns = {arm: [run["accuracy"][arm] for run in runs] for arm in runs[0]["accuracy"]}
            found[f"accuracy-{name}"] = _bars(f"{name}: test accuracy", columns)
    for name, runs in results.get("production", {}).items():
        columns = {
            f"{arm}, {setting}": [run[arm][setting] for run in runs] for arm in runs[0] for setting in runs[0][arm]
        }
        found[f"settings-{name}"] = _bars(f"{name}: three settings", columns)
    for name, (run,) in results.get("stacked", {}).items():
        if len(run) > 1:
            columns = {teacher: entry["accuracy"] for teacher, entry in run.items()}
            found[f"teachers-{name}"] = _bars(f"{name}: teachers, seeds as one job", columns)
    found["reliability"] = _histogram(results["hypergraph"])
    if len(results.get("signal", {})) > 1:
        found["signal"] = _signal(results["signal"])
    return found


def _bars(title: str, columns: dict[str, list[float]]) -> Any:
    drawing, axes = figure(
        title, "per cent (mean and standard deviation over seeds)", "", size=(7.5, 0.8 + 0.34 * len(columns))
    )
    names = sorted(columns, key=lambda name: ("Light" in name, name.startswith("teacher"), name))
    means = [statistics.mean(columns[name]) for name in names]
    spreads = [statistics.stdev(columns[name]) if len(columns[name]) > 1 else 0.0 for name in names]
    colours = [
        "#0072B2" if "Light" in name else "#D55E00" if name.startswith("teacher") else "#999999" for name in names
    ]
    axes.barh(names, means, xerr=spreads, color=colours, error_kw={"ecolor": "#333333", "capsize": 2})
    low = min(m - s for m, s in zip(means, spreads, strict=True))
    high = max(m + s for m, s in zip(means, spreads, strict=True))
    axes.set_xlim(max(0.0, low - 0.25 * (high - low) - 2), high + 0.3 * (high - low) + 2)
    axes.set_xticks([tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= min(100, axes.get_xlim()[1])])
    for row, (mean, spread) in enumerate(zip(means, spreads, strict=True)):
        axes.annotate(
            f"{mean:.1f}", (mean + spread, row), xytext=(4, 0), textcoords="offset points", va="center", size=9
        )
    axes.grid(False, axis="y")
    return drawing


def _histogram(sets: dict[str, list[Any]]) -> Any:
    drawing, axes = figure("Reliability of hyperedges", "reliability rho", "share of the hyperedges")
    edges = [i / 20 for i in range(21)]
    for name, runs in sets.items():
        counts = [sum(column) for column in zip(*(run["rho"] for run in runs), strict=True)]
        axes.stairs([count / sum(counts) for count in counts], edges, label=name, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.legend()
    return drawing


def _signal(by_signal: dict[str, list[Any]]) -> Any:
    drawing, axes = figure("Synthetic: accuracy over the features' signal", "signal a", "test accuracy, per cent")
    signals = [float(name) for name in by_signal]
    for arm in ("fair MLP", "teacher", "LightHGNN+"):
        columns = [[run["accuracy"][arm] for run in runs] for runs in by_signal.values()]
        means = [statistics.mean(column) for column in columns]
        spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        axes.errorbar(signals, means, spreads, marker="o", capsize=3, label=arm)
    axes.legend()
    return drawing


def latency_plot(sweep: list[dict[str, Any]]) -> Any:
    """Seconds of an answer by teacher and student, for one vertex and for all, over N."""
    drawing, axes = figure("Time of an answer over the size of the hypergraph", "vertices", "seconds")
    vertices = [entry["vertices"] for entry in sweep]
    lines = {
        "teacher, factored pass over all": [entry["whole"] for entry in sweep],
        "teacher, exact closure of one": [entry["closure"] for entry in sweep],
        "student, all": [entry["all"]["student"] for entry in sweep],
        "student, one": [entry["student"] for entry in sweep],
    }
    for name, values in lines.items():
        if None not in values:
            axes.plot(vertices, values, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xticks(vertices, [f"{number:,}" for number in vertices])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.legend()
    return drawing


def batch_plot(times: list[dict[str, Any]]) -> Any:
    """How many times faster the student is, over the number of vertices asked for."""
    drawing, axes = figure(
        "Speed-up over the number of vertices asked for", "vertices asked for", "teacher's time over student's"
    )
    axes.plot([t["batch"] for t in times], [t["ratio"] for t in times], marker="o")
    axes.axhline(1, color="#555555", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    return drawing
