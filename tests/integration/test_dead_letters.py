"""Dead letters on real servers: what is in the twin moves, once; everything else stays as it is."""

from __future__ import annotations

import hashlib
import io
import json
import time

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common import dead_letters, ledger, logs
from common.config import Monitoring
from common.streams import GREATEST_ID, HANDOVER, Stream

STREAM = Stream("queue:usage_records", "usage_forwarder")


@pytest.fixture
async def redis(redis: Redis) -> Redis:
    """Both groups are there, and nothing else."""
    await redis.xgroup_create(STREAM.name, STREAM.group, "0", mkstream=True)
    await redis.xgroup_create(STREAM.name, STREAM.dead_group, GREATEST_ID)
    return redis


async def add(redis: Redis, data: bytes | None = None) -> str:
    fields = {"other": b"x"} if data is None else {"data": data}
    return str((await redis.xadd(STREAM.name, fields)).decode())


async def kill(
    redis: Redis, data: bytes | None = b"{}", reason: str = "invalid", died_at: float = 0.0
) -> str:
    """One more entry, as the bury script leaves it: the live group has read it."""
    entry_id = await add(redis, data)
    await redis.xgroup_setid(STREAM.name, STREAM.group, entry_id)
    await redis.xclaim(
        STREAM.name, STREAM.dead_group, reason, 0, [entry_id], retrycount=4, force=True, justid=True
    )
    document = {
        "reason": reason,
        "error": "why",
        "http_status": 422,
        "attempts": 4,
        "added_at": 1.5,
        "died_at": died_at or time.time(),
        "service": "usage_forwarder",
        "response_excerpt": "no",
    }
    await redis.hset(STREAM.dead_key, entry_id, json.dumps(document))
    return entry_id


async def state(redis: Redis) -> dict[str, object]:
    """Everything there is about the stream, so that "nothing changes" can be said in one comparison."""

    async def pending(group: str) -> list[tuple[str, str, int]]:
        try:
            rows = await redis.xpending_range(STREAM.name, group, "-", "+", 1000)
        except ResponseError as error:
            return [(str(error).split()[0], "", 0)]
        return [(r["message_id"].decode(), r["consumer"].decode(), r["times_delivered"]) for r in rows]

    return {
        "entries": [row[0].decode() for row in await redis.xrange(STREAM.name)],
        "live": await pending(STREAM.group),
        "twin": await pending(STREAM.dead_group),
        "documents": sorted(await redis.hkeys(STREAM.dead_key)),
        "ledger": await ledger.read(redis, STREAM),
    }


async def found(redis: Redis, **filters: object) -> list[str]:
    return [letter.id async for letter in dead_letters.find(redis, STREAM, **filters)]  # type: ignore[arg-type]


async def test_a_redriven_entry_lies_with_handover_as_if_it_had_been_read_once(redis: Redis) -> None:
    entry = await kill(redis)
    moved = await dead_letters.redrive(redis, STREAM, [entry])
    assert moved == dead_letters.Moved(done=(entry,), vanished=(), absent=())
    assert await state(redis) == {
        "entries": [entry],
        "live": [(entry, HANDOVER, 1)],
        "twin": [],
        "documents": [],
        "ledger": {"redriven": 1},
    }


async def test_a_second_redrive_changes_nothing(redis: Redis) -> None:
    entry = await kill(redis)
    await dead_letters.redrive(redis, STREAM, [entry])
    before = await state(redis)
    again = await dead_letters.redrive(redis, STREAM, [entry])
    assert again.absent == (entry,)
    assert await state(redis) == before


async def test_a_redrive_does_not_steal_what_is_being_delivered_or_not_yet_read(redis: Redis) -> None:
    in_flight = await add(redis)
    await redis.xreadgroup(STREAM.group, "somebody", {STREAM.name: ">"})
    unread = await add(redis)
    before = await state(redis)
    moved = await dead_letters.redrive(redis, STREAM, [in_flight, unread])
    assert moved.absent == (in_flight, unread)
    assert await state(redis) == before


