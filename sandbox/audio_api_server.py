"""An AudioAPIServer as the agent knows it: sessions that start, use, run low on quota, and complete.

It writes through `common.producer`, sprinkles malformed entries in on request, books everything it wrote,
and holds the agent to one grant per quota request.
A seed shapes the traffic; ids are new in every run.
A session whose entry could not be confirmed ends there: what follows would be out of order by our own fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import count
from math import ceil, inf
from pathlib import Path
from random import Random
from typing import Any, cast
from uuid import uuid4

import msgspec
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common import schemas
from common.config import Streams
from common.producer import PIPELINE, Draft, Message, Producer, ProducerError, Written, encode
from common.redis_border import Denied, RedisFault, border
from common.schemas import Invalid, QuotaRequest, SessionEvent, UsageRecord
from common.streams import FIELD_DATA, MAX_ENTRY_BYTES
from sandbox.book import Book, Kind, Row

TICK_SECONDS = 0.02
LISTEN_AGAIN_SECONDS = 0.2
WITHOUT_TRANSACTION_ID = 0.1
"""This share of messages leaves the transaction id to the agent."""

Fields = dict[bytes, bytes]


class Traffic(msgspec.Struct, frozen=True):
    """How much, of what, for how many."""

    rate: float = 50.0
    """Entries a second, all kinds together."""
    sessions: int = 20
    """Sessions at a time; an entry of a session waits for the one before it."""
    malformed: float = 0.0
    """The share of entries that no agent can read."""
    seed: int = 0
    uses: tuple[int, int] = (1, 12)
    """Usage records of a session, at least and at most."""


class Stats(msgspec.Struct, frozen=True):
    """What was produced and what came back."""

    produced: dict[str, int]
    """Confirmed entries by kind, the malformed apart."""
    uncertain: int
    """XADDs whose reply was lost."""
    unwritten: int
    """Entries given up: refused, or not confirmed within the producer's bound."""
    quota_requests: int
    grants: int
    """Requests that have been granted."""
    grants_missing: int
    grants_excess: int
    """Grants beyond one per entry that exists or may exist."""
    grants_unreadable: int
    grant_seconds: dict[str, float]
    """XADD to grant: p50, p95, p99 and max of those that came."""


# Malformed entries: each takes well-formed data and breaks it in its own way.


def _with_member(data: bytes, member: bytes) -> bytes:
    return data[:-1] + b"," + member + b"}"


def _only(data: bytes) -> Fields:
    return {FIELD_DATA: data}


DAMAGE: dict[str, Callable[[bytes], Fields]] = {
    "no data field": lambda data: {b"note": data},
    "empty": lambda data: _only(b""),
    "cut short": lambda data: _only(data[:-1]),
    "not an object": lambda data: _only(b"[" + data + b"]"),
    "bad UTF-8": lambda data: _only(_with_member(data, b'"note":"\xff\xfe"')),
    "lone surrogate": lambda data: _only(_with_member(data, rb'"note":"\ud800"')),
    "NaN": lambda data: _only(_with_member(data, b'"note":NaN')),
    "1e400": lambda data: _only(_with_member(data, b'"customer_id":1e400')),
    "10^400": lambda data: _only(_with_member(data, b'"api_session_id":1' + b"0" * 400)),
    "20,000 levels": lambda data: _only(_with_member(data, b'"note":' + b"[" * 20_000 + b"]" * 20_000)),
    "oversize": lambda data: _only(_with_member(data, b'"note":"' + b"x" * MAX_ENTRY_BYTES + b'"')),
    "missing field": lambda data: _only(data.replace(b'"customer_id"', b'"customer"', 1)),
    "bad id": lambda data: _only(_with_member(data, b'"api_session_id":".."')),
    "unprintable customer": lambda data: _only(_with_member(data, rb'"customer_id":"a\nb"')),
}


