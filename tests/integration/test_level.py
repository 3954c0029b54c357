"""The slow start as the loop does it: never more in flight than the level, and all slots once it has risen."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from common.concurrency import START
from common.control_plane.breaker import FAILURES
from tests.integration.workbench import Told, add, consuming, make_groups, new_gate, settled
from tests.support import RedisServer

MOST = 64


async def test_all_slots_are_used_once_the_level_has_risen(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler, max_in_flight=MOST):
        await add(redis, *(f"session-{n}" for n in range(MOST)))
        await handler.until_begun(MOST)
        assert handler.in_flight == MOST
        handler.let_go()
        await settled(redis, MOST)


async def test_after_an_outage_not_all_slots_start_at_once(redis: Redis, redis_server: RedisServer) -> None:
    handler, gate = Told(), new_gate()
    handler.gate = gate
    handler.slow["held"] = asyncio.Event()
    for _ in range(FAILURES):
        ticket = gate.enter()
        assert ticket is not None
        gate.failed(ticket, "connection", "refused")
    await make_groups(redis)
    await add(redis, "probe", *["held"] * MOST)
    async with consuming(redis_server.port, handler, gate=gate, max_in_flight=MOST) as me:
        seen: list[tuple[int, int]] = []
        level = me.consumer.delivery.level
        handler.on_request = lambda entries: seen.append((handler.in_flight, level.limit))
        await handler.until(lambda: handler.in_flight == MOST)
        assert all(in_flight <= limit for in_flight, limit in seen)
        assert START <= seen[0][1] < MOST
        handler.let_go()
        await settled(redis, MOST + 1)
