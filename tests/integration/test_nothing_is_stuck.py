"""Whatever happens to an entry in hand, something happens next: nothing waits for what will never come."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from common.outcomes import Cause, Dead, Reason, Retry
from common.streams import HANDOVER, Stream
from tests.integration.workbench import (
    ORDERED,
    STREAM,
    Consuming,
    Told,
    add,
    consuming,
    imbalance,
    lay,
    new_gate,
    out_of_memory,
    pending_of,
    settled,
    state,
)
from tests.support import RedisServer, connect, eventually

LATER = Retry(Cause.TRANSIENT, "not now", after=3600.0)
REJECTED = Dead(Reason.REJECTED, "no", 422)


async def test_groups_that_vanish_under_a_full_hand_are_made_again(
    redis: Redis, redis_server: RedisServer
) -> None:
    """What is in hand waits to be buried, which takes the groups; nothing more is read until it is."""
    handler = Told()
    handler.answer = REJECTED
    handler.hold_all()
    async with consuming(redis_server.port, handler, read_count=1, max_in_flight=1) as me:
        await add(redis, *"abcd")
        await eventually(lambda: me.consumer.hand.active == 2)
        await redis.delete(STREAM.name)
        handler.let_go()
        await add(redis, "x", "y")
        await eventually(lambda: me.tally.dead[Reason.REJECTED] == 2)


async def test_groups_that_vanish_while_the_gate_is_shut_are_made_again(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler, gate = Told(), new_gate()
    handler.answers = {"a": [LATER]}
    async with consuming(redis_server.port, handler, gate=gate, visibility_timeout=0.6) as me:
        await add(redis, "a")
        await eventually(lambda: me.consumer.hand.parked == 1)
        ticket = gate.enter()
        assert ticket is not None
        gate.refused(ticket, "auth", "HTTP 401")
        await redis.delete(STREAM.name)

        async def there() -> bool:
            return bool(await redis.exists(STREAM.name))

        await eventually(there)  # found out with the next renewal of the lease


async def test_behind_many_dead_entries_what_is_new_is_reached_at_once(
    redis: Redis, redis_server: RedisServer
) -> None:
    dead = {f"{n}-0": ("invalid", 1) for n in range(1, 41)}
    await lay(redis, dead=dead, backlog=["41-0"])
    await redis.xgroup_setid(STREAM.name, STREAM.group, "0")
    handler = Told()
    async with consuming(redis_server.port, handler, read_count=4, doorbell=2.0, claim_interval=60.0):
        async with asyncio.timeout(1.9):  # one doorbell that does not ring would take longer
            await handler.until_begun(1)


async def test_what_vanished_in_hand_is_a_loss_in_the_books_when_it_is_handed_over(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.answer = LATER
    async with consuming(redis_server.port, handler, visibility_timeout=60.0) as me:
        (entry,) = await add(redis, "a")
        await eventually(lambda: me.consumer.hand.parked == 1)
        await redis.xdel(STREAM.name, entry)
        await me.stop()
    assert me.tally.vanished == 1
    assert await imbalance(redis) == 0


async def test_a_stop_out_of_memory_hands_over_what_cannot_be_answered(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.answers = {"later": [LATER]}
    handler.slow = {"now": asyncio.Event()}
    async with consuming(redis_server.port, handler, response_stream="queue:quota_response") as me:
        ids = await add(redis, "now", "later")
        await eventually(lambda: me.consumer.hand.parked == 1)
        async with out_of_memory(redis):
            handler.let_go()
            await me.stop()
        assert await pending_of(redis, HANDOVER) == dict.fromkeys(ids, 1)


async def test_a_fault_in_a_slot_is_raised_and_not_buried_with_it(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries would stay in hand for ever: the process ends, and hands them over."""

    async def broken(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    async with connect(redis_server.port) as connection:
        me = Consuming(connection, Told())
        monkeypatch.setattr(me.consumer.delivery, "_deliver", broken)
        loop = asyncio.create_task(me.consumer.run())
        await add(redis, "a")
        with pytest.raises(RuntimeError):
            await me.consumer.delivery.run()
        me.consumer.stop()
        await loop


async def test_what_a_lone_delivery_has_shown_is_written_at_once(
    redis: Redis, redis_server: RedisServer
) -> None:
    """Or any other end of the process would count as a death of this entry."""
    await lay(redis, live={"1-0": ("dead", 4)})
    handler = Told()
    handler.answer = LATER
    async with consuming(redis_server.port, handler, visibility_timeout=60.0):
        await handler.until_begun(1)

        async def written() -> bool:
            return (await state(redis)).live == {"1-0": ("me", 1)}

        await eventually(written, within=3.0)  # far sooner than the next renewal


async def test_after_a_pause_a_holder_first_takes_what_its_successor_left(
    redis: Redis, redis_server: RedisServer
) -> None:
    """The turn ran out while the process slept; a successor took it, read a start, and died."""
    handler, gate = Told(ordered=True), new_gate()
    async with consuming(
        redis_server.port, handler, stream=ORDERED, gate=gate, visibility_timeout=30.0, claim_interval=60.0
    ) as me:
        turn = me.consumer.turn
        assert turn is not None
        await eventually(lambda: turn.held)
        ticket = gate.enter()
        assert ticket is not None
        gate.refused(ticket, "auth", "HTTP 401")
        await asyncio.sleep(2 * 0.2)  # the doorbell: from now on it waits for the gate
        await redis.delete(ORDERED.turn_key)
        (start,) = await add(redis, "a", stream=ORDERED)
        await redis.xreadgroup(ORDERED.group, "successor", {ORDERED.name: ">"})
        (complete,) = await add(redis, "a", stream=ORDERED)
        await turn.ask()
        gate.lift()
        await settled(redis, 2, ORDERED)
    assert handler.delivered_ids == [start, complete]


@pytest.mark.parametrize("stream", [STREAM, ORDERED], ids=["without order", "in order"])
async def test_a_stop_while_a_suspect_is_read_counts_nothing(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, stream: Stream
) -> None:
    await lay(redis, live={"1-0": ("dead", 4)}, stream=stream)
    reading = asyncio.Event()

    async def never(_: bytes) -> None:
        reading.set()
        await asyncio.Event().wait()

    async with connect(redis_server.port) as connection:
        me = Consuming(connection, Told(ordered=stream is ORDERED), stream=stream)
        monkeypatch.setattr(me.consumer.delivery, "_fetch", never)
        me.start()
        await reading.wait()
        assert (await state(redis, stream)).live == {"1-0": ("me", 5)}
        await me.stop(drain=0.8)
    assert (await state(redis, stream)).live == {"1-0": (HANDOVER, 4)}
