"""What faults of Redis mean to the process: how long to wait, whether it is connected, and what is fatal."""

from __future__ import annotations

from io import StringIO

import pytest
from redis.asyncio import Redis

from common import logs
from common.config import Monitoring
from common.redis_border import Away, Demoted, Denied, Full, GroupGone
from common.redis_state import LONGEST, SHORTEST, RedisState


class Seen:
    """A state on a clock of its own, and whom it told what."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fatal: list[str] = []
        self.connected: list[bool] = []
        self.redis = Redis()
        self.state = RedisState(self.redis, lambda: self.now, self.fatal.append, self.connected.append)


def test_the_pause_grows_with_the_outage_and_has_bounds() -> None:
    seen = Seen()
    pauses = []
    for seconds in (0.0, 0.1, 1.0, 4.0, 9.0, 1000.0):
        seen.now = 100.0 + seconds
        pauses.append(seen.state.failed(Away("gone")))
    assert pauses == pytest.approx([SHORTEST, SHORTEST, 0.5, 2.0, 4.5, LONGEST])


def test_an_outage_begins_with_its_first_fault_and_ends_with_an_answer() -> None:
    seen = Seen()
    seen.state.answered()
    assert seen.state.connected
    seen.state.failed(Away("gone"))
    assert not seen.state.connected
    assert seen.state.last_fault == "gone"
    seen.now += 60
    seen.state.answered()
    assert seen.state.failed(Away("gone again")) == SHORTEST  # a new outage
    assert seen.connected == [True, False, True, False]


@pytest.fixture
def log() -> StringIO:
    """What is logged from here on."""
    written = StringIO()
    logs.setup("test", Monitoring(), "server", stream=written)
    return written


def test_an_outage_is_two_log_lines(log: StringIO) -> None:
    seen = Seen()
    for _ in range(1000):
        seen.state.failed(Away("gone"))
        seen.now += 0.1
    for _ in range(1000):
        seen.state.answered()
    lines = [line for line in log.getvalue().splitlines() if '"redis.' in line]
    assert len(lines) == 2
    assert "redis.unreachable" in lines[0]
    assert "redis.recovered" in lines[1]


@pytest.mark.parametrize("fault", [GroupGone("NOGROUP"), Full("OOM")])
def test_a_missing_group_and_a_full_memory_are_no_outage(fault: GroupGone | Full) -> None:
    seen = Seen()
    seen.state.answered()
    assert SHORTEST <= seen.state.failed(fault) <= LONGEST
    assert seen.state.connected
    assert seen.connected == [True]


def test_a_full_memory_is_said_once_a_minute(log: StringIO) -> None:
    seen = Seen()
    for _ in range(150):
        seen.state.failed(Full("OOM"))
        seen.now += 1.0
    assert log.getvalue().count("redis.full") == 3


def test_a_refusal_is_fatal() -> None:
    seen = Seen()
    seen.state.failed(Away("gone"))
    assert seen.fatal == []
    seen.state.failed(Denied("WRONGPASS"))
    assert seen.fatal == ["WRONGPASS"]


async def test_a_primary_that_became_a_replica_loses_its_connections() -> None:
    seen = Seen()
    dropped = 0

    async def disconnect(inuse_connections: bool = True) -> None:
        nonlocal dropped
        dropped += 1

    seen.redis.connection_pool.disconnect = disconnect
    for _ in range(3):
        seen.state.failed(Demoted("READONLY"))
    dropping = seen.state._dropping
    assert dropping is not None
    await dropping
    assert dropped == 1
