"""The circuit breaker, on a clock that only tests move."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.control_plane.breaker import FAILURES, LEAST_SHARE, MANY, Breaker, State


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Highest(Random):
    def random(self) -> float:
        return 1.0


def admitted(breaker: Breaker) -> int:
    ticket = breaker.enter()
    assert ticket is not None
    return ticket


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.failed(admitted(breaker), "status")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock, Highest())


def test_it_opens_after_five_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    assert (breaker.state, breaker.permits()) == ("closed", MANY)
    fail(breaker, 1)
    assert (breaker.state, breaker.permits()) == ("open", 0)
    assert breaker.enter() is None


def test_a_success_between_begins_the_count_anew(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.succeeded(admitted(breaker))
    fail(breaker, FAILURES - 1)
    assert breaker.state == "closed"


def test_after_the_pause_one_request_goes_through(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 0.5
    assert (breaker.state, breaker.permits()) == ("half_open", 1)
    admitted(breaker)
    assert (breaker.state, breaker.permits()) == ("half_open", 0)
    assert breaker.enter() is None


def test_its_success_closes_the_breaker(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 0.5
    breaker.succeeded(admitted(breaker))
    assert (breaker.state, breaker.permits()) == ("closed", MANY)


def test_its_failure_opens_the_breaker_for_twice_as_long_up_to_ten_seconds(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    pauses = []
    for _ in range(8):
        pauses.append(breaker.remaining)
        clock.now += breaker.remaining
        fail(breaker, 1)
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 10, 10, 10])


def test_after_a_success_the_first_pause_is_short_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += breaker.remaining
    fail(breaker, 1)
    clock.now += breaker.remaining
    breaker.succeeded(admitted(breaker))
    fail(breaker)
    assert breaker.remaining == pytest.approx(0.5)


def test_a_probe_that_says_nothing_frees_its_slot(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 0.5
    breaker.abandoned(admitted(breaker))
    assert (breaker.state, breaker.permits()) == ("half_open", 1)


def test_answers_to_requests_from_before_it_opened_change_nothing(breaker: Breaker, clock: Clock) -> None:
    old = [admitted(breaker) for _ in range(4)]
    fail(breaker)
    pause = breaker.remaining
    breaker.succeeded(old[0])
    breaker.failed(old[1], "status")
    breaker.abandoned(old[2])
    assert (breaker.state, breaker.remaining) == ("open", pause)
    clock.now += pause
    probe = admitted(breaker)
    breaker.succeeded(old[3])
    breaker.failed(old[3], "status")
    breaker.abandoned(old[3])
    assert (breaker.state, breaker.permits()) == ("half_open", 0)
    breaker.succeeded(probe)
    assert breaker.state == "closed"


def test_it_tells_of_every_change_and_of_the_cause_of_an_opening(clock: Clock) -> None:
    heard: list[tuple[State, str]] = []
    breaker = Breaker(clock, Highest(), lambda state, cause: heard.append((state, cause)))
    fail(breaker)
    clock.now += 1
    breaker.failed(admitted(breaker), "timeout")
    clock.now += 2
    breaker.succeeded(admitted(breaker))
    assert heard == [
        ("open", "status"),
        ("half_open", ""),
        ("open", "timeout"),
        ("half_open", ""),
        ("closed", ""),
    ]


@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.sampled_from(["enter", "ok", "fail", "drop", "wait"]), st.floats(0, 12))),
)
def test_whatever_happens_it_pauses_within_bounds_and_recovers(
    seed: int, steps: list[tuple[str, float]]
) -> None:
    clock = Clock()
    breaker = Breaker(clock, Random(seed))
    tickets: list[int] = []
    for step, seconds in steps:
        permitted = breaker.permits()
        if step == "enter":
            ticket = breaker.enter()
            assert (ticket is not None) == (permitted > 0)
            if ticket is not None:
                tickets.append(ticket)
        elif step == "wait":
            clock.now += seconds
        elif tickets:
            ticket = tickets.pop(int(seconds) % len(tickets))
            was = breaker.state
            {
                "ok": breaker.succeeded,
                "fail": lambda ticket: breaker.failed(ticket, "status"),
                "drop": breaker.abandoned,
            }[step](ticket)
            if breaker.state == "open" and was != "open":
                assert 0.5 * LEAST_SHARE <= breaker.remaining <= 10
        assert (breaker.permits() == MANY) == (breaker.state == "closed")
        assert breaker.permits() in (0, 1, MANY)
    # However it stands now: with all answers in and time passed, one success closes it.
    for ticket in tickets:
        breaker.abandoned(ticket)
    clock.now += 10
    breaker.succeeded(admitted(breaker))
    assert breaker.state == "closed"
