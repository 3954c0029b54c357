"""How many requests may be in flight: the number finds its own level between 1 and a bound.

    slow start    half as many again after each round, from START up to the last good level
    rise          one more after each round in which the level was reached
    fall          to three quarters: latency well above the past mean for two rounds, or transient answers

A round is as many answers as the level, over at least a tenth of a second; in the slow start it is shorter.
The past mean is that of the ControlPlane at its best: what an answer takes when few ask, or, where many do, what it
takes in a queue that moves at its best pace.
So a queue that only becomes longer is no harm; one that moves more slowly is.

A fall that made nothing faster is taken back: the ControlPlane has become slower by itself, and from then on that is
what we compare with.
One transient answer in fifty is noise.
Verdicts on entries, sessions not found and holds do not count at all.

Pure: the clock comes in, and who starts requests counts them; this says how many.
"""

from __future__ import annotations

from collections.abc import Callable

START = 4
"""Few enough to open connections for at once, enough that one silent request does not stop the others."""

ROUND = 0.1
"""Seconds; a shorter one would measure the hiccups of the machine."""

WELL_ABOVE, FLOOR = 1.25, 0.004
"""Latency is well above the past mean beyond so many times it and so many seconds more."""

HELPED = 0.9
"""A fall has helped when latency after it is below this share of what it was."""

BETTER, WORSE = 0.5, 0.02
"""Weights of a round in the past mean, which follows what is better at once and what is worse slowly."""

NOISE = 0.02
"""The share of transient answers that changes nothing."""

IDLE = 4.0
"""Seconds without a request after which the connections are gone (the transport's idle timeout)."""


class Level:
    """The level of one process; `limit` is how many requests may be in flight now."""

    def __init__(self, most: int, clock: Callable[[], float], start: int = START) -> None:
        self.limit = min(start, most)
        self.reached = False
        """To be set when a request starts that is the last there may be: only then is there a cause to rise."""
        self._most = most
        self._start = self.limit
        self._clock = clock
        self._good = most  # the last level that was good, where a slow start ends; at first we hope for the best
        self._starting = self.limit < most
        self._alone = 0.0  # the past mean of an answer when few ask, seconds; 0 before the first
        self._apart = 0.0  # the past mean between two answers when many ask
        self._slow_rounds = 0
        self._fell_from: tuple[int, float] | None = None  # level and latency, until we know whether it helped
        self._fell_at = float("-inf")
        self._forgiven = 1.0  # transient answers that may yet come and change nothing
        self._rested_at = float("inf")
        self._begin_round()

    # -- what happens ----------------------------------------------------------------------------------

    def answered(self, seconds: float) -> None:
        """A request succeeded, and took so long."""
        if self._old:
            self._old -= 1
            if not self._old:
                self._began = self._clock()
            return
        self._seconds += seconds
        self._answers += 1
        if self._answers >= self._enough:
            self._end_round()

    def strained(self, seconds: float) -> None:
        """A request took so long and was answered that this is not the time, or not at all."""
        if self._clock() - seconds < self._fell_at:
            return  # it began before the last fall
        self._forgiven -= 1.0
        if self._forgiven < 0.0:
            self._forgiven = 0.0
            self._fall()

    def rested(self) -> None:
        """Nothing is in flight any more."""
        self._rested_at = self._clock()

    def woken(self) -> None:
        """Something is in flight again."""
        if self._clock() - self._rested_at > IDLE:
            self.begin_again()

    def begin_again(self, out: int = 0) -> None:
        """Nothing may be sent for now, or the connections are gone: a slow start, beside what is `out` still."""
        self.limit = min(self._start + out, self._most)
        self._starting = self.limit < self._good
        self._fell_from = None
        self._begin_round(old=out)

    # -- what follows ----------------------------------------------------------------------------------

    def _begin_round(self, old: int = 0) -> None:
        """`old`: answers that come first and say nothing, since their requests began at another level."""
        self._old = old
        self._enough = max(2, self.limit // 2) if self._starting else self.limit
        self._answers = 0
        self._seconds = 0.0
        self._began = self._clock()
        self.reached = False

    def _end_round(self) -> None:
        if not self._starting and self._clock() - self._began < ROUND:
            self._enough += self.limit
            return
        self._forgiven = min(1.0, self._forgiven + NOISE * self._answers)
        if self.reached:
            self._judge(self._seconds / self._answers)
        else:
            self._fell_from = None
            self._begin_round()

    def _judge(self, latency: float) -> None:
        fell_from, self._fell_from = self._fell_from, None
        if fell_from is not None and latency > HELPED * fell_from[1]:
            self.limit = fell_from[0]
            self._alone, self._apart = latency, latency / self.limit
            self._begin_round()
        elif self._alone and latency > WELL_ABOVE * self._past_mean() + FLOOR:
            self._slow_rounds += 1
            if self._slow_rounds < 2:
                self._begin_round()
            else:
                self._fall(latency)
        else:
            self._slow_rounds = 0
            self._alone = _followed(self._alone, latency)
            self._apart = _followed(self._apart, latency / self.limit)
            self._rise()

    def _past_mean(self) -> float:
        return max(self._alone, self._apart * self.limit)

    def _rise(self) -> None:
        if self._starting:
            before = self.limit
            self.limit = min(max(before + 1, before * 3 // 2), self._good)
            self._starting = self.limit < self._good
            self._begin_round(old=before)
        else:
            self._good = self.limit
            self.limit = min(self.limit + 1, self._most)
            self._begin_round()

    def _fall(self, latency: float | None = None) -> None:
        """Without `latency` it was transient answers: this is not taken back."""
        before = self.limit
        self.limit = max(1, before * 3 // 4)
        if self._starting:
            self._starting, self._good = False, self.limit
        self._slow_rounds = 0
        self._fell_from = None if latency is None else (before, latency)
        self._fell_at = self._clock()
        self._begin_round(old=before)


def _followed(past: float, now: float) -> float:
    weight = BETTER if now < past else WORSE
    return past + weight * (now - past) if past else now
