"""The gate: breaker and holds in one answer, what it logs, and that it wakes by itself."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from common.control_plane.breaker import FAILURES, MANY
from common.control_plane.gate import NOT_FOUND_STREAK, Gate, Ticket


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **facts: Any) -> None:
        self.lines.append((event, facts))

    warning = info

    @property
    def events(self) -> list[str]:
        return [event.removeprefix("control_plane.") for event, _ in self.lines]


class Notes:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.causes: list[str] = []
        self.connections: list[bool] = []

    def request(self, endpoint: str, status: str, seconds: float) -> None: ...
    def retry(self, endpoint: str, cause: str) -> None: ...
    def breaker_state(self, state: int) -> None:
        self.states.append(state)

    def breaker_opened(self, cause: str) -> None:
        self.causes.append(cause)

    def connected(self, connected: bool) -> None:
        self.connections.append(connected)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A gate with everything it touches."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.log = Log()
        self.notes = Notes()
        self.gate = Gate(clock=self.clock, random=Random(1), logger=self.log, observer=self.notes)

    def enter(self) -> Ticket:
        ticket = self.gate.enter()
        assert ticket is not None
        return ticket

    def fail(self, times: int = FAILURES) -> None:
        for _ in range(times):
            self.gate.failed(self.enter(), "status", "answered 503")

    def refuse(self) -> None:
        self.gate.refused(self.enter(), "auth", "answered 403")

    def deliver(self) -> None:
        self.gate.delivered(self.enter())

    def miss(self, first: int, count: int) -> list[bool]:
        return [self.gate.not_found(self.enter(), f"s{first + n}", 404) for n in range(count)]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_all_is_well_at_first(stage: Stage) -> None:
    assert stage.gate.open
    assert stage.gate.permits() == MANY
    assert stage.gate.hold is None


def test_an_outage_logs_two_lines_however_often_the_probe_fails(stage: Stage) -> None:
    stage.fail()
    for _ in range(20):
        stage.clock.now += 10
        stage.fail(1)
    stage.clock.now += 10
    stage.deliver()
    assert stage.log.lines == [
        ("control_plane.unreachable", {"cause": "status", "error": "answered 503"}),
        ("control_plane.recovered", {"down_seconds": 210.0}),
    ]
    assert stage.notes.causes == ["status"] * 21
    assert stage.notes.states == [2, *([1, 2] * 20), 1, 0]
    assert stage.notes.connections == [*([False] * 21), True]


def test_a_refusal_begins_a_hold_and_nothing_may_be_sent(stage: Stage) -> None:
    stage.refuse()
    assert not stage.gate.open
    assert stage.gate.permits() == 0
    assert stage.gate.enter() is None
    assert stage.gate.hold is not None
    assert (stage.gate.hold.kind, stage.gate.hold.detail) == ("auth", "answered 403")
    assert not stage.gate.connected


def test_periodic_calls_go_despite_a_hold(stage: Stage) -> None:
    stage.refuse()
    assert stage.gate.enter(despite_hold=True) is not None


def test_a_hold_logs_two_lines_the_second_with_the_first_verdict_after_it(stage: Stage) -> None:
    stage.refuse()
    for _ in range(5):  # the probe passes, and entries are refused all the same
        stage.clock.now += 30
        stage.gate.lift()
        stage.refuse()
    assert stage.log.events == ["held"]
    stage.gate.lift()
    stage.deliver()
    assert stage.log.lines[1:] == [("control_plane.resumed", {"kind": "auth", "held_seconds": 150.0})]


def test_a_hold_of_another_kind_before_the_first_verdict_is_said_too(stage: Stage) -> None:
    stage.refuse()
    stage.gate.lift()
    stage.gate.refused(stage.enter(), "configuration", "answered 302 to http://elsewhere")
    assert stage.log.events == ["held", "held"]
    assert stage.log.lines[-1][1] == {"kind": "configuration", "detail": "answered 302 to http://elsewhere"}
    stage.gate.lift()
    stage.deliver()
    assert stage.log.events == ["held", "held", "resumed"]
    assert stage.log.lines[-1][1]["kind"] == "configuration"


def test_a_passed_probe_lifts_the_hold(stage: Stage) -> None:
    stage.refuse()
    stage.gate.lift()
    assert stage.gate.open
    assert stage.gate.connected
    assert stage.gate.permits() == MANY


def test_refusals_of_requests_from_before_the_hold_do_not_renew_it(stage: Stage) -> None:
    early, late, later = stage.enter(), stage.enter(), stage.enter()
    stage.gate.refused(early, "auth", "answered 403")
    stage.gate.refused(late, "configuration", "answered 301")
    assert stage.gate.hold is not None
    assert stage.gate.hold.kind == "auth"
    stage.gate.lift()
    stage.gate.refused(later, "auth", "answered 403")
    assert stage.gate.hold is None
    stage.refuse()
    assert stage.gate.hold is not None


def test_a_delivery_from_before_the_hold_does_not_end_it(stage: Stage) -> None:
    early = stage.enter()
    stage.refuse()
    stage.gate.delivered(early)
    assert stage.gate.hold is not None
    assert stage.log.events == ["held"]


def test_refusals_and_verdicts_are_successes_for_the_breaker(stage: Stage) -> None:
    for end in (
        stage.refuse,
        stage.deliver,
        lambda: stage.gate.decided(stage.enter()),
        lambda: stage.miss(0, 1),
    ):
        stage.fail(FAILURES - 1)
        end()
        stage.gate.lift()
        assert stage.gate.breaker.state == "closed"


def test_a_refused_certificate_is_a_hold_and_no_news_for_the_breaker(stage: Stage) -> None:
    stage.fail()
    stage.clock.now += 10
    stage.gate.unsent(stage.enter(), "auth", "TLS: expired")
    assert stage.gate.hold is not None
    assert stage.gate.breaker.state == "half_open"
    stage.gate.lift()
    assert stage.gate.permits() == 1


def test_twenty_sessions_not_found_in_a_row_are_a_hold(stage: Stage) -> None:
    assert stage.miss(0, NOT_FOUND_STREAK - 1) == [False] * (NOT_FOUND_STREAK - 1)
    assert stage.gate.open
    assert stage.miss(NOT_FOUND_STREAK - 1, 1) == [True]
    assert stage.gate.hold is not None
    assert stage.gate.hold.kind == "configuration"
    assert stage.gate.hold.detail == "answered 404 for 20 sessions in a row"


def test_one_session_not_found_often_is_no_streak(stage: Stage) -> None:
    assert not any(stage.gate.not_found(stage.enter(), "s", 404) for _ in range(100))
    assert stage.gate.open


def test_a_delivery_between_ends_the_streak(stage: Stage) -> None:
    stage.miss(0, NOT_FOUND_STREAK - 1)
    stage.deliver()
    assert not any(stage.miss(0, NOT_FOUND_STREAK - 1))
    assert stage.gate.open


def test_after_the_probe_the_next_session_not_found_renews_the_hold(stage: Stage) -> None:
    stage.miss(0, NOT_FOUND_STREAK)
    stage.gate.lift()
    assert stage.gate.open
    assert stage.miss(100, 1) == [True]
    assert stage.gate.hold is not None
    stage.gate.lift()
    stage.deliver()
    assert stage.miss(200, 1) == [False]
    assert stage.log.events == ["held", "resumed"]


async def loop_stage() -> Stage:
    """A stage on the event loop's own clock, with the shortest pauses there are."""
    stage = Stage()
    clock = asyncio.get_running_loop().time

    class Lowest(Random):
        def random(self) -> float:
            return 0.0

    stage.gate = Gate(clock=clock, random=Lowest(), logger=stage.log, observer=stage.notes)
    return stage


