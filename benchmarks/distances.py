"""ControlPlanes that are near and far: what the time they take does to the throughput, beside the bare loop."""

from __future__ import annotations

from benchmarks import load
from benchmarks.contestants import BARE_1, OURS_1
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Sampler
from benchmarks.statistics import medians
from benchmarks.throughput import Figures, checking, figures_of

MILLISECONDS = (1, 20, 200)
IN_FLIGHT = 64


def measure(lab: Lab, plan: Plan) -> dict[str, dict[str, Figures]]:
    """Per distance: the agent and the bare loop, HTTP/1.1, 64 in flight each."""
    found: dict[str, dict[str, Figures]] = {}
    for delay in MILLISECONDS:
        most = IN_FLIGHT * 1000 / delay
        records = min(plan.size(2000, 10_000, 20_000), round(most * plan.size(2, 6, 15)))
        with lab.slow_sink(delay / 1000) as sink:
            runs: dict[str, list[Figures]] = {OURS_1.name: [], BARE_1.name: []}
            for _ in range(plan.rounds):
                for contestant in (BARE_1, OURS_1):
                    lab.clear()
                    sink.receiver.read()
                    sink.receiver.forget()
                    load.fill(lab.redis, records, plan.sessions)
                    processes = contestant.start(lab, sink.url)
                    try:
                        with Sampler(contestant=processes) as sampler:
                            sink.receiver.until(records, checking(processes))
                            lab.until_empty()
                    finally:
                        for process in processes:
                            process.stop()
                    runs[contestant.name].append(figures_of(sink.receiver, sampler, records))
        found[f"{delay} ms"] = {name: medians(figures) for name, figures in runs.items()}
        rates = {name: figures["rate"] for name, figures in found[f"{delay} ms"].items()}
        say(f"  {delay:>4} ms  " + ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items()))
    return found