class Session:
    """One session's script: what it says next."""

    def __init__(
        self,
        session_id: str,
        random: Random,
        now: Callable[[], datetime],
        uses: tuple[int, int] = Traffic().uses,
    ) -> None:
        self.id = session_id
        self.started = self.completed = False
        self._random, self._now = random, now
        self._customer = random.choice(("customer", "Kundin ß", "顧客")) + f"-{random.randrange(100):02}"
        self._uses_left = random.randint(*uses)
        self._quota_seconds = random.uniform(30, 600)
        self._audio_seconds = 0.0
        self._requests = 0

    def next(self, closing: bool) -> Message:
        """Start, then usage with a quota request wherever the quota runs low, then complete."""
        if not self.started:
            self.started = True
            return self._event("start", metadata=_raw({"language": "en-US", "client": "sandbox"}))
        if closing or not self._uses_left:
            self.completed = True
            summary = {"audio_duration_seconds": self._audio_seconds, "request_count": self._requests}
            reason = self._random.choice((None, "client_closed", "quota_exhausted", "network_error"))
            return self._event("complete", disconnect_reason=reason, final_usage_summary=_raw(summary))
        if self._quota_seconds < 60:
            return self.quota_request()
        return self.usage()

    def quota_request(self) -> QuotaRequest:
        self._quota_seconds += 360
        return QuotaRequest(self.id, self._customer, self._timestamp(self._now()))

    def usage(self) -> UsageRecord:
        connection = round(self._random.uniform(0.5, 120), 3)
        audio = round(connection * self._random.random(), 3)
        requests = self._random.randint(1, 20)
        self._uses_left -= 1
        self._quota_seconds -= audio
        self._audio_seconds = round(self._audio_seconds + audio, 3)
        self._requests += requests
        end = self._now()
        return UsageRecord(
            api_session_id=self.id,
            customer_id=self._customer,
            connection_duration_seconds=connection,
            data_bytes_processed=int(audio * 32_000),
            audio_duration_seconds=audio,
            request_timestamp=self._timestamp(end - timedelta(seconds=connection)),
            response_timestamp=self._timestamp(end),
            request_count=requests,
        )

    def _event(self, event_type: str, **more: Any) -> SessionEvent:
        if self._random.random() < 0.2:
            event_type = {"start": "session_started", "complete": "session_completed"}[event_type]
        return SessionEvent(self.id, self._customer, event_type, self._timestamp(self._now()), **more)

    def _timestamp(self, instant: datetime) -> str:
        """The same instant as different producers write it."""
        text = instant.astimezone(UTC).isoformat(timespec="microseconds")
        return text if self._random.random() < 0.5 else text.replace("+00:00", "Z")


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


class Grants:
    """Quota requests and the grants that came for them, whichever is known first."""

    def __init__(self) -> None:
        self._asked_at: dict[str, float] = {}
        self._most: Counter[str] = Counter()
        self._came: dict[str, list[float]] = {}
        self._outstanding: set[str] = set()
        self._moved = asyncio.Event()
        self.requests = 0

    def asked(self, transaction_id: str, at: float, entries: int, certain: bool) -> None:
        """`entries`: how many entries with this id exist or may exist, `certain`: one surely does."""
        self._asked_at[transaction_id] = at
        self._most[transaction_id] = entries
        self.requests += certain
        if certain and transaction_id not in self._came:
            self._outstanding.add(transaction_id)

    def came(self, transaction_id: str, at: float) -> None:
        self._came.setdefault(transaction_id, []).append(at)
        self._outstanding.discard(transaction_id)
        self._moved.set()

    async def complete(self, within: float) -> bool:
        """Whether every certain request has its grant, by then."""
        try:
            async with asyncio.timeout(within):
                while self._outstanding:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    @property
    def missing(self) -> int:
        return len(self._outstanding)

    @property
    def excess(self) -> int:
        return sum(max(0, len(self._came.get(key, ())) - most) for key, most in self._most.items())

    def seconds(self) -> list[float]:
        """From XADD to the first grant, sorted; the grants of other servers are theirs."""
        return sorted(self._came[key][0] - at for key, at in self._asked_at.items() if key in self._came)


