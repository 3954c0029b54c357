"""An entry on its way, and the hand that holds all entries that this process has read and not yet ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

from common import schemas

Row = list[Any]
"""An entry as scripts return it: id, data, correlation id, traceparent, and the delivery count where it is not new."""

FIRST_READ = 1
SUSPECT = 3
"""From this delivery count on an entry has been through two crashes and is delivered alone (law 8)."""


class Entry:
    """One entry of a stream, from the moment it is read until it is settled, buried or handed over."""

    __slots__ = (
        "added_at",
        "attempts",
        "correlation_id",
        "data",
        "deliveries",
        "ended",
        "figures",
        "id",
        "in_flight",
        "lane",
        "leased_at",
        "message",
        "not_found_since",
        "parked",
        "refused_before",
        "reply",
        "size",
        "traceparent",
        "transaction_id",
    )

    def __init__(
        self,
        entry_id: bytes,
        data: bytes | int | None,
        correlation_id: str,
        traceparent: str | None,
        deliveries: int,
        leased_at: float,
    ) -> None:
        self.id = entry_id
        self.data = data  # its length instead, where the entry is too long to be carried
        self.size = len(data) if isinstance(data, bytes) else 0
        self.correlation_id = correlation_id
        self.traceparent = traceparent
        self.deliveries = deliveries
        self.leased_at = leased_at
        self.added_at = int(entry_id.split(b"-", 1)[0]) / 1000
        self.message: Any = None  # decoded by the handler
        self.lane = ""  # the session, for lanes and batches
        self.transaction_id = ""
        self.figures: tuple[int, int, int, int] | None = (
            None  # audio ms, connection ms, bytes, requests: for the ledger
        )
        self.reply: bytes | None = None  # the grant, where settling means answering
        self.attempts = 0
        self.not_found_since: float | None = None
        self.refused_before = False
        self.in_flight = False  # a request is out for it
        self.ended = False  # it has its verdict, and waits for the settlement
        self.parked = False

    @classmethod
    def of(cls, row: Row, now: float) -> Self:
        """The entry a script returned, leased from `now`; header fields that are not well formed are dropped."""
        entry_id, data, correlation_id, traceparent = row[:4]
        return cls(
            entry_id,
            data,
            schemas.correlation_id(correlation_id) or "",
            schemas.traceparent(traceparent),
            row[4] if len(row) > 4 else FIRST_READ,
            now,
        )

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

    def take(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self.bytes += entry.size

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
