"""Where an entry is, as the chaos run's judge sees it: on a real server, in every state an entry can be in."""

from __future__ import annotations

from redis.asyncio import Redis

from common.streams import GREATEST_ID, Stream
from sandbox.chaos.views import Oddities, delete, examine, trim

STREAM = Stream("queue:usage_records", "usage_forwarder")


async def filled(redis: Redis, entries: int, read: int, dead: int = 0) -> list[str]:
    """So many entries, the first of them read by one consumer, and the first of these dead."""
    await redis.xgroup_create(STREAM.name, STREAM.group, "0", mkstream=True)
    await redis.xgroup_create(STREAM.name, STREAM.dead_group, GREATEST_ID)
    ids = [await redis.xadd(STREAM.name, {"data": str(n)}) for n in range(entries)]
    if read:
        await redis.xreadgroup(STREAM.group, "me", {STREAM.name: ">"}, count=read)
    for one in ids[:dead]:
        await redis.xclaim(STREAM.name, STREAM.dead_group, "invalid", 0, [one], force=True, justid=True)
        await redis.xack(STREAM.name, STREAM.group, one)
    return [one.decode() for one in ids]


async def test_a_stream_that_is_not_there_has_no_oddities(redis: Redis) -> None:
    assert await examine(redis, STREAM) == Oddities()


async def test_unread_pending_and_dead_entries_are_each_in_one_view(redis: Redis) -> None:
    await filled(redis, entries=6, read=4, dead=2)
    assert await examine(redis, STREAM) == Oddities()


async def test_an_entry_that_was_read_and_is_in_no_view_is_a_stray(redis: Redis) -> None:
    ids = await filled(redis, entries=3, read=2)
    await redis.xack(STREAM.name, STREAM.group, ids[0])
    assert await examine(redis, STREAM) == Oddities(strays=[ids[0]])


async def test_an_entry_in_both_views_is_a_double(redis: Redis) -> None:
    ids = await filled(redis, entries=3, read=2)
    await redis.xclaim(STREAM.name, STREAM.dead_group, "invalid", 0, [ids[1]], force=True)
    assert await examine(redis, STREAM) == Oddities(doubles=[ids[1]])


async def test_what_is_in_a_view_and_gone_from_the_stream_is_a_ghost(redis: Redis) -> None:
    ids = await filled(redis, entries=4, read=3, dead=1)
    await redis.xdel(STREAM.name, ids[0], ids[1])
    assert sorted((await examine(redis, STREAM)).ghosts) == ids[:2]


async def test_dead_entries_of_a_group_that_was_made_again_are_in_one_view(redis: Redis) -> None:
    await filled(redis, entries=3, read=2, dead=1)
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    await redis.xgroup_create(STREAM.name, STREAM.group, "0")
    assert await examine(redis, STREAM) == Oddities()


async def test_a_trim_says_what_it_took_and_from_where(redis: Redis) -> None:
    ids = await filled(redis, entries=6, read=3, dead=1)
    taken = await trim(redis, STREAM, 4)
    assert taken == dict(zip(ids, ("dead", "pending", "pending", "unread"), strict=False))
    assert await redis.xlen(STREAM.name) == 2


async def test_deleting_takes_the_oldest_of_a_view_alone_and_nothing_twice(redis: Redis) -> None:
    ids = await filled(redis, entries=6, read=5, dead=2)
    assert await delete(redis, STREAM, "pending", 2) == {ids[2]: "pending", ids[3]: "pending"}
    assert await delete(redis, STREAM, "pending", 2) == {ids[4]: "pending"}
    assert await delete(redis, STREAM, "dead", 5) == {ids[0]: "dead", ids[1]: "dead"}
    assert await delete(redis, STREAM, "dead", 5) == {}
