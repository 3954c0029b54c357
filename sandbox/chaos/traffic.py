"""What keeps the agent busy during a run: AudioAPIServers on all streams, and an operator who sends commands."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from redis.exceptions import RedisError

from common.schemas import QuotaResponse
from common.streams import FIELD_DATA
from sandbox.audio_api_server import AudioAPIServer, Traffic
from sandbox.book import Book, Row, read
from sandbox.chaos.redis_server import connect
from sandbox.keys import FORGERIES, Command
from sandbox.process import ControlPlaneProcess

SERVERS = 3
MALFORMED = 0.01
SESSIONS = 4
USES = (0, 8)
"""Few and short sessions, so that a session's start and its end lie close together: order shows."""

COMMANDS = ("refresh_public_keys", "health_check", "get_metrics")
COMMAND_EVERY = 2.0
FORGED = 0.2
"""This share of the commands carries a token that must be refused."""


class AudioAPIServers:
    """Several at once, each with its own connection; one book for all."""

    def __init__(self, port: int, book: Path, rate: float, seed: int) -> None:
        self.failures: list[str] = []
        self.servers: list[AudioAPIServer] = []
        self._port, self._path, self._seed = port, book, seed
        self._book = Book(book)
        self._rate = rate
        self._stop = asyncio.Event()
        self._running: list[asyncio.Task[None]] = []
        self._held = asyncio.Event()
        self._held.set()

    def start(self) -> None:
        for number in range(SERVERS):
            traffic = Traffic(self._rate / SERVERS, SESSIONS, MALFORMED, self._seed + number, USES)
            self._running.append(asyncio.create_task(self._run(self.add(traffic))))

    def add(self, traffic: Traffic) -> AudioAPIServer:
        """One more, which its caller runs."""
        redis = connect(self._port)
        server = AudioAPIServer(redis, traffic, book=self._book, wait_seconds=60)
        self.servers.append(server)
        return server

    async def _run(self, server: AudioAPIServer) -> None:
        try:
            await server.run(until=self._stop, grants_within=0)
        except Exception as error:
            self.failures.append(f"an AudioAPIServer ended: {error!r}")

    async def finish(self) -> None:
        """No new sessions; those that are open are completed."""
        self._stop.set()
        await asyncio.gather(*self._running)

    def write(self, row: Row) -> None:
        """Books what was written by other means."""
        self._book.write([row])

    def rows(self) -> list[Row]:
        return list(read(self._path))

    @property
    def produced(self) -> int:
        return sum(sum(server.stats().produced.values()) for server in self.servers)


class GrantBook:
    """Every grant that came, over the whole run, with the times (Unix) at which it did."""

    def __init__(self, port: int, stream: str) -> None:
        self.came: dict[str, list[float]] = {}
        self._port, self._stream = port, stream
        self._last = b"0-0"
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with connect(self._port) as redis:
            while not self._stop.is_set():
                try:
                    reply: Any = await redis.xread({self._stream: self._last}, count=1000, block=200)
                except (RedisError, OSError):
                    await asyncio.sleep(0.1)
                    continue
                for _, entries in reply:
                    for self._last, fields in entries:
                        answer = msgspec.json.decode(fields[FIELD_DATA], type=QuotaResponse)
                        self.came.setdefault(answer.transaction_id, []).append(time.time())

    async def finish(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task

    def too_often(self, asked: Counter[str], forgotten: Sequence[float]) -> dict[str, int]:
        """Ids that were granted more often than asked, but for what Redis forgot in between."""
        found = {}
        for id, times in self.came.items():
            excused = sum(times[0] < at < times[-1] for at in forgotten)
            if id in asked and len(times) > asked[id] + excused:
                found[id] = len(times)
        return found


class Operator:
    """Sends commands through the ControlPlane, some with forged tokens."""

    def __init__(self, control_plane: ControlPlaneProcess, server_id: str, seed: int) -> None:
        self._control_plane, self._server_id = control_plane, server_id
        self._random = random.Random(seed)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.sent = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stop.is_set():
            forge = self._random.choice(FORGERIES) if self._random.random() < FORGED else None
            command = Command(self._server_id, self._random.choice(COMMANDS), forge=forge)
            try:
                await self._control_plane.enqueue(command)
                self.sent += 1
            except (OSError, aiohttp.ClientError, TimeoutError):
                pass  # it is away: nothing was sent, or it was and its reply is lost
            try:
                await asyncio.wait_for(self._stop.wait(), COMMAND_EVERY)
            except TimeoutError:
                pass

    async def finish(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task
