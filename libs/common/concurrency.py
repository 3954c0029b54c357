"""How many requests may be in flight: the number finds its own level between 1 and a bound.

    slow start    half as many again after each round, from START up to the last good level
    rise          one more after each round in which the level was reached
    fall          to two thirds: transient answers, or a latency that stays well above the past mean

A round is as many answers as the level, over at least a tenth of a second; in the slow start it is shorter.
The past mean is that of the ControlPlane at its best: what an answer takes when few ask or, where many do, what it
takes in a queue that moves at its best pace.
So a queue that only becomes longer is no harm; one that moves more slowly is.

A fall that made nothing better is taken back: something else is the cause, and what is now is the past mean from
then on. Where more than a fifth of the answers are transient no fall is taken back.
Verdicts on entries, sessions not found and holds do not count at all.

Pure: the clock comes in, and what is said to it is all it knows.
"""

from __future__ import annotations

from collections.abc import Callable

START = 4
"""Few enough to open connections for at once, enough that one silent request does not stop the others."""

ROUND = 0.1
SUSTAINED = 0.2
"""Seconds, of a round and of slow rounds before a fall; anything shorter may be a hiccup of the machine."""

STRAINED_FALL, SLOW_FALL = 0.75, 0.6
"""What a fall leaves of the level. The second undoes more than a rise until it is noticed: so that each time it is
seen again what the ControlPlane is at its best."""

WELL_ABOVE, FLOOR = 1.2, 0.003
"""Latency is well above the past mean beyond so many times it and so many seconds more."""

MORE_STRAIN, NOISE = 1.5, 0.02
"""The same for the share of transient answers."""

MUCH_STRAIN = 0.2
"""A share of transient answers that no fall is taken back at."""

CERTAIN, AMPLE = 5, 50
"""A share is known after so many transient answers, or so many of any kind."""

FASTER, LESS_STRAIN = 0.9, 0.7
"""What a fall has made better: latency or strain is below this share of what it was."""

BETTER, WORSE = 0.5, 0.002
"""Weights of a round in the past means, which follow what is better at once and what is worse slowly."""

IDLE = 4.0
"""Seconds without need after which connections are gone (the transport's idle timeout): not all anew at once."""


