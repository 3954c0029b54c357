"""What Redis still holds of what was produced, read with plain commands: one of the reconciler's books."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common.streams import FIELD_DATA, Stream

PAGE = 1000


class Holding(msgspec.Struct):
    """What Redis holds of one stream: entry ids, the dead ones with their reason."""

    pending: set[str] = msgspec.field(default_factory=set)
    dead: dict[str, str] = msgspec.field(default_factory=dict)
    backlog: set[str] = msgspec.field(default_factory=set)


class Grants(msgspec.Struct):
    """The quota responses that are still there, counted by transaction; older ones may have been trimmed."""

    count: Counter[str] = msgspec.field(default_factory=Counter)
    complete_from_ms: int = 0


async def read_redis(redis: Redis, streams: Iterable[Stream]) -> dict[str, Holding]:
    """What Redis holds. What moves on meanwhile is seen where it was or where it went, never nowhere."""
    holdings = {}
    for stream in streams:
        pending = {id async for id, _ in _pending(redis, stream.name, stream.group)}
        dead = {id: reason async for id, reason in _pending(redis, stream.name, stream.dead_group)}
        present = {id async for id, _ in _entries(redis, stream.name)}
        backlog = present - pending - dead.keys()
        holdings[stream.name] = Holding(pending - dead.keys(), dead, backlog)
    return holdings


async def read_grants(redis: Redis, response_stream: str) -> Grants:
    """The quota responses that have not been trimmed yet."""
    grants = Grants()
    first = None
    async for id, fields in _entries(redis, response_stream):
        first = first or id
        answer = msgspec.json.decode(fields[FIELD_DATA])
        grants.count[answer["transaction_id"]] += 1
    try:
        about = await redis.xinfo_stream(response_stream)
    except ResponseError:
        return grants
    if about["entries-added"] > about["length"]:
        # An answer comes after its request, so what was asked later than this was not answered before it.
        grants.complete_from_ms = position(first or _text(about["last-generated-id"]))[0]
    return grants


async def _pending(redis: Redis, stream: str, group: str) -> AsyncIterator[tuple[str, str]]:
    after = "-"
    while True:
        try:
            page = await redis.xpending_range(stream, group, after, "+", PAGE)
        except ResponseError as error:
            if str(error).startswith("NOGROUP"):
                return
            raise
        for one in page:
            yield _text(one["message_id"]), _text(one["consumer"])
        if len(page) < PAGE:
            return
        after = f"({_text(page[-1]['message_id'])}"


async def _entries(redis: Redis, stream: str) -> AsyncIterator[tuple[str, Mapping[Any, Any]]]:
    after = "-"
    while page := await redis.xrange(stream, after, "+", PAGE):
        for id, fields in page:
            yield _text(id), fields or {}
        after = f"({_text(page[-1][0])}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def position(entry_id: str) -> tuple[int, int]:
    """An entry id as numbers, which sort as the stream does."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
