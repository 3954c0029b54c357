"""Compares three books: what was produced, what the ControlPlane recorded, what Redis still holds.

Every produced entry is in exactly one place:

    in Redis, in the twin group            dead, by reason
    in Redis, pending or not yet read      pending, backlog
    gone from Redis, id recorded           delivered
    gone from Redis, id not recorded       lost, or `removed` where a book of what others removed names it

`reconcile` is a pure function over the books. Each book has a small reader; read while traffic flows, they
agree only in this order: produced, Redis, ControlPlane. What an operator discarded looks lost: discarding
deletes an entry that was never recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import aiohttp
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from common.config import Streams
from common.streams import Stream
from sandbox.book import Kind, Row, read
from sandbox.ledger import Arrival, ControlPlaneBook, Transaction, Verdict
from sandbox.process import fetch_book
from sandbox.redis_book import Grants, Holding, position, read_grants, read_redis

RECORD_KIND: dict[Kind, str] = {
    "usage": "usage",
    "start": "start",
    "complete": "complete",
    "quota": "refresh",
}
ENDPOINT = {"usage": "usage_records", "start": "start", "complete": "complete", "refresh": "refresh"}

NAMED = 10
"""So many of a kind are named on the printed report."""


class StreamReconciliation(msgspec.Struct):
    """One stream. The lists name what must not be: each of them is empty when all is well."""

    stream: str
    produced: int = 0
    delivered: int = 0
    duplicates: int = 0
    """Repeated deliveries that the ControlPlane absorbed."""
    dead: dict[str, int] = msgspec.field(default_factory=dict)
    pending: int = 0
    backlog: int = 0
    uncertain: int = 0
    """XADDs whose reply was lost, and of which nothing arrived: they may or may not have happened."""
    foreign: int = 0
    """Entries in Redis that no book of the producers knows."""
    removed: int = 0
    """Entries that somebody else took away before they were delivered, as a book of removals has it."""
    lost: list[str] = msgspec.field(default_factory=list)
    billed_twice: list[str] = msgspec.field(default_factory=list)
    out_of_order: list[str] = msgspec.field(default_factory=list)
    second_grants: list[str] = msgspec.field(default_factory=list)
    unanswered: list[str] = msgspec.field(default_factory=list)
    """Quota requests that were settled, but have no answer in the response stream."""
    unexpected_dead: list[str] = msgspec.field(default_factory=list)
    unexpected_delivered: list[str] = msgspec.field(default_factory=list)
    key_changes: list[str] = msgspec.field(default_factory=list)
    """Records under an id that nobody produced, and requests whose key is not their record's id."""
    content_changes: list[str] = msgspec.field(default_factory=list)
    """Repetitions under one id whose content differs, and records that differ from what was produced."""


WRONGS = (
    "lost",
    "billed_twice",
    "out_of_order",
    "second_grants",
    "unanswered",
    "unexpected_dead",
    "unexpected_delivered",
    "key_changes",
    "content_changes",
)
ALWAYS_SHOWN = ("lost", "billed_twice", "out_of_order", "second_grants")


