"""The loop: it reads a stream's entries when there is room and hands them on until each has ended.

An entry is delivered at least once, under one stable key, from the moment XADD has returned.
It leaves its stream when the ControlPlane has confirmed it, or dies visibly by a verdict on itself.
Until then it stays pending: in this hand while the process lives, in another's when it does not.
Nothing is read that there is no room for, and nothing while the gate is shut: backpressure is leaving it in Redis.
Where a stream promises order, only the holder of the turn reads, and each session is a lane.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Protocol

import msgspec

from common import schemas
from common.control_plane.gate import Gate
from common.entries import FIRST_READ, Entry, Hand
from common.lanes import Batches, Lanes, Queue
from common.lease import Lease
from common.logs import get
from common.outcomes import Cause, Dead, Delivered, Outcome, Reason, Retry
from common.parking import Parking, decide
from common.reclaimer import Reclaimer, Row
from common.redis_border import GroupGone, RedisFault, Scripts, border
from common.redis_state import RedisState
from common.settlement import Counters, Settlement, TurnLost
from common.streams import GREATEST_ID, MAX_ENTRY_BYTES, Stream
from common.turn import Turn

MAX_BYTES = 32 * 1024 * 1024
"""Bytes of entries in hand; above it nothing more is read."""

MAX_PARKED = 10_000
"""Entries that may wait for another attempt; above it nothing more is read."""

DOORBELL = 2.0
"""Seconds an idle consumer waits at most before it looks around again."""

HELD_AGAIN_AFTER = 1.0
"""Seconds before an entry is tried again that was held although the gate has opened meanwhile."""


class Handler(Protocol):
    """What one service does with the entries of its stream."""

    ordered: bool
    batch: int

    def decode(self, entry: Entry) -> str:
        """Reads `entry.data` into `entry.message`, sets its transaction id and figures; returns the lane.

        Raises schemas.Invalid.
        """

    async def deliver(self, entries: list[Entry]) -> list[Outcome]:
        """Delivers entries of one lane, one outcome each, in their order."""


class Tally(Counters, Protocol):
    """What the loop tells the metrics beside what settlement does."""

    def retried_entries(self, cause: Cause) -> None: ...
    def claimed_entries(self, n: int) -> None: ...


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

    @property
    def capacity(self) -> int:
        """Entries in hand, unsettled included, that are not parked."""
        return max(2 * self.read_count, 2 * self.max_in_flight * self.batch)


class Consumer:
    """One consumer of one group: the loop, its workers, and what they hold."""

    def __init__(
        self,
        name: str,
        service: str,
        stream: Stream,
        handler: Handler,
        limits: Limits,
        *,
        scripts: Scripts,
        gate: Gate,
        redis_state: RedisState,
        tally: Tally,
        clock: Callable[[], float],
        random: Random,
        response_stream: str | None = None,
    ) -> None:
        token = name if handler.ordered else None
        self.name = name
        self.stream = stream
        self.hand = Hand()
        self.in_flight = 0
        self.ready_at: float | None = None
        self.settlement = Settlement(
            scripts,
            stream,
            name,
            service,
            self.hand,
            tally,
            response_stream=response_stream,
            token=token,
            turn_lost=self._lose_turn,
        )
        self.turn: Turn | None = None
        if token:
            self.turn = Turn(scripts, stream.turn_key, token, limits.visibility_timeout, clock=clock)
        self._handler = handler
        self._limits = limits
        self._scripts = scripts
        self._gate = gate
        self._redis_state = redis_state
        self._tally = tally
        self._clock = clock
        self._random = random
        self._token = token or ""
        self._log = get("consumer")
        self._lanes = _lanes(handler, self.hand)
        self._parking = Parking(self._wake, clock)
        self._lease = Lease(self.hand, self.settlement, limits.visibility_timeout, self._lost, clock)
        self._reclaimer = Reclaimer(
            scripts,
            stream,
            self.settlement,
            self.hand,
            visibility_timeout=limits.visibility_timeout,
            claim_interval=limits.claim_interval,
            token=token,
            clock=clock,
        )
        self._suspects: deque[Entry] = deque()
        self._alone = False  # a suspect is being delivered, and nothing else
        self._quieting = False  # a suspect waits for the requests in flight to end
        self._draining = False
        self._groups_made = False
        self._orphans = True  # a read may have delivered entries whose reply never came
        self._era = 0  # of the turn whose pending entries have been taken over
        self._last_id = b"0-0"
        self._idle: deque[asyncio.Future[None]] = deque()
        self._reopening: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._interruptible = False

    @property
    def unready(self) -> tuple[str, ...]:
        """Why the stream cannot be consumed for now; empty when it can."""
        return () if self._groups_made else (f"the group {self.stream.group} is not there yet",)

    # -- the loop ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads when there is room, hands on, until told to stop."""
        self._task = asyncio.current_task()
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._limits.max_in_flight)]
        try:
            while not self._draining:
                try:
                    await self._prepare()
                    rows = await self._intake(await self._room())
                    await self._hand_on(rows)
                    if not rows:
                        await self._doorbell()
                except RedisFault as fault:
                    await self._back_off(fault)
                except TurnLost:
                    self._lose_turn()
        except asyncio.CancelledError:
            if not self._draining:
                raise

    async def _prepare(self) -> None:
        """The groups exist, the turn is ours with all that is pending, and no entry is delivered to nobody."""
        if not self._groups_made:
            await self._make_groups()
        if self.turn is not None:
            await self._take_turn(self.turn)
        if self._orphans:
            await self._hand_on(await self._reclaimer.recover())
            self._orphans = False
        if self.ready_at is None:
            self.ready_at = self._clock()

    async def _room(self) -> int:
        """Waits until reading is worth it; returns for how many entries there is room."""
        limits, hand = self._limits, self.hand
        enough = max(1, min(limits.read_count, limits.capacity // 4))
        while True:
            self.settlement.ended.clear()
            free = limits.capacity - hand.active
            if free >= enough and hand.bytes < MAX_BYTES and hand.parked < MAX_PARKED:
                if self._gate.open:
                    return min(limits.read_count, free)
                if self._gate.permits() > 0 and not hand.active:
                    return 1  # half-open: one entry may be read, to see whether the ControlPlane is back
            with self._cut_short_by_stop():
                if self._gate.open or self._gate.permits() > 0:
                    await _within(limits.doorbell, self.settlement.ended.wait())
                else:
                    await self._gate.wait()

    async def _intake(self, room: int) -> list[Row]:
        """What others left, when it is time to look; else what is new."""
        if self._reclaimer.due_in <= 0:
            await self._lease.catch_up()
            rows = await self._reclaimer.take(room)
            if rows:
                self._tally.claimed_entries(len(rows))
                return rows
        return await self._read(room)

    async def _read(self, room: int) -> list[Row]:
        stream = self.stream
        keys = [stream.name, stream.turn_key] if self.turn else [stream.name]
        args: list[str | bytes | int] = [
            stream.group,
            stream.dead_group,
            self.name,
            room,
            max(MAX_ENTRY_BYTES, MAX_BYTES - self.hand.bytes),
            MAX_ENTRY_BYTES,
            self._token,
        ]
        self._orphans = True  # until the reply is here, nobody knows what was delivered
        reply = await self._scripts.run("read", keys, args)
        self._orphans = False
        self._redis_state.answered()
        if reply[0] == -1:
            raise TurnLost
        self._last_id = reply[0] or self._last_id
        return list(reply[1:])

    async def _doorbell(self) -> None:
        """Waits for something new without reading it: no side effect, so a stop may cut it short."""
        wait = min(self._limits.doorbell, max(0.01, self._reclaimer.due_in))
        with self._cut_short_by_stop(), border():
            await self._scripts.redis.xread(
                {self.stream.name: self._last_id}, count=1, block=int(wait * 1000)
            )

    async def _hand_on(self, rows: list[Row]) -> None:
        """Each new row becomes an entry in hand: on its way to a worker, dead on arrival, or suspected."""
        now = self._clock()
        for row in rows:
            if row[0] in self.hand:
                continue  # ours all along
            entry = _entry(row, now)
            self.hand.take(entry)
            if not entry.suspect:
                self._enqueue(entry)
            elif self._handler.ordered:
                await self._enqueue_suspect(entry)
            else:
                self._suspects.append(entry)
                self.hand.park(entry, True)
        self._call(len(rows))

    def _enqueue(self, entry: Entry) -> None:
        dead = self._decode(entry)
        if dead is not None:
            self.settlement.died(entry, dead)
        else:
            self._lanes.push(entry)

    async def _enqueue_suspect(self, entry: Entry) -> None:
        """To take its place in its lane a suspect has to be read; the count is written first, for the case that
        reading is what kills."""
        entry.deliveries += 1
        if await self.settlement.renew([entry]):
            self._lost([entry])
            return
        for row in await self._reclaimer.fetch([entry.id]):
            read = _entry(row, entry.leased_at)
            entry.data, entry.correlation_id, entry.traceparent = (
                read.data,
                read.correlation_id,
                read.traceparent,
            )
            self._enqueue(entry)
        entry.deliveries -= 1
        await self.settlement.renew([entry])

    def _decode(self, entry: Entry) -> Dead | None:
        """Reads the entry; whatever arrives gets a verdict."""
        if isinstance(entry.data, int):
            return Dead(
                Reason.INVALID, f"the entry is {entry.data} bytes long, expected at most {MAX_ENTRY_BYTES}"
            )
        try:
            entry.lane = self._handler.decode(entry)
        except schemas.Invalid as invalid:
            return Dead(Reason.INVALID, str(invalid))
        except (
            Exception
        ) as error:  # a decoder that stumbles must not stop the stream: this entry is unreadable
            self._log.exception("entry.unreadable", id=entry.id.decode())
            return Dead(Reason.INVALID, f"cannot be read: {type(error).__name__}")
        if not entry.correlation_id:
            entry.correlation_id = entry.transaction_id
        entry.data = None  # the message says it all from here on
        return None

    # -- the workers ---------------------------------------------------------------------------------

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
        if self._draining or self._alone:
            return None
        if not self._gate.open and self._gate.permits() <= 0:
            self._reopen_later()
            return None
        if self.turn is not None and not self.turn.fresh:
            self._reopen_later()
            return None
        if self._quieting and self.in_flight:
            return None
        self._quieting = bool(self._suspects)
        if self._suspects:
            return None if self.in_flight else [self._suspects.popleft()]
        entries = self._lanes.take()
        if entries and entries[0].suspect and self.in_flight:
            self._lanes.push_back(entries)
            self._quieting = True
            return None
        return entries

    async def _deliver(self, entries: list[Entry]) -> None:
        self.in_flight += 1
        for entry in entries:
            entry.in_flight = True
        try:
            outcomes = await self._handler.deliver(entries)
        except Exception as error:  # a fault of ours: the entries stay pending and are tried again
            self._log.exception("delivery.failed", ids=[entry.id.decode() for entry in entries[:5]])
            failed = Retry(Cause.TRANSIENT, f"{type(error).__name__} in the agent")
            outcomes = [failed] * len(entries)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._quiet.set()
        for entry, outcome in zip(entries, outcomes, strict=True):
            entry.in_flight = False
            self._end(entry, outcome)

    async def _deliver_alone(self, entry: Entry) -> None:
        """Delivers a suspect with nothing beside it; the count is written first, for the case that we die of it."""
        self._alone = True
        self.hand.park(entry, False)
        try:
            if entry.died_alone >= self._limits.max_deliveries:
                error = f"delivering it alone ended the process {entry.died_alone} times"
                self.settlement.died(entry, Dead(Reason.POISON, error))
                self._lanes.finish([entry])
                return
            entry.deliveries += 1
            if await self.settlement.renew([entry]):
                self._lost([entry])
                return
            if entry.message is None and not await self._unseal(entry):
                return
            await self._deliver([entry])
        except RedisFault as fault:
            entry.deliveries -= 1
            self._again(entry)
            await asyncio.sleep(self._on_fault(fault))
        finally:
            self._alone = False
            self._call(len(self._idle))

    async def _unseal(self, entry: Entry) -> bool:
        """Fetches and reads a suspect's fields; False when it turned out dead or gone."""
        rows = await self._reclaimer.fetch([entry.id])
        if not rows:
            self._lost([entry])
            return False
        fetched = _entry(rows[0], self._clock())
        entry.data, entry.correlation_id, entry.traceparent = (
            fetched.data,
            fetched.correlation_id,
            fetched.traceparent,
        )
        self.hand.resize(entry, fetched.size)
        dead = self._decode(entry)
        if dead is not None:
            self.settlement.died(entry, dead)
            return False
        return True

    def _end(self, entry: Entry, outcome: Outcome) -> None:
        """What becomes of an entry after its delivery."""
        if not self.hand.holds(entry):
            if isinstance(outcome, Delivered):
                self.settlement.delivered(entry, outcome)  # a 2xx is a fact, whoever owns the entry by now
            self._lanes.finish([entry])
            return
        match outcome:
            case Delivered():
                self.settlement.delivered(entry, outcome)  # leaves the stream with the next batch
                self._lanes.finish([entry])
            case Dead():
                self._proven_harmless(entry)
                entry.attempts += 1
                self.settlement.died(entry, outcome)  # moves to the dead-letter view with the next batch
                self._lanes.finish([entry])
            case Retry(cause=Cause.HELD):
                self._held(
                    entry, outcome
                )  # stays pending: tried again when the gate opens, no attempt counted
            case Retry():
                self._retry(entry, outcome)  # stays pending: parked until its next attempt

    def _held(self, entry: Entry, retry: Retry) -> None:
        if entry.suspect:
            entry.deliveries -= 1  # it was not delivered: nothing is known about it yet
            entry.leased_at = float("-inf")
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
            self._lanes.finish([entry])
            return
        self._tally.retried_entries(retry.cause)
        self._log.debug(
            "entry.parked", id=entry.id.decode(), cause=retry.cause.value, error=retry.error, seconds=decision
        )
        self._park(entry, decision)

    def _park(self, entry: Entry, delay: float) -> None:
        self.hand.park(entry, True)
        self._lanes.block(entry)
        self._parking.park(entry, delay)

    def _wake(self, entry: Entry) -> None:
        """A parked entry's time has come."""
        if self.hand.holds(entry):
            self.hand.park(entry, False)
            self._lanes.unblock(entry)
            self._call(1)

    def _proven_harmless(self, entry: Entry) -> None:
        """Its delivery ended without ending the process: the count starts anew, written with the next renewal."""
        if entry.deliveries != FIRST_READ:
            entry.deliveries = FIRST_READ
            entry.leased_at = float("-inf")

    # -- waiting for work ----------------------------------------------------------------------------

    async def _called(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        await future

    def _call(self, n: int) -> None:
        """Calls up to `n` idle workers."""
        idle = self._idle
        while n > 0 and idle:
            future = idle.popleft()
            if not future.done():
                future.set_result(None)
                n -= 1

    def _reopen_later(self) -> None:
        if self._reopening is None:
            self._reopening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        await self._gate.wait()
        if self.turn is not None:
            while self.turn.held and not self.turn.fresh:
                await asyncio.sleep(self._limits.visibility_timeout / 20)
        self._reopening = None
        if self.turn is None or self.turn.held:
            self._call(len(self._idle))

    # -- groups, turn, faults ------------------------------------------------------------------------

    async def _make_groups(self) -> None:
        stream = self.stream
        live, twin, anew = await self._scripts.run(
            "make_groups", [stream.name, stream.ledger_key], [stream.group, stream.dead_group, GREATEST_ID]
        )
        self._groups_made = True
        if live or twin:
            self._log.warning(
                "groups.made",
                stream=stream.name,
                live=bool(live),
                twin=bool(twin),
                books_begun_anew=bool(anew),
            )

    async def _take_turn(self, turn: Turn) -> None:
        """Waits for the turn; a new holder first takes all that is pending, in order, before it reads."""
        if self._era and self._era != turn.era:
            self._lose_turn()
        if self.ready_at is None:
            self.ready_at = self._clock()  # waiting for the turn is being ready
        with self._cut_short_by_stop():
            await turn.taken.wait()
        if self._era != turn.era:
            rows = await self._reclaimer.take_all()
            if rows:
                self._tally.claimed_entries(len(rows))
            await self._hand_on(rows)
            self._era = turn.era
            self._orphans = False

    def _lose_turn(self) -> None:
        """The turn is somebody else's: what is in hand is delivered by the successor, in order."""
        assert self.turn is not None
        self.turn.lose()
        self._era = 0
        self._lanes.clear()
        self._parking.clear()
        self._suspects.clear()
        self.settlement.forget()
        self.hand.clear()

    def _lost(self, entries: list[Entry]) -> None:
        """These are somebody else's by now: they leave the hand; a request that is out for one runs to its end."""
        waiting = [entry for entry in entries if not entry.in_flight]
        self._lanes.remove(waiting)
        self._parking.remove(waiting)
        self.hand.drop(entries)
        self._log.warning("entries.lost", stream=self.stream.name, count=len(entries))

    def _on_fault(self, fault: RedisFault) -> float:
        """What a fault of Redis means to every task here; returns the seconds to wait."""
        if isinstance(fault, GroupGone):
            self._groups_made = False
        return self._redis_state.failed(fault)

    async def _back_off(self, fault: RedisFault) -> None:
        delay = self._on_fault(fault)
        with self._cut_short_by_stop():
            await asyncio.sleep(delay)

    # -- the tasks beside the loop -------------------------------------------------------------------

    def children(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Named coroutines that run until the process ends; they never raise for what Redis does."""
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "settlement": lambda: self.settlement.run(self._on_fault),
            "lease": lambda: self._lease.run(self._on_fault),
            "parking": self._parking.run,
            "janitor": lambda: self._reclaimer.run_janitor(self._on_fault),
        }
        if self.turn is not None:
            turn = self.turn
            tasks["turn"] = lambda: turn.run(self._on_fault, self._redis_state.answered)
        return tasks

    # -- stopping ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops reading and starting requests. A group read is never cut short; a wait is."""
        self._draining = True
        if self._interruptible and self._task is not None:
            self._task.cancel()

    async def drain(self, until: float) -> None:
        """Ends what is in hand by `until` (on the loop's clock), after `stop` and the end of `run`.

        (1) hand over what no request is out for → (2) let requests end → (3) settle → (4) hand over the rest →
        (5) give the turn up → (6) remove the own name. Without Redis the entries stay pending and are taken over.
        """
        try:
            async with asyncio.timeout_at(until):
                waiting = [entry for entry in self.hand if not entry.in_flight and not entry.ended]
                await self.settlement.hand_over(waiting)
        except (RedisFault, TimeoutError) as fault:
            self._log.warning("drain.hand_over_failed", error=str(fault), entries=len(self.hand))
        await self._requests_end(until - min(1.0, (until - self._clock()) / 4))
        try:
            async with asyncio.timeout_at(until):
                await self.settlement.flush()
                await self.settlement.hand_over(list(self.hand))
                if self.turn is not None:
                    await self.turn.give_up()
                stream = self.stream
                await self._scripts.run("forget_consumer", [stream.name], [stream.group, self.name])
        except (RedisFault, TurnLost, TimeoutError) as fault:
            self._log.warning("drain.incomplete", error=str(fault), entries=len(self.hand))

    async def _requests_end(self, until: float) -> None:
        while self.in_flight and self._clock() < until:
            self._quiet.clear()
            await _within(until - self._clock(), self._quiet.wait())
        for worker in self._workers:
            worker.cancel()
        if self._reopening is not None:
            self._reopening.cancel()

    @contextmanager
    def _cut_short_by_stop(self) -> Iterator[None]:
        if self._draining:
            raise asyncio.CancelledError
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False


def _lanes(handler: Handler, hand: Hand) -> Queue | Batches | Lanes:
    if handler.ordered:
        return Lanes(hand.park)
    return Batches(handler.batch) if handler.batch > 1 else Queue()


def _entry(row: Row, now: float) -> Entry:
    entry_id, data, correlation_id, traceparent = row[:4]
    deliveries = row[4] if len(row) > 4 else FIRST_READ
    return Entry(
        entry_id,
        data,
        schemas.correlation_id(correlation_id) or "",
        schemas.traceparent(traceparent),
        deliveries,
        now,
    )


async def _within(seconds: float, awaitable: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await awaitable
    except TimeoutError:
        pass
