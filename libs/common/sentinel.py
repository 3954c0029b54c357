"""The sentinel: what a whole stream lost, noticed by looking at it every second and when its groups are made.

`vanished` tells of entries that went one by one while they were pending. This tells of the rest:

    what happened                            what is counted, and how exactly
    the stream was deleted                   `lost`: what was there at the last look and the books know no end of.
                                             At least so many: what was written since is in no figure.
    everything was flushed                   `lost`: what was there at the last look of the process that noticed.
                                             At most so many of it: some may have been delivered since.
    Redis came back with less (rolled back   `lost`: what was there at that look, and no more than was written between
    by its AOF, or by a failover)            what Redis still remembers and that look. At most so many of it.
    trimmed or deleted before it was read    the ledger's imbalance, exactly; nothing more than a line

Of what was written after the last look, up to a second, nobody knows: no figure contains it.
One script compares, counts and notes in one step, so that replicas that notice the same count it once.
Where the script ran and its reply was lost, the books tell of it and the log does not.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from common.logs import get
from common.redis_border import Full, Scripts
from common.streams import Stream


class Counter(Protocol):
    """Who counts what this process noticed."""

    def lost_entries(self, n: int) -> None: ...


class Look(msgspec.Struct, frozen=True):
    """A stream at one instant: `life` names the time since Redis last started or was emptied."""

    life: bytes = b""
    entries_added: int = 0
    length: int = 0
    last_id: bytes = b""


class Sentinel:
    """Remembers what this process saw last, which Redis itself may have forgotten."""

    def __init__(self, scripts: Scripts, stream: Stream, name: str, counter: Counter) -> None:
        self._scripts = scripts
        self._stream = stream
        self._name = name
        self._counter = counter
        self._log = get("sentinel")
        self._seen = Look()
        self._looks = 0

    async def look(self) -> bool:
        """Looks, counts and says what is gone; whether the books were begun anew. Raises RedisFault.

        While the stream or a group is missing, and while Redis has no memory to note anything, it does not look:
        what was seen before is compared the next time.
        """
        stream, seen = self._stream, self._seen
        self._looks += 1
        keys = [stream.name, stream.ledger_key, stream.seen_key]
        args: list[str | bytes | int] = [stream.group, stream.dead_group, f"{self._name}:{self._looks}"]
        args += [seen.life, seen.entries_added, seen.length, seen.last_id]
        try:
            reply = await self._scripts.run("keep_books", keys, args)
        except Full:
            return False
        if not reply:
            return False
        now, anew, went_back, before, lost, imbalance, told = reply
        self._seen = Look(*now)
        if went_back:
            self._counter.lost_entries(lost)
            self._log.error(
                "stream.went_back",
                stream=stream.name,
                seen=before,
                now=self._seen.entries_added,
                lost=lost,
                books_begun_anew=bool(anew),
            )
        self._say_imbalance(imbalance, told)
        return bool(anew)

    def _say_imbalance(self, imbalance: int, told: int) -> None:
        """One line a change, of all processes: an error when entries are missing that were not before."""
        if imbalance > told:
            facts = {"imbalance": imbalance, "more": imbalance - told}
            self._log.error("ledger.imbalance", stream=self._stream.name, **facts)
        elif imbalance < told:  # what was missing has been counted as vanished, or the books began anew
            self._log.info("ledger.imbalance_fell", stream=self._stream.name, imbalance=imbalance)
