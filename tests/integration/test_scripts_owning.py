"""The scripts with which an entry changes hands, or stays in one: renew, hand_over, take_over, and the names.

The delivery count says by cause what an entry has been through (law 8):
1 read, 2 left behind by one crash, 3 by two, 3 + n died n times alone. Nothing else counts.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from redis.asyncio import Redis

from common.redis_border import GroupGone, Scripts
from common.streams import HANDOVER, MAX_ENTRY_BYTES
from tests.integration.workbench import STREAM, State, consumers, imbalance, lay, out_of_memory, state

ME, OTHER, HANDED = ("me", 1), ("other", 1), (HANDOVER, 1)
INVALID = ("invalid", 1)
ONLY_HANDOVER, EVERYTHING = -1, 0


async def run(redis: Redis, name: str, keys: list[str], *args: str | int) -> Any:
    return await Scripts(redis).run(name, [STREAM.name, *keys], [STREAM.group, *args])


async def renew(redis: Redis, *rows: str | int) -> list[list[bytes]]:
    """Of (id, count, id, count, …)."""
    return cast(list[list[bytes]], await run(redis, "renew", [STREAM.ledger_key], "me", *rows))


async def hand_over(redis: Redis, *rows: str | int) -> int:
    handed, _ = await run(redis, "hand_over", [STREAM.ledger_key], "me", HANDOVER, *rows)
    return cast(int, handed)


async def take_over(
    redis: Redis, idle: int = 1000, cursor: bytes | str = "0-0", count: int = 100, token: str = ""
) -> list[Any]:
    keys = [STREAM.ledger_key, *([STREAM.turn_key] if token else [])]
    args: list[str | int] = ["me", HANDOVER, idle, cast(str, cursor), count, MAX_ENTRY_BYTES, token]
    return cast(list[Any], await run(redis, "take_over", keys, *args))


async def idle_ms(redis: Redis, entry_id: str) -> int:
    rows = await redis.xpending_range(STREAM.name, STREAM.group, entry_id, entry_id, 1)
    return cast(int, rows[0]["time_since_delivered"])


# -- renew -------------------------------------------------------------------------------------------

RENEW: dict[str, tuple[dict[str, Any], list[list[bytes]], State]] = {
    "mine is mine for longer, with the count that is told": (
        {"live": {"1-0": ME}},
        [[], []],
        State(entries=["1-0"], live={"1-0": ("me", 4)}),
    ),
    "what another took stays the other's": (
        {"live": {"1-0": OTHER}},
        [[b"1-0"], []],
        State(entries=["1-0"], live={"1-0": OTHER}),
    ),
    "what is settled does not come back": (
        {"live": {"2-0": ME}},
        [[b"1-0"], []],
        State(entries=["2-0"], live={"2-0": ME}),
    ),
    "what nobody has read stays unread": (
        {"backlog": ["1-0"]},
        [[b"1-0"], []],
        State(entries=["1-0"]),
    ),
    "what is dead stays dead": (
        {"dead": {"1-0": INVALID}},
        [[b"1-0"], []],
        State(entries=["1-0"], dead={"1-0": INVALID}, documents=["1-0"]),
    ),
    "what was deleted is counted as vanished": (
        {"live": {"1-0": ME}, "deleted": ["1-0"]},
        [[], [b"1-0"]],
        State(ledger={"vanished": 1}),
    ),
}


@pytest.mark.parametrize(("given", "reply", "want"), RENEW.values(), ids=RENEW)
async def test_renew(redis: Redis, given: dict[str, Any], reply: list[list[bytes]], want: State) -> None:
    await lay(redis, **given)
    assert await renew(redis, "1-0", 4) == reply
    assert await state(redis) == want
    await renew(redis, "1-0", 4)
    assert await state(redis) == want
    assert await imbalance(redis) == 0


async def test_a_renewed_entry_is_as_if_just_delivered(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": OTHER})
    assert await renew(redis, "1-0", 1, "2-0", 1) == [[b"2-0"], []]
    assert await idle_ms(redis, "1-0") < 60_000 < await idle_ms(redis, "2-0")


# -- hand_over ---------------------------------------------------------------------------------------

HAND_OVER: dict[str, tuple[dict[str, Any], int, State]] = {
    "mine goes to handover, and counts no crash": (
        {"live": {"1-0": ("me", 2)}},
        1,
        State(entries=["1-0"], live={"1-0": (HANDOVER, 2)}),
    ),
    "what another took stays the other's": (
        {"live": {"1-0": ("other", 2)}},
        0,
        State(entries=["1-0"], live={"1-0": ("other", 2)}),
    ),
    "what nobody has read stays unread": (
        {"backlog": ["1-0"]},
        0,
        State(entries=["1-0"]),
    ),
    "what is dead stays dead": (
        {"dead": {"1-0": INVALID}},
        0,
        State(entries=["1-0"], dead={"1-0": INVALID}, documents=["1-0"]),
    ),
    "what vanished is counted as a loss": (
        {"live": {"1-0": ("me", 1)}, "deleted": ["1-0"]},
        0,
        State(ledger={"vanished": 1}),
    ),
}


@pytest.mark.parametrize(("given", "handed", "want"), HAND_OVER.values(), ids=HAND_OVER)
async def test_hand_over(redis: Redis, given: dict[str, Any], handed: int, want: State) -> None:
    await lay(redis, **given)
    assert await hand_over(redis, "1-0", 2) == handed
    assert await state(redis) == want
    assert await hand_over(redis, "1-0", 2) == 0
    assert await state(redis) == want


# -- take_over ---------------------------------------------------------------------------------------

COUNTS: dict[str, tuple[tuple[str, int], int, int]] = {
    # owner and count before; idle for at least; count after
    "left behind by a first crash": (("dead", 1), 1000, 2),
    "left behind by a second crash": (("dead", 2), 1000, 3),
    "a suspect: only whoever delivers it alone counts": (("dead", 3), 1000, 3),
    "died alone twice": (("dead", 5), 1000, 5),
    "handed over": ((HANDOVER, 1), ONLY_HANDOVER, 1),
    "handed over, after a crash": ((HANDOVER, 2), ONLY_HANDOVER, 2),
    "redriven by a hand that wrote no count": ((HANDOVER, 0), ONLY_HANDOVER, 1),
    "everything is taken: another's, who is paused or dead": (("dead", 1), EVERYTHING, 2),
    "everything is taken: our own": (("me", 1), EVERYTHING, 1),
    "everything is taken: handed over": ((HANDOVER, 1), EVERYTHING, 1),
}


@pytest.mark.parametrize(("given", "idle", "count"), COUNTS.values(), ids=COUNTS)
async def test_the_delivery_count_tells_by_cause(
    redis: Redis, given: tuple[str, int], idle: int, count: int
) -> None:
    await lay(redis, live={"1-0": given})
    _, vanished, *rows = await take_over(redis, idle)
    assert (vanished, [(row[0], row[4]) for row in rows]) == ([], [(b"1-0", count)])
    assert await state(redis) == State(entries=["1-0"], live={"1-0": ("me", count)})


async def test_what_was_taken_over_is_as_if_just_delivered(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1)})
    await take_over(redis)
    assert await idle_ms(redis, "1-0") < 1000
    assert (await take_over(redis))[2:] == []


async def test_what_somebody_works_on_is_left_alone(redis: Redis) -> None:
    await lay(redis, live={"1-0": OTHER}, idle=0)
    before = await state(redis)
    assert await take_over(redis, idle=60_000) == [b"0-0", []]
    assert await state(redis) == before


async def test_a_look_into_handover_takes_nothing_else(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1)}, dead={"2-0": INVALID}, backlog=["3-0"])
    before = await state(redis)
    assert await take_over(redis, ONLY_HANDOVER) == [b"", []]
    assert await state(redis) == before


async def test_what_was_handed_over_comes_before_what_the_dead_left(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": HANDED})
    cursor, _, *rows = await take_over(redis)
    assert (cursor, [row[0] for row in rows]) == (b"", [b"2-0"])
    cursor, _, *rows = await take_over(redis)
    assert (cursor, [row[0] for row in rows]) == (b"0-0", [b"1-0"])


async def test_a_takeover_goes_page_by_page_until_the_cursor_is_back_at_the_start(redis: Redis) -> None:
    await lay(redis, live={f"{n}-0": ("dead", 1) for n in range(1, 24)})
    pages: list[list[str]] = []
    cursor = b"0-0"
    while not pages or cursor != b"0-0":
        cursor, _, *rows = await take_over(redis, cursor=cursor, count=10)
        pages.append([row[0].decode() for row in rows])
    assert [len(page) for page in pages] == [10, 10, 3]
    assert [entry_id for page in pages for entry_id in page] == [f"{n}-0" for n in range(1, 24)]
    assert set((await state(redis)).live.values()) == {("me", 2)}  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [100, 2])
async def test_everything_is_taken_in_order_whoever_holds_it(redis: Redis, count: int) -> None:
    live = {"1-0": ("a", 1), "2-0": ("me", 1), "3-0": ("b", 2), "4-0": ("a", 3), "5-0": ("me", 2)}
    await lay(redis, live=live, idle=0)
    taken: dict[str, int] = {}
    cursor = b""
    while cursor != b"0-0":
        cursor, _, *rows = await take_over(redis, EVERYTHING, cursor=cursor or b"0-0", count=count)
        taken |= {row[0].decode(): row[4] for row in rows}
    assert taken == {"1-0": 2, "2-0": 1, "3-0": 3, "4-0": 3, "5-0": 2}


async def test_taking_everything_counts_no_crash_for_own_entries_beside_vanished_ones(redis: Redis) -> None:
    await lay(redis, live={f"{n}-0": ME for n in range(1, 7)}, deleted=["1-0", "2-0", "4-0"], idle=0)
    taken: dict[bytes, int] = {}
    cursor, calls = b"", 0
    while cursor != b"0-0":
        cursor, _, *rows = await take_over(redis, EVERYTHING, cursor=cursor or b"0-0", count=2)
        taken |= {row[0]: row[4] for row in rows}
        calls += 1
        assert calls < 10
    assert taken == {b"3-0": 1, b"5-0": 1, b"6-0": 1}
    assert await imbalance(redis) == 0


async def test_a_suspect_comes_without_its_fields(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": ("dead", 2), "3-0": (HANDOVER, 4)})
    assert (await take_over(redis))[2:] == [[b"3-0", None, None, None, 4]]
    assert (await take_over(redis))[2:] == [
        [b"1-0", b"session", None, None, 2],
        [b"2-0", None, None, None, 3],
    ]


async def test_what_is_too_long_comes_as_its_length(redis: Redis) -> None:
    size = MAX_ENTRY_BYTES + 1
    await lay(redis, live={"1-0": ("dead", 1)}, data=b"x" * size)
    assert (await take_over(redis))[2:] == [[b"1-0", len("data") + size, None, None, 2]]


@pytest.mark.parametrize("owner", ["dead", HANDOVER])
async def test_what_vanished_is_named_and_counted_once(redis: Redis, owner: str) -> None:
    live = {"1-0": (owner, 1), "2-0": (owner, 1), "3-0": (owner, 1)}
    await lay(redis, live=live, deleted=["1-0", "3-0"])
    assert await imbalance(redis) == 2
    _, vanished, *rows = await take_over(redis)
    assert (vanished, [row[0] for row in rows]) == ([b"1-0", b"3-0"], [b"2-0"])
    count = 1 if owner == HANDOVER else 2
    assert await state(redis) == State(entries=["2-0"], live={"2-0": ("me", count)}, ledger={"vanished": 2})
    assert (await take_over(redis))[1] == []
    assert await imbalance(redis) == 0


async def test_when_all_that_was_handed_over_has_vanished_the_dead_are_looked_at_next_time(
    redis: Redis,
) -> None:
    await lay(redis, live={"1-0": HANDED, "2-0": ("dead", 1)}, deleted=["1-0"])
    assert (await take_over(redis))[1:] == [[b"1-0"]]
    assert [row[0] for row in (await take_over(redis))[2:]] == [b"2-0"]


@pytest.mark.parametrize("holder", ["somebody", None])
async def test_without_the_turn_nothing_is_taken_over(redis: Redis, holder: str | None) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": HANDED})
    if holder is not None:
        await redis.set(STREAM.turn_key, holder)
    before = await state(redis)
    assert await take_over(redis, token="mine") == [-1]
    assert await state(redis) == before


async def test_without_the_live_group_a_takeover_says_so(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1)})
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    for call in (take_over(redis), renew(redis, "1-0", 1), hand_over(redis, "1-0", 1)):
        with pytest.raises(GroupGone):
            await call


async def test_out_of_memory_entries_still_change_hands(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("dead", 1), "2-0": ME})
    async with out_of_memory(redis):
        assert len(await take_over(redis)) == 4
        assert await renew(redis, "2-0", 1) == [[], []]
        assert await hand_over(redis, "2-0", 1) == 1


# -- names -------------------------------------------------------------------------------------------


async def test_a_name_goes_with_its_owner_unless_something_is_pending_under_it(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    await redis.xgroup_createconsumer(STREAM.name, STREAM.group, "other")
    assert await run(redis, "forget_consumer", [], "me") == 0
    assert await run(redis, "forget_consumer", [], "other") == 1
    assert await consumers(redis) == {"me"}
    assert (await state(redis)).live == {"1-0": ME}
    assert await run(redis, "forget_consumer", [], "nobody") == 1  # as if it had gone before


async def test_names_without_pending_entries_go_when_silent_for_long(redis: Redis) -> None:
    await lay(redis, live={"1-0": ("with pending", 1)})
    for name in ("silent", HANDOVER, "me"):
        await redis.xgroup_createconsumer(STREAM.name, STREAM.group, name)
    assert await run(redis, "forget_consumers", [], 600_000, HANDOVER, "me") == []
    assert await run(redis, "forget_consumers", [], 0, HANDOVER, "me") == [b"silent"]
    assert await run(redis, "forget_consumers", [], 0, HANDOVER, "me") == []
    assert await consumers(redis) == {"with pending", HANDOVER, "me"}
    assert (await state(redis)).live == {"1-0": ("with pending", 1)}


# -- clear_ghosts ------------------------------------------------------------------------------------


async def clear_ghosts(redis: Redis, start: str = "-", count: int = 100) -> list[bytes]:
    keys = [STREAM.name, STREAM.dead_key, STREAM.ledger_key]
    reply = await Scripts(redis).run("clear_ghosts", keys, [STREAM.dead_group, start, count])
    return cast(list[bytes], reply)


@pytest.mark.parametrize("how", ["XDEL", "XTRIM"])
async def test_ghosts_leave_the_dead_letter_view_and_are_counted_once(redis: Redis, how: str) -> None:
    dead = {f"{n}-0": INVALID for n in range(1, 5)}
    await lay(redis, dead=dead, live={"5-0": ME}, deleted=["1-0", "2-0"] if how == "XDEL" else [])
    if how == "XTRIM":
        await redis.xtrim(STREAM.name, minid="3-0", approximate=False)
    assert await imbalance(redis) == 2
    assert await clear_ghosts(redis) == [b"", b"1-0", b"2-0"]
    want = State(
        entries=["3-0", "4-0", "5-0"],
        live={"5-0": ME},
        dead={"3-0": INVALID, "4-0": INVALID},
        documents=["3-0", "4-0"],
        ledger={"vanished": 2},
    )
    assert await state(redis) == want
    assert await clear_ghosts(redis) == [b""]
    assert await state(redis) == want
    assert await imbalance(redis) == 0


async def test_ghosts_are_looked_for_page_by_page(redis: Redis) -> None:
    dead = {f"{n}-0": INVALID for n in range(1, 6)}
    await lay(redis, dead=dead, deleted=["2-0", "5-0"])
    assert await clear_ghosts(redis, count=2) == [b"(2-0", b"2-0"]
    assert await clear_ghosts(redis, "(2-0", count=2) == [b"(4-0"]
    assert await clear_ghosts(redis, "(4-0", count=2) == [b"", b"5-0"]
