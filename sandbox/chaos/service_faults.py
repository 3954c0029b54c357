"""Faults of the services' processes, and of what is close around one of them: its clock, its files, its log."""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

from redis.exceptions import RedisError

from common.producer import Producer
from common.schemas import UsageRecord
from sandbox.audio_api_server import Traffic
from sandbox.book import Row
from sandbox.chaos.catalogue import Scene, fault
from sandbox.chaos.crash_points import Plan, points_of
from sandbox.chaos.replica import Replica
from sandbox.chaos.world import CLAIM_EVERY, DRAIN, MAX_DELIVERIES, REPLICAS, STREAMS, VISIBILITY, World

POISON_WITHIN = 60.0
MOST_HITS = {
    "turn_take": 4,
    "read": 20,
    "take_over": 4,
    "request": 20,
    "remember": 3,
    "settle": 12,
    "answer": 6,
    "bury": 3,
    "renew": 3,
}
"""A crash point is struck at one of its first passings, where entries are many; else at the first."""

FULL = Path("/dev/full")


@asynccontextmanager
async def busy(replica: Replica) -> AsyncIterator[Replica]:
    """The replica's end is our business within the block; after it, it runs as it always does."""
    replica.busy = True
    try:
        yield replica
    finally:
        if not replica.running:
            replica.start()
        replica.busy = False


@asynccontextmanager
async def _requests_out(world: World) -> AsyncIterator[None]:
    """Answers take long enough that within the block every service has requests out."""
    async with world.faulty({"kind": "latency", "seconds": 0.6}):
        await asyncio.sleep(0.4)
        yield


@fault("service", weight=4)
async def service_killed(scene: Scene) -> None:
    """SIGKILL of one process of a service, with requests out or in the midst of quick ones; a new one soon after.

    Expected: another takes over what it had in hand within visibility timeout and claim interval; what was under
    way may be sent again, under the same key.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        if scene.random.random() < 0.5:
            async with _requests_out(scene.world):
                replica.kill()
        else:
            replica.kill()
        scene.saw(f"{replica.service} killed")
        await asyncio.sleep(scene.random.uniform(0.0, 2.0))


@fault("service")
async def all_replicas_killed(scene: Scene) -> None:
    """SIGKILL of every process of a stream service at once.

    Expected: the new ones take over what lies pending; nothing else happens.
    """
    replicas = scene.world.of(scene.random.choice([name for name, number in REPLICAS.items() if number > 1]))
    async with busy(replicas[0]), busy(replicas[1]):
        for replica in replicas:
            replica.kill()
        scene.saw(f"{replicas[0].service} killed", len(replicas))
        await asyncio.sleep(scene.random.uniform(0.0, 1.0))


@fault("service", weight=2)
async def service_paused(scene: Scene) -> None:
    """SIGSTOP of one process with requests out, for longer than lease, turn and visibility timeout; then SIGCONT.

    Expected: another takes over meanwhile; when it wakes up it notices, and neither settles nor reads nor buries
    what is no longer its own.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        async with _requests_out(scene.world):
            replica.pause()
        scene.saw(f"{replica.service} paused")
        try:
            await asyncio.sleep(VISIBILITY + CLAIM_EVERY + scene.random.uniform(0.5, 2.0))
        finally:
            replica.resume()


@fault("service", weight=2)
async def service_paused_briefly(scene: Scene) -> None:
    """SIGSTOP of one process for less than the lease; then SIGCONT.

    Expected: what it works on stays its own.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        replica.pause()
        scene.saw(f"{replica.service} paused")
        try:
            await asyncio.sleep(scene.random.uniform(0.2, VISIBILITY / 2))
        finally:
            replica.resume()


@fault("service", weight=3)
async def service_stopped(scene: Scene) -> None:
    """SIGTERM of one process under load; a new one in its place.

    Expected: it ends with exit code 0 within `drain_seconds`; what it hands over is taken up within 2 s, and no
    entry counts a crash.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        await scene.world.until(lambda: replica.ready, 10)
        code = await replica.stop(DRAIN + 3.0)
        scene.saw(f"{replica.service} stopped")
        scene.expect(code == 0, f"{replica.name} stopped with exit code {code}, expected 0")


