"""The arithmetic of measuring: percentiles, the steady part of a run, what a counter says in between. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import NamedTuple

STEADY = (0.1, 0.95)
"""Which part of a run counts: neither the start of the process nor the last stragglers."""

Arrivals = Sequence[tuple[float, int]]
"""When the receiver answered a request, in Unix seconds, and how many records it carried."""

Samples = Sequence[tuple[float, float]]
"""A counter that only grows, read now and then: Unix seconds, value."""


class Window(NamedTuple):
    """The steady part of a run."""

    begin: float
    end: float
    records: int

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.records / max(self.end - self.begin, 1e-3)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0


def steady(arrivals: Arrivals, part: tuple[float, float] = STEADY) -> Window:
    """The window between two shares of all records."""
    ordered = sorted(arrivals)
    reached = list(accumulate(records for _, records in ordered))
    first, last = (bisect_left(reached, share * reached[-1]) for share in part)
    return Window(ordered[first][0], ordered[last][0], reached[last] - reached[first])


def value_at(samples: Samples, moment: float) -> float:
    """What the counter said at this moment, on the line between the readings before and after it."""
    after = bisect_left(samples, (moment, float("-inf")))
    if after == 0 or after == len(samples):
        return samples[min(after, len(samples) - 1)][1]
    (t0, v0), (t1, v1) = samples[after - 1], samples[after]
    return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)


def grown(samples: Samples, window: Window) -> float:
    """By how much the counter grew in the window."""
    return value_at(samples, window.end) - value_at(samples, window.begin)


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def paired_ratio(these: Sequence[dict[str, float]], those: Sequence[dict[str, float]], figure: str) -> float:
    """The median over the rounds of these by those: both of one round had the same machine."""
    return median(a[figure] / b[figure] for a, b in zip(these, those, strict=True))
