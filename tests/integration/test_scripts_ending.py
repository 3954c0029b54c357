"""The scripts with which an entry ends (settle, answer, bury): guarded, repeatable, whole or not at all.

A given and a want are all there is about the stream; the second call changes nothing, and the books balance.
"""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from common.redis_border import Away, Full, GroupGone, Scripts
from common.settlement import AT_ONCE
from tests.integration import workbench
from tests.integration.workbench import STREAM, State, imbalance, lay, make_groups, out_of_memory, state

RESPONSES = "queue:quota_response"
HOUR_MS = 3_600_000

ME, OTHER = ("me", 1), ("other", 1)
INVALID = ("invalid", 1)


FIGURES = (1500, 2500, 4096, 1)


async def settle(redis: Redis, *ids: str, outcome: str = "delivered", token: str = "") -> int:
    return await workbench.settle(redis, *ids, outcome=outcome, figures=FIGURES, token=token)


async def bury(redis: Redis, *ids: str, reason: str = "invalid", token: str = "") -> list[int] | int:
    keys = [STREAM.name, STREAM.dead_key, STREAM.ledger_key]
    args: list[str | int] = [STREAM.group, STREAM.dead_group, "me", token]
    for entry_id in ids:
        args += (entry_id, reason, 4, '{"reason": "invalid"}')
    reply: list[int] | int = await Scripts(redis).run(
        "bury", [*keys, STREAM.turn_key] if token else keys, args
    )
    return reply


async def answer(redis: Redis, *ids: str, me: str = "me", outcome: str = "delivered") -> list[int]:
    args: list[str | int] = [STREAM.group, me, HOUR_MS]
    for entry_id in ids:
        args += (entry_id, outcome, f'{{"for": "{entry_id}"}}', f"correlation-{entry_id}")
    reply: list[int] = await Scripts(redis).run("answer", [STREAM.name, STREAM.ledger_key, RESPONSES], args)
    return reply


async def grants(redis: Redis) -> list[bytes]:
    return [fields[b"data"] for _, fields in await redis.xrange(RESPONSES)]


def books(n: int, **other: int) -> dict[str, int]:
    """The ledger after n entries with the figures that `settle` gives here."""
    sums = {"audio_ms": 1500 * n, "connection_ms": 2500 * n, "data_bytes": 4096 * n, "request_count": n}
    return dict(sorted({**sums, **other}.items()))


# -- settle ------------------------------------------------------------------------------------------

SETTLE: dict[str, tuple[dict[str, Any], int, State]] = {
    "mine leaves the group and the stream": (
        {"live": {"1-0": ME, "2-0": ME}},
        1,
        State(entries=["2-0"], live={"2-0": ME}, ledger=books(1, delivered=1)),
    ),
    "a 2xx is a fact, whoever owns the entry by now": (
        {"live": {"1-0": OTHER}},
        1,
        State(ledger=books(1, delivered=1)),
    ),
    "what died meanwhile leaves the dead-letter view": (
        {"live": {"2-0": ME}, "dead": {"1-0": INVALID}},
        1,
        State(entries=["2-0"], live={"2-0": ME}, ledger=books(1, delivered=1)),
    ),
    "what nobody has read yet stays": (
        {"backlog": ["1-0"]},
        0,
        State(entries=["1-0"]),
    ),
    "what is not there changes nothing": (
        {"live": {"2-0": ME}},
        0,
        State(entries=["2-0"], live={"2-0": ME}),
    ),
    "what was deleted while pending was delivered all the same": (
        {"live": {"1-0": ME}, "deleted": ["1-0"]},
        1,
        State(ledger=books(1, delivered=1)),
    ),
}


@pytest.mark.parametrize(("given", "settled", "want"), SETTLE.values(), ids=SETTLE)
async def test_settle(redis: Redis, given: dict[str, Any], settled: int, want: State) -> None:
    await lay(redis, **given)
    assert await settle(redis, "1-0") == settled
    assert await state(redis) == want
    assert await settle(redis, "1-0") == 0
    assert await state(redis) == want
    assert await imbalance(redis) == 0


async def test_settle_counts_in_one_call_what_was_delivered_and_what_was_there_already(redis: Redis) -> None:
    await lay(redis, live={f"{n}-0": ME for n in range(1, 8)})
    assert await settle(redis, "1-0", "2-0", "3-0", "2-0") == 3
    assert await settle(redis, "4-0", "5-0", outcome="duplicate") == 2
    assert (await state(redis)).ledger == books(5, delivered=3, duplicate=2)
    assert await imbalance(redis) == 0


