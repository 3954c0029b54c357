"""`dataplane dead`: the dead letters: what died of what, and the operator's two ways out."""

from __future__ import annotations

import base64
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter, Token
from redis.asyncio import Redis

from common import dead_letters, logs
from common.config import Config
from common.dead_letters import DeadLetter, Moved
from common.outcomes import Reason
from common.streams import Stream
from dataplane_agent import printing
from dataplane_agent.target import Failure, Files, Json, chosen, connected, load

AT_ONCE = 500
"""Dead letters gathered before they are shown or moved: it bounds memory, and saves round trips."""

HEADINGS = ("id", "stream", "reason", "died", "attempts", "status", "session", "error")


def _seconds(_: Any, tokens: Sequence[Token]) -> float:
    return printing.duration(tokens[0].value)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which dead letters: those that match everything that is given."""

    stream: Annotated[str | None, Parameter(help="Of this stream.")] = None
    reason: Annotated[Reason | None, Parameter(help="Dead for this reason.")] = None
    session: Annotated[str | None, Parameter(help="Of this session.")] = None
    older_than: Annotated[
        float | None, Parameter(help="Dead for at least this long: 90s, 15m, 24h, 7d.", converter=_seconds)
    ] = None
    id: Annotated[tuple[str, ...], Parameter(negative="", help="This one; repeatable.")] = ()


ALL = Filter()

Ids = Annotated[tuple[str, ...], Parameter(help="Entry ids; the same as --id.")]
Yes = Annotated[bool, Parameter(negative="", help="Do it, also for more than the named ids.")]
After = Annotated[str | None, Parameter(help="Begin behind this id.")]
Limit = Annotated[int | None, Parameter(help="Show so many at most.")]


# --- looking ------------------------------------------------------------------------------------------------


async def list_(
    *, which: Filter = ALL, after: After = None, limit: Limit = None, config: Files = (), json: Json = False
) -> None:
    """Lists dead letters, oldest id first."""
    settings = load(config)
    async with connected(settings) as redis:
        letters = _found(
            redis, settings, which, _checked(which.id), _checked((after,) if after else ()), limit
        )
        if json:
            await _print_array(letters)
            return
        shown = 0
        async for some in _gathered(letters):
            printing.table(HEADINGS, [_row(letter) for letter in some])
            shown += len(some)
    if not shown:
        print("no dead letters")


async def show(id: str, *, stream: str | None = None, config: Files = (), json: Json = False) -> None:
    """Shows one dead letter with its payload."""
    settings = load(config)
    async with connected(settings) as redis:
        letters = [letter async for letter in _found(redis, settings, Filter(stream=stream), _checked((id,)))]
    if not letters:
        raise Failure(f"no dead letter {id}", 1)
    for letter in letters:
        if json:
            printing.json(_document(letter) | _payload(letter.data))
            continue
        for name, value in _document(letter).items():
            print(f"{name + ':':<18} {printing.cell(value)}")
        print()
        print("no field `data`" if letter.data is None else printing.readable(letter.data))


# --- deciding -----------------------------------------------------------------------------------------------


async def retry(
    *ids: str, which: Filter = ALL, yes: Yes = False, config: Files = (), json: Json = False
) -> int:
    """Hands dead letters back to their services, which deliver them again."""
    settings = load(config)
    return await _decide("retried", dead_letters.redrive, settings, which, ids, yes, json)


async def discard(
    *ids: str, which: Filter = ALL, yes: Yes = False, config: Files = (), json: Json = False
) -> int:
    """Deletes dead letters for good; each leaves a line in the audit log, on standard error."""
    settings = load(config)
    logs.setup("dataplane", settings.monitoring, settings.server.id, stream=sys.stderr)
    return await _decide("discarded", dead_letters.discard, settings, which, ids, yes, json)


Move = Callable[[Redis, Stream, Iterable[str]], Awaitable[Moved]]


async def _decide(
    done: str, move: Move, settings: Config, which: Filter, ids: Sequence[str], yes: bool, json: bool
) -> int:
    named = _checked((*ids, *which.id))
    async with connected(settings) as redis:
        letters = _found(redis, settings, which, named)
        if not named and not yes:
            return await _announce(done, letters, json)
        if named:
            letters = _each_once([letter async for letter in letters])
        became: dict[str, list[dict[str, str]]] = {done: [], "vanished": []}
        missing = dict.fromkeys(named)
        async for some in _gathered(letters):
            for name, its in _by_stream(some).items():
                stream = chosen(settings, name)[0]
                moved = await move(redis, stream, its)
                became[done] += [{"stream": name, "id": entry_id} for entry_id in moved.done]
                became["vanished"] += [{"stream": name, "id": entry_id} for entry_id in moved.vanished]
                for entry_id in (*moved.done, *moved.vanished):
                    missing.pop(entry_id, None)
    if json:
        printing.json({**became, "absent": list(missing)})
    else:
        print(f"{done} {len(became[done])}")
        for gone in became["vanished"]:
            print(
                f"{gone['id']} has vanished from {gone['stream']}: somebody trimmed it; cleared and counted"
            )
        for entry_id in missing:
            print(f"{entry_id} is no dead letter")
    return 1 if missing or became["vanished"] else 0


async def _announce(done: str, letters: AsyncIterator[DeadLetter], json: bool) -> int:
    """Says what would be done. Exit code 2 when there is something to do: it wants --yes."""
    found = Counter([(letter.stream, letter.reason) async for letter in letters])
    if json:
        would = [{"stream": s, "reason": r, "entries": n} for (s, r), n in sorted(found.items())]
        printing.json({f"would_be_{done}": would})
    elif not found:
        print("no dead letters")
    else:
        printing.table(("stream", "reason", "entries"), [(*key, n) for key, n in sorted(found.items())])
        print(f"{found.total()} would be {done}: add --yes to do it")
    return 2 if found else 0


async def _each_once(letters: list[DeadLetter]) -> AsyncIterator[DeadLetter]:
    """The named letters; a name that fits in two streams is refused before anything moves."""
    for entry_id, n in Counter(letter.id for letter in letters).items():
        if n > 1:
            raise Failure(f"{entry_id} is a dead letter in more than one stream: say which with --stream", 2)
    for letter in letters:
        yield letter


# --- the parts ----------------------------------------------------------------------------------------------


async def _found(
    redis: Redis,
    settings: Config,
    which: Filter,
    ids: Sequence[str] = (),
    after: Sequence[str] = (),
    limit: int | None = None,
) -> AsyncIterator[DeadLetter]:
    left = limit
    for stream in chosen(settings, which.stream):
        letters = dead_letters.find(
            redis,
            stream,
            ids=ids or None,
            reason=which.reason,
            session=which.session,
            older_than=which.older_than,
            after=next(iter(after), None),
            limit=left,
        )
        async for letter in letters:
            left = None if left is None else left - 1
            yield letter


def _checked(ids: Iterable[str]) -> list[str]:
    try:
        return list(dict.fromkeys(map(dead_letters.checked_id, ids)))
    except ValueError as error:
        raise Failure(str(error), 2) from None


async def _gathered(letters: AsyncIterator[DeadLetter]) -> AsyncIterator[list[DeadLetter]]:
    some: list[DeadLetter] = []
    async for letter in letters:
        some.append(letter)
        if len(some) == AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _by_stream(letters: Iterable[DeadLetter]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for letter in letters:
        found.setdefault(letter.stream, []).append(letter.id)
    return found


async def _print_array(letters: AsyncIterator[DeadLetter]) -> None:
    """One JSON array, written as it is read: a view of any size needs no memory."""
    mark = "["
    async for letter in letters:
        sys.stdout.write(f"{mark}\n  {msgspec.json.encode(_document(letter)).decode()}")
        mark = ","
    sys.stdout.write("[]\n" if mark == "[" else "\n]\n")


def _row(letter: DeadLetter) -> tuple[object, ...]:
    return (
        letter.id,
        letter.stream,
        letter.reason,
        f"{printing.age(time.time() - letter.died_at)} ago",
        letter.attempts,
        letter.http_status,
        letter.session,
        letter.error,
    )


def _document(letter: DeadLetter) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(letter)
    del told["data"]
    return told


def _payload(data: bytes | None) -> dict[str, str | None]:
    """The payload as text, or as base64 where it is none."""
    try:
        return {"data": None if data is None else data.decode()}
    except UnicodeDecodeError:
        return {"data": None, "data_base64": base64.b64encode(data or b"").decode()}
