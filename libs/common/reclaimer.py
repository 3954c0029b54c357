"""The reclaimer: what nobody works on any more comes back.

Entries of dead consumers by XAUTOCLAIM, page by page, when there is room for them; entries handed over by stopped
processes or by redrive, looked for every 2 s; entries of this process that a failed read delivered to nobody.
What vanished while pending is counted and said. The janitor removes names of dead consumers, clears ghosts, and
discards dead letters that are older than they are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

import msgspec

from common import dead_letters
from common.entries import Hand, Row
from common.logs import get
from common.redis_border import RedisFault, Scripts, border
from common.settlement import Settlement, TurnLost
from common.streams import HANDOVER, MAX_ENTRY_BYTES, Stream

LOOK_EVERY = 2.0
"""Seconds between looks into the consumer `handover`."""

PAGE = 100
"""Entries a claim: a larger page keeps the server from its other clients (measured: 1,000 take 37 ms)."""

SWEEP_EVERY = 60.0
DEAD_CONSUMER_AFTER = 600.0
"""Seconds of silence after which a consumer's name may go; far above any BLOCK and any lease."""

START = b"0-0"


class Swept(msgspec.Struct, frozen=True):
    """What one round of the janitor did."""

    consumers: int
    ghosts: int
    discarded: int = 0


