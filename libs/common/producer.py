"""Writes the streams as an AudioAPIServer does.

Promise: what `add` returns is in Redis. Nothing is written when a message is invalid.
A Redis that is briefly away is waited for, within bounds, and what it did not confirm is written again.
When the reply of an XADD was lost, that may make two entries with one transaction id: billed once.
Without an id it would be billed twice, so a message that shall go without one is then given up instead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec
from msgspec.structs import asdict

from common import schemas
from common.redis_border import Demoted, Denied, RedisFault, border, fault
from common.schemas import ABSENT, Invalid, QuotaRequest, SessionEvent, UsageRecord
from common.streams import FIELD_CORRELATION_ID, FIELD_DATA, FIELD_TRACEPARENT, MAX_ENTRY_BYTES

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from common import config

Message = UsageRecord | SessionEvent | QuotaRequest

READERS: dict[type[Message], Callable[[bytes], Message]] = {
    UsageRecord: schemas.usage_record,
    SessionEvent: schemas.session_event,
    QuotaRequest: schemas.quota_request,
}
"""Whoever can read a message says whether it is valid."""

PIPELINE = 500
"""So many XADDs go in one round trip."""

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


class Draft(msgspec.Struct, frozen=True):
    """One message to be written, with what the entry carries beside it."""

    message: Message
    correlation_id: str | None = None
    traceparent: str | None = None
    set_transaction_id: bool = True
    """False: a message without an id goes as it is, and the agent derives one from the entry."""


class Written(msgspec.Struct):
    """What became of one draft."""

    stream: str
    data: bytes
    transaction_id: str | None
    """The message's id, or the one that the agent derives; None when it has neither an id nor an entry."""
    fields: tuple[bytes, ...]
    entry_id: str | None = None
    """None: not confirmed (only in a ProducerError)."""
    replies_lost: int = 0
    """So many more entries with the same content may exist."""

    @property
    def may_be_repeated(self) -> bool:
        return self.transaction_id is not None or self.replies_lost == 0


class ProducerError(Exception):
    """Not everything was written, or not as durably as asked; `entries` says what became of each draft."""

    def __init__(self, problem: str, entries: Sequence[Written]) -> None:
        super().__init__(problem)
        self.entries = tuple(entries)


