"""Settlement: the only place where an entry ends.

Delivered entries are settled, dead ones buried, quota requests answered; what a stop leaves is handed over.
Each is a guarded script over many ids: the second caller changes nothing, so a call whose reply was lost is
simply made again. What cannot reach Redis waits here and is sent again; the delivery itself is not repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

import msgspec

from common.entries import Entry, Hand
from common.logs import get
from common.outcomes import Dead, Delivered, Reason
from common.redis_border import RedisFault, Scripts
from common.streams import HANDOVER, Stream

BATCH = 500
"""Entries a script call; a larger one would keep the server from its other clients for too long."""

AT_ONCE = 1000
"""Entries a settling call: more than a read brings, so that what waits to be settled becomes less while we read."""

LINGER = 0.005
"""Seconds for which a settlement waits for company while requests are out; when none is, it waits no longer."""

LINGER_BUSY = 0.05
BUSY = 128
"""With more entries in hand than these, a settlement waits longer and fills up: a script call costs what it costs."""

ENOUGH = 250
"""Entries with which a settlement waits for no more: so many that the loop reads again."""

GRANT_KEPT_MS = 3_600_000

Figures = tuple[int, int, int, int]
"""Of one entry, for the ledger: audio_ms, connection_ms, data_bytes, request_count."""

_NO_FIGURES: Figures = (0, 0, 0, 0)


def no_figures(message: Any, /) -> Figures:
    """Of a message that nothing is added up of."""
    return _NO_FIGURES


_Ended = TypeVar("_Ended", bound=tuple[Entry, object])


class DeadDocument(msgspec.Struct, frozen=True):
    """What `{stream}:dead` keeps beside a dead letter (contract section 2). Times are Unix seconds."""

    reason: str
    error: str
    http_status: int | None
    attempts: int
    added_at: float
    died_at: float
    service: str
    response_excerpt: str | None


class Counters(Protocol):
    """What settlement tells the metrics, per batch."""

    def settled(self, delivered: int, duplicate: int, seconds: list[float]) -> None: ...
    def buried(self, reason: Reason) -> None: ...
    def vanished_entries(self, n: int) -> None: ...


class TurnLost(Exception):
    """A script found that the turn is somebody else's: what is in hand is not ours any more."""


