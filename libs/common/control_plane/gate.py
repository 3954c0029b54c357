"""May we send? The breaker and the holds in one answer, shared by all calls of a process.

    breaker   the ControlPlane or the network fails    opens and closes by itself (breaker.py)
    hold      it answers, but not to us                ends when the probe, GET public-keys, passes
      auth            401, 403, a refused certificate
      configuration   3xx, 501, a client that cannot be made; 404 or 410 for 20 sessions in a row

While the gate is not open nothing is read and no attempt is spent.
The probe goes after 1 s, then 2, 4, 8, 16, and then every 30 s; a verdict on an entry begins the count anew.

Every request holds a ticket.
A refusal of a request that began before the hold neither prolongs nor renews it: it may be about an old key.
The streak of sessions not found outlives its hold, until a delivery ends it:
a probe that passes shows that the ControlPlane is there, not that it knows sessions.

An outage logs two lines: `control_plane.unreachable` and `control_plane.recovered`.
So does a hold: `control_plane.held`, and `control_plane.resumed` with the first verdict on an entry after it;
a hold of the other kind before that is said, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any, Final, Literal, Protocol

import msgspec

from common.control_plane.breaker import LONGEST_PAUSE, Breaker, State
from common.control_plane.verdicts import HoldKind

NOT_FOUND_STREAK = 20
FIRST_PROBE = 1.0
LONGEST_PROBE = 30.0
SHORTEST_SLEEP = 0.001  # an event loop's clock may lag behind its own timers by a millisecond

Cause = Literal["timeout", "connection", "status", "unconfirmed"]


class Logger(Protocol):
    """structlog's manner: a constant event, facts as fields."""

    def info(self, event: str, **facts: Any) -> Any: ...
    def warning(self, event: str, **facts: Any) -> Any: ...


class Observer(Protocol):
    """Who counts; `common.metrics.Metrics` is one."""

    def request(self, endpoint: str, status: str, seconds: float) -> None: ...
    def retry(self, endpoint: str, cause: str) -> None: ...
    def breaker_state(self, state: int) -> None: ...
    def breaker_opened(self, cause: str) -> None: ...
    def connected(self, connected: bool) -> None: ...


class Unobserved:
    """Nobody counts."""

    def request(self, endpoint: str, status: str, seconds: float) -> None: ...
    def retry(self, endpoint: str, cause: str) -> None: ...
    def breaker_state(self, state: int) -> None: ...
    def breaker_opened(self, cause: str) -> None: ...
    def connected(self, connected: bool) -> None: ...


class Hold(msgspec.Struct, frozen=True):
    """Why nothing is sent. `since`: on the gate's clock."""

    kind: HoldKind
    detail: str
    since: float


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """When a request began, in the breaker's periods and in holds."""

    period: int
    holds: int


STATE_NUMBERS: Final[dict[State, int]] = {"closed": 0, "half_open": 1, "open": 2}


