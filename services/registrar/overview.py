"""What the four services say of themselves, put together: for the heartbeat, for /health, for two commands.

Every process describes itself in the presence hash; here the hash is read every few seconds and added up.
Counters do not go backwards when a service restarts: what a process had counted when it was last heard of
stays in the sum. They begin anew with the registrar itself, as it then registers anew, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis

from common import presence
from common.health import DEGRADED, HEALTHY, MISSING, SERVICES, UNHEALTHY
from common.presence import STALE_AFTER, WRITE_EVERY, Counters, Presence
from common.redis_border import RedisFault
from common.service import Running
from registrar.periodic import every

MAX_PROCESSES = 1000
"""Processes whose counters are told apart; of those heard of longest ago, only the sum is kept."""

_WORSE = (HEALTHY, DEGRADED, UNHEALTHY, MISSING)


def services_status(presences: Iterable[Presence]) -> dict[str, str]:
    """Each of the four with its status: the worst of its processes, `missing` when none was heard of."""
    found: dict[str, list[str]] = {service: [] for service in SERVICES}
    for one in presences:
        if one.service in found:
            found[one.service].append(_status(one))
    return {service: max(seen, key=_WORSE.index, default=MISSING) for service, seen in found.items()}


def overall(statuses: Iterable[str]) -> str:
    """`healthy` when all are, else `degraded`."""
    return HEALTHY if all(status == HEALTHY for status in statuses) else DEGRADED


def _status(one: Presence) -> str:
    if not one.redis_connected or one.status not in _WORSE:
        return UNHEALTHY
    impeded = one.hold is not None or one.breaker != "closed"
    return max(one.status, DEGRADED if impeded else HEALTHY, key=_WORSE.index)


class Figures(msgspec.Struct, frozen=True):
    """The heartbeat's metrics, of all processes together."""

    usage_records_processed: int
    control_plane_requests: int
    redis_queue_depth: int
    failed_deliveries: int
    memory_usage_mb: float
    cpu_usage_percent: float


class Sums:
    """Adds up the counters of all processes, also of those that have gone."""

    def __init__(self) -> None:
        self._counted: dict[str, Counters] = {}  # by process, the last one heard of at the end
        self._forgotten = Counters()

    def observe(self, presences: Iterable[Presence]) -> None:
        """Takes note of what is heard of now. A process that was silent for a while goes on where it was."""
        for one in presences:
            self._counted.pop(one.field, None)
            self._counted[one.field] = one.counters
        while len(self._counted) > MAX_PROCESSES:
            self._forgotten = _add(self._forgotten, self._counted.pop(next(iter(self._counted))))

    @property
    def total(self) -> Counters:
        total = self._forgotten
        for counters in self._counted.values():
            total = _add(total, counters)
        return total


def _add(one: Counters, other: Counters) -> Counters:
    both = zip(msgspec.structs.astuple(one), msgspec.structs.astuple(other), strict=True)
    return Counters(*(a + b for a, b in both))


class Overview:
    """The four services as they were last heard of."""

    def __init__(self, redis: Redis, server_id: str, now: Callable[[], float] = time.time) -> None:
        self._redis, self._server_id, self._now = redis, server_id, now
        self._presences: Sequence[Presence] = ()
        self._sums = Sums()

    async def run(self, running: Running) -> None:
        """The child of the service's task group: ends when the service stops, never raises."""
        await every(lambda: WRITE_EVERY, self.look, stopping=running.stopping, clock=running.clock)

    async def look(self) -> None:
        """Reads the presence hash; while Redis is away, what was heard before goes stale by itself."""
        try:
            self.heard(await presence.read(self._redis, self._server_id, self._now()))
        except RedisFault:
            return

    def heard(self, presences: Sequence[Presence]) -> None:
        self._presences = presences
        self._sums.observe(presences)

    @property
    def presences(self) -> list[Presence]:
        """The processes heard of lately."""
        now = self._now()
        return [one for one in self._presences if now - one.at < STALE_AFTER]

    def services(self) -> dict[str, str]:
        return services_status(self.presences)

    @property
    def well(self) -> bool:
        """Whether all four are there and healthy."""
        return overall(self.services().values()) == HEALTHY

    def figures(self) -> Figures:
        present, total = self.presences, self._sums.total
        depths = {one.service: one.queue_depth for one in sorted(present, key=lambda one: one.at)}
        return Figures(
            usage_records_processed=total.usage_records_processed,
            control_plane_requests=total.control_plane_requests,
            redis_queue_depth=sum(depths.values()),  # replicas share a stream: the last word of each service
            failed_deliveries=total.failed_deliveries,
            memory_usage_mb=round(sum(one.memory_usage_mb for one in present), 1),
            cpu_usage_percent=round(sum(one.cpu_usage_percent for one in present), 1),
        )

    def heartbeat(self) -> dict[str, Any]:
        """The body of a heartbeat: `online` when all four are there and well, else `degraded`."""
        return {
            "status": "online" if self.well else "degraded",
            "metrics": msgspec.to_builtins(self.figures()),
        }
