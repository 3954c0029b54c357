"""The dead-letter view: what died of what, and the operator's two ways out of it.

A dead entry stays in its stream, pending in the twin group under the name of its reason; the document that
says why lies in `{stream}:dead`. Redrive hands it back to the live group, discard deletes it.

Both touch only what is in the twin: a repeated call, or a second operator, changes nothing.
An entry that somebody trimmed meanwhile is cleared from the view, counted as vanished and reported.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from common import logs
from common.redis_border import GroupGone, Scripts, border
from common.streams import FIELD_DATA, HANDOVER, Stream

if TYPE_CHECKING:
    from redis.asyncio import Redis

PAGE = 100
"""Entries looked at in one round trip; their bodies come along, so this bounds what is in memory."""

MAX_DISCARD_BYTES = 8 * 1024 * 1024
"""Payload one call of the discard script hands back before it lets the rest wait for the next call."""

ENTRY_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead entry. What its document does not say is None; so are `data` and `session` when unreadable."""

    id: str
    stream: str
    reason: str
    error: str | None
    http_status: int | None
    attempts: int | None
    added_at: float
    died_at: float
    service: str | None
    response_excerpt: str | None
    data: bytes | None
    session: str | None


class Moved(msgspec.Struct, frozen=True):
    """What became of the ids of a redrive or a discard: every one of them is in one of the three."""

    done: tuple[str, ...]
    vanished: tuple[str, ...]  # in the view, but gone from the stream: cleared and counted
    absent: tuple[str, ...]  # not in the view: left alone


