"""The producer on real servers: what it returns is in Redis; what Redis does not confirm is waited for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import pytest
from redis.asyncio import Redis

from common import schemas
from common.config import Streams
from common.producer import PIPELINE, Draft, Message, Producer, ProducerError
from common.redis_border import Denied
from common.schemas import Invalid, QuotaRequest, SessionEvent, UsageRecord
from tests.support import RedisServer, connect, eventually

STREAMS = Streams()
NOW = "2026-11-21T10:00:00Z"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

QUOTA = QuotaRequest("session-1", "customer", NOW)
START = SessionEvent("session-1", "customer", "start", NOW, metadata=schemas.Raw(b'{"a":1}'))


def usage(number: int = 1, **more: Any) -> UsageRecord:
    said = {
        "api_session_id": "session-1",
        "customer_id": "customer",
        "connection_duration_seconds": 2.5,
        "data_bytes_processed": number,
        "audio_duration_seconds": 1.5,
        "request_timestamp": NOW,
        "response_timestamp": NOW,
    }
    return UsageRecord(**{**said, **more})


@pytest.fixture
def producer(redis: Redis) -> Producer:
    return Producer(redis, STREAMS)


@pytest.fixture
async def lossy(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client whose first XADD reaches the server, and the reply of which is lost with the connection."""
    lost = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection(redis_server.host, redis_server.port)
        with closing(writer), closing(upstream[1]):
            while request := await reader.read(1 << 16):
                upstream[1].write(request)
                reply = await upstream[0].read(1 << 16)
                if b"XADD" in request and not lost.is_set():
                    lost.set()
                    return
                writer.write(reply)

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as proxy:
        client = connect(proxy.sockets[0].getsockname()[1])
        yield client
        await client.aclose()


async def messages(redis: Redis, stream: str) -> list[dict[str, Any]]:
    entries: Any = await redis.xrange(stream)
    return [json.loads(fields[b"data"]) for _, fields in entries]


@pytest.mark.parametrize(
    ("message", "stream"),
    [
        (usage(), "queue:usage_records"),
        (START, "queue:session_lifecycle"),
        (QUOTA, "queue:quota_refresh"),
    ],
)
async def test_each_kind_of_message_goes_to_its_stream(
    producer: Producer, redis: Redis, message: Message, stream: str
) -> None:
    written = await producer.add(message, correlation_id="request-1", traceparent=TRACEPARENT)
    entries: Any = await redis.xrange(stream)
    assert entries == [
        (
            (written.entry_id or "").encode(),
            {b"data": written.data, b"correlation_id": b"request-1", b"traceparent": TRACEPARENT.encode()},
        )
    ]
    assert written.stream == stream
    assert written.replies_lost == 0


async def test_a_message_without_an_id_gets_one_of_its_own(producer: Producer, redis: Redis) -> None:
    first, second = await producer.add(usage()), await producer.add(usage())
    assert first.transaction_id != second.transaction_id
    sent = [message["transaction_id"] for message in await messages(redis, STREAMS.usage_records)]
    assert sent == [first.transaction_id, second.transaction_id]


async def test_a_message_keeps_its_own_id(producer: Producer) -> None:
    assert (await producer.add(usage(transaction_id="mine"))).transaction_id == "mine"


async def test_a_message_may_leave_its_id_to_the_agent(producer: Producer, redis: Redis) -> None:
    [written] = await producer.add_many([Draft(usage(), set_transaction_id=False)])
    assert written.entry_id is not None
    assert "transaction_id" not in json.loads(written.data)
    derived = schemas.transaction_id(written.stream, written.entry_id, written.data)
    assert written.transaction_id == derived


async def test_what_an_event_does_not_have_is_not_written(producer: Producer) -> None:
    written = await producer.add(SessionEvent("session-1", "customer", "complete", NOW))
    assert json.loads(written.data).keys() == {
        "api_session_id",
        "customer_id",
        "event_type",
        "timestamp",
        "transaction_id",
    }


async def test_many_messages_are_written_in_order(producer: Producer, redis: Redis) -> None:
    many = PIPELINE * 2 + 1
    written = await producer.add_many([Draft(usage(number)) for number in range(many)])
    entries: Any = await redis.xrange(STREAMS.usage_records)
    assert [entry_id.decode() for entry_id, _ in entries] == [entry.entry_id for entry in written]
    assert [json.loads(fields[b"data"])["data_bytes_processed"] for _, fields in entries] == list(range(many))


@pytest.mark.parametrize(
    "draft",
    [
        Draft(usage(-1)),
        Draft(usage(request_count=0)),
        Draft(usage(transaction_id="..")),
        Draft(usage(connection_duration_seconds=float("nan"))),
        Draft(SessionEvent("session-1", "customer", "pause", NOW)),
        Draft(QuotaRequest("session-1", "customer", "now")),
        Draft(usage(), correlation_id="a b"),
        Draft(usage(), traceparent="00-" + "0" * 32),
    ],
)
async def test_one_invalid_message_keeps_all_from_being_written(
    producer: Producer, redis: Redis, draft: Draft
) -> None:
    with pytest.raises(Invalid):
        await producer.add_many([Draft(usage()), draft])
    assert await redis.dbsize() == 0


