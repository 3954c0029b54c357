"""What a service says about itself over HTTP: the routes of contract section 7, and where each one listens.

A service hands over its `State` when it is asked; everything here is derived from it, nothing waits.
Only Redis makes a service unhealthy: without it nothing can be read or settled.
An outage of the ControlPlane degrades it, and costs no readiness: entries wait in their streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from common.endpoints import JSON, Access, Request, Response, Route, json_response
from common.metrics import Figures, Metrics

SERVICES = ("registrar", "usage_forwarder", "session_notifier", "quota_refresher")
"""In the order of their ports: service k listens on the configured port + k."""

HEALTHY, DEGRADED, UNHEALTHY, MISSING = "healthy", "degraded", "unhealthy", "missing"


class Hold(Protocol):
    """Why a service sends nothing, as `common.control_plane.gate` has it."""

    @property
    def kind(self) -> str: ...
    @property
    def detail(self) -> str: ...


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A service at this moment, as it sees itself."""

    service: str
    server_id: str
    version: str
    started_at: float  # on the monotonic clock
    redis_connected: bool
    control_plane_connected: bool
    unready: tuple[str, ...] = ()  # why the stream cannot be consumed: the group is not made yet, …
    hold: Hold | None = None
    breaker: str = "closed"  # closed, half_open, open
    in_flight: int = 0
    figures: Figures | None = None  # None until the stream was read once
    last_success: float | None = None  # Unix seconds
    last_error: str | None = None

    @property
    def status(self) -> str:
        if not self.redis_connected:
            return UNHEALTHY
        if self.unready or self.hold or self.breaker != "closed" or not self.control_plane_connected:
            return DEGRADED
        return HEALTHY


def port_of(base: int, service: str) -> int:
    """The port of a service, counted from the configured one; 0 gives each a free port."""
    return base + SERVICES.index(service) if base else 0


def health_routes(
    state: Callable[[], State],
    access: Access,
    *,
    services: Callable[[], Mapping[str, str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
) -> dict[str, Route]:
    """The routes of the health port.

    `services`, the registrar's, gives the status of every service that showed a sign of life; with it the
    answer speaks for all four, and one that is missing or not healthy degrades the whole.
    """

    def health(_: Request) -> Response:
        return _answer(_summary(state(), services, clock(), now()))

    def detailed(_: Request) -> Response:
        current = state()
        return _answer(_summary(current, services, clock(), now()) | _details(current))

    def ready(_: Request) -> Response:
        current = state()
        reasons = [*current.unready]
        if not current.redis_connected:
            reasons.append("Redis is not reachable")
        if reasons:
            return json_response({"status": "unready", "reasons": reasons}, 503)
        return json_response({"status": "ready"})

    def alive(_: Request) -> Response:
        return json_response({"status": "ok"})

    guarded = access.guard(detailed)
    return {
        "/health": health,
        "/health/detailed": guarded,
        "/status": guarded,
        "/healthz": alive,
        "/readyz": ready,
    }


def metrics_routes(metrics: Metrics, access: Access) -> dict[str, Route]:
    """The routes of the metrics port."""

    def exposition(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, content_type=content_type)

    def figures(_: Request) -> Response:
        return Response(metrics.as_json(), content_type=JSON)

    return {"/metrics": access.guard(exposition), "/metrics/json": access.guard(figures)}


def _answer(content: dict[str, Any]) -> Response:
    return json_response(content, 503 if content["status"] == UNHEALTHY else 200)


def _summary(
    state: State, services: Callable[[], Mapping[str, str]] | None, clock: float, now: float
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "status": state.status,
        "service": state.service,
        "server_id": state.server_id,
        "timestamp": _time(now),
        "version": state.version,
        "uptime_seconds": round(max(0.0, clock - state.started_at), 3),
        "redis_connected": state.redis_connected,
        "control_plane_connected": state.control_plane_connected,
    }
    if services is not None:
        seen = {**services(), state.service: state.status}
        summary["services"] = {name: seen.get(name, MISSING) for name in SERVICES}
        if state.status == HEALTHY and any(status != HEALTHY for status in summary["services"].values()):
            summary["status"] = DEGRADED
    return summary


def _details(state: State) -> dict[str, Any]:
    figures = state.figures
    return {
        "breaker": state.breaker,
        "hold": {"kind": state.hold.kind, "detail": state.hold.detail} if state.hold else None,
        "in_flight": state.in_flight,
        "backlog": figures.backlog if figures else None,
        "pending": figures.pending if figures else None,
        "dead": dict(figures.dead) if figures else None,
        "oldest_age_seconds": figures.oldest_age_seconds if figures else None,
        "last_success": _time(state.last_success),
        "last_error": state.last_error,
    }


def _time(seconds: float | None) -> str | None:
    """Unix seconds as RFC 3339."""
    return (
        None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    )
