"""The simulation is a judge, so it is judged: a seed replays to the letter, and its clock and processes are true."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from random import Random

import pytest

from simulation.judge import Judge
from simulation.loop import EPOCH, Loop, Process, Spinning, Stuck, current
from simulation.mutations import ROOT
from simulation.plan import MAX_DELIVERIES, MOST_KILLS, draw
from simulation.world import World, play

SEEDS = (1, 2, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_breaks_no_promise_and_replays_to_the_letter(seed: int) -> None:
    first, again = play(seed), play(seed)
    assert first.offences == []
    assert first == again


def test_a_seed_replays_in_another_process_with_another_hash_seed() -> None:
    code = "from simulation.world import play; print(*(play(seed).digest for seed in (1, 2)))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "libs", ROOT / "services"))),
        "PYTHONHASHSEED": "4711",
    }
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=50,
    )  # fmt: skip
    assert told.stdout.split() == [play(1).digest, play(2).digest]


def test_a_story_tells_the_plan_and_every_step() -> None:
    told = play(1, tracing=True)
    assert told.story.startswith("seed 1: ")
    assert "produced" in told.story
    assert "recorded" in told.story


def test_random_deaths_alone_never_make_an_entry_look_poisonous() -> None:
    assert MOST_KILLS < MAX_DELIVERIES
    for seed in range(200):
        kills = [fault for fault in draw(seed).faults if "kill" in fault.what]
        assert len(kills) <= MOST_KILLS


def test_time_goes_on_only_when_nothing_is_left_to_do() -> None:
    loop = Loop(Random(1))

    async def wait() -> tuple[float, float]:
        began = loop.time()
        await asyncio.sleep(3600)
        return loop.time() - began, loop.wall()

    assert loop.run_until_complete(wait()) == (3600.0, EPOCH + 3600.0)
    loop.dismiss()


def test_a_killed_process_runs_nothing_more_not_even_its_clean_up() -> None:
    loop, process, said = Loop(Random(1)), Process("p"), []

    async def live() -> None:
        assert current() is process
        try:
            await asyncio.sleep(5)
            said.append("woke")
        finally:
            said.append("cleaned up")

    task = loop.spawn(process, live(), "p")
    loop.in_world(1.0, process.kill)
    loop.run_until_complete(asyncio.wait({loop.create_task(asyncio.sleep(10))}))
    assert said == []
    assert not task.done()
    loop.dismiss()


def test_a_paused_process_goes_on_where_it_was_when_it_is_resumed() -> None:
    loop, process, woke = Loop(Random(1)), Process("p"), []

    async def live() -> None:
        await asyncio.sleep(1)
        woke.append(loop.time())

    loop.spawn(process, live(), "p")
    loop.in_world(0.5, setattr, process, "paused", True)
    loop.in_world(7.0, loop.resume, process)
    loop.run_until_complete(asyncio.wait({loop.create_task(asyncio.sleep(10))}))
    assert woke == [7.0]
    loop.dismiss()


def test_a_loop_that_spins_or_has_nothing_left_is_found_out() -> None:
    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    for life, found in ((spin(), Spinning), (asyncio.Event().wait(), Stuck)):
        loop = Loop(Random(1))
        task = loop.create_task(life)
        with pytest.raises(found):
            loop.run_until_complete(task)
        loop.dismiss()


def test_the_judge_misses_what_is_gone_and_was_never_recorded() -> None:
    world = World(draw(1))
    judge: Judge = world.judge
    judge.produced(world.plan.entries[0], "1700000000001-0", b"{}")
    judge.reconcile()
    assert [text for text in judge.offences if "lost" in text]