class Level:
    """The level of one process. `limit`: how many requests may be in flight; `out`: how many are."""

    def __init__(self, most: int, clock: Callable[[], float], start: int = START) -> None:
        self.limit = min(start, most)
        self.out = 0
        self._most = most
        self._start = self.limit
        self._clock = clock
        self._good = (
            most  # the last level that was good, where a slow start ends; at first we hope for the best
        )
        self._starting = self.limit < most
        self._alone = 0.0  # seconds an answer takes when few ask; 0: not known yet
        self._apart = 0.0  # seconds between two answers when many ask
        self._strain = 0.0  # the share of transient answers that is not our doing
        self._beside = 0  # part of the limit: requests from before a slow start, which go out as they end
        self._slow_since: float | None = None
        self._fell_from: tuple[int, float, float] | None = (
            None  # level, latency, strain, until seen if it helped
        )
        self._rested_at = self._needed_at = clock()
        self._begin_round()

    # -- what happens ----------------------------------------------------------------------------------

    def begun(self) -> None:
        """A request goes out."""
        if not self.out and self._clock() - self._rested_at > IDLE:
            self.begin_again()
        self.out += 1
        if self.out >= self.limit:
            self._reached = True

    def ended(self) -> None:
        """It is out no more; how it went is said beside this, if it counts."""
        self.out -= 1
        if not self.out:
            self._rested_at = self._clock()

    def answered(self, seconds: float) -> None:
        """It succeeded, and took so long."""
        if self._old and self._is_old(seconds):
            return
        self._seconds += seconds
        self._answers += 1
        if self._answers >= self._enough:
            self._end_round()

    def strained(self, seconds: float) -> None:
        """It was answered that this is not the time, or not at all; and took so long."""
        if self._old and self._is_old(seconds):
            return
        self._enough -= 1
        self._refusals += 1
        if self._answers >= self._enough or self._is_plain():
            self._end_round()

    def begin_again(self) -> None:
        """Nothing may be sent for now, or the connections are gone: a slow start, beside what is out still."""
        self._beside = min(self.out, self._most - self._start)
        self.limit = self._start + self._beside
        self._starting = self.limit < self._good
        self._fell_from = None
        self._begin_round(anew=True)

    # -- what follows ----------------------------------------------------------------------------------

    def _begin_round(self, anew: bool = False) -> None:
        """`anew`: answers to what is out say nothing, since it began at another level."""
        self._old = self.out if anew else 0
        self._enough = max(2, self.limit // 2) if self._starting else self.limit
        self._answers = self._refusals = 0
        self._seconds = 0.0
        self._began = self._clock()
        self._reached = False

    def _is_old(self, seconds: float) -> bool:
        """Whether it began before the round; it may come long after answers to requests that began later."""
        if self._clock() - seconds >= self._began:
            return False
        self._old -= 1
        if self._beside:
            self._beside -= 1
            self.limit -= 1
        return True

    def _end_round(self) -> None:
        heard = self._answers + self._refusals
        too_short = not self._starting and self._clock() - self._began < ROUND
        unclear = 0 < self._refusals < CERTAIN and heard < AMPLE
        if (too_short or unclear) and not self._is_plain():
            self._enough += self.limit
        elif self._reached:
            self._needed_at = self._clock()
            self._judge(self._seconds / max(1, self._answers), self._refusals / heard)
        else:
            self._fell_from = None
            if self._clock() - self._needed_at > IDLE:
                self._shrink()
            self._begin_round()

    def _shrink(self) -> None:
        """To twice what is in flight on average; there is no harm in it, since a slow start leads back."""
        in_flight = self._seconds / max(self._clock() - self._began, self._seconds / self.limit)
        self.limit = min(self.limit, max(self._start, round(2 * in_flight)))
        self._starting = self.limit < self._good

    def _is_plain(self) -> bool:
        """So much strain that nothing more need be heard."""
        return self._refusals >= CERTAIN and self._refusals > self._answers

    def _judge(self, latency: float, strain: float) -> None:
        self._beside = 0
        fell_from, self._fell_from = self._fell_from, None
        if fell_from is not None and strain <= MUCH_STRAIN and not _better(fell_from, latency, strain):
            self.limit = fell_from[0]
            self._alone, self._apart, self._strain = latency, latency / self.limit, strain
            self._begin_round()
        elif strain > MORE_STRAIN * self._strain + NOISE:
            self._fall(STRAINED_FALL, latency, strain)
        elif self._alone and latency > WELL_ABOVE * self._past_mean() + FLOOR:
            if self._slow_since is None:
                self._slow_since = self._began
            if self._clock() - self._slow_since < SUSTAINED:
                self._begin_round()
            else:
                self._fall(SLOW_FALL, latency, strain)
        else:
            self._slow_since = None
            self._alone = self._followed(self._alone, latency)
            self._apart = self._followed(self._apart, latency / self.limit)
            self._strain += WORSE * (min(strain, self._strain) - self._strain)
            self._rise()

    def _followed(self, past: float, now: float) -> float:
        if not past or (self._starting and now < past):
            return now  # the first answers waited for their connections
        return past + (BETTER if now < past else WORSE) * (now - past)

    def _past_mean(self) -> float:
        return max(self._alone, self._apart * self.limit)

    def _rise(self) -> None:
        if self._starting:
            self.limit = min(max(self.limit + 1, self.limit * 3 // 2), self._good)
            self._starting = self.limit < self._good
            self._begin_round(anew=True)
        else:
            self._good = self.limit
            self.limit = min(self.limit + max(1, self.limit // 16), self._most)
            self._begin_round()

    def _fall(self, share: float, latency: float, strain: float) -> None:
        before = self.limit
        self.limit = max(1, round(before * share))
        if self._starting:
            self._starting, self._good = False, self.limit
        self._slow_since = None
        self._fell_from = (before, latency, strain)
        self._begin_round(anew=True)


def _better(before: tuple[int, float, float], latency: float, strain: float) -> bool:
    return latency < FASTER * before[1] or strain < LESS_STRAIN * before[2]


