"""Parking: entries that were not delivered wait here for their next attempt. They hold no slot, keep their lease.

A transient failure is tried again after 1 s, doubling to 60 s, for ever.
A session that is not found is tried again on the same schedule until the hold is over, then the entry is dead.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from itertools import count
from random import Random

from common.control_plane.backoff import park_delay
from common.entries import Entry
from common.outcomes import Cause, Dead, Reason, Retry


def decide(entry: Entry, retry: Retry, now: float, hold_seconds: float, random: Random) -> float | Dead:
    """What becomes of an entry after a Retry: seconds until the next attempt, or death after the hold."""
    delay = retry.after if retry.after is not None else park_delay(entry.attempts, random)
    if retry.cause is not Cause.NOT_FOUND:
        return delay
    if entry.not_found_since is None:
        entry.not_found_since = now
    left = entry.not_found_since + hold_seconds - now
    if left <= 0:
        error = f"{retry.error}, for {hold_seconds:g} s"
        return Dead(Reason.REJECTED, error, retry.http_status, retry.response_excerpt)
    return min(delay, left)


class Parking:
    """A heap of parked entries by wake time, and the task that wakes them."""

    def __init__(self, wake: Callable[[Entry], None], clock: Callable[[], float]) -> None:
        self._wake = wake
        self._clock = clock
        self._heap: list[tuple[float, int, Entry]] = []
        self._serial = count()
        self._sooner = asyncio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def park(self, entry: Entry, delay: float) -> None:
        heapq.heappush(self._heap, (self._clock() + delay, next(self._serial), entry))
        self._sooner.set()

    async def run(self) -> None:
        """Wakes each entry at its time, for ever."""
        while True:
            pause = self._heap[0][0] - self._clock() if self._heap else None
            if pause is not None and pause <= 0:
                self._wake(heapq.heappop(self._heap)[2])
                continue
            self._sooner.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._sooner.wait()
            except TimeoutError:
                pass

    def remove(self, entries: Iterable[Entry]) -> None:
        gone = {id(entry) for entry in entries}
        self._heap = [row for row in self._heap if id(row[2]) not in gone]
        heapq.heapify(self._heap)

    def clear(self) -> None:
        self._heap.clear()
