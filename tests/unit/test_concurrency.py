"""The level, on a clock that only tests move, and beside model ControlPlanes."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.concurrency import IDLE, START, Level

MOST = 64


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Plane = Callable[[int, float], float | None]
"""Requests it has in hand and the time, to seconds until the answer; None: it refuses."""


class Loop:
    """An agent with more than enough to send, one core, and one ControlPlane."""

    CPU = 0.00012
    REFUSAL = 0.0005

    def __init__(self, plane: Plane, fixed: int | None = None) -> None:
        self.clock = Clock()
        self.level = Level(fixed or MOST, self.clock, start=fixed or START)
        self.delivered = self.refused = 0
        self._plane = plane
        self._fixed = fixed
        self._out: list[tuple[float, int, float, bool]] = []
        self._order = count()
        self._busy_until = 0.0

    def run(self, seconds: float) -> float:
        """Answers a second."""
        until, delivered = self.clock.now + seconds, self.delivered
        while self.clock.now < until:
            while len(self._out) < (self._fixed or self.level.limit):
                self._send()
            self.clock.now, _, begun, accepted = heappop(self._out)
            self.level.ended()
            took = self.clock.now - begun
            if accepted:
                self.delivered += 1
                self.level.answered(took)
            else:
                self.refused += 1
                self.level.strained(took)
        return (self.delivered - delivered) / seconds

    def _send(self) -> None:
        self.level.begun()
        begun = self._busy_until = max(self.clock.now, self._busy_until) + self.CPU
        seconds = self._plane(len(self._out) + 1, begun)
        answer_at = begun + (self.REFUSAL if seconds is None else seconds)
        heappush(self._out, (answer_at, next(self._order), begun, seconds is not None))


def near_or_far(seconds: float) -> Plane:
    return lambda in_hand, now: seconds


def degrading(seconds: float, above: int) -> Plane:
    return lambda in_hand, now: seconds * max(1.0, in_hand / above) ** 2


def refusing(seconds: float, above: int) -> Plane:
    return lambda in_hand, now: seconds if in_hand <= above else None


def one_by_one(seconds: float) -> Plane:
    """It works on one request after the other: the others wait."""
    free_at = 0.0

    def answer(in_hand: int, now: float) -> float:
        nonlocal free_at
        free_at = max(free_at, now) + seconds
        return free_at - now

    return answer


def at_times_failing(seconds: float, share: float) -> Plane:
    random = Random(7)
    return lambda in_hand, now: seconds if random.random() >= share else None


def answer(level: Level, clock: Clock, seconds: float = 0.01, times: int = 1) -> None:
    """So many answers while the level is reached all the time."""
    for _ in range(times):
        while level.out < level.limit:
            level.begun()
        clock.now += seconds / level.limit
        level.ended()
        level.answered(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def level(clock: Clock) -> Level:
    return Level(MOST, clock)


Happening = tuple[str, float]
happenings = st.lists(
    st.tuples(
        st.sampled_from(["begun", "answered", "strained", "passed", "begin_again"]), st.floats(0.0, 40.0)
    ),
    max_size=400,
)


@given(most=st.integers(1, 200), happenings=happenings)
def test_the_level_stays_between_one_and_its_bound(most: int, happenings: list[Happening]) -> None:
    clock = Clock()
    level = Level(most, clock)
    for what, seconds in happenings:
        clock.now += seconds / 100
        if what == "begun":
            level.begun()
        elif what == "begin_again":
            level.begin_again()
        elif level.out:
            level.ended()
            if what == "answered":
                level.answered(seconds)
            elif what == "strained":
                level.strained(seconds)
        assert 1 <= level.limit <= most
        assert level.out >= 0


@given(
    seconds=st.floats(0.0005, 0.5),
    most=st.integers(1, 100),
)
def test_a_steady_control_plane_gets_all_there_may_be(seconds: float, most: int) -> None:
    clock = Clock()
    level = Level(most, clock)
    answer(level, clock, seconds, times=100 * most)
    assert level.limit == most


def test_it_begins_with_a_few_and_rises_by_half(level: Level, clock: Clock) -> None:
    levels = []
    for _ in range(200):
        if level.limit not in levels:
            levels.append(level.limit)
        answer(level, clock)
    assert levels[:5] == [START, 6, 9, 13, 19]


def test_it_does_not_rise_while_fewer_are_needed(level: Level, clock: Clock) -> None:
    for _ in range(1000):
        level.begun()
        clock.now += 0.01
        level.ended()
        level.answered(0.01)
    assert level.limit == START


def test_it_shrinks_to_twice_what_is_needed_and_no_further(level: Level, clock: Clock) -> None:
    answer(level, clock, times=2000)
    while level.out > 40:
        level.ended()
    for _ in range(5000):
        clock.now += 0.01 / 40
        level.ended()
        level.answered(0.01)
        level.begun()
    assert level.limit == MOST
    while level.out > 8:
        level.ended()
    for _ in range(10_000):
        clock.now += 0.01 / 8
        level.ended()
        level.answered(0.01)
        level.begun()
    assert level.limit == 16


def test_verdicts_on_entries_do_not_count(level: Level, clock: Clock) -> None:
    for _ in range(1000):
        level.begun()
        clock.now += 0.01
        level.ended()
    assert level.limit == START
    answer(level, clock, times=2000)
    for _ in range(1000):
        level.begun()
        level.ended()
    assert level.limit == MOST


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.2])
def test_near_and_far_it_is_as_fast_as_the_best_fixed_level(seconds: float) -> None:
    best = max(Loop(near_or_far(seconds), fixed).run(4) for fixed in (1, 8, 16, 64))
    adaptive = Loop(near_or_far(seconds))
    adaptive.run(4)
    assert adaptive.run(4) >= 0.95 * best


@pytest.mark.parametrize("plane", [degrading, refusing])
@pytest.mark.parametrize("seconds", [0.02, 0.05])
def test_a_control_plane_that_gives_way_is_not_pushed_over(
    plane: Callable[[float, int], Plane], seconds: float
) -> None:
    best = max(Loop(plane(seconds, 16), fixed).run(4) for fixed in (1, 8, 16, 64))
    adaptive = Loop(plane(seconds, 16))
    adaptive.run(6)
    assert adaptive.run(10) >= 0.8 * best


def test_a_queue_that_only_becomes_longer_costs_no_throughput() -> None:
    adaptive = Loop(one_by_one(0.002))
    adaptive.run(2)
    assert adaptive.run(4) >= 475


def test_a_control_plane_that_becomes_slower_by_itself_gets_no_fewer() -> None:
    slower_at = 1004.0
    adaptive = Loop(lambda in_hand, now: 0.02 if now < slower_at else 0.1)
    adaptive.run(6)
    assert adaptive.run(4) >= 0.95 * MOST / 0.1
    assert adaptive.level.limit == MOST


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_failures_that_do_not_depend_on_the_level_do_not_hold_it_down(share: float) -> None:
    adaptive = Loop(at_times_failing(0.02, share))
    adaptive.run(10)
    assert adaptive.run(10) >= 0.8 * MOST / 0.02 * (1 - share)


def test_where_much_fails_it_goes_down_to_the_ground() -> None:
    adaptive = Loop(at_times_failing(0.02, 0.6))
    adaptive.run(10)
    assert adaptive.level.limit <= START


def test_after_an_outage_it_begins_with_a_few_and_comes_back_to_the_last_good_level(
    level: Level, clock: Clock
) -> None:
    answer(level, clock, times=2000)
    while level.out:
        level.ended()
    level.begin_again()
    assert level.limit == START
    answer(level, clock, times=2 * MOST)
    assert START < level.limit < MOST
    answer(level, clock, times=10 * MOST)
    assert level.limit == MOST


def test_what_is_out_still_when_it_begins_again_is_not_counted(level: Level, clock: Clock) -> None:
    answer(level, clock, times=2000)
    while level.out > 10:
        level.ended()
    level.begin_again()
    assert level.limit == START + 10


def test_when_the_connections_are_gone_it_begins_with_a_few(level: Level, clock: Clock) -> None:
    answer(level, clock, times=2000)
    while level.out:
        level.ended()
    clock.now += IDLE - 1
    level.begun()
    assert level.limit == MOST
    level.ended()
    clock.now += IDLE + 1
    level.begun()
    assert level.limit == START


def test_an_answer_to_a_request_of_another_level_says_nothing(level: Level, clock: Clock) -> None:
    answer(level, clock, times=2000)
    while level.limit == MOST:
        level.begun()
        level.ended()
        level.strained(0.0)
    fallen = level.limit
    assert fallen < MOST
    for _ in range(50):
        level.begun()
        clock.now += 0.001
        level.ended()
        level.strained(10.0)
    assert level.limit == fallen
