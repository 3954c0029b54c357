"""Laws of SIGTERM: a process that is asked to stop ends in time, and another goes on with what it had in hand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from redis.asyncio import Redis

from sandbox.control_plane import ControlPlane
from tests.services import STREAMS, Services, drained, figures_of
from tests.support import eventually

DRAIN_SECONDS = 1.5
HANDOVER_SECONDS = 2.0
"""Contract section 4.5: from the end of a process until another delivers what it handed over."""

UNHURRIED = 20.0
"""A visibility timeout that no test waits for: what happens sooner is no takeover from the dead."""

MARGIN = 0.7
"""For a busy machine; far below every wait that a wrong hand-over would cost."""

MESSAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "usage_forwarder": (
        "usage_records",
        "usage",
        {
            "connection_duration_seconds": 12.5,
            "data_bytes_processed": 400_000,
            "audio_duration_seconds": 11.25,
            "request_timestamp": "2026-01-31T08:00:00Z",
            "response_timestamp": "2026-01-31T08:00:12.5Z",
        },
    ),
    "session_notifier": ("start", "start", {"event_type": "start", "timestamp": "2026-01-31T08:00:00Z"}),
    "quota_refresher": ("refresh", "refresh", {"timestamp": "2026-01-31T08:00:00Z"}),
}
"""Service -> the call it makes, the kind it is recorded as, and a message beside its session."""


async def add(redis: Redis, service: str, sessions: Iterable[str]) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for session in sessions:
            message = {"api_session_id": session, "customer_id": "customer-1", **MESSAGES[service][2]}
            pipe.xadd(STREAMS[service].name, {"data": json.dumps(message)})
        await pipe.execute()


@pytest.mark.parametrize("service", STREAMS)
async def test_what_a_stopped_process_had_in_hand_is_delivered_by_another_within_two_seconds(
    service: str, services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    endpoint, kind, _ = MESSAGES[service]
    settings = {
        "streams__visibility_timeout": UNHURRIED,
        "streams__claim_interval": 5,
        "shutdown__drain_seconds": DRAIN_SECONDS,
        "control_plane__timeout": 30,
    }
    leaver = await services.start(service, **settings).ready()
    hanging = [f"hanging-{n}" for n in range(8)]
    others = [f"other-{n}" for n in range(400)]
    fault = control_plane.fault("hang", endpoint, sessions=hanging)
    control_plane.fault("latency", endpoint, seconds=0.02)
    await add(redis, service, hanging)
    await control_plane.until_arrived(len(hanging), endpoint)
    await services.start(service, **settings).ready()
    await add(redis, service, others)
    await control_plane.until_recorded(100, kind)
    control_plane.faults.drop(fault)  # what hangs goes on hanging; what is sent anew does not

    begun = time.monotonic()
    assert await leaver.stop() == 0
    ended = time.monotonic()
    assert ended - begun < DRAIN_SECONDS + MARGIN
    everything = len(hanging) + len(others)
    await control_plane.until_recorded(everything, kind)
    await eventually(lambda: drained(redis, service))
    assert time.monotonic() - ended < HANDOVER_SECONDS + MARGIN

    figures = await figures_of(redis, service)
    assert figures.imbalance == 0
    assert figures.dead == {}
    assert [consumer.name for consumer in figures.consumers if consumer.name == leaver.consumer] == []
    if service == "quota_refresher":
        assert await redis.xlen("queue:quota_response") == everything


async def test_a_stopped_notifier_leaves_the_turn_free_however_long_its_requests_hang(
    services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    # It asks for the turn so often here that it would take it again between giving it up and its end.
    notifier = services.start(
        "session_notifier",
        streams__visibility_timeout=1.2,
        shutdown__drain_seconds=2.5,
        control_plane__timeout=30,
    )
    await notifier.ready()
    control_plane.fault("hang", "start")
    await add(redis, "session_notifier", ["hanging"])
    await control_plane.until_arrived(1, "start")
    assert await notifier.stop() == 0
    assert not await redis.exists(STREAMS["session_notifier"].turn_key)


async def test_replicas_that_come_and_go_in_good_order_under_load_deliver_nothing_twice(
    services: Services, control_plane: ControlPlane, redis: Redis
) -> None:
    replicas = [services.start("usage_forwarder", streams__visibility_timeout=UNHURRIED) for _ in range(2)]
    await asyncio.gather(*(replica.ready() for replica in replicas))
    control_plane.fault("latency", seconds=0.01)
    await add(redis, "usage_forwarder", [f"session-{n}" for n in range(6000)])
    for replica in replicas:
        await control_plane.until_arrived(control_plane.requests["*"] + 200)
        assert await replica.stop() == 0
        replica.start()
    await eventually(lambda: drained(redis, "usage_forwarder"), within=20)
    assert control_plane.stats().recorded["usage"] == 6000
    assert control_plane.stats().duplicates == 0
