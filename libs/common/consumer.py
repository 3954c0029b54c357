"""The loop: it reads a stream's entries when there is room, and hands them on until each has ended.

An entry is delivered at least once, under one stable key, from the moment XADD has returned.
It leaves its stream when the ControlPlane has confirmed it, or dies visibly by a verdict on itself.
Until then it stays pending: in this hand while the process lives, in another's when it does not.
Nothing is read that there is no room for, nor while the gate is shut: backpressure is leaving it in Redis.
Where a stream promises order, only the holder of the turn reads, and each session is a lane.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random

from common.control_plane.gate import Gate
from common.delivery import Delivery, Handler, Limits, Tally, within
from common.entries import SUSPECT, Entry, Hand, Row
from common.lease import Lease
from common.logs import get
from common.reclaimer import Reclaimer
from common.redis_border import Full, GroupGone, RedisFault, Scripts, border
from common.redis_state import RedisState
from common.sentinel import Sentinel
from common.settlement import Settlement, TurnLost
from common.streams import GREATEST_ID, MAX_ENTRY_BYTES, Stream
from common.turn import Turn

MAX_BYTES = 32 * 1024 * 1024
"""Bytes of entries in hand; above it nothing more is read."""

MAX_PARKED = 10_000
"""Entries that may wait for another attempt; above it nothing more is read."""


class Consumer:
    """One consumer of one group: the loop, and what it is made of."""

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
        self.ready_at: float | None = None
        self.hand = Hand()
        self.turn = (
            Turn(scripts, stream.turn_key, name, limits.visibility_timeout, clock=clock) if token else None
        )
        self.settlement = Settlement(
            scripts,
            stream,
            name,
            service,
            self.hand,
            tally,
            turn_lost=self._lose_turn,
            figures=handler.figures,
            response_stream=response_stream,
            token=token,
        )
        self.delivery = Delivery(
            handler,
            limits,
            self.hand,
            self.settlement,
            self.turn,
            gate=gate,
            tally=tally,
            fetch=self._fetch,
            let_go=self._let_go,
            on_fault=self._on_fault,
            clock=clock,
            random=random,
        )
        self.sentinel = Sentinel(scripts, stream, name, tally)
        self._lease = Lease(self.hand, self.settlement, limits.visibility_timeout, self.delivery.lost, clock)
        self._reclaimer = Reclaimer(
            scripts,
            stream,
            self.settlement,
            self.hand,
            visibility_timeout=limits.visibility_timeout,
            claim_interval=limits.claim_interval,
            dead_retention=limits.dead_retention,
            token=token,
            clock=clock,
        )
        self._limits = limits
        self._scripts = scripts
        self._gate = gate
        self._redis_state = redis_state
        self._tally = tally
        self._clock = clock
        self._token = token or ""
        self._log = get("consumer")
        self._groups_made = False
        self._orphans = True  # a read may have delivered entries whose reply never came
        self._late = False  # a read that was given up may still be under way
        self._era = 0  # of the turn whose pending entries have been taken over
        self._beginnings = 0
        self._untaken: deque[Entry] = deque()  # in hand, and not yet on their way to a slot
        self._last_id = b"0-0"
        self._more = False  # the last reads came back full
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._interruptible = False

    @property
    def in_flight(self) -> int:
        """Requests that are out."""
        return self.delivery.in_flight

    @property
    def unready(self) -> tuple[str, ...]:
        """Why the stream cannot be consumed for now; empty when it can."""
        return () if self._groups_made else (f"the group {self.stream.group} is not there yet",)

    # -- the loop ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads when there is room, hands on, until told to stop."""
        self._task = asyncio.current_task()
        try:
            while not self._stopped:
                try:
                    await self._prepare()
                    if room := self._room():
                        read = await self._read_on(room)
                        self._more = read == room
                        self.delivery.expect(self._more and self._has_room())
                        if not read:
                            await self._doorbell()
                    else:
                        await self._take_on()
                        await self._until_room()
                except RedisFault as fault:
                    self._orphans = True  # what it read or took may be ours without our knowing
                    self._late = True  # or will be, when it gets there
                    await self._back_off(fault)
                except TurnLost:
                    self._lose_turn()
        except asyncio.CancelledError:
            if not self._stopped:
                raise

    async def _prepare(self) -> None:
        """The groups exist, the turn is ours with all that is pending, and no entry is delivered to nobody."""
        if not self._groups_made:
            await self._make_groups()
        if self.turn is not None:
            await self._take_turn(self.turn)
        if self._orphans:
            await self._fence()
            self._hold(await self._reclaimer.recover())
            self._orphans = False
        if self.ready_at is None:
            self.ready_at = self._clock()

    def _room(self) -> int:
        """How many entries may be read now."""
        limits, hand = self._limits, self.hand
        self.settlement.ended.clear()
        if self._has_room():
            if self._gate.open:
                return min(self._reads * limits.read_count, limits.capacity - hand.active)
            if self._gate.permits() > 0 and not hand.active:
                return 1  # half-open: one entry may be read, to see whether the ControlPlane is back
        return 0

    async def _until_room(self) -> None:
        """Returns when there may be room, and now and then, so that groups and turn are looked at again."""
        self.delivery.expect(False)
        shut = not self._gate.open and self._gate.permits() <= 0
        with self._cut_short_by_stop():
            await within(self._limits.doorbell, self._gate.wait() if shut else self.settlement.ended.wait())

    def _has_room(self) -> bool:
        limits, hand = self._limits, self.hand
        enough = max(1, min(limits.read_count, limits.capacity // 4))
        free = limits.capacity - hand.active
        return free >= enough and hand.bytes < MAX_BYTES and hand.parked < MAX_PARKED

    @property
    def _reads(self) -> int:
        """How many reads may be under way at once: two while they come back full, so that Redis need not wait for us.

        One where the stream promises order: of two, the later might be answered first.
        """
        return 2 if self._more and self.turn is None else 1

    async def _read_on(self, room: int) -> int:
        """Reads, and meanwhile takes on what was read before: Redis and we work at the same time."""
        count, rest = min(room, self._limits.read_count), max(0, room - self._limits.read_count)
        most = (MAX_BYTES - self.hand.bytes) // (2 if rest else 1)
        reads = [self._intake(count, most, look_around=True)]
        if rest:
            reads.append(self._intake(rest, most, look_around=False))
        under_way = asyncio.gather(*reads, return_exceptions=True)
        try:
            await asyncio.sleep(0)  # the requests are out
            await self._take_on()
        finally:
            ended = await under_way
        read = 0
        for end in ended:
            if isinstance(end, BaseException):
                raise end
            read += end
        return read

    async def _intake(self, room: int, most: int, *, look_around: bool) -> int:
        """Holds what others left, when it is time to look, else what is new; returns how many entries that were."""
        rows: list[Row] = []
        if look_around and self._reclaimer.due_in <= 0:
            await self._lease.catch_up()
            rows = await self._reclaimer.take(min(room, max(1, most // MAX_ENTRY_BYTES)))
            self._tally.claimed_entries(len(rows))
        rows = rows or await self._read(room, max(most, MAX_ENTRY_BYTES))
        if self.turn is not None and self.turn.era != self._era:
            return 0  # it comes again with all that is pending, in order
        self._hold(rows)
        return len(rows)

    async def _read(self, room: int, most: int) -> list[Row]:
        """At most `room` new entries, of about `most` bytes."""
        stream = self.stream
        keys = [stream.name, stream.turn_key] if self.turn else [stream.name]
        reply = await self._scripts.run(
            "read",
            keys,
            [stream.group, stream.dead_group, self.name, room, most, MAX_ENTRY_BYTES, self._token],
        )
        self._redis_state.answered()
        if reply[0] == -1:
            raise TurnLost
        self._last_id = reply[0] or self._last_id
        return list(reply[1:])

    def _hold(self, rows: list[Row]) -> None:
        """Each row of an entry that is not in hand yet becomes one; it is taken on while the next are read."""
        now = self._clock()
        entries = [Entry.of(row, now) for row in self.hand.unheld(rows)]
        self.hand.take(entries)
        self._untaken.extend(entries)

    async def _take_on(self) -> None:
        """What is in hand goes on its way to a slot; after a fault the rest waits for the next time."""
        untaken = self._untaken
        while untaken:
            self.delivery.take(_up_to_a_suspect(untaken))
            if untaken:
                suspect = untaken.popleft()
                try:
                    await self.delivery.take_suspect(suspect)
                except RedisFault:
                    untaken.appendleft(suspect)
                    raise

    async def _doorbell(self) -> None:
        """Waits for something new without reading it: no side effect, so a stop may cut it short."""
        wait = min(self._limits.doorbell, max(0.01, self._reclaimer.due_in))
        with self._cut_short_by_stop(), border():
            await self._scripts.redis.xread(
                {self.stream.name: self._last_id}, count=1, block=int(wait * 1000)
            )

    # -- groups, turn, faults ------------------------------------------------------------------------

    async def _make_groups(self) -> None:
        stream = self.stream
        live, twin = await self._scripts.run(
            "make_groups",
            [stream.name, stream.ledger_key, stream.dead_key],
            [stream.group, stream.dead_group, GREATEST_ID],
        )
        anew = await self.sentinel.look()
        if live or twin:
            made = {"live": bool(live), "twin": bool(twin), "books_begun_anew": anew}
            self._log.warning("groups.made", stream=stream.name, **made)
        if self.ready_at is None:
            await self._look_for_foreign_groups()
        self._groups_made = True

    async def _look_for_foreign_groups(self) -> None:
        """Warns of groups that are not ours: what is settled is deleted, read by them or not."""
        stream = self.stream
        with border():
            groups = await self._scripts.redis.xinfo_groups(stream.name)
        foreign = {group["name"].decode(errors="replace") for group in groups}
        foreign -= {stream.group, stream.dead_group}
        if foreign:
            self._log.warning("groups.foreign", stream=stream.name, groups=sorted(foreign))

    async def _take_turn(self, turn: Turn) -> None:
        """Waits for the turn; a new holder first takes all that is pending, in order, before it reads."""
        if self.ready_at is None:
            self.ready_at = self._clock()  # who waits for the turn is ready
        while not (turn.held and self._era == turn.era):
            with self._cut_short_by_stop():
                await turn.taken.wait()
            era = turn.era
            self._let_go()  # what is left of an earlier turn comes again, with all that others have changed
            beginnings = self._beginnings
            await self._fence()
            rows = await self._reclaimer.take_all()
            self._tally.claimed_entries(len(rows))
            if self._beginnings == beginnings:
                self._era = era
                self._orphans = False
                self._hold(rows)

    async def _fence(self) -> None:
        """In order, a read that was given up and is still under way must not deliver behind what is found now."""
        if self.turn is not None and self._late:
            held = await self.turn.replace_token()
            self._token = self.settlement.token = self._reclaimer.token = self.turn.token
            if not held:
                raise TurnLost
            self._late = False

    def _lose_turn(self) -> None:
        """The turn is somebody else's: what is in hand is delivered by the successor, in order."""
        assert self.turn is not None
        self.turn.lose()
        self._let_go()

    def _let_go(self) -> None:
        """Begins from the beginning: what is in hand is dropped, and taken again in order with all that is pending."""
        self._era = 0
        self._beginnings += 1
        self._untaken.clear()
        self.delivery.forget()
        self.settlement.forget()
        self.hand.clear()

    async def _fetch(self, entry_id: bytes) -> Entry | None:
        rows = await self._reclaimer.fetch([entry_id])
        return Entry.of(rows[0], self._clock()) if rows else None

    def _on_fault(self, fault: RedisFault) -> float:
        """What a fault of Redis means to every task here; returns the seconds to wait."""
        if isinstance(fault, GroupGone):
            self._groups_made = False
        self.delivery.expect(False)  # nothing is read for now
        return self._redis_state.failed(fault)

    async def _back_off(self, fault: RedisFault) -> None:
        delay = self._on_fault(fault)
        with self._cut_short_by_stop():
            await asyncio.sleep(delay)

    # -- beside the loop -----------------------------------------------------------------------------

    def children(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Named tasks that run until the process ends; they never raise for what Redis does."""
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "slots": self.delivery.run,
            "settlement": lambda: self.settlement.run(self._on_fault),
            "lease": lambda: self._lease.run(self._on_fault),
            "parking": self.delivery.parking.run,
            "janitor": lambda: self._reclaimer.run_janitor(self._on_fault),
        }
        if (turn := self.turn) is not None:
            tasks["turn"] = lambda: turn.run(self._on_fault, self._redis_state.answered)
        return tasks

    # -- stopping ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """No more reading, no more requests. A group read is never cut short; a wait is."""
        self._stopped = True
        self.delivery.stop()
        if self._interruptible and self._task is not None:
            self._task.cancel()

    async def drain(self, until: float) -> None:
        """Ends what is in hand by `until` (on the loop's clock), after `stop` and the end of `run`.

        (1) hand over what no request is out for → (2) let requests end → (3) settle → (4) hand over the rest →
        (5) give the turn up → (6) remove the own name.
        Where Redis is away the entries stay pending, and are taken over after the visibility timeout.
        """
        try:
            async with asyncio.timeout_at(until):
                waiting = [e for e in self.hand if not (e.in_flight or e.ended or e.suspect)]
                if self.turn is None:  # in order, nobody may take what is behind a request that is out
                    await self.settlement.hand_over(waiting)
                await self.delivery.end_requests(until - min(1.0, (until - self._clock()) / 4))
                with suppress(Full):  # a grant that cannot be written is asked for again by another
                    await self.settlement.flush()
                await self.settlement.hand_over(list(self.hand))
                if self.turn is not None:
                    await self.turn.give_up()
                stream = self.stream
                await self._scripts.run("forget_consumer", [stream.name], [stream.group, self.name])
        except (RedisFault, TurnLost, TimeoutError) as fault:
            self._log.warning("drain.incomplete", error=str(fault) or "out of time", entries=len(self.hand))

    @contextmanager
    def _cut_short_by_stop(self) -> Iterator[None]:
        if self._stopped:
            raise asyncio.CancelledError
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False


def _up_to_a_suspect(entries: deque[Entry]) -> Iterator[Entry]:
    """Takes them out of the deque, one by one."""
    while entries and entries[0].deliveries < SUSPECT:
        yield entries.popleft()