async def test_what_a_live_group_made_again_has_not_come_to_is_redriven_by_being_read_once(
    redis: Redis,
) -> None:
    """Pending before it is read, it would be read all the same: out of the hands of whoever has taken it over."""
    read, ahead, trimmed = await kill(redis), await kill(redis), await kill(redis)
    unread = await add(redis)
    await redis.xdel(STREAM.name, trimmed)
    await redis.xgroup_setid(STREAM.name, STREAM.group, read)
    moved = await dead_letters.redrive(redis, STREAM, [read, ahead, trimmed])
    assert (moved.done, moved.vanished) == ((read, ahead), (trimmed,))
    assert await state(redis) == {
        "entries": [read, ahead, unread],
        "live": [(read, HANDOVER, 1)],
        "twin": [],
        "documents": [],
        "ledger": {"redriven": 2, "vanished": 1},
    }
    [[_, rows]] = await redis.xreadgroup(STREAM.group, "somebody", {STREAM.name: ">"})
    assert [row[0].decode() for row in rows] == [ahead, unread]


async def test_many_ids_move_in_one_call_and_an_id_given_twice_moves_once(redis: Redis) -> None:
    dead = [await kill(redis) for _ in range(dead_letters.PAGE + 5)]
    moved = await dead_letters.redrive(redis, STREAM, [*dead, dead[0]])
    assert moved.done == tuple(dead)
    assert (await ledger.read(redis, STREAM))["redriven"] == len(dead)


async def test_a_redrive_without_a_live_group_says_so_and_changes_nothing(redis: Redis) -> None:
    dead = [await kill(redis), await kill(redis)]
    await redis.xgroup_destroy(STREAM.name, STREAM.group)
    before = await state(redis)
    with pytest.raises(dead_letters.LiveGroupMissing, match="usage_forwarder"):
        await dead_letters.redrive(redis, STREAM, dead)
    assert await state(redis) == before


async def test_without_a_twin_group_there_are_no_dead_letters(redis: Redis) -> None:
    entry = await kill(redis)
    await redis.xgroup_destroy(STREAM.name, STREAM.dead_group)
    assert await found(redis) == []
    assert await found(redis, ids=[entry]) == []
    assert (await dead_letters.redrive(redis, STREAM, [entry])).absent == (entry,)
    assert (await dead_letters.discard(redis, STREAM, [entry])).absent == (entry,)


async def test_a_stream_that_does_not_exist_has_no_dead_letters(redis: Redis) -> None:
    await redis.flushall()
    assert await found(redis) == []
    assert (await dead_letters.discard(redis, STREAM, ["1-1"])).absent == ("1-1",)


async def test_a_stream_that_is_gone_has_nothing_to_redrive(redis: Redis) -> None:
    await redis.flushall()
    with pytest.raises(dead_letters.LiveGroupMissing):
        await dead_letters.redrive(redis, STREAM, ["1-1"])
    assert await redis.keys() == []


async def test_both_ways_out_are_open_when_redis_is_out_of_memory(redis: Redis) -> None:
    redriven, discarded = await kill(redis), await kill(redis)
    await redis.config_set("maxmemory", "1")
    try:
        assert (await dead_letters.redrive(redis, STREAM, [redriven])).done == (redriven,)
        assert (await dead_letters.discard(redis, STREAM, [discarded])).done == (discarded,)
    finally:
        await redis.config_set("maxmemory", "0")
    assert await ledger.read(redis, STREAM) == {"discarded": 1, "redriven": 1}


async def test_a_trimmed_entry_is_cleared_from_the_view_and_counted_as_vanished(redis: Redis) -> None:
    redriven, discarded = await kill(redis), await kill(redis)
    await redis.xtrim(STREAM.name, maxlen=0, approximate=False)
    assert (await dead_letters.redrive(redis, STREAM, [redriven])).vanished == (redriven,)
    assert (await dead_letters.discard(redis, STREAM, [discarded])).vanished == (discarded,)
    assert await state(redis) == {
        "entries": [],
        "live": [],
        "twin": [],
        "documents": [],
        "ledger": {"vanished": 2},
    }


async def test_a_discarded_entry_is_gone_and_the_books_still_balance(redis: Redis) -> None:
    dead, kept = await kill(redis), await kill(redis)
    moved = await dead_letters.discard(redis, STREAM, [dead])
    assert moved.done == (dead,)
    after = await state(redis)
    assert after["entries"] == [kept]
    assert after["documents"] == [kept.encode()]
    assert after["ledger"] == {"discarded": 1}
    info = await redis.xinfo_stream(STREAM.name)
    assert ledger.imbalance(info["entries-added"], info["length"], await ledger.read(redis, STREAM)) == 0


async def test_a_second_discard_changes_nothing(redis: Redis) -> None:
    dead, alive = await kill(redis), await add(redis)
    await dead_letters.discard(redis, STREAM, [dead])
    before = await state(redis)
    assert (await dead_letters.discard(redis, STREAM, [dead, alive])).absent == (dead, alive)
    assert await state(redis) == before


