"""The scripts with which an entry comes in: make_groups, read, fetch.

What is read fits the reader; what is dead is not read again; what is not ours is not brought.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from redis.asyncio import Redis

from common.redis_border import Full, GroupGone, Scripts
from common.streams import MAX_ENTRY_BYTES
from tests.integration.workbench import (
    STREAM,
    State,
    imbalance,
    lay,
    make_groups,
    out_of_memory,
    settle,
    state,
)

ME, OTHER = ("me", 1), ("other", 1)
INVALID = ("invalid", 1)
PLENTY = 32 * 1024 * 1024


async def read(redis: Redis, count: int = 100, room: int = PLENTY, token: str = "") -> list[Any]:
    keys = [STREAM.name, STREAM.turn_key] if token else [STREAM.name]
    args: list[str | int] = [STREAM.group, STREAM.dead_group, "me", count, room, MAX_ENTRY_BYTES, token]
    return cast(list[Any], await Scripts(redis).run("read", keys, args))


async def fetch(redis: Redis, *ids: str) -> tuple[list[bytes], list[list[Any]]]:
    args: list[str | int] = [STREAM.group, "me", MAX_ENTRY_BYTES, *ids]
    vanished, *rows = await Scripts(redis).run("fetch", [STREAM.name, STREAM.ledger_key], args)
    return vanished, rows


async def base(redis: Redis) -> int:
    return int(await redis.hget(STREAM.ledger_key, "base") or 0)


# -- make_groups -------------------------------------------------------------------------------------


async def test_both_groups_are_made_with_their_stream_and_a_second_time_nothing_changes(redis: Redis) -> None:
    assert await make_groups(redis) == [1, 1, 1]
    assert await state(redis) == State()
    assert await base(redis) == 0
    assert await make_groups(redis) == [0, 0, 0]
    assert await state(redis) == State()


async def test_a_new_group_reads_what_was_there_before_it(redis: Redis) -> None:
    await redis.xadd(STREAM.name, {"data": "early"}, id="1-0")
    await make_groups(redis)
    assert [row[:2] for row in (await read(redis))[1:]] == [[b"1-0", b"early"]]
    assert await imbalance(redis) == 0


async def test_nobody_reads_new_entries_through_the_twin(redis: Redis) -> None:
    await make_groups(redis)
    await redis.xadd(STREAM.name, {"data": "x"})
    assert not await redis.xreadgroup(STREAM.dead_group, "somebody", {STREAM.name: ">"})


@pytest.mark.parametrize(
    ("destroyed", "reply"), [(STREAM.group, [1, 0, 0]), (STREAM.dead_group, [0, 1, 0])], ids=["live", "twin"]
)
async def test_the_group_that_is_missing_is_made_and_the_other_stays(
    redis: Redis, destroyed: str, reply: list[int]
) -> None:
    await lay(redis, live={"2-0": ME}, dead={"1-0": INVALID})
    before = await state(redis)
    await redis.xgroup_destroy(STREAM.name, destroyed)
    assert await make_groups(redis) == reply
    after = await state(redis)
    assert after.live == ({} if destroyed == STREAM.group else before.live)
    assert after.dead == before.dead
    assert await imbalance(redis) == 0


async def test_a_twin_made_again_shows_the_dead_as_their_documents_tell_and_counts_what_is_gone(
    redis: Redis,
) -> None:
    dead = {"1-0": ("rejected", 4), "2-0": ("poison", 1), "3-0": ("conflict", 2)}
    await lay(redis, dead=dead, deleted=["2-0"])
    await redis.xgroup_destroy(STREAM.name, STREAM.dead_group)
    assert await make_groups(redis) == [0, 1, 0]
    del dead["2-0"]
    assert await state(redis) == State(
        entries=["1-0", "3-0"], dead=dead, documents=["1-0", "3-0"], ledger={"vanished": 1}
    )
    assert await imbalance(redis) == 0


async def test_documents_whose_stream_has_gone_do_not_outlive_it(redis: Redis) -> None:
    await lay(redis, dead={"1-0": INVALID, "2-0": INVALID})
    await redis.delete(STREAM.name)
    assert await make_groups(redis) == [1, 1, 1]
    assert await state(redis) == State(ledger={"vanished": 2})
    assert await imbalance(redis) == 0


async def test_books_begin_where_the_stream_stands_when_it_was_used_before(redis: Redis) -> None:
    for n in range(5):
        await redis.xadd(STREAM.name, {"data": "x"}, id=f"{n + 1}-0")
    await redis.xdel(STREAM.name, "1-0", "3-0")  # before us: not our loss
    assert await make_groups(redis) == [1, 1, 1]
    assert await imbalance(redis) == 0


@pytest.mark.parametrize("added", [1, 2, 5])
async def test_books_begin_anew_when_another_stream_has_taken_the_name(redis: Redis, added: int) -> None:
    await lay(redis, backlog=["1-0", "2-0", "3-0"])
    await read(redis)
    assert await settle(redis, "1-0", "2-0") == 2
    await redis.delete(STREAM.name)
    for n in range(added):
        await redis.xadd(STREAM.name, {"data": "new"}, id=f"9-{n}")
    assert await make_groups(redis) == [1, 1, 1]
    assert (await state(redis)).ledger == {"delivered": 2}
    assert await imbalance(redis) == 0


async def test_out_of_memory_no_group_is_made_and_the_fault_says_why(redis: Redis) -> None:
    async with out_of_memory(redis):
        with pytest.raises(Full):
            await make_groups(redis)
    assert not await redis.exists(STREAM.name)


async def test_out_of_memory_groups_that_are_there_are_found(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    before = await state(redis)
    async with out_of_memory(redis):
        assert await make_groups(redis) == [0, 0, 0]
    assert await state(redis) == before


# -- read --------------------------------------------------------------------------------------------


async def test_what_is_read_is_pending_under_the_reader_with_count_one(redis: Redis) -> None:
    await lay(redis, backlog=["1-0", "2-0", "3-0"])
    assert [row[0] for row in (await read(redis, count=2))[1:]] == [b"1-0", b"2-0"]
    assert await state(redis) == State(entries=["1-0", "2-0", "3-0"], live={"1-0": ME, "2-0": ME})


async def test_a_row_brings_the_three_known_fields_and_nil_for_a_missing_one(redis: Redis) -> None:
    await make_groups(redis)
    known = {"traceparent": "t", "other": "o", "data": "d", "correlation_id": "c"}
    await redis.xadd(STREAM.name, cast(Any, known), id="1-0")
    await redis.xadd(STREAM.name, {"other": "o"}, id="2-0")
    assert (await read(redis))[1:] == [[b"1-0", b"d", b"c", b"t"], [b"2-0", None, None, None]]


async def test_an_empty_read_tells_from_where_to_listen(redis: Redis) -> None:
    await make_groups(redis)
    assert await read(redis) == [b"0-0"]
    await redis.xadd(STREAM.name, {"data": "x"}, id="7-3")
    assert (await read(redis))[0] == b""
    await redis.xdel(STREAM.name, "7-3")
    assert await read(redis) == [b"7-3"]


async def test_after_a_read_of_nothing_but_dead_entries_it_listens_behind_them(redis: Redis) -> None:
    """Not at the end of the stream: something may wait there that this read had no room for."""
    await lay(redis, dead={"1-0": INVALID, "2-0": INVALID}, backlog=["3-0"])
    await redis.xgroup_setid(STREAM.name, STREAM.group, "0")
    assert await read(redis, count=2) == [b"2-0"]
    assert [row[0] for row in (await read(redis, count=2))[1:]] == [b"3-0"]


async def test_an_entry_at_the_limit_is_carried_and_one_beyond_it_is_cut_to_its_length(redis: Redis) -> None:
    await make_groups(redis)
    fits = MAX_ENTRY_BYTES - len("data")
    await redis.xadd(STREAM.name, {"data": b"x" * fits}, id="1-0")
    await redis.xadd(STREAM.name, {"data": b"x" * (fits + 1)}, id="2-0")
    await redis.xadd(STREAM.name, {"data": b"x", "other": b"y" * 8_000_000}, id="3-0")
    rows = (await read(redis))[1:]
    assert [(row[0], len(row[1]) if isinstance(row[1], bytes) else row[1]) for row in rows] == [
        (b"1-0", fits),
        (b"2-0", MAX_ENTRY_BYTES + 1),
        (b"3-0", len("dataxother") + 8_000_000),
    ]


@pytest.mark.parametrize("size", [200_000, 5_000_000], ids=["long", "too long"])
async def test_fifty_huge_entries_are_not_read_at_once(redis: Redis, size: int) -> None:
    await lay(redis, backlog=[f"{n}-0" for n in range(1, 51)], data=b"x" * size)
    room = 1_000_000
    taken = len(await read(redis, count=50, room=room)) - 1
    assert 1 <= taken <= room // size + 1


async def test_a_run_of_huge_entries_after_small_ones_is_not_read_at_once(redis: Redis) -> None:
    await lay(redis, backlog=[f"{n}-0" for n in range(1, 101)], data=b"small")
    for n in range(101, 151):
        await redis.xadd(STREAM.name, {"data": b"x" * 200_000}, id=f"{n}-0")
    rows = (await read(redis, count=150, room=1_000_000))[1:]
    assert len(rows) > 100
    assert sum(len(row[1]) for row in rows) <= 1_000_000 + MAX_ENTRY_BYTES


async def test_many_small_entries_are_read_in_one_call(redis: Redis) -> None:
    await lay(redis, backlog=[f"{n}-0" for n in range(1, 501)], data=b"x" * 500)
    assert len(await read(redis, count=500)) == 501


async def test_dead_entries_are_acknowledged_unread_when_the_live_group_was_made_again(redis: Redis) -> None:
    """Made again from 0, the group meets all that is in the stream: also what is dead, between and after the rest."""
    await lay(redis, dead={"2-0": INVALID, "4-0": INVALID}, backlog=["1-0", "3-0", "5-0"])
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    await make_groups(redis)
    assert [row[0] for row in (await read(redis))[1:]] == [b"1-0", b"3-0", b"5-0"]
    assert await state(redis) == State(
        entries=["1-0", "2-0", "3-0", "4-0", "5-0"],
        live={"1-0": ME, "3-0": ME, "5-0": ME},
        dead={"2-0": INVALID, "4-0": INVALID},
        documents=["2-0", "4-0"],
    )


async def test_what_died_within_the_last_millisecond_is_not_read_either(redis: Redis) -> None:
    await lay(redis, dead={"5-1": INVALID, "5-3": INVALID}, backlog=["5-0", "5-2", "5-4"])
    await redis.xgroup_setid(STREAM.name, STREAM.group, "0")
    assert [row[0] for row in (await read(redis))[1:]] == [b"5-0", b"5-2", b"5-4"]


async def test_behind_more_dead_entries_than_one_read_takes_the_rest_is_reached(redis: Redis) -> None:
    dead = {f"{n}-0": INVALID for n in range(1, 41)}
    await lay(redis, dead=dead, backlog=["41-0"])
    await redis.xgroup_setid(STREAM.name, STREAM.group, "0")
    seen: list[bytes] = []
    for _ in range(6):
        seen += [row[0] for row in (await read(redis, count=8))[1:]]
    assert seen == [b"41-0"]


@pytest.mark.parametrize("missing", [STREAM.group, STREAM.dead_group])
async def test_without_one_of_the_groups_nothing_is_read(redis: Redis, missing: str) -> None:
    await lay(redis, backlog=["1-0"])
    await redis.xgroup_destroy(STREAM.name, missing)
    before = await state(redis)
    with pytest.raises(GroupGone):
        await read(redis)
    assert await state(redis) == before


@pytest.mark.parametrize("holder", ["somebody", None])
async def test_without_the_turn_nothing_is_read(redis: Redis, holder: str | None) -> None:
    await lay(redis, backlog=["1-0"])
    if holder is not None:
        await redis.set(STREAM.turn_key, holder)
    before = await state(redis)
    assert await read(redis, token="mine") == [-1]
    assert await state(redis) == before


async def test_out_of_memory_reading_goes_on(redis: Redis) -> None:
    await lay(redis, backlog=["1-0"])
    async with out_of_memory(redis):
        assert len(await read(redis)) == 2


# -- fetch -------------------------------------------------------------------------------------------


async def test_fetch_brings_own_entries_with_their_count_and_leaves_out_the_others(redis: Redis) -> None:
    await lay(
        redis,
        live={"1-0": ("me", 4), "2-0": OTHER, "3-0": ME},
        dead={"4-0": INVALID},
        backlog=["5-0"],
        deleted=["3-0"],
    )
    ids = ("1-0", "2-0", "3-0", "4-0", "5-0", "6-0")
    assert await fetch(redis, *ids) == ([b"3-0"], [[b"1-0", b"session", None, None, 4]])
    want = State(
        entries=["1-0", "2-0", "4-0", "5-0"],
        live={"1-0": ("me", 4), "2-0": OTHER},
        dead={"4-0": INVALID},
        documents=["4-0"],
        ledger={"vanished": 1},
    )
    assert await state(redis) == want
    assert (await fetch(redis, *ids))[0] == []
    assert await state(redis) == want
    assert await imbalance(redis) == 0


async def test_fetch_renews_the_lease(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    await fetch(redis, "1-0")
    row = (await redis.xpending_range(STREAM.name, STREAM.group, "-", "+", 1))[0]
    assert row["time_since_delivered"] < 10_000


async def test_fetch_cuts_what_is_too_long_to_its_length(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME}, data=b"x" * (MAX_ENTRY_BYTES + 1))
    _, rows = await fetch(redis, "1-0")
    assert rows == [[b"1-0", len("data") + MAX_ENTRY_BYTES + 1, None, None, 1]]
