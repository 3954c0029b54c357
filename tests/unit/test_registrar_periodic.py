"""Laws of the tick: at its time, only while it may, and never ended by an error."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from registrar.commands import JITTER, jittered
from registrar.periodic import every, rfc3339, until


class Ticks:
    """Counts its ticks, stops after `last`, and tells the clock how long each took."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0
        self.stopping = asyncio.Event()
        self.ticked = asyncio.Event()

    async def tick(self) -> None:
        self.count += 1
        self.ticked.set()
        if self.count == self.last:
            self.stopping.set()


async def test_it_ticks_until_the_service_stops() -> None:
    ticks = Ticks(last=3)
    clock = asyncio.get_running_loop().time
    await every(lambda: 0.0, ticks.tick, stopping=ticks.stopping, clock=clock)
    assert ticks.count == 3


async def test_a_stop_cuts_the_wait_between_two_ticks_short() -> None:
    ticks = Ticks(last=99)
    clock = asyncio.get_running_loop().time
    run = asyncio.create_task(every(lambda: 3600.0, ticks.tick, stopping=ticks.stopping, clock=clock))
    await ticks.ticked.wait()
    ticks.stopping.set()
    await asyncio.wait_for(run, 1)


async def test_the_time_a_tick_took_is_part_of_its_interval() -> None:
    ticks, waits = Ticks(last=2), [100.0, 103.0, 200.0, 300.0]

    async def quick(*_: object, seconds: float | None = None) -> None:
        waited.append(seconds)

    waited: list[float | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registrar.periodic.until", quick)
        await every(lambda: 10.0, ticks.tick, stopping=ticks.stopping, clock=iter(waits).__next__)
    assert waited == [7.0, 0.0]


async def test_it_ticks_only_while_all_its_conditions_hold() -> None:
    ticks, turn, registered = Ticks(last=1), asyncio.Event(), asyncio.Event()
    clock = asyncio.get_running_loop().time
    run = asyncio.create_task(
        every(lambda: 0.0, ticks.tick, stopping=ticks.stopping, clock=clock, when=(turn, registered))
    )
    turn.set()
    await asyncio.sleep(0)
    turn.clear()
    registered.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert ticks.count == 0
    turn.set()
    await asyncio.wait_for(run, 1)
    assert ticks.count == 1


async def test_a_tick_that_raises_does_not_end_the_others() -> None:
    ticks = Ticks(last=3)
    clock = asyncio.get_running_loop().time

    async def stumbling() -> None:
        await ticks.tick()
        raise RuntimeError("oops")

    await every(lambda: 0.0, stumbling, stopping=ticks.stopping, clock=clock)
    assert ticks.count == 3


async def test_until_returns_at_the_first_event_or_when_the_time_has_passed() -> None:
    one, other = asyncio.Event(), asyncio.Event()
    other.set()
    await asyncio.wait_for(until(one, other), 1)
    await asyncio.wait_for(until(one, seconds=0.001), 1)
    await asyncio.wait_for(until(one, seconds=0.0), 1)


def test_the_poll_varies_by_a_tenth_around_its_interval() -> None:
    random = Random(7)
    waits = [jittered(60.0, random) for _ in range(1000)]
    assert 60 * (1 - JITTER) <= min(waits) < 55
    assert 65 < max(waits) <= 60 * (1 + JITTER)


def test_timestamps_are_utc_with_milliseconds() -> None:
    assert rfc3339(1_900_000_000.1234) == "2030-03-17T17:46:40.123Z"
