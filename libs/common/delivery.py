"""Delivery: ready entries go to slots, and each ends in one of the few ways there are.

A slot is held by a request, not by an entry that waits.
What is settled, buried or parked is decided in one place, `_end`, with a short arm per outcome.
An entry that has been through two crashes is delivered alone until it has proven harmless, so that no innocent
neighbour dies of another's poison (contract section 4.4).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Protocol

import msgspec

from common import schemas
from common.concurrency import STEP, Level
from common.control_plane.gate import Gate
from common.entries import FIRST_READ, Entry, Hand
from common.lanes import Batches, Lanes, Queue
from common.logs import get
from common.outcomes import Cause, Dead, Delivered, Outcome, Reason, Retry
from common.parking import Parking, decide
from common.redis_border import RedisFault
from common.settlement import Counters, Figures, Settlement, no_figures
from common.streams import MAX_ENTRY_BYTES
from common.turn import Turn

DOORBELL = 2.0
"""Seconds an idle consumer waits at most before it looks around again."""

HELD_AGAIN_AFTER = 1.0
"""Seconds before an entry is tried again that was held although the gate has opened meanwhile."""

UNWRITTEN = float("-inf")
"""`leased_at` of an entry whose delivery count has changed and goes to Redis with the next renewal."""


class Handler(Protocol):
    """What one service does with the entries of its stream."""

    ordered: bool
    batch: int

    def decode(self, entry: Entry, data: bytes | None) -> str:
        """Reads its data into `entry.message`, sets its transaction id; returns the lane.

        Raises schemas.Invalid.
        """

    @staticmethod
    def figures(message: Any, /) -> Figures:
        """What of a delivered message is added up in the ledger."""
        return no_figures(message)

    def deliver(self, entry: Entry) -> Coroutine[Any, Any, Outcome]:
        """Delivers one entry; what became of it."""

    async def deliver_batch(self, entries: list[Entry]) -> list[Outcome]:
        """Delivers entries of one lane, one outcome each, in their order; only where `batch` is above 1."""
        return [await self.deliver(entry) for entry in entries]


class Tally(Counters, Protocol):
    """What the loop tells the metrics beside what settlement does."""

    def retried_entries(self, cause: Cause) -> None: ...
    def claimed_entries(self, n: int) -> None: ...
    def lost_entries(self, n: int) -> None: ...


class Limits(msgspec.Struct, frozen=True):
    """The loop's bounds, from `streams` and `control_plane` of the configuration. Times in seconds."""

    read_count: int
    max_in_flight: int
    batch: int
    visibility_timeout: float
    claim_interval: float
    max_deliveries: int
    not_found_hold: float
    doorbell: float = DOORBELL
    dead_retention: float | None = None

    @property
    def capacity(self) -> int:
        """Entries in hand, unsettled included, that are not parked."""
        return max(2 * self.read_count, 2 * self.max_in_flight * self.batch)


