"""The lease: what this process works on stays its own; what is somebody else's by now is let go."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from common.entries import Entry, Hand
from common.lease import Lease
from common.settlement import Settlement
from tests.integration.workbench import STREAM, Counts, LosesReplies, lay, state
from tests.support import RedisServer, eventually

VISIBILITY = 30.0
ME = ("me", 1)


class Held:
    """A hand of entries with their lease, on a clock of its own."""

    def __init__(self, redis: Redis, *ids: str) -> None:
        self.now = 100.0
        self.hand = Hand()
        self.counts = Counts()
        self.lost: list[Entry] = []
        self.scripts = LosesReplies(redis)
        self.settlement = Settlement(
            self.scripts, STREAM, "me", "service", self.hand, self.counts, turn_lost=lambda: None
        )
        self.lease = Lease(self.hand, self.settlement, VISIBILITY, self._lose, lambda: self.now)
        self.entries = [Entry(entry_id.encode(), b"x", "", None, 1, self.now) for entry_id in ids]
        for entry in self.entries:
            self.hand.take([entry])

    def _lose(self, entries: list[Entry]) -> None:
        self.lost += entries
        self.hand.drop(entries)


async def idle_ms(redis: Redis) -> dict[str, int]:
    rows = await redis.xpending_range(STREAM.name, STREAM.group, "-", "+", 100)
    return {row["message_id"].decode(): row["time_since_delivered"] for row in rows}


async def test_what_is_mine_is_renewed_with_its_count(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": ME})
    held = Held(redis, "1-0")
    held.entries[0].deliveries = 4
    held.now += 1
    await held.lease.renew(held.entries)
    assert (await state(redis)).live == {"1-0": ("me", 4), "2-0": ME}
    idle = await idle_ms(redis)
    assert idle["1-0"] < 60_000 < idle["2-0"]
    assert held.entries[0].leased_at == held.now
    assert held.lost == []


async def test_what_another_took_or_settled_or_deleted_is_lost(redis: Redis) -> None:
    live = {"1-0": ME, "2-0": ("other", 1), "3-0": ME}
    await lay(redis, live=live, deleted=["3-0"])
    held = Held(redis, "1-0", "2-0", "3-0", "4-0")
    await held.lease.renew(list(held.hand))
    assert [entry.id for entry in held.lost] == [b"2-0", b"3-0", b"4-0"]
    assert held.counts.vanished == 1
    assert (await state(redis)).live == {"1-0": ME, "2-0": ("other", 1)}


async def test_what_was_settled_meanwhile_is_not_called_lost(redis: Redis) -> None:
    await lay(redis)
    held = Held(redis, "1-0", "2-0")
    held.entries[0].ended = True
    entries = list(held.hand)
    held.hand.drop([held.entries[1]])
    await held.lease.renew(entries)
    assert held.lost == []


async def test_a_count_that_changes_during_a_renewal_is_written_with_the_next(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(redis, live={"1-0": ("me", 4)})
    held = Held(redis, "1-0")
    (entry,) = held.entries
    entry.deliveries = 4
    await held.lease.renew([entry])  # connects
    redis_server.pause()
    try:
        renewing = asyncio.create_task(held.lease.renew([entry]))
        await eventually(lambda: held.scripts.begun["renew"] == 2)
        entry.deliveries, entry.leased_at = 1, float("-inf")  # it has proven harmless
    finally:
        redis_server.resume()
    await renewing
    assert entry.leased_at == float("-inf")


async def test_a_renewal_that_waited_writes_nothing_for_what_was_lost_and_taken_over_anew(
    redis: Redis, redis_server: RedisServer
) -> None:
    await lay(
        redis, live={"1-0": ("me", 2), "2-0": ME}
    )  # 1-0 as from a crash: this process was paused for too long
    held = Held(redis, "1-0", "2-0")
    old, other = held.entries
    await held.settlement.renew([other])  # connects
    redis_server.pause()
    try:
        renewing = asyncio.create_task(held.settlement.renew([other]))
        waiting = asyncio.create_task(held.settlement.renew([old]))
        await eventually(lambda: held.scripts.begun["renew"] == 2)
        held.hand.drop([old])
        held.hand.take([Entry(b"1-0", b"x", "", None, 2, held.now)])
    finally:
        redis_server.resume()
    assert (await renewing, await waiting) == ([], [old])
    assert (await state(redis)).live == {"1-0": ("me", 2), "2-0": ME}


async def test_what_comes_and_goes_faster_costs_nothing(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": ME})
    held = Held(redis, "1-0", "2-0")
    held.now += VISIBILITY / 3
    held.entries[1].leased_at = held.now
    assert held.lease._due() == [held.entries[0]]


async def test_after_a_pause_it_renews_before_anything_is_claimed(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    held = Held(redis, "1-0")
    await held.lease.catch_up()
    assert held.scripts.runs["renew"] == 0
    held.now += VISIBILITY / 3 + 1
    await held.lease.catch_up()
    assert held.scripts.runs["renew"] == 1
    await held.lease.catch_up()
    assert held.scripts.runs["renew"] == 1
