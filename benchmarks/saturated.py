"""While usage records come as fast as they can be carried: how soon a quota is granted, how soon /health answers."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Process
from benchmarks.statistics import percentile

RESPONSES = "queue:quota_response"
QUOTAS_A_SECOND = 20
ENDPOINTS_EVERY = 0.02


def measure(lab: Lab, plan: Plan) -> dict[str, object]:
    """Percentiles in milliseconds, all taken in the same minute of full load."""
    lab.clear()
    seconds = plan.size(3, 15, 30)
    url = lab.sink.urls[True]
    backlog = plan.size(100_000, 500_000, 1_000_000)
    load.fill(lab.redis, backlog, plan.sessions)
    with lab.service("quota_refresher", url) as refresher:
        refresher.await_events("service.ready")
        with lab.service("usage_forwarder", url) as forwarder:
            ports = {event["key"]: event["port"] for event in forwarder.await_events("service.listening", 2)}
            forwarder.await_events("service.ready")
            health: list[float] = []
            metrics: list[float] = []
            asking = [
                _asking(forwarder, ports["monitoring.health_check_port"], "/health", health, seconds),
                _asking(forwarder, ports["monitoring.metrics_port"], "/metrics", metrics, seconds),
            ]
            threads = [threading.Thread(target=ask) for ask in asking]
            for thread in threads:
                thread.start()
            quotas = _grants(lab, seconds)
            for thread in threads:
                thread.join()
            left = lab.redis.xlen(load.USAGE)
    found: dict[str, Any] = {"saturated_throughout": left > 0}
    for name, values in (("quota", quotas), ("/health", health), ("/metrics", metrics)):
        found[name] = {
            "p50_ms": percentile(values, 0.5),
            "p99_ms": percentile(values, 0.99),
            "n": len(values),
        }
        say(f"  {name:<9} p50 {found[name]['p50_ms']:.1f} ms, p99 {found[name]['p99_ms']:.1f} ms")
    if not left:
        say("  (the backlog did not last: take these figures for less than full load)")
    return found


def _asking(process: Process, port: int, path: str, taken: list[float], seconds: float) -> Callable[[], None]:
    def ask() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            begun = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", path)
            connection.getresponse().read()
            connection.close()
            taken.append((time.perf_counter() - begun) * 1000)
            process.check()
            time.sleep(ENDPOINTS_EVERY)

    return ask


def _grants(lab: Lab, seconds: float) -> list[float]:
    """Milliseconds from XADD of a request to its grant, one request after the other."""
    taken = []
    last = b"0"
    until = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until:
        number += 1
        request = {
            "api_session_id": f"session-{number % 100:05d}",
            "customer_id": "customer-0001",
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "transaction_id": f"quota-{number}",
        }
        lab.redis.xadd(load.QUOTA, {"data": json.dumps(request)})
        begun = time.perf_counter()
        answered = cast(list[Any], lab.redis.xread({RESPONSES: last}, block=10_000))
        taken.append((time.perf_counter() - begun) * 1000)
        if not answered:
            raise TimeoutError("no grant within 10 s")
        last, fields = answered[0][1][-1]
        if json.loads(fields[b"data"])["transaction_id"] != request["transaction_id"]:
            raise AssertionError("the grant is for another request")
        time.sleep(1 / QUOTAS_A_SECOND)
    return taken