class Producer:
    """Validates messages and adds them to their streams, many in one round trip.

    `redis` must not retry by itself (`redis_border.connect`): it would repeat what may not be repeated.
    """

    def __init__(
        self,
        redis: Redis,
        streams: config.Streams,
        *,
        wait_seconds: float = 30.0,
        fsync_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: str(uuid4()),
    ) -> None:
        """`fsync_seconds`: wait so long for the append-only file as well, where the server has WAITAOF."""
        self._redis = redis
        self._streams = streams
        self._wait_seconds = wait_seconds
        self._fsync_seconds = fsync_seconds
        self._clock = clock
        self._new_id = new_id
        self._has_waitaof: bool | None = None

    def stream_of(self, message: Message) -> str:
        """The stream that messages of this kind go to."""
        match message:
            case UsageRecord():
                return self._streams.usage_records
            case SessionEvent():
                return self._streams.session_lifecycle
            case QuotaRequest():
                return self._streams.quota_refresh

    async def add(
        self, message: Message, *, correlation_id: str | None = None, traceparent: str | None = None
    ) -> Written:
        """Writes one message. Raises Invalid before it writes, ProducerError when it could not."""
        [written] = await self.add_many([Draft(message, correlation_id, traceparent)])
        return written

    async def add_many(self, drafts: Sequence[Draft]) -> list[Written]:
        """Writes many messages, each stream in the given order unless Redis fails on the way.

        Raises Invalid before it writes anything, ProducerError when it could not write all.
        """
        entries = [self._entry(draft) for draft in drafts]
        deadline = self._clock() + self._wait_seconds
        for start in range(0, len(entries), PIPELINE):
            await self._write(entries[start : start + PIPELINE], entries, deadline)
        return entries

    def _entry(self, draft: Draft) -> Written:
        message = draft.message
        if message.transaction_id is None and draft.set_transaction_id:
            message = msgspec.structs.replace(message, transaction_id=self._new_id())
        data = encode(message)
        READERS[type(message)](data)
        fields = [FIELD_DATA, data]
        if draft.correlation_id is not None:
            fields += [FIELD_CORRELATION_ID, _well_formed("correlation_id", draft.correlation_id)]
        if draft.traceparent is not None:
            fields += [FIELD_TRACEPARENT, _well_formed("traceparent", draft.traceparent)]
        if sum(map(len, fields)) > MAX_ENTRY_BYTES:
            raise Invalid(f"data: expected at most {MAX_ENTRY_BYTES} bytes, the other fields included")
        return Written(self.stream_of(message), data, message.transaction_id, tuple(fields))

    async def _write(self, batch: Sequence[Written], entries: Sequence[Written], deadline: float) -> None:
        """Until all of the batch is confirmed, or nothing more can be done for it."""
        pause = FIRST_PAUSE_SECONDS
        waiting = list(batch)
        cause: RedisFault | None = None
        while problem := await self._attempt(waiting, entries):
            cause = problem
            waiting = [entry for entry in waiting if entry.entry_id is None and entry.may_be_repeated]
            left = deadline - self._clock()
            if not waiting or left <= 0 or isinstance(problem, Denied):
                break
            if isinstance(problem, Demoted):
                await self._redis.connection_pool.disconnect()
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        missing = sum(entry.entry_id is None for entry in batch)
        if missing:
            raise ProducerError(
                f"{missing} of {len(entries)} entries are not confirmed: {cause}", entries
            ) from cause

    async def _attempt(self, batch: Sequence[Written], entries: Sequence[Written]) -> RedisFault | None:
        """One round trip: confirms what Redis confirms, and returns what stood in the way of the rest."""
        try:
            with border():
                synced = await self._knows_waitaof()
                # Away already: then no XADD is sent, and no reply of one can be lost.
                redis: Any = self._redis
                await redis.ping()
        except RedisFault as problem:
            return problem
        try:
            with border():
                replies = await self._pipeline(batch, synced)
        except RedisFault as problem:
            for entry in batch:
                entry.replies_lost += 1
            return problem
        refusals = [_confirm(entry, reply) for entry, reply in zip(batch, replies, strict=False)]
        refusal = next(filter(None, refusals), None)
        if refusal is None and synced:
            self._check_synced(replies[-1], entries)
        return refusal

    async def _pipeline(self, batch: Sequence[Written], synced: bool) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for entry in batch:
                pipe.execute_command("XADD", entry.stream, "*", *entry.fields)
            if synced and self._fsync_seconds is not None:
                # On the same connection: it waits for the writes of that connection.
                pipe.execute_command("WAITAOF", 1, 0, max(1, round(self._fsync_seconds * 1000)))
            replies: list[Any] = await pipe.execute(raise_on_error=False)
            return replies

    async def _knows_waitaof(self) -> bool:
        if self._fsync_seconds is None:
            return False
        if self._has_waitaof is None:
            redis: Any = self._redis
            [shown] = await redis.execute_command("COMMAND INFO", "WAITAOF")
            self._has_waitaof = shown is not None
        return self._has_waitaof

    def _check_synced(self, reply: Any, entries: Sequence[Written]) -> None:
        if isinstance(reply, Exception):
            raise ProducerError(f"written, but not waited for on disk: {reply}", entries)
        if int(reply[0]) < 1:
            raise ProducerError(f"written, but not on disk within {self._fsync_seconds} s", entries)


def encode(message: Message) -> bytes:
    """The `data` of an entry: the message without the fields that it does not have."""
    return msgspec.json.encode(
        {name: value for name, value in asdict(message).items() if value is not None and value != ABSENT}
    )


def _confirm(entry: Written, reply: Any) -> RedisFault | None:
    if isinstance(reply, Exception):
        return fault(reply)  # refused, so surely not there
    entry.entry_id = reply.decode()
    if entry.transaction_id is None:
        entry.transaction_id = schemas.transaction_id(entry.stream, entry.entry_id, entry.data)
    return None


def _well_formed(field: str, text: str) -> bytes:
    raw = text.encode()
    check = schemas.correlation_id if field == "correlation_id" else schemas.traceparent
    if check(raw) is None:
        raise Invalid(f"{field}: not well formed")
    return raw
