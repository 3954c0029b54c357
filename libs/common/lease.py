"""The lease: what this process works on stays its own, however long the ControlPlane takes.

Every third of `visibility_timeout`, entries in hand for longer than that are claimed anew by the guarded script.
Entries that come and go faster cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.entries import Entry, Hand
from common.redis_border import RedisFault
from common.settlement import Settlement


class Lease:
    """Renews what is in hand; what turns out to be somebody else's is given to `lost`."""

    def __init__(
        self,
        hand: Hand,
        settlement: Settlement,
        visibility_timeout: float,
        lost: Callable[[list[Entry]], None],
        clock: Callable[[], float],
    ) -> None:
        self._hand = hand
        self._settlement = settlement
        self._every = visibility_timeout / 3
        self._lost = lost
        self._clock = clock
        self._renewed_at = clock()

    async def run(self, on_fault: Callable[[RedisFault], float]) -> None:
        """Renews for ever; `on_fault` is told what Redis said and answers how long to wait."""
        while True:
            await asyncio.sleep(self._every / 2)
            try:
                await self.renew(self._due())
                self._renewed_at = self._clock()
            except RedisFault as fault:
                await asyncio.sleep(on_fault(fault))

    async def catch_up(self) -> None:
        """After a pause of the whole process: renews before anything is claimed, lest we claim from ourselves."""
        if self._clock() - self._renewed_at > self._every:
            await self.renew(self._due())
            self._renewed_at = self._clock()

    async def renew(self, entries: list[Entry]) -> None:
        """Renews these; raises RedisFault."""
        if not entries:
            return
        now = self._clock()
        leased_at = [entry.leased_at for entry in entries]
        gone = await self._settlement.renew(entries)
        for entry, before in zip(entries, leased_at, strict=True):
            if entry.leased_at == before:  # else its count has changed meanwhile, and is still to be written
                entry.leased_at = now
        # What was settled while the call was under way is gone, and well so.
        lost = [entry for entry in gone if self._hand.holds(entry) and not entry.ended]
        if lost:
            self._lost(lost)

    def _due(self) -> list[Entry]:
        oldest = self._clock() - self._every / 2
        return [entry for entry in self._hand if entry.leased_at <= oldest]
