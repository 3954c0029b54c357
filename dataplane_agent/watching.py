"""Looks at the demo twice a second: its figures, which processes came back, how much memory they take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from redis.asyncio import Redis

from dataplane_agent import memory, status
from dataplane_agent.show import Scene, Show
from dataplane_agent.stage import Stage
from dataplane_agent.status import Snapshot
from dataplane_agent.target import SERVICES
from sandbox.audio_api_server import AudioAPIServer

WATCH_EVERY = 0.5


class MemorySample(msgspec.Struct, frozen=True):
    """PSS in MB at one moment: one process of each service, and what `dataplane run` has beside these."""

    services: dict[str, float] = {}
    others: float = 0.0

    @property
    def four(self) -> float:
        return sum(self.services.values())


class Watcher:
    """Tells the show what it sees, and keeps what the report wants to know."""

    def __init__(self, stage: Stage, redis: Redis, servers: Sequence[AudioAPIServer], show: Show) -> None:
        self._stage = stage
        self._redis = redis
        self._servers = servers
        self._show = show
        self._known: set[str] = set()
        self.over = asyncio.Event()
        self.ready_seconds: dict[str, float] = {}
        """Of each service, what its first process says: from its fork until it was ready."""
        self.most = MemorySample()
        """The sample in which the four took most."""

    async def run(self) -> None:
        """Until it is `over`."""
        while not self.over.is_set():
            await self._look()
            await asyncio.sleep(WATCH_EVERY)
        await self._look()  # the last picture is the final one

    async def _look(self) -> None:
        snapshot = await status.read(self._redis, self._stage.settings)
        stats = await self._stage.control_plane.stats()
        self._look_at_processes(snapshot)
        self._weigh(snapshot)
        self._show.scene(
            Scene(
                snapshot=snapshot,
                produced=sum(sum(server.stats().produced.values()) for server in self._servers),
                recorded=sum(stats.recorded.values()),
                control_plane_is_up=not stats.outage,
            )
        )

    def _look_at_processes(self, snapshot: Snapshot) -> None:
        for process in snapshot.processes:
            if self._known and process.field not in self._known:
                self._show.event(f"{process.service} is back as process {process.pid}")
            if process.ready_seconds is not None:
                self.ready_seconds.setdefault(process.service, process.ready_seconds)
        self._known.update(process.field for process in snapshot.processes)

    def _weigh(self, snapshot: Snapshot) -> None:
        services: dict[str, float] = {}
        others = memory.pss_mb(self._stage.supervisor_pid) or 0.0
        for process in snapshot.processes:
            pss = memory.pss_mb(process.pid)
            if pss is None:
                continue  # killed a moment ago
            if process.service in services:
                others += pss
            else:
                services[process.service] = pss
        sample = MemorySample(services, others)
        if len(services) == len(SERVICES) and sample.four > self.most.four:
            self.most = sample
