"""A stream's figures as of one instant: backlog, pending, dead, consumers, ledger. One round trip.

backlog = length - pending - dead (contract section 2); Redis's own lag turns nil in normal use and is never read.
"""

from __future__ import annotations

import time

import msgspec

from common import ledger
from common.redis_border import Scripts
from common.streams import Stream


class ConsumerFigures(msgspec.Struct, frozen=True):
    """One consumer of the live group; `idle_seconds` since Redis last heard of it."""

    name: str
    pending: int
    idle_seconds: float


class StreamFigures(msgspec.Struct, frozen=True):
    """One stream. Ages are in seconds, counts in entries; `dead` is by reason."""

    backlog: int = 0
    pending: int = 0
    dead: dict[str, int] = {}
    oldest_age_seconds: float | None = None
    consumers: list[ConsumerFigures] = []
    ledger: dict[str, int] = {}
    entries_added: int = 0
    length: int = 0
    imbalance: int = 0


async def read(scripts: Scripts, stream: Stream, now: float | None = None) -> StreamFigures:
    """Reads the figures; raises RedisFault. A missing stream or group reads as zeros."""
    keys = [stream.name, stream.ledger_key]
    length, added, pending, oldest, dead, consumers, books = await scripts.run(
        "figures", keys, [stream.group, stream.dead_group]
    )
    by_reason = {dead[i].decode(): dead[i + 1] for i in range(0, len(dead), 2)}
    counted = {books[i].decode(): int(books[i + 1]) for i in range(0, len(books), 2)}
    age = None
    if oldest:
        age = max(0.0, (time.time() if now is None else now) - int(oldest.split(b"-", 1)[0]) / 1000)
    return StreamFigures(
        backlog=length - pending - sum(by_reason.values()),
        pending=pending,
        dead=by_reason,
        oldest_age_seconds=age,
        consumers=[
            ConsumerFigures(consumers[i].decode(), consumers[i + 1], consumers[i + 2] / 1000)
            for i in range(0, len(consumers), 3)
        ],
        ledger=counted,
        entries_added=added,
        length=length,
        imbalance=ledger.imbalance(added, length, counted) if "base" in counted else 0,
    )
