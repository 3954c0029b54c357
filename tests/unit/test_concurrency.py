"""The level of requests in flight, on a clock that only tests move, and beside model ControlPlanes."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.concurrency import IDLE, LONGEST_REST, START, STEP, Level
from common.control_plane.breaker import FAILURES

MOST = 64
ABOVE = 16
"""Requests at once above which the models that give way do so."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Plane = Callable[[int, float], float | None]
"""Requests it has in hand and the time, to seconds until the answer; None: it refuses."""


class Loop:
    """An agent with more than enough to send, one core, a breaker, and one ControlPlane."""

    CPU = 0.00012
    REFUSAL = 0.0005
    PAUSE = 0.3

    def __init__(self, plane: Plane, fixed: int | None = None) -> None:
        self.clock = Clock()
        self.level = Level(fixed or MOST, self.clock)
        self.delivered = self.refused = 0
        self._plane = plane
        self._fixed = fixed
        self._out: list[tuple[float, int, float, bool]] = []
        self._order = count()
        self._busy_until = 0.0
        self._failures = 0
        self._open_until = 0.0

    def run(self, seconds: float) -> float:
        """Answers a second."""
        until, delivered = self.clock.now + seconds, self.delivered
        while self.clock.now < until:
            while self.clock.now >= self._open_until and len(self._out) < (self._fixed or self.level.limit):
                self._send()
            if not self._out:
                self.clock.now = self._open_until
                continue
            self.clock.now, _, begun, accepted = heappop(self._out)
            self.level.ended(self.clock.now - begun, refused=not accepted)
            self._count(accepted, begun)
        return (self.delivered - delivered) / seconds

    def _count(self, accepted: bool, begun: float) -> None:
        if accepted:
            self.delivered += 1
            self._failures = 0
            return
        self.refused += 1
        self._failures += 1
        if self._failures >= FAILURES and begun >= self._open_until:
            self._failures = 0
            self._open_until = self.clock.now + self.PAUSE
            self.level.begin_again()

    def _send(self) -> None:
        self.level.begun()
        begun = self._busy_until = max(self.clock.now, self._busy_until) + self.CPU
        seconds = self._plane(len(self._out) + 1, begun)
        answer_at = begun + (self.REFUSAL if seconds is None else seconds)
        heappush(self._out, (answer_at, next(self._order), begun, seconds is not None))


def near_or_far(seconds: float) -> Plane:
    return lambda in_hand, now: seconds


def degrading(seconds: float) -> Plane:
    return lambda in_hand, now: seconds * max(1.0, in_hand / ABOVE) ** 2


def refusing(seconds: float) -> Plane:
    return lambda in_hand, now: seconds if in_hand <= ABOVE else None


def at_times_failing(seconds: float, share: float) -> Plane:
    random = Random(7)
    return lambda in_hand, now: seconds if random.random() >= share else None


def noisy(seconds: float) -> Plane:
    """A machine whose pace changes from one half second to the next, by up to three times."""
    random = Random(7)
    paces = [1 + 2 * random.random() for _ in range(1000)]
    return lambda in_hand, now: seconds * paces[int(now * 2) % 1000]


def best_fixed(plane: Callable[[], Plane]) -> float:
    return max(Loop(plane(), fixed).run(4) for fixed in (1, 8, 16, 64))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_begins_with_a_few_and_rises_by_half_every_step_up_to_the_bound(clock: Clock) -> None:
    level = Level(MOST, clock)
    seen = []
    for _ in range(9):
        seen.append(level.limit)
        clock.now += STEP
    assert seen == [START, 6, 9, 13, 20, 30, 45, 64, 64]


def test_it_begins_anew_when_nothing_may_be_sent(clock: Clock) -> None:
    level = Level(MOST, clock)
    clock.now += 10
    assert level.limit == MOST
    level.begin_again()
    assert level.limit == START


def test_it_begins_anew_after_the_connections_have_idled_away_and_not_before(clock: Clock) -> None:
    level = Level(MOST, clock)
    for pause, limit in ((IDLE / 2, MOST), (IDLE + 0.1, START)):
        level.begun()
        level.ended(0.01, refused=False)
        clock.now += 1
        assert level.limit == MOST
        clock.now += pause - 1
        level.begun()
        assert level.limit == limit
        level.ended(0.01, refused=False)


def test_silent_requests_do_not_keep_it_down(clock: Clock) -> None:
    level = Level(MOST, clock)
    for _ in range(START):
        level.begun()
    clock.now += 1
    assert level.limit == MOST


