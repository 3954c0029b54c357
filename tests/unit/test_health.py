from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest

from common.config import Secret
from common.endpoints import Access, Request, Response, Route
from common.figures import StreamFigures
from common.health import SERVICES, State, health_routes, metrics_routes, port_of
from common.metrics import Metrics

LOOPBACK = ip_address("127.0.0.1")
STRANGER = ip_address("203.0.113.9")


class Hold(msgspec.Struct):
    kind: str = "auth"
    detail: str = "401 from the ControlPlane"


FIGURES = StreamFigures(backlog=5, pending=2, dead={"invalid": 1}, oldest_age_seconds=3.5)
ACCESS = Access(Secret(""), ["127.0.0.0/8"])
WELL = State(
    service="registrar",
    server_id="api-1",
    version="1.2.3",
    started_at=100.0,
    redis_connected=True,
    control_plane_connected=True,
)
ALL_WELL = dict.fromkeys(SERVICES, "healthy")


def but(**changes: Any) -> State:
    return msgspec.structs.replace(WELL, **changes)


def ask(
    path: str, state: State = WELL, *, peer: Any = LOOPBACK, **options: Any
) -> tuple[int, dict[str, Any]]:
    routes = health_routes(lambda: state, ACCESS, clock=lambda: 160.25, now=lambda: 1e9, **options)
    response = call(routes[path], path, peer)
    return response.status, json.loads(response.body)


def call(route: Route, path: str, peer: Any, headers: dict[str, str] | None = None) -> Response:
    response = route(Request("GET", path, headers or {}, peer))
    assert isinstance(response, Response)
    return response


def test_health_has_exactly_the_fields_of_the_contract() -> None:
    assert ask("/health") == (
        200,
        {
            "status": "healthy",
            "service": "registrar",
            "server_id": "api-1",
            "timestamp": "2001-09-09T01:46:40.000+00:00",
            "version": "1.2.3",
            "uptime_seconds": 60.25,
            "redis_connected": True,
            "control_plane_connected": True,
        },
    )


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        (WELL, "healthy", 200),
        (but(control_plane_connected=False), "degraded", 200),
        (but(breaker="open"), "degraded", 200),
        (but(breaker="half_open"), "degraded", 200),
        (but(hold=Hold()), "degraded", 200),
        (but(unready=("the group is not made yet",)), "degraded", 200),
        (but(redis_connected=False), "unhealthy", 503),
        (but(redis_connected=False, hold=Hold(), breaker="open"), "unhealthy", 503),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/health/detailed", "/status"])
def test_only_redis_makes_a_service_unhealthy(path: str, state: State, status: str, code: int) -> None:
    got, body = ask(path, state)
    assert (got, body["status"]) == (code, status)


def test_details_are_the_same_and_the_figures() -> None:
    state = but(
        breaker="open",
        hold=Hold(),
        in_flight=4,
        figures=FIGURES,
        last_success=1e9,
        last_error="500 on usage",
    )
    summary = ask("/health", state)[1]
    _, details = ask("/health/detailed", state)
    assert details == ask("/status", state)[1]
    assert details == summary | {
        "breaker": "open",
        "hold": {"kind": "auth", "detail": "401 from the ControlPlane"},
        "in_flight": 4,
        "backlog": 5,
        "pending": 2,
        "dead": {"invalid": 1},
        "oldest_age_seconds": 3.5,
        "last_success": "2001-09-09T01:46:40.000+00:00",
        "last_error": "500 on usage",
    }


def test_figures_nobody_has_read_yet_are_null_and_not_zero() -> None:
    _, details = ask("/status")
    assert [details[name] for name in ("backlog", "pending", "dead", "oldest_age_seconds")] == [None] * 4


def test_details_and_metrics_want_credentials_and_the_plain_health_does_not() -> None:
    for path, code in {
        "/health": 200,
        "/healthz": 200,
        "/readyz": 200,
        "/status": 401,
        "/health/detailed": 401,
    }.items():
        assert ask(path, peer=STRANGER)[0] == code
    routes = metrics_routes(Metrics("registrar", "api-1", "eu", "queue:commands", "1"), ACCESS)
    for path in ("/metrics", "/metrics/json"):
        assert call(routes[path], path, STRANGER).status == 401
        assert call(routes[path], path, LOOPBACK).status == 200


def test_metrics_are_negotiated() -> None:
    routes = metrics_routes(Metrics("registrar", "api-1", "eu", "queue:commands", "1"), ACCESS)
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    assert call(routes["/metrics"], "/metrics", LOOPBACK).content_type.startswith("text/plain")
    assert call(routes["/metrics"], "/metrics", LOOPBACK, accept).body.endswith(b"# EOF\n")
    assert "dataplane_registered" in json.loads(call(routes["/metrics/json"], "/metrics/json", LOOPBACK).body)


@pytest.mark.parametrize("state", [WELL, but(redis_connected=False), but(hold=Hold(), breaker="open")])
def test_liveness_asks_for_nothing_but_an_answer(state: State) -> None:
    assert ask("/healthz", state) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("state", "reasons"),
    [
        (WELL, []),
        (but(control_plane_connected=False, breaker="open", hold=Hold()), []),
        (but(redis_connected=False), ["Redis is not reachable"]),
        (but(unready=("the group is not made yet",)), ["the group is not made yet"]),
        (but(redis_connected=False, unready=("no group",)), ["no group", "Redis is not reachable"]),
    ],
)
def test_readiness_is_redis_and_the_group_and_not_the_control_plane(state: State, reasons: list[str]) -> None:
    want = (503, {"status": "unready", "reasons": reasons}) if reasons else (200, {"status": "ready"})
    assert ask("/readyz", state) == want


@pytest.mark.parametrize(
    ("seen", "shown", "status"),
    [
        (ALL_WELL, ALL_WELL, "healthy"),
        ({}, {"registrar": "healthy"} | dict.fromkeys(SERVICES[1:], "missing"), "degraded"),
        (ALL_WELL | {"usage_forwarder": "degraded"}, ALL_WELL | {"usage_forwarder": "degraded"}, "degraded"),
        (
            ALL_WELL | {"quota_refresher": "unhealthy"},
            ALL_WELL | {"quota_refresher": "unhealthy"},
            "degraded",
        ),
        (ALL_WELL | {"registrar": "degraded"}, ALL_WELL, "healthy"),  # what it knows of itself is newer
        (ALL_WELL | {"someone else": "degraded"}, ALL_WELL, "healthy"),
    ],
)
def test_the_registrar_speaks_for_all_four(seen: dict[str, str], shown: dict[str, str], status: str) -> None:
    code, body = ask("/health", services=lambda: seen)
    assert (code, body["status"], body["services"]) == (200, status, shown)


def test_the_registrar_without_redis_is_unhealthy_whatever_it_remembers_of_the_others() -> None:
    code, body = ask("/health", but(redis_connected=False), services=lambda: ALL_WELL)
    assert (code, body["status"], body["services"]["registrar"]) == (503, "unhealthy", "unhealthy")


def test_each_service_listens_on_its_own_port() -> None:
    assert [port_of(8081, service) for service in SERVICES] == [8081, 8082, 8083, 8084]
    assert SERVICES == ("registrar", "usage_forwarder", "session_notifier", "quota_refresher")
    assert {port_of(0, service) for service in SERVICES} == {0}
