"""What AudioAPIServers say they produced: one row per entry, independent of what Redis still knows.

As a file it is JSON Lines, flushed with every batch: a killed writer loses nothing that it knew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec

Kind = Literal["usage", "start", "complete", "quota"]


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One XADD.

    `entry_id` null: its reply was lost, the entry may or may not exist.
    `transaction_id`: its own or the derived one; null where there is none (malformed, or lost without one).
    """

    stream: str
    kind: Kind
    entry_id: str | None
    transaction_id: str | None
    session: str | None
    sha256: str | None
    expected: Literal["ok", "invalid"]
    damage: str | None = None
    """What is wrong with an entry that is expected to be invalid."""
    figures: tuple[int, int, int, int] | None = None
    """For usage: audio ms, connection ms, bytes, requests."""

    @property
    def certain(self) -> bool:
        return self.entry_id is not None


class Book:
    """Rows in the order they were written: in memory, or in a file that `read` reads back."""

    def __init__(self, path: Path | None = None) -> None:
        self._rows: list[Row] = []
        self._file: IO[bytes] | None = path.open("ab") if path is not None else None
        self._path = path

    def write(self, rows: Sequence[Row]) -> None:
        if self._file is None:
            self._rows.extend(rows)
            return
        self._file.write(msgspec.json.Encoder().encode_lines(rows))
        self._file.flush()

    def rows(self) -> list[Row]:
        return list(read(self._path)) if self._path is not None else list(self._rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> Iterator[Row]:
    """The rows of a book; a last line that a killed writer left unfinished is not a row."""
    decoder = msgspec.json.Decoder(Row)
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield decoder.decode(line)
