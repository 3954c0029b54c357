"""How many requests may be in flight: few at first, then half as many again every 50 ms, up to the bound.

    4, 6, 9, 13, 20, 30, 45, 64    all of 64 after 0.35 s

It begins anew whenever nothing may be sent (an open breaker, a hold) and after the connections have idled away.
So an outage does not end with 64 TLS handshakes at once, which a ControlPlane that has just come back does not need.

It never falls by itself: why, is told in docs/decisions/0006-slow-start-and-no-more.md.
Pure: the clock comes in, and what is said to it is all it knows.
"""

from __future__ import annotations

from collections.abc import Callable

START = 4
STEP = 0.05
GROWTH = 1.5

IDLE = 4.0
"""Seconds without a request after which the connections are gone (the transport's idle timeout)."""


class Level:
    """The level of one process."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._rested_at = clock()
        self._began: float | None = clock()

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        if self._began is None:
            return self._most
        steps = int((self._clock() - self._began) / STEP + 1e-9)
        level = START * GROWTH ** min(steps, 100)
        if level < self._most:
            return int(level)
        self._began = None
        return self._most

    def woken(self) -> None:
        """A request goes out, and there was none."""
        if self._clock() - self._rested_at > IDLE:
            self.begin_again()

    def rests(self) -> None:
        """No request is out any more."""
        self._rested_at = self._clock()

    def begin_again(self) -> None:
        """Nothing may be sent for now, or the connections are gone."""
        self._began = self._clock()
