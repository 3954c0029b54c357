"""How many requests are in flight: the loop, the client and the level, with a transport that does as it is told."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

from redis.asyncio import Redis

from common import logs
from common.concurrency import START
from common.config import ControlPlane, Secret
from common.control_plane.breaker import FAILURES
from common.control_plane.client import ControlPlaneClient, EntryCall, build
from common.control_plane.errors import ConnectFailed
from common.control_plane.verdicts import Answer
from common.entries import Entry
from common.outcomes import Outcome
from tests.integration.workbench import STREAM, Told, add, consuming, make_groups, settled
from tests.support import RedisServer, eventually

MOST = 32


class Carrier:
    """Cannot connect while it is down; else the requests it is given are answered one `answer` after the other."""

    def __init__(self) -> None:
        self.down = True
        self.at_once = False
        self.waiting: list[asyncio.Future[None]] = []
        self.in_flight = self.most = 0

    async def send(self, method: str, path: str, *_: Any) -> Answer:
        if self.down:
            raise ConnectFailed("cannot connect")
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if self.at_once:
                await asyncio.sleep(0.002)
            else:
                self.waiting.append(asyncio.get_running_loop().create_future())
                await self.waiting[-1]
        finally:
            self.in_flight -= 1
        return Answer(200, b'{"success":true}', 0.002)

    def answer(self) -> None:
        for waiting in self.waiting:
            waiting.set_result(None)
        self.waiting.clear()

    def renew(self) -> None: ...

    async def close(self, timeout: float) -> int:
        return 0


class Posting(Told):
    """A handler that really asks the client."""

    def __init__(self, client: ControlPlaneClient) -> None:
        super().__init__()
        self._client = client

    async def deliver(self, entries: list[Entry]) -> list[Outcome]:
        call = EntryCall(entries[0].transaction_id, "correlation", quick_retries=False)
        return [await self._client.usage_record(entries[0].lane, b"{}", call)]


async def test_after_an_outage_not_all_slots_start_at_once(redis: Redis, redis_server: RedisServer) -> None:
    carrier = Carrier()
    client = build(
        ControlPlane(base_url="https://nowhere", api_key=Secret("key"), max_in_flight=MOST),
        "server-1",
        "1.0",
        clock=asyncio.get_running_loop().time,
        random=Random(7),
        logger=logs.get("control_plane"),
    )
    client.transport = carrier
    await make_groups(redis, STREAM)
    await add(redis, *(f"session-{n}" for n in range(500)))
    handler = Posting(client)
    async with consuming(
        redis_server.port, handler, gate=client.gate, level=client.level, max_in_flight=MOST
    ) as me:
        await eventually(lambda: client.gate.breaker.state != "closed", every=0.002)
        assert client.requests_total == FAILURES
        carrier.down = False
        await eventually(lambda: carrier.waiting, every=0.002)
        assert carrier.in_flight == 1  # the probe
        carrier.answer()
        await eventually(lambda: len(carrier.waiting) == START, every=0.002)
        await eventually(lambda: len(me.consumer.hand) > MOST, every=0.002)
        assert carrier.in_flight == START
        carrier.at_once = True
        carrier.answer()
        await settled(redis, 500)
    assert carrier.most == MOST
