"""The ControlPlane's book, in SQLite: what was recorded, and everything that arrived.

A transaction id is recorded once. The same id with the same content again is a duplicate, with other content
a conflict; sameness is judged without the fields that may differ between repetitions (`VARYING`). With a file
as database the book survives the process, without one it lives in memory.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec

RecordKind = Literal["usage", "start", "complete", "refresh"]

SECONDS_PER_CREDIT = 360
VARYING = frozenset(
    {"processing_timestamp", "timestamp", "server_instance_id", "api_server_region", "agent_version"}
)
"""Contract section 3: these may differ between two deliveries of one transaction."""


class Verdict(StrEnum):
    """What became of an arrival."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    ACCEPTED = "accepted"  # a call that records nothing: heartbeat, poll, …
    REFUSED = "refused"  # key, shape, unknown session
    NOT_RECORDED = "not_recorded"  # a new record in a batch that was refused for another's sake
    FAULT = "fault"  # a fault struck before it could be judged


class Arrival(msgspec.Struct):
    """One record that arrived, or one call that carries none. `status` 0: the caller was gone by then."""

    seq: int
    request: int
    at: float
    endpoint: str
    session_id: str | None = None
    server_id: str | None = None
    transaction_id: str | None = None
    idempotency_key: str | None = None
    correlation_id: str | None = None
    traceparent: str | None = None
    batched: bool = False
    content: str | None = None
    status: int | None = None
    verdict: str | None = None


class Transaction(msgspec.Struct):
    """One recorded transaction. `position`: order of recording; `fingerprint`: its content without its id."""

    position: int
    transaction_id: str
    kind: str
    session_id: str
    content: str
    fingerprint: str
    credits: int
    audio_seconds: float
    connection_seconds: float
    recorded_at: float
    body: msgspec.Raw


class Grant(msgspec.Struct):
    """The one grant of a refresh; `repeated` counts how often it was answered again."""

    transaction_id: str
    session_id: str
    new_quota_amount: int
    final_quota: bool
    granted_at: float
    repeated: int


class Violation(msgspec.Struct):
    """An event that came before the one it must follow."""

    position: int
    session_id: str
    transaction_id: str
    violation: str


class ControlPlaneBook(msgspec.Struct):
    """Everything the reconciler wants to know of this side."""

    transactions: list[Transaction]
    arrivals: list[Arrival]
    grants: list[Grant]
    order_violations: list[Violation]


def canonical(record: dict[str, Any], leave_out: frozenset[str] = VARYING, *, scope: str = "") -> str:
    """A hash of the record's content and of where it was sent, the same for every order of its fields."""
    content = {name: value for name, value in record.items() if name not in leave_out}
    return hashlib.sha256(scope.encode() + msgspec.json.encode(content, order="sorted")).hexdigest()


