"""Laws of the poisonous entry: it dies after `max_deliveries` deaths alone, and takes no neighbour with it."""

from __future__ import annotations

import asyncio
import json

import pytest
from redis.asyncio import Redis

from common.entries import SUSPECT
from sandbox.control_plane import ControlPlane
from tests.crash.test_stopped import MESSAGES, add
from tests.services import STREAMS, Services, drained, figures_of, where_is
from tests.support import eventually

MAX_DELIVERIES = 2
POISON = "poison"


@pytest.mark.parametrize("service", STREAMS)
async def test_only_the_entry_whose_delivery_kills_the_process_dies_of_it(
    service: str, services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    stream = STREAMS[service]
    endpoint, kind, _ = MESSAGES[service]
    replicas = [services.start(service, streams__max_deliveries=MAX_DELIVERIES) for _ in range(2)]
    await asyncio.gather(*(replica.ready() for replica in replicas))
    neighbours = [f"neighbour-{n}" for n in range(8)]
    control_plane.fault("hang", endpoint, sessions=[POISON])
    slow = control_plane.fault("latency", endpoint, seconds=1.0, sessions=neighbours)
    await add(redis, service, [*neighbours[:4], POISON, *neighbours[4:]])

    def deliveries_of(session: str) -> int:
        return sum(arrival.session_id == session for arrival in control_plane.ledger.arrivals())

    async def owner() -> str:
        """Who has the poisonous entry."""
        (entry_id,) = [
            entry
            for entry, fields in await redis.xrange(stream.name)
            if json.loads(fields[b"data"])["api_session_id"] == POISON
        ]
        (pending,) = await redis.xpending_range(stream.name, stream.group, entry_id, entry_id, 1)
        return str(pending["consumer"].decode())

    deaths = 0
    while deaths < SUSPECT - 1 + MAX_DELIVERIES:
        await control_plane.until(lambda: deliveries_of(POISON) > deaths)  # noqa: B023
        if deaths < SUSPECT - 1:  # its neighbours are under way too, and die with it
            await control_plane.until(lambda: deliveries_of(neighbours[-1]) > deaths)  # noqa: B023
        victim = await owner()
        next(
            replica for replica in replicas if replica.lines("service.ready") and replica.consumer == victim
        ).restart()
        deaths += 1
        if deaths == SUSPECT - 1:
            control_plane.faults.drop(slow)
    await eventually(lambda: drained(redis, service))

    assert (await figures_of(redis, service)).dead == {"poison": 1}
    assert deliveries_of(POISON) == deaths
    assert control_plane.stats().recorded[kind] == len(neighbours)
    ((entry_id, document),) = (await redis.hgetall(stream.dead_key)).items()
    assert json.loads(document)["reason"] == "poison"
    assert await where_is(redis, service, entry_id) == "dead: poison"
