"""The reconciler's readers over a real Redis and a real ControlPlane, and its command line."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from common.streams import GREATEST_ID, Stream
from sandbox import redis_book
from sandbox.book import Book, Row
from sandbox.control_plane import ControlPlane
from sandbox.redis_book import Grants, Holding, read_grants, read_redis
from tests.support import RedisServer

USAGE = Stream("queue:usage_records", "usage_forwarder")


async def entries(redis: Redis, count: int) -> list[str]:
    return [(await redis.xadd(USAGE.name, {"data": "{}"})).decode() for _ in range(count)]


async def test_entries_are_read_where_they_are(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_book, "PAGE", 2)
    ids = await entries(redis, 9)
    await redis.xgroup_create(USAGE.name, USAGE.group, 0)
    await redis.xgroup_create(USAGE.name, USAGE.dead_group, GREATEST_ID)
    await redis.xreadgroup(USAGE.group, "consumer", {USAGE.name: ">"}, count=6)
    for id in ids[:3]:
        await redis.xclaim(USAGE.name, USAGE.dead_group, "invalid", 0, [id], force=True, justid=True)
        await redis.xack(USAGE.name, USAGE.group, id)
    holding = (await read_redis(redis, [USAGE]))[USAGE.name]
    assert holding == Holding(set(ids[3:6]), dict.fromkeys(ids[:3], "invalid"), set(ids[6:]))


async def test_a_stream_that_nobody_reads_yet_is_all_backlog_and_a_missing_one_is_empty(redis: Redis) -> None:
    assert await read_redis(redis, [USAGE]) == {USAGE.name: Holding()}
    ids = await entries(redis, 2)
    assert (await read_redis(redis, [USAGE]))[USAGE.name] == Holding(backlog=set(ids))


async def test_answers_are_counted_and_trimming_is_noticed(redis: Redis) -> None:
    stream = "queue:quota_response"
    assert await read_grants(redis, stream) == Grants()
    for milliseconds, transaction in ((1, "a"), (2, "b"), (3, "b")):
        data = msgspec.json.encode({"transaction_id": transaction, "new_quota_amount": 1})
        await redis.xadd(stream, {"data": data}, id=f"{milliseconds}-0")
    assert (await read_grants(redis, stream)).count == {"a": 1, "b": 2}
    await redis.xtrim(stream, minid="2-0", approximate=False)
    grants = await read_grants(redis, stream)
    assert (grants.count, grants.complete_from_ms) == ({"b": 2}, 2)


async def test_the_command_says_what_is_lost_and_fails(
    redis: Redis, redis_server: RedisServer, control_plane: ControlPlane, tmp_path: Path
) -> None:
    [waiting] = await entries(redis, 1)
    book = Book(tmp_path / "book.jsonl")
    rows = [Row(USAGE.name, "usage", entry, f"t{entry}", "s", "hash", "ok") for entry in (waiting, "1-0")]
    book.write(rows[:1])

    async def reconciled() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox", "reconcile", str(tmp_path / "book.jsonl")),
            *(
                "--redis-url",
                f"redis://127.0.0.1:{redis_server.port}",
                "--admin-url",
                control_plane.admin_url,
            ),
            stdout=asyncio.subprocess.PIPE,
        )
        report, _ = await process.communicate()
        return process.returncode, report.decode()

    code, report = await reconciled()
    assert (code, "lost                 0" in report) == (0, True)
    book.write(rows[1:])
    book.close()
    code, report = await reconciled()
    assert code == 1
    assert "lost: queue:usage_records: entry 1-0, session s, transaction t1-0" in report
