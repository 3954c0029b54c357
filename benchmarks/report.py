"""The results as a page: tables, bounds, the command that repeats them. Pure: from the JSON to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.statistics import paired_ratio

Results = dict[str, Any]


class Bound(NamedTuple):
    """One bound of the contract's section 10, and what was measured."""

    what: str
    bound: str
    figure: str
    reached: bool


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The whole page; a part that was not measured is not there."""
    meta = results["meta"]
    page = [
        "# What the agent achieves",
        "",
        "Made by the benchmark itself; do not edit. To repeat it:",
        "",
        "```sh",
        meta["command"],
        "```",
        "",
        f"{meta['machine']}, {meta['python']}, {meta['redis']}, receiver {meta['sink']}, {meta['date']}.",
        "Everything over TLS on loopback, delivery counted by the receiver, contestants in turn, medians over "
        f"{meta['rounds']} rounds; ratios are medians of what was measured in the same round.",
        "",
        "## Bounds",
        "",
        *table(
            ("what", "bound", "measured", "reached"),
            ((b.what, b.bound, b.figure, "yes" if b.reached else "**no**") for b in bounds(results)),
        ),
    ]
    for name, section in SECTIONS.items():
        if name in results:
            page += ["", *section(results[name])]
    for plot in plots:
        page += ["", f"![{plot.removesuffix('.svg').replace('-', ' ')}](performance/{plot})"]
    return "\n".join(page) + "\n"


def bounds(results: Results) -> list[Bound]:
    """Every bound of which there is a figure."""
    return [bound for name, judge in JUDGES.items() if name in results for bound in judge(results[name])]


# -- the tables ------------------------------------------------------------------------------------------


def _ceiling(found: Results) -> list[str]:
    return [
        "## The receiver is not the bottleneck",
        "",
        f"Asked by a sender that costs next to nothing, it answers {found['requests_per_second']:,.0f} requests a "
        f"second at {found['cpu_us_per_request']:.0f} µs of a core each; the tables say how busy it was.",
    ]


def _race(title: str) -> Callable[[Results], list[str]]:
    def section(found: Results) -> list[str]:
        rounds: dict[str, Any] = found["rounds"]
        rows = []
        for name, figures in found["medians"].items():
            yardstick = "bare-http1" if name == "ours-http1" else "bare"
            ratio = cpu = ""
            if yardstick in rounds and name != yardstick:
                ratio = f"{paired_ratio(rounds[name], rounds[yardstick], 'rate'):.2f}"
                cpu = f"{paired_ratio(rounds[name], rounds[yardstick], 'cpu_us'):.2f}"
            rows.append(
                (
                    found["titles"][name],
                    f"{figures['rate']:,.0f}",
                    f"{figures['cpu_us']:,.0f}",
                    f"{figures['pss_mb']:.0f}",
                    ratio,
                    cpu,
                    f"{figures['sink_busy'] * 100:.0f} %",
                    f"{figures['redis_busy'] * 100:.0f} %",
                )
            )
        head = ("contestant", "records/s", "CPU µs/record", "PSS MB", "rate ÷ bare", "CPU ÷ bare")
        lines = [f"## {title}", "", *table((*head, "receiver busy", "Redis busy"), rows)]
        for contestant, module in found["skipped"].items():
            lines += ["", f"{contestant}: not measured, {module} is not installed."]
        return lines

    return section


def _latency(found: Results) -> list[str]:
    rows = [
        (
            f"{name} ({row['rate']:.0f}/s)",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['max_ms']:.1f}",
            f"{row['producer_late_p99_ms']:.1f}",
        )
        for name, row in found.items()
        if isinstance(row, dict)
    ]
    return [
        f"## From XADD to settled, a ControlPlane that answers in {found['answers_after_ms']:.0f} ms",
        "",
        *table(("arriving", "p50 ms", "p99 ms", "longest ms", "producer late, p99 ms"), rows),
    ]


def _saturated(found: Results) -> list[str]:
    rows = [
        (name, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", row["n"])
        for name, row in found.items()
        if isinstance(row, dict)
    ]
    lasted = "" if found["saturated_throughout"] else " (the backlog did not last)"
    return [
        f"## While usage is saturated{lasted}",
        "",
        *table(("answer", "p50 ms", "p99 ms", "asked"), rows),
    ]


def _crowd(title: str) -> Callable[[Results], list[str]]:
    def section(found: Results) -> list[str]:
        rows = [
            (name, f"{row['rate']:,.0f}", f"{row['cpu_us']:.0f}", f"{row['redis_cpu_us']:.0f}")
            for name, row in found.items()
        ]
        return [f"## {title}", "", *table(("entries", "records/s", "CPU µs/record", "Redis µs/record"), rows)]

    return section


def _takeover(found: Results) -> list[str]:
    return [
        "## Takeover",
        "",
        f"{found['entries']:,} entries of a killed consumer (visibility_timeout {found['visibility_timeout']:g} s, "
        f"claim_interval {found['claim_interval']:g} s): counted from the end of the visibility timeout, taken over "
        f"after {found['taken_seconds']:.2f} s, delivered and settled after {found['settled_seconds']:.2f} s.",
    ]


def _start(found: Results) -> list[str]:
    rows = [
        (name, f"{row['ready_seconds']:.2f}", f"{row['start_cpu_seconds']:.2f}", f"{row['pss_mb']:.1f}")
        for name, row in found.items()
    ]
    return ["## Start", "", *table(("service, alone", "s to ready", "CPU s", "PSS MB"), rows)]


def _idle(found: Results) -> list[str]:
    each = " + ".join(f"{mb:.0f}" for mb in found["each_mb"])
    return [
        "## Without work",
        "",
        f"All four as `dataplane run` starts them: {found['cpu_percent']:.2f} % of a core, "
        f"{found['pss_mb']:.1f} MB ({each}).",
    ]


def _memory(found: Results) -> list[str]:
    rows = [
        (name, f"{row['peak_mb']:.1f}", f"{row['end_mb']:.1f}", f"{drift(row['curve']):+.1f}")
        for name, row in found.items()
        if isinstance(row, dict)
    ]
    return [
        f"## Memory over {found['records']:,} records",
        "",
        *table(("", "peak MB", "at the end MB", "second half − first half MB"), rows),
    ]


def _distances(found: Results) -> list[str]:
    rows = [
        (
            name,
            f"{rates['ours-http1']['rate']:,.0f}",
            f"{rates['bare-http1']['rate']:,.0f}",
            f"{rates['ours-http1']['rate'] / rates['bare-http1']['rate']:.2f}",
        )
        for name, rates in found.items()
    ]
    head = ("the ControlPlane answers in", "the agent /s", "bare loop /s", "ratio")
    return ["## Near and far", "", *table(head, rows)]


def _levels(found: Results) -> list[str]:
    contestants = [name for name in next(iter(found.values())) if name != "adaptive"]
    rows = []
    for name, figures in found.items():
        adaptive = figures["adaptive"]
        best = max(figures[one]["rate"] for one in contestants)
        rates = (f"{figures[one]['rate']:,.0f}" for one in contestants)
        shown = (f"{adaptive['rate']:,.0f}", f"{adaptive['rate'] / best:.2f}", f"{adaptive['level']:.0f}")
        most = figures[contestants[-1]]["refused_percent"]
        rows.append((name, *rates, *shown, f"{most:.1f} %, {adaptive['refused_percent']:.1f} %"))
    fixed = (f"{one} fixed /s" for one in contestants)
    refused = f"refused: {contestants[-1]} fixed, adaptive"
    head = ("the ControlPlane", *fixed, "adaptive /s", "÷ best fixed", "its level", refused)
    return ["## The level that the agent finds", "", *table(head, rows)]


def drift(curve: Sequence[tuple[float, float]]) -> float:
    """By how much the mean of the second half of a curve exceeds that of the first, the start left out."""
    values = [mb for _, mb in curve[len(curve) // 5 :]]
    middle = len(values) // 2
    if not middle:
        return 0.0
    return sum(values[middle:]) / len(values[middle:]) - sum(values[:middle]) / middle


SECTIONS: dict[str, Callable[[Results], list[str]]] = {
    "ceiling": _ceiling,
    "throughput": _race("A backlog drained: the agent and the bare loop"),
    "peers": _race("The same by what users would pick instead"),
    "latency": _latency,
    "saturated": _saturated,
    "backlog": _crowd("A short and a long backlog"),
    "dead": _crowd("Beside dead letters"),
    "takeover": _takeover,
    "start": _start,
    "idle": _idle,
    "memory": _memory,
    "distances": _distances,
    "levels": _levels,
}


# -- the bounds ------------------------------------------------------------------------------------------


def _judge_throughput(found: Results) -> list[Bound]:
    rounds, judged = found["rounds"], []
    for ours, bare, name in (("ours", "bare", "HTTP/2"), ("ours-http1", "bare-http1", "HTTP/1.1")):
        if ours in rounds and bare in rounds:
            rate = paired_ratio(rounds[ours], rounds[bare], "rate")
            cpu = paired_ratio(rounds[ours], rounds[bare], "cpu_us")
            judged.append(Bound(f"records/s ÷ bare loop, {name}", "≥ 0.80", f"{rate:.2f}", rate >= 0.8))
            judged.append(Bound(f"CPU a record ÷ bare loop, {name}", "≤ 1.25", f"{cpu:.2f}", cpu <= 1.25))
    if "ours" in rounds and "ours-batch" in rounds:
        gain = paired_ratio(rounds["ours-batch"], rounds["ours"], "rate")
        judged.append(Bound("100 records a request ÷ one", "≥ 5", f"{gain:.1f}", gain >= 5))
    return judged


def _judge_latency(found: Results) -> list[Bound]:
    p50, p99 = found["100/s"]["p50_ms"], found["100/s"]["p99_ms"]
    figure = f"{p50:.1f} ms, {p99:.1f} ms"
    reached = p50 <= 10 and p99 <= 50
    return [Bound("XADD → settled at 100/s, p50 and p99", "≤ 10 ms, ≤ 50 ms", figure, reached)]


def _judge_saturated(found: Results) -> list[Bound]:
    p99 = found["/health"]["p99_ms"]
    return [Bound("`/health` while saturated, p99", "< 50 ms", f"{p99:.1f} ms", p99 < 50)]


def _judge_equal(what: str) -> Callable[[Results], list[Bound]]:
    def judge(found: Results) -> list[Bound]:
        few, many = (row["rate"] for row in found.values())
        names = " and ".join(found)
        return [
            Bound(
                f"records/s with {what}: {names}", "± 15 %", f"{many / few:.2f}", 0.85 <= many / few <= 1.15
            )
        ]

    return judge


def _judge_takeover(found: Results) -> list[Bound]:
    seconds = found["settled_seconds"]
    what = f"takeover of {found['entries']:,} entries, delivered"
    return [Bound(what, "< 5 s", f"{seconds:.2f} s", seconds < 5)]


def _judge_levels(found: Results) -> list[Bound]:
    ratios = []
    for figures in found.values():
        best = max(figure["rate"] for name, figure in figures.items() if name != "adaptive")
        ratios.append(figures["adaptive"]["rate"] / best)
    worst = min(ratios)
    return [Bound("records/s ÷ best fixed level, the worst case", "≥ 0.80", f"{worst:.2f}", worst >= 0.8)]


def _judge_start(found: Results) -> list[Bound]:
    slowest = max(row["ready_seconds"] for row in found.values())
    heaviest = max(row["pss_mb"] for row in found.values())
    return [
        Bound("start to ready, the slowest", "< 1 s", f"{slowest:.2f} s", slowest < 1),
        Bound("PSS of one alone, idle", "< 56 MB", f"{heaviest:.1f} MB", heaviest < 56),
    ]


def _judge_idle(found: Results) -> list[Bound]:
    cpu, mb = found["cpu_percent"], found["pss_mb"]
    return [
        Bound("idle CPU, all four", "< 2 %", f"{cpu:.2f} %", cpu < 2),
        Bound("PSS of all four, idle", "< 128 MB", f"{mb:.1f} MB", mb < 128),
    ]


def _judge_memory(found: Results) -> list[Bound]:
    four, alone = found["all four"], found["usage_forwarder alone"]
    grown = drift(four["curve"])
    return [
        Bound("PSS of all four, under load", "< 128 MB", f"{four['peak_mb']:.1f} MB", four["peak_mb"] < 128),
        Bound("PSS of one alone, under load", "< 56 MB", f"{alone['peak_mb']:.1f} MB", alone["peak_mb"] < 56),
        Bound(f"growth over {found['records']:,} records", "flat (< 2 MB)", f"{grown:+.1f} MB", grown < 2),
    ]


JUDGES: dict[str, Callable[[Results], list[Bound]]] = {
    "throughput": _judge_throughput,
    "latency": _judge_latency,
    "saturated": _judge_saturated,
    "backlog": _judge_equal("a backlog of"),
    "dead": _judge_equal("dead letters"),
    "takeover": _judge_takeover,
    "start": _judge_start,
    "idle": _judge_idle,
    "memory": _judge_memory,
    "levels": _judge_levels,
}
