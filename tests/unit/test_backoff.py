"""The schedules of backoff, as properties."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from common.control_plane.backoff import park_delay, quick_delay

seeds = st.integers(0, 2**32).map(Random)


class Highest(Random):
    """The greatest delay there is."""

    def random(self) -> float:
        return 1.0


class Lowest(Random):
    """The least delay there is."""

    def random(self) -> float:
        return 0.0


@given(st.integers(-5, 10**6), seeds, st.floats(0, 1000))
def test_a_quick_delay_is_within_max_backoff(retry: int, random: Random, ceiling: float) -> None:
    assert 0 <= quick_delay(retry, random, ceiling) <= ceiling


def test_quick_delays_double_from_a_tenth_of_a_second() -> None:
    assert [quick_delay(retry, Highest(), 0.3) for retry in (1, 2, 3)] == [0.1, 0.2, 0.3]
    assert quick_delay(1, Lowest(), 10) == 0


@given(st.integers(-5, 10**6), seeds)
def test_a_parked_entry_waits_between_three_quarters_of_a_second_and_a_minute(
    attempt: int, random: Random
) -> None:
    assert 0.75 <= park_delay(attempt, random) <= 60


def test_parked_entries_wait_twice_as_long_each_time() -> None:
    nothing_taken_off = [park_delay(attempt, Lowest()) for attempt in range(1, 10)]
    assert nothing_taken_off == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert park_delay(1, Highest()) == 0.75