async def test_a_whole_batch_at_the_bounds_of_the_schema_is_counted_without_drift(redis: Redis) -> None:
    """A figure that Lua would write as 1e+15 would stop the script half-way, after the entries were deleted."""
    n, largest = AT_ONCE, (10**12, 10**12, 2**40, 10**9)
    await lay(redis, live={f"{i}-0": ME for i in range(1, n + 1)})
    assert await workbench.settle(redis, *(f"{i}-0" for i in range(1, n + 1)), figures=largest) == n
    names = ("audio_ms", "connection_ms", "data_bytes", "request_count")
    want = {"delivered": n} | {name: n * figure for name, figure in zip(names, largest, strict=True)}
    assert (await state(redis)).ledger == dict(sorted(want.items()))


async def test_settle_of_what_is_gone_with_its_groups_changes_nothing(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    await redis.delete(STREAM.name)
    assert await settle(redis, "1-0") == 0
    assert await state(redis) == State(live=None, dead=None)


# -- bury --------------------------------------------------------------------------------------------

BURIED = ("invalid", 4)

BURY: dict[str, tuple[dict[str, Any], int, int, State]] = {
    "mine lies in the twin, under the reason, with its attempts; the payload stays in the stream": (
        {"live": {"1-0": ME}},
        1,
        0,
        State(entries=["1-0"], dead={"1-0": BURIED}, documents=["1-0"], ledger={"dead:invalid": 1}),
    ),
    "somebody else's stays where it is": (
        {"live": {"1-0": OTHER}},
        0,
        0,
        State(entries=["1-0"], live={"1-0": OTHER}),
    ),
    "what nobody has read stays unread": (
        {"backlog": ["1-0"]},
        0,
        0,
        State(entries=["1-0"]),
    ),
    "what is dead already keeps its reason": (
        {"dead": {"1-0": ("rejected", 2)}},
        0,
        0,
        State(entries=["1-0"], dead={"1-0": ("rejected", 2)}, documents=["1-0"]),
    ),
    "what was deleted while pending is counted as vanished, once": (
        {"live": {"1-0": ME}, "deleted": ["1-0"]},
        -1,
        0,
        State(ledger={"vanished": 1}),
    ),
}


@pytest.mark.parametrize(("given", "first", "second", "want"), BURY.values(), ids=BURY)
async def test_bury(redis: Redis, given: dict[str, Any], first: int, second: int, want: State) -> None:
    await lay(redis, **given)
    assert await bury(redis, "1-0") == [first]
    assert await state(redis) == want
    assert await bury(redis, "1-0") == [second]
    assert await state(redis) == want
    assert await imbalance(redis) == 0


async def test_bury_says_of_each_entry_what_became_of_it(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": OTHER, "3-0": ME, "4-0": ME}, deleted=["3-0"])
    assert await bury(redis, "1-0", "2-0", "3-0", "4-0", reason="conflict") == [1, 0, -1, 1]
    assert await state(redis) == State(
        entries=["1-0", "2-0", "4-0"],
        live={"2-0": OTHER},
        dead={"1-0": ("conflict", 4), "4-0": ("conflict", 4)},
        documents=["1-0", "4-0"],
        ledger={"dead:conflict": 2, "vanished": 1},
    )


@pytest.mark.parametrize("missing", [STREAM.dead_group, STREAM.group])
async def test_bury_without_a_group_says_so_and_changes_nothing(redis: Redis, missing: str) -> None:
    await lay(redis, live={"1-0": ME}, dead={"2-0": INVALID})
    await redis.xgroup_destroy(STREAM.name, missing)
    before = await state(redis)
    with pytest.raises(GroupGone):
        await bury(redis, "1-0")
    assert await state(redis) == before


# -- out of memory -----------------------------------------------------------------------------------


async def test_out_of_memory_entries_still_end(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": ME})
    async with out_of_memory(redis):
        assert await settle(redis, "1-0") == 1
        assert await bury(redis, "2-0") == [1]
    assert await state(redis) == State(
        entries=["2-0"],
        dead={"2-0": BURIED},
        documents=["2-0"],
        ledger=dict(sorted({**books(1), "delivered": 1, "dead:invalid": 1}.items())),
    )
    assert await imbalance(redis) == 0


async def test_out_of_memory_a_request_is_not_answered_and_stays(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    async with out_of_memory(redis):
        with pytest.raises(Full):
            await answer(redis, "1-0")
    assert await state(redis) == State(entries=["1-0"], live={"1-0": ME})
    assert await answer(redis, "1-0") == [1]


# -- the turn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["somebody", None])
async def test_without_the_turn_nothing_is_settled_or_buried(redis: Redis, holder: str | None) -> None:
    await lay(redis, live={"1-0": ME})
    if holder is not None:
        await redis.set(STREAM.turn_key, holder)
    before = await state(redis)
    assert await settle(redis, "1-0", token="mine") == -1
    assert await bury(redis, "1-0", token="mine") == -2
    assert await state(redis) == before


async def test_with_the_turn_entries_end(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": ME})
    await redis.set(STREAM.turn_key, "mine")
    assert await settle(redis, "1-0", token="mine") == 1
    assert await bury(redis, "2-0", token="mine") == [1]


# -- answer ------------------------------------------------------------------------------------------

ANSWER: dict[str, tuple[dict[str, Any], int, int, State]] = {
    "mine is answered and settled in one step": (
        {"live": {"1-0": ME}},
        1,
        1,
        State(ledger={"delivered": 1}),
    ),
    "somebody else's gets no second grant": (
        {"live": {"1-0": OTHER}},
        0,
        0,
        State(entries=["1-0"], live={"1-0": OTHER}),
    ),
    "what nobody has read gets no grant": (
        {"backlog": ["1-0"]},
        0,
        0,
        State(entries=["1-0"]),
    ),
    "what is dead gets no grant": (
        {"dead": {"1-0": INVALID}},
        0,
        0,
        State(entries=["1-0"], dead={"1-0": INVALID}, documents=["1-0"]),
    ),
}


@pytest.mark.parametrize(("given", "answered", "n_grants", "want"), ANSWER.values(), ids=ANSWER)
async def test_answer(redis: Redis, given: dict[str, Any], answered: int, n_grants: int, want: State) -> None:
    await lay(redis, **given)
    assert await answer(redis, "1-0") == [answered]
    assert await state(redis) == want
    assert await answer(redis, "1-0") == [0]
    assert await state(redis) == want
    assert len(await grants(redis)) == n_grants
    assert await imbalance(redis) == 0


async def test_a_slow_first_owner_gives_no_second_grant(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    await redis.xclaim(STREAM.name, STREAM.group, "other", 0, ["1-0"])
    assert await answer(redis, "1-0", me="other") == [1]
    assert await answer(redis, "1-0", me="me") == [0]
    assert await grants(redis) == [b'{"for": "1-0"}']


async def test_a_grant_carries_what_its_request_carried(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": OTHER, "3-0": ME})
    assert await answer(redis, "1-0", "2-0", "3-0", outcome="duplicate") == [1, 0, 1]
    assert [fields for _, fields in await redis.xrange(RESPONSES)] == [
        {b"data": b'{"for": "%s"}' % entry_id, b"correlation_id": b"correlation-%s" % entry_id}
        for entry_id in (b"1-0", b"3-0")
    ]
    assert (await state(redis)).ledger == {"duplicate": 2}


async def test_grants_older_than_they_are_kept_make_room(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME})
    now_ms = (await redis.time())[0] * 1000
    async with redis.pipeline(transaction=False) as pipeline:
        for n in range(1000):
            pipeline.xadd(RESPONSES, {"data": "old"}, id=f"{now_ms - HOUR_MS - 60_000}-{n + 1}")
        pipeline.xadd(RESPONSES, {"data": "young"}, id=f"{now_ms - HOUR_MS + 60_000}-0")
        await pipeline.execute()
    await answer(redis, "1-0")
    kept = await grants(redis)
    assert kept[-2:] == [b"young", b'{"for": "1-0"}']
    assert len(kept) < 200  # trimmed by whole nodes


async def test_a_response_stream_that_is_none_keeps_the_request(redis: Redis) -> None:
    await lay(redis, live={"1-0": ME, "2-0": ME})
    await redis.set(RESPONSES, "not a stream")
    with pytest.raises(Away, match="WRONGTYPE"):
        await answer(redis, "1-0", "2-0")
    assert await state(redis) == State(entries=["1-0", "2-0"], live={"1-0": ME, "2-0": ME})


async def test_a_missing_group_gives_no_grant(redis: Redis) -> None:
    await make_groups(redis)
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    with pytest.raises(GroupGone):
        await answer(redis, "1-0")
    assert await grants(redis) == []
