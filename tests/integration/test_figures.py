"""A stream's figures: exact in every state in which Redis's own lag is wrong, and zeros where there is nothing."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from common import figures
from common.figures import StreamFigures
from common.redis_border import Scripts
from tests.integration.workbench import STREAM, lay, make_groups, settle

ADDED, READ = 100, 50


async def read(redis: Redis, now: float | None = None) -> StreamFigures:
    return await figures.read(Scripts(redis), STREAM, now)


async def half_read(redis: Redis) -> list[str]:
    """100 entries of which "me" has read 50."""
    await make_groups(redis)
    async with redis.pipeline(transaction=False) as pipeline:
        for n in range(1, ADDED + 1):
            pipeline.xadd(STREAM.name, {"data": "x"}, id=f"{n}-0")
        await pipeline.execute()
    await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"}, count=READ)
    return [f"{n}-0" for n in range(1, ADDED + 1)]


async def bury(redis: Redis, entry_id: str) -> None:
    keys = [STREAM.name, STREAM.dead_key, STREAM.ledger_key]
    args: list[str | int] = [STREAM.group, STREAM.dead_group, "me", "", entry_id, "rejected", 1, "{}"]
    assert await Scripts(redis).run("bury", keys, args) == [1]


# The states in which lag was measured (docs/decisions): what is settled, what is dead, how many more are read,
# how many more are added; then backlog, pending, dead.
STATES: dict[str, tuple[slice, list[int], int, int, tuple[int, int, int]]] = {
    "nothing settled": (slice(0, 0), [], 0, 0, (50, 50, 0)),
    "all that was read is settled": (slice(0, 50), [], 0, 0, (50, 0, 0)),
    "the oldest is pending": (slice(1, 50), [], 0, 0, (50, 1, 0)),
    "the youngest is pending": (slice(0, 49), [], 0, 0, (50, 1, 0)),
    "the oldest is dead": (slice(1, 50), [0], 0, 0, (50, 0, 1)),
    "the oldest is dead, ten more are in flight": (slice(1, 50), [0], 10, 0, (40, 10, 1)),
    "the oldest is dead, all the rest is settled": (slice(1, 100), [0], 50, 0, (0, 0, 1)),
    "the same, and seven have come": (slice(1, 100), [0], 50, 7, (7, 0, 1)),
    "all settled": (slice(0, 100), [], 50, 0, (0, 0, 0)),
    "all settled, and seven have come": (slice(0, 100), [], 50, 7, (7, 0, 0)),
}


@pytest.mark.parametrize(("settled", "dead", "more_read", "more_added", "want"), STATES.values(), ids=STATES)
async def test_the_backlog_is_exact(
    redis: Redis,
    settled: slice,
    dead: list[int],
    more_read: int,
    more_added: int,
    want: tuple[int, int, int],
) -> None:
    ids = await half_read(redis)
    for n in dead:
        await bury(redis, ids[n])
    if more_read:
        await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"}, count=more_read)
    if ids[settled]:
        await settle(redis, *ids[settled])
    for _ in range(more_added):
        await redis.xadd(STREAM.name, {"data": "x"})
    found = await read(redis)
    assert (found.backlog, found.pending, sum(found.dead.values())) == want
    assert (found.length, found.entries_added, found.imbalance) == (sum(want), ADDED + more_added, 0)


async def test_everything_there_is_to_say(redis: Redis) -> None:
    await lay(
        redis,
        live={"2000-0": ("a", 1), "3000-0": ("b", 1), "4000-0": ("b", 1)},
        dead={"1000-0": ("invalid", 1), "1500-0": ("rejected", 1), "1600-0": ("rejected", 2)},
        backlog=["5000-0"],
        idle=0,
    )
    found = await read(redis, now=10.0)
    assert (found.backlog, found.pending, found.dead) == (1, 3, {"invalid": 1, "rejected": 2})
    assert {c.name: c.pending for c in found.consumers} == {"a": 1, "b": 2}
    assert all(0 <= c.idle_seconds < 5 for c in found.consumers)
    assert found.oldest_age_seconds == 8.0  # what is dead waits for an operator, and does not age
    assert (found.length, found.entries_added, found.ledger) == (7, 7, {"base": 0})


AGES: dict[str, tuple[dict[str, Any], float | None]] = {
    "the oldest that is pending": ({"live": {"2000-0": ("a", 1)}, "backlog": ["3000-0"]}, 8.0),
    "with none pending, the oldest that is not read": ({"backlog": ["3000-0", "4000-0"]}, 7.0),
    "nothing but dead letters": ({"dead": {"1000-0": ("invalid", 1)}}, None),
    "nothing": ({}, None),
    "an id ahead of our clock": ({"backlog": ["99000-0"]}, 0.0),
}


@pytest.mark.parametrize(("given", "age"), AGES.values(), ids=AGES)
async def test_the_oldest_age_is_of_what_is_not_settled(
    redis: Redis, given: dict[str, Any], age: float | None
) -> None:
    await lay(redis, **given)
    assert (await read(redis, now=10.0)).oldest_age_seconds == age


async def test_without_a_stream_all_figures_are_zero_and_the_ledger_is_still_told(redis: Redis) -> None:
    assert await read(redis) == StreamFigures()
    await redis.hset(STREAM.ledger_key, "delivered", 7)
    assert await read(redis) == StreamFigures(ledger={"delivered": 7})


async def test_without_groups_all_there_is_counts_as_backlog(redis: Redis) -> None:
    await redis.xadd(STREAM.name, {"data": "x"}, id="1000-0")
    found = await read(redis, now=10.0)
    assert (found.backlog, found.pending, found.dead, found.imbalance) == (1, 0, {}, 0)
    assert found.oldest_age_seconds == 9.0


async def test_what_was_trimmed_before_it_was_read_shows_as_imbalance(redis: Redis) -> None:
    await lay(redis, backlog=[f"{n}-0" for n in range(1, 11)])
    await redis.xtrim(STREAM.name, maxlen=7, approximate=False)
    assert (await read(redis)).imbalance == 3
