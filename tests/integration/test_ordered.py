"""A stream that promises order: one active holder, everything pending first, lanes, and scripts that fence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from common.outcomes import Cause, Dead, Reason, Retry
from common.streams import HANDOVER
from tests.integration.workbench import (
    ORDERED,
    Consuming,
    State,
    Told,
    add,
    consuming,
    imbalance,
    lay,
    settled,
    state,
)
from tests.support import RedisServer, eventually

SOON = Retry(Cause.TRANSIENT, "not now", after=0.1)
LATER = Retry(Cause.TRANSIENT, "not now", after=3600.0)
QUICK: dict[str, Any] = {"visibility_timeout": 0.6, "claim_interval": 0.1}


class Ordered(Told):
    def __init__(self) -> None:
        super().__init__(ordered=True)


async def steal_turn(redis: Redis, holder: str = "somebody", ttl: float = 60.0) -> None:
    await redis.set(ORDERED.turn_key, holder, px=int(ttl * 1000))


async def dead(redis: Redis, n: int) -> None:
    """Waits until so many have died."""

    async def counted() -> bool:
        return len((await state(redis, ORDERED)).dead or {}) == n

    await eventually(counted, every=0.005)


def of(session: str, handler: Told, sessions: dict[str, str]) -> list[str]:
    return [entry_id for entry_id in handler.delivered_ids if sessions[entry_id] == session]


# -- lanes -------------------------------------------------------------------------------------------


async def test_a_session_is_delivered_one_by_one_in_order_and_sessions_at_once(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.slow = {"slow": asyncio.Event()}
    async with consuming(redis_server.port, handler, stream=ORDERED):
        names = ["slow", "a", "b"] * 5
        ids = await add(redis, *names, stream=ORDERED)
        await settled(redis, 10, ORDERED)
        assert handler.begun.count((ids[0],)) == 1
        assert (await state(redis, ORDERED)).entries == ids[::3]  # nothing of it overtook its first
        handler.let_go()
        await settled(redis, 15, ORDERED)
    for n, name in enumerate(["slow", "a", "b"]):
        assert of(name, handler, dict(zip(ids, names, strict=True))) == ids[n::3]


async def test_a_blocked_session_blocks_only_itself(redis: Redis, redis_server: RedisServer) -> None:
    handler = Ordered()
    handler.answers = {"blocked": [LATER]}
    async with consuming(redis_server.port, handler, stream=ORDERED, max_in_flight=1, read_count=2) as me:
        blocked = await add(redis, *["blocked"] * 10, stream=ORDERED)
        await add(redis, *"abcde" * 4, stream=ORDERED)
        await settled(redis, 20, ORDERED)
        assert (await state(redis, ORDERED)).entries == blocked
        assert handler.delivered_ids.count(blocked[0]) == 1
        assert (me.consumer.hand.parked, me.consumer.hand.active) == (10, 0)


async def test_after_a_retry_a_session_goes_on_in_order(redis: Redis, redis_server: RedisServer) -> None:
    handler = Ordered()
    handler.answers = {"a": [SOON, SOON]}
    async with consuming(redis_server.port, handler, stream=ORDERED):
        first, second = await add(redis, "a", "a", stream=ORDERED)
        await settled(redis, 2, ORDERED)
    assert handler.delivered_ids == [first, first, first, second]


async def test_after_a_start_that_died_the_complete_is_delivered(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.answers = {"a": [Dead(Reason.REJECTED, "no", 422)]}
    async with consuming(redis_server.port, handler, stream=ORDERED):
        start, complete = await add(redis, "a", "a", stream=ORDERED)
        await settled(redis, 1, ORDERED)
        await dead(redis, 1)
    assert handler.delivered_ids == [start, complete]
    assert set((await state(redis, ORDERED)).dead or {}) == {start}


async def test_when_the_blocked_head_of_a_session_vanishes_the_next_one_goes(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.answers = {"a": [LATER]}
    async with consuming(redis_server.port, handler, stream=ORDERED, **QUICK) as me:
        start, complete = await add(redis, "a", "a", stream=ORDERED)
        await eventually(lambda: me.consumer.hand.parked == 2)
        await redis.xdel(ORDERED.name, start)
        await settled(redis, 1, ORDERED)
    assert handler.delivered_ids == [start, complete]
    assert await imbalance(redis, ORDERED) == 0


# -- one active holder -------------------------------------------------------------------------------


async def test_only_the_holder_of_the_turn_reads_and_the_next_takes_over_when_it_stops(
    redis: Redis, redis_server: RedisServer
) -> None:
    first, second = Ordered(), Ordered()
    async with consuming(redis_server.port, first, stream=ORDERED, name="first", **QUICK) as holder:
        await add(redis, "a", stream=ORDERED)
        await settled(redis, 1, ORDERED)
        async with consuming(redis_server.port, second, stream=ORDERED, name="second", **QUICK) as waiting:
            await add(redis, *"bcdef", stream=ORDERED)
            await settled(redis, 6, ORDERED)
            await eventually(lambda: waiting.scripts.runs["turn_take"] >= 3)
            assert (second.begun, waiting.scripts.runs["read"]) == ([], 0)
            assert waiting.consumer.unready == ()
            await holder.stop()
            await add(redis, "g", stream=ORDERED)
            await settled(redis, 7, ORDERED)
    assert (len(first.begun), len(second.begun)) == (6, 1)


async def test_when_the_holder_dies_the_next_takes_the_turn_after_its_time_to_live(
    redis: Redis, redis_server: RedisServer
) -> None:
    first, second = Ordered(), Ordered()
    first.hold_all()
    async with consuming(redis_server.port, first, stream=ORDERED, name="first", **QUICK):
        ids = await add(redis, "a", "a", "a", stream=ORDERED)
        await first.until_begun(1)
    async with consuming(redis_server.port, second, stream=ORDERED, name="second", **QUICK) as heir:
        await settled(redis, 3, ORDERED)
    assert (first.delivered_ids, second.delivered_ids) == (ids[:1], ids)
    assert heir.tally.claimed == 3


async def test_a_new_holder_takes_all_that_is_pending_in_order_before_it_reads(
    redis: Redis, redis_server: RedisServer
) -> None:
    live = {f"{n}-0": (("a", 1), ("b", 2), (HANDOVER, 1))[n % 3] for n in range(1, 251)}
    backlog = [f"{n}-0" for n in range(251, 301)]
    await lay(redis, live=live, backlog=backlog, stream=ORDERED, idle=0)  # whoever had them may be alive
    handler = Ordered()
    async with consuming(redis_server.port, handler, stream=ORDERED) as me:
        await settled(redis, 300, ORDERED)
    assert handler.delivered_ids == [f"{n}-0" for n in range(1, 301)]
    assert me.tally.claimed == 250


async def test_suspects_keep_their_place_in_their_session_and_are_delivered_alone(
    redis: Redis, redis_server: RedisServer
) -> None:
    live = {"1-0": ("dead", 1), "2-0": ("dead", 3), "3-0": ("dead", 1)}
    await lay(redis, live=live, backlog=["4-0"], stream=ORDERED)
    handler = Ordered()
    handler.slow = {"b": asyncio.Event()}
    async with consuming(redis_server.port, handler, stream=ORDERED):
        await settled(redis, 4, ORDERED)
    assert handler.delivered_ids == ["1-0", "2-0", "3-0", "4-0"]


async def test_while_a_suspect_is_delivered_alone_its_count_is_written_and_other_sessions_wait(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 4)}, data=b"suspect", stream=ORDERED)
    handler = Ordered()
    handler.slow = {"suspect": asyncio.Event()}
    async with consuming(redis_server.port, handler, stream=ORDERED) as me:
        await handler.until_begun(1)
        (other,) = await add(redis, "a", stream=ORDERED)
        await eventually(lambda: len(me.consumer.hand) == 2)
        assert (await state(redis, ORDERED)).live == {"1-0": ("me", 5), other: ("me", 1)}
        assert handler.begun == [("1-0",)]
        handler.let_go()
        await settled(redis, 2, ORDERED)


async def test_a_poisonous_entry_dies_and_its_session_goes_on(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 8), "2-0": ("dead", 1)}, stream=ORDERED)
    handler = Ordered()
    async with consuming(redis_server.port, handler, stream=ORDERED):
        await settled(redis, 1, ORDERED)
        await dead(redis, 1)
    assert handler.delivered_ids == ["2-0"]
    assert (await state(redis, ORDERED)).dead == {"1-0": ("poison", 5)}


async def test_a_suspect_whose_reading_failed_is_read_again(redis: Redis, redis_server: RedisServer) -> None:
    await lay(redis, live={"1-0": ("dead", 3), "2-0": ("dead", 1)}, stream=ORDERED)
    handler = Ordered()

    def fails(me: Consuming) -> None:
        me.scripts.lose.update({"renew": 1, "fetch": 1})

    async with consuming(redis_server.port, handler, stream=ORDERED, before=fails, ready=False):
        await settled(redis, 2, ORDERED)
    assert handler.delivered_ids == ["1-0", "2-0"]


async def test_a_slot_outlives_a_turn_that_is_lost_while_redis_fails(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("me", 3)}, stream=ORDERED, idle=0)

    def fails(me: Consuming) -> None:
        me.scripts.spare["renew"], me.scripts.lose["renew"] = (
            2,
            1,
        )  # its reading passes, its delivery does not
        me.scripts.on_lost = me.consumer._lose_turn  # what a fenced script finds at that very moment

    options: dict[str, Any] = {
        "stream": ORDERED,
        "max_in_flight": 1,
        "before": fails,
        "ready": False,
        **QUICK,
    }
    async with consuming(redis_server.port, Ordered(), **options):
        await settled(redis, 1, ORDERED)


# -- the fence ---------------------------------------------------------------------------------------


async def test_who_has_lost_the_turn_reads_nothing_more(redis: Redis, redis_server: RedisServer) -> None:
    handler = Ordered()
    async with consuming(redis_server.port, handler, stream=ORDERED) as me:
        await add(redis, "a", stream=ORDERED)
        await settled(redis, 1, ORDERED)
        await steal_turn(redis)
        (entry,) = await add(redis, "b", stream=ORDERED)
        await eventually(lambda: me.consumer.turn is not None and not me.consumer.turn.held)
        assert await state(redis, ORDERED) == State(entries=[entry], ledger={"delivered": 1})
    assert len(handler.begun) == 1


async def test_who_has_lost_the_turn_settles_and_buries_nothing_more(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.slow = {"a": asyncio.Event(), "b": asyncio.Event()}
    handler.answers = {"b": [Dead(Reason.REJECTED, "no")]}
    async with consuming(redis_server.port, handler, stream=ORDERED, visibility_timeout=60.0) as me:
        ids = await add(redis, "a", "b", stream=ORDERED)
        await handler.until_begun(2)
        await steal_turn(redis)
        before = await state(redis, ORDERED)
        for session in ("a", "b"):
            handler.slow[session].set()
            await eventually(lambda: me.consumer.turn is not None and not me.consumer.turn.held)
        assert await state(redis, ORDERED) == before
        assert not len(me.consumer.hand)
    assert set(before.live or {}) == set(ids)


async def test_who_gets_the_turn_back_begins_anew_with_what_is_pending(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.answers = {"a": [LATER]}
    async with consuming(redis_server.port, handler, stream=ORDERED, **QUICK) as me:
        start, complete = await add(redis, "a", "a", stream=ORDERED)
        await eventually(lambda: me.consumer.hand.parked == 2)
        await steal_turn(redis, ttl=0.3)
        await settled(redis, 2, ORDERED)
    assert handler.delivered_ids == [start, start, complete]
    assert me.consumer.turn is not None
    assert me.consumer.turn.era >= 2


@pytest.mark.parametrize("pause", [0.0, 0.4], ids=["at once", "after the loop has seen it"])
async def test_what_another_holder_delivered_meanwhile_is_not_delivered_again(
    redis: Redis, redis_server: RedisServer, pause: float
) -> None:
    """The turn is away for so short a time that no lease is renewed in between."""
    handler = Ordered()
    handler.answers = {"a": [Retry(Cause.TRANSIENT, "not now", after=1.0)]}
    async with consuming(redis_server.port, handler, stream=ORDERED, visibility_timeout=12.0) as me:
        start, complete = await add(redis, "a", "a", stream=ORDERED)
        await eventually(lambda: me.consumer.hand.parked == 2)
        turn = me.consumer.turn
        assert turn is not None
        await steal_turn(redis)
        await turn.ask()
        await asyncio.sleep(pause)
        await redis.xack(ORDERED.name, ORDERED.group, start, complete)
        await redis.xdel(ORDERED.name, start, complete)
        await redis.delete(ORDERED.turn_key)
        await turn.ask()
        (after,) = await add(redis, "a", stream=ORDERED)
        await handler.until(lambda: after in handler.delivered_ids)
    assert handler.delivered_ids == [start, after]


async def test_a_paused_ex_holder_reorders_nothing(redis: Redis, redis_server: RedisServer) -> None:
    """Its last request may end late; whatever the successor sends is in order all the same."""
    first, second = Ordered(), Ordered()
    first.hold_all()
    async with consuming(redis_server.port, first, stream=ORDERED, name="first", **QUICK) as paused:
        ids = await add(redis, *["a"] * 6, stream=ORDERED)
        await first.until_begun(1)
        async with consuming(redis_server.port, second, stream=ORDERED, name="second", **QUICK):
            await steal_turn(redis, "second", ttl=0.6)  # as if its time to live had passed
            await eventually(lambda: paused.consumer.turn is not None and not paused.consumer.turn.held)
            first.let_go()
            await settled(redis, 6, ORDERED)
    assert first.delivered_ids[:1] == ids[:1]
    last_sent = {entry_id: n for n, entry_id in enumerate([*first.delivered_ids, *second.delivered_ids])}
    assert sorted(last_sent, key=lambda entry_id: last_sent[entry_id]) == ids
    assert await imbalance(redis, ORDERED) == 0


async def test_no_request_starts_when_the_turn_is_older_than_half_its_time_to_live(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    async with consuming(redis_server.port, handler, stream=ORDERED, visibility_timeout=1.0) as me:
        turn = me.consumer.turn
        assert turn is not None
        handler.answers = {"a": [Retry(Cause.TRANSIENT, "not now", after=0.6)]}
        (entry,) = await add(redis, "a", stream=ORDERED)
        await handler.until(lambda: handler.ended)
        redis_server.pause()  # nothing can be renewed
        try:
            await eventually(lambda: not turn.fresh)
            await asyncio.sleep(0.3)  # its next attempt would be due
            assert handler.delivered_ids == [entry]
        finally:
            redis_server.resume()
        await settled(redis, 1, ORDERED)


async def test_a_stop_hands_over_in_order_and_gives_the_turn_up_last(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Ordered()
    handler.slow = {"a": asyncio.Event()}
    async with consuming(redis_server.port, handler, stream=ORDERED) as me:
        first, *rest = await add(redis, *["a"] * 3, stream=ORDERED)
        await handler.until_begun(1)
        stopping = asyncio.create_task(me.stop())
        await asyncio.sleep(0.1)  # time enough to let go of the turn too early
        assert await redis.get(ORDERED.turn_key) == b"me"
        assert set((await state(redis, ORDERED)).live or {}) == {first, *rest}
        handler.let_go()
        await stopping
    assert await redis.get(ORDERED.turn_key) is None
    assert (await state(redis, ORDERED)).live == dict.fromkeys(rest, (HANDOVER, 1))
