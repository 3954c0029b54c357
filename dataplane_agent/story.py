"""What happens in the demo, in the order it happens, and what it comes to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from redis.asyncio import Redis

from common import dead_letters
from common.streams import Stream
from dataplane_agent import printing, show, status, target
from dataplane_agent.show import Show
from dataplane_agent.stage import Stage, staged
from dataplane_agent.target import Failure
from dataplane_agent.watching import Watcher
from sandbox.audio_api_server import AudioAPIServer, Traffic
from sandbox.book import Book
from sandbox.reconciler import Reconciliation, reconcile
from sandbox.redis_book import read_grants, read_redis

RATE = 200.0
SESSIONS = 60
MALFORMED = 0.02
"""Entries a second, sessions at a time, and the share of entries that nobody can read."""

CALM = 0.4
"""For this share of the time nothing is done to anybody; what a grant takes is measured in it."""

FIRST_KILL, SECOND_KILL, OUTAGE = 0.1, 0.35, 0.6
"""When what follows strikes, as shares of the rest."""

SLOW_SECONDS = 0.15
"""The ControlPlane takes this long around a kill, so that it strikes in the middle of deliveries."""

STRIKE_WITHIN_SECONDS = 10.0
OUTAGE_SECONDS = 4.0
GRANTS_WITHIN_SECONDS = 10.0
DRAIN_WITHIN_SECONDS = 60.0
SHOWN_DEAD = 5

REPLICAS = {"session_notifier": 2}
"""One waits for the other's turn: so the active one can be killed."""


async def tell(directory: Path, seconds: float) -> int:
    """The whole demo; 0 when everything adds up, else 1."""
    with show.opened() as opened:
        opened.event("starting an embedded Valkey, a ControlPlane over TLS, and the services")
        async with staged(directory, REPLICAS) as stage, stage.connect() as redis:
            story = Story(stage, redis, opened)
            await story.play(seconds)
            stopped = await stage.stop_services()
            opened.event(f"dataplane run has stopped with exit code {stopped}")
            books = await story.reconcile()
            dead = [line async for line in story.dead_view()]
            words = stage.last_words()
    well = story.drained and story.imbalance == 0 and stopped == 0 and books.ok and books.settled
    for line in ("", *dead, *story.figures(), "", books.render(), "", verdict(books, well)):
        print(line)
    if not well:
        print(f"drained: {story.drained}; ledgers off by {story.imbalance}; the services said last:\n{words}")
    return 0 if well else 1


def verdict(books: Reconciliation, well: bool) -> str:
    """The last line: the sum, and whether it is one."""
    produced, delivered, dead = books.total("produced"), books.total("delivered"), sum(books.dead().values())
    wrongs = [f"{name.replace('_', ' ')} {len(books.wrong(name))}" for name in VERDICT]
    sign = "=" if produced == delivered + dead else "≠"
    said = "it adds up" if well else "IT DOES NOT ADD UP"
    return f"produced {produced} {sign} delivered {delivered} + dead {dead}, {', '.join(wrongs)}: {said}"


VERDICT = ("lost", "billed_twice", "out_of_order")


