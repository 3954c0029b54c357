"""The level that the agent finds by itself, beside fixed ones: ControlPlanes near and far, and two that give way.

Each contestant carries a backlog for a while; what arrives after the first seconds is its rate, since a ControlPlane
that has been pushed over would never come to the end of one.
"""

from __future__ import annotations

import http.client
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Process
from benchmarks.sink import SlowSink

FIXED = (1, 8, 16, 64)
MOST = 64
ADAPTIVE = "adaptive"
GIVES_WAY_ABOVE = 16
FASTEST = 25_000
"""Records a second that no contestant carries."""

SINKS: dict[str, tuple[float, dict[str, int]]] = {
    "1 ms": (0.001, {}),
    "20 ms": (0.02, {}),
    "200 ms": (0.2, {}),
    f"20 ms, slower by the square above {GIVES_WAY_ABOVE} at once": (
        0.02,
        {"degrade_above": GIVES_WAY_ABOVE},
    ),
    f"20 ms, 503 above {GIVES_WAY_ABOVE} at once": (0.02, {"refuse_above": GIVES_WAY_ABOVE}),
}

_level = re.compile(rb"^dataplane_in_flight_limit\{.*\} (\S+)$", re.MULTILINE)


def measure(lab: Lab, plan: Plan) -> dict[str, Any]:
    """Per ControlPlane and contestant, in one round: the rate, refusals a hundred answers, and the mean level."""
    found: dict[str, Any] = {}
    for name, (delay, manner) in SINKS.items():
        found[name] = {}
        for fixed in (*FIXED, None):
            with lab.slow_sink(delay, **manner) as sink:
                figures = _carry(lab, plan, sink, delay, fixed)
            found[name][ADAPTIVE if fixed is None else str(fixed)] = figures
        rates = ", ".join(f"{one} {row['rate']:.0f}/s" for one, row in found[name].items())
        say(f"  {name}: {rates} (at level {found[name][ADAPTIVE]['level']:.0f})")
    return found


def _carry(lab: Lab, plan: Plan, sink: SlowSink, delay: float, fixed: int | None) -> dict[str, float]:
    before, seconds = plan.size(2, 6, 6), plan.size(2, 8, 8)
    lab.clear()
    load.fill(lab.redis, round(min(FASTEST, 1.5 * MOST / delay) * (before + seconds)), plan.sessions)
    with _start(lab, sink, fixed) as process:
        ports = {event["key"]: event["port"] for event in process.await_events("service.listening", 2)}
        process.await_events("service.ready")
        _spend(before, process.check)
        at, arrived, refused = time.monotonic(), sink.receiver.read(), sink.receiver.refused
        levels = []
        for _ in range(10):
            _spend(seconds / 10, process.check)
            levels.append(_level_of(ports["monitoring.metrics_port"]))
        arrived, refused = sink.receiver.read() - arrived, sink.receiver.refused - refused
        rate = arrived / (time.monotonic() - at)
        if not lab.redis.xlen(load.USAGE):
            raise AssertionError("the backlog did not last")
    return {
        "rate": rate,
        "refused_percent": 100 * refused / max(1, arrived + refused),
        "level": sum(levels) / len(levels),
    }


def _start(lab: Lab, sink: SlowSink, fixed: int | None) -> Process:
    if fixed is None:
        return lab.service("usage_forwarder", sink.url, control_plane__max_in_flight=MOST)
    environment = lab.agent(sink.url, control_plane__max_in_flight=fixed)
    return lab.start([sys.executable, "-m", "benchmarks.contestants.fixed_level"], environment)


def _spend(seconds: float, check: Callable[[], None]) -> None:
    time.sleep(seconds)
    check()


def _level_of(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    found = _level.search(connection.getresponse().read())
    connection.close()
    assert found is not None
    return float(found[1])
