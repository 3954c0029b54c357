"""The laws of the loop, in this process, against a real Redis: what is read, who holds it, how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from common import consumer, dead_letters, logs
from common.config import Monitoring
from common.entries import Entry, Row
from common.outcomes import DUPLICATE, Cause, Dead, Reason, Retry
from common.streams import HANDOVER, MAX_ENTRY_BYTES
from tests.integration.workbench import (
    LATER,
    ORDERED,
    SOON,
    STREAM,
    Consuming,
    State,
    Told,
    add,
    consumers,
    consuming,
    imbalance,
    lay,
    make_groups,
    new_gate,
    out_of_memory,
    settled,
    state,
)
from tests.support import RedisServer, connect, eventually


async def in_group(redis: Redis) -> int:
    return len((await state(redis)).live or {})


@pytest.fixture
def log() -> Callable[[str], list[dict[str, Any]]]:
    """The lines of one event, from here on."""
    written = io.StringIO()
    logs.setup("test", Monitoring(log_level="DEBUG"), "server-1", stream=written)

    def lines(event: str) -> list[dict[str, Any]]:
        read = (json.loads(line) for line in written.getvalue().splitlines())
        return [line for line in read if line["event"] == event]

    return lines


# -- an entry's way ----------------------------------------------------------------------------------


async def test_an_entry_is_delivered_settled_and_gone(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answers = {"b": [DUPLICATE], "c": [Dead(Reason.REJECTED, "no", 422, "why")]}
    async with consuming(redis_server.port, handler) as me:
        ids = await add(redis, "a", "b", "c", "?")
        await settled(redis, 2)
        await eventually(lambda: me.tally.dead.total() == 2)
    assert handler.delivered_ids == ids[:3]
    assert await state(redis) == State(
        entries=ids[2:],
        dead={ids[2]: ("rejected", 1), ids[3]: ("invalid", 1)},
        documents=ids[2:],
        ledger={"dead:invalid": 1, "dead:rejected": 1, "delivered": 1, "duplicate": 1},
    )
    assert (me.tally.delivered, me.tally.duplicate) == (1, 1)
    assert not len(me.consumer.hand)
    assert await imbalance(redis) == 0


async def test_an_entry_stays_pending_while_its_request_is_out(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler):
        (entry,) = await add(redis, "a")
        await handler.until_begun(1)
        assert (await state(redis)).live == {entry: ("me", 1)}
        handler.let_go()
        await settled(redis, 1)
        assert (await state(redis)).live == {}


async def test_a_transient_failure_is_tried_again_until_it_works(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.answers = {"a": [SOON, SOON, SOON]}
    async with consuming(redis_server.port, handler) as me:
        (entry,) = await add(redis, "a")
        await settled(redis, 1)
    assert handler.delivered_ids == [entry] * 4
    assert me.tally.retried == {Cause.TRANSIENT: 3}


async def test_a_fault_of_our_own_in_a_delivery_keeps_the_entry(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()

    def stumble(entries: list[Entry]) -> None:
        raise ZeroDivisionError

    handler.on_request = stumble
    async with consuming(redis_server.port, handler) as me:
        (entry,) = await add(redis, "a")
        await eventually(lambda: me.tally.retried[Cause.TRANSIENT])
        assert (await state(redis)).live == {entry: ("me", 1)}


async def test_an_entry_that_is_too_long_dies_of_its_length(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler):
        await redis.xadd(STREAM.name, {"data": b"x" * 5_000_000})
        await eventually(lambda: redis.hlen(STREAM.dead_key))
        letters = [letter async for letter in dead_letters.find(redis, STREAM)]
    assert [(letter.reason, letter.error) for letter in letters] == [
        ("invalid", f"the entry is 5000004 bytes long, expected at most {MAX_ENTRY_BYTES}")
    ]
    assert handler.begun == []


async def test_what_is_not_found_is_held_and_then_dead(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answer = Retry(Cause.NOT_FOUND, "HTTP 404", 404, after=0.05)
    async with consuming(redis_server.port, handler, not_found_hold=0.4) as me:
        began = time.monotonic()
        (entry,) = await add(redis, "a")
        await eventually(lambda: me.tally.dead[Reason.REJECTED])
        assert time.monotonic() - began >= 0.4
    assert len(handler.begun) > 2
    assert set((await state(redis)).dead or {}) == {entry}


async def test_what_is_found_within_the_hold_is_delivered(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answers = {"a": [Retry(Cause.NOT_FOUND, "HTTP 404", 404, after=0.05)] * 3}
    async with consuming(redis_server.port, handler):
        await add(redis, "a")
        await settled(redis, 1)


# -- room (laws 1 and 2) -----------------------------------------------------------------------------


async def test_no_more_is_read_than_there_is_capacity_for(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler, read_count=4, max_in_flight=2) as me:
        peak = 0

        def look(entries: list[Entry]) -> None:
            nonlocal peak
            peak = max(peak, len(me.consumer.hand))

        handler.on_request = look
        await add(redis, *"abcdefgh" * 5)
        await eventually(lambda: len(me.consumer.hand) == 8)
        assert await in_group(redis) == 8
        assert handler.most_in_flight == 2
        handler.let_go()
        await settled(redis, 40)
    assert peak == 8
    assert handler.most_in_flight == 2


async def test_no_more_bytes_are_read_than_there_is_room_for(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "MAX_BYTES", 1_000_000)
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler) as me:
        await add(redis, *(f"{n}/" + "x" * 100_000 for n in range(30)))
        await eventually(lambda: me.consumer.hand.bytes >= 1_000_000)
        assert me.consumer.hand.bytes <= 1_000_000 + MAX_ENTRY_BYTES
        handler.let_go()
        await settled(redis, 30)


async def test_no_more_bytes_are_taken_over_than_there_is_room_for(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "MAX_BYTES", 1_000_000)
    await lay(redis, live={f"{n}-0": ("dead", 1) for n in range(1, 41)}, data=b"a/" + b"x" * 100_000)
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler) as me:
        await eventually(lambda: me.consumer.hand.bytes >= 700_000)
        assert me.consumer.hand.bytes <= 1_000_000 + MAX_ENTRY_BYTES
        handler.let_go()
        await settled(redis, 40)


async def test_a_parked_entry_holds_no_slot_and_no_room(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answers = {"late": [LATER] * 10}
    async with consuming(redis_server.port, handler, read_count=2, max_in_flight=1) as me:
        late = await add(redis, *["late"] * 10)
        await add(redis, *"abcdefgh" * 5)
        await settled(redis, 40)
        assert list((await state(redis)).live or {}) == late
        assert (me.consumer.hand.parked, me.consumer.hand.active) == (10, 0)


async def test_with_too_many_parked_nothing_more_is_read(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "MAX_PARKED", 10)
    handler = Told()
    handler.answer = LATER
    async with consuming(redis_server.port, handler, read_count=4) as me:
        await add(redis, *"abcdefgh" * 5)
        await eventually(lambda: me.consumer.hand.parked >= 10)
        await asyncio.sleep(0.1)  # time enough to read on, if it would
        assert await in_group(redis) <= 10 + 4 * 4  # two reads under way, and two before them


@pytest.mark.parametrize(("ordered", "most"), [(False, 2), (True, 1)], ids=["without order", "in order"])
async def test_while_reads_come_back_full_two_are_under_way_but_one_in_order(
    redis: Redis, redis_server: RedisServer, ordered: bool, most: int
) -> None:
    stream = ORDERED if ordered else STREAM
    under_way: list[int] = []
    out = 0

    def watch(me: Consuming) -> None:
        read = me.consumer._read

        async def watched(room: int, most_bytes: int) -> list[Row]:
            nonlocal out
            out += 1
            under_way.append(out)
            try:
                return await read(room, most_bytes)
            finally:
                out -= 1

        me.consumer._read = watched  # type: ignore[method-assign]

    await make_groups(redis, stream)
    await add(redis, *"abcdefgh" * 10, stream=stream)
    handler = Told(ordered=ordered)
    async with consuming(redis_server.port, handler, stream=stream, before=watch, read_count=4) as me:
        await settled(redis, 80, stream)
        assert max(under_way) == most
        under_way.clear()
        await add(redis, "a", stream=stream)
        await settled(redis, 81, stream)
        assert me.consumer.in_flight == 0
    assert max(under_way) == 1  # a read that is not full is followed by one alone


async def test_what_was_read_and_not_yet_taken_on_is_handed_over_by_a_stop(
    redis: Redis, redis_server: RedisServer
) -> None:
    async with consuming(redis_server.port, Told(), read_count=4) as me:
        read = me.consumer._read

        async def read_and_stop(room: int, most_bytes: int) -> list[Row]:
            rows = await read(room, most_bytes)
            if rows:
                me.consumer.stop()
            return rows

        me.consumer._read = read_and_stop  # type: ignore[method-assign]
        await add(redis, *"abc")
        await me.stop()
    live = (await state(redis)).live or {}
    assert {consumer for consumer, _ in live.values()} <= {HANDOVER}
    assert len(live) + int((await state(redis)).ledger.get("delivered", 0)) == 3


# -- the gate (law 1) --------------------------------------------------------------------------------


async def test_nothing_is_read_while_the_gate_is_shut(redis: Redis, redis_server: RedisServer) -> None:
    handler, gate = Told(), new_gate()
    ticket = gate.enter()
    assert ticket is not None
    gate.refused(ticket, "auth", "HTTP 401")
    async with consuming(redis_server.port, handler, gate=gate):
        ids = await add(redis, "a", "b")
        await asyncio.sleep(0.3)  # several doorbells and claim intervals
        assert await state(redis) == State(entries=ids)
        gate.lift()
        await settled(redis, 2)
    assert handler.delivered_ids == ids


async def test_half_open_one_entry_is_read_and_the_rest_when_it_was_delivered(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler, gate = Told(), new_gate()
    handler.gate = gate
    handler.hold_all()
    for _ in range(5):
        ticket = gate.enter()
        assert ticket is not None
        gate.failed(ticket, "connection", "refused")
    assert gate.breaker.state == "open"
    async with consuming(redis_server.port, handler, gate=gate):
        ids = await add(redis, *"abcdefgh")
        await handler.until_begun(1)
        await asyncio.sleep(0.1)  # time enough to read on, if it would
        assert (await state(redis)).live == {ids[0]: ("me", 1)}
        handler.let_go()
        await settled(redis, 8)
    assert sorted(handler.delivered_ids) == ids


async def test_what_was_held_is_delivered_when_the_gate_opens_and_costs_no_attempt(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler, gate = Told(), new_gate()
    handler.hold_all()
    handler.answers = {"a": [Retry(Cause.HELD, "HTTP 401", 401)]}
    async with consuming(redis_server.port, handler, gate=gate) as me:
        (entry,) = await add(redis, "a")
        await handler.until_begun(1)
        ticket = gate.enter()
        assert ticket is not None
        gate.refused(ticket, "auth", "HTTP 401")
        handler.let_go()
        await handler.until(lambda: handler.ended)
        assert (await state(redis)).live == {entry: ("me", 1)}
        gate.lift()
        await settled(redis, 1)
    assert handler.delivered_ids == [entry, entry]
    assert me.tally.retried == {}


# -- batches -----------------------------------------------------------------------------------------


async def test_while_more_is_to_be_read_requests_are_full_and_what_is_left_over_does_not_wait(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told(batch=10)
    await lay(redis, backlog=[])
    await add(redis, *["many"] * 35, *["few"] * 3)
    async with consuming(redis_server.port, handler, read_count=5):
        await settled(redis, 38)
    assert sorted(len(request) for request in handler.begun) == [3, 5, 10, 10, 10]


async def test_sessions_of_which_none_fills_a_request_are_delivered_all_the_same(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told(batch=10)
    await lay(redis, backlog=[])
    await add(redis, *(f"session-{n}" for n in range(100)))
    async with consuming(redis_server.port, handler, read_count=5, max_in_flight=2):
        await settled(redis, 100)


async def test_a_batch_carries_entries_of_one_session_and_every_session_gets_its_share(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told(batch=4)
    await lay(redis, backlog=[])
    ids = await add(redis, *["busy"] * 10, "small", *["busy"] * 10)
    async with consuming(redis_server.port, handler, max_in_flight=1):
        await settled(redis, 21)
    assert handler.begun[:2] == [tuple(ids[:4]), (ids[10],)]
    assert [len(request) for request in handler.begun] == [4, 1, 4, 4, 4, 4]


# -- what nobody knows of (law 6) --------------------------------------------------------------------


async def test_what_a_failed_read_delivered_to_nobody_is_found(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler) as me:
        me.scripts.lose["read"] = 3
        ids = await add(redis, "a", "b", "c")
        await settled(redis, 3)
        await eventually(lambda: me.scripts.lose["read"] == 0)
    assert sorted(handler.delivered_ids) == ids  # each once


async def test_a_takeover_whose_reply_was_lost_counts_one_crash(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 1)})
    handler = Told()
    handler.hold_all()

    def fails(me: Consuming) -> None:
        me.scripts.lose["take_over"] = 1

    async with consuming(redis_server.port, handler, visibility_timeout=0.5, before=fails):
        await handler.until_begun(1)
        assert (await state(redis)).live == {"1-0": ("me", 2)}


async def test_a_stop_at_any_moment_leaves_nothing_under_the_own_name(
    redis: Redis, redis_server: RedisServer
) -> None:
    for n in range(20):
        handler = Told()
        async with consuming(redis_server.port, handler, name=f"me-{n}") as me:
            adding = asyncio.create_task(add(redis, *["a"] * 20))
            await asyncio.sleep(n / 4000)
            await me.stop()
            await adding
    found = await state(redis)
    assert {owner for owner, _ in (found.live or {}).values()} <= {HANDOVER}
    assert await consumers(redis) <= {HANDOVER}
    assert len(found.entries) + found.ledger.get("delivered", 0) == 400
    assert await imbalance(redis) == 0


# -- the lease and takeovers (laws 7 and 8) ----------------------------------------------------------


async def test_nobody_takes_a_delivery_that_is_slow(redis: Redis, redis_server: RedisServer) -> None:
    slow, idle = Told(), Told()
    slow.hold_all()
    limits: dict[str, Any] = {"visibility_timeout": 0.5, "claim_interval": 0.1}
    async with consuming(redis_server.port, slow, name="slow", **limits) as me:
        (entry,) = await add(redis, "a")
        await slow.until_begun(1)
        async with consuming(redis_server.port, idle, name="idle", **limits) as other:
            await eventually(lambda: other.scripts.runs["take_over"] >= 12)
            assert (await state(redis)).live == {entry: ("slow", 1)}
            assert me.scripts.runs["renew"] >= 2
            slow.let_go()
            await settled(redis, 1)
    assert idle.begun == []


async def test_a_parked_entry_keeps_its_lease(redis: Redis, redis_server: RedisServer) -> None:
    parked, idle = Told(), Told()
    parked.answer = LATER
    limits: dict[str, Any] = {"visibility_timeout": 0.5, "claim_interval": 0.1}
    async with consuming(redis_server.port, parked, name="parked", **limits):
        (entry,) = await add(redis, "a")
        await parked.until_begun(1)
        async with consuming(redis_server.port, idle, name="idle", **limits) as other:
            await eventually(lambda: other.scripts.runs["take_over"] >= 8)
            assert (await state(redis)).live == {entry: ("parked", 1)}


async def test_what_a_dead_consumer_left_is_taken_over_and_counts_one_crash(
    redis: Redis, redis_server: RedisServer
) -> None:
    dying, heir = Told(), Told()
    dying.hold_all()
    heir.hold_all()
    limits: dict[str, Any] = {"visibility_timeout": 0.3, "claim_interval": 0.1}
    async with consuming(redis_server.port, dying, name="dying", **limits):
        ids = await add(redis, "a", "b", "c")
        await dying.until_begun(3)
    async with consuming(redis_server.port, heir, name="heir", **limits) as me:
        await heir.until_begun(3)
        assert (await state(redis)).live == dict.fromkeys(ids, ("heir", 2))
        heir.let_go()
        await settled(redis, 3)
    assert me.tally.claimed == 3


async def test_what_was_taken_away_is_not_tried_again(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answer = SOON
    async with consuming(redis_server.port, handler, visibility_timeout=0.3) as me:
        (entry,) = await add(redis, "a")
        await handler.until_begun(2)
        await redis.xclaim(STREAM.name, STREAM.group, "somebody", 0, [entry], justid=True, idle=0)
        await eventually(lambda: not len(me.consumer.hand))
        assert set((await state(redis)).live or {}) == {entry}


async def test_a_delivery_that_succeeds_after_a_takeover_settles_the_entry_all_the_same(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler, visibility_timeout=0.3) as me:
        (entry,) = await add(redis, "a")
        await handler.until_begun(1)
        await redis.xclaim(STREAM.name, STREAM.group, "somebody", 0, [entry], justid=True)
        await eventually(lambda: not len(me.consumer.hand))
        handler.let_go()
        await settled(redis, 1)
    assert await state(redis) == State(
        ledger={"delivered": 1},
    )


async def test_what_vanished_in_hand_is_counted_as_a_loss_once(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.answer = LATER
    async with consuming(redis_server.port, handler, visibility_timeout=0.3) as me:
        (entry,) = await add(redis, "a")
        await eventually(lambda: me.consumer.hand.parked == 1)
        await redis.xdel(STREAM.name, entry)
        await eventually(lambda: not len(me.consumer.hand))
        assert me.tally.vanished == 1
    assert await state(redis) == State(ledger={"vanished": 1})
    assert await imbalance(redis) == 0


async def test_redriven_entries_are_found_within_two_seconds(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answers = {"a": [Dead(Reason.REJECTED, "no", 422)]}
    async with consuming(redis_server.port, handler, claim_interval=60.0) as me:
        (entry,) = await add(redis, "a")
        await eventually(lambda: me.tally.dead[Reason.REJECTED])
        began = time.monotonic()
        await dead_letters.redrive(redis, STREAM, [entry])
        await settled(redis, 1)
        assert time.monotonic() - began < 2.5
    assert handler.delivered_ids == [entry, entry]


# -- groups that vanish (law 11) ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["DEL", "FLUSHALL", "XGROUP DESTROY live", "XGROUP DESTROY twin"])
async def test_groups_that_vanish_while_the_consumer_waits_are_made_again(
    redis: Redis, redis_server: RedisServer, how: str
) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler):
        await add(redis, "before")
        await settled(redis, 1)

        async def waits() -> bool:
            return "xread" in {client["cmd"] for client in await redis.client_list()}

        await eventually(waits)
        match how:
            case "DEL":
                await redis.delete(STREAM.name)
            case "FLUSHALL":
                await redis.flushall()
            case "XGROUP DESTROY live":
                await redis.xgroup_destroy(STREAM.name, STREAM.group)
            case _:
                await redis.xgroup_destroy(STREAM.name, STREAM.dead_group)
        (after,) = await add(redis, "after")
        await handler.until(lambda: after in handler.delivered_ids)
        await settled(redis, 1 if how == "FLUSHALL" else 2)
    found = await state(redis)
    assert (found.live, found.dead) == ({}, {})
    assert await imbalance(redis) == 0


async def test_a_group_made_again_from_zero_reads_no_dead_entry(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler) as me:
        dead = await add(redis, "?", "?")
        await eventually(lambda: me.tally.dead[Reason.INVALID] == 2)
        await redis.xgroup_destroy(STREAM.name, STREAM.group)
        await add(redis, "a")
        await settled(redis, 1)
    assert list((await state(redis)).dead or {}) == dead
    assert me.tally.dead[Reason.INVALID] == 2


async def test_what_was_in_flight_when_its_group_vanished_is_delivered_at_least_once_more_or_settled(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler, visibility_timeout=0.3):
        (entry,) = await add(redis, "a")
        await handler.until_begun(1)
        await redis.xgroup_destroy(STREAM.name, STREAM.group)

        async def again() -> bool:
            return set((await state(redis)).live or {}) == {entry}

        await eventually(again)
        handler.let_go()
        await settled(redis, 1)
    assert await state(redis) == State(ledger={"delivered": 1})


# -- Redis goes and comes (law 12) -------------------------------------------------------------------


async def test_a_cut_connection_loses_nothing(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler) as me:
        for _ in range(5):
            await add(redis, *"abcde")
            await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await settled(redis, 25)
        assert me.fatal == []
    assert await imbalance(redis) == 0


async def test_out_of_memory_what_is_in_redis_is_drained(redis: Redis, redis_server: RedisServer) -> None:
    handler = Told()
    handler.answers = {"b": [Dead(Reason.REJECTED, "no")]}
    await lay(redis)
    ids = await add(redis, "a", "b", "c", "?")
    async with out_of_memory(redis), consuming(redis_server.port, handler) as me:
        await settled(redis, 2)
        await eventually(lambda: me.tally.dead.total() == 2)
    assert (await state(redis)).entries == [ids[1], ids[3]]


async def test_a_user_that_redis_refuses_is_fatal_and_says_the_remedy(
    redis: Redis, redis_server: RedisServer
) -> None:
    await redis.execute_command("ACL", "SETUSER", "nobody", "on", "nopass", "~*", "-@all", "+ping")
    try:
        async with consuming(redis_server.port, Told(), username="nobody", ready=False) as me:
            await eventually(lambda: me.fatal)
    finally:
        await redis.execute_command("ACL", "DELUSER", "nobody")
    assert "check redis.username and redis.password" in me.fatal[0]


# -- the grant (law 3) -------------------------------------------------------------------------------


async def test_a_request_is_answered_once_although_the_reply_was_lost(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    async with consuming(redis_server.port, handler, response_stream="queue:quota_response") as me:
        me.scripts.lose["answer"] = 2
        await add(redis, "a", "b")
        await settled(redis, 2)
        await eventually(lambda: not len(me.consumer.hand))
    assert await redis.xlen("queue:quota_response") == 2
    assert (await state(redis)).ledger == {"delivered": 2}


# -- the stop (law 10) -------------------------------------------------------------------------------


async def test_a_stop_ends_what_is_in_flight_hands_over_the_rest_and_leaves_no_name(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.answers = {"parked": [LATER]}
    handler.slow = {"slow": asyncio.Event()}
    async with consuming(redis_server.port, handler, max_in_flight=1) as me:
        parked, slow, *waiting = await add(redis, "parked", "slow", "a", "b")
        await handler.until_begun(2)
        await eventually(lambda: len(me.consumer.hand) == 4)
        stopping = asyncio.create_task(me.stop())
        handed = {parked: (HANDOVER, 1)} | dict.fromkeys(waiting, (HANDOVER, 1))

        async def handed_over() -> bool:
            return (await state(redis)).live == {**handed, slow: ("me", 1)}

        await eventually(handed_over)
        handler.let_go()
        await stopping
    assert await state(redis) == State(entries=[parked, *waiting], live=handed, ledger={"delivered": 1})
    assert await consumers(redis) == {HANDOVER}
    assert handler.delivered_ids == [parked, slow]


async def test_a_request_that_does_not_end_in_time_is_handed_over(
    redis: Redis, redis_server: RedisServer
) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler) as me:
        (entry,) = await add(redis, "a")
        await handler.until_begun(1)
        began = time.monotonic()
        await me.stop(drain=0.4)
        assert time.monotonic() - began < 0.6
    assert (await state(redis)).live == {entry: (HANDOVER, 1)}
    assert await consumers(redis) == {HANDOVER}


async def test_a_stop_during_the_delivery_of_a_suspect_counts_nothing(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("dead", 4)})
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler) as me:
        await handler.until_begun(1)
        assert (await state(redis)).live == {"1-0": ("me", 5)}
        await me.stop(drain=0.4)
    assert (await state(redis)).live == {"1-0": (HANDOVER, 4)}


async def test_what_was_handed_over_is_delivered_by_the_next_within_two_seconds(
    redis: Redis, redis_server: RedisServer
) -> None:
    first, second = Told(), Told()
    first.answer = LATER
    async with consuming(redis_server.port, second, name="second", claim_interval=0.5):
        async with consuming(redis_server.port, first, name="first") as me:
            second.hold_all()
            (entry,) = await add(redis, "a")
            await me.stop()
        second.let_go()
        await settled(redis, 1)
    assert entry in second.delivered_ids


async def test_a_stop_without_redis_ends_in_time(redis_server: RedisServer) -> None:
    handler = Told()
    handler.hold_all()
    async with consuming(redis_server.port, handler) as me:
        async with connect(redis_server.port) as redis:
            await add(redis, "a")
        await handler.until_begun(1)
        redis_server.pause()
        try:
            began = time.monotonic()
            await me.stop(drain=0.6)
            assert time.monotonic() - began < 1.2
        finally:
            redis_server.resume()


async def test_an_idle_consumer_stops_at_once(redis: Redis, redis_server: RedisServer) -> None:
    async with consuming(redis_server.port, Told(), doorbell=2.0, claim_interval=60.0) as me:

        async def waits() -> bool:
            return "xread" in {client["cmd"] for client in await redis.client_list()}

        await eventually(waits)
        began = time.monotonic()
        await me.stop()
        assert time.monotonic() - began < 0.5
    assert await consumers(redis) == set()


# -- what is said ------------------------------------------------------------------------------------


async def test_every_line_about_one_entry_names_its_correlation_id(
    redis: Redis, redis_server: RedisServer, log: Callable[[str], list[dict[str, Any]]]
) -> None:
    class Stumbles(Told):
        def decode(self, entry: Entry, data: bytes | None) -> str:
            if data == b"stumble":
                raise RuntimeError
            return super().decode(entry, data)

    handler = Stumbles()
    handler.answers = {"late": [SOON], "no": [Dead(Reason.REJECTED, "no", 422, "why")]}
    for data in ("late", "no", "stumble"):
        await redis.xadd(STREAM.name, {"data": data, "correlation_id": f"corr-{data}"})
    async with consuming(redis_server.port, handler) as me:
        await settled(redis, 1)
        await eventually(lambda: me.tally.dead.total() == 2)
    assert [line["correlation_id"] for line in log("entry.parked")] == ["corr-late"]
    assert [line["correlation_id"] for line in log("entry.unreadable")] == ["corr-stumble"]
    assert {line["correlation_id"] for line in log("entry.dead")} == {"corr-no", "corr-stumble"}


async def test_a_group_that_is_not_ours_is_a_warning_at_the_start(
    redis: Redis, redis_server: RedisServer, log: Callable[[str], list[dict[str, Any]]]
) -> None:
    async with consuming(redis_server.port, Told(), name="first") as first:
        await eventually(lambda: first.consumer.ready_at is not None)
    assert not log("groups.foreign")
    await redis.xgroup_create(STREAM.name, "reads-along", "0")
    async with consuming(redis_server.port, Told(), name="second"):
        await eventually(lambda: log("groups.foreign"))
    (line,) = log("groups.foreign")
    assert (line["level"], line["stream"], line["groups"]) == ("warning", STREAM.name, ["reads-along"])