class Reconciliation(msgspec.Struct):
    """The verdict over all streams."""

    streams: dict[str, StreamReconciliation]

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing twice, nothing that must not be. What is still under way is no fault."""
        return not any(self.wrong(name) for name in WRONGS)

    @property
    def settled(self) -> bool:
        """Nothing is under way any more."""
        return not any(stream.pending or stream.backlog for stream in self.streams.values())

    def total(self, figure: str) -> int:
        return sum(getattr(stream, figure) for stream in self.streams.values())

    def wrong(self, name: str) -> list[str]:
        """What is wrong in this way, in all streams."""
        return [one for stream in self.streams.values() for one in getattr(stream, name)]

    def dead(self) -> dict[str, int]:
        """Dead by reason, over all streams."""
        return dict(sum((Counter(stream.dead) for stream in self.streams.values()), Counter()))

    def render(self) -> str:
        """The report as plain lines: a line a stream, what is wrong by name, the totals."""
        width = max((len(name) for name in self.streams), default=0)
        lines = [
            f"{name:<{width}}  produced {stream.produced}, delivered {stream.delivered}, "
            f"duplicates {stream.duplicates}, dead {_by_reason(stream.dead)}, pending {stream.pending}, "
            f"backlog {stream.backlog}"
            for name, stream in self.streams.items()
        ]
        lines.append("")
        for name in WRONGS:
            found = self.wrong(name)
            lines += [f"{_words(name)}: {one}" for one in found[:NAMED]]
            if len(found) > NAMED:
                lines.append(f"{_words(name)}: and {len(found) - NAMED} more")
        figures = {name: str(self.total(name)) for name in ("produced", "delivered", "duplicates")}
        figures["dead"] = _by_reason(self.dead())
        figures |= {name: str(self.total(name)) for name in ("pending", "backlog")}
        figures |= {
            name: str(count) for name in ("uncertain", "foreign", "removed") if (count := self.total(name))
        }
        for name in WRONGS:
            found = self.wrong(name)
            if found or name in ALWAYS_SHOWN:
                figures[name] = str(len(found))
        lines += [f"{_words(name):<20} {figure}" for name, figure in figures.items()]
        return "\n".join(lines)


def reconcile(
    produced: Iterable[Row],
    control_plane: ControlPlaneBook,
    redis: Mapping[str, Holding],
    grants: Grants | None = None,
    removed: Collection[tuple[str, str]] = frozenset(),
) -> Reconciliation:
    """Compare the books; without `grants` the response stream is not looked at.

    `removed`: stream and entry id of what somebody else took away.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in produced:
        rows[row.stream].append(row)
    recorded = _Recorded(control_plane)
    produced_ids = {row.transaction_id for of in rows.values() for row in of if row.transaction_id}
    streams = {}
    for name in sorted({*rows, *redis}):
        stream = StreamReconciliation(name)
        _place(stream, rows[name], redis.get(name) or Holding(), recorded, removed)
        kinds = {RECORD_KIND[row.kind] for row in rows[name]}
        _judge_strangers(stream, rows[name], recorded.strangers(kinds, produced_ids), recorded)
        _judge_arrivals(stream, rows[name], kinds, control_plane.arrivals)
        _judge_content(stream, rows[name], recorded)
        _judge_order(stream, rows[name], recorded)
        if "refresh" in kinds:
            kept = [row for row in rows[name] if (name, row.entry_id) not in removed]
            _judge_grants(stream, kept, redis.get(name) or Holding(), recorded, grants)
        streams[name] = stream
    return Reconciliation(streams)


class _Recorded:
    """The ControlPlane's book, by transaction id."""

    def __init__(self, book: ControlPlaneBook) -> None:
        self.by_id = {one.transaction_id: one for one in book.transactions}
        self.times = Counter(one.transaction_id for one in book.transactions)
        self.grants = Counter(grant.transaction_id for grant in book.grants)

    def __contains__(self, transaction_id: str | None) -> bool:
        return transaction_id in self.by_id

    def strangers(self, kinds: set[str], produced: set[str]) -> list[Transaction]:
        """What is recorded of these kinds under ids that nobody produced."""
        return [
            one for one in self.by_id.values() if one.kind in kinds and one.transaction_id not in produced
        ]


def _place(
    stream: StreamReconciliation,
    rows: list[Row],
    holding: Holding,
    recorded: _Recorded,
    removed: Collection[tuple[str, str]],
) -> None:
    """Find every produced entry's one place."""
    contents = _contents(rows)
    for row in rows:
        id = row.entry_id
        if id is None:
            arrived = row.transaction_id in recorded
            stream.produced += arrived
            stream.delivered += arrived
            stream.uncertain += not arrived
            continue
        stream.produced += 1
        if (reason := holding.dead.get(id)) is not None:
            stream.dead[reason] = stream.dead.get(reason, 0) + 1
            meant = reason == "conflict" and len(contents.get(row.transaction_id or "", ())) > 1
            if row.expected == "ok" and not meant:
                stream.unexpected_dead.append(f"{_name(row)}, {reason}")
        elif id in holding.pending:
            stream.pending += 1
        elif id in holding.backlog:
            stream.backlog += 1
        elif row.transaction_id in recorded:
            stream.delivered += 1
            if row.expected == "invalid":
                stream.unexpected_delivered.append(_name(row))
        elif (stream.stream, id) in removed:
            stream.removed += 1
        else:
            stream.lost.append(_name(row))
    known = {row.entry_id for row in rows}
    stream.foreign = len(({*holding.pending} | holding.dead.keys() | holding.backlog) - known)


