"""Settlement: in batches, sent again until Redis has it, and counted once."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from redis.asyncio import Redis

from common.entries import Entry, Hand
from common.outcomes import DELIVERED, DUPLICATE, Dead, Delivered, Reason
from common.redis_border import Away, RedisFault
from common.settlement import AT_ONCE, BATCH, Settlement, TurnLost, no_figures
from tests.integration.workbench import STREAM, Counts, LosesReplies, State, imbalance, lay, state
from tests.support import RedisServer, eventually

RESPONSES = "queue:quota_response"


class Settling:
    """A settlement and the entries it is to end."""

    def __init__(self, redis: Redis, **options: Any) -> None:
        self.hand = Hand()
        self.counts = Counts()
        self.scripts = LosesReplies(redis)
        self.turns_lost = 0
        self.settlement = Settlement(
            self.scripts,
            STREAM,
            "me",
            "service",
            self.hand,
            self.counts,
            turn_lost=self._lose_turn,
            **options,
        )

    def _lose_turn(self) -> None:
        self.turns_lost += 1

    async def holding(self, redis: Redis, n: int, **laid: Any) -> list[Entry]:
        """n entries, pending and in hand."""
        ids = [f"{i}-0" for i in range(1, n + 1)]
        await lay(redis, live=dict.fromkeys(ids, ("me", 1)), **laid)
        entries = [Entry(entry_id.encode(), b"x", "c", None, 1, 0.0) for entry_id in ids]
        for entry in entries:
            entry.reply = b"{}"
            self.hand.take([entry])
        return entries


async def test_many_entries_end_in_few_calls(redis: Redis) -> None:
    me = Settling(redis)
    entries = await me.holding(redis, 2 * AT_ONCE + 1)
    for entry in entries:
        me.settlement.delivered([entry], DELIVERED)
    await me.settlement.flush()
    assert me.scripts.runs == {"settle": 3}
    assert await state(redis) == State(ledger={"delivered": len(entries)})
    assert (me.counts.delivered, len(me.hand)) == (len(entries), 0)
    assert me.settlement.ended.is_set()


async def test_a_settlement_whose_reply_was_lost_is_sent_again_and_counted_once(redis: Redis) -> None:
    me = Settling(redis, figures=lambda message: message or no_figures(message))
    settled, duplicate, dead = await me.holding(redis, 3)
    settled.message = (1500, 2000, 10, 1)
    me.scripts.lose.update({"settle": 2, "bury": 2})
    faults: list[RedisFault] = []

    def on_fault(fault: RedisFault) -> float:
        faults.append(fault)
        return 0.01

    running = asyncio.create_task(me.settlement.run(on_fault))
    try:
        me.settlement.delivered([settled], DELIVERED)
        me.settlement.delivered([duplicate], DUPLICATE)
        me.settlement.died(dead, Dead(Reason.REJECTED, "no"))
        await eventually(lambda: not len(me.hand))
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert len(faults) == 2  # each time both were tried
    assert (await state(redis)).ledger == {
        "audio_ms": 1500,
        "connection_ms": 2000,
        "data_bytes": 10,
        "dead:rejected": 1,
        "delivered": 1,
        "duplicate": 1,
        "request_count": 1,
    }
    assert await imbalance(redis) == 0


async def test_a_failed_flush_keeps_what_has_not_ended_and_its_order(redis: Redis) -> None:
    me = Settling(redis)
    entries = await me.holding(redis, 3)
    for entry in entries:
        me.settlement.delivered([entry], DELIVERED)
    me.scripts.lose["settle"] = 1
    with pytest.raises(Away):
        await me.settlement.flush()
    assert len(me.hand) == 3
    await me.settlement.flush()
    assert len(me.hand) == 0


async def test_two_flushes_at_once_count_an_entry_once(redis: Redis, redis_server: RedisServer) -> None:
    me = Settling(redis)
    entries = await me.holding(redis, 3)
    for entry in entries[:2]:
        me.settlement.delivered([entry], DELIVERED)
    redis_server.pause()
    try:
        flushes = [asyncio.create_task(me.settlement.flush()) for _ in range(2)]
        await asyncio.sleep(0.02)
        me.settlement.delivered([entries[2]], DELIVERED)
    finally:
        redis_server.resume()
    await asyncio.gather(*flushes)
    assert me.counts.delivered == 3
    assert await state(redis) == State(ledger={"delivered": 3})


async def test_a_dead_letter_keeps_why_it_died(redis: Redis) -> None:
    me = Settling(redis, now=lambda: 1234.5)
    (entry,) = await me.holding(redis, 1)
    entry.attempts = 7
    me.settlement.died(entry, Dead(Reason.REJECTED, "no such product", 422, "excerpt"))
    await me.settlement.flush()
    assert (await state(redis)).dead == {"1-0": ("rejected", 7)}
    assert me.counts.dead == {Reason.REJECTED: 1}
    assert json.loads(await redis.hget(STREAM.dead_key, "1-0") or b"") == {
        "reason": "rejected",
        "error": "no such product",
        "http_status": 422,
        "attempts": 7,
        "added_at": 0.001,
        "died_at": 1234.5,
        "service": "service",
        "response_excerpt": "excerpt",
    }


async def test_a_death_that_another_has_decided_is_not_counted(redis: Redis) -> None:
    me = Settling(redis)
    (entry,) = await me.holding(redis, 1)
    await redis.xclaim(STREAM.name, STREAM.group, "other", 0, ["1-0"], justid=True)
    me.settlement.died(entry, Dead(Reason.REJECTED, "no"))
    await me.settlement.flush()
    assert me.counts.dead == {}
    assert len(me.hand) == 0
    assert (await state(redis)).live == {"1-0": ("other", 1)}


async def test_a_death_of_what_has_vanished_is_counted_as_a_loss(redis: Redis) -> None:
    me = Settling(redis)
    (entry,) = await me.holding(redis, 1, deleted=["1-0"])
    me.settlement.died(entry, Dead(Reason.REJECTED, "no"))
    await me.settlement.flush()
    assert (me.counts.dead, me.counts.vanished) == ({}, 1)


@pytest.mark.parametrize("outcome", [DELIVERED, Dead(Reason.INVALID, "no")], ids=["settle", "bury"])
async def test_whoever_has_lost_the_turn_ends_nothing_and_is_told(
    redis: Redis, outcome: Delivered | Dead
) -> None:
    me = Settling(redis, token="me")
    (entry,) = await me.holding(redis, 1)
    before = await state(redis)
    for _ in range(2):
        if isinstance(outcome, Dead):
            me.settlement.died(entry, outcome)
        else:
            me.settlement.delivered([entry], outcome)
        if not me.turns_lost:
            assert not await me.settlement.flushed()
    with pytest.raises(TurnLost):
        await me.settlement.flush()
    assert me.turns_lost == 1
    assert await state(redis) == before


async def test_a_request_that_another_has_answered_is_not_counted(redis: Redis) -> None:
    me = Settling(redis, response_stream=RESPONSES)
    mine, others = await me.holding(redis, 2)
    await redis.xclaim(STREAM.name, STREAM.group, "other", 0, ["2-0"], justid=True)
    for entry in (mine, others):
        me.settlement.delivered([entry], DELIVERED)
    await me.settlement.flush()
    assert (me.counts.delivered, len(me.hand)) == (1, 0)
    assert await redis.xlen(RESPONSES) == 1


async def test_an_entry_that_is_alone_waits_for_company_only_for_milliseconds(redis: Redis) -> None:
    me = Settling(redis)
    (entry,) = await me.holding(redis, 1)
    await me.settlement.flush()
    running = asyncio.create_task(me.settlement.run(lambda fault: 0.1))
    try:
        began = time.monotonic()
        me.settlement.delivered([entry], DELIVERED)
        await eventually(lambda: not len(me.hand), every=0.001)
        assert time.monotonic() - began < 0.5
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_entries_that_are_handed_over_leave_the_hand(redis: Redis) -> None:
    me = Settling(redis)
    entries = await me.holding(redis, BATCH + 2)
    entries[0].deliveries = 3
    await redis.xclaim(STREAM.name, STREAM.group, "other", 0, ["2-0"], justid=True)
    assert await me.settlement.hand_over(entries) == BATCH + 1
    assert len(me.hand) == 0
    live = (await state(redis)).live or {}
    assert live["1-0"] == ("handover", 3)
    assert live["2-0"] == ("other", 1)
