"""What is ready to be delivered, by lane: a lane is a session.

In order: one request at a time per lane, in stream order; a blocked lane blocks only itself.
Not in order: any number at a time; lanes serve to fill one request with entries of one session, and every
session gets its share, however much one of them sends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from itertools import takewhile

from common.entries import Entry


class _WithoutOrder:
    """Nothing waits behind an entry."""

    def finish(self, entry: Entry) -> None:
        """The entry has ended for good."""

    def block(self, entry: Entry) -> None:
        """The entry is parked."""


class Queue(_WithoutOrder):
    """Ready entries of a stream without order, one entry a request: first come, first served."""

    def __init__(self) -> None:
        self._ready: deque[Entry] = deque()

    @property
    def ready(self) -> int:
        """How many requests could be sent."""
        return len(self._ready)

    def push(self, entry: Entry) -> None:
        self._ready.append(entry)

    unblock = push

    def push_back(self, entries: list[Entry]) -> None:
        """Puts entries that were taken and not sent back to the front."""
        self._ready.extendleft(reversed(entries))

    def take(self) -> list[Entry] | None:
        """The entries of the next request, or None when nothing is ready."""
        return [self._ready.popleft()] if self._ready else None

    def expect(self, more: bool) -> bool:
        """Whether more is about to be pushed; True when requests that waited for it may be sent. Here none does."""
        return False

    def remove(self, entries: Iterable[Entry]) -> None:
        gone = {id(entry) for entry in entries}
        self._ready = deque(entry for entry in self._ready if id(entry) not in gone)

    def clear(self) -> None:
        self._ready.clear()


class _Lane:
    __slots__ = ("busy", "entries")

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.busy = False  # a request is in flight, or its head is parked


class Batches(_WithoutOrder):
    """Ready entries of a stream without order, up to `batch` of one session a request.

    While more is expected, a session whose turn it is waits until its request is full.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._waits = False
        self._lanes: dict[str, deque[Entry]] = {}  # in the order in which their turn comes

    @property
    def ready(self) -> int:
        """How many requests could be sent: while more is expected none behind a session that waits for it."""
        if self._waits:
            full = takewhile(lambda lane: len(lane) >= self._batch, self._lanes.values())
            return sum(len(lane) // self._batch for lane in full)
        return sum(-(-len(lane) // self._batch) for lane in self._lanes.values())

    def push(self, entry: Entry) -> None:
        self._lanes.setdefault(entry.lane, deque()).append(entry)

    unblock = push

    def push_back(self, entries: list[Entry]) -> None:
        self._lanes.setdefault(entries[0].lane, deque()).extendleft(reversed(entries))

    def take(self) -> list[Entry] | None:
        if not self._lanes:
            return None
        name = next(iter(self._lanes))
        if self._waits and len(self._lanes[name]) < self._batch:
            return None
        lane = self._lanes.pop(name)
        taken = [lane.popleft() for _ in range(min(self._batch, len(lane)))]
        if lane:
            self._lanes[name] = lane  # to the end: the other sessions first
        return taken

    def expect(self, more: bool) -> bool:
        """Whether more is about to be pushed; True when requests that waited for it may be sent."""
        waited, self._waits = self._waits, more
        return waited and not more

    def remove(self, entries: Iterable[Entry]) -> None:
        gone = {id(entry) for entry in entries}
        kept = {n: deque(e for e in lane if id(e) not in gone) for n, lane in self._lanes.items()}
        self._lanes = {name: lane for name, lane in kept.items() if lane}

    def clear(self) -> None:
        self._lanes.clear()


class Lanes:
    """Ready entries of a stream that promises order: the head of each lane, and what waits behind it.

    `park` is told of entries that begin or cease to wait behind a blocked head, since those hold no slot.
    """

    def __init__(self, park: Callable[[Entry, bool], None]) -> None:
        self._park = park
        self._lanes: dict[str, _Lane] = {}
        self._ready: deque[str] = deque()  # lanes whose head may be sent
        self._blocked: set[str] = set()

    @property
    def ready(self) -> int:
        """How many requests could be sent."""
        return len(self._ready)

    def expect(self, more: bool) -> bool:
        """Whether more is about to be pushed; True when requests that waited for it may be sent. Here none does."""
        return False

    def push(self, entry: Entry) -> None:
        """Adds an entry at its place in stream order: almost always the end, but a redriven one is older."""
        lane = self._lanes.get(entry.lane)
        if lane is None:
            lane = self._lanes[entry.lane] = _Lane()
        if lane.entries and _order(entry) < _order(lane.entries[-1]):
            waiting = list(lane.entries)
            insort(waiting, entry, key=_order, lo=1 if lane.busy else 0)
            lane.entries = deque(waiting)
        else:
            lane.entries.append(entry)
        if entry.lane in self._blocked:
            self._park(entry, True)
        elif not lane.busy and len(lane.entries) == 1:
            self._ready.append(entry.lane)

    def push_back(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._lanes[entry.lane].busy = False
            self._ready.appendleft(entry.lane)

    def take(self) -> list[Entry] | None:
        """The head of the next lane that may be sent; the lane is busy until `finish` or `unblock`."""
        if not self._ready:
            return None
        lane = self._lanes[self._ready.popleft()]
        lane.busy = True
        return [lane.entries[0]]

    def finish(self, entry: Entry) -> None:
        """The head has ended for good: the next of its lane may go."""
        lane = self._lanes.get(entry.lane)
        if lane is None or not lane.entries or lane.entries[0] is not entry:
            return
        lane.entries.popleft()
        lane.busy = False
        if lane.entries:
            self._ready.append(entry.lane)
        else:
            del self._lanes[entry.lane]

    def block(self, entry: Entry) -> None:
        """The head is parked: what is behind it waits with it."""
        self._blocked.add(entry.lane)
        for waiting in self._lanes[entry.lane].entries:
            self._park(waiting, True)

    def unblock(self, entry: Entry) -> None:
        """The head may be tried again."""
        self._blocked.discard(entry.lane)
        lane = self._lanes[entry.lane]
        for waiting in lane.entries:
            self._park(waiting, False)
        lane.busy = False
        self._ready.append(entry.lane)

    def remove(self, entries: Iterable[Entry]) -> None:
        """Takes out entries that are no longer ours; a lane whose head is gone goes on with the next."""
        for entry in entries:
            lane = self._lanes.get(entry.lane)
            if lane is None or entry not in lane.entries:
                continue
            if lane.entries[0] is not entry:
                lane.entries.remove(entry)
                continue
            if entry.lane in self._blocked:
                self.unblock(entry)
            if not lane.busy:
                self._ready.remove(entry.lane)
            self.finish(entry)

    def clear(self) -> None:
        self._lanes.clear()
        self._ready.clear()
        self._blocked.clear()


def _order(entry: Entry) -> tuple[int, int]:
    milliseconds, _, sequence = entry.id.partition(b"-")
    return int(milliseconds), int(sequence)