class Settlement:
    """Ends entries of one stream for one consumer, in batches, in the background."""

    def __init__(
        self,
        scripts: Scripts,
        stream: Stream,
        consumer: str,
        service: str,
        hand: Hand,
        counters: Counters,
        *,
        turn_lost: Callable[[], None],
        figures: Callable[[Any], Figures] = no_figures,
        response_stream: str | None = None,
        token: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.scripts = scripts
        self.stream = stream
        self.consumer = consumer
        self.hand = hand
        self.ended = asyncio.Event()  # set whenever entries have left the hand
        self._turn_lost = turn_lost
        self._figures = figures
        self._service = service
        self._counters = counters
        self._response_stream = response_stream
        self.token = token or ""
        self._turn = [stream.turn_key] if token else []
        self._now = now
        self._settling: list[tuple[Entry, bool]] = []
        self._burying: list[tuple[Entry, Dead]] = []
        self._work = asyncio.Event()
        self._full = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._renewing = asyncio.Lock()
        self._log = get("settlement")

    # -- what the loop says --------------------------------------------------------------------------

    def delivered(self, entries: Iterable[Entry], outcome: Delivered) -> None:
        """The ControlPlane has them: they leave the stream with the next batch."""
        settling, duplicate = self._settling, outcome.duplicate
        for entry in entries:
            entry.ended = True
            settling.append((entry, duplicate))
        self._work.set()
        if len(settling) >= ENOUGH:
            self._full.set()

    def died(self, entry: Entry, dead: Dead) -> None:
        """A verdict on the entry: it moves to the dead-letter view with the next batch."""
        entry.ended = True
        self._burying.append((entry, dead))
        self._work.set()

    def hurry(self) -> None:
        """No request is out: nothing more will come soon, so what waits need not."""
        self._full.set()

    # -- the task ------------------------------------------------------------------------------------

    async def run(self, on_fault: Callable[[RedisFault], float]) -> None:
        """Flushes for ever; `on_fault` is told what Redis said and answers how long to wait."""
        while True:
            await self._work.wait()
            self._work.clear()
            busy = self.hand.active - len(self._settling) > BUSY
            try:
                async with asyncio.timeout(LINGER_BUSY if busy else LINGER):
                    await self._full.wait()
            except TimeoutError:
                pass
            self._full.clear()
            try:
                await self.flushed()
            except RedisFault as fault:
                self._work.set()
                await asyncio.sleep(on_fault(fault))

    async def flushed(self) -> bool:
        """Ends all that is waiting; False when the turn was lost over it. Raises RedisFault."""
        try:
            await self.flush()
        except TurnLost:
            self._turn_lost()
            return False
        return True

    async def flush(self) -> None:
        """Ends all that is waiting; raises RedisFault, and then keeps what was not ended, or TurnLost."""
        end = self._settle if self._response_stream is None else self._answer
        async with self._flushing:
            try:
                while self._settling:
                    await self._take(self._settling, end, AT_ONCE)
            finally:  # a grant that cannot be written must not keep a verdict from being recorded
                while self._burying:
                    await self._take(self._burying, self._bury, BATCH)

    async def _take(
        self, queue: list[_Ended], end: Callable[[list[_Ended]], Awaitable[None]], most: int
    ) -> None:
        batch = queue[:most]
        del queue[:most]
        try:
            await end(batch)
        except (RedisFault, asyncio.CancelledError):
            queue[:0] = batch
            raise
        self._left(entry for entry, _ in batch)

    def forget(self) -> None:
        """Drops what waits: after a lost turn the successor delivers it again, in order."""
        self._settling.clear()
        self._burying.clear()

    def _left(self, entries: Iterable[Entry]) -> None:
        self.hand.drop(entries)
        self.ended.set()

    async def _settle(self, batch: list[tuple[Entry, bool]]) -> None:
        stream, figures = self.stream, self._figures
        delivered: list[str | int] = []
        duplicate: list[str | int] = []
        for entry, is_duplicate in batch:
            audio_ms, connection_ms, data_bytes, requests = figures(entry.message)
            named = duplicate if is_duplicate else delivered
            named += entry.id.decode(), audio_ms, connection_ms, data_bytes, requests
        entries = msgspec.json.encode({"delivered": delivered, "duplicate": duplicate})
        args: list[str | bytes | int] = [stream.group, stream.dead_group, self.token, entries]
        keys = [stream.name, stream.dead_key, stream.ledger_key, *self._turn]
        if await self.scripts.run("settle", keys, args) == -1:
            raise TurnLost
        self._count(batch, sum(is_duplicate for _, is_duplicate in batch))

    async def _answer(self, batch: list[tuple[Entry, bool]]) -> None:
        assert self._response_stream is not None
        stream = self.stream
        args: list[str | bytes | int] = [stream.group, self.consumer, GRANT_KEPT_MS]
        for entry, duplicate in batch:
            assert entry.reply is not None
            args += (entry.id, "duplicate" if duplicate else "delivered", entry.reply, entry.correlation_id)
        answered = await self.scripts.run(
            "answer", [stream.name, stream.ledger_key, self._response_stream], args
        )
        mine = [ended for ended, one in zip(batch, answered, strict=True) if one]
        self._count(mine, sum(duplicate for _, duplicate in mine))

    def _count(self, batch: list[tuple[Entry, bool]], duplicates: int) -> None:
        now = self._now()
        seconds = [now - entry.added_at for entry, _ in batch]
        self._counters.settled(len(batch) - duplicates, duplicates, seconds)

    async def _bury(self, deaths: list[tuple[Entry, Dead]]) -> None:
        stream, died_at = self.stream, self._now()
        args: list[str | bytes | int] = [stream.group, stream.dead_group, self.consumer, self.token]
        for entry, dead in deaths:
            document = DeadDocument(
                reason=dead.reason,
                error=dead.error,
                http_status=dead.http_status,
                attempts=entry.attempts,
                added_at=entry.added_at,
                died_at=died_at,
                service=self._service,
                response_excerpt=dead.response_excerpt,
            )
            args += (entry.id, dead.reason.value, max(1, entry.attempts), msgspec.json.encode(document))
        keys = [stream.name, stream.dead_key, stream.ledger_key, *self._turn]
        results = await self.scripts.run("bury", keys, args)
        if results == -2:
            raise TurnLost
        for (entry, dead), result in zip(deaths, results, strict=True):
            if result == 1:
                self._counters.buried(dead.reason)
                self._log.warning(
                    "entry.dead",
                    stream=stream.name,
                    id=entry.id.decode(),
                    reason=dead.reason.value,
                    error=dead.error,
                    http_status=dead.http_status,
                    attempts=entry.attempts,
                    correlation_id=entry.correlation_id or None,
                )
            elif result == -1:
                self.vanished([entry.id])

    # -- what others say -----------------------------------------------------------------------------

    async def renew(self, entries: list[Entry]) -> list[Entry]:
        """Renews the lease and writes delivery counts; returns the entries that are no longer ours."""
        gone: list[Entry] = []
        for batch in _batches(entries):
            async with self._renewing:  # one at a time, so that a count never overwrites a younger one
                # What was lost while this waited may be ours anew, with another count.
                held = [entry for entry in batch if self.hand.holds(entry)]
                args: list[str | bytes | int] = [self.stream.group, self.consumer]
                for entry in held:
                    args += (entry.id, entry.deliveries)
                keys = [self.stream.name, self.stream.ledger_key]
                lost, vanished = await self.scripts.run("renew", keys, args) if held else ((), ())
            self.vanished(vanished)
            kept = {entry.id for entry in held}.difference(lost, vanished)
            gone += (entry for entry in batch if entry.id not in kept)
        return gone

    async def hand_over(self, entries: list[Entry]) -> int:
        """Gives entries to whoever looks next; they count no crash. They leave the hand."""
        n = 0
        for batch in _batches(entries):
            args: list[str | bytes | int] = [self.stream.group, self.consumer, HANDOVER]
            for entry in batch:
                args += (entry.id, entry.deliveries)
            handed, vanished = await self.scripts.run(
                "hand_over", [self.stream.name, self.stream.ledger_key], args
            )
            n += handed
            self.vanished(vanished)
            self._left(batch)
        return n

    def vanished(self, ids: Iterable[bytes]) -> None:
        """Entries that somebody deleted while they were pending: a loss, said aloud, counted by the script."""
        named = [entry_id.decode() for entry_id in ids]
        if named:
            self._counters.vanished_entries(len(named))
            self._log.error("entry.vanished", stream=self.stream.name, ids=named[:20], count=len(named))


def _batches(entries: list[Entry]) -> Iterable[list[Entry]]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]
