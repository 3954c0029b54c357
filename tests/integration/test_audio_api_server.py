"""The simulator on real servers: its book is what is in Redis, also when Redis dies in the middle."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from common import schemas
from common.config import Streams
from common.schemas import Invalid, QuotaResponse
from sandbox.audio_api_server import AudioAPIServer, Traffic
from sandbox.book import Book, Row, read
from tests.support import RedisServer, connect, eventually

STREAMS = Streams()
READERS = {
    STREAMS.usage_records: schemas.usage_record,
    STREAMS.session_lifecycle: schemas.session_event,
    STREAMS.quota_refresh: schemas.quota_request,
}


async def entries(redis: Redis) -> dict[tuple[str, str], dict[bytes, bytes]]:
    found: dict[tuple[str, str], dict[bytes, bytes]] = {}
    for stream in READERS:
        listed: Any = await redis.xrange(stream)
        found |= {(stream, entry_id.decode()): fields for entry_id, fields in listed}
    return found


def by_entry(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.stream, row.entry_id): row for row in rows if row.entry_id is not None}


async def test_the_book_is_what_is_in_redis(redis: Redis) -> None:
    server = AudioAPIServer(redis, Traffic(rate=2000, sessions=40, malformed=0.2, seed=7))
    await server.run(0.5)
    rows = by_entry(server.book.rows())
    found = await entries(redis)
    assert rows.keys() == found.keys()
    verdicts: Counter[str] = Counter()
    for key, fields in found.items():
        row, data = rows[key], fields.get(b"data")
        assert row.sha256 == (None if data is None else sha256(data).hexdigest())
        try:
            message: Any = READERS[row.stream](data)
        except Invalid:
            assert row.expected == "invalid", row
        else:
            assert row.expected == "ok", row
            assert message.api_session_id == row.session
            derived = schemas.transaction_id(row.stream, key[1], data or b"")
            assert row.transaction_id == (message.transaction_id or derived)
            verdicts["derived"] += message.transaction_id is None
        verdicts[row.expected] += 1
    assert min(verdicts["ok"], verdicts["invalid"], verdicts["derived"]) > 10
    stats = server.stats()
    assert sum(stats.produced.values()) == len(rows)
    assert (stats.uncertain, stats.unwritten) == (0, 0)


async def test_every_session_starts_before_and_completes_after_all_it_says(redis: Redis) -> None:
    server = AudioAPIServer(redis, Traffic(rate=2000, sessions=10))
    await server.run(0.3)
    said: dict[str, list[str]] = {}
    for row in server.book.rows():
        assert row.session is not None
        said.setdefault(row.session, []).append(row.kind)
    assert len(said) >= 10
    for kinds in said.values():
        assert (kinds[0], kinds[-1]) == ("start", "complete")
        assert {"start", "complete"}.isdisjoint(kinds[1:-1])


async def grant(redis: Redis, stop: asyncio.Event) -> None:
    """A quota refresher as small as can be."""
    last = b"0-0"
    while not stop.is_set():
        reply: Any = await redis.xread({STREAMS.quota_refresh: last}, block=50)
        for _, requests in reply:
            for entry_id, fields in requests:
                last, data = entry_id, fields[b"data"]
                request = schemas.quota_request(data)
                key = request.transaction_id or schemas.transaction_id(STREAMS.quota_refresh, entry_id, data)
                body = schemas.quota_response_body(
                    QuotaResponse(request.api_session_id, 360, False, key, request.timestamp)
                )
                await redis.xadd(STREAMS.quota_response, {"data": body})


async def test_every_request_is_held_to_one_grant(redis: Redis) -> None:
    server = AudioAPIServer(redis, Traffic(rate=2000, sessions=40))
    stop = asyncio.Event()
    granting = asyncio.create_task(grant(redis, stop))
    await server.run(0.3, grants_within=10)
    stop.set()
    await granting
    stats = server.stats()
    assert stats.quota_requests == stats.grants == stats.produced["quota"] > 0
    assert (stats.grants_missing, stats.grants_excess) == (0, 0)
    assert 0 < stats.grant_seconds["p50"] <= stats.grant_seconds["max"] < 10

    [(_, again)] = await redis.xrange(STREAMS.quota_response, count=1)
    await redis.xadd(STREAMS.quota_response, again)
    await redis.xadd(STREAMS.quota_response, {"data": b"{}"})

    async def noticed() -> bool:
        await server.run(0.05)
        return server.stats().grants_excess == 1 and server.stats().grants_unreadable == 1

    await eventually(noticed)


async def test_a_redis_that_dies_in_the_middle_leaves_nothing_unbooked(durable_redis: RedisServer) -> None:
    redis = connect(durable_redis.port)
    server = AudioAPIServer(redis, Traffic(rate=1000, sessions=50, malformed=0.05))
    stop = asyncio.Event()
    running = asyncio.create_task(server.run(until=stop))
    await eventually(lambda: len(server.book.rows()) > 100)
    durable_redis.restart()
    before = len(server.book.rows())
    await eventually(lambda: len(server.book.rows()) > before + 100)
    stop.set()
    await running

    rows = server.book.rows()
    found = await entries(redis)
    certain = by_entry(rows)
    assert certain.keys() <= found.keys()
    uncertain = Counter((row.stream, row.sha256) for row in rows if not row.certain)
    unbooked = Counter(
        (stream, sha256(fields[b"data"]).hexdigest() if b"data" in fields else None)
        for (stream, entry_id), fields in found.items()
        if (stream, entry_id) not in certain
    )
    assert unbooked <= uncertain
    assert server.stats().uncertain == uncertain.total()
    await redis.aclose()


def test_the_command_prints_its_figures_and_keeps_its_book(redis_server: RedisServer, tmp_path: Path) -> None:
    book = tmp_path / "book.jsonl"
    ended = simulate(
        redis_server, "--seconds", "0.3", "--rate", "200", "--book", str(book), "--grants-within", "0"
    )
    assert ended.returncode == 0, ended.stderr
    assert sum(json.loads(ended.stdout)["produced"].values()) == len(list(read(book)))


def test_the_command_says_when_it_cannot_reach_redis(redis_server: RedisServer) -> None:
    redis_server.kill()
    ended = simulate(redis_server, "--seconds", "1")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert len(ended.stderr.splitlines()) == 1


def simulate(redis_server: RedisServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = f"redis://{redis_server.host}:{redis_server.port}/0"
    command = [sys.executable, "-m", "sandbox.audio_api_server", "--redis-url", url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_book_in_memory_and_one_in_a_file_hold_the_same(tmp_path: Path) -> None:
    row = Row("queue:usage_records", "usage", "1-0", "t", "s", "00", "ok")
    books = [Book(), Book(tmp_path / "book.jsonl")]
    for book in books:
        book.write([row])
        assert book.rows() == [row]
        book.close()
