"""The level of requests in flight: a slow start, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.concurrency import IDLE, START, STEP, Level


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_level_rises_by_half_every_step_up_to_the_bound() -> None:
    clock = Clock()
    level = Level(64, clock)
    seen = []
    for _ in range(9):
        seen.append(level.limit)
        clock.now += STEP
    assert seen == [4, 6, 9, 13, 20, 30, 45, 64, 64]


def test_it_begins_anew_when_nothing_may_be_sent() -> None:
    clock = Clock()
    level = Level(64, clock)
    clock.now += 10
    assert level.limit == 64
    level.begin_again()
    assert level.limit == START


def test_it_begins_anew_after_the_connections_have_idled_away_and_not_before() -> None:
    clock = Clock()
    level = Level(64, clock)
    for pause, limit in ((IDLE / 2, 64), (IDLE + 0.1, START)):
        level.woken()
        level.rests()
        clock.now += 1
        assert level.limit == 64
        clock.now += pause - 1
        level.woken()
        assert level.limit == limit
        level.rests()


def test_silent_requests_do_not_keep_it_down() -> None:
    clock = Clock()
    level = Level(64, clock)
    level.woken()
    clock.now += 1
    assert level.limit == 64


@given(most=st.integers(1, 500), seconds=st.lists(st.floats(0, 2), max_size=20))
def test_it_is_at_least_one_at_most_the_bound_and_never_falls_by_itself(
    most: int, seconds: list[float]
) -> None:
    clock = Clock()
    level = Level(most, clock)
    before = 1
    for pause in seconds:
        clock.now += pause
        assert before <= level.limit <= most
        before = level.limit
