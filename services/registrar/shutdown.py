"""The shutdown notice: the last thing the ControlPlane hears, said once, within what is left of the drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from common.control_plane.client import ControlPlaneClient
from common.control_plane.errors import ControlPlaneError
from common.logs import get
from common.redis_border import RedisFault
from common.service import Running
from common.turn import Turn
from registrar.periodic import rfc3339
from registrar.registration import Registration

REASON = "graceful stop"

_log = get("registrar")


class Farewell:
    """Keeps the registrar's turn until the last words: the notice, then the turn is given up.

    A registrar that stands by has nothing to say.
    """

    def __init__(self, running: Running, turn: Turn, registration: Registration) -> None:
        self._running, self._turn, self._registration = running, turn, registration
        self._keeping: asyncio.Task[object] | None = None

    async def keep_turn(self) -> None:
        """The child of the service's task group: asks for the turn and renews it, through the drain, too."""
        self._keeping = asyncio.current_task()
        await self._turn.run(self._running.redis_state.failed, self._running.redis_state.answered)

    async def say(self, seconds: float) -> None:
        """Takes `seconds` at most. Never raises."""
        if self._keeping is not None:
            self._keeping.cancel()  # or it would take the turn again as soon as it is free
        if not self._turn.held:
            return
        until = self._running.clock() + seconds
        if self._registration.done.is_set():
            await notify(self._running.client, REASON, seconds)
        try:
            async with asyncio.timeout(max(0.0, until - self._running.clock())):
                await self._turn.give_up()
        except (RedisFault, TimeoutError) as fault:  # it runs out by itself
            _log.warning("turn.not_given_up", error=str(fault) or "no answer in time")


async def notify(
    client: ControlPlaneClient, reason: str, seconds: float, now: Callable[[], float] = time.time
) -> bool:
    """Says that this server stops; False when it could not be said in `seconds`. Never raises."""
    try:
        async with asyncio.timeout(seconds):
            await client.shutdown({"reason": reason, "timestamp": rfc3339(now())})
    except (ControlPlaneError, TimeoutError) as error:
        _log.warning("shutdown.unannounced", error=str(error) or "no answer in time")
        return False
    _log.info("shutdown.announced", reason=reason)
    return True
