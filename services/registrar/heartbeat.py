"""Heartbeat: the ControlPlane hears every `heartbeat_interval` how the four services are, and what they did.

A 404 means that the ControlPlane has forgotten us: we register again.
While the breaker is not closed, the heartbeat is the first to probe; the other periodic calls wait for it.
"""

from __future__ import annotations

import asyncio

from common.control_plane.errors import BreakerOpen, ControlPlaneError, NotFound
from common.presence import WRITE_EVERY
from common.service import Running
from common.turn import Turn
from registrar.overview import Overview
from registrar.periodic import CallOutage, every, until
from registrar.registration import Registration

LOOK_EVERY = 0.5
"""Seconds between two looks for the services that are still starting."""


class Heartbeat:
    """Beats while we have the turn and are registered."""

    def __init__(self, running: Running, turn: Turn, registration: Registration, overview: Overview) -> None:
        self._running, self._turn = running, turn
        self._registration, self._overview = registration, overview
        self._outage = CallOutage("heartbeat", running)
        self._tried = asyncio.Event()

    async def run(self) -> None:
        """The child of the service's task group: ends when the service stops, never raises."""
        running, ready = self._running, (self._turn.taken, self._registration.done)
        interval = running.config.monitoring.heartbeat_interval
        await until(running.stopping, self._registration.done)
        await self._all_well(min(2 * WRITE_EVERY, interval))
        await every(lambda: interval, self.beat, stopping=running.stopping, clock=running.clock, when=ready)

    async def beat(self) -> None:
        """One heartbeat. Where the breaker refuses it, it waits for the breaker's pause and probes."""
        await self._overview.look()
        try:
            try:
                await self._running.client.heartbeat(self._overview.heartbeat())
            except BreakerOpen as closed:
                await until(self._running.stopping, seconds=closed.retry_after)
                await self._running.client.heartbeat(self._overview.heartbeat())
        except NotFound as error:
            self._outage.began(error)
            self._registration.lost()
        except ControlPlaneError as error:
            self._outage.began(error)
        else:
            self._outage.ended()
            self._registration.confirmed()
        finally:
            self._tried.set()
            self._tried = asyncio.Event()

    async def first(self) -> None:
        """Returns when another periodic call may go: at once, or after the next beat has probed."""
        if self._running.gate.breaker.state != "closed":
            interval = self._running.config.monitoring.heartbeat_interval
            await until(self._running.stopping, self._tried, seconds=interval)

    async def _all_well(self, seconds: float) -> None:
        """Gives services that start together the time to say so: the first heartbeat is to be true, too."""
        until_at = self._running.clock() + seconds
        while not self._running.stopping.is_set() and self._running.clock() < until_at:
            await self._overview.look()
            if self._overview.well:
                return
            await until(self._running.stopping, seconds=LOOK_EVERY)
