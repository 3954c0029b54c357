"""The tests' own ground: a server is empty for each test, survives being killed, and keeps what it should."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support import RedisServer, connect, eventually


async def test_a_killed_server_refuses_and_is_empty_when_it_is_back(
    redis_server: RedisServer, redis: Redis
) -> None:
    await redis.set("key", "value")
    redis_server.kill()
    with pytest.raises(RedisConnectionError):
        await redis.get("key")
    redis_server.forget()
    assert await redis.get("key") is None


async def test_a_durable_server_keeps_every_write_over_a_crash(durable_redis: RedisServer) -> None:
    async with connect(durable_redis.port) as client:
        await client.set("key", "value")
    durable_redis.restart()
    async with connect(durable_redis.port) as client:
        assert await client.get("key") == b"value"


async def test_eventually_returns_the_first_true_value_and_fails_at_the_deadline() -> None:
    values = iter([0, "", "yes"])
    assert await eventually(lambda: next(values), every=0) == "yes"
    with pytest.raises(AssertionError, match="not within"):
        await eventually(lambda: False, within=0, every=0)