async def test_an_entry_is_bounded_with_all_its_fields(producer: Producer) -> None:
    def event(length: int) -> SessionEvent:
        metadata = schemas.Raw(b'"' + b"x" * length + b'"')
        return SessionEvent("session-1", "customer", "start", NOW, "id", metadata=metadata)

    room = schemas.MAX_ENTRY_BYTES - len((await producer.add(event(0))).data) - len(b"data")
    await producer.add(event(room))
    with pytest.raises(Invalid, match="other fields included"):
        await producer.add(event(room), correlation_id="request-1")


async def test_a_redis_that_restarts_is_waited_for(durable_redis: RedisServer) -> None:
    redis = connect(durable_redis.port)
    producer = Producer(redis, STREAMS, wait_seconds=20)
    await producer.add(usage(1))
    durable_redis.kill()
    writing = asyncio.create_task(
        producer.add_many([Draft(usage(2)), Draft(usage(3), set_transaction_id=False)])
    )
    await asyncio.sleep(0)
    durable_redis.start()
    written = await writing
    assert all(entry.entry_id and not entry.replies_lost for entry in written)
    numbers = [message["data_bytes_processed"] for message in await messages(redis, STREAMS.usage_records)]
    assert numbers == [1, 2, 3]
    await redis.aclose()


async def test_a_redis_that_stays_away_is_an_error_after_the_bound(redis_server: RedisServer) -> None:
    redis_server.kill()
    redis = connect(redis_server.port)
    began = time.monotonic()
    with pytest.raises(ProducerError, match="1 of 1 entries are not confirmed") as caught:
        await Producer(redis, STREAMS, wait_seconds=0.2).add(usage())
    assert 0.2 <= time.monotonic() - began < 5
    [entry] = caught.value.entries
    assert (entry.entry_id, entry.replies_lost) == (None, 0)


async def test_a_lost_reply_makes_a_second_entry_with_the_same_id(redis: Redis, lossy: Redis) -> None:
    written = await Producer(lossy, STREAMS).add(usage())
    assert written.replies_lost == 1
    sent = [message["transaction_id"] for message in await messages(redis, STREAMS.usage_records)]
    assert sent == [written.transaction_id] * 2


async def test_without_an_id_nothing_is_written_twice(redis: Redis, lossy: Redis) -> None:
    drafts = [Draft(usage(1)), Draft(usage(2), set_transaction_id=False)]
    with pytest.raises(ProducerError, match="1 of 2 entries are not confirmed") as caught:
        await Producer(lossy, STREAMS).add_many(drafts)
    first, second = caught.value.entries
    assert first.entry_id is not None
    assert (second.entry_id, second.transaction_id, second.replies_lost) == (None, None, 1)
    numbers = [message["data_bytes_processed"] for message in await messages(redis, STREAMS.usage_records)]
    assert numbers == [1, 2, 1]


async def test_a_full_redis_is_waited_for_and_gets_each_entry_once(producer: Producer, redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        writing = asyncio.create_task(producer.add_many([Draft(usage(1)), Draft(usage(2))]))
        await eventually(lambda: refused(redis))
    finally:
        await redis.config_set("maxmemory", 0)
    written = await writing
    assert [entry.replies_lost for entry in written] == [0, 0]
    assert len(await messages(redis, STREAMS.usage_records)) == 2


async def refused(redis: Redis) -> bool:
    return "errorstat_OOM" in await redis.info("errorstats")


async def test_a_user_who_may_not_write_is_told_at_once(redis: Redis, redis_server: RedisServer) -> None:
    await redis.acl_setuser("reader", enabled=True, passwords=["+secret"], commands=["+ping"], reset=True)
    reader = connect(redis_server.port, username="reader", password="secret")
    try:
        with pytest.raises(ProducerError, match="redis\\.username") as caught:
            await Producer(reader, STREAMS, wait_seconds=60).add(usage())
        assert isinstance(caught.value.__cause__, Denied)
    finally:
        await reader.aclose()
        await redis.acl_deluser("reader")


async def test_the_append_only_file_is_waited_for_where_the_server_can(durable_redis: RedisServer) -> None:
    redis = connect(durable_redis.port)
    written = await Producer(redis, STREAMS, fsync_seconds=5).add(usage())
    assert written.entry_id is not None
    calls: Any = await redis.info("commandstats")
    assert ("cmdstat_waitaof" in calls) == (durable_redis.kind == "valkey")  # the other one is Redis 7.0
    await redis.aclose()


async def test_an_append_only_file_that_is_off_is_an_error_that_says_so(
    redis: Redis, redis_server: RedisServer
) -> None:
    if redis_server.kind != "valkey":
        pytest.skip("this server has no WAITAOF")
    with pytest.raises(ProducerError, match="written, but not waited for on disk") as caught:
        await Producer(redis, STREAMS, fsync_seconds=5).add(usage())
    assert caught.value.entries[0].entry_id is not None
