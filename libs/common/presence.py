"""Presence: each service's figures in Redis, so that the registrar and the CLI can speak for all four.

Written every 5 s into `dataplane:<server>:presence`, one field a process; older than 15 s, it is of a process that
has gone.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
from redis.asyncio import Redis

from common.figures import StreamFigures
from common.redis_border import border
from common.streams import presence_key

WRITE_EVERY = 5.0
STALE_AFTER = 15.0


class Hold(msgspec.Struct, frozen=True):
    kind: str
    detail: str


class Counters(msgspec.Struct, frozen=True):
    """Since the start of the process."""

    usage_records_processed: int = 0
    control_plane_requests: int = 0
    failed_deliveries: int = 0


class Presence(msgspec.Struct, frozen=True):
    """One process as it last described itself; `at`, `last_success` in Unix seconds."""

    at: float
    service: str
    consumer: str
    pid: int
    version: str
    status: str
    uptime_seconds: float
    breaker: str
    hold: Hold | None
    in_flight: int
    redis_connected: bool
    control_plane_connected: bool
    counters: Counters
    queue_depth: int
    memory_usage_mb: float
    cpu_usage_percent: float
    last_success: float | None
    last_error: str | None
    stream: StreamFigures
    ready_seconds: float | None = None
    holds_turn: bool | None = None

    @property
    def field(self) -> str:
        return f"{self.service}/{self.consumer}"


_decode = msgspec.json.Decoder(Presence).decode


async def write(redis: Redis, server_id: str, presence: Presence) -> None:
    """Raises RedisFault."""
    with border():
        await redis.hset(presence_key(server_id), presence.field, msgspec.json.encode(presence))


async def withdraw(redis: Redis, server_id: str, field: str) -> None:
    """Removes a process that has stopped in good order; raises RedisFault."""
    with border():
        await redis.hdel(presence_key(server_id), field)


async def read(redis: Redis, server_id: str, now: float) -> list[Presence]:
    """The processes heard of within the last 15 s, by service and consumer; raises RedisFault."""
    with border():
        rows = cast(dict[bytes, bytes], await redis.hgetall(presence_key(server_id)))
    found = []
    for row in rows.values():
        try:
            presence = _decode(row)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # another release's row: it goes stale by itself
        if now - presence.at < STALE_AFTER:
            found.append(presence)
    return sorted(found, key=lambda p: p.field)


async def forget_stale(redis: Redis, server_id: str, now: float) -> int:
    """Removes processes not heard of for an hour; raises RedisFault."""
    key = presence_key(server_id)
    with border():
        rows = cast(dict[bytes, bytes], await redis.hgetall(key))
        stale = [field for field, row in rows.items() if now - _written_at(row) > 3600]
        if stale:
            await redis.hdel(key, *stale)
    return len(stale)


def _written_at(row: bytes) -> float:
    try:
        value: Any = msgspec.json.decode(row)
        return float(value["at"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return 0.0
