"""The book of what faults took away: entries that somebody else deleted, and stretches that Redis itself lost.

What is in this book need not arrive. Everything else must, and the agent's own ledger has to agree with it:
what was deleted before the agent read it is the ledger's imbalance, what was deleted afterwards is `vanished`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from sandbox.book import Row
from sandbox.redis_book import position


class Stretch(msgspec.Struct, frozen=True):
    """What Redis lost of one stream: all after `kept` that was written until `until_ms`."""

    stream: str
    kept: str
    until_ms: int
    fault: str

    def covers(self, row: Row) -> bool:
        return (
            row.stream == self.stream
            and row.entry_id is not None
            and position(self.kept) < position(row.entry_id)
            and position(row.entry_id)[0] <= self.until_ms
        )


class Removals:
    """Written by the faults, read by the judge."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], str] = {}
        self.stretches: list[Stretch] = []
        self.imbalance: Counter[str] = Counter()
        """By stream: deleted before the agent had read it, since its books began."""
        self.went_back: Counter[str] = Counter()
        """By stream: how often it was deleted or rolled back, with or without entries in it."""
        self.memory_gone: list[float] = []
        """When Redis forgot what it knew (Unix): commands and grants from before may come again, or never be read."""

    def took(self, stream: str, fault: str, ids: Iterable[str], *, unread: int = 0) -> None:
        """Entries of one stream were deleted; so many of them had not been read by the group."""
        self.entries |= {(stream, one): fault for one in ids}
        self.imbalance[stream] += unread

    def stream_gone(self, stream: str, fault: str, ids: Iterable[str]) -> None:
        """The stream as a whole is gone: its books begin anew."""
        self.took(stream, fault, ids)
        self.imbalance[stream] = 0
        self.went_back[stream] += 1

    def all_gone(self) -> None:
        """Everything is gone, with the grants and the memory of commands."""
        self.memory_gone.append(time.time())

    def redis_lost(self, stretches: Sequence[Stretch]) -> None:
        """Redis came back with less than it had confirmed."""
        self.stretches += stretches
        self.went_back.update(stretch.stream for stretch in stretches)
        self.all_gone()

    def of(self, rows: Iterable[Row]) -> set[tuple[str, str]]:
        """Stream and id of everything that need not arrive."""
        lost = {
            (row.stream, row.entry_id)
            for row in rows
            if row.entry_id is not None and any(stretch.covers(row) for stretch in self.stretches)
        }
        return lost | self.entries.keys()
