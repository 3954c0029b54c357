"""What the tests of the core share: a stream laid out in Redis by hand, and consumers that run in this process.

A `State` is everything there is about a stream, so that a given and a want are one comparison.
Entry ids in it are small and explicit ("1-0"), so that a table can be read.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common import figures, logs, schemas
from common.consumer import Consumer
from common.control_plane.gate import Gate
from common.delivery import Limits
from common.entries import Entry
from common.outcomes import DELIVERED, Cause, Outcome, Reason, Retry
from common.redis_border import Away, Scripts
from common.redis_state import RedisState
from common.sentinel import Sentinel
from common.settlement import Figures, no_figures
from common.streams import GREATEST_ID, Stream
from tests.support import connect, eventually

STREAM = Stream("queue:usage_records", "usage_forwarder")
ORDERED = Stream("queue:session_lifecycle", "session_notifier")

SOON = Retry(Cause.TRANSIENT, "not now", after=0.05)
LATER = Retry(Cause.TRANSIENT, "not now", after=3600.0)

Pending = dict[str, tuple[str, int]]
"""Entry id -> consumer (in the twin: the reason) and delivery count."""


class State(msgspec.Struct, frozen=True):
    """A stream as it lies in Redis. A group that does not exist is None."""

    entries: list[str] = []
    live: Pending | None = {}
    dead: Pending | None = {}
    documents: list[str] = []
    ledger: dict[str, int] = {}


async def make_groups(redis: Redis, stream: Stream = STREAM) -> list[int]:
    """As a process does it that has just started: whether live group, twin and books were begun."""
    reply = await Scripts(redis).run(
        "make_groups",
        [stream.name, stream.ledger_key, stream.dead_key],
        [stream.group, stream.dead_group, GREATEST_ID],
    )
    anew = await Sentinel(Scripts(redis), stream, "somebody", Counts()).look()
    return [*reply, int(anew)]


async def lay(
    redis: Redis,
    *,
    live: Mapping[str, tuple[str, int]] | None = None,
    dead: Mapping[str, tuple[str, int]] | None = None,
    backlog: Iterable[str] = (),
    deleted: Iterable[str] = (),
    idle: int = 3_600_000,
    data: bytes = b"session",
    stream: Stream = STREAM,
) -> None:
    """Lays out a stream: pending in the live group, dead, not read yet, and deleted by somebody meanwhile.

    What is pending was last heard of `idle` ms ago.
    """
    live, dead = live or {}, dead or {}
    await make_groups(redis, stream)
    known = sorted([*live, *dead], key=id_order)
    async with redis.pipeline(transaction=False) as lying:
        for entry_id in sorted([*known, *backlog], key=id_order):
            lying.xadd(stream.name, {"data": data}, id=entry_id)
        if known:
            lying.xgroup_setid(stream.name, stream.group, known[-1])
        for group, rows in ((stream.group, live), (stream.dead_group, dead)):
            for entry_id, (name, count) in rows.items():
                lying.xclaim(
                    stream.name,
                    group,
                    name,
                    0,
                    [entry_id],
                    idle=idle,
                    retrycount=count,
                    force=True,
                    justid=True,
                )
        for entry_id, (reason, count) in dead.items():
            document = {"reason": reason, "attempts": count}
            lying.hset(stream.dead_key, entry_id, msgspec.json.encode(document))
        for entry_id in deleted:
            lying.xdel(stream.name, entry_id)
        await lying.execute()


async def settle(
    redis: Redis, *ids: str, outcome: str = "delivered", figures: Figures = (0, 0, 0, 0), token: str = ""
) -> int:
    """The script; returns how many it settled."""
    keys = [STREAM.name, STREAM.dead_key, STREAM.ledger_key, *([STREAM.turn_key] if token else [])]
    entries = json.dumps({outcome: [part for entry_id in ids for part in (entry_id, *figures)]})
    return int(await Scripts(redis).run("settle", keys, [STREAM.group, STREAM.dead_group, token, entries]))


async def state(redis: Redis, stream: Stream = STREAM) -> State:
    """What lies there now; the ledger without where its books begin."""

    async def pending(group: str) -> Pending | None:
        try:
            rows = await redis.xpending_range(stream.name, group, "-", "+", 100_000)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return None
        return {r["message_id"].decode(): (r["consumer"].decode(), r["times_delivered"]) for r in rows}

    books = cast(dict[bytes, bytes], await redis.hgetall(stream.ledger_key))
    return State(
        entries=[row[0].decode() for row in await redis.xrange(stream.name)],
        live=await pending(stream.group),
        dead=await pending(stream.dead_group),
        documents=sorted(field.decode() for field in await redis.hkeys(stream.dead_key)),
        ledger={k.decode(): int(v) for k, v in sorted(books.items()) if k != b"base"},
    )


async def imbalance(redis: Redis, stream: Stream = STREAM) -> int:
    return (await figures.read(Scripts(redis), stream)).imbalance


async def pending_of(redis: Redis, consumer: str, stream: Stream = STREAM) -> dict[str, int]:
    """What one consumer has pending, with the delivery counts."""
    live = (await state(redis, stream)).live or {}
    return {entry_id: count for entry_id, (owner, count) in live.items() if owner == consumer}


async def consumers(redis: Redis, stream: Stream = STREAM) -> set[str]:
    return {row["name"].decode() for row in await redis.xinfo_consumers(stream.name, stream.group)}


@asynccontextmanager
async def out_of_memory(redis: Redis) -> AsyncIterator[None]:
    """The server refuses what adds while this lasts."""
    await redis.config_set("maxmemory-policy", "noeviction")
    await redis.config_set("maxmemory", "1mb")
    try:
        yield
    finally:
        await redis.config_set("maxmemory", 0)


def id_order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)


class LosesReplies(Scripts):
    """Scripts that run, and whose reply never arrives where `lose` says how often: a connection cut between.

    The first `spare` replies arrive all the same.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.lose: Counter[str] = Counter()
        self.spare: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self.on_lost: Callable[[], None] = lambda: None

    async def run(self, name: str, keys: Any, args: Any) -> Any:
        self.begun[name] += 1
        reply = await super().run(name, keys, args)
        self.runs[name] += 1
        if self.spare[name] > 0:
            self.spare[name] -= 1
        elif self.lose[name] > 0:
            self.lose[name] -= 1
            self.on_lost()
            raise Away("the connection was cut before the reply")
        return reply


