"""The reclaimer: what nobody works on any more comes back, page by page, when it is time to look."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from common import reclaimer
from common.entries import Entry, Hand
from common.reclaimer import Reclaimer, Swept
from common.settlement import Settlement, TurnLost
from common.streams import HANDOVER
from tests.integration.workbench import STREAM, Counts, LosesReplies, State, consumers, imbalance, lay, state

VISIBILITY, EVERY = 20.0, 5.0


class Found:
    """A reclaimer on a clock of its own."""

    def __init__(self, redis: Redis, token: str | None = None, dead_retention: float | None = None) -> None:
        self.now = 100.0
        self.hand = Hand()
        self.counts = Counts()
        self.scripts = LosesReplies(redis)
        settlement = Settlement(
            self.scripts, STREAM, "me", "service", self.hand, self.counts, turn_lost=lambda: None
        )
        self.reclaimer = Reclaimer(
            self.scripts,
            STREAM,
            settlement,
            self.hand,
            visibility_timeout=VISIBILITY,
            claim_interval=EVERY,
            dead_retention=dead_retention,
            token=token,
            clock=lambda: self.now,
        )

    async def take(self, room: int = 1000) -> list[str]:
        return [row[0].decode() for row in await self.reclaimer.take(room)]

    async def take_due(self) -> list[str]:
        """All that comes while a look is due; the loop reads between."""
        taken: list[str] = []
        while self.reclaimer.due_in <= 0:
            taken += await self.take()
        return taken


async def test_at_the_start_all_that_lies_about_is_found(redis: Redis) -> None:
    live = {"1-0": ("dead", 1), "2-0": (HANDOVER, 1), "3-0": ("also dead", 1)}
    await lay(redis, live=live)
    found = Found(redis)
    assert await found.take_due() == ["2-0", "1-0", "3-0"]
    assert 0 < found.reclaimer.due_in <= reclaimer.LOOK_EVERY


async def test_what_was_handed_over_is_looked_for_more_often_than_what_the_dead_left(redis: Redis) -> None:
    found = Found(redis)
    await lay(redis)
    assert await found.take_due() == []
    await lay(redis, live={"1-0": ("dead", 1), "2-0": (HANDOVER, 1)})
    found.now += reclaimer.LOOK_EVERY
    assert await found.take_due() == ["2-0"]
    found.now += EVERY - reclaimer.LOOK_EVERY
    assert await found.take_due() == ["1-0"]


async def test_a_page_is_never_larger_than_the_room(redis: Redis) -> None:
    await lay(redis, live={f"{n}-0": ("dead", 1) for n in range(1, 251)})
    found = Found(redis)
    assert [len(await found.take(room)) for room in (7, 1000, 1000, 1000)] == [7, 100, 100, 43]
    assert await found.take_due() == []


async def test_pages_follow_each_other_without_a_pause_until_all_is_taken(redis: Redis) -> None:
    await lay(redis, live={f"{n}-0": ("dead", 1) for n in range(1, 251)})
    assert await Found(redis).take_due() == [f"{n}-0" for n in range(1, 251)]


async def test_what_vanished_is_counted(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": (HANDOVER, 1)}, deleted=["1-0", "2-0"])
    found = Found(redis)
    assert await found.take_due() == []
    assert found.counts.vanished == 2


async def test_a_new_holder_takes_everything_in_id_order(redis: Redis) -> None:
    owners = [("a", 1), (HANDOVER, 1), ("me", 1), ("b", 2)]
    ids = [f"{n}-{n % 3}" for n in range(95, 405)]
    live = {entry_id: owners[n % 4] for n, entry_id in enumerate(ids)}
    await lay(redis, live=live, idle=0)
    found = Found(redis)
    rows = await found.reclaimer.take_all()
    assert [row[0].decode() for row in rows] == ids
    assert [row[4] for row in rows] == [(2, 1, 1, 3)[n % 4] for n in range(len(ids))]


async def test_a_new_holder_that_has_lost_the_turn_again_takes_nothing(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1)})
    await redis.set(STREAM.turn_key, "somebody")
    before = await state(redis)
    found = Found(redis, token="me")
    for take in (found.reclaimer.take_all(), found.reclaimer.take(10)):
        with pytest.raises(TurnLost):
            await take
    assert await state(redis) == before


async def test_what_was_delivered_to_nobody_is_what_is_pending_and_not_in_hand(redis: Redis) -> None:
    live = {f"{n}-0": ("me", 1) for n in range(1, 1204)} | {"9998-0": ("other", 1), "9999-0": ("me", 4)}
    await lay(redis, live=live, deleted=["5-0"])
    found = Found(redis)
    for n in range(1, 1001):
        found.hand.take([Entry(f"{n}-0".encode(), b"x", "", None, 1, 0.0)])
    found.hand.drop([entry for entry in found.hand if entry.id in (b"5-0", b"6-0")])
    rows = await found.reclaimer.recover()
    assert [row[0].decode() for row in rows] == ["6-0", *(f"{n}-0" for n in range(1001, 1204)), "9999-0"]
    assert [row[4] for row in rows[-2:]] == [1, 4]  # and their counts are as they were
    assert found.counts.vanished == 1


async def test_a_sweep_removes_ghosts_and_the_names_of_the_dead(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaimer, "DEAD_CONSUMER_AFTER", 0.0)
    dead = {f"{n}-0": ("invalid", 1) for n in range(1, 251)}
    ghosts = [f"{n}-0" for n in range(1, 251, 2)]
    await lay(redis, dead=dead, live={"999-0": ("with pending", 1)}, deleted=ghosts)
    for name in ("silent", HANDOVER, "me"):
        await redis.xgroup_createconsumer(STREAM.name, STREAM.group, name)
    found = Found(redis)
    assert await found.reclaimer.sweep() == Swept(consumers=1, ghosts=len(ghosts))
    assert await found.reclaimer.sweep() == Swept(consumers=0, ghosts=0)
    assert await consumers(redis) == {"with pending", HANDOVER, "me"}
    kept = [f"{n}-0" for n in range(2, 251, 2)]
    assert await state(redis) == State(
        entries=[*kept, "999-0"],
        live={"999-0": ("with pending", 1)},
        dead=dict.fromkeys(kept, ("invalid", 1)),
        documents=sorted(kept),
        ledger={"vanished": len(ghosts)},
    )
    assert found.counts.vanished == len(ghosts)
    assert await imbalance(redis) == 0


async def test_a_sweep_discards_dead_letters_when_they_have_been_kept_for_so_long(redis: Redis) -> None:
    old = {f"{n}-0": ("rejected", 1) for n in range(1, 251)}
    await lay(redis, dead=old, live={"999-0": ("at work", 1)}, deleted=["7-0"])
    await redis.xclaim(STREAM.name, STREAM.dead_group, "rejected", 0, ["8-0"], justid=True)  # died just now
    found = Found(redis, dead_retention=60.0)
    assert await found.reclaimer.sweep() == Swept(consumers=0, ghosts=1, discarded=248)
    assert await found.reclaimer.sweep() == Swept(consumers=0, ghosts=0, discarded=0)
    assert await state(redis) == State(
        entries=["8-0", "999-0"],
        live={"999-0": ("at work", 1)},
        dead={"8-0": ("rejected", 1)},
        documents=["8-0"],
        ledger={"discarded": 248, "vanished": 1},
    )
    assert await imbalance(redis) == 0


async def test_without_a_retention_dead_letters_wait_for_an_operator(redis: Redis) -> None:
    await lay(redis, dead={"1-0": ("rejected", 1)})
    assert await Found(redis).reclaimer.sweep() == Swept(consumers=0, ghosts=0, discarded=0)
    assert (await state(redis)).dead == {"1-0": ("rejected", 1)}


async def test_a_sweep_leaves_alone_who_was_heard_of_lately(redis: Redis) -> None:
    await lay(redis)
    await redis.xgroup_createconsumer(STREAM.name, STREAM.group, "young")
    assert await Found(redis).reclaimer.sweep() == Swept(consumers=0, ghosts=0)
    assert await consumers(redis) == {"young"}