class AudioAPIServer:
    """Produces traffic on the streams of one Redis and keeps the book of it.

    `redis` must not retry by itself. `run` may be called again; the book and the figures go on.
    """

    def __init__(
        self,
        redis: Redis,
        traffic: Traffic | None = None,
        *,
        streams: Streams | None = None,
        book: Book | None = None,
        wait_seconds: float = 30.0,
        run_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.traffic = traffic or Traffic()
        self.book = book or Book()
        self._redis = redis
        self._streams = streams or Streams()
        self._producer = Producer(redis, self._streams, wait_seconds=wait_seconds, clock=clock)
        self._run_id = run_id or uuid4().hex[:12]
        self._random = Random(self.traffic.seed)
        self._clock, self._now = clock, now
        self._open: deque[Session] = deque()
        self._numbers = count(1)
        self._grants = Grants()
        self._last_response = b"0-0"
        self._figures: Counter[str] = Counter()
        self._uncertain = self._unwritten = self._unreadable_grants = 0

    async def run(
        self, seconds: float = inf, until: asyncio.Event | None = None, *, grants_within: float = 0.0
    ) -> None:
        """Produces for so long or until the event, completes what is open, and waits for missing grants.

        Raises ProducerError when Redis lets nobody in.
        """
        listener = asyncio.create_task(self._listen(), name="grants")
        try:
            await self._produce(self._clock() + seconds, until or asyncio.Event())
            await self._close_sessions()
            await self._grants.complete(grants_within)
        finally:
            while not listener.done():  # on Python 3.11 a timed send of redis-py can swallow a cancellation
                listener.cancel()
                await asyncio.wait([listener], timeout=0.2)
            await asyncio.gather(listener, return_exceptions=True)

    def stats(self) -> Stats:
        """The figures so far."""
        seconds = self._grants.seconds()
        return Stats(
            produced=dict(sorted(self._figures.items())),
            uncertain=self._uncertain,
            unwritten=self._unwritten,
            quota_requests=self._grants.requests,
            grants=len(seconds),
            grants_missing=self._grants.missing,
            grants_excess=self._grants.excess,
            grants_unreadable=self._unreadable_grants,
            grant_seconds=percentiles(seconds),
        )

    async def _produce(self, end: float, stop: asyncio.Event) -> None:
        """As many entries as the rate makes due; after a pause it catches up one second, not all of it."""
        rate = self.traffic.rate
        begin, done = self._clock(), 0
        while not stop.is_set() and (now := self._clock()) < end:
            expected = int((now - begin) * rate) + 1
            done = max(done, expected - max(1, int(rate)))
            if done < expected:
                done += await self._write_some(expected - done)
                continue
            try:
                await asyncio.wait_for(stop.wait(), min(TICK_SECONDS, end - now))
            except TimeoutError:
                pass

    async def _write_some(self, most: int) -> int:
        """One batch with at most one entry of a session, so that order never hangs on a pipeline."""
        while len(self._open) < self.traffic.sessions:
            self._open.append(self._new_session())
        size = min(most, len(self._open))
        malformed = sum(self._random.random() < self.traffic.malformed for _ in range(size))
        if malformed:
            await self._write_malformed(malformed)
        await self._write([self._open.popleft() for _ in range(size - malformed)])
        return size

    async def _close_sessions(self) -> None:
        started = [session for session in self._open if session.started]
        self._open.clear()
        for start in range(0, len(started), PIPELINE):
            await self._write(started[start : start + PIPELINE], closing=True)

    async def _write(self, sessions: Sequence[Session], closing: bool = False) -> None:
        drafts = [self._draft(session.next(closing)) for session in sessions]
        at = self._clock()
        try:
            entries: Sequence[Written] = await self._producer.add_many(drafts)
        except ProducerError as error:
            if isinstance(error.__cause__, Denied):
                raise
            entries = error.entries
        rows: list[Row] = []
        for session, draft, entry in zip(sessions, drafts, entries, strict=True):
            rows += self._rows(session, draft.message, entry)
            if isinstance(draft.message, QuotaRequest) and entry.transaction_id is not None:
                certain = entry.entry_id is not None
                self._grants.asked(entry.transaction_id, at, certain + entry.replies_lost, certain)
            if entry.entry_id is None:
                self._unwritten += 1
            elif not session.completed:
                self._open.append(session)
        self.book.write(rows)

    def _rows(self, session: Session, message: Message, entry: Written) -> list[Row]:
        """One row for the entry that is there, one for each that may be."""
        row = Row(
            stream=entry.stream,
            kind=kind_of(message),
            entry_id=entry.entry_id,
            transaction_id=entry.transaction_id,
            session=session.id,
            sha256=sha256(entry.data).hexdigest(),
            expected="ok",
            figures=message.figures() if isinstance(message, UsageRecord) else None,
        )
        self._uncertain += entry.replies_lost
        uncertain = [replace(row, entry_id=None)] * entry.replies_lost
        if entry.entry_id is None:
            return uncertain
        self._figures[row.kind] += 1
        return [row, *uncertain]

    def _draft(self, message: Message) -> Draft:
        return Draft(
            message,
            correlation_id=uuid4().hex if self._random.random() < 0.7 else None,
            traceparent=f"00-{uuid4().hex}-{uuid4().hex[:16]}-01" if self._random.random() < 0.3 else None,
            set_transaction_id=self._random.random() >= WITHOUT_TRANSACTION_ID,
        )

    def _new_session(self) -> Session:
        session_id = f"session-{self._run_id}-{next(self._numbers)}"
        return Session(session_id, self._random, self._now, self.traffic.uses)

    async def _write_malformed(self, number: int) -> None:
        """Written past the producer, which would refuse them; not repeated."""
        drawn = [self._malformed() for _ in range(number)]
        replies: list[Any] = []
        try:
            with border():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for row, fields in drawn:
                        pipe.xadd(row.stream, cast(Any, fields))
                    replies = await pipe.execute(raise_on_error=False)
        except RedisFault:
            self._uncertain += number
            self.book.write([row for row, _ in drawn])
            return
        rows = [
            replace(row, entry_id=reply.decode())
            for (row, _), reply in zip(drawn, replies, strict=True)
            if isinstance(reply, bytes)
        ]
        self._unwritten += number - len(rows)
        self._figures["malformed"] += len(rows)
        self.book.write(rows)

    def _malformed(self) -> tuple[Row, Fields]:
        """An entry nobody can read, of a session that does not exist, and its row."""
        session = self._new_session()
        start, usage, quota = session.next(closing=False), session.usage(), session.quota_request()
        [message] = self._random.choices((usage, start, quota), weights=(7, 2, 1))
        damage = self._random.choice(list(DAMAGE))
        fields = DAMAGE[damage](encode(message))
        data = fields.get(FIELD_DATA)
        row = Row(
            stream=self._producer.stream_of(message),
            kind=kind_of(message),
            entry_id=None,
            transaction_id=None,
            session=None,
            sha256=None if data is None else sha256(data).hexdigest(),
            expected="invalid",
            damage=damage,
        )
        return row, fields

    async def _listen(self) -> None:
        """Reads every grant once; a Redis that is away is asked again."""
        stream = self._streams.quota_response
        while True:
            try:
                with border():
                    reply: Any = await self._redis.xread({stream: self._last_response}, count=500, block=1000)
            except RedisFault:
                await asyncio.sleep(LISTEN_AGAIN_SECONDS)
                continue
            at = self._clock()
            for _, entries in reply:
                for entry_id, fields in entries:
                    self._last_response = entry_id
                    try:
                        response = schemas.quota_response(fields.get(FIELD_DATA))
                    except Invalid:
                        self._unreadable_grants += 1
                    else:
                        self._grants.came(response.transaction_id, at)


def kind_of(message: Message) -> Kind:
    match message:
        case UsageRecord():
            return "usage"
        case QuotaRequest():
            return "quota"
        case SessionEvent(event_type="start" | "session_started"):
            return "start"
        case SessionEvent():
            return "complete"


def percentiles(sorted_seconds: Sequence[float]) -> dict[str, float]:
    """Nearest rank, of values in ascending order; empty when there are none."""
    if not sorted_seconds:
        return {}
    last = len(sorted_seconds) - 1
    ranks = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: round(sorted_seconds[ceil(rank * (last + 1)) - 1], 6) for name, rank in ranks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sandbox simulate`: 0 well, 1 a second grant or an unreadable one, 3 Redis not reached."""
    parser = argparse.ArgumentParser("simulate", description="Traffic of AudioAPIServers on a Redis.")
    parser.add_argument("--redis-url", default="redis://localhost:6379/0")
    parser.add_argument("--rate", type=float, default=50.0, help="entries a second (%(default)s)")
    parser.add_argument("--seconds", type=float, default=inf, help="how long (until interrupted)")
    parser.add_argument("--sessions", type=int, default=20, help="sessions at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="shapes the traffic (%(default)s)")
    parser.add_argument("--book", type=Path, help="JSON Lines file for what was produced")
    parser.add_argument(
        "--malformed", type=float, default=0.0, help="share of unreadable entries (%(default)s)"
    )
    parser.add_argument("--grants-within", type=float, default=5.0, help="wait so long for the last grants")
    options = parser.parse_args(argv)
    if options.rate <= 0 or options.sessions < 1 or not 0 <= options.malformed < 1:
        parser.error("expected a rate above 0, at least one session, and a malformed share from 0 to below 1")
    try:
        redis = Redis.from_url(options.redis_url, protocol=2, socket_timeout=10, retry=Retry(NoBackoff(), 0))
        book = Book(options.book)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    traffic = Traffic(options.rate, options.sessions, options.malformed, options.seed)
    server = AudioAPIServer(redis, traffic, book=book)
    return asyncio.run(_simulate(server, redis, book, options))


async def _simulate(server: AudioAPIServer, redis: Redis, book: Book, options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        with border():
            await redis.ping()
        await server.run(options.seconds, stop, grants_within=options.grants_within)
    except (RedisFault, ProducerError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 3
    finally:
        book.close()
        await redis.aclose()
    stats = server.stats()
    print(json.dumps(msgspec.to_builtins(stats), indent=2))
    return 1 if stats.grants_excess or stats.grants_unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