async def test_a_discard_leaves_an_audit_line_with_the_payloads_digest(redis: Redis) -> None:
    payload, bare = await kill(redis, b"\xff not json"), await kill(redis, None, "rejected")
    log = io.StringIO()
    logs.setup("test", Monitoring(log_level="ERROR"), "server-1", stream=log)  # no level hides the audit log
    await dead_letters.discard(redis, STREAM, [payload, bare])
    lines = [json.loads(line) for line in log.getvalue().splitlines() if '"audit"' in line]
    assert [(line["logger"], line["entry_id"], line["reason"], line["sha256"]) for line in lines] == [
        ("audit", payload, "invalid", hashlib.sha256(b"\xff not json").hexdigest()),
        ("audit", bare, "rejected", None),
    ]


async def test_a_discard_of_large_payloads_goes_through_in_several_calls(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "MAX_DISCARD_BYTES", 100)
    dead = [await kill(redis, b"x" * 90) for _ in range(7)]
    assert (await dead_letters.discard(redis, STREAM, dead)).done == tuple(dead)
    assert await redis.xlen(STREAM.name) == 0


@pytest.mark.parametrize("half", ["1", "1-", "-", "+", "1-*", "x-1", "1-18446744073709551616", "1-1 "])
async def test_half_an_id_is_refused_before_anything_moves(redis: Redis, half: str) -> None:
    entry = await kill(redis)
    before = await state(redis)
    for move in (dead_letters.redrive, dead_letters.discard):
        with pytest.raises(ValueError, match="entry id"):
            await move(redis, STREAM, [entry, half])
    assert await state(redis) == before


async def test_a_dead_letter_tells_its_story(redis: Redis) -> None:
    entry = await kill(redis, b'{"api_session_id": "s-1", "more": [1]}', "rejected", died_at=99.5)
    (letter,) = [letter async for letter in dead_letters.find(redis, STREAM)]
    assert letter == dead_letters.DeadLetter(
        id=entry,
        stream=STREAM.name,
        reason="rejected",
        error="why",
        http_status=422,
        attempts=4,
        added_at=1.5,
        died_at=99.5,
        service="usage_forwarder",
        response_excerpt="no",
        data=b'{"api_session_id": "s-1", "more": [1]}',
        session="s-1",
    )


@pytest.mark.parametrize(
    "data", [None, b"", b"\xff", b"[" * 20_000, b'{"api_session_id": 7}', b"{} x", b"1e400"]
)
async def test_an_unreadable_dead_letter_can_be_looked_at_and_discarded(
    redis: Redis, data: bytes | None
) -> None:
    entry = await kill(redis, data)
    (letter,) = [letter async for letter in dead_letters.find(redis, STREAM)]
    assert (letter.id, letter.data, letter.session) == (entry, data, None)
    assert (await dead_letters.discard(redis, STREAM, [entry])).done == (entry,)


async def test_a_dead_letter_without_its_document_is_still_listed(redis: Redis) -> None:
    entry = await kill(redis)
    await redis.delete(STREAM.dead_key)
    (letter,) = [letter async for letter in dead_letters.find(redis, STREAM)]
    assert (letter.id, letter.reason, letter.error) == (entry, "invalid", None)
    assert abs(letter.died_at - time.time()) < 60
    assert abs(letter.added_at - time.time()) < 60


async def test_every_filter_narrows_the_view(redis: Redis) -> None:
    now = time.time()
    first = await kill(redis, b'{"api_session_id": "a"}', "invalid", died_at=now - 100)
    second = await kill(redis, b'{"api_session_id": "b"}', "rejected", died_at=now - 10)
    third = await kill(redis, b'{"api_session_id": "a"}', "rejected", died_at=now - 10)
    await add(redis)
    assert await found(redis) == [first, second, third]
    assert await found(redis, reason="rejected") == [second, third]
    assert await found(redis, session="a") == [first, third]
    assert await found(redis, older_than=50.0, now=now) == [first]
    assert await found(redis, after=first) == [second, third]
    assert await found(redis, limit=2) == [first, second]
    assert await found(redis, ids=[third, "1-1", first], reason="rejected") == [third]


async def test_the_view_is_read_page_by_page_to_its_end(redis: Redis) -> None:
    dead = [await kill(redis) for _ in range(2 * dead_letters.PAGE)]
    assert await found(redis) == dead
    assert await found(redis, ids=dead) == dead