def credits_of(audio_seconds: float, connection_seconds: float) -> int:
    """Contract section 3: whole credits, rounded up, from the greater measure."""
    return math.ceil(max(audio_seconds, connection_seconds) / SECONDS_PER_CREDIT)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS arrivals (
    seq INTEGER PRIMARY KEY, request INTEGER, at REAL, endpoint TEXT, session_id TEXT, server_id TEXT,
    transaction_id TEXT, idempotency_key TEXT, correlation_id TEXT, traceparent TEXT, batched INTEGER,
    content TEXT, status INTEGER, verdict TEXT
);
CREATE TABLE IF NOT EXISTS transactions (
    position INTEGER PRIMARY KEY, transaction_id TEXT UNIQUE NOT NULL, kind TEXT, session_id TEXT,
    content TEXT, fingerprint TEXT, credits INTEGER, audio_seconds REAL, connection_seconds REAL,
    recorded_at REAL, body BLOB
);
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, customer_id TEXT, state TEXT, usage_records INTEGER, credits INTEGER,
    granted INTEGER, grants INTEGER, last_seen REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS grants (
    transaction_id TEXT PRIMARY KEY, session_id TEXT, new_quota_amount INTEGER, final_quota INTEGER,
    granted_at REAL, repeated INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS order_violations (
    position INTEGER, session_id TEXT, transaction_id TEXT, violation TEXT
);
CREATE TABLE IF NOT EXISTS servers (
    server_id TEXT PRIMARY KEY, registered_at REAL, registrations INTEGER, status TEXT, heartbeats INTEGER,
    last_heartbeat REAL, shutdown_reason TEXT, registration BLOB, metrics BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commands (
    position INTEGER PRIMARY KEY, command_id TEXT, server_id TEXT, command_type TEXT, forge TEXT,
    enqueued_at REAL, polls INTEGER, envelope BLOB
);
CREATE TABLE IF NOT EXISTS results (
    position INTEGER PRIMARY KEY, command_id TEXT, server_id TEXT, content TEXT, received_at REAL,
    repeated INTEGER, body BLOB, UNIQUE (server_id, command_id, content)
);
"""
_TABLES = (
    "arrivals",
    "transactions",
    "sessions",
    "grants",
    "order_violations",
    "servers",
    "commands",
    "results",
)


_ARRIVAL_COLUMNS = (
    "session_id",
    "server_id",
    "transaction_id",
    "idempotency_key",
    "correlation_id",
    "traceparent",
    "batched",
    "content",
)


class Ledger:
    """The book. Every method is synchronous and short; what it changed is in the database when it returns."""

    def __init__(self, path: Path | None = None, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        # The page cache outlives a killed process, which is all that is promised: no fsync.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.executescript(_SCHEMA)
        self._load()

    def _load(self) -> None:
        self._seq: int = self._one("SELECT coalesce(max(seq), 0) FROM arrivals")
        self._request: int = self._one("SELECT coalesce(max(request), 0) FROM arrivals")
        self.counts: Counter[tuple[str, int, str]] = Counter()
        """Arrivals by endpoint, status and verdict, counted as they end: nobody has to scan for them."""
        ended = (
            "SELECT endpoint, status, verdict, count(*) FROM arrivals WHERE status IS NOT NULL "
            "GROUP BY 1, 2, 3"
        )
        for endpoint, status, verdict, count in self._db.execute(ended):
            self.counts[endpoint, status, verdict] = count
        self.recorded: Counter[str] = Counter(
            dict(self._db.execute("SELECT kind, count(*) FROM transactions GROUP BY kind").fetchall())
        )
        self.credits: int = self._one("SELECT coalesce(sum(credits), 0) FROM transactions")

    def close(self) -> None:
        self._db.close()

    def clear(self) -> None:
        """Forget everything."""
        with self.together():
            for table in _TABLES:
                self._db.execute(f"DELETE FROM {table}")
        self._load()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All of it or nothing of it."""
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, sql: str, *arguments: Any) -> Any:
        row = self._db.execute(sql, arguments).fetchone()
        return None if row is None else row[0]

    # Arrivals: noted when they come, completed when they are answered.

    def arrive(self, endpoint: str, rows: Sequence[dict[str, Any]]) -> Sequence[int]:
        """Note one request: a row per record in it. Returns the rows' numbers."""
        self._request += 1
        now = self._now()
        numbers = range(self._seq + 1, self._seq + 1 + len(rows))
        self._seq += len(rows)
        with self.together():
            self._db.executemany(
                "INSERT INTO arrivals VALUES (?,?,?,?,?,?,?,?,?,?,?,?,NULL,NULL)",
                [
                    (number, self._request, now, endpoint, *(row.get(column) for column in _ARRIVAL_COLUMNS))
                    for number, row in zip(numbers, rows, strict=True)
                ],
            )
        return numbers

    def answered(self, endpoint: str, numbers: Sequence[int], status: int, verdicts: Sequence[str]) -> None:
        """Complete the rows of one request."""
        self.counts.update((endpoint, status, verdict) for verdict in verdicts)
        with self.together():
            self._db.executemany(
                "UPDATE arrivals SET status=?, verdict=? WHERE seq=?",
                [(status, verdict, number) for number, verdict in zip(numbers, verdicts, strict=True)],
            )

    # Transactions

    def known(self, transaction_id: str, content: str) -> Verdict | None:
        """DUPLICATE or CONFLICT when the id is recorded, else None."""
        recorded = self._one("SELECT content FROM transactions WHERE transaction_id=?", transaction_id)
        if recorded is None:
            return None
        return Verdict.DUPLICATE if recorded == content else Verdict.CONFLICT

    def record(self, kind: RecordKind, session_id: str, record: dict[str, Any], content: str) -> int:
        """Record one new transaction and what it does to its session; returns its credits."""
        audio = float(record.get("audio_duration_seconds", 0))
        connection = float(record.get("connection_duration_seconds", 0))
        credits = credits_of(audio, connection)
        now = self._now()
        cursor = self._db.execute(
            "INSERT INTO transactions VALUES (NULL,?,?,?,?,?,?,?,?,?,?)",
            (
                record["transaction_id"],
                kind,
                session_id,
                content,
                canonical(record, VARYING | {"transaction_id"}),
                credits,
                audio,
                connection,
                now,
                msgspec.json.encode(record),
            ),
        )
        state = self.session_state(session_id)
        match kind:
            case "complete":
                if state != "started":
                    self._db.execute(
                        "INSERT INTO order_violations VALUES (?,?,?,?)",
                        (
                            cursor.lastrowid,
                            session_id,
                            record["transaction_id"],
                            f"complete while {state or 'unknown'}",
                        ),
                    )
                state = "completed"
            case "start" if state != "completed":
                state = "started"
            case _:
                state = state or "unknown"
        self._db.execute(
            "INSERT INTO sessions VALUES (?,?,?,?,?,0,0,?) ON CONFLICT (session_id) DO UPDATE SET "
            "state=excluded.state, usage_records=usage_records+excluded.usage_records, "
            "credits=credits+excluded.credits, last_seen=excluded.last_seen",
            (session_id, record["customer_id"], state, kind == "usage", credits, now),
        )
        self.recorded[kind] += 1
        self.credits += credits
        return credits

    def session_state(self, session_id: str) -> str | None:
        """unknown (only usage came yet), started, completed; None: never heard of."""
        state: str | None = self._one("SELECT state FROM sessions WHERE session_id=?", session_id)
        return state

    # Grants: one per transaction id, answered again as often as it is asked for.

    def grant(self, session_id: str, transaction_id: str, amount: int, grants_per_session: int) -> Grant:
        """Make the grant of a newly recorded refresh; the session's last one is final."""
        given = self._one("SELECT grants FROM sessions WHERE session_id=?", session_id) or 0
        grant = Grant(transaction_id, session_id, amount, given + 1 >= grants_per_session, self._now(), 0)
        self._db.execute("INSERT INTO grants VALUES (?,?,?,?,?,?)", msgspec.structs.astuple(grant))
        self._db.execute(
            "UPDATE sessions SET granted=granted+?, grants=grants+1 WHERE session_id=?", (amount, session_id)
        )
        return grant

    def grant_again(self, transaction_id: str) -> Grant:
        """The grant this transaction got."""
        self._db.execute("UPDATE grants SET repeated=repeated+1 WHERE transaction_id=?", (transaction_id,))
        row = self._db.execute("SELECT * FROM grants WHERE transaction_id=?", (transaction_id,)).fetchone()
        return msgspec.convert(dict(row), Grant, strict=False)

    # Servers and their commands

    def register(self, server_id: str, registration: bytes) -> None:
        """Note a server as online; a second time counts as a registration more."""
        self._db.execute(
            "INSERT INTO servers VALUES (?,?,1,'online',0,NULL,NULL,?,NULL) ON CONFLICT (server_id) "
            "DO UPDATE SET registered_at=excluded.registered_at, registrations=registrations+1, "
            "status='online', shutdown_reason=NULL, registration=excluded.registration",
            (server_id, self._now(), registration),
        )

    def heartbeat(self, server_id: str, status: str, metrics: bytes) -> bool:
        """False when the server is not registered."""
        cursor = self._db.execute(
            "UPDATE servers SET status=?, metrics=?, heartbeats=heartbeats+1, last_heartbeat=? "
            "WHERE server_id=?",
            (status, metrics, self._now(), server_id),
        )
        return cursor.rowcount == 1

    def shutdown(self, server_id: str, reason: str) -> None:
        self._db.execute(
            "UPDATE servers SET status='offline', shutdown_reason=? WHERE server_id=?", (reason, server_id)
        )

    def forget_server(self, server_id: str) -> None:
        """The server has to register again."""
        self._db.execute("DELETE FROM servers WHERE server_id=?", (server_id,))

    def enqueue(self, server_id: str, envelope: dict[str, Any], forge: str | None) -> None:
        """Hold a command for the server's next poll."""
        self._db.execute(
            "INSERT INTO commands VALUES (NULL,?,?,?,?,?,0,?)",
            (
                envelope["command_id"],
                server_id,
                envelope["command_type"],
                forge,
                self._now(),
                msgspec.json.encode(envelope),
            ),
        )

    def poll(self, server_id: str, keep_seconds: float) -> list[msgspec.Raw]:
        """The commands that no result has come for yet, oldest first, as long as they are worth repeating."""
        due = (
            "server_id=? AND enqueued_at>? AND NOT EXISTS (SELECT 1 FROM results WHERE "
            "results.server_id=commands.server_id AND results.command_id=commands.command_id)"
        )
        arguments = (server_id, self._now() - keep_seconds)
        rows = self._db.execute(
            f"SELECT envelope FROM commands WHERE {due} ORDER BY position", arguments
        ).fetchall()
        self._db.execute(f"UPDATE commands SET polls=polls+1 WHERE {due}", arguments)
        return [msgspec.Raw(row[0]) for row in rows]

    def result(self, server_id: str, command_id: str, record: dict[str, Any]) -> Verdict:
        """Record a command's result; another result for the same command is kept too, as a conflict."""
        content = canonical(record, frozenset())
        again = self._db.execute(
            "UPDATE results SET repeated=repeated+1 WHERE server_id=? AND command_id=? AND content=?",
            (server_id, command_id, content),
        )
        if again.rowcount:
            return Verdict.DUPLICATE
        others = self._one(
            "SELECT count(*) FROM results WHERE server_id=? AND command_id=?", server_id, command_id
        )
        self._db.execute(
            "INSERT INTO results VALUES (NULL,?,?,?,?,0,?)",
            (command_id, server_id, content, self._now(), msgspec.json.encode(record)),
        )
        return Verdict.CONFLICT if others else Verdict.RECORDED

    # Reading the book

    def book(self) -> ControlPlaneBook:
        return ControlPlaneBook(self.transactions(), self.arrivals(), self.grants(), self.violations())

    def transactions(self, after: int = 0, limit: int = -1) -> list[Transaction]:
        """Recorded transactions in the order of recording, those after `after`."""
        sql = (
            "SELECT position, transaction_id, kind, session_id, content, fingerprint, credits, "
            "audio_seconds, connection_seconds, recorded_at, body FROM transactions WHERE position>? "
            "ORDER BY position LIMIT ?"
        )
        rows = self._db.execute(sql, (after, limit))
        return [Transaction(**{**dict(row), "body": msgspec.Raw(row["body"])}) for row in rows]

    def arrivals(self, after: int = 0, limit: int = -1, *, newest: bool = False) -> list[Arrival]:
        """Arrivals after number `after`, oldest first, or the newest ones."""
        order = "DESC" if newest else "ASC"
        sql = f"SELECT * FROM arrivals WHERE seq>? ORDER BY seq {order} LIMIT ?"
        rows = self._db.execute(sql, (after, limit))
        return [Arrival(**{**dict(row), "batched": bool(row["batched"])}) for row in rows]

    def grants(self) -> list[Grant]:
        rows = self._db.execute("SELECT * FROM grants ORDER BY granted_at").fetchall()
        return [msgspec.convert(dict(row), Grant, strict=False) for row in rows]

    def grant_figures(self) -> tuple[int, int]:
        """How many grants were given, and how often one was answered again."""
        count, repeated = self._db.execute(
            "SELECT count(*), coalesce(sum(repeated), 0) FROM grants"
        ).fetchone()
        return count, repeated

    def violation_count(self) -> int:
        count: int = self._one("SELECT count(*) FROM order_violations")
        return count

    def violations(self) -> list[Violation]:
        return [
            Violation(*row) for row in self._db.execute("SELECT * FROM order_violations ORDER BY position")
        ]

    def sessions(self, limit: int = -1) -> list[dict[str, Any]]:
        """Sessions, the last heard of first."""
        rows = self._db.execute("SELECT * FROM sessions ORDER BY last_seen DESC LIMIT ?", (limit,))
        return [dict(row) for row in rows]

    def session_states(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT state, count(*) FROM sessions GROUP BY state").fetchall())

    def servers(self) -> list[dict[str, Any]]:
        rows = self._db.execute("SELECT * FROM servers ORDER BY server_id").fetchall()
        return [_decoded(row, "registration", "metrics") for row in rows]

    def commands(self, limit: int = -1) -> list[dict[str, Any]]:
        """Commands, newest first, each with its `results` (more than one: it ran twice)."""
        rows = self._db.execute("SELECT * FROM commands ORDER BY position DESC LIMIT ?", (limit,)).fetchall()
        commands = [_decoded(row, "envelope") for row in rows]
        for command in commands:
            results = self._db.execute(
                "SELECT received_at, repeated, body FROM results WHERE server_id=? AND command_id=? "
                "ORDER BY position",
                (command["server_id"], command["command_id"]),
            ).fetchall()
            command["results"] = [_decoded(row, "body") for row in results]
        return commands


def _decoded(row: sqlite3.Row, *columns: str) -> dict[str, Any]:
    fields = dict(row)
    for column in columns:
        if fields[column] is not None:
            fields[column] = msgspec.json.decode(fields[column])
    return fields
