"""Laws of the heartbeat: a 404 registers again, and it is the first to probe when the breaker is not closed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from common.control_plane.errors import BreakerOpen, ControlPlaneError, NotFound, Transient
from registrar.heartbeat import Heartbeat


class Scene:
    """A heartbeat between a client, a registration and an overview that only remember."""

    def __init__(self, *answers: ControlPlaneError | None) -> None:
        self.answers = list(answers)
        self.beats = 0
        self.heard: list[str] = []
        self.stopping = asyncio.Event()
        self.breaker = SimpleNamespace(state="closed")
        running: Any = SimpleNamespace(
            client=SimpleNamespace(heartbeat=self._answer, last_success=None),
            gate=SimpleNamespace(breaker=self.breaker),
            config=SimpleNamespace(monitoring=SimpleNamespace(heartbeat_interval=3600.0)),
            stopping=self.stopping,
            clock=asyncio.get_running_loop().time,
        )
        registration: Any = SimpleNamespace(
            confirmed=lambda: self.heard.append("confirmed"), lost=lambda: self.heard.append("lost")
        )
        overview: Any = SimpleNamespace(look=self._look, heartbeat=dict)
        self.heartbeat = Heartbeat(running, SimpleNamespace(), registration, overview)  # type: ignore[arg-type]

    async def _look(self) -> None: ...

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.beats += 1
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer
        return {}


@pytest.mark.parametrize(
    ("answer", "heard"),
    [(None, ["confirmed"]), (NotFound("n", status=404), ["lost"]), (Transient("t", status=503), [])],
)
async def test_a_beat_tells_whether_the_server_is_known(
    answer: ControlPlaneError | None, heard: list[str]
) -> None:
    scene = Scene(answer)
    await scene.heartbeat.beat()
    assert (scene.beats, scene.heard) == (1, heard)


async def test_a_beat_that_failed_has_no_quick_retry() -> None:
    scene = Scene(Transient("t"), None)
    await scene.heartbeat.beat()
    assert scene.beats == 1


async def test_a_beat_that_the_breaker_kept_back_probes_when_its_pause_is_over() -> None:
    scene = Scene(BreakerOpen("b", retry_after=0.001), None)
    await scene.heartbeat.beat()
    assert (scene.beats, scene.heard) == (2, ["confirmed"])


async def test_while_the_breaker_is_closed_no_call_waits_for_the_heartbeat() -> None:
    await asyncio.wait_for(Scene().heartbeat.first(), 1)


@pytest.mark.parametrize("state", ["open", "half_open"])
async def test_while_the_breaker_is_not_closed_another_call_waits_for_the_next_beat(state: str) -> None:
    scene = Scene(Transient("t"))
    scene.breaker.state = state
    call = asyncio.create_task(scene.heartbeat.first())
    await asyncio.sleep(0)
    assert not call.done()
    await scene.heartbeat.beat()
    await asyncio.wait_for(call, 1)


async def test_a_stop_ends_the_wait_for_the_heartbeat() -> None:
    scene = Scene()
    scene.breaker.state = "open"
    call = asyncio.create_task(scene.heartbeat.first())
    await asyncio.sleep(0)
    scene.stopping.set()
    await asyncio.wait_for(call, 1)
