"""The circuit breaker: after failures in a row nothing is sent, until one request shows that it works again.

    closed ──5 failures in a row──▶ open ──pause──▶ half-open ──its one request succeeds──▶ closed
                                     ▲                  │
                                     └──────it fails────┘

The pause is up to 0.5 s, then up to 1, 2, 4, 8 and from then on up to 10 s.
Its jitter is full but for the lowest tenth: between 0.05 s and 0.5 s at first, between 1 s and 10 s at last.

Every request holds a ticket, the number of the period it began in.
What comes back to a ticket of an earlier period says nothing about this one, and changes nothing.
Pure: clock and randomness come in; it sleeps nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal

State = Literal["closed", "half_open", "open"]

FAILURES = 5
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0
LEAST_SHARE = 0.1  # of the pause; full jitter down to nothing would be no pause at all
MANY = 1 << 30


class Breaker:
    """Says how many requests may start, and learns from what became of them."""

    def __init__(
        self,
        clock: Callable[[], float],
        random: Random,
        on_change: Callable[[State, str], None] = lambda state, cause: None,
        longest_pause: float = LONGEST_PAUSE,
    ) -> None:
        """`on_change` hears of every new state, and of the cause (of an opening; else it is empty)."""
        self._clock = clock
        self._random = random
        self._on_change = on_change
        self._longest_pause = longest_pause
        self.period = 0
        """Grows with every opening: what a ticket is of."""
        self._failures = 0  # in a row, while closed
        self._openings = 0  # in a row, without a success between
        self.open_until: float | None = None
        """When its pause is over; None: it is closed."""
        self._probing = False

    @property
    def state(self) -> State:
        if self.open_until is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self.open_until else "open"

    @property
    def remaining(self) -> float:
        """Seconds until the pause is over; 0 when there is none."""
        return 0.0 if self.open_until is None else max(0.0, self.open_until - self._clock())

    @property
    def pausing(self) -> bool:
        """Open, and time alone lets the next request start; else nothing does but a change."""
        return self.open_until is not None and not self._probing

    def permits(self) -> int:
        """How many requests may start now."""
        if self.open_until is None:
            return MANY
        return int(not self._probing and self._clock() >= self.open_until)

    def enter(self) -> int | None:
        """The ticket of a request that starts now, or None: it must not start."""
        if self.open_until is None:
            return self.period
        if not self.permits():
            return None
        self._probing = True
        self._on_change("half_open", "")
        return self.period

    def succeeded(self, ticket: int) -> None:
        if ticket != self.period:
            return  # it began before the breaker opened: old news
        self._failures = 0
        if self._probing:
            self._probing = False
            self.open_until = None
            self._openings = 0
            self._on_change("closed", "")

    def failed(self, ticket: int, cause: str) -> None:
        if ticket != self.period:
            return
        self._failures += 1
        if self._probing or self._failures >= FAILURES:
            self._open(cause)

    def abandoned(self, ticket: int) -> None:
        """The request says nothing about the ControlPlane; if it was the probe, another one may go."""
        if ticket == self.period and self._probing:
            self._probing = False
            self._on_change("half_open", "")

    def _open(self, cause: str) -> None:
        longest = min(self._longest_pause, FIRST_PAUSE * 2.0 ** min(self._openings, 10))
        self.open_until = self._clock() + longest * (LEAST_SHARE + (1 - LEAST_SHARE) * self._random.random())
        self._openings += 1
        self.period += 1
        self._failures = 0
        self._probing = False
        self._on_change("open", cause)
