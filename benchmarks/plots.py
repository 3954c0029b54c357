"""The results as pictures. matplotlib is in the extra `bench` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

Results = dict[str, Any]


def draw(results: Results, directory: Path) -> list[str]:
    """One file per plot whose figures are there; returns their names."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for name, plot in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        if plot(results, axes):
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(
                directory / f"{name}.svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
            names.append(f"{name}.svg")
        pyplot.close(figure)
    return names


def _throughput(results: Results, axes: Any) -> bool:
    rates: dict[str, float] = {}
    for part in ("peers", "throughput"):  # the bare loop is in both
        found = results.get(part, {"medians": {}, "titles": {}})
        rates |= {found["titles"][name]: row["rate"] for name, row in found["medians"].items()}
    rows = sorted(rates.items(), key=lambda row: row[1])
    bars = axes.barh([title for title, _ in rows], [rate for _, rate in rows])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel("records a second")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.15)
    return bool(rows)


def _latency(results: Results, axes: Any) -> bool:
    found = results.get("latency", {})
    for name, row in found.items():
        if isinstance(row, dict):
            drawn = axes.hist(row["milliseconds"], bins=120, histtype="step", density=True, label=name)
            axes.axvline(row["p99_ms"], linestyle=":", linewidth=1, color=drawn[2][0].get_edgecolor())
    axes.set_xlabel("ms from XADD to settled (dotted: p99)")
    axes.set_yticks([])
    axes.set_xlim(left=0)
    if found:
        axes.legend(frameon=False)
    return bool(found)


def _memory(results: Results, axes: Any) -> bool:
    found = results.get("memory", {})
    for name, row in found.items():
        if isinstance(row, dict):
            seconds, megabytes = zip(*row["curve"], strict=True)
            axes.plot(seconds, megabytes, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"seconds, over {found.get('records', 0):,} records")
    axes.set_ylabel("PSS, MB")
    if found:
        axes.legend(frameon=False)
    return bool(found)


def _distances(results: Results, axes: Any) -> bool:
    found = results.get("distances", {})
    for name, title, offset in (("ours-http1", "the agent", -0.2), ("bare-http1", "bare loop", 0.2)):
        rates = [rates[name]["rate"] for rates in found.values()]
        bars = axes.bar([n + offset for n in range(len(found))], rates, 0.4, label=title)
        axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_xlabel("the ControlPlane answers in")
    axes.set_ylabel("records a second")
    if found:
        axes.legend(frameon=False)
    return bool(found)


def _levels(results: Results, axes: Any) -> bool:
    found = results.get("levels", {})
    contestants = list(next(iter(found.values()), {}))
    width = 0.8 / max(1, len(contestants))
    for number, contestant in enumerate(contestants):
        best = [max(row["rate"] for row in rates.values()) for rates in found.values()]
        shares = [rates[contestant]["rate"] / most for rates, most in zip(found.values(), best, strict=True)]
        label = contestant if contestant == "adaptive" else f"{contestant} fixed"
        axes.bar([n + (number - 2) * width for n in range(len(found))], shares, width, label=label)
    axes.axhline(0.8, linestyle=":", linewidth=1, color="black")
    axes.set_xticks(range(len(found)), [fill(name, 18) for name in found], fontsize=8)
    axes.set_ylabel("records a second ÷ the best's")
    if found:
        axes.legend(frameon=False, ncols=len(contestants), loc="lower center", bbox_to_anchor=(0.5, 1))
    return bool(found)


PLOTS: dict[str, Callable[[Results, Any], bool]] = {
    "throughput": _throughput,
    "latency": _latency,
    "memory": _memory,
    "distances": _distances,
    "levels": _levels,
}
