"""Laws under SIGSTOP: a process that slept through its turn changes nothing when it wakes."""

from __future__ import annotations

import asyncio
import json

from redis.asyncio import Redis

from sandbox.control_plane import ControlPlane
from tests.crash.conftest import VISIBILITY
from tests.services import STREAMS, ServiceProcess, Services, drained, figures_of, meanwhile
from tests.support import eventually

STREAM = STREAMS["session_notifier"]


async def active(redis: Redis, notifiers: list[ServiceProcess]) -> ServiceProcess | None:
    """The notifier that has the turn."""
    holder = await redis.get(STREAM.turn_key)
    return next((one for one in notifiers if holder and one.consumer == holder.decode()), None)


async def sessions_without_end(redis: Redis, enough: asyncio.Event) -> int:
    """Writes sessions that complete soon after they have started; returns how many."""
    started: range = range(0)
    while started or not enough.is_set():
        starting = range(started.stop, started.stop + (0 if enough.is_set() else 10))
        async with redis.pipeline(transaction=False) as pipe:
            for event_type, numbers in (("complete", started), ("start", starting)):
                for number in numbers:
                    event = {"api_session_id": f"session-{number}", "customer_id": "customer-1"}
                    event |= {"event_type": event_type, "timestamp": "2026-01-31T08:00:00Z"}
                    pipe.xadd(STREAM.name, {"data": json.dumps(event)})
            await pipe.execute()
        started = starting
        await asyncio.sleep(0.06)
    return started.stop


async def test_an_active_notifier_that_sleeps_longer_than_its_turn_inverts_no_session(
    services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    # They are slower than the traffic: whoever wakes finds new entries to read, and nobody else in a hurry.
    slow: dict[str, float] = {"control_plane__max_in_flight": 8, "streams__read_count": 10}
    notifiers = [services.start("session_notifier", **slow) for _ in range(2)]
    await asyncio.gather(*(notifier.ready() for notifier in notifiers))
    control_plane.fault("latency", "start", seconds=0.1)
    enough = asyncio.Event()
    async with meanwhile(sessions_without_end(redis, enough)) as traffic:
        for _ in range(2):  # they take turns in sleeping
            holder = await eventually(lambda: active(redis, notifiers))
            (other,) = (one for one in notifiers if one is not holder)
            await control_plane.until_arrived(control_plane.requests["*"] + 50)
            holder.pause()
            await eventually(lambda: active(redis, [other]), within=3 * VISIBILITY)  # noqa: B023
            await control_plane.until_arrived(control_plane.requests["*"] + 50)
            holder.resume()
            await eventually(lambda: holder.lines("turn.lost"))  # noqa: B023
        await control_plane.until_arrived(control_plane.requests["*"] + 50)
        enough.set()
        control_plane.clear_faults()
        sessions = await traffic
    await eventually(lambda: drained(redis, "session_notifier"))
    stats = control_plane.stats()
    assert stats.order_violations == 0
    assert (stats.recorded["start"], stats.recorded["complete"]) == (sessions, sessions)
    figures = await figures_of(redis, "session_notifier")
    assert (figures.dead, figures.imbalance) == ({}, 0)
