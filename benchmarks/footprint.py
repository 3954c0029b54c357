"""What the agent takes when nobody looks: seconds to start, memory, processor time without work."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from benchmarks import load
from benchmarks.lab import Lab
from benchmarks.plan import Plan, say
from benchmarks.processes import Process, Sampler, cpu_seconds, family
from benchmarks.statistics import medians
from dataplane_agent.memory import total_pss_mb
from dataplane_agent.supervisor import SERVICES

SETTLE_SECONDS = 1.0
"""After the start, before anything is weighed."""


def start(lab: Lab, plan: Plan) -> dict[str, dict[str, float]]:
    """Each service alone: from its exec until it is ready, and what it weighs then."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SERVICES}
    for _ in range(plan.rounds):
        for name in SERVICES:
            lab.clear()
            with lab.service(name, lab.sink.urls[True]) as service:
                seconds = _until_ready(service)
                time.sleep(SETTLE_SECONDS)
                cpu = cpu_seconds([service.pid])
                runs[name].append(
                    {
                        "ready_seconds": seconds,
                        "start_cpu_seconds": cpu,
                        "pss_mb": total_pss_mb([service.pid]),
                    }
                )
    found = {name: medians(figures) for name, figures in runs.items()}
    for name, figures in found.items():
        say(f"  {name:<17} ready after {figures['ready_seconds']:.2f} s, {figures['pss_mb']:.1f} MB")
    return found


def _until_ready(service: Process) -> float:
    """Seconds from the start of the process until /readyz says yes."""
    ports = {event["key"]: event["port"] for event in service.await_events("service.listening", 2)}
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", ports["monitoring.health_check_port"], timeout=5)
        connection.request("GET", "/readyz")
        if connection.getresponse().status == 200:
            return time.time() - service.begun
        service.check()
        time.sleep(0.005)


def idle(lab: Lab, plan: Plan) -> dict[str, object]:
    """All four as `dataplane run` starts them, with nothing to do."""
    lab.clear()
    with lab.all_four(lab.sink.urls[True]) as four:
        four.await_events("service.ready", len(SERVICES))
        time.sleep(SETTLE_SECONDS)
        pids = family([four.pid])
        seconds = plan.size(4, 20, 60)
        before, begun = cpu_seconds(pids), time.monotonic()
        time.sleep(seconds)
        used = (cpu_seconds(pids) - before) / (time.monotonic() - begun)
        weights = {str(pid): total_pss_mb([pid]) for pid in pids}
    found: dict[str, Any] = {
        "cpu_percent": used * 100,
        "pss_mb": sum(weights.values()),
        "each_mb": sorted(weights.values(), reverse=True),
    }
    say(f"  all four idle: {found['cpu_percent']:.2f} % of a core, {found['pss_mb']:.1f} MB")
    return found


def memory(lab: Lab, plan: Plan) -> dict[str, object]:
    """All four under load, weighed all the way; the forwarder also alone."""
    records = plan.size(10_000, 200_000, 1_000_000)
    found: dict[str, object] = {"records": records}
    for name in ("all four", "usage_forwarder alone"):
        lab.clear()
        load.fill(lab.redis, records, plan.sessions)
        _fill_beside(lab, records // 100)
        url = lab.sink.urls[True]
        process = lab.all_four(url) if name == "all four" else lab.service("usage_forwarder", url)
        with process, Sampler(agent=[process]) as sampler:
            lab.sink.receiver.until(records, process.check, within=60 + records / 200)
            lab.until_empty()
        begun = sampler.pss["agent"][0][0]
        curve = [(round(moment - begun, 2), round(mb, 2)) for moment, mb in sampler.pss["agent"]]
        found[name] = {"peak_mb": max(mb for _, mb in curve), "end_mb": curve[-1][1], "curve": curve}
        say(f"  {name:<22} peak {max(mb for _, mb in curve):.1f} MB over {records:,} records")
    return found


def _fill_beside(lab: Lab, number: int) -> None:
    """Session events and quota requests, so that every service has something to do."""
    at = "2026-01-01T12:00:00Z"
    pipe = lab.redis.pipeline(transaction=False)
    for n in range(number):
        who = {"api_session_id": f"beside-{n:06d}", "customer_id": "customer-0001", "timestamp": at}
        for kind in ("start", "complete"):
            pipe.xadd("queue:session_lifecycle", {"data": json.dumps({**who, "event_type": kind})})
        pipe.xadd(load.QUOTA, {"data": json.dumps(who)})
    pipe.execute()
