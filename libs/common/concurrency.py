"""How many requests may be in flight: the number moves only to where more is carried.

    slow start    4, 6, 9, 13, 20, 30, 45, 64: half as many again every 50 ms, up to the good level
    trial         for one round a quarter fewer, or more; kept as the good level if that carries more
    refusal       the breaker opens at a level that was reached, while others are answered: three quarters of it
                  are good from then on

The good level is the bound at first. A slow start begins whenever nothing may be sent (an open breaker, a hold) and
after the connections have idled away, so an outage does not end with 64 TLS handshakes at once.

A round is twice as many answers as the level, over at least a quarter of a second, during which there was always
more to send. Fewer are good when they carry a seventh more, or as much with far fewer refusals: a ControlPlane that
gives way under load recovers. More are good when they carry as much: the level rises wherever it does no harm.
So a machine or a network that is slow for a while does not hold the level down: it is slow with fewer, too.
A trial that was not kept is made again after 10 s, then 20, 40, and every 60; fewer are tried at once when a round
carries a third less than the one before.

Transient answers are refusals; verdicts on entries are answers like any other.
Pure: the clock comes in, and what is said to it is all it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

START = 4
STEP = 0.05
GROWTH = 1.5

IDLE = 4.0
"""Seconds without a request after which the connections are gone (the transport's idle timeout)."""

ROUND = 0.25
ROUND_ANSWERS = 20
SATURATED = 0.8
"""A round counts when so large a share of its level was out on average: else there was not enough to send."""

FEWER, MORE = 0.75, 1.25
MUCH_BETTER = 1.15
AS_GOOD = 0.97
DROPPED = 0.67

REFUSED = 0.2
"""Share of refusals that is worth having fewer requests for, if fewer lower it to LESS_REFUSED of what it was."""

LESS_REFUSED = 0.7
BARELY_MORE_REFUSED = 0.05

REST, LONGEST_REST = 10.0, 60.0


@dataclass(slots=True)
class Round:
    """What was heard at one level. `busy`: seconds that its requests took, all together."""

    began: float
    carried: int = 0
    refused: int = 0
    busy: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.carried / self.seconds

    @property
    def refusals(self) -> float:
        return self.refused / (self.carried + self.refused)


@dataclass(slots=True)
class Rest:
    """When trials in one direction are due again."""

    until: float = 0.0
    next: float = REST

    def fail(self, now: float) -> None:
        self.until = now + self.next
        self.next = min(LONGEST_REST, 2 * self.next)

    def begin(self, now: float) -> None:
        self.until, self.next = now + REST, REST


class Level:
    """The level of one process; `out`: how many requests are in flight."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.out = 0
        self._most = most
        self._clock = clock
        self._good = most
        self._trial: int | None = None  # instead of the good level, for one round
        self._base: Round | None = None  # what the good level carried in the round before
        self._fewer, self._more = Rest(), Rest()
        self._rested_at = self._slow_start_at = clock()
        self._starting = True
        self._unsettled = 0  # requests from before the round, whose answers are of another level
        self._enough = ROUND_ANSWERS
        self._peak = 0  # requests out at once since the round began
        self._round = Round(clock())

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        if self._starting:
            steps = int((self._clock() - self._slow_start_at) / STEP + 1e-9)
            level = START * GROWTH ** min(steps, 100)
            if level < self._good:
                return int(level)
            self._starting = False
            self._begin_round()
        return self._trial or self._good

    # -- what happens ----------------------------------------------------------------------------------

    def begun(self) -> None:
        """A request goes out."""
        if not self.out and self._clock() - self._rested_at > IDLE:
            self.begin_again()
        self.out += 1
        if self.out > self._peak:
            self._peak = self.out

    def ended(self, seconds: float, refused: bool) -> None:
        """It is out no more: after so many seconds, answered or refused."""
        self.out -= 1
        if not self.out:
            self._rested_at = self._clock()
        if self._unsettled:
            self._unsettled -= 1
            if not self._unsettled:
                self._round = Round(self._clock())
            return
        heard = self._round
        heard.busy += seconds
        if refused:
            heard.refused += 1
        else:
            heard.carried += 1
        if not self._starting and heard.carried + heard.refused >= self._enough:
            heard.seconds = self._clock() - heard.began
            if heard.seconds >= ROUND:
                self._judge(heard)
                self._begin_round()

    def begin_again(self) -> None:
        """Nothing may be sent for now, or the connections are gone: a slow start."""
        now, level, heard = self._clock(), self.limit, self._round
        if heard.refused and heard.carried and self._peak >= SATURATED * level:
            if self._trial is not None and self._trial > self._good:
                self._more.fail(now)  # it was the trial that was refused
            else:
                self._good = min(self._good, max(START, int(level * FEWER)))
        self._trial = self._base = None
        self._slow_start_at, self._starting = now, True
        self._unsettled, self._peak, self._round = self.out, 0, Round(now)

    # -- what follows ----------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        self._unsettled, self._peak = self.out, 0
        self._enough = max(ROUND_ANSWERS, 2 * (self._trial or self._good))
        self._round = Round(self._clock())

    def _judge(self, heard: Round) -> None:
        now = self._clock()
        trial, self._trial = self._trial, None
        base, self._base = self._base, None
        if heard.busy < SATURATED * (trial or self._good) * heard.seconds:
            return  # there was not enough to send: nothing is known
        if trial is None:
            if base is not None and heard.rate < DROPPED * base.rate:
                self._fewer.until = now
        elif base is not None:
            here, there = (self._fewer, self._more) if trial < self._good else (self._more, self._fewer)
            if not _is_better(base, heard, trial < self._good):
                here.fail(now)
                return
            self._good = trial
            here.next = REST
            there.begin(now)
        self._base = heard
        self._trial = self._next_trial(now)

    def _next_trial(self, now: float) -> int | None:
        if self._good > 1 and now >= self._fewer.until:
            return max(1, int(self._good * FEWER))
        if self._good < self._most and now >= self._more.until:
            return min(self._most, max(self._good + 1, int(self._good * MORE)))
        return None


def _is_better(base: Round, tried: Round, fewer: bool) -> bool:
    if not fewer:
        return tried.rate >= AS_GOOD * base.rate and tried.refusals <= base.refusals + BARELY_MORE_REFUSED
    if tried.rate >= MUCH_BETTER * base.rate:
        return True
    spared = base.refusals >= REFUSED and tried.refusals < LESS_REFUSED * base.refusals
    return spared and tried.rate >= AS_GOOD * base.rate
