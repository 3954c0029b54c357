"""Crash points: a service that ends itself by SIGKILL at a numbered place on an entry's way.

    python -m sandbox.chaos.crash_points usage_forwarder '{"point": 7, "hit": 3}'

The service itself knows nothing of this: before it starts, the public steps that every entry goes through are
wrapped here, `Scripts.run` (each script is a step in Redis) and `Transport.send` (each request is a step toward the
ControlPlane). `hit` says at which passing of the point it ends; `poison` names a session whose requests kill it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import msgspec

from common.control_plane.transport import Transport
from common.redis_border import Scripts

When = Literal["before", "during", "after"]

REQUEST = "request"
STEPS = (
    "make_groups",
    "turn_take",
    "read",
    "take_over",
    "fetch",
    REQUEST,
    "remember",
    "settle",
    "answer",
    "bury",
    "renew",
    "hand_over",
    "turn_give_up",
    "forget_consumer",
)
"""On an entry's way, in its order: names of scripts, and the request."""


class Point(msgspec.Struct, frozen=True):
    """One place to die at: before a step, after it (nobody has seen its reply yet), or while it is under way."""

    number: int
    step: str
    when: When

    def __str__(self) -> str:
        return f"{self.number}: {self.when} {self.step}"


def _points() -> list[Point]:
    places: list[tuple[str, When]] = []
    for step in STEPS:
        places.append((step, "before"))
        if step == REQUEST:
            places.append((step, "during"))
        places.append((step, "after"))
    return [Point(number, *place) for number, place in enumerate(places, 1)]


POINTS: Sequence[Point] = _points()
OF_ALL = ("make_groups", "read", "take_over", REQUEST, "bury", "renew", "hand_over", "forget_consumer")
OWN = {
    "usage_forwarder": ("fetch", "settle"),
    "session_notifier": ("fetch", "settle", "turn_take", "turn_give_up"),
    "quota_refresher": ("fetch", "answer"),
    "registrar": ("settle", "turn_take", "turn_give_up", "remember"),
}


def points_of(service: str) -> list[Point]:
    """The points that this service can come to."""
    return [point for point in POINTS if point.step in (*OF_ALL, *OWN[service])]


class Plan(msgspec.Struct, forbid_unknown_fields=True):
    """Where to end: at the `hit`-th passing of a point, or with a request of the session `poison`."""

    point: int | None = None
    hit: int = 1
    poison: str | None = None


class Saboteur:
    """Wraps the steps and counts their passings."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._point = POINTS[plan.point - 1] if plan.point is not None else None
        self._passed = 0

    def install(self) -> None:
        run, send = Scripts.run, Transport.send

        async def run_watched(scripts: Scripts, name: str, keys: Any, args: Any) -> Any:
            self._pass(name, "before")
            reply = await run(scripts, name, keys, args)
            self._pass(name, "after")
            return reply

        async def send_watched(transport: Transport, method: str, path: str, *rest: Any, **named: Any) -> Any:
            if self._plan.poison is not None and f"/{self._plan.poison}/" in path:
                die()
            self._pass(REQUEST, "before")
            if self._reaches(REQUEST, "during"):
                sending = asyncio.create_task(send(transport, method, path, *rest, **named))
                await asyncio.wait([sending], timeout=random.uniform(0.0, 0.02))
                die()
            answer = await send(transport, method, path, *rest, **named)
            self._pass(REQUEST, "after")
            return answer

        Scripts.run = run_watched  # type: ignore[assignment, method-assign]
        Transport.send = send_watched  # type: ignore[assignment, method-assign]

    def _pass(self, step: str, when: When) -> None:
        if self._reaches(step, when):
            die()

    def _reaches(self, step: str, when: When) -> bool:
        if self._point is None or (self._point.step, self._point.when) != (step, when):
            return False
        self._passed += 1
        return self._passed >= self._plan.hit


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def main() -> int:
    """Run the named service by the plan."""
    service, plan = sys.argv[1:]
    Saboteur(msgspec.json.decode(plan, type=Plan)).install()
    sys.argv = [service]
    code: int = importlib.import_module(f"{service}.__main__").main()
    return code


if __name__ == "__main__":
    sys.exit(main())
