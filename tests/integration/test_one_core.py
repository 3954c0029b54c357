"""The threads of a real process on the cores of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from common.one_core import LOOK_EVERY

BUSY = """
import asyncio, threading, time
from common.one_core import OneCore

busy = threading.Event()
busy.set()

def turn():
    while True:
        busy.wait()
        sum(range(1000))

async def main():
    for _ in range(2):
        threading.Thread(target=turn, daemon=True).start()
    loop = asyncio.get_running_loop()
    looking = asyncio.create_task(OneCore(loop.time).run())
    await loop.run_in_executor(None, input)
    busy.clear()
    await loop.run_in_executor(None, input)

asyncio.run(main())
"""
"""Two threads that take turns at Python's lock; a line on its standard input calms them, a second one ends it."""

HOG = "while True: pass"

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="there is nothing to choose on a machine with one core",
)


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def cores_of(pid: int) -> list[set[int]]:
    """The cores on which each of its threads may run."""
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]


def until(reached: Callable[[], bool], within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(LOOK_EVERY / 10)


def policies_of(pid: int) -> tuple[int, set[int]]:
    """How the loop's thread is scheduled, and how the others are."""
    others = [int(thread) for thread in os.listdir(f"/proc/{pid}/task") if int(thread) != pid]
    return os.sched_getscheduler(pid), {os.sched_getscheduler(thread) for thread in others}


def on_one_core(pid: int) -> bool:
    cores = cores_of(pid)
    together = len(cores[0]) == 1 and all(other == cores[0] for other in cores)
    return together and policies_of(pid) == (os.SCHED_OTHER, {os.SCHED_BATCH})


def on_all_cores(pid: int) -> bool:
    apart = all(cores == os.sched_getaffinity(0) for cores in cores_of(pid))
    return apart and policies_of(pid) == (os.SCHED_OTHER, {os.SCHED_OTHER})


def test_a_busy_process_goes_to_one_core_with_all_its_threads_and_leaves_it_when_it_is_calm() -> None:
    with running(BUSY) as process:
        until(lambda: on_one_core(process.pid))
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        until(lambda: on_all_cores(process.pid))
        assert process.poll() is None


def test_a_process_that_others_starve_on_its_core_leaves_it() -> None:
    with running(BUSY) as process, ExitStack() as hogs:
        until(lambda: on_one_core(process.pid))
        (core,) = cores_of(process.pid)[0]
        for _ in range(4):
            hog = hogs.enter_context(running(HOG))
            os.sched_setaffinity(hog.pid, {core})
        until(lambda: on_all_cores(process.pid))
