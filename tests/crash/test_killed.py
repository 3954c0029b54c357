"""Laws under SIGKILL: whatever dies, whenever, the books of producers, ControlPlane and Redis agree in the end."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from redis.asyncio import Redis

from sandbox.audio_api_server import AudioAPIServer, Traffic
from sandbox.control_plane import ControlPlane
from tests.services import STREAMS, Services, drained, figures_of, meanwhile, reckon
from tests.support import SERVERS, RedisServer, connect, eventually

DRAIN_SECONDS = 20
"""What is left when the killing ends, suspects delivered one by one included, is gone within this time."""

TRAFFIC = Traffic(rate=250, sessions=40, malformed=0.01, seed=4)


def let_the_network_be_bad(control_plane: ControlPlane) -> None:
    """Answers take a while, and some are lost: a kill always meets requests in every state."""
    control_plane.fault("latency", seconds=0.02)
    control_plane.fault("drop_before", share=0.01)
    control_plane.fault("drop_after", share=0.02)
    control_plane.fault("status", status=503, share=0.02)
    control_plane.fault("html_200", share=0.01, stored=True)


async def assert_that_all_adds_up(
    audio_api_server: AudioAPIServer, control_plane: ControlPlane, redis: Redis
) -> None:
    """Nothing lost or billed twice, no other key or content at a repetition, no inversion, no second grant."""
    control_plane.clear_faults()
    await eventually(lambda: drained(redis), within=DRAIN_SECONDS, every=0.1)
    verdict = await reckon(redis, audio_api_server.book.rows(), control_plane.book())
    assert verdict.ok, verdict.render()
    assert verdict.settled
    assert set(verdict.dead()) == {"invalid"}, verdict.render()
    assert control_plane.stats().order_violations == 0
    for service in STREAMS:
        figures = await figures_of(redis, service)
        assert figures.imbalance == 0, (service, figures)
        assert figures.ledger.get("vanished", 0) == 0


async def test_replicas_killed_at_random_under_load_lose_nothing_and_repeat_nothing_but_the_same(
    services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    random = Random(2)
    replicas = [services.start(name) for name in STREAMS for _ in range(2)]
    await asyncio.gather(*(replica.ready() for replica in replicas))
    let_the_network_be_bad(control_plane)
    audio_api_server = AudioAPIServer(redis, TRAFFIC)
    kills = 0
    async with meanwhile(audio_api_server.run(10)) as traffic:
        while not traffic.done():
            goal = control_plane.requests["*"] + random.randint(20, 120)
            arrived = asyncio.create_task(control_plane.until_arrived(goal, timeout=30))
            await asyncio.wait({arrived, traffic}, return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                arrived.cancel()  # the traffic has ended
                break
            random.choice(replicas).restart()
            kills += 1
        await traffic
    assert kills >= 10
    await assert_that_all_adds_up(audio_api_server, control_plane, redis)
    assert control_plane.stats().duplicates  # some of the killed had delivered what they could not settle


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
async def test_a_redis_killed_under_load_loses_nothing_that_it_had_accepted(
    services: Services, control_plane: ControlPlane, redis_server: RedisServer
) -> None:
    replicas = [services.start(name) for name in STREAMS]
    await asyncio.gather(*(replica.ready() for replica in replicas))
    let_the_network_be_bad(control_plane)
    async with connect(redis_server.port) as redis:
        audio_api_server = AudioAPIServer(redis, TRAFFIC)
        async with meanwhile(audio_api_server.run(3)) as traffic:
            for recorded in (150, 400):
                await control_plane.until(lambda: control_plane.ledger.recorded.total() >= recorded)  # noqa: B023
                await asyncio.to_thread(redis_server.restart)
            await traffic
        await assert_that_all_adds_up(audio_api_server, control_plane, redis)
    for replica in replicas:
        assert replica.running
        assert len(replica.lines("redis.unreachable")) == len(replica.lines("redis.recovered")) <= 2