class LiveGroupMissing(GroupGone):
    """There is no live group to redrive into; nothing has changed. A running service makes it again."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(
            f"{stream.name} has no group {stream.group}: start its service, which makes it again"
        )


async def find(
    redis: Redis,
    stream: Stream,
    *,
    ids: Sequence[str] | None = None,
    reason: str | None = None,
    session: str | None = None,
    older_than: float | None = None,
    after: str | None = None,
    limit: int | None = None,
    now: float | None = None,
) -> AsyncIterator[DeadLetter]:
    """Dead entries that match every filter: those that are named, or all in id order from `after` on.

    They are read page by page. `older_than`: seconds since they died. A stream without a twin group has none.
    """
    moment = time.time() if now is None else now
    left = limit
    pages = _named(redis, stream, ids) if ids is not None else _all(redis, stream, reason, after)
    async for page in pages:
        for letter in await _letters(redis, stream, page, moment):
            if left == 0:
                return
            if (
                (reason is None or letter.reason == reason)
                and (session is None or letter.session == session)
                and (older_than is None or moment - letter.died_at >= older_than)
            ):
                left = None if left is None else left - 1
                yield letter


async def redrive(redis: Redis, stream: Stream, ids: Iterable[str]) -> Moved:
    """Moves dead entries back into the live group; every live consumer looks there at least every 2 s.

    Raises LiveGroupMissing, and then nothing has changed.
    """
    scripts, keys = Scripts(redis), [stream.name, stream.dead_key, stream.ledger_key]
    became: dict[str, int] = {}
    for some in _batched(_checked(ids), PAGE):
        try:
            rows = await scripts.run("redrive", keys, [stream.group, stream.dead_group, HANDOVER, *some])
        except GroupGone:
            if not await _has_group(redis, stream, stream.group):
                raise LiveGroupMissing(stream) from None
            rows = [0] * len(some)  # the twin is what is missing: nothing is in it
        became.update(zip(some, rows, strict=True))
    return _moved(became)


async def discard(redis: Redis, stream: Stream, ids: Iterable[str]) -> Moved:
    """Deletes dead entries for good; each leaves a line in the audit log with the sha256 of what it said."""
    scripts, keys = Scripts(redis), [stream.name, stream.dead_key, stream.ledger_key]
    audit = logs.get("audit")
    became: dict[str, int] = {}
    for some in _batched(_checked(ids), PAGE):
        waiting = some
        while waiting:
            try:
                rows = await scripts.run("discard", keys, [stream.dead_group, MAX_DISCARD_BYTES, *waiting])
            except GroupGone:
                rows = [[0]] * len(waiting)  # no twin: nothing is in it
            for entry_id, row in zip(waiting, rows, strict=False):
                became[entry_id] = row[0]
                if row[0] == 1:
                    audit.info(
                        "entry.discarded",
                        stream=stream.name,
                        entry_id=entry_id,
                        reason=row[1].decode(),
                        sha256=None if row[2] is None else hashlib.sha256(row[2]).hexdigest(),
                    )
            waiting = waiting[len(rows) :]
    return _moved(became)


def checked_id(entry_id: str) -> str:
    """The id, if it is a whole one (`<ms>-<n>`): half an id would name a range. Raises ValueError."""
    if not ENTRY_ID.fullmatch(entry_id) or any(int(part) >= 2**64 for part in entry_id.split("-")):
        raise ValueError(f"entry id: expected <milliseconds>-<number>, got {entry_id!r}")
    return entry_id


def _checked(ids: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(map(checked_id, ids))  # once each: the second answer for one id would hide the first


# --- reading the view ---------------------------------------------------------------------------------------

Row = dict[str, Any]  # one row of XPENDING: message_id, consumer, time_since_delivered, times_delivered


async def _all(
    redis: Redis, stream: Stream, reason: str | None, after: str | None
) -> AsyncIterator[list[Row]]:
    start = "-" if after is None else f"({checked_id(after)}"
    while True:
        try:
            with border():
                page: list[Row] = await redis.xpending_range(
                    stream.name, stream.dead_group, start, "+", PAGE, consumername=reason
                )
        except GroupGone:
            return
        if page:
            yield page
        if len(page) < PAGE:
            return
        start = f"({page[-1]['message_id'].decode()}"


async def _named(redis: Redis, stream: Stream, ids: Sequence[str]) -> AsyncIterator[list[Row]]:
    for some in _batched(_checked(ids), PAGE):
        try:
            with border():
                async with redis.pipeline(transaction=False) as pipe:
                    for entry_id in some:
                        pipe.xpending_range(stream.name, stream.dead_group, entry_id, entry_id, 1)
                    replies = await pipe.execute(raise_on_error=False)
                for reply in replies:
                    if isinstance(reply, Exception):
                        raise reply  # as it came: raised by the pipeline its first word would be buried
        except GroupGone:
            return
        yield [row for reply in replies for row in reply]


async def _letters(redis: Redis, stream: Stream, page: list[Row], now: float) -> list[DeadLetter]:
    if not page:
        return []
    ids = [row["message_id"] for row in page]
    with border():
        async with redis.pipeline(transaction=False) as pipe:
            pipe.hmget(stream.dead_key, ids)
            for entry_id in ids:
                pipe.xrange(stream.name, entry_id, entry_id)
            documents, *bodies = await pipe.execute()
    return [
        _letter(stream, row, document, body, now)
        for row, document, body in zip(page, documents, bodies, strict=True)
    ]


def _letter(stream: Stream, row: Row, document: bytes | None, body: list[Any], now: float) -> DeadLetter:
    said: dict[str, Any] = msgspec.json.decode(document) if document else {}
    entry_id = row["message_id"].decode()
    data = body[0][1].get(FIELD_DATA) if body else None
    return DeadLetter(
        id=entry_id,
        stream=stream.name,
        reason=row["consumer"].decode(),
        error=said.get("error") if body else "vanished: the entry is no longer in the stream",
        http_status=said.get("http_status"),
        attempts=said.get("attempts"),
        added_at=said.get("added_at", int(entry_id.split("-")[0]) / 1000),
        died_at=said.get("died_at", now - row["time_since_delivered"] / 1000),
        service=said.get("service"),
        response_excerpt=said.get("response_excerpt"),
        data=data,
        session=_session(data),
    )


class _Named(msgspec.Struct):
    api_session_id: str | None = None


_named_by = msgspec.json.Decoder(_Named)


def _session(data: bytes | None) -> str | None:
    try:
        return _named_by.decode(data or b"").api_session_id
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None  # a dead entry is often one that cannot be read


async def _has_group(redis: Redis, stream: Stream, group: str) -> bool:
    with border():
        if not await redis.exists(stream.name):
            return False
        return any(row["name"] == group.encode() for row in await redis.xinfo_groups(stream.name))


def _moved(became: dict[str, int]) -> Moved:
    return Moved(*(tuple(i for i, what in became.items() if what == kind) for kind in (1, -1, 0)))


def _batched(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    source = iter(ids)
    while some := list(islice(source, size)):
        yield some
