"""What one sees of the demo while it runs: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from dataplane_agent import printing, status
from dataplane_agent.status import Snapshot

LINE_EVERY = 2.0
EVENTS_SHOWN = 10


class Scene(msgspec.Struct, frozen=True):
    """One look at everything."""

    snapshot: Snapshot
    produced: int
    recorded: int
    control_plane_is_up: bool

    def line(self) -> str:
        """The scene in one line."""
        figures = [figure for _, figure in self.snapshot.streams]
        dead = sum(sum(figure.dead.values()) for figure in figures)
        return (
            f"produced {self.produced}, recorded {self.recorded}, "
            f"backlog {sum(f.backlog for f in figures)}, pending {sum(f.pending for f in figures)}, "
            f"dead {dead}, ControlPlane {'up' if self.control_plane_is_up else 'DOWN'}"
        )


class Show(ABC):
    """Tells what happens, each event with the seconds since the beginning."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def event(self, text: str) -> None:
        """Something happened."""
        self._event(f"{time.monotonic() - self._begun:6.1f} s  {text}")

    @abstractmethod
    def _event(self, line: str) -> None: ...

    @abstractmethod
    def scene(self, scene: Scene) -> None:
        """This is how it looks now."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Lines(Show):
    """Events as they come, and a line about the figures now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._told = 0.0

    def _event(self, line: str) -> None:
        print(line, flush=True)

    def scene(self, scene: Scene) -> None:
        if time.monotonic() - self._told >= LINE_EVERY:
            self._told = time.monotonic()
            self.event(f"  {scene.line()}")


class Screen(Show):
    """Tables that are drawn again and again, the last events below them."""

    def __init__(self) -> None:
        super().__init__()
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._scene: Scene | None = None
        self._live = Live(auto_refresh=False)

    def _event(self, line: str) -> None:
        self._events.append(line)
        self._draw()

    def scene(self, scene: Scene) -> None:
        self._scene = scene
        self._draw()

    def _draw(self) -> None:
        parts: list[Text | Group] = []
        if self._scene is not None:
            streams, services, _ = status.tables(self._scene.snapshot)
            tables = Group(printing.drawn(*streams), Text(), printing.drawn(*services))
            parts += [tables, Text(), Text(self._scene.line(), style="bold"), Text()]
        self._live.update(Group(*parts, *map(Text, self._events)), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def opened() -> Show:
    """The show that fits the output; use it as a context."""
    return Screen() if sys.stdout.isatty() else Lines()