class Delivery:
    """The slots of one consumer: what is ready, what is in flight, what waits for another attempt."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        hand: Hand,
        settlement: Settlement,
        turn: Turn | None,
        *,
        gate: Gate,
        tally: Tally,
        fetch: Callable[[bytes], Awaitable[Entry | None]],
        let_go: Callable[[], None],
        on_fault: Callable[[RedisFault], float],
        clock: Callable[[], float],
        random: Random,
    ) -> None:
        self.hand = hand
        self.settlement = settlement
        self._handler = handler
        self._limits = limits
        self._turn = turn
        self._gate = gate
        self.level = Level(limits.max_in_flight, clock)
        self._tally = tally
        self._fetch = fetch
        self._let_go = let_go
        self._on_fault = on_fault
        self._clock = clock
        self._random = random
        self._log = get("delivery")
        self._lanes = _lanes(handler, hand)
        self.parking = Parking(self._wake, clock)
        self._suspects: deque[Entry] = deque()
        self._one_suspect = asyncio.Lock()
        self._counted: Entry | None = None  # the suspect whose count is one higher, in case we die of it
        self._alone = False  # a suspect is being delivered, and nothing else
        self._quieting = False  # a suspect waits for the requests in flight to end
        self._stopped = False
        self._rising = False  # the level rises by itself, and the idle slots are called then
        self._idle: deque[asyncio.Future[None]] = deque()
        self._reopening: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        self._slots: list[asyncio.Task[None]] = []

    @property
    def in_flight(self) -> int:
        """Requests that are out."""
        return self.level.out

    # -- what the loop says --------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the slots open until `end_requests`; raises what a slot raises, since its entries would be stuck."""
        self._slots = [asyncio.create_task(self._work()) for _ in range(self._limits.max_in_flight)]
        ended, _ = await asyncio.wait(self._slots, return_when=asyncio.FIRST_EXCEPTION)
        for slot in ended:
            if not slot.cancelled():
                slot.result()

    def take(self, entries: Iterable[Entry]) -> None:
        """Takes on entries in hand that are no suspects: each is on its way to a slot, or dead on arrival."""
        for entry in entries:
            if self.hand.holds(entry):  # else lost while others were taken on
                self._route(entry, self._decode(entry))
        self.call(self._lanes.ready)

    async def take_suspect(self, entry: Entry) -> None:
        """Takes on a suspect in hand. Raises RedisFault."""
        if not self.hand.holds(entry):
            return
        if self._handler.ordered:
            await self._enqueue_suspect(entry)
        else:
            self._suspects.append(entry)
            self.hand.park(entry, True)
        self.call(1)

    def call(self, n: int) -> None:
        """Calls up to `n` idle slots: there is something to take."""
        idle = self._idle
        while n > 0 and idle:
            future = idle.popleft()
            if not future.done():
                future.set_result(None)
                n -= 1

    def expect(self, more: bool) -> None:
        """Whether more is about to be read, so that requests for several entries may wait until they are full."""
        if self._lanes.expect(more):
            self.call(self._lanes.ready)

    def lost(self, entries: list[Entry]) -> None:
        """These are somebody else's by now: they leave the hand; a request that is out runs to its end."""
        self._log.warning(
            "entries.lost", ids=[entry.id.decode() for entry in entries[:20]], count=len(entries)
        )
        if self._turn is not None:
            self._let_go()  # they may come again (the group was re-made): nothing behind them may overtake them
            return
        waiting = [entry for entry in entries if not entry.in_flight]
        self._lanes.remove(waiting)
        self.parking.remove(waiting)
        gone = {id(entry) for entry in waiting}
        self._suspects = deque(entry for entry in self._suspects if id(entry) not in gone)
        self.hand.drop(entries)

    def forget(self) -> None:
        """Drops what is ready, parked or suspected; a request that is out runs to its end."""
        self._lanes.clear()
        self.parking.clear()
        self._suspects.clear()

    def stop(self) -> None:
        """No more requests are started."""
        self._stopped = True

    async def end_requests(self, until: float) -> None:
        """Lets what is in flight end, but not after `until`; then the slots are closed."""
        while self.in_flight and self._clock() < until:
            self._quiet.clear()
            await within(until - self._clock(), self._quiet.wait())
        for slot in self._slots:
            slot.cancel()
        if self._counted is not None:
            self._counted.deliveries -= 1  # the process stops, it does not die of this entry
        if self._reopening is not None:
            self._reopening.cancel()

    # -- reading an entry ----------------------------------------------------------------------------

    def _route(self, entry: Entry, dead: Dead | None) -> None:
        if dead is not None:
            self.settlement.died(entry, dead)
        else:
            self._lanes.push(entry)

    async def _enqueue_suspect(self, entry: Entry) -> None:
        """To take its place in its lane a suspect has to be read and decoded first, which may be what kills: so the
        count is written before, and taken back after. No other suspect is delivered meanwhile, or both would count."""
        async with self._one_suspect:
            if self._is_poison(entry):
                return
            proven = entry.deliveries
            try:
                with self._counting(entry):
                    if await self.settlement.renew([entry]):
                        self.lost([entry])
                        return
                    if not await self._read_fields(entry):
                        return
                    dead = self._decode(entry)
                entry.deliveries = proven
                await self.settlement.renew([entry])
            except RedisFault:
                entry.deliveries, entry.leased_at = proven, UNWRITTEN  # what was written may stand there
                raise
        self._route(entry, dead)

    @contextmanager
    def _counting(self, entry: Entry) -> Iterator[None]:
        """Raises a suspect's count, in case we die of it; a stop within takes it back."""
        entry.deliveries += 1
        self._counted = entry
        try:
            yield
        finally:
            self._counted = None

    async def _read_fields(self, entry: Entry) -> bool:
        """Fetches what a suspect came without; False when it is not ours any more."""
        fetched = await self._fetch(entry.id)
        if fetched is None:
            self.lost([entry])
            return False
        entry.data, entry.correlation_id, entry.traceparent = (
            fetched.data,
            fetched.correlation_id,
            fetched.traceparent,
        )
        self.hand.resize(entry, fetched.size)
        return True

    def _decode(self, entry: Entry) -> Dead | None:
        """Reads the entry; whatever arrives gets a verdict."""
        data = entry.data
        if isinstance(data, int):
            return Dead(Reason.INVALID, f"the entry is {data} bytes long, expected at most {MAX_ENTRY_BYTES}")
        try:
            entry.lane = self._handler.decode(entry, data)
        except schemas.Invalid as invalid:
            return Dead(Reason.INVALID, str(invalid))
        except Exception as error:
            # A decoder that stumbles must not stop the stream: this entry is unreadable.
            self._log.exception(
                "entry.unreadable", id=entry.id.decode(), correlation_id=entry.correlation_id or None
            )
            return Dead(Reason.INVALID, f"cannot be read: {type(error).__name__}")
        if not entry.correlation_id:
            entry.correlation_id = entry.transaction_id
        entry.data = None  # the message says it all from here on
        return None

    # -- the slots ------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """One slot: takes what is ready and delivers it, for ever."""
        while True:
            entries = self._next()
            if entries is None:
                await self._called()
            elif entries[0].suspect:
                await self._deliver_alone(entries[0])
            else:
                await self._deliver(entries)

    def _next(self) -> list[Entry] | None:
        """The entries of the next request, or None when nothing may start now."""
        if self._stopped or self._alone:
            return None
        if not self._gate.open:
            self.level.begin_again()
            if self._gate.permits() <= 0:
                self._reopen_later()
                return None
        if self.level.out >= self.level.limit:
            self._more_later()
            return None
        if self._turn is not None and not self._turn.fresh:
            self._reopen_later()
            return None
        if self._quieting and self.in_flight:
            return None
        if self._suspects:
            self._quieting = True
            return None if self.in_flight else [self._suspects.popleft()]
        self._quieting = False
        entries = self._lanes.take()
        if self._turn is not None and entries and entries[0].suspect and self.in_flight:
            self._lanes.push_back(entries)
            self._quieting = True
            return None
        return entries

    async def _deliver(self, entries: list[Entry]) -> None:
        begun, refused = self._clock(), False
        self.level.begun()
        for entry in entries:
            entry.in_flight = True
        try:
            if len(entries) == 1:
                outcomes = [await self._handler.deliver(entries[0])]
            else:
                outcomes = await self._handler.deliver_batch(entries)
        except Exception as error:  # a fault of ours: the entries stay pending and are tried again
            self._log.exception("delivery.failed", ids=[entry.id.decode() for entry in entries[:5]])
            failed = Retry(Cause.TRANSIENT, f"{type(error).__name__} in the agent")
            outcomes = [failed] * len(entries)
        else:
            refused = _is_refusal(outcomes[0])
        finally:
            self.level.ended(self._clock() - begun, refused)
            if not self.level.out:
                self._quiet.set()
        for entry in entries:
            entry.in_flight = False
        first = outcomes[0]
        if isinstance(first, Delivered) and outcomes.count(first) == len(entries):
            self._delivered(entries, first)
        else:
            for entry, outcome in zip(entries, outcomes, strict=True):
                self._end(entry, outcome)
        if not self.level.out:
            self.settlement.hurry()

    async def _deliver_alone(self, entry: Entry) -> None:
        """Delivers a suspect with nothing beside it; the count is written first, for the case that we die of it."""
        self._alone = True
        self.hand.park(entry, False)
        try:
            async with self._one_suspect:
                await self._deliver_suspect(entry)
                await self._write_findings()
        except RedisFault as fault:
            await asyncio.sleep(self._on_fault(fault))
        finally:
            self._alone = False
            self.call(len(self._idle))

    async def _deliver_suspect(self, entry: Entry) -> None:
        proven = entry.deliveries
        try:
            if not await self._write_findings() or self._is_poison(entry):
                return
            with self._counting(entry):
                if await self.settlement.renew([entry]):
                    self.lost([entry])
                    return
                if entry.message is None:
                    if not await self._read_fields(entry):
                        return
                    if dead := self._decode(entry):
                        self.settlement.died(entry, dead)
                        return
                await self._deliver([entry])
        except RedisFault as fault:
            entry.deliveries = proven
            if self.hand.holds(entry):  # not after a turn that was lost meanwhile
                self._again(entry)
            await asyncio.sleep(self._on_fault(fault))

    async def _write_findings(self) -> bool:
        """Writes what is known of all in hand, lest another's death count against them; False: the turn is lost."""
        if not await self.settlement.flushed():
            return False
        unwritten = [entry for entry in self.hand if entry.leased_at == UNWRITTEN]
        if gone := await self.settlement.renew(unwritten):
            self.lost(gone)
        for entry in unwritten:
            entry.leased_at = self._clock()
        return True

    def _is_poison(self, entry: Entry) -> bool:
        """Buries it when it has killed often enough."""
        if entry.died_alone < self._limits.max_deliveries:
            return False
        error = f"delivering it alone ended the process {entry.died_alone} times"
        entry.attempts = max(entry.attempts, entry.died_alone)  # each death was an attempt
        self.settlement.died(entry, Dead(Reason.POISON, error))
        self._lanes.finish(entry)
        return True

    def _end(self, entry: Entry, outcome: Outcome) -> None:
        """What becomes of an entry after its delivery."""
        match outcome:
            case Delivered():
                self._delivered([entry], outcome)
            case _ if not self.hand.holds(entry):
                self._lanes.finish(entry)  # somebody else's by now, and theirs to end
            case Dead():
                self._proven_harmless(entry)
                entry.attempts += 1
                self.settlement.died(entry, outcome)  # moves to the dead-letter view with the next batch
                self._lanes.finish(entry)
            case Retry(cause=Cause.HELD):
                self._held(entry, outcome)  # stays pending: tried again when the gate opens, uncounted
            case Retry():
                self._retry(entry, outcome)  # stays pending: parked until its next attempt

    def _delivered(self, entries: list[Entry], outcome: Delivered) -> None:
        self.settlement.delivered(entries, outcome)  # a 2xx is a fact, whoever owns the entries by now
        for entry in entries:
            self._lanes.finish(entry)

    def _held(self, entry: Entry, retry: Retry) -> None:
        if entry.suspect:
            entry.deliveries -= 1  # it was not delivered: nothing is known about it yet
            entry.leased_at = UNWRITTEN
        if retry.http_status == 403:
            entry.refused_before = True
        elif retry.http_status is not None:
            entry.not_found_since = None  # a fault of the configuration is no verdict on entries
        if self._gate.open:
            self._park(entry, HELD_AGAIN_AFTER)
        else:
            self._again(entry)

    def _again(self, entry: Entry) -> None:
        """Back to the front of where it was taken from."""
        if entry.suspect and not self._handler.ordered:
            self._suspects.appendleft(entry)
            self.hand.park(entry, True)
        else:
            self._lanes.push_back([entry])

    def _retry(self, entry: Entry, retry: Retry) -> None:
        self._proven_harmless(entry)
        entry.attempts += 1
        decision = decide(entry, retry, self._clock(), self._limits.not_found_hold, self._random)
        if isinstance(decision, Dead):
            self.settlement.died(entry, decision)
            self._lanes.finish(entry)
            return
        self._tally.retried_entries(retry.cause)
        self._log.debug(
            "entry.parked",
            id=entry.id.decode(),
            cause=retry.cause.value,
            error=retry.error,
            seconds=decision,
            correlation_id=entry.correlation_id,
        )
        self._park(entry, decision)

    def _park(self, entry: Entry, delay: float) -> None:
        self.hand.park(entry, True)
        self._lanes.block(entry)
        self.parking.park(entry, delay)

    def _wake(self, entry: Entry) -> None:
        """A parked entry's time has come."""
        if self.hand.holds(entry):
            if entry.suspect and not self._handler.ordered:
                self._again(entry)  # alone, as before
            else:
                self.hand.park(entry, False)
                self._lanes.unblock(entry)
            self.call(1)

    def _proven_harmless(self, entry: Entry) -> None:
        """Its delivery ended without ending the process: the count starts anew, written with the next renewal."""
        if entry.deliveries != FIRST_READ:
            entry.deliveries = FIRST_READ
            entry.leased_at = UNWRITTEN

    # -- waiting for work ----------------------------------------------------------------------------

    async def _called(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        await future

    def _more_later(self) -> None:
        """Calls the idle slots when the level has risen."""
        if not self._rising:
            self._rising = True
            asyncio.get_running_loop().call_later(STEP, self._more)

    def _more(self) -> None:
        self._rising = False
        limit = self.level.limit
        self.call(limit - self.in_flight)
        if limit < self._limits.max_in_flight and self.in_flight and self._gate.open:
            self._more_later()  # those called fit: none of them is turned away and asks for the next step

    def _reopen_later(self) -> None:
        if self._reopening is None:
            self._reopening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        await self._gate.wait()
        if self._turn is not None:
            while self._turn.held and not self._turn.fresh:
                await asyncio.sleep(self._limits.visibility_timeout / 20)
        self._reopening = None
        if self._turn is None or self._turn.held:
            self.call(len(self._idle))


def _is_refusal(outcome: Outcome) -> bool:
    """The ControlPlane, or the way to it, could not cope; a verdict on the entry is none."""
    return isinstance(outcome, Retry) and outcome.cause in (Cause.TRANSIENT, Cause.UNCONFIRMED)


def _lanes(handler: Handler, hand: Hand) -> Queue | Batches | Lanes:
    if handler.ordered:
        return Lanes(hand.park)
    return Batches(handler.batch) if handler.batch > 1 else Queue()


async def within(seconds: float, awaitable: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await awaitable
    except TimeoutError:
        pass