class Reclaimer:
    """Finds what this consumer may take over; the loop asks it when there is room."""

    def __init__(
        self,
        scripts: Scripts,
        stream: Stream,
        settlement: Settlement,
        hand: Hand,
        *,
        visibility_timeout: float,
        claim_interval: float,
        dead_retention: float | None = None,
        token: str | None,
        clock: Callable[[], float],
    ) -> None:
        """`dead_retention`: seconds after which a dead letter is discarded; None: an operator decides."""
        self._scripts = scripts
        self._stream = stream
        self._settlement = settlement
        self._hand = hand
        self._idle_ms = int(visibility_timeout * 1000)
        self._claim_every = claim_interval
        self._dead_retention = dead_retention
        self._look_every = min(LOOK_EVERY, claim_interval)
        self._turn = [stream.turn_key] if token else []
        self.token = token or ""
        self._clock = clock
        self._cursor = START
        self._sweep_at = clock()
        self._look_at = clock()
        self._log = get("reclaimer")

    @property
    def due_in(self) -> float:
        """Seconds until the next look is worth it; 0 or less: now."""
        return min(self._sweep_at, self._look_at) - self._clock()

    async def take(self, room: int) -> list[Row]:
        """Takes over at most `room` entries, one page; `due_in` says whether more wait. Raises RedisFault, TurnLost."""
        sweeping = self._clock() >= self._sweep_at
        cursor, rows = await self._page(self._idle_ms if sweeping else -1, self._cursor, min(PAGE, room))
        now = self._clock()
        if cursor:
            self._cursor = cursor
            if cursor == START:
                self._sweep_at = now + self._claim_every
        elif not rows:
            self._look_at = now + self._look_every
        if rows:
            self._log.info("entries.taken_over", stream=self._stream.name, count=len(rows))
        return rows

    async def take_all(self) -> list[Row]:
        """Takes over everything that is pending, in id order: what a new holder of the turn does before it reads."""
        found: dict[bytes, Row] = {}
        at, cursor = START, b""
        while cursor != START:
            cursor, rows = await self._page(0, at, PAGE)
            found |= {row[0]: row for row in rows}
            at = cursor or at
        self._cursor, self._sweep_at = START, self._clock() + self._claim_every
        return sorted(found.values(), key=lambda row: tuple(map(int, row[0].split(b"-"))))

    async def recover(self) -> list[Row]:
        """What a failed read delivered to nobody: pending under the own name, and not in hand. Raises RedisFault."""
        stream, me = self._stream, self._settlement.consumer
        redis = self._scripts.redis
        orphans: list[bytes] = []
        start: bytes = b"-"
        while True:
            with border():
                page = await redis.xpending_range(stream.name, stream.group, start, "+", 1000, me)
            ids = [cast(bytes, row["message_id"]) for row in page]
            orphans += (entry_id for entry_id in ids if entry_id not in self._hand)
            if len(ids) < 1000:
                break
            start = b"(" + ids[-1]
        rows: list[Row] = []
        for n in range(0, len(orphans), PAGE):
            rows += await self.fetch(orphans[n : n + PAGE])
        return rows

    async def fetch(self, ids: list[bytes]) -> list[Row]:
        """Brings the fields of own entries; what is not ours any more is left out. Raises RedisFault."""
        stream = self._stream
        args: list[str | bytes | int] = [stream.group, self._settlement.consumer, MAX_ENTRY_BYTES, *ids]
        reply = await self._scripts.run("fetch", [stream.name, stream.ledger_key], args)
        self._settlement.vanished(reply[0])
        return list(reply[1:])

    async def _page(self, idle_ms: int, cursor: bytes, count: int) -> tuple[bytes, list[Row]]:
        stream = self._stream
        keys = [stream.name, stream.ledger_key, *self._turn]
        args: list[str | bytes | int] = [
            stream.group,
            self._settlement.consumer,
            HANDOVER,
            idle_ms,
            cursor,
            count,
            MAX_ENTRY_BYTES,
            self.token,
        ]
        reply = await self._scripts.run("take_over", keys, args)
        if reply[0] == -1:
            raise TurnLost
        self._settlement.vanished(reply[1])
        return reply[0], list(reply[2:])

    # -- the janitor ---------------------------------------------------------------------------------

    async def run_janitor(self, on_fault: Callable[[RedisFault], float]) -> None:
        """Sweeps for ever; `on_fault` is told what Redis said and answers how long to wait."""
        while True:
            await asyncio.sleep(SWEEP_EVERY)
            try:
                await self.sweep()
            except RedisFault as fault:
                await asyncio.sleep(on_fault(fault))

    async def sweep(self) -> Swept:
        """One round: dead consumers' names, ghosts, dead letters kept long enough. Raises RedisFault."""
        stream = self._stream
        stays = [HANDOVER, self._settlement.consumer]
        removed = await self._scripts.run(
            "forget_consumers", [stream.name], [stream.group, int(DEAD_CONSUMER_AFTER * 1000), *stays]
        )
        if removed:
            self._log.info("consumers.removed", stream=stream.name, names=[name.decode() for name in removed])
        ghosts = 0
        start: bytes = b"-"
        while start:
            start, *ids = await self._scripts.run(
                "clear_ghosts",
                [stream.name, stream.dead_key, stream.ledger_key],
                [stream.dead_group, start, PAGE],
            )
            ghosts += len(ids)
            self._settlement.vanished(ids)
        return Swept(len(removed), ghosts, await self._discard_old())

    async def _discard_old(self) -> int:
        """Discards what has been in the dead-letter view for too long, page by page, so that nobody waits long.

        Only what was added so long ago can have died so long ago: the rest of the view is never looked at, and Redis
        is not asked to look for idle ones itself, because it then scans the whole view in one step.
        """
        if self._dead_retention is None:
            return 0
        stream, redis = self._stream, self._scripts.redis
        last = str(int((time.time() - self._dead_retention) * 1000))
        discarded = 0
        start: bytes = b"-"
        while True:
            with border():
                page = await redis.xpending_range(stream.name, stream.dead_group, start, last, PAGE)
            rows = [(cast(bytes, row["message_id"]), cast(int, row["time_since_delivered"])) for row in page]
            old = [entry_id.decode() for entry_id, idle in rows if idle >= self._dead_retention * 1000]
            moved = await dead_letters.discard(redis, stream, old)
            discarded += len(moved.done)
            self._settlement.vanished(entry_id.encode() for entry_id in moved.vanished)
            if len(rows) < PAGE:
                return discarded
            start = b"(" + rows[-1][0]