class Counts:
    """A tally that can be read."""

    def __init__(self) -> None:
        self.delivered = self.duplicate = self.vanished = self.claimed = self.lost = 0
        self.dead: Counter[Reason] = Counter()
        self.retried: Counter[Cause] = Counter()

    def settled(self, delivered: int, duplicate: int, seconds: list[float]) -> None:
        assert len(seconds) == delivered + duplicate
        self.delivered += delivered
        self.duplicate += duplicate

    def buried(self, reason: Reason) -> None:
        self.dead[reason] += 1

    def vanished_entries(self, n: int) -> None:
        self.vanished += n

    def retried_entries(self, cause: Cause) -> None:
        self.retried[cause] += 1

    def claimed_entries(self, n: int) -> None:
        self.claimed += n

    def lost_entries(self, n: int) -> None:
        self.lost += n


class Told:
    """A handler that does as it is told. The data of an entry is its session; `b"?"` cannot be read.

    Requests to sessions in `slow`, or to all with `hold_all`, do not end before they are let go.
    """

    def __init__(self, *, ordered: bool = False, batch: int = 1) -> None:
        self.ordered = ordered
        self.batch = batch
        self.begun: list[tuple[str, ...]] = []  # ids, per request
        self.ended: list[str] = []  # ids
        self.answers: dict[str, list[Outcome]] = {}  # per session, in this order; then `answer`
        self.answer: Outcome = DELIVERED
        self.slow: dict[str, asyncio.Event] = {}
        self.gate: Gate | None = None  # asked before each request, as the client does
        self.on_request: Callable[[list[Entry]], None] = lambda entries: None
        self.in_flight = self.most_in_flight = 0
        self._changed = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()

    def hold_all(self) -> None:
        self._open.clear()

    @staticmethod
    def figures(message: Any, /) -> Figures:
        """A message that is made of figures has them."""
        return message if isinstance(message, tuple) else no_figures(message)

    def let_go(self) -> None:
        self._open.set()
        for event in self.slow.values():
            event.set()

    def decode(self, entry: Entry, data: bytes | None) -> str:
        if data is None or data.startswith(b"?"):
            raise schemas.Invalid("cannot be read")
        entry.message = data
        entry.transaction_id = entry.id.decode()
        return data.decode().split("/")[0]

    async def deliver(self, entry: Entry) -> Outcome:
        return (await self.deliver_batch([entry]))[0]

    async def deliver_batch(self, entries: list[Entry]) -> list[Outcome]:
        lane = entries[0].lane
        assert {entry.lane for entry in entries} == {lane}
        ticket = self.gate.enter() if self.gate is not None else None
        if self.gate is not None and ticket is None:
            return [Retry(Cause.HELD, "not sent")] * len(entries)
        self.begun.append(tuple(entry.id.decode() for entry in entries))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.on_request(entries)
        self._tell()
        try:
            await self._open.wait()
            if lane in self.slow:
                await self.slow[lane].wait()
        finally:
            self.in_flight -= 1
        outcomes: list[Outcome] = []
        for entry in entries:
            told = self.answers.get(lane)
            entry.reply = b"{}"
            outcomes.append(told.pop(0) if told else self.answer)
            self.ended.append(entry.id.decode())
        if self.gate is not None and ticket is not None:
            self.gate.delivered(ticket)
        self._tell()
        return outcomes

    @property
    def delivered_ids(self) -> list[str]:
        """Ids in the order in which their requests began."""
        return [entry_id for request in self.begun for entry_id in request]

    async def until(self, reached: Callable[[], object], within: float = 10.0) -> None:
        """Returns as soon as this holds; it is asked again whenever a request begins or ends."""
        async with asyncio.timeout(within):
            while not reached():
                self._changed.clear()
                await self._changed.wait()

    async def until_begun(self, n: int) -> None:
        await self.until(lambda: len(self.delivered_ids) >= n)

    def _tell(self) -> None:
        self._changed.set()


