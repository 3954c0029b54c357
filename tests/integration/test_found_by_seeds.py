"""What seeds of the simulation have found in the core, each as a law on real servers."""

from __future__ import annotations

import asyncio
from typing import Any

import redis as blocking
from redis.asyncio import Redis

from common.entries import Entry
from common.outcomes import Cause, Retry
from common.redis_border import Away
from tests.integration.workbench import (
    ORDERED,
    STREAM,
    Consuming,
    Told,
    add,
    consuming,
    lay,
    make_groups,
    settled,
    state,
)
from tests.support import RedisServer, eventually

LATER = Retry(Cause.TRANSIENT, "not now", after=3600.0)


class Reads(Told):
    """Notes the delivery count that stands in Redis while an entry is decoded."""

    def __init__(self, port: int) -> None:
        super().__init__(ordered=True)
        self.counts: dict[str, int] = {}
        self._redis = blocking.Redis(port=port, protocol=2)

    def decode(self, entry: Entry, data: bytes | None) -> str:
        rows: Any = self._redis.xpending_range(ORDERED.name, ORDERED.group, entry.id, entry.id, 1)
        self.counts[entry.id.decode()] = rows[0]["times_delivered"]
        return super().decode(entry, data)


async def test_a_suspect_counts_as_delivered_alone_while_it_is_decoded(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": ("dead", 4)}, stream=ORDERED)
    handler = Reads(redis_server.port)
    async with consuming(redis_server.port, handler, stream=ORDERED):
        await settled(redis, 2, ORDERED)
    assert handler.counts == {"1-0": 2, "2-0": 5}  # the suspect: one more than it has died


async def test_what_has_killed_often_enough_is_not_even_decoded(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 8), "2-0": ("dead", 1)}, stream=ORDERED)
    handler = Reads(redis_server.port)
    async with consuming(redis_server.port, handler, stream=ORDERED):
        await settled(redis, 1, ORDERED)
    assert list(handler.counts) == ["2-0"]


async def test_a_lost_reply_while_a_suspect_is_read_counts_no_death(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 3)}, data=b"suspect", stream=ORDERED)
    handler = Told(ordered=True)
    handler.slow = {"suspect": asyncio.Event()}

    def loses(me: Consuming) -> None:
        me.scripts.lose["renew"] = 2

    async with consuming(redis_server.port, handler, stream=ORDERED, before=loses, ready=False):
        await handler.until_begun(1)
        assert (await state(redis, ORDERED)).live == {"1-0": ("me", 4)}
        handler.let_go()
        await settled(redis, 1, ORDERED)


async def test_what_is_known_of_one_suspect_is_written_before_the_next_is_delivered(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 3), "2-0": ("dead", 3)})
    handler = Told()
    handler.answers = {"session": [LATER]}

    def hold_the_second(entries: list[Entry]) -> None:
        if entries[0].id == b"2-0":
            handler.hold_all()

    handler.on_request = hold_the_second
    async with consuming(redis_server.port, handler, visibility_timeout=60.0):
        await handler.until_begun(2)
        assert (await state(redis)).live == {"1-0": ("me", 1), "2-0": ("me", 4)}
        handler.let_go()
        await settled(redis, 1)


async def test_after_a_group_was_re_made_behind_its_back_a_session_comes_again_in_order(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told(ordered=True)
    handler.answers = {"s": [LATER]}
    slow: dict[str, Any] = {"claim_interval": 60.0, "doorbell": 5.0, "visibility_timeout": 60.0}
    async with consuming(redis_server.port, handler, stream=ORDERED, **slow) as me:
        early = await add(redis, "s", "s", "s", stream=ORDERED)
        await eventually(lambda: me.consumer.hand.parked == 3)
        await redis.xgroup_destroy(ORDERED.name, ORDERED.group)
        await make_groups(redis, ORDERED)  # as a process does that has just started
        await me.consumer._lease.renew([*me.consumer.hand][:2])
        late = await add(redis, "s", stream=ORDERED)
        await settled(redis, 4, ORDERED)
    assert handler.delivered_ids == [early[0], *early, *late]


async def test_while_suspects_are_read_one_by_one_the_others_keep_their_lease(
    redis: Redis, redis_server: RedisServer
) -> None:
    ids = [f"{n}-0" for n in range(1, 13)]
    await lay(redis, live=dict.fromkeys(ids, ("dead", 3)), stream=ORDERED)
    handler = Told(ordered=True)

    def fetches_slowly(me: Consuming) -> None:
        run = me.scripts.run

        async def slowly(name: str, keys: Any, args: Any) -> Any:
            if name == "fetch":
                await asyncio.sleep(0.05)
            return await run(name, keys, args)

        me.scripts.run = slowly  # type: ignore[method-assign]

    options: dict[str, Any] = {"visibility_timeout": 0.3, "claim_interval": 0.05}
    async with consuming(redis_server.port, handler, stream=ORDERED, before=fetches_slowly, **options) as me:
        await settled(redis, len(ids), ORDERED)
    assert me.tally.claimed == len(ids)
    assert handler.delivered_ids == ids


async def test_in_order_a_read_that_was_given_up_and_arrives_late_delivers_nothing(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told(ordered=True)
    under_way: list[asyncio.Task[Any]] = []
    recovered = asyncio.Event()

    def delays_the_first_read(me: Consuming) -> None:
        run = me.scripts.run

        async def after_the_recovery(*call: Any) -> Any:
            await recovered.wait()
            return await run(*call)

        async def slowly(name: str, keys: Any, args: Any) -> Any:
            if name == "read" and not under_way:
                under_way.append(asyncio.create_task(after_the_recovery(name, keys, args)))
                raise Away("no answer in time")
            if name == "read":
                recovered.set()
                assert await under_way[0] == [-1]
            return await run(name, keys, args)

        me.scripts.run = slowly  # type: ignore[method-assign]

    ids = await add(redis, "s", "s", stream=ORDERED)
    async with consuming(redis_server.port, handler, stream=ORDERED, before=delays_the_first_read) as me:
        await settled(redis, 2, ORDERED)
        assert me.consumer.turn is not None
        assert await redis.get(ORDERED.turn_key) == me.consumer.turn.token.encode() == b"me/1"
        await me.stop()
    assert handler.delivered_ids == ids
    assert await redis.get(ORDERED.turn_key) is None


async def test_dead_letters_outlive_their_twin(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler):
        await add(redis, "?", "good")
        await settled(redis, 1)
        await eventually(lambda: _dead(redis), every=0.005)
        before = (await state(redis)).dead
        await redis.xgroup_destroy(STREAM.name, STREAM.dead_group)
        await add(redis, "good")
        await settled(redis, 2)
        assert (await state(redis)).dead == before


async def _dead(redis: Redis) -> Any:
    return (await state(redis)).dead
