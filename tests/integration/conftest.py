"""Real servers: the embedded Valkey, and redis-server where it is installed; each is empty for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from tests.support import SERVERS, RedisServer, connect


@pytest.fixture(scope="session", params=SERVERS)
def redis_process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """One process of each kind for the whole session; use `redis_server`, which is empty."""
    server = RedisServer(request.param, tmp_path_factory.mktemp(request.param))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """An empty server that persists nothing; a test may kill it, the next finds it running again."""
    redis_process.forget()
    return redis_process


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of `redis_server`: bytes, RESP2, no retries."""
    client = connect(redis_server.port)
    yield client
    await client.aclose()


@pytest.fixture(params=SERVERS)
def durable_redis(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """A server of the test's own that fsyncs every write: for tests that crash it and look what is left."""
    server = RedisServer(request.param, tmp_path_factory.mktemp(request.param), *RedisServer.DURABLE)
    server.start()
    yield server
    server.kill()
