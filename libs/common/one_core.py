"""One core for a busy process: while it is busy, all its threads run on the same one, the event loop's first.

The event loop's thread and the HTTP library's take turns: one hands requests over, the other brings the answers, and
Python's lock lets only one of them go on. On two cores every hand-over wakes a core that has just gone to sleep, and
carries what both work on from one cache to the other. On one core the library's thread must not push the loop aside
for each request that is handed to it, either: as a batch thread (sched(7): SCHED_BATCH) it waits until the loop has
handed over all it has. Together a record costs a third less processor time
(measured: docs/decisions/0008-a-busy-process-keeps-to-one-core.md).

    apart      as the system has it                                         half a core used      ─▶ together
    together   on the core the loop was on, all but the loop as batch       a quarter, or starved ─▶ apart

Starved is a process that others kept from its core for a third of the time in which one of its threads could run, at
two looks in a row: then the system places it anew, and it stays apart for half a minute. Looked at four times a
second; a process that is not busy is left alone.
Only on Linux, and only where the process may run on several cores.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import get_native_id
from typing import NamedTuple

from common.logs import get

LOOK_EVERY = 0.25

BUSY, CALM = 0.5, 0.25
"""Cores used, at which threads go together and at which they part."""

OFTEN, ENOUGH = 0.5, 0.7
"""Share of the time in which a thread could run, and how much of it the process must have got, or it was starved."""

WATCHED = 2

REST = 30.0
"""Seconds apart after a starved time together."""

_TASKS = Path("/proc/self/task")
_STAT = Path("/proc/self/stat")
_PROCESSOR = 36  # the field, counted behind the program's name (proc(5): 39)


class Use(NamedTuple):
    """Of the time since the last look. `cores`: used by all threads; `wanted`: the share in which one could run."""

    cores: float
    wanted: float = 0.0


def belongs_together(together: bool, use: Use, starved_before: bool) -> bool:
    """Whether the threads of this process are to share a core from now on."""
    if not together:
        return use.cores >= BUSY
    return use.cores >= CALM and not (starved_before and is_starved(use))


def is_starved(use: Use) -> bool:
    """Whether others had the core that this process has tied itself to."""
    return use.wanted >= OFTEN and use.cores < ENOUGH * use.wanted


class OneCore:
    """Keeps the threads of this process on one core while that pays."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.together = False
        self._clock = clock
        self._allowed = _allowed()
        self._looked_at = clock()
        self._used = time.process_time()
        self._watched: dict[str, int] = {}
        self._starved = False  # at the last look
        self._apart_until = 0.0
        self._log = get("one_core")

    async def run(self) -> None:
        """Looks for ever; ends where there is nothing to choose."""
        while len(self._allowed) > 1:
            await asyncio.sleep(LOOK_EVERY)
            try:
                self.look()
            except (OSError, ValueError, IndexError) as error:
                # A system that does not tell, or does not let us: as it was, and so it stays.
                self._log.debug("one_core.given_up", error=str(error))
                with suppress(OSError):
                    _place(self._allowed, os.SCHED_OTHER)
                return

    def look(self) -> None:
        """Judges the time since the last look. Raises OSError, ValueError or IndexError where /proc says nothing."""
        now, used = self._clock(), time.process_time()
        seconds = max(1e-3, now - self._looked_at)
        use = Use((used - self._used) / seconds)
        self._looked_at, self._used = now, used
        if not self.together and (use.cores < BUSY or now < self._apart_until):
            return
        if self.together:
            before, self._watched = self._watched, _could_run(self._watched)
            longest = max((ns - before[thread] for thread, ns in self._watched.items()), default=0)
            use = use._replace(wanted=longest / 1e9 / seconds)
        starved_before, self._starved = self._starved, self.together and is_starved(use)
        if belongs_together(self.together, use, starved_before) == self.together:
            return
        if self._starved:
            self._apart_until = now + REST
        self._starved = False
        self.together = not self.together
        cores = {_core_of_the_loop()} if self.together else self._allowed
        _place(cores, os.SCHED_BATCH if self.together else os.SCHED_OTHER)
        self._watched = _busiest() if self.together else {}
        self._log.debug(
            "one_core.changed", together=self.together, cores=sorted(cores), used=round(use.cores, 2)
        )


def _place(cores: set[int], policy: int) -> None:
    """All threads on these cores, those beside the caller's by this policy; one made later takes after its maker."""
    threads = [int(thread) for thread in os.listdir(_TASKS)]
    for thread in threads:
        if thread != get_native_id():
            with suppress(ProcessLookupError, PermissionError):  # it has ended, or that is not for us
                os.sched_setscheduler(thread, policy, os.sched_param(0))
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def _allowed() -> set[int]:
    """The cores among which there is a choice; none where an operator has chosen how this process is scheduled."""
    if not hasattr(os, "sched_getaffinity") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return set()
    return os.sched_getaffinity(0)


def _busiest() -> dict[str, int]:
    """The WATCHED threads that could run for longest so far; the others, of which there are dozens, hardly ever do."""
    found = _could_run(os.listdir(_TASKS))
    if not any(found.values()):
        raise ValueError("this system keeps no account of threads")
    busiest = sorted(found, key=lambda thread: found[thread])[-WATCHED:]
    return {thread: found[thread] for thread in busiest}


def _could_run(threads: Iterable[str]) -> dict[str, int]:
    """Nanoseconds for which each thread ran or waited for a core so far."""
    found = {}
    for thread in threads:
        try:
            ran, waited, _ = (_TASKS / thread / "schedstat").read_text().split()
        except FileNotFoundError:  # it has ended meanwhile
            continue
        found[thread] = int(ran) + int(waited)
    return found


def _core_of_the_loop() -> int:
    return int(_STAT.read_text().rsplit(")", 1)[1].split()[_PROCESSOR])