class Gate:
    """Admits requests, and learns from what became of them."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        random: Random,
        logger: Logger,
        observer: Observer | None = None,
        longest_pause: float = LONGEST_PAUSE,
    ) -> None:
        self.breaker = Breaker(clock, random, self._breaker_changed, longest_pause)
        self.hold: Hold | None = None
        self.connected = False
        """What was last known: it answers us (true), or the breaker opened or a hold began (false)."""
        self._clock = clock
        self._log = logger
        self._observer: Observer = observer or Unobserved()
        self._holds = 0  # how many have begun
        self._ticket = Ticket(0, 0)  # of a request that begins now
        self._calm: Ticket | None = (
            None  # a delivery with this one is no news: nothing has gone wrong since the last
        )
        self._probes = 0  # since the last delivery
        self._not_found: set[str] = set()  # sessions in a row; never more than the streak
        self._error = ""  # of the last failure
        self._unreachable_since: float | None = None
        self._held_since: tuple[HoldKind, float] | None = None  # logged, and not resumed yet
        self._stopped = False
        self._changed = asyncio.Event()  # replaced at every change: wakes all who wait, once

    @property
    def open(self) -> bool:
        """All is well: the breaker is closed and nothing is on hold."""
        return self.hold is None and self.breaker.open_until is None

    @property
    def stopped(self) -> bool:
        return self._stopped

    def permits(self) -> int:
        """How many new requests may start now; half-open: one, while its slot is free."""
        return 0 if self.hold is not None else self.breaker.permits()

    async def wait(self) -> None:
        """Returns as soon as a request may start."""
        while self.permits() == 0:
            pausing = self.hold is None and self.breaker.pausing
            # Nothing may remain of a pause that was not over a moment ago: the clock has gone on.
            await self._change(max(self.breaker.remaining, SHORTEST_SLEEP) if pausing else None)

    async def wait_for_hold(self) -> Hold | None:
        """The hold, as soon as there is one; None when the gate has been stopped."""
        while self.hold is None and not self._stopped:
            await self._change(None)
        return None if self._stopped else self.hold

    async def pause(self, seconds: float) -> bool:
        """Sleeps; ends early, with False, when the gate closes or is stopped."""
        until = self._clock() + seconds
        while self.open and not self._stopped:
            remaining = until - self._clock()
            if remaining <= 0:
                return True
            await self._change(max(remaining, SHORTEST_SLEEP))
        return False

    async def pause_on_hold(self) -> bool:
        """Sleeps until it is time to probe; False when the gate has been stopped or the hold is gone."""
        until = self._clock() + min(LONGEST_PROBE, FIRST_PROBE * 2.0 ** min(self._probes, 10))
        self._probes += 1
        while self.hold is not None and not self._stopped:
            remaining = until - self._clock()
            if remaining <= 0:
                return True
            await self._change(max(remaining, SHORTEST_SLEEP))
        return False

    def stop(self) -> None:
        """The process stops: pauses end, and nobody probes any more. What asks may still send."""
        self._stopped = True
        self._wake()

    # A request begins …

    def enter(self, *, despite_hold: bool = False) -> Ticket | None:
        """The ticket of a request that starts now, or None: nothing may be sent."""
        if self.hold is not None and not despite_hold:
            return None
        return None if self.breaker.enter() is None else self._ticket

    # … and ends in exactly one of these.

    def delivered(self, ticket: Ticket) -> None:
        """It succeeded."""
        if ticket is self._calm:
            return
        self.breaker.succeeded(ticket.period)
        self._not_found.clear()
        self._understood(ticket)
        if ticket is self._ticket and self.hold is None:
            self._calm = ticket

    def decided(self, ticket: Ticket) -> None:
        """The ControlPlane is alive and said no to this one request."""
        self.breaker.succeeded(ticket.period)
        self._understood(ticket)

    def failed(self, ticket: Ticket, cause: Cause, error: str) -> None:
        """No answer, or one that says no more than that."""
        self._calm = None
        self._error = error
        self.breaker.failed(ticket.period, cause)

    def refused(self, ticket: Ticket, kind: HoldKind, detail: str) -> None:
        """It answers, but not to us: a hold begins, unless this request began before the last one did."""
        self.breaker.succeeded(ticket.period)
        if ticket.holds == self._holds:
            self._begin(kind, detail)

    def turned_away(self, ticket: Ticket) -> None:
        """It answers, but not to us, in a call whose refusals hold nobody up."""
        self._calm = None
        self.breaker.succeeded(ticket.period)
        self._connected(False)

    def unsent(self, ticket: Ticket, kind: HoldKind, detail: str) -> None:
        """There is no channel to us (certificate, CA file): a hold; it says nothing about the breaker."""
        self.breaker.abandoned(ticket.period)
        if ticket.holds == self._holds:
            self._begin(kind, detail)

    def not_found(self, ticket: Ticket, session: str, status: int) -> bool:
        """A session is not found. True: so are all others, which is no verdict on entries but a hold."""
        self._calm = None
        self.breaker.succeeded(ticket.period)
        if len(self._not_found) < NOT_FOUND_STREAK:
            self._not_found.add(session)
        if len(self._not_found) < NOT_FOUND_STREAK:
            self.answered()
            return False
        if ticket.holds == self._holds:
            self._begin("configuration", f"answered {status} for {NOT_FOUND_STREAK} sessions in a row")
        return True

    def abandoned(self, ticket: Ticket) -> None:
        """Nobody knows how it ended."""
        self.breaker.abandoned(ticket.period)

    def lift(self) -> None:
        """The probe has passed."""
        if self.hold is not None:
            self.hold = None
            self.answered()
            self._wake()

    def answered(self) -> None:
        """The ControlPlane is there and answers us."""
        if not self.connected:
            self._connected(True)

    def _begin(self, kind: HoldKind, detail: str) -> None:
        if self.hold is not None:
            return
        now = self._clock()
        self._holds += 1
        self._renew_ticket()
        self.hold = Hold(kind, detail, now)
        if self._held_since is None or self._held_since[0] != kind:
            self._held_since = (kind, now)
            self._log.warning("control_plane.held", kind=kind, detail=detail)
        self._connected(False)
        self._wake()

    def _understood(self, ticket: Ticket) -> None:
        self.answered()
        if self.hold is not None or ticket.holds != self._holds:
            return
        self._probes = 0
        if self._held_since is not None:
            kind, since = self._held_since
            self._held_since = None
            held = round(self._clock() - since, 3)
            self._log.info("control_plane.resumed", kind=kind, held_seconds=held)

    def _breaker_changed(self, state: State, cause: str) -> None:
        self._observer.breaker_state(STATE_NUMBERS[state])
        self._renew_ticket()
        if cause:
            self._observer.breaker_opened(cause)
            self._connected(False)
            if self._unreachable_since is None:
                self._unreachable_since = self._clock()
                self._log.warning("control_plane.unreachable", cause=cause, error=self._error)
        if state == "closed" and self._unreachable_since is not None:
            down = round(self._clock() - self._unreachable_since, 3)
            self._unreachable_since = None
            self._log.info("control_plane.recovered", down_seconds=down)
        self._wake()

    def _renew_ticket(self) -> None:
        self._ticket = Ticket(self.breaker.period, self._holds)

    def _connected(self, connected: bool) -> None:
        self.connected = connected
        self._observer.connected(connected)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, timeout: float | None) -> None:
        """Returns at the next change, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            pass
