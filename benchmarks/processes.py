"""Processes that are measured: started, watched, surely ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dataplane_agent.memory import total_pss_mb

TICKS = os.sysconf("SC_CLK_TCK")
CPU_EVERY, PSS_EVERY = 0.05, 0.5


class Ended(RuntimeError):
    """A process ended although it was to run on."""


class Process:
    """A child in a session of its own, with its output in a file."""

    def __init__(self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.begun = time.time()
        env = {**os.environ, **(environment or {})}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling at every start would be measured too
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raises Ended, with the last it said, if it runs no more."""
        if (code := self._popen.poll()) is not None:
            said = self.log.read_text(errors="replace")[-2000:]
            raise Ended(f"{' '.join(self._popen.args)!s} ended with {code}:\n{said}")  # type: ignore[arg-type]

    def finish(self, within: float = 120.0) -> None:
        """Waits until it has ended well; raises Ended or subprocess.TimeoutExpired."""
        if self._popen.wait(within) != 0:
            self.check()

    def stop(self, within: float = 20.0) -> None:
        """SIGTERM, then SIGKILL for whatever is left of its session."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(within)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """The events a service has logged so far."""
        for line in self.log.read_bytes().splitlines():
            if line.startswith(b"{"):
                try:
                    yield json.loads(line)
                except ValueError:  # not written to its end yet
                    return

    def await_events(self, name: str, number: int = 1, within: float = 30.0) -> list[dict[str, Any]]:
        """The first so many events of this name; raises Ended or TimeoutError."""
        deadline = time.monotonic() + within
        while True:
            found = [event for event in self.events() if event.get("event") == name]
            if len(found) >= number:
                return found[:number]
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} was logged {len(found)} times in {within} s: {self.log}")
            time.sleep(0.005)


def family(pids: Iterable[int]) -> list[int]:
    """These processes and all below them."""
    found, ahead = [], list(pids)
    while ahead:
        pid = ahead.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                ahead += map(int, children.read_text().split())
            except OSError:
                pass
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes so far, of what they have reaped too."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


class Sampler:
    """Reads processor time and memory of process families while the block runs."""

    def __init__(self, **watched: Sequence[Process]) -> None:
        self.cpu: dict[str, list[tuple[float, float]]] = {name: [] for name in watched}
        self.pss: dict[str, list[tuple[float, float]]] = {name: [] for name in watched}
        self._watched = watched
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._read(pss=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._read(pss=True)

    def peak_mb(self, name: str) -> float:
        return max(mb for _, mb in self.pss[name])

    def _run(self) -> None:
        weighed = 0.0
        while not self._end.wait(CPU_EVERY):
            weigh = time.monotonic() - weighed >= PSS_EVERY
            weighed = time.monotonic() if weigh else weighed
            self._read(pss=weigh)

    def _read(self, pss: bool) -> None:
        for name, processes in self._watched.items():
            pids = family(process.pid for process in processes)
            self.cpu[name].append((time.time(), cpu_seconds(pids)))
            if pss:
                self.pss[name].append((time.time(), total_pss_mb(pids)))