class Consuming:
    """A consumer with its children, as a service runs it, and what a test may ask of it."""

    def __init__(
        self,
        redis: Redis,
        handler: Told,
        *,
        stream: Stream = STREAM,
        name: str = "me",
        gate: Gate | None = None,
        response_stream: str | None = None,
        **limits: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.redis = redis
        self.scripts = LosesReplies(redis)
        self.tally = Counts()
        self.fatal: list[str] = []
        self.gate = gate or new_gate()
        bounds: dict[str, Any] = {
            "read_count": 100,
            "max_in_flight": 8,
            "visibility_timeout": 1.0,
            "claim_interval": 0.1,
            "max_deliveries": 5,
            "not_found_hold": 300.0,
            "doorbell": 0.2,
            **limits,
        }
        self.consumer = Consumer(
            name,
            stream.group,
            stream,
            handler,
            Limits(batch=handler.batch, **bounds),
            scripts=self.scripts,
            gate=self.gate,
            redis_state=RedisState(redis, loop.time, self.fatal.append, lambda yes: None),
            tally=self.tally,
            clock=loop.time,
            random=Random(7),
            response_stream=response_stream,
        )
        self._loop: asyncio.Task[None] | None = None
        self._children: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._loop = asyncio.create_task(self.consumer.run())
        self._children = [asyncio.create_task(_run(run)) for run in self.consumer.children().values()]

    async def stop(self, drain: float = 5.0) -> None:
        """The orderly end, as `service` does it."""
        assert self._loop is not None
        until = asyncio.get_running_loop().time() + drain
        self.consumer.stop()
        await asyncio.wait([self._loop], timeout=drain / 2)
        await self.consumer.drain(until)
        await self.die()

    async def die(self) -> None:
        """The crash: nothing is said to Redis any more."""
        self.consumer.stop()  # says nothing either
        tasks = {*self._children, *self.consumer.delivery._slots}  # a process that dies takes its slots along
        if self._loop is not None:
            tasks.add(self._loop)
        while tasks:
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.1)  # asyncio.wait_for may swallow one (3.11)


async def _run(run: Callable[[], Awaitable[None]]) -> None:
    await run()


def new_gate() -> Gate:
    return Gate(clock=asyncio.get_running_loop().time, random=Random(7), logger=logs.get("control_plane"))


@asynccontextmanager
async def consuming(
    port: int,
    handler: Told,
    *,
    before: Callable[[Consuming], object] = lambda me: None,
    ready: bool = True,
    username: str | None = None,
    **options: Any,
) -> AsyncIterator[Consuming]:
    """A consumer on connections of its own, ready; it dies at the end unless it has been stopped.

    `before` is done with it before it starts.
    """
    async with connect(port, username=username, password="x" if username else None) as redis:
        running = Consuming(redis, handler, **options)
        before(running)
        running.start()
        try:
            if ready:
                await eventually(lambda: running.consumer.ready_at is not None, every=0.002)
            yield running
        finally:
            await running.die()


async def add(redis: Redis, *sessions: str, stream: Stream = STREAM) -> list[str]:
    """Entries of these sessions; their ids."""
    async with redis.pipeline(transaction=False) as pipeline:
        for session in sessions:
            pipeline.xadd(stream.name, {"data": session})
        return [entry_id.decode() for entry_id in await pipeline.execute()]


async def settled(redis: Redis, n: int, stream: Stream = STREAM) -> None:
    """Waits until the ledger has counted so many deliveries and nothing is left in the stream."""

    async def done() -> bool:
        books = await redis.hgetall(stream.ledger_key)
        ended = int(books.get(b"delivered", 0)) + int(books.get(b"duplicate", 0))
        return ended >= n

    await eventually(done, every=0.005)
