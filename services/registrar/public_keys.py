"""The ControlPlane's key set: fetched at start-up and every five minutes, kept in Redis for others.

What is in Redis is for the AudioAPIServer to read.
It is never read back, or who can write to Redis could sign commands.
It goes when it is as old as a key set may get.
"""

from __future__ import annotations

from typing import Any

from common import signing
from common.control_plane.errors import ControlPlaneError
from common.logs import get
from common.redis_border import RedisFault, border
from common.service import Running
from common.signing import REFETCH_SECONDS, REFRESH_SECONDS, TRUST_SECONDS
from common.streams import PUBLIC_KEYS
from common.turn import Turn
from registrar.heartbeat import Heartbeat
from registrar.periodic import CallOutage, every

_log = get("registrar")


class PublicKeys:
    """Fetches the key set, whoever asks for it, and publishes every one it gets."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._outage = CallOutage("public_keys", running)
        self._fresh = False
        self.keys = signing.KeySet(self._fetch, clock=running.clock)

    async def run(self, turn: Turn, heartbeat: Heartbeat) -> None:
        """The child of the service's task group: ends when the service stops, never raises."""

        async def refresh() -> None:
            await heartbeat.first()
            await self.refresh()

        running = self._running
        await every(
            lambda: REFRESH_SECONDS if self._fresh else REFETCH_SECONDS,
            refresh,
            stopping=running.stopping,
            clock=running.clock,
            when=(turn.taken,),
        )

    async def refresh(self) -> None:
        """One fetch; a failure leaves the old key set, and the next attempt comes sooner."""
        try:
            await self.keys.refresh()
        except (ControlPlaneError, ValueError) as error:
            self._outage.began(error)
            self._fresh = False
        else:
            self._outage.ended()
            self._fresh = True

    async def _fetch(self) -> dict[str, Any]:
        document = await self._running.client.public_keys()
        published = signing.published(document)
        try:
            with border():
                await self._running.redis.set(PUBLIC_KEYS, published, ex=int(TRUST_SECONDS))
        except RedisFault as fault:  # ours is good all the same; the next fetch publishes again
            _log.warning("public_keys.unpublished", error=str(fault))
        return document
