"""Parking: when an entry is tried again, and when it is not."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from common.entries import Entry
from common.outcomes import Cause, Dead, Reason, Retry
from common.parking import Parking, decide

HOLD = 300.0


def entry(number: int = 1, attempts: int = 1) -> Entry:
    made = Entry(f"{number}-0".encode(), b"x", "", None, 1, 0.0)
    made.attempts = attempts
    return made


@pytest.mark.parametrize(
    ("attempts", "longest"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (100_000, 60)]
)
@pytest.mark.parametrize("cause", [Cause.TRANSIENT, Cause.UNCONFIRMED])
def test_a_failure_is_tried_again_after_a_pause_that_doubles_to_a_minute(
    attempts: int, longest: float, cause: Cause
) -> None:
    random = Random(1)
    for _ in range(50):
        delay = decide(entry(attempts=attempts), Retry(cause, "why"), 0.0, HOLD, random)
        assert isinstance(delay, float)
        assert 0.75 * longest <= delay <= longest


@pytest.mark.parametrize("cause", [Cause.TRANSIENT, Cause.UNCONFIRMED, Cause.NOT_FOUND])
def test_what_the_control_plane_asked_for_is_granted(cause: Cause) -> None:
    assert decide(entry(attempts=9), Retry(cause, "why", after=7.5), 0.0, HOLD, Random(1)) == 7.5


def test_what_is_not_found_is_held_from_its_first_such_answer_and_then_dead() -> None:
    held = entry()
    retry = Retry(Cause.NOT_FOUND, "HTTP 404", 404, response_excerpt="no such session")
    first = decide(held, retry, 1000.0, HOLD, Random(1))
    assert isinstance(first, float)
    assert held.not_found_since == 1000.0
    assert isinstance(decide(held, retry, 1000.0 + HOLD - 0.1, HOLD, Random(1)), float)
    assert decide(held, retry, 1000.0 + HOLD, HOLD, Random(1)) == Dead(
        Reason.REJECTED, "HTTP 404, for 300 s", 404, "no such session"
    )


def test_the_last_attempt_is_at_the_end_of_the_hold_and_not_after_it() -> None:
    held = entry(attempts=7)
    retry = Retry(Cause.NOT_FOUND, "HTTP 404", 404, after=600.0)
    assert decide(held, retry, 1000.0, HOLD, Random(1)) == HOLD
    assert decide(held, retry, 1000.0 + HOLD - 5, HOLD, Random(1)) == 5


def test_a_failure_in_between_neither_ends_nor_prolongs_the_hold() -> None:
    held = entry()
    decide(held, Retry(Cause.NOT_FOUND, "HTTP 404", 404), 0.0, HOLD, Random(1))
    assert isinstance(decide(held, Retry(Cause.TRANSIENT, "HTTP 503", 503), HOLD + 1, HOLD, Random(1)), float)
    assert isinstance(decide(held, Retry(Cause.NOT_FOUND, "HTTP 404", 404), HOLD + 2, HOLD, Random(1)), Dead)


class Lot:
    """A parking lot in real milliseconds, and who was woken."""

    def __init__(self) -> None:
        self.woken: list[Entry] = []
        self.changed = asyncio.Event()
        self.parking = Parking(self._wake, asyncio.get_running_loop().time)
        self.task = asyncio.create_task(self.parking.run())

    def _wake(self, one: Entry) -> None:
        self.woken.append(one)
        self.changed.set()

    async def until(self, n: int) -> list[Entry]:
        async with asyncio.timeout(5):
            while len(self.woken) < n:
                self.changed.clear()
                await self.changed.wait()
        self.task.cancel()
        return self.woken


async def test_each_wakes_at_its_time_whatever_the_order_of_parking() -> None:
    lot = Lot()
    late, soon, now = entry(1), entry(2), entry(3)
    lot.parking.park(late, 0.03)
    await asyncio.sleep(0)
    lot.parking.park(soon, 0.01)
    lot.parking.park(now, 0.0)
    assert await lot.until(3) == [now, soon, late]


async def test_who_parks_for_the_same_time_wakes_in_the_order_of_parking() -> None:
    lot = Lot()
    parked = [entry(n) for n in range(20)]
    for one in parked:
        lot.parking.park(one, 0.0)
    assert await lot.until(20) == parked


async def test_one_that_parks_for_less_wakes_before_the_one_that_was_waited_for() -> None:
    lot = Lot()
    lot.parking.park(entry(1), 3600.0)
    await asyncio.sleep(0)
    soon = entry(2)
    lot.parking.park(soon, 0.001)
    assert await lot.until(1) == [soon]
    assert len(lot.parking) == 1


async def test_what_is_lost_or_forgotten_does_not_wake() -> None:
    lot = Lot()
    lost, kept = entry(1), entry(2)
    lot.parking.park(lost, 0.0)
    lot.parking.park(kept, 0.001)
    lot.parking.remove([lost])
    assert await lot.until(1) == [kept]
    lot.parking.park(lost, 0.0)
    lot.parking.clear()
    assert len(lot.parking) == 0
