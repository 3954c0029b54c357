"""How long an entry takes, from the moment XADD has returned until it has left its stream.

Redis itself says when: its MONITOR shows the XDEL of every entry with the time on the clock the producer reads too.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from types import TracebackType
from typing import Self, cast

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Process, Sampler
from benchmarks.sink import SlowSink
from benchmarks.statistics import percentile, steady

ANSWERS_AFTER = 0.001
WARM_UP = 1.0
"""Seconds of records that come first and are not counted: they pay for the connection, as after every start."""

TICK = 0.005
"""Above 200 records a second several are added at once, every so many seconds."""

_ID = re.compile(rb'"(\d+-\d+)"')


class Deletions:
    """When each entry left the stream, seen by MONITOR while the block runs."""

    def __init__(self, port: int) -> None:
        self.at: dict[bytes, float] = {}
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._socket.sendall(b"MONITOR\r\n")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("rb", 1 << 20) as lines:
            for line in lines:
                if b'"XDEL"' in line:
                    moment = float(line[1 : line.index(b" ")])
                    for entry_id in _ID.findall(line):
                        self.at[entry_id] = moment


def measure(lab: Lab, plan: Plan) -> dict[str, object]:
    """At 100 a second and at half of what this ControlPlane lets through."""
    with lab.slow_sink(ANSWERS_AFTER) as sink:
        lab.clear()
        capacity = _capacity(lab, sink, plan.size(2000, 10_000, 20_000))
        seconds = plan.size(3, 20, 60)
        found: dict[str, object] = {"answers_after_ms": ANSWERS_AFTER * 1000, "capacity": capacity}
        for name, rate in (("100/s", 100.0), ("half of capacity", capacity / 2)):
            lab.clear()
            with lab.service("usage_forwarder", sink.url) as service:
                service.await_events("service.ready")
                taken, late = at_rate(lab, rate, seconds, service)
            milliseconds = [value * 1000 for value in taken]
            found[name] = {
                "rate": rate,
                "p50_ms": percentile(milliseconds, 0.5),
                "p99_ms": percentile(milliseconds, 0.99),
                "max_ms": max(milliseconds),
                "producer_late_p99_ms": percentile(late, 0.99) * 1000,
                "milliseconds": [round(value, 2) for value in sorted(milliseconds)],
            }
            say(
                f"  {name:<18} {rate:>6.0f}/s  p50 {percentile(milliseconds, 0.5):.1f} ms,"
                f" p99 {percentile(milliseconds, 0.99):.1f} ms"
                f" (the producer itself woke late by p99 {percentile(late, 0.99) * 1000:.1f} ms)"
            )
    return found


def _capacity(lab: Lab, sink: SlowSink, records: int) -> float:
    load.fill(lab.redis, records, 100)
    with lab.service("usage_forwarder", sink.url) as service, Sampler(contestant=[service]):
        sink.receiver.until(records, service.check)
        lab.until_empty()
    return steady(sink.receiver.arrivals).rate


def at_rate(lab: Lab, rate: float, seconds: float, service: Process) -> tuple[list[float], list[float]]:
    """Seconds each record took while they came evenly, and by which the producer woke late before each.

    Who shares the machine delays both alike: a long time beside a late producer says nothing about the service.
    Raises unless every record was settled.
    """
    each = max(1, round(rate * TICK))
    interval = each / rate
    warming = int(WARM_UP / interval)
    added: dict[bytes, float] = {}
    late: list[float] = []
    with Deletions(lab.redis_port) as deletions:
        begun = time.monotonic()
        for number in range(warming + int(seconds / interval)):
            time.sleep(max(0.0, begun + number * interval - time.monotonic()))
            late.append(time.monotonic() - begun - number * interval)
            pipe = lab.redis.pipeline(transaction=False)
            for n in range(each):
                pipe.xadd(load.USAGE, {"data": load.record(number * each + n)})
            ids = cast(list[bytes], pipe.execute())
            now = time.time()
            added.update(dict.fromkeys(ids, now))
        lab.until_empty()
        service.check()
        deadline = time.monotonic() + 5
        while len(deletions.at) < len(added) and time.monotonic() < deadline:
            time.sleep(0.01)
    # An entry can be gone before its XADD, one of several, has returned: that is no time at all.
    taken = [max(0.0, deletions.at[entry_id] - moment) for entry_id, moment in added.items()]
    return taken[warming * each :], late[warming:]
