"""Laws of the registrar's overview: a status that is true, and counters that do not go backwards."""

from __future__ import annotations

from typing import Any

import pytest

from common.figures import StreamFigures
from common.health import SERVICES
from common.presence import Counters, Hold, Presence
from registrar.overview import Overview, Sums, overall, services_status


def process(service: str = "usage_forwarder", consumer: str = "a", **changes: Any) -> Presence:
    fields: dict[str, Any] = {
        "at": 1000.0,
        "service": service,
        "consumer": consumer,
        "pid": 1,
        "version": "1",
        "status": "healthy",
        "uptime_seconds": 1.0,
        "breaker": "closed",
        "hold": None,
        "in_flight": 0,
        "redis_connected": True,
        "control_plane_connected": True,
        "counters": Counters(),
        "queue_depth": 0,
        "memory_usage_mb": 20.0,
        "cpu_usage_percent": 0.5,
        "last_success": None,
        "last_error": None,
        "stream": StreamFigures(),
    }
    return Presence(**fields | changes)


def four(**changes: Any) -> list[Presence]:
    return [process(service) for service in SERVICES if service != "usage_forwarder"] + [process(**changes)]


def overview_of(*presences: Presence, now: float = 1000.0) -> Overview:
    overview = Overview(None, "s", lambda: now)  # type: ignore[arg-type]
    overview.heard(presences)
    return overview


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "healthy"),
        ({"status": "degraded"}, "degraded"),
        ({"breaker": "open"}, "degraded"),
        ({"breaker": "half_open"}, "degraded"),
        ({"hold": Hold("auth", "answered 401")}, "degraded"),
        ({"redis_connected": False}, "unhealthy"),
        ({"status": "unhealthy", "hold": Hold("auth", "answered 401")}, "unhealthy"),
        ({"status": "a word of another release"}, "unhealthy"),
    ],
)
def test_a_service_is_as_it_says_and_degraded_while_it_holds_or_its_breaker_is_open(
    changes: dict[str, Any], status: str
) -> None:
    assert services_status(four(**changes))["usage_forwarder"] == status


def test_a_service_nobody_has_heard_of_is_missing() -> None:
    statuses = services_status([process("registrar"), process("somebody_else")])
    assert statuses == {
        "registrar": "healthy",
        "usage_forwarder": "missing",
        "session_notifier": "missing",
        "quota_refresher": "missing",
    }


def test_a_service_is_as_well_as_its_worst_process() -> None:
    assert (
        services_status([*four(), process(consumer="b", status="degraded")])["usage_forwarder"] == "degraded"
    )


def test_all_is_healthy_only_when_each_is() -> None:
    assert overall(["healthy", "healthy"]) == "healthy"
    assert overall(["healthy", "missing"]) == "degraded"


@pytest.mark.parametrize(
    ("presences", "status"),
    [
        (four(), "online"),
        (four(breaker="open"), "degraded"),
        (four()[:3], "degraded"),
        ([], "degraded"),
        (four(at=985.0), "degraded"),
    ],
    ids=["all well", "breaker open", "one missing", "nobody", "one stale"],
)
def test_the_heartbeat_says_online_only_when_all_four_are_there_and_well(
    presences: list[Presence], status: str
) -> None:
    assert overview_of(*presences).heartbeat()["status"] == status


def test_the_heartbeat_sums_over_all_processes_and_counts_a_shared_stream_once() -> None:
    overview = overview_of(
        process("usage_forwarder", "a", counters=Counters(10, 12, 1), queue_depth=7, at=998.0),
        process("usage_forwarder", "b", counters=Counters(5, 6, 0), queue_depth=4, at=999.0),
        process("quota_refresher", "c", counters=Counters(0, 3, 2), queue_depth=2),
    )
    assert overview.heartbeat()["metrics"] == {
        "usage_records_processed": 15,
        "control_plane_requests": 21,
        "redis_queue_depth": 6,
        "failed_deliveries": 3,
        "memory_usage_mb": 60.0,
        "cpu_usage_percent": 1.5,
    }


def test_counters_do_not_go_backwards_when_a_process_is_replaced() -> None:
    sums = Sums()
    sums.observe([process(consumer="a", counters=Counters(10, 20, 1))])
    sums.observe([process(consumer="b", counters=Counters(2, 3, 0))])
    assert sums.total == Counters(12, 23, 1)
    sums.observe([])
    assert sums.total == Counters(12, 23, 1)


def test_a_process_that_was_silent_for_a_while_is_not_counted_twice() -> None:
    sums = Sums()
    sums.observe([process(counters=Counters(10, 20, 1))])
    sums.observe([])
    sums.observe([process(counters=Counters(15, 30, 1))])
    assert sums.total == Counters(15, 30, 1)