def _judge_strangers(
    stream: StreamReconciliation, rows: list[Row], strangers: list[Transaction], recorded: _Recorded
) -> None:
    """Recorded under an id nobody produced: an entry of unknown id, or one sent under another id."""
    unresolved = Counter(
        (row.session, RECORD_KIND[row.kind])
        for row in rows
        if row.entry_id is None and not row.transaction_id
    )
    strange = {one.transaction_id for one in strangers}
    prints = {one.fingerprint for id, one in recorded.by_id.items() if id not in strange}
    for one in strangers:
        name = f"{stream.stream}: session {one.session_id}, transaction {one.transaction_id}"
        if unresolved[one.session_id, one.kind]:
            unresolved[one.session_id, one.kind] -= 1
            stream.produced += 1
            stream.delivered += 1
            stream.uncertain -= 1
        elif one.kind == "refresh":
            stream.second_grants.append(f"{name}, which nobody asked for")
        elif one.fingerprint in prints:
            stream.billed_twice.append(f"{name}, recorded under another id too")
        else:
            stream.key_changes.append(f"{name}, which nobody produced")
    for id, times in recorded.times.items():
        if times > 1 and any(row.transaction_id == id for row in rows):
            stream.billed_twice.append(f"{stream.stream}: transaction {id}, recorded {times} times")


def _judge_arrivals(
    stream: StreamReconciliation, rows: list[Row], kinds: set[str], arrivals: Sequence[Arrival]
) -> None:
    """Every repetition carries the same key and the same content."""
    meant = {id for id, contents in _contents(rows).items() if len(contents) > 1}
    endpoints = {ENDPOINT[kind] for kind in kinds}
    contents: dict[str, set[str]] = defaultdict(set)
    for arrival in arrivals:
        if arrival.endpoint not in endpoints:
            continue
        stream.duplicates += arrival.verdict == Verdict.DUPLICATE
        id = arrival.transaction_id
        if id is None or arrival.content is None:
            continue
        if not arrival.batched and arrival.idempotency_key != id:
            stream.key_changes.append(
                f"{stream.stream}: transaction {id} under key {arrival.idempotency_key}"
            )
        contents[id].add(arrival.content)
    for id, different in contents.items():
        if len(different) > 1 and id not in meant:
            stream.content_changes.append(f"{stream.stream}: transaction {id}, {len(different)} contents")


class _Measures(msgspec.Struct):
    audio_duration_seconds: float
    connection_duration_seconds: float
    data_bytes_processed: int
    request_count: int

    def figures(self) -> tuple[int, int, int, int]:
        return (
            round(self.audio_duration_seconds * 1000),
            round(self.connection_duration_seconds * 1000),
            self.data_bytes_processed,
            self.request_count,
        )


def _judge_content(stream: StreamReconciliation, rows: list[Row], recorded: _Recorded) -> None:
    """What was recorded is what was produced: the session, and the measures of usage."""
    contents = _contents(rows)
    for row in rows:
        if row.transaction_id not in recorded or len(contents.get(row.transaction_id or "", ())) > 1:
            continue
        one = recorded.by_id[row.transaction_id or ""]
        if row.session is not None and one.session_id != row.session:
            stream.content_changes.append(f"{_name(row)}, recorded for session {one.session_id}")
        if row.figures is None or one.kind != "usage":
            continue
        billed = msgspec.json.decode(one.body, type=_Measures).figures()
        if billed != tuple(row.figures):
            stream.content_changes.append(f"{_name(row)}, produced {row.figures}, recorded {billed}")


