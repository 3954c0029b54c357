"""A backlog drained to its end, as fast as it goes: contestant after contestant, round after round (A B A B)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from benchmarks import load
from benchmarks.contestants import Contestant
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Process, Sampler
from benchmarks.sink import Receiver
from benchmarks.statistics import grown, medians, steady, value_at

Figures = dict[str, float]


def race(lab: Lab, plan: Plan, contestants: Sequence[Contestant]) -> dict[str, object]:
    """The median figures of each contestant that is installed, and those of every round."""
    present = [contestant for contestant in contestants if not _skipped(contestant)]
    runs: dict[str, list[Figures]] = {contestant.name: [] for contestant in present}
    for number in range(plan.rounds):
        for contestant in present:
            figures = drain(lab, contestant, plan.of(contestant.share), plan.sessions)
            runs[contestant.name].append(figures)
            say(
                f"  round {number + 1}  {contestant.title:<58} {figures['rate']:>8.0f}/s"
                f" {figures['cpu_us']:>7.0f} µs {figures['pss_mb']:>6.1f} MB"
            )
    titles = {contestant.name: contestant.title for contestant in present}
    return {
        "titles": titles,
        "medians": {name: medians(figures) for name, figures in runs.items()},
        "rounds": runs,
        "skipped": {c.title: c.missing for c in contestants if c.missing},
    }


def drain(lab: Lab, contestant: Contestant, records: int, sessions: int) -> Figures:
    """One contestant, one run; every record has arrived at its end, or this raises."""
    url = lab.sink.urls[contestant.http2]
    lab.clear()
    contestant.fill(lab, url, records, sessions)
    with ExitStack() as stack:
        processes = [stack.enter_context(process) for process in contestant.start(lab, url)]
        sampler = Sampler(contestant=processes, sink=[lab.sink.process], redis=[lab.redis_process])
        with sampler:
            lab.sink.receiver.until(records, checking(processes), within=60 + records / 50)
            if contestant.is_ours or contestant.name.startswith("bare"):
                lab.until_empty()
    return figures_of(lab.sink.receiver, sampler, records)


def figures_of(receiver: Receiver, sampler: Sampler, records: int) -> Figures:
    """What a finished run comes to, in its steady part."""
    receiver.read()
    if receiver.records != records:
        raise AssertionError(f"{receiver.records} records arrived, {records} were sent")
    window = steady(receiver.arrivals)
    seconds = window.end - window.begin
    requests = receiver.requests * window.records / records
    sink_cpu = grown(sampler.cpu["sink"], window) if "sink" in sampler.cpu else 0.0
    return {
        "records": records,
        "rate": window.rate,
        "cpu_us": grown(sampler.cpu["contestant"], window) / window.records * 1e6,
        "cpu_whole_us": value_at(sampler.cpu["contestant"], float("inf")) / records * 1e6,
        "pss_mb": sampler.peak_mb("contestant"),
        "busy": grown(sampler.cpu["contestant"], window) / seconds,
        "sink_busy": sink_cpu / seconds,
        "sink_cpu_us": sink_cpu / requests * 1e6,
        "redis_busy": grown(sampler.cpu["redis"], window) / seconds if "redis" in sampler.cpu else 0.0,
        "repeated": receiver.repeated,
        "http2": float(receiver.protocols == {"HTTP/2.0"}),
    }


def checking(processes: Sequence[Process]) -> Callable[[], None]:
    """Raises when one of them has ended."""

    def check() -> None:
        for process in processes:
            process.check()

    return check


def ceiling(lab: Lab) -> Figures:
    """What the sink can do when its sender costs next to nothing."""
    return lab.sink.ceiling(load.record(1).encode())


def _skipped(contestant: Contestant) -> bool:
    if contestant.missing:
        say(f"  skipped: {contestant.title}: {contestant.missing} is not installed (the extra `bench`)")
    return contestant.missing is not None
