"""What the registrar's periodic calls share: the tick, and two lines where one of them fails alone.

A tick that fails is over: the next one comes at its time, there are no quick retries.
A failure concerns its own call alone; the other calls go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from common.control_plane.errors import BreakerOpen, Transient
from common.logs import Outage, get
from common.service import Running

_log = get("registrar")


async def until(*events: asyncio.Event, seconds: float | None = None) -> None:
    """Return when one of the events is set, or the time has passed."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def every(
    seconds: Callable[[], float],
    tick: Callable[[], Awaitable[object]],
    *,
    stopping: asyncio.Event,
    clock: Callable[[], float],
    when: tuple[asyncio.Event, ...] = (),
) -> None:
    """Tick while all of `when` are set, until stopping; `seconds` from the start of one tick to the next.

    Never raises: a tick that does is logged, and the next one comes all the same.
    """
    while not stopping.is_set():
        if missing := [event for event in when if not event.is_set()]:
            await until(stopping, missing[0])
            continue
        started_at = clock()
        try:
            await tick()
        except Exception:  # one tick that fails must not end the ticking
            _log.exception("tick.failed", tick=tick.__qualname__)
        await until(stopping, seconds=max(0.0, started_at + seconds() - clock()))


class CallOutage:
    """Two lines an outage of one call, when it is of this call alone.

    What says that nobody answers at all is the breaker's to tell, which tells it once for all calls.
    So a call without an answer is told of when another call has been answered since it failed before.
    """

    def __init__(self, call: str, running: Running) -> None:
        self._client = running.client
        self._outage = Outage(_log, f"{call}.failing", f"{call}.recovered", clock=running.clock)
        self._failed = False
        self._answered: float | None = None  # when any call was, as of the last failure

    def began(self, error: Exception) -> None:
        """The call failed."""
        answered = self._client.last_success
        others_are_answered = self._failed and answered != self._answered
        self._failed, self._answered = True, answered
        if others_are_answered or not isinstance(error, BreakerOpen | Transient):
            self._outage.began(error=str(error))

    def ended(self) -> None:
        """The call succeeded."""
        self._failed = False
        self._outage.ended()


def rfc3339(seconds: float) -> str:
    """Unix seconds as a UTC timestamp with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
