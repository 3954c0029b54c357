"""What the registrar's periodic calls share: the tick, and two lines an outage.

A tick that fails is over: the next one comes at its time, there are no quick retries.
A failure concerns its own call alone; the other calls go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from common.logs import Outage, get

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


def outage(call: str, clock: Callable[[], float]) -> Outage:
    """Two lines an outage of one call, whatever becomes of the others."""
    return Outage(_log, f"{call}.failing", f"{call}.recovered", clock=clock)


def rfc3339(seconds: float) -> str:
    """Unix seconds as a UTC timestamp with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
