"""One run: faults strike step by step, and after each everything has to be well again.

    strike, hold, lift  →  wait until every entry from before has ended  →  look whether all holds  →  next

and at the end: the traffic stops, everything drains, the judge compares the books, the services are stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from common import ledger
from common.figures import StreamFigures
from sandbox.chaos import judge
from sandbox.chaos.catalogue import CATALOGUE, Fault, Scene
from sandbox.chaos.judge import DRAIN_WITHIN, SWEEP_WITHIN, Check, Judgement
from sandbox.chaos.redis_server import Kind
from sandbox.chaos.schedule import Step, steps
from sandbox.chaos.views import examine
from sandbox.chaos.world import PRODUCED, STREAMS, World

RECOVER_WITHIN = 60.0
"""Seconds after a fault was lifted in which every entry from before must have ended."""

STRIKE_WITHIN = 120.0


class Struck(msgspec.Struct):
    """One step as it went. Times in seconds from the beginning of the run."""

    number: int
    faults: list[str]
    struck_at: float
    lifted_at: float
    recovered_seconds: float | None
    seen: dict[str, dict[str, int]]
    broken: list[str]


class Impossible(msgspec.Struct, frozen=True):
    """A fault that this machine does not allow."""

    fault: str
    reason: str


class Report(msgspec.Struct):
    """Everything there is to say of one run."""

    seed: int
    minutes: float
    server: str
    steps: list[Struck]
    impossible: list[Impossible]
    judgement: Judgement

    @property
    def ok(self) -> bool:
        return self.judgement.ok


async def run(
    directory: Path,
    *,
    seed: int,
    minutes: float,
    faults: Sequence[Fault],
    kind: Kind,
    rate: float,
    say: Callable[[str], None],
) -> Report:
    """Runs one seed; everything it makes lies in the directory."""
    async with World(directory, kind, rate, seed) as world:
        impossible = [
            Impossible(fault.name, reason)
            for fault in faults
            if (reason := fault.impossible(world)) is not None
        ]
        cannot = {one.fault for one in impossible}
        possible = [fault for fault in faults if fault.name not in cannot]
        course = _Course(world, seed, say)
        world.traffic.start()
        world.grants.start()
        world.operator.start()
        if possible:
            await course.go(possible, 60 * minutes)
        judgement = await _end(world, course.broken)
        about = await world.redis.command("INFO", "server")
        report = Report(seed, minutes, _version(about), course.struck, impossible, judgement)
        stopped = await world.stop_services()
        judgement.checks.append(Check("services that did not stop with exit code 0", stopped))
        world.keep("report.json", report)
        (directory / "reconciliation.txt").write_text(judgement.reconciliation.render() + "\n")
    return report


class _Course:
    """The steps, one after the other."""

    def __init__(self, world: World, seed: int, say: Callable[[str], None]) -> None:
        self.struck: list[Struck] = []
        self._world, self._seed, self._say = world, seed, say
        self._begun = time.monotonic()

    @property
    def broken(self) -> list[str]:
        return [one for step in self.struck for one in step.broken]

    async def go(self, faults: Sequence[Fault], seconds: float) -> None:
        for step in steps(self._seed, faults):
            if time.monotonic() - self._begun >= seconds:
                return
            struck = await self._step(step)
            self.struck.append(struck)
            with (self._world.directory / "schedule.jsonl").open("ab") as schedule:
                schedule.write(msgspec.json.encode(struck) + b"\n")
            self._say(_line(struck))

    async def _step(self, step: Step) -> Struck:
        world, struck_at = self._world, time.monotonic()
        scenes = [
            Scene(world, name, step.random(self._seed, name), len(step.faults) == 1) for name in step.faults
        ]
        broken = [one for one in await asyncio.gather(*map(_strike, scenes)) if one]
        lifted, lifted_at = time.monotonic(), time.time()
        recovered = None
        if await self._recovered(lifted_at):
            recovered = round(time.monotonic() - lifted, 3)
            broken += [f"after {' and '.join(step.faults)}: {one}" for one in await judge.along(world)]
        else:
            broken.append(
                f"{' and '.join(step.faults)}: not well again {RECOVER_WITHIN} s after it was lifted"
            )
        return Struck(
            step.number,
            list(step.faults),
            round(struck_at - self._begun, 3),
            round(lifted - self._begun, 3),
            recovered,
            {scene.fault: dict(scene.seen) for scene in scenes},
            [*broken, *(one for scene in scenes for one in scene.broken)],
        )

    async def _recovered(self, lifted_at: float) -> bool:
        """Waits until all from before has ended, and in each stream something more since then."""
        until = time.monotonic() + RECOVER_WITHIN
        ended: dict[str, int] = {}
        while time.monotonic() < until:
            found = await self._world.figures()
            if found is not None:
                now = {service: _ended(found[service]) for service in PRODUCED}
                ended = ended or now
                moved = all(now[service] != ended[service] for service in PRODUCED)
                if moved and oldest(found) > lifted_at and self._world.all_ready():
                    return True
            await asyncio.sleep(0.05)
        return False


def oldest(found: dict[str, StreamFigures]) -> float:
    """Unix time of the oldest entry that AudioAPIServers wrote and that has not ended; inf when all have."""
    ages = (found[service].oldest_age_seconds for service in PRODUCED)
    return min((time.time() - age for age in ages if age is not None), default=float("inf"))


def _ended(figures: StreamFigures) -> int:
    """How many entries of a stream have ended, one way or another."""
    ways = (*ledger.GONE, *ledger.DEAD.values())
    return sum(figures.ledger.get(way, 0) for way in ways)


async def _strike(scene: Scene) -> str | None:
    """Strikes; says what went wrong with the striking itself."""
    try:
        async with asyncio.timeout(STRIKE_WITHIN):
            await CATALOGUE[scene.fault].strike(scene)
    except Exception as error:
        return f"{scene.fault}: could not be carried through: {error!r}"
    return None


async def _end(world: World, broken: Iterable[str]) -> Judgement:
    """Traffic stops, everything drains, the judge looks."""
    await world.operator.finish()
    await world.traffic.finish()
    begun = time.monotonic()
    while (undrained := await judge.drained(world)) and time.monotonic() - begun < DRAIN_WITHIN:
        await asyncio.sleep(0.2)
    drained_seconds = time.monotonic() - begun
    while await _ghosts(world) and time.monotonic() - begun < SWEEP_WITHIN:
        await asyncio.sleep(0.5)
    await world.grants.finish()
    return await judge.judge(world, round(drained_seconds, 3), undrained, broken)


async def _ghosts(world: World) -> bool:
    async with world.connected() as redis:
        return any([(await examine(redis, STREAMS[service])).ghosts for service in PRODUCED])


def _version(about: dict[str, object]) -> str:
    if valkey := about.get("valkey_version"):
        return f"Valkey {valkey}"
    return f"Redis {about.get('redis_version')}"


def _line(struck: Struck) -> str:
    again = f"{struck.recovered_seconds:5.1f} s" if struck.recovered_seconds is not None else "NOT YET"
    seen = Counter[str]()
    for of_one in struck.seen.values():
        seen.update(of_one)
    what = ", ".join(f"{n} {name}" for name, n in sorted(seen.items()))
    faults = " + ".join(struck.faults)
    return "\n".join(
        [f"{struck.struck_at:7.1f} s  {faults:<42} well again in {again}   {what}"]
        + [f"           !! {one}" for one in struck.broken]
    )
