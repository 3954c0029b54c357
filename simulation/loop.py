"""An event loop without a clock and without a network: time is what the next timer says, and a seed deals the cards.

Processes share it. Each runs its callbacks in the order in which they became ready, as any event loop does;
whose turn it is, is drawn. A killed process runs nothing any more, no `finally` and no callback; a paused one
runs nothing until it is resumed, while time goes on for everybody else.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

EPOCH = 1_700_000_000.0
"""Time of day at the loop's second 0; ids of entries follow it."""

MOST_AT_ONCE = 100_000
"""Callbacks that may run without time moving on: beyond this somebody spins."""


class Spinning(Exception):
    """Callbacks beget callbacks, and time stands still."""


class Stuck(Exception):
    """Nothing is ready and no timer is set, while the simulation is not over."""


class Process:
    """What a signal can be sent to: tasks that live and die together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.dies_after: int | None = None  # so many callbacks from now
        self.died: Callable[[], None] = lambda: None
        self.tasks: list[asyncio.Task[Any]] = []  # kept, so that no garbage collector ends them
        self.ready: deque[asyncio.Handle] = deque()

    def kill(self) -> None:
        """SIGKILL: from here on nothing of it runs."""
        if self.alive:
            self.alive = False
            self.ready.clear()
            self.died()

    def __repr__(self) -> str:
        return self.name


_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current() -> Process | None:
    """The process whose code is running; None: the world around them."""
    return _current.get()


class Loop(asyncio.BaseEventLoop):
    """A virtual clock, and a draw of whose callback is next."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.world = contextvars.Context()
        self.steps = 0
        self._random = random.random
        self._now = 0.0
        self._world = Process("world")
        self._runnable: list[Process] = []
        self._frozen: list[Process] = []  # paused, with something to run
        self._at_once = 0
        self.set_task_factory(_kept_task)
        self.world_tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        return self._now

    def wall(self) -> float:
        """The time of day that goes with it."""
        return EPOCH + self._now

    def spawn(self, process: Process, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task of that process."""
        context = contextvars.Context()
        context.run(_current.set, process)
        return self.create_task(coroutine, name=name, context=context)

    def in_world(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """Calls it later, outside of all processes: what is under way in a network dies with nobody."""
        return self.call_later(delay, callback, *args, context=self.world)

    def resume(self, process: Process) -> None:
        """SIGCONT."""
        process.paused = False
        if process in self._frozen:
            self._frozen.remove(process)
            self._runnable.append(process)

    # -- what BaseEventLoop asks of a loop ---------------------------------------------------------

    def _run_once(self) -> None:
        self._deal()
        runnable = self._runnable
        if not runnable:
            self._advance()
            return
        self._at_once += 1
        if self._at_once > MOST_AT_ONCE:
            raise Spinning(f"{MOST_AT_ONCE} callbacks at {self._now:.6f} s")
        drawn = int(self._random() * len(runnable)) if len(runnable) > 1 else 0
        process = runnable[drawn]
        if process.paused:
            runnable[drawn] = runnable[-1]
            runnable.pop()
            self._frozen.append(process)
            return
        if process.dies_after is not None:
            process.dies_after -= 1
            if process.dies_after < 0:
                process.kill()
        if not process.ready:
            runnable[drawn] = runnable[-1]
            runnable.pop()
            return
        handle = process.ready.popleft()
        if not process.ready:
            runnable[drawn] = runnable[-1]
            runnable.pop()
        if not handle._cancelled:
            self.steps += 1
            handle._run()

    def _deal(self) -> None:
        """What has become ready goes to the process it belongs to; what belongs to a dead one goes nowhere."""
        ready = self._ready  # type: ignore[attr-defined]
        while ready:
            handle = ready.popleft()
            process = handle._context.get(_current) or self._world
            if process.alive:
                if not process.ready and process not in self._frozen:
                    self._runnable.append(process)
                process.ready.append(handle)

    def _advance(self) -> None:
        """On to the next timer that is set."""
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not scheduled:
            raise Stuck(f"nothing is left to happen at {self._now:.6f} s")
        if scheduled[0]._when > self._now:
            self._now = scheduled[0]._when
            self._at_once = 0
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                self._ready.append(handle)  # type: ignore[attr-defined]

    def _write_to_self(self) -> None:
        raise AssertionError("there is no other thread")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap until its time has come."""

    def dismiss(self) -> None:
        """The end: what still hangs is dropped without a word."""
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()


def _kept_task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    context = options.get("context")
    process = context.get(_current) if context is not None else _current.get()
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    (process.tasks if process is not None else loop.world_tasks).append(task)
    return task
