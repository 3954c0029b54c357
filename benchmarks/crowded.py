"""What lies in Redis beside the work: a long backlog, dead letters, the entries of a consumer that was killed."""

from __future__ import annotations

import time

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Sampler
from benchmarks.statistics import grown, steady
from benchmarks.throughput import Figures

VISIBILITY_TIMEOUT, CLAIM_INTERVAL = 3.0, 1.0


def backlog(lab: Lab, plan: Plan) -> dict[str, Figures]:
    """The first records of a short backlog and of a long one."""
    short = plan.size(2000, 10_000, 10_000)
    sizes = {size: size for size in (short, plan.size(20_000, 200_000, 1_000_000))}
    found: dict[str, Figures] = {}
    for number in range(plan.rounds):
        for size in sizes:
            lab.clear()
            load.fill(lab.redis, size, plan.sessions)
            _keep_better(found, f"{size:,}", _first(lab, plan, short), number)
    return found


def dead_letters(lab: Lab, plan: Plan) -> dict[str, Figures]:
    """The same drain beside no dead letters and beside many."""
    records = plan.size(2000, 10_000, 10_000)
    found: dict[str, Figures] = {}
    for number in range(plan.rounds):
        for dead in (0, plan.size(5000, 20_000, 100_000)):
            lab.clear()
            load.fill_dead(lab.redis, dead)
            load.fill(lab.redis, records, plan.sessions)
            _keep_better(found, f"{dead:,}", _first(lab, plan, records), number)
    return found


def _keep_better(found: dict[str, Figures], name: str, figures: Figures, number: int) -> None:
    """The fastest of the rounds: what others do on this machine can only slow a run down."""
    say(f"  round {number + 1}  {name:>9}  {figures['rate']:>6.0f}/s {figures['cpu_us']:>6.0f} µs a record")
    if name not in found or figures["rate"] > found[name]["rate"]:
        found[name] = figures


def _first(lab: Lab, plan: Plan, records: int) -> Figures:
    """The agent's figures over the first so many records."""
    with (
        lab.service("usage_forwarder", lab.sink.urls[True]) as service,
        Sampler(contestant=[service], redis=[lab.redis_process]) as sampler,
    ):
        lab.sink.receiver.until(records, service.check)
    window = steady(lab.sink.receiver.arrivals, (0.1, 0.95))
    return {
        "rate": window.rate,
        "cpu_us": grown(sampler.cpu["contestant"], window) / window.records * 1e6,
        "redis_cpu_us": grown(sampler.cpu["redis"], window) / window.records * 1e6,
        "pss_mb": sampler.peak_mb("contestant"),
    }


def takeover(lab: Lab, plan: Plan) -> Figures:
    """A consumer read entries and was killed: how soon, after its visibility timeout, another has delivered them."""
    lab.clear()
    entries = plan.size(2000, 10_000, 10_000)
    with lab.service(
        "usage_forwarder",
        lab.sink.urls[True],
        streams__visibility_timeout=VISIBILITY_TIMEOUT,
        streams__claim_interval=CLAIM_INTERVAL,
    ) as service:
        service.await_events("service.ready")
        load.leave_behind(lab.redis, entries)
        due = time.time() + VISIBILITY_TIMEOUT
        deadline = due + 60.0
        while lab.pending_of("killed"):
            service.check()
            if time.time() > deadline:
                raise TimeoutError(f"{lab.pending_of('killed')} entries are still the killed consumer's")
            time.sleep(0.02)
        taken = time.time() - due
        lab.sink.receiver.until(entries, service.check)
        settled = lab.until_empty() - due
    say(f"  {entries:,} entries: taken over after {taken:.2f} s, settled after {settled:.2f} s")
    return {
        "entries": entries,
        "visibility_timeout": VISIBILITY_TIMEOUT,
        "claim_interval": CLAIM_INTERVAL,
        "taken_seconds": taken,
        "settled_seconds": settled,
    }