async def test_wait_wakes_when_the_pause_has_passed() -> None:
    stage = await loop_stage()
    stage.fail()
    assert stage.gate.permits() == 0
    await asyncio.wait_for(stage.gate.wait(), 5)
    assert stage.gate.permits() == 1


async def test_wait_returns_although_the_pause_ends_between_two_looks_at_the_clock() -> None:
    """A loop's clock goes on within one step: what says "not yet" may be followed by "nothing remains"."""
    moments = [0.0]
    gate = Gate(
        clock=lambda: moments.pop(0) if len(moments) > 1 else moments[0], random=Random(1), logger=Log()
    )
    for _ in range(FAILURES):
        gate.failed(Ticket(0, 0), "connection", "gone")
    assert gate.breaker.open_until is not None
    moments[:] = [gate.breaker.open_until - 0.001, gate.breaker.open_until]
    async with asyncio.timeout(1):
        await gate.wait()


async def test_wait_wakes_when_the_probe_slot_frees_or_the_breaker_closes() -> None:
    stage = await loop_stage()
    stage.fail()
    await stage.gate.wait()
    probe = stage.enter()
    waiting = [asyncio.create_task(stage.gate.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    stage.gate.abandoned(probe)
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    waiting = [asyncio.create_task(stage.gate.wait()) for _ in range(3)]
    stage.gate.delivered(stage.enter())
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert stage.gate.open


async def test_wait_wakes_when_a_hold_lifts() -> None:
    stage = await loop_stage()
    stage.refuse()
    waiting = asyncio.create_task(stage.gate.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    stage.gate.lift()
    await asyncio.wait_for(waiting, 5)


async def test_wait_returns_at_once_while_all_is_well() -> None:
    stage = await loop_stage()
    await asyncio.wait_for(stage.gate.wait(), 5)


async def test_a_pause_ends_early_when_the_gate_closes() -> None:
    stage = await loop_stage()
    pausing = asyncio.create_task(stage.gate.pause(1000))
    await asyncio.sleep(0)
    stage.refuse()
    assert await asyncio.wait_for(pausing, 5) is False


async def test_a_pause_ends_early_when_the_gate_is_stopped() -> None:
    stage = await loop_stage()
    pausing = asyncio.create_task(stage.gate.pause(1000))
    await asyncio.sleep(0)
    stage.gate.stop()
    assert await asyncio.wait_for(pausing, 5) is False


async def test_an_undisturbed_pause_lasts_its_time() -> None:
    stage = await loop_stage()
    begun = asyncio.get_running_loop().time()
    assert await stage.gate.pause(0.02) is True
    assert asyncio.get_running_loop().time() - begun >= 0.02


async def test_probes_go_after_one_second_doubling_to_thirty_until_a_verdict() -> None:
    stage = Stage()
    stage.refuse()

    async def timed() -> float:
        """How long the gate's clock must move before the pause is over."""
        begun = stage.clock.now
        pausing = asyncio.create_task(stage.gate.pause_on_hold())
        while not pausing.done():
            await asyncio.sleep(0)
            stage.clock.now += 0.5
            stage.gate._wake()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert pausing.result()
        return stage.clock.now - begun

    pauses = [await timed() for _ in range(7)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30], abs=1)
    stage.gate.lift()
    stage.refuse()
    assert await timed() == pytest.approx(30, abs=1)  # no verdict between: the count goes on
    stage.gate.lift()
    stage.deliver()
    stage.refuse()
    assert await timed() == pytest.approx(1, abs=1)


async def test_who_waits_for_a_hold_is_told_of_it_or_of_the_stop() -> None:
    stage = await loop_stage()
    waiting = asyncio.create_task(stage.gate.wait_for_hold())
    await asyncio.sleep(0)
    stage.refuse()
    assert await asyncio.wait_for(waiting, 5) is stage.gate.hold
    stage.gate.lift()
    waiting = asyncio.create_task(stage.gate.wait_for_hold())
    await asyncio.sleep(0)
    stage.gate.stop()
    assert await asyncio.wait_for(waiting, 5) is None