@fault("service", weight=10)
async def crash_point(scene: Scene) -> None:
    """One process ends itself by SIGKILL at a numbered point between two steps of an entry's way.

    Before and after each script and each request, and while a request is under way, at a seeded passing; where
    order matters it is made the one that has the turn, and what only happens at the end is reached by a SIGTERM.

    Expected: the same as for any crash, whatever the point.
    """
    world = scene.world
    service = scene.random.choice(list(REPLICAS))
    point = scene.random.choice(points_of(service))
    most = MOST_HITS.get(point.step, 1) // (1 if service == "usage_forwarder" else 4)
    hit = scene.random.randint(1, max(1, most))
    replicas = world.of(service)
    subject, others = replicas[0], replicas[1:]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(busy(subject))
        await subject.stop()
        if point.step == "fetch":
            for other in others:
                await stack.enter_async_context(busy(other))
            await _leave_suspects(world, replicas)
        subject.start(Plan(point=point.number, hit=hit))
        if service == "session_notifier" and point.step != "fetch":
            await world.until(lambda: subject.ready or not subject.running, 10)
            for other in others:
                async with busy(other):
                    other.kill()
        async with _provoked(scene, point.step):
            if await subject.ended(VISIBILITY + 6.0) is None:
                await subject.stop()
        reached = subject.exit_code == -signal.SIGKILL
        scene.saw(f"{service} at point {point}" if reached else f"{service} never come to point {point}")


@asynccontextmanager
async def _provoked(scene: Scene, step: str) -> AsyncIterator[None]:
    """Circumstances under which a service comes to a step that is rare otherwise."""
    world = scene.world
    match step:
        case "renew":
            async with world.faulty({"kind": "latency", "seconds": 1.5}):
                yield
        case "hand_over":
            async with world.faulty({"kind": "status", "status": 503, "share": 0.7}):
                yield
        case "bury":
            done = asyncio.Event()
            writing = asyncio.create_task(_malformed(scene, done))
            try:
                yield
            finally:
                done.set()
                await writing
        case _:
            yield


async def _leave_suspects(world: World, replicas: Sequence[Replica]) -> None:
    """Two crashes of all with requests out: what they had in hand is fetched and delivered alone from now on."""
    async with world.faulty({"kind": "latency", "seconds": 2.5}):
        for _ in range(2):
            for replica in replicas:
                if not replica.running:
                    replica.start()
            await asyncio.sleep(VISIBILITY + CLAIM_EVERY + 1.5)
            for replica in replicas:
                replica.kill()


async def _malformed(scene: Scene, done: asyncio.Event) -> None:
    traffic = Traffic(50, 50, malformed=0.9, seed=scene.random.randrange(2**32))
    await scene.world.traffic.add(traffic).run(until=done)


@fault("service")
async def poisonous_entry(scene: Scene) -> None:
    """One usage record whose request kills the process that sends it, whichever that is.

    Expected: it is buried as `poison` after two crashes and `max_deliveries` deaths alone; no other entry dies.
    """
    world, session = scene.world, f"poison-{uuid4().hex[:12]}"
    world.poisoned.add(session)
    replicas = world.of("usage_forwarder")
    plan = Plan(poison=session)
    async with busy(replicas[0]), busy(replicas[1]):
        for replica in replicas:
            await replica.stop()
            replica.start(plan)
        poison = await _write_poison(world, session)
        deaths, ended = 0, False
        until = time.monotonic() + POISON_WITHIN
        while not ended and time.monotonic() < until:
            for replica in replicas:
                if not replica.running:
                    deaths += 1
                    replica.start(plan)
            await asyncio.sleep(0.1)
            ended = await _is_buried(world, poison) or bool(world.removals.of([poison]) & {_place(poison)})
        scene.saw("deaths", deaths)
        scene.expect(ended, f"{session} is not buried after {POISON_WITHIN} s and {deaths} deaths")
        most = 2 + MAX_DELIVERIES
        # A fault of Redis beside it may make it forget what the entry has been through.
        scene.expect(deaths <= most or not scene.alone, f"{session} killed {deaths} times, expected {most}")
        for replica in replicas:
            await replica.stop()