class Story:
    """The plot: calm traffic; then two kills and an outage under traffic; then the drain."""

    def __init__(self, stage: Stage, redis: Redis, opened: Show) -> None:
        self._stage = stage
        self._redis = redis
        self._show = opened
        self._streams = target.streams(stage.settings)
        self._calm, self._stormy = (
            AudioAPIServer(
                redis,
                Traffic(RATE, SESSIONS, MALFORMED, seed),
                streams=stage.settings.streams,
                book=Book(stage.directory / f"produced-{seed}.jsonl"),
            )
            for seed in (1, 2)
        )
        self._watcher = Watcher(stage, redis, (self._calm, self._stormy), opened)
        self._calm_memory = 0.0
        self.drained = False
        self.imbalance = 0

    async def play(self, seconds: float) -> None:
        """All of it, until nothing is under way any more."""
        for name, ready in self._stage.ready_seconds.items():
            self._show.event(f"{name} is ready, {ready:.2f} s after the start of dataplane run")
        watching = asyncio.create_task(self._watcher.run(), name="watcher")
        try:
            await self._traffic(seconds)
            self._show.event("traffic has ended; waiting until nothing is under way")
            self.drained = await _until(self._is_drained, DRAIN_WITHIN_SECONDS)
        except ExceptionGroup as group:
            raise _first_of(group) from group
        finally:
            self._watcher.over.set()
            await watching

    async def _traffic(self, seconds: float) -> None:
        self._show.event(f"AudioAPIServers write {RATE:g} entries/s, {MALFORMED:.0%} of them malformed")
        await self._calm.run(CALM * seconds, grants_within=GRANTS_WITHIN_SECONDS)
        self._calm_memory = self._watcher.most.four
        stormy = (1 - CALM) * seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stormy.run(stormy, grants_within=DRAIN_WITHIN_SECONDS))
            group.create_task(self._calamities(stormy))

    async def _calamities(self, seconds: float) -> None:
        usage, lifecycle = self._streams["usage_records"], self._streams["session_lifecycle"]
        begun = time.monotonic()

        async def moment(share: float) -> None:
            await asyncio.sleep(max(0.0, begun + share * seconds - time.monotonic()))

        async with asyncio.TaskGroup() as group:
            await moment(FIRST_KILL)
            victim = await self._kill(usage, ["usage_records"], self._busiest)
            group.create_task(self._until_taken_over(usage, victim))
            await moment(SECOND_KILL)
            victim = await self._kill(lifecycle, ["start", "complete"], self._holder_of_the_turn)
            group.create_task(self._until_taken_over(lifecycle, victim))
            await moment(OUTAGE)
            outage = max(OUTAGE_SECONDS, 0.2 * seconds)
            await self._stage.control_plane.outage(outage)
            self._show.event(f"the ControlPlane is cut off for {outage:g} s")

    async def _kill(
        self, stream: Stream, endpoints: list[str], find: Callable[[Stream], Awaitable[str | None]]
    ) -> str:
        """SIGKILL for a consumer in the middle of its deliveries; its name."""
        for endpoint in endpoints:
            await self._stage.control_plane.fault("latency", endpoint=endpoint, seconds=SLOW_SECONDS)
        victim = ""

        async def delivers() -> bool:
            nonlocal victim
            victim = await find(stream) or victim
            return bool(victim) and await self._pending(stream, victim) > 0

        await _until(delivers, STRIKE_WITHIN_SECONDS, every=0.005)
        if not victim:
            raise Failure(
                f"nobody delivers {stream.name}; the services said last:\n{self._stage.last_words()}", 1
            )
        pid = int(victim.rsplit("-", 2)[1])  # <service>-<host>-<pid>-<6 hex>
        os.kill(pid, signal.SIGKILL)
        left = await self._pending(stream, victim)
        await self._stage.control_plane.clear_faults()
        self._show.event(f"SIGKILL for {stream.group}, process {pid}: it leaves {left} entries undelivered")
        return victim

    async def _until_taken_over(self, stream: Stream, victim: str) -> None:
        begun = time.monotonic()

        async def taken_over() -> bool:
            return await self._pending(stream, victim) == 0

        if await _until(taken_over, DRAIN_WITHIN_SECONDS):
            took = time.monotonic() - begun
            self._show.event(f"what {victim} left was taken over within {took:.1f} s")

    async def _busiest(self, stream: Stream) -> str | None:
        pending = await self._consumers(stream)
        return max(pending, key=lambda name: pending[name], default=None)

    async def _holder_of_the_turn(self, stream: Stream) -> str | None:
        token = await self._redis.get(stream.turn_key)
        return token.decode() if isinstance(token, bytes) else None

    async def _pending(self, stream: Stream, consumer: str) -> int:
        return (await self._consumers(stream)).get(consumer, 0)

    async def _consumers(self, stream: Stream) -> dict[str, int]:
        summary = await self._redis.xpending(stream.name, stream.group)
        return {one["name"].decode(): one["pending"] for one in summary["consumers"]}

    async def _is_drained(self) -> bool:
        snapshot = await status.read(self._redis, self._stage.settings)
        self.imbalance = snapshot.imbalance
        return not any(figure.backlog or figure.pending for _, figure in snapshot.streams)

    # --- what it comes to -----------------------------------------------------------------------------------

    async def reconcile(self) -> Reconciliation:
        """The three books, compared; read in the order in which entries move."""
        produced = [row for server in (self._calm, self._stormy) for row in server.book.rows()]
        holdings = await read_redis(self._redis, list(self._streams.values()))
        grants = await read_grants(self._redis, self._stage.settings.streams.quota_response)
        return reconcile(produced, await self._stage.control_plane.book(), holdings, grants)

    async def dead_view(self) -> AsyncIterator[str]:
        """The dead letters: the summary as redis-cli prints it, and the first of them with their errors."""
        for stream in self._streams.values():
            summary = await self._redis.xpending(stream.name, stream.dead_group)
            if not summary["pending"]:
                continue
            yield f"redis-cli XPENDING {stream.name} {stream.dead_group}"
            yield f"1) (integer) {summary['pending']}"
            yield f'2) "{summary["min"].decode()}"'
            yield f'3) "{summary["max"].decode()}"'
            for number, one in enumerate(summary["consumers"], 1):
                yield f'{"4) " if number == 1 else "   "}{number}) 1) "{one["name"].decode()}"'
                yield f'      2) "{one["pending"]}"'
            letters = [one async for one in dead_letters.find(self._redis, stream, limit=SHOWN_DEAD)]
            rows = [(letter.id, letter.reason, letter.attempts, letter.error) for letter in letters]
            for line in printing.plain(("id", "reason", "attempts", "error"), rows):
                yield f"   {line}"
            yield ""

    def figures(self) -> Iterator[str]:
        """Start, memory, and what a grant takes."""
        most, own = self._watcher.most, self._watcher.ready_seconds
        rows = [
            (
                name,
                f"{own[name]:.2f} s" if name in own else None,
                f"{self._stage.ready_seconds[name]:.2f} s",
                f"{most.services.get(name, 0.0):.1f} MB",
            )
            for name in target.SERVICES
        ]
        yield from printing.plain(("service", "ready after its fork", "after dataplane run", "PSS"), rows)
        yield (
            f"the four together: {self._calm_memory:.1f} MB in calm traffic, {most.four:.1f} MB at most; "
            f"the supervisor and the second session_notifier: {most.others:.1f} MB more"
        )
        for what, server in (("in calm traffic", self._calm), ("with kills and outage", self._stormy)):
            stats = server.stats()
            shown = ", ".join(f"{name} {1000 * took:.0f} ms" for name, took in stats.grant_seconds.items())
            yield f"quota, XADD to grant, {what}: {shown} ({stats.grants} grants)"


def _first_of(group: ExceptionGroup) -> Exception:
    """What went wrong first; the rest of the group followed from it."""
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, ExceptionGroup) else first


async def _until(reached: Callable[[], Awaitable[bool]], within: float, *, every: float = 0.1) -> bool:
    """Whether it was reached within so many seconds; it is a fact of another process, so it is polled."""
    deadline = time.monotonic() + within
    while not await reached():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(every)
    return True