def _judge_order(stream: StreamReconciliation, rows: list[Row], recorded: _Recorded) -> None:
    """A session's events are recorded in stream order; those that died leave no gap."""
    sessions: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if (
            row.kind in ("start", "complete")
            and row.entry_id
            and row.session
            and row.transaction_id in recorded
        ):
            sessions[row.session].append(row)
    for session, events in sessions.items():
        events.sort(key=lambda row: position(row.entry_id or ""))
        # An id that was produced twice counts where it first stands.
        ids = list(dict.fromkeys(row.transaction_id or "" for row in events))
        for earlier, later in pairwise(ids):
            if recorded.by_id[later].position < recorded.by_id[earlier].position:
                stream.out_of_order.append(f"{stream.stream}: session {session}, {later} before {earlier}")


def _judge_grants(
    stream: StreamReconciliation,
    rows: list[Row],
    holding: Holding,
    recorded: _Recorded,
    grants: Grants | None,
) -> None:
    """One grant a transaction, and one answer a request."""
    requests = Counter(row.transaction_id for row in rows if row.transaction_id)
    for id, given in recorded.grants.items():
        if given > 1:
            stream.second_grants.append(f"{stream.stream}: transaction {id}, {given} grants")
    if grants is None:
        return
    for id, answers in grants.count.items():
        if id in requests and answers > requests[id]:
            stream.second_grants.append(f"{stream.stream}: transaction {id}, {answers} answers")
    still_here = holding.pending | holding.dead.keys() | holding.backlog
    for row in rows:
        if row.entry_id is None or row.entry_id in still_here or row.transaction_id not in recorded:
            continue
        if position(row.entry_id)[0] > grants.complete_from_ms and not grants.count[row.transaction_id or ""]:
            stream.unanswered.append(_name(row))


def _contents(rows: Iterable[Row]) -> dict[str, set[str]]:
    """Transaction id -> the contents it was produced with; more than one is a conflict of the producer's."""
    contents: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.transaction_id and row.sha256:
            contents[row.transaction_id].add(row.sha256)
    return contents


def _name(row: Row) -> str:
    return f"{row.stream}: entry {row.entry_id}, session {row.session}, transaction {row.transaction_id}"


def _by_reason(dead: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dead.items()))
    return f"{sum(dead.values())} ({reasons})" if reasons else "0"


def _words(name: str) -> str:
    return name.replace("_", " ")


def read_produced(paths: Iterable[Path]) -> list[Row]:
    """The producers' books, JSON Lines."""
    return [row for path in paths for row in read(path)]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sandbox reconcile`: 0 it adds up, 1 it does not, 3 a book cannot be read."""
    parser = argparse.ArgumentParser("reconcile", description="Compare what was produced with where it is.")
    parser.add_argument("books", nargs="+", type=Path, help="the producers' books (JSON Lines)")
    parser.add_argument("--redis-url", default="redis://localhost:6379/0")
    parser.add_argument("--admin-url", required=True, help="the sandbox ControlPlane's admin port")
    parser.add_argument("--json", action="store_true", help="every figure and name, for programs")
    options = parser.parse_args(argv)
    try:
        verdict = asyncio.run(_reconcile(options.books, options.redis_url, options.admin_url))
    except (OSError, RedisError, aiohttp.ClientError, msgspec.MsgspecError) as error:
        print(f"reconcile: {error}", file=sys.stderr)
        return 3
    print(msgspec.json.encode(verdict).decode() if options.json else verdict.render())
    return 0 if verdict.ok else 1


async def _reconcile(books: Sequence[Path], redis_url: str, admin_url: str) -> Reconciliation:
    names = Streams()
    streams = [
        Stream(names.usage_records, "usage_forwarder"),
        Stream(names.session_lifecycle, "session_notifier"),
        Stream(names.quota_refresh, "quota_refresher"),
    ]
    produced = read_produced(books)
    redis = Redis.from_url(redis_url, protocol=2, socket_timeout=30)
    async with redis, aiohttp.ClientSession() as session:
        holdings = await read_redis(redis, streams)
        grants = await read_grants(redis, names.quota_response)
        return reconcile(produced, await fetch_book(session, admin_url), holdings, grants)