async def _write_poison(world: World, session: str) -> Row:
    moment = "2026-01-01T00:00:00Z"
    record = UsageRecord(
        api_session_id=session,
        customer_id="poisoner",
        connection_duration_seconds=1.0,
        data_bytes_processed=1,
        audio_duration_seconds=1.0,
        request_timestamp=moment,
        response_timestamp=moment,
        transaction_id=f"tx-{session}",
    )
    async with world.connected() as redis:
        written = await Producer(redis, world.names, wait_seconds=30).add(record)
    row = Row(written.stream, "usage", written.entry_id, written.transaction_id, session, None, "ok")
    world.traffic.write(row)
    return row


def _place(row: Row) -> tuple[str, str]:
    return row.stream, row.entry_id or ""


async def _is_buried(world: World, row: Row) -> bool:
    stream, entry_id = STREAMS["usage_forwarder"], row.entry_id or ""
    with suppress(RedisError):
        async with world.connected() as redis:
            dead = await redis.xpending_range(stream.name, stream.dead_group, entry_id, entry_id, 1)
            return [one["consumer"] for one in dead] == [b"poison"]
    return False


def _no_faketime(_: World) -> str | None:
    return None if _faketime() else "libfaketime is not installed"


def _faketime() -> Path | None:
    if shutil.which("faketime") is None:
        return None
    found = sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so*"))
    return found[0] if found else None


@fault("service", impossible=_no_faketime)
async def clock_jumped(scene: Scene) -> None:
    """The clock of one stream service's process jumps two hours ahead, then two hours behind (libfaketime).

    Expected: nothing; what measures time here is the monotonic clock.
    """
    world, library = scene.world, _faketime()
    now = world.directory / "faketime"
    now.write_text("+0")
    environ = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    async with busy(
        world.choose(scene.random, "usage_forwarder", "session_notifier", "quota_refresher")
    ) as replica:
        await replica.stop()
        replica.start(environ=environ)
        await world.until(lambda: replica.ready, 10)
        for jump in ("+7200", "-7200", "+0"):
            now.write_text(jump)
            await asyncio.sleep(1.5)
        scene.expect(replica.running, f"{replica.name} ended with {replica.exit_code} when its clock jumped")
        scene.saw(f"{replica.service} jumped")
        await replica.stop()


@fault("service")
async def no_file_descriptors(scene: Scene) -> None:
    """One process may open no more file descriptors than it has (prlimit), for three seconds.

    Expected: it goes on with the connections it has, or waits; it does not end, and recovers by itself.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        before = resource.prlimit(replica.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(replica.pid, resource.RLIMIT_NOFILE, (replica.open_files, before[1]))
        try:
            async with scene.world.faulty({"kind": "close"}):
                await asyncio.sleep(3.0)
        finally:
            if replica.running:
                resource.prlimit(replica.pid, resource.RLIMIT_NOFILE, before)
        scene.expect(replica.running, f"{replica.name} ended with {replica.exit_code} without descriptors")
        scene.saw(f"{replica.service} starved")


@fault("service", impossible=lambda _: None if FULL.exists() else f"there is no {FULL}")
async def log_disk_full(scene: Scene) -> None:
    """One process logs to a disk that is full (/dev/full).

    Expected: it carries entries as ever, and ends with exit code 0 when it is stopped.
    """
    async with busy(scene.world.choose(scene.random)) as replica:
        await replica.stop()
        replica.start(output=FULL)
        await asyncio.sleep(4.0)
        scene.expect(
            replica.running, f"{replica.name} ended with {replica.exit_code}, its log disk being full"
        )
        code = await replica.stop()
        scene.expect(code == 0, f"{replica.name} stopped with exit code {code}, its log disk being full")
        scene.saw(f"{replica.service} logged in vain")
