"""Whether Redis is there, for the whole process: how long to wait after a fault, and two log lines an outage.

The pause grows with the outage, from 0.1 s to 5 s, so every task that asks gets the same answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis

from common.logs import Outage, get
from common.redis_border import Demoted, Denied, Full, GroupGone, RedisFault

SHORTEST = 0.1
LONGEST = 5.0

FULL_AGAIN_AFTER = 1.0
FULL_SAID_EVERY = 60.0
"""Seconds between two log lines about a memory limit: reads succeed between its refusals, so no line could end it."""


class RedisState:
    """What faults of Redis mean to this process; `fatal` is told of those that only an operator can end."""

    def __init__(
        self,
        redis: Redis,
        clock: Callable[[], float],
        fatal: Callable[[str], None],
        connected: Callable[[bool], None],
    ) -> None:
        self.connected = False
        self.last_fault: str | None = None
        self._redis = redis
        self._clock = clock
        self._fatal = fatal
        self._tell = connected
        self._log = get("redis")
        self._outage = Outage(self._log, "redis.unreachable", "redis.recovered", clock=clock)
        self._since: float | None = None
        self._full_said_at = float("-inf")
        self._dropping: asyncio.Task[None] | None = None

    def answered(self) -> None:
        """Redis did what was asked: an outage is over."""
        if not self.connected:
            self.connected = True
            self._since = None
            self._tell(True)
            self._outage.ended()

    def failed(self, fault: RedisFault) -> float:
        """Notes a fault and returns the seconds to wait before the next attempt."""
        self.last_fault = str(fault)
        if isinstance(fault, Denied):
            self._fatal(str(fault))
        if isinstance(fault, GroupGone):
            self._log.error("redis.group_gone", error=str(fault))
            return SHORTEST
        now = self._clock()
        if isinstance(fault, Full):  # it is there, and what it holds can still be drained
            if now - self._full_said_at >= FULL_SAID_EVERY:
                self._full_said_at = now
                self._log.error("redis.full", error=str(fault))
            return FULL_AGAIN_AFTER
        if self._since is None:
            self._since = now
        self.connected = False
        self._tell(False)
        self._outage.began(error=str(fault))
        if isinstance(fault, Demoted) and (self._dropping is None or self._dropping.done()):
            self._dropping = asyncio.create_task(self._redis.connection_pool.disconnect())
        return min(LONGEST, max(SHORTEST, (now - self._since) / 2))
