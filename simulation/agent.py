"""One process of a stream service: the real loop, client, gate and handler, put together as a service does it."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from common import logs, service
from common.config import Config
from common.consumer import Consumer
from common.control_plane.client import ControlPlaneClient
from common.control_plane.gate import Gate, Unobserved
from common.delivery import Handler, Limits
from common.entries import Entry
from common.observer import LOOK_EVERY
from common.outcomes import Cause, Outcome, Reason
from common.redis_border import RedisFault, Scripts
from common.redis_state import RedisState
from common.service import Sender
from common.streams import Stream
from quota_refresher.handler import QuotaRefresher
from session_notifier.handler import SessionNotifier
from simulation.control_plane import Carrier, ControlPlane
from simulation.loop import Loop, Process
from simulation.network import Line, Network
from simulation.plan import HOLD, MAX_DELIVERIES, Plan
from usage_forwarder.handler import UsageForwarder

HANDLERS: dict[str, Callable[[Any], Handler]] = {
    "usage_forwarder": UsageForwarder,
    "session_notifier": SessionNotifier,
    "quota_refresher": QuotaRefresher,
}


class Agent(Process):
    """A process of one service from its start to its end."""

    def __init__(
        self,
        name: str,
        slot: int,
        *,
        loop: Loop,
        plan: Plan,
        config: Config,
        stream: Stream,
        response_stream: str | None,
        network: Network,
        control_plane: ControlPlane,
        random: Random,
        fuse: Callable[[Agent, str, bytes], bool],
        failed: Callable[[str], None],
        ended: Callable[[Agent], None],
    ) -> None:
        super().__init__(name)
        self.slot = slot
        self.stopped = False
        self.paused_at = float("-inf")  # until when it was paused last
        self.stopping = asyncio.Event()
        self.opened_at: float | None = None  # the breaker's last opening
        self.dies_at_reply = False
        self._config = config
        self._failed = failed
        self._ended = ended
        self._loop = loop
        gate = Gate(
            clock=loop.time, random=random, logger=logs.get("control_plane"), observer=_Watch(self, loop)
        )
        redis = Line(network, self)
        self.client = ControlPlaneClient(
            config.control_plane,
            config.server.id,
            transport=Carrier(control_plane, self),
            gate=gate,
            random=random,
            wall=loop.wall,
        )
        running = SimpleNamespace(
            config=config,
            client=self.client,
            sender=Sender(config.server.id, config.server.region, "0"),
            timestamp=lambda: f"{loop.wall():.3f}",
            metrics=None,
            clock=loop.time,
            log=logs.get("service"),
            stop_reason="SIGTERM",
        )
        handler = HANDLERS[plan.service](running)
        limits = Limits(
            read_count=plan.read_count,
            max_in_flight=plan.max_in_flight,
            batch=handler.batch,
            visibility_timeout=plan.visibility_timeout,
            claim_interval=plan.claim_interval,
            max_deliveries=MAX_DELIVERIES,
            not_found_hold=HOLD,
        )
        self.gate = gate
        self.consumer = Consumer(
            name,
            plan.service,
            stream,
            _Fused(handler, self, fuse),
            limits,
            scripts=Scripts(redis),
            gate=gate,
            redis_state=RedisState(redis, loop.time, failed, lambda yes: None),
            tally=_Tally(),
            clock=loop.time,
            random=random,
            response_stream=response_stream,
        )
        self._running = running

    def start(self) -> None:
        self._loop.spawn(self, self._live(), f"{self.name} main")

    async def _live(self) -> None:
        """As `service._live` does it, without ports and signals."""
        consumer = self.consumer
        loop = asyncio.create_task(self._child("consumer", consumer.run))
        children = {**consumer.children(), "probe": self.client.run_probe, "sentinel": self._look}
        tasks = [asyncio.create_task(self._child(name, run)) for name, run in children.items()]
        await self.stopping.wait()
        try:
            await service._stop(
                cast(Any, self._running),
                cast(Any, SimpleNamespace(last_words=None)),
                consumer,
                cast(Any, SimpleNamespace(withdraw=_nothing)),
                loop,
            )
        except Exception:
            self._failed(f"{self.name} did not stop: {traceback.format_exc()}")
        self.stopped = True
        for task in (loop, *tasks):
            task.cancel()
        self._ended(self)
        self.kill()

    async def _look(self) -> None:
        """As the observer does it."""
        while True:
            try:
                await self.consumer.sentinel.look()
            except RedisFault:
                pass
            await asyncio.sleep(LOOK_EVERY)

    async def _child(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except Exception:
            self._failed(f"{self.name}'s child {name} failed: {traceback.format_exc()}")


class _Fused(Handler):
    """The real handler, for which some entries are poison."""

    def __init__(self, handler: Handler, agent: Agent, fuse: Callable[[Agent, str, bytes], bool]) -> None:
        self.ordered = handler.ordered
        self.batch = handler.batch
        self.figures = handler.figures  # type: ignore[method-assign]
        self._handler = handler
        self._agent = agent
        self._fuse = fuse

    def decode(self, entry: Entry, data: bytes | None) -> str:
        self._fuse(self._agent, "decode", entry.id)
        return self._handler.decode(entry, data)

    async def deliver(self, entry: Entry) -> Outcome:
        return (await self.deliver_batch([entry]))[0]

    async def deliver_batch(self, entries: list[Entry]) -> list[Outcome]:
        for entry in entries:
            if self._fuse(self._agent, "send", entry.id):
                await asyncio.Event().wait()
        one = len(entries) == 1
        outcomes = (
            [await self._handler.deliver(entries[0])] if one else await self._handler.deliver_batch(entries)
        )
        for entry in entries:
            if self._fuse(self._agent, "answer", entry.id):
                await asyncio.Event().wait()
        return outcomes


class _Tally:
    """Counts nothing."""

    def settled(self, delivered: int, duplicate: int, seconds: list[float]) -> None: ...
    def buried(self, reason: Reason) -> None: ...
    def vanished_entries(self, n: int) -> None: ...
    def retried_entries(self, cause: Cause) -> None: ...
    def claimed_entries(self, n: int) -> None: ...
    def lost_entries(self, n: int) -> None: ...


class _Watch(Unobserved):
    """Notes when the breaker opens."""

    def __init__(self, agent: Agent, loop: Loop) -> None:
        self._agent = agent
        self._loop = loop

    def breaker_state(self, state: int) -> None:
        self._agent.opened_at = self._loop.time() if state == 2 else None


async def _nothing(*_: object) -> None:
    pass
