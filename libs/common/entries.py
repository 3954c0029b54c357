"""An entry on its way, and the hand that holds all entries that this process has read and not yet ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import msgspec

from common import schemas

Row = list[Any]
"""An entry as scripts return it: id, data, correlation id, traceparent, and the delivery count where it is not new."""

FIRST_READ = 1
SUSPECT = 3
"""From this delivery count on an entry has been through two crashes and is delivered alone (law 8)."""


class Entry(msgspec.Struct, eq=False, gc=False):
    """One entry of a stream, from the moment it is read until it is settled, buried or handed over.

    A Struct, because there is one for every record: made in C, at a fifth of what an `__init__` costs.
    """

    id: bytes
    data: bytes | int | None  # its length instead, where the entry is too long to be carried
    correlation_id: str
    traceparent: str | None
    deliveries: int
    leased_at: float
    size: int = 0  # bytes of payload it came with; the data is gone as soon as it is decoded
    message: Any = None  # decoded by the handler
    lane: str = ""  # the session, for lanes and batches
    transaction_id: str = ""
    reply: bytes | None = None  # the grant, where settling means answering
    attempts: int = 0
    not_found_since: float | None = None
    refused_before: bool = False
    in_flight: bool = False  # a request is out for it
    ended: bool = False  # it has its verdict, and waits for the settlement
    parked: bool = False

    @classmethod
    def of(cls, row: Row, now: float) -> Self:
        """The entry a script returned, leased from `now`; header fields that are not well formed are dropped."""
        is_new = len(row) == 4
        entry_id, data, correlation_id, traceparent = row if is_new else row[:4]
        return cls(
            entry_id,
            data,
            "" if correlation_id is None else schemas.correlation_id(correlation_id) or "",
            None if traceparent is None else schemas.traceparent(traceparent),
            FIRST_READ if is_new else row[4],
            now,
            len(data) if isinstance(data, bytes) else 0,
        )

    @property
    def added_at(self) -> float:
        """When it was added, in Unix seconds: its id says so."""
        return int(self.id.partition(b"-")[0]) / 1000

    @property
    def suspect(self) -> bool:
        return self.deliveries >= SUSPECT

    @property
    def died_alone(self) -> int:
        """How often delivering this entry alone has ended with the death of the process."""
        return max(0, self.deliveries - SUSPECT)

    def __repr__(self) -> str:
        return f"<Entry {self.id.decode()} lane={self.lane!r} deliveries={self.deliveries}>"


class Hand:
    """All entries this process holds, by id: what bounds reading, what the lease renews, what a stop hands over."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self.bytes = 0
        self.parked = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry_id: bytes) -> bool:
        return entry_id in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def active(self) -> int:
        """Entries that are waiting for a slot, in flight, or being settled."""
        return len(self._entries) - self.parked

    def holds(self, entry: Entry) -> bool:
        """Whether this very object is held: after a lost turn the same id may have been taken anew."""
        return self._entries.get(entry.id) is entry

    def unheld(self, rows: Iterable[Row]) -> list[Row]:
        """Those of entries that are not held; the others have been ours all along."""
        held = self._entries
        return [row for row in rows if row[0] not in held]

    def take(self, entries: Sequence[Entry]) -> None:
        """Holds them all at once: their lease is kept from here on."""
        held, size = self._entries, 0
        for entry in entries:
            held[entry.id] = entry
            size += entry.size
        self.bytes += size

    def resize(self, entry: Entry, size: int) -> None:
        self.bytes += size - entry.size
        entry.size = size

    def park(self, entry: Entry, parked: bool) -> None:
        if entry.parked is not parked:
            entry.parked = parked
            if self.holds(entry):
                self.parked += 1 if parked else -1

    def drop(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if self._entries.get(entry.id) is entry:
                del self._entries[entry.id]
                self.bytes -= entry.size
                if entry.parked:
                    self.parked -= 1

    def of(self, ids: Iterable[bytes]) -> list[Entry]:
        return [self._entries[i] for i in ids if i in self._entries]

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = self.parked = 0
