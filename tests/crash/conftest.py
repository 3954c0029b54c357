"""Servers and service processes of one test's own: what is killed here is nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sandbox.control_plane import ControlPlane
from tests.services import Services
from tests.support import RedisServer, connect

VISIBILITY = 1.0
"""Seconds after which what a killed process left is taken over, where a test does not say otherwise."""


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that fsyncs every write: the embedded Valkey, or the kind that the test is parametrised with."""
    server = RedisServer(getattr(request, "param", "valkey"), tmp_path, *RedisServer.DURABLE)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of `redis_server`: bytes, RESP2, no retries."""
    client = connect(redis_server.port)
    yield client
    await client.aclose()


@pytest.fixture
def services(redis_server: RedisServer, control_plane: ControlPlane) -> Iterator[Services]:
    """Starts service processes that take over quickly; none is left at the end."""
    with Services(
        redis_server.port,
        control_plane,
        control_plane__timeout=5,
        streams__visibility_timeout=VISIBILITY,
        streams__claim_interval=0.2,
    ) as services:
        yield services