def test_while_there_is_little_to_send_nothing_is_tried(clock: Clock) -> None:
    level = Level(MOST, clock)
    clock.now += 1
    for _ in range(10_000):
        assert level.limit == MOST
        level.begun()
        clock.now += 0.01
        level.ended(0.01, refused=False)


def test_refusals_and_pauses_with_little_to_send_do_not_lower_it(clock: Clock) -> None:
    level = Level(MOST, clock)
    for number in range(100):
        level.begun()
        clock.now += 0.01
        level.ended(0.01, refused=number % 3 == 0)
        if number % 3 == 0:
            level.begin_again()
        clock.now += 2 * IDLE * (number % 2)
    clock.now += 1
    assert level.limit == MOST


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.2])
def test_near_and_far_it_carries_what_the_best_fixed_level_does(seconds: float) -> None:
    adaptive = Loop(near_or_far(seconds))
    adaptive.run(4)
    assert adaptive.run(60) >= 0.95 * best_fixed(lambda: near_or_far(seconds))


@pytest.mark.parametrize("plane", [degrading, refusing])
@pytest.mark.parametrize("seconds", [0.005, 0.02, 0.05])
def test_a_control_plane_that_gives_way_is_not_pushed_over(
    plane: Callable[[float], Plane], seconds: float
) -> None:
    adaptive = Loop(plane(seconds))
    adaptive.run(15)
    assert adaptive.run(60) >= 0.8 * best_fixed(lambda: plane(seconds))


def test_of_one_that_refuses_few_are_refused_in_the_end() -> None:
    adaptive = Loop(refusing(0.02))
    adaptive.run(60)
    before = adaptive.delivered, adaptive.refused
    adaptive.run(60)
    assert adaptive.refused - before[1] < 0.02 * (adaptive.delivered - before[0])


def test_one_that_gives_way_later_is_noticed_and_so_is_its_recovery() -> None:
    weak_from, weak_until = 1030.0, 1120.0
    adaptive = Loop(
        lambda in_hand, now: (degrading if weak_from <= now < weak_until else near_or_far)(0.02)(in_hand, now)
    )
    adaptive.run(45)
    assert adaptive.run(60) >= 0.8 * best_fixed(lambda: degrading(0.02))
    adaptive.run(weak_until - adaptive.clock.now + LONGEST_REST + 10)
    assert adaptive.run(20) >= 0.9 * MOST / 0.02


def test_one_that_is_slow_for_a_while_gets_no_fewer() -> None:
    adaptive = Loop(lambda in_hand, now: 0.02 if now < 1010 or now > 1070 else 1.3)
    adaptive.run(20)
    assert adaptive.run(40) >= 0.85 * MOST / 1.3
    adaptive.run(20)
    assert adaptive.run(20) >= 0.95 * MOST / 0.02


@pytest.mark.parametrize("seconds", [0.02, 0.2])
def test_where_the_pace_changes_all_the_time_it_carries_nearly_what_a_fixed_level_does(
    seconds: float,
) -> None:
    adaptive = Loop(noisy(seconds))
    adaptive.run(10)
    assert adaptive.run(120) >= 0.8 * Loop(noisy(seconds), MOST).run(130)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_failures_that_do_not_depend_on_the_level_do_not_hold_it_down(share: float) -> None:
    adaptive, fixed = Loop(at_times_failing(0.02, share)), Loop(at_times_failing(0.02, share), MOST)
    adaptive.run(10)
    assert adaptive.run(60) >= 0.8 * fixed.run(60)


def test_after_an_outage_it_comes_back_to_where_it_was() -> None:
    adaptive = Loop(lambda in_hand, now: None if 1010 <= now < 1040 else 0.02)
    adaptive.run(50)
    assert adaptive.run(10) >= 0.95 * MOST / 0.02


Happening = tuple[str, float]
happenings = st.lists(
    st.tuples(
        st.sampled_from(["begun", "answered", "refused", "passed", "begin_again"]), st.floats(0.0, 40.0)
    ),
    max_size=400,
)


@given(most=st.integers(1, 200), happenings=happenings)
def test_it_stays_between_one_and_its_bound(most: int, happenings: list[Happening]) -> None:
    clock = Clock()
    level = Level(most, clock)
    for what, seconds in happenings:
        clock.now += seconds / 100
        if what == "begun":
            level.begun()
        elif what == "begin_again":
            level.begin_again()
        elif level.out and what in ("answered", "refused"):
            level.ended(seconds, refused=what == "refused")
        assert 1 <= level.limit <= most
        assert level.out >= 0
