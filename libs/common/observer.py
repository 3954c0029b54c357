"""The observer: what a process sees of itself, for metrics, health, and the presence that others read."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import TYPE_CHECKING

from common import figures, presence
from common.consumer import Consumer
from common.figures import StreamFigures
from common.health import State
from common.presence import Presence
from common.process import cpu_seconds, memory_mb, seconds_since_start
from common.redis_border import RedisFault

if TYPE_CHECKING:
    from common.service import Running, Service

LOOK_EVERY = 1.0
"""Seconds between two looks at the stream's figures."""

FORGET_EVERY = 600.0
"""Seconds between two looks for processes that went without a word."""


class Observer:
    """Looks at the stream every second, for metrics and health, and writes the process's presence."""

    def __init__(self, running: Running, service: Service, consumer: Consumer) -> None:
        self._running = running
        self._service = service
        self._consumer = consumer
        self._figures: StreamFigures | None = None
        self._started_at = running.clock()
        self._ready_seconds: float | None = None
        self._written_at = float("-inf")
        self._said: tuple[object, ...] = ()
        self._forgot_at = running.clock()
        self._cpu = (running.clock(), cpu_seconds())

    async def run(self) -> None:
        running, consumer = self._running, self._consumer
        while True:
            if self._ready_seconds is None and consumer.ready_at is not None:
                self._ready_seconds = round(seconds_since_start(), 3)
                _tune_collector()
                running.log.info("service.ready", seconds=self._ready_seconds, consumer=consumer.name)
            running.metrics.in_flight.set(consumer.in_flight)
            running.metrics.in_flight_limit.set(consumer.delivery.level.limit)
            try:
                await self._look()
                if self._said != self._to_say() or running.clock() - self._written_at >= presence.WRITE_EVERY:
                    await presence.write(running.redis, running.config.server.id, self._presence())
                    running.redis_state.answered()  # while the gate is shut, the loop asks nothing of Redis
                    self._written_at, self._said = running.clock(), self._to_say()
                if running.clock() - self._forgot_at >= FORGET_EVERY:
                    await presence.forget_stale(running.redis, running.config.server.id, time.time())
                    self._forgot_at = running.clock()
            except RedisFault as fault:
                running.redis_state.failed(fault)
                await asyncio.sleep(LOOK_EVERY)
            else:
                await asyncio.sleep(LOOK_EVERY if self._ready_seconds is not None else 0.02)

    async def withdraw(self, until: float) -> None:
        """The process goes in good order: nobody is to miss it."""
        running = self._running
        try:
            async with asyncio.timeout_at(until):
                field = f"{running.name}/{running.consumer_name}"
                await presence.withdraw(running.redis, running.config.server.id, field)
        except (RedisFault, TimeoutError) as fault:
            running.log.debug("observer.redis_fault", error=str(fault))

    def state(self) -> State:
        """The process as the health endpoints tell it."""
        running, gate = self._running, self._running.gate
        return State(
            service=running.name,
            server_id=running.config.server.id,
            version=running.version,
            started_at=self._started_at,
            redis_connected=running.redis_connected,
            control_plane_connected=gate.connected,
            unready=self._consumer.unready,
            hold=gate.hold,
            breaker=gate.breaker.state,
            in_flight=self._consumer.in_flight,
            figures=self._figures,
            last_success=running.client.last_success,
            last_error=running.client.last_error,
        )

    def _to_say(self) -> tuple[object, ...]:
        """What others should know at once when it changes."""
        state = self.state()
        return self._ready_seconds, state.status, state.breaker, state.hold

    async def _look(self) -> None:
        self._figures = await figures.read(self._running.scripts, self._service.stream)
        self._running.metrics.figures(self._figures)
        if self._service.on_figures is not None:
            self._service.on_figures(self._figures)
        await self._consumer.sentinel.look()

    def _presence(self) -> Presence:
        running, state = self._running, self.state()
        seen_at, cpu_then = self._cpu
        self._cpu = (running.clock(), cpu_seconds())
        elapsed = max(0.001, self._cpu[0] - seen_at)
        turn = self._consumer.turn
        return Presence(
            at=time.time(),
            service=running.name,
            consumer=running.consumer_name,
            pid=os.getpid(),
            version=running.version,
            status=state.status,
            uptime_seconds=round(running.clock() - self._started_at, 3),
            breaker=state.breaker,
            hold=presence.Hold(state.hold.kind, state.hold.detail) if state.hold else None,
            in_flight=state.in_flight,
            redis_connected=state.redis_connected,
            control_plane_connected=state.control_plane_connected,
            counters=presence.Counters(**running.metrics.totals()),
            queue_depth=self._figures.backlog if self._figures else 0,
            memory_usage_mb=memory_mb(),
            cpu_usage_percent=round(100 * (self._cpu[1] - cpu_then) / elapsed, 2),
            last_success=state.last_success,
            last_error=state.last_error,
            stream=self._figures or StreamFigures(),
            ready_seconds=self._ready_seconds,
            holds_turn=turn.held if turn is not None else None,
        )


def _tune_collector() -> None:
    """What is there when a service is ready stays: the collector need not look at it again, nor look so often.

    Entries, outcomes and answers hold no cycles; at thousands a second its default threshold is met all the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
